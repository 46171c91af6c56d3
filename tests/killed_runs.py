"""Kills training runs at random moments: `python killed_runs.py KILLS LOG FOLDER OPTION ...`.

Each run is a fork of this process, which has imported everything and computed nothing, so it starts at once. A killed
run is started again with --resume_from_checkpoint latest; one that ends by itself is followed by one in a new folder.
LOG gets a line for each: the folder, and `killed` or the exit code.
"""

import os
import random
import signal
import sys
import time

from persam_dreambooth import cli, main_job  # noqa: F401
from persam_dreambooth.dreambooth import trainer  # noqa: F401
from persam_dreambooth.dreambooth.families import registry  # noqa: F401


def main(kills, log, folder, *options):
    drawn = random.Random(0)
    started = time.monotonic()
    assert run(folder / "whole", options, None) == "0"
    usual = time.monotonic() - started
    number = 0
    while kills:
        ended = run(folder / str(number), options, drawn.uniform(0, usual))
        kills -= ended == "killed"
        with log.open("a") as lines:
            lines.write(f"{number} {ended}\n")
        number += ended != "killed"
    with log.open("a") as lines:
        lines.write(f"{number} {run(folder / str(number), options, None)}\n")


def run(folder, options, seconds):
    """One run, killed after so many seconds; how it ended."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        arguments = ["train", *options, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        os._exit(cli.main(arguments))
    until = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"


if __name__ == "__main__":
    from pathlib import Path

    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
