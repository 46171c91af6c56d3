"""A subject's folder on disk: photos, first mask, masks and runs, as the commands write them.

A folder that the page made holds all parts; a training run, or a mask folder, of a terminal is a subject too:

    outputs/cat/            made by the page           outputs/dog/            of `train` in a terminal
      subject.yaml          options, with instance_dir   config.yaml           options of the run
      photos/               photos that were dropped     masks/
      first/                of `mask`: <stem>_mask.png   metrics.jsonl, samples/, generated/, ...
      masks/                of `segment`
      masked/ plain/        of `train`; masked-2, ...
      jobs/                 see `app.jobs`
"""

from __future__ import annotations

from pathlib import Path

SUBJECT = "subject.yaml"
"""The file of a subject's options: those of `train` that differ from the page's, as `--config` reads them."""

JOBS = "jobs"


class SubjectFolder:
    """A subject's folder; every property reads the disk.

    Args:
        folder: the folder, which may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
