"""Trains a personalized Stable Diffusion from a few photos and one mask; `--help` lists the options.

python train_dreambooth_masked.py --instance_dir cat/ --mask 00_mask.png
"""

from persam_dreambooth.cli import train_main

if __name__ == "__main__":
    raise SystemExit(train_main())
