"""The page of `app` in a real browser: its server as a process of its own, and what a visit may not do."""

import base64
import mimetypes
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SCREENSHOTS = "PERSAM_SCREENSHOTS"
"""Environment variable: the folder in which `screenshots` leaves pictures of the page; none are made without it."""

SIZES = {"wide": (1280, 800), "phone": (390, 844)}
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def find_chromium():
    """The browser's path, or None; the environment variable PERSAM_CHROMIUM names another one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("PERSAM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def need(*modules, chromium=False):
    """Skips the test if a part is missing, and says which; in CI, where CI is set, it fails."""
    missing = [name for name in modules if not find_spec(name)] + ["chromium"] * (chromium and not find_chromium())
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{', '.join(missing)} not installed")


def launch_chromium(playwright):
    return playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(happened, what="", seconds=60):
    """Waits for what happens, and returns it; `what`, or what it returns, tells what was there instead."""
    ends = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < ends, what() if callable(what) else what
        time.sleep(0.05)
    return found


def open_step(page, title):
    page.get_by_role("tab", name=title, exact=True).click()


class AppServer:
    """`persam-dreambooth app` as a process, and the jobs that it starts.

    Args:
        workspace: the folder of the subjects.
        words: further options of the command.

    `url` is the page's address, `process` the server's process, `seconds` the time from its start to that of the
    address, `log` the file with all that it prints.
    """

    def __init__(self, workspace, *words):
        self.workspace, self.words = Path(workspace), list(map(str, words))
        self.log = self.workspace.parent / f"{self.workspace.name}-server.log"
        self._mark = f"app-{uuid.uuid4()}"  # the jobs inherit the environment, so their processes are found by it
        self.start()

    def start(self):
        """Starts the server, or starts it again after `kill`, on a free port."""
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "persam_dreambooth", "app", "--no_browser", "--port", str(port)]
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--workspace", str(self.workspace), *self.words],
                env={**os.environ, **variables, "PERSAM_TEST_SERVER": self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while f"127.0.0.1:{port}" not in self.said():
            if self.process.poll() is not None or time.monotonic() > started + 60:
                self.end()
                pytest.fail(f"the server did not start: {self.said()}")
            time.sleep(0.02)
        self.seconds = time.monotonic() - started

    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self):
        """Kills the server as a power cut would; its jobs live on."""
        self.process.kill()
        self.process.wait()

    def end(self):
        """Ends the server and all of its jobs."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("PERSAM_TEST_SERVER") == self._mark:
                    process.kill()
            except psutil.Error:  # it ended meanwhile, or it is another user's
                continue
        self.process.wait()


class Faults(list):
    """What went wrong in the browser during a test: errors in its console, requests that failed or went elsewhere."""

    def watch(self, context):
        context.on("console", lambda said: said.type == "error" and self.append(f"console: {said.text}"))
        context.on("weberror", lambda error: self.append(f"script: {error.error}"))
        context.on("request", self._leaving)
        context.on("requestfailed", self._failed)
        context.on("response", lambda answer: answer.status >= 400 and self.append(f"{answer.status}: {answer.url}"))

    def _leaving(self, request):
        if not request.url.startswith(("http://127.0.0.1:", "http://localhost:", "data:", "blob:")):
            self.append(f"elsewhere: {request.url}")

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # of a page that is left or reloaded
            self.append(f"failed: {request.url}: {request.failure}")


def reload(page, faults, shown):
    """Reloads the page and waits for `shown`; Gradio reports the requests that this ends as errors, which are no faults
    of the page."""
    seen = len(faults)
    page.reload()
    shown.wait_for()
    faults[seen:] = [said for said in faults[seen:] if "AbortError" not in said and "errored out" not in said]


def drop_files(target, paths):
    """Drops files on an element, as from the desktop."""
    files = [
        (path.name, mimetypes.guess_type(path.name)[0] or "", base64.b64encode(path.read_bytes()).decode())
        for path in map(Path, paths)
    ]
    held = target.page.evaluate_handle(
        """files => {
            const held = new DataTransfer();
            for (const [name, type, bytes] of files)
                held.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name, {type}));
            return held;
        }""",
        files,
    )
    for event in ("dragenter", "dragover", "drop"):
        target.dispatch_event(event, {"dataTransfer": held})


def screenshots(page, name):
    """Pictures of the whole page, wide and on a phone, light and dark, if the environment names a folder for them."""
    folder = os.environ.get(SCREENSHOTS)
    if not folder:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(500)
            page.screenshot(path=Path(folder) / f"{name}-{size}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(dict(zip(("width", "height"), SIZES["wide"], strict=True)))


def reaches_beyond(page):
    """How many pixels the page is wider than the window: on a phone, 0."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
