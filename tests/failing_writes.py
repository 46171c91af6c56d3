"""Runs of training on a disk that fails: `python failing_writes.py SHARES FOLDER OPTION ...`, with the shim preloaded.

A first run counts the calls that write. Then SHARES runs fail from a call on, evenly over all calls, or at each one if
SHARES is 0; then each goes on with --resume_from_checkpoint latest. FOLDER/log.jsonl gets a line for each. Each run is
a fork of this process, which has imported everything.
"""

import ctypes
import errno
import json
import os
import sys
import tempfile
from pathlib import Path

from persam_dreambooth import cli, main_job  # noqa: F401
from persam_dreambooth.dreambooth import trainer  # noqa: F401
from persam_dreambooth.dreambooth.families import registry  # noqa: F401

shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
shim.counted.restype = ctypes.c_long


def main(shares, folder, *options):
    for kind in ("ENOSPC", "EACCES"):
        whole = run(folder / f"whole-{kind}", options, kind, -1)
        assert whole["code"] == 0, whole
        calls = range(whole["calls"])
        for call in calls if not shares else [calls[len(calls) * share // shares] for share in range(shares)]:
            place = folder / f"{kind}-{call}"
            failed = run(place, options, kind, call)
            moved = list((folder / "tmp").glob("persam-dreambooth-*/checkpoint-*"))
            for path in moved:
                path.rename(place / path.name)
            again = run(place, [*options, "--num_validation_images", "0"], kind, -1)
            line = {"folder": place.name, "moved": [path.name for path in moved], "failed": failed, "again": again}
            with (folder / "log.jsonl").open("a") as lines:
                lines.write(json.dumps(line) + "\n")


def run(place, options, kind, call):
    """A run into a folder whose disk fails from a call on, or never; its exit code, the calls, and what it said."""
    (place.parent / "tmp").mkdir(exist_ok=True)
    child = os.fork()
    said = place.parent / "said"
    if not child:
        tempfile.tempdir = str(place.parent / "tmp")
        out = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        shim.fail_from(str(place).encode(), ctypes.c_long(call), getattr(errno, kind))
        arguments = ["train", *options, "--output_dir", str(place), "--resume_from_checkpoint", "latest"]
        code = cli.main(arguments)
        (place.parent / "calls").write_text(str(shim.counted()))
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "calls": int((place.parent / "calls").read_text()), "said": said.read_text()}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
