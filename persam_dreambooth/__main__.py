from persam_dreambooth.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
