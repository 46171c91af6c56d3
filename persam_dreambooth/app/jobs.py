"""Jobs: commands that the page starts, each in a process of its own that outlives the server and waits for its turn.

    cat/jobs/
      0001.json     the words of the command, its working folder, when it started, its exit code
      0001.log      what it printed
      0001.lock     held by its process while it waits and runs
      0001.stop     a request to stop, which its process removes

Numbers are unique in the workspace. The queue is nothing but these files: a job waits while the process of an earlier
one lives, and a process that was killed releases its lock. So several servers share one queue, and none is needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from persam_dreambooth.errors import SaveError
from persam_dreambooth.files import is_locked, saving, write_json

if TYPE_CHECKING:
    from persam_dreambooth.app.subject_folder import SubjectFolder

JOBS = "jobs"
"""The folder of a subject's jobs in its folder."""

QUEUE_LOCK = ".jobs.lock"
"""The lock in the workspace under which a job gets its number."""

DRAFT = ".new"
"""The suffix of a job's file until its process holds the lock."""

AUTH_VARIABLE = "PERSAM_DREAMBOOTH_AUTH"
"""The environment variable of the page's name and password, which jobs do not get."""

POLL = 0.2
"""Time between two looks at the queue or at a request to stop, in seconds."""

LONGEST_TAIL = 40_000
"""Bytes of a log that are read from its end."""

STOPPED = {128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
"""Exit codes of a command that was asked to stop."""

JobState = Literal["waiting", "running", "done", "failed", "stopped", "killed"]


@dataclass(frozen=True)
class Job:
    """A command that the page started; every property reads the disk.

    Args:
        path: its file, NNNN.json.
    """

    path: Path

    @property
    def number(self) -> int:
        """Its place in the queue of the workspace, from 1."""
        return int(self.path.stem)

    @property
    def subject(self) -> str:
        """The name of its subject."""
        return self.path.parents[1].name

    @property
    def words(self) -> list[str]:
        """The words of the command after `persam-dreambooth`."""
        return list(self._entry.get("words", ()))

    @property
    def code(self) -> int | None:
        """The exit code; None before the end, and if the process was killed."""
        return self._entry.get("code")

    @property
    def is_alive(self) -> bool:
        """Whether its process waits or runs."""
        return self.code is None and is_locked(self._beside(".lock"))

    @property
    def state(self) -> JobState:
        """What the job does, or how it ended; `killed` if its process ended without an exit code."""
        alive = self.is_alive  # before the entry, which the process writes last
        code = self.code
        if code is None:
            if alive:
                return "running" if "started" in self._entry else "waiting"
            return "killed"
        return "done" if code == 0 else "stopped" if code in STOPPED else "failed"

    @property
    def seconds(self) -> float | None:
        """How long it ran or has run so far; None if it has not started or was killed."""
        entry = self._entry
        if "started" not in entry or ("ended" not in entry and not self.is_alive):
            return None
        return float(entry.get("ended", time.time()) - entry["started"])

    @property
    def log(self) -> str:
        """The end of what it printed; of a progress bar, what it shows now."""
        try:
            with self._beside(".log").open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - LONGEST_TAIL))
                text = stream.read().decode("utf-8", "replace").replace("\r\n", "\n")
        except OSError:
            return ""
        shown = (next((part for part in reversed(line.split("\r")) if part.strip()), "") for line in text.split("\n"))
        return "\n".join(shown).strip("\n")

    @property
    def message(self) -> str:
        """Its last line: the result, or the error."""
        return next((line.strip() for line in reversed(self.log.split("\n")) if line.strip()), "")

    def stop(self) -> None:
        """Asks its process to stop, as Ctrl-C does: a training saves a checkpoint first, a waiting job ends at once.

        A second request while the first one is carried out stops at once. A job that has ended is left as it is.
        """
        if self.is_alive:
            with saving(self.path):
                self._beside(".stop").touch()

    @property
    def _entry(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _beside(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)


class Jobs:
    """The queue of a workspace.

    Args:
        workspace: the folder of all subjects.
    """

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def submit(self, subject: SubjectFolder, words: list[str]) -> Job:
        """Starts the process of a job, which waits for the earlier ones of the workspace.

        Args:
            subject: whose job it is.
            words: of the command line, after `persam-dreambooth`.

        Raises:
            SaveError: the disk is full or read-only, or the process ended at once.
        """
        folder = subject.folder / JOBS
        with saving(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.workspace / QUEUE_LOCK):
                number = 1 + max((job.number for job in self.all()), default=0)
                job = Job(folder / f"{number:04}.json")
                draft = job.path.with_suffix(DRAFT)
                for old in folder.glob(f"{job.path.stem}.*"):  # of a process that ended before it had begun
                    old.unlink()
                write_json(draft, {"words": words, "folder": os.getcwd(), "submitted": time.time()})
                process = _start_runner(job.path)
                while draft.exists() and process.poll() is None:
                    time.sleep(0.02)
                if draft.exists():
                    raise SaveError(f"the job cannot start: {job.message or f'exit code {process.returncode}'}")
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left
        return job

    def of(self, subject: SubjectFolder) -> list[Job]:
        """The jobs of a subject, the newest last."""
        return _listed((subject.folder / JOBS).glob("*.json"))

    def all(self) -> list[Job]:
        """The jobs of all subjects, the newest last."""
        return _listed(self.workspace.glob(f"*/{JOBS}/*.json"))


def _listed(paths: Any) -> list[Job]:
    return sorted((Job(path) for path in paths if path.stem.isdecimal()), key=lambda job: job.number)


def _start_runner(path: Path) -> subprocess.Popen[bytes]:
    """Starts a job's process, which has no terminal and none of the server's files."""
    settings = {name: value for name, value in os.environ.items() if name != AUTH_VARIABLE}
    settings |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TQDM_MININTERVAL": "1"}
    flags: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        flags = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "persam_dreambooth.app.jobs", str(path)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=settings, **flags,
        )  # fmt: skip


# In the job's process


def run_job(path: Path) -> int:
    """Waits for the job's turn, runs its command, and writes the exit code to its file; returns the code.

    Args:
        path: the job's file, which gets this name once the lock is held.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server in the background ignores it
    with FileLock(path.with_suffix(".lock")):
        os.replace(path.with_suffix(DRAFT), path)
        entry = dict(json.loads(path.read_text(encoding="utf-8")))
        try:
            threading.Thread(target=_watch, args=(path.with_suffix(".stop"),), daemon=True).start()
            _wait_for_turn(Job(path))
            write_json(path, entry := {**entry, "started": time.time()})
            code = import_module("persam_dreambooth.cli").main(entry["words"])
        except KeyboardInterrupt:
            print("stopped", flush=True)
            code = 128 + signal.SIGINT
        except SystemExit as leaving:  # of `--help`
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        write_json(path, {**entry, "ended": time.time(), "code": code})
    return code


def _wait_for_turn(own: Job) -> None:
    """Returns once no earlier job of the workspace is alive."""
    earlier = [job for job in Jobs(own.path.parents[2]).all() if job.number < own.number]
    while earlier := [job for job in earlier if job.is_alive]:
        time.sleep(POLL)


def _watch(request: Path) -> None:
    """Interrupts the main thread at each request to stop."""
    while True:
        if request.exists():
            request.unlink(missing_ok=True)
            if sys.platform == "win32":
                import _thread

                _thread.interrupt_main()
            else:
                os.kill(os.getpid(), signal.SIGINT)  # it also ends a sleep
        time.sleep(POLL)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1])))
