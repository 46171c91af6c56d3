"""Kills `segment` at each moment that it writes: `python killed_segment.py LOG FOLDER OPTION ...`.

One run is left alone, into FOLDER/whole. Of those into FOLDER/killed, the first gets SIGINT before it renames its first
file. Each later run is killed at the next moment, before or after it renames a file, until a run ends by itself. Each
is a fork of this process, which has imported everything. LOG gets what they say, and a line with each exit code.
"""

import os
import signal
import sys
from pathlib import Path

from persam_dreambooth import cli
from persam_dreambooth.segmentation import persam  # noqa: F401
from persam_dreambooth.segmentation.sams import checkpoints  # noqa: F401


def main(log, folder, *options):
    assert run(os.devnull, [*options, "--output", str(folder / "whole")], None) == 0
    moment, code = 0, -1
    while code:
        code = run(log, [*options, "--output", str(folder / "killed")], moment)
        with log.open("a") as lines:
            lines.write(f"\nended {code}\n")
        moment += 1


def run(log, options, moment):
    """One run, which ends at a moment; its exit code."""
    child = os.fork()
    if not child:
        said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if moment is not None:
            os.replace = Rename(moment)
        os._exit(cli.main(["segment", *options]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Rename:
    """`os.replace`, which ends the process at one moment: twice the number of renames before, plus one after it."""

    def __init__(self, moment):
        self.left, self.rename = moment, os.replace
        self.signal = signal.SIGKILL if moment else signal.SIGINT

    def __call__(self, *paths):
        self.count()
        self.rename(*paths)
        self.count()

    def count(self):
        if not self.left:
            signal.raise_signal(self.signal)
        self.left -= 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
