"""`app`: serves the page on this machine; what it starts goes on without it."""

from __future__ import annotations

import inspect
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from persam_dreambooth.app.app_options import AppOptions
from persam_dreambooth.errors import InputError, counted
from persam_dreambooth.extras import check_installed
from persam_dreambooth.options import takes_options
from persam_dreambooth.photos.images import PHOTO_SUFFIXES

LOOPBACK = "127.0.0.1"

OWN_HOSTS = {LOOPBACK, "localhost", "::1"}
"""Names of this machine by which a browser on it asks for the page."""

SERVED = {*PHOTO_SUFFIXES, ".html", ".md", ".safetensors", ".zip"}
"""Suffixes of files in the workspace that the page shows or offers; not options, logs, records of jobs."""

LARGEST_UPLOAD = "250mb"
"""The largest file that the browser may send; beyond it, Gradio refuses all files of a drop. The step Photos has a
lower limit, and says which file is beyond it."""

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What the browser may load: only from the page's own server, so that it works without network."""

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]


class Guard:
    """Refuses requests of other sites' pages and for files that are not the page's, and adds the content policy.

    Another site's page can send requests to a server on this machine, under a name of its own that it lets point here
    (DNS rebinding); they carry its name as host or origin.

    Args:
        app: the application.
        hosts: the names by which the page may be asked for; empty for any.
        workspace: its files with a suffix in `SERVED` are served.
        uploads: all its files are served.
    """

    def __init__(self, app: Any, hosts: set[str], workspace: Path, uploads: Path) -> None:
        self.app, self.hosts = app, hosts
        self.workspace, self.uploads = workspace.resolve(), uploads.resolve()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Handles one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._is_foreign(headers) or self._is_closed(scope["path"]):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused"})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"same-origin")]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, with_policy)

    def _is_foreign(self, headers: dict[str, str]) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
            return True
        return origin is not None and urlsplit(origin).netloc.lower() != host.lower()

    def _is_closed(self, path: str) -> bool:
        """Whether a request is for a file that is not served; links are followed first."""
        _, found, name = path.partition("file=")
        if not found and "/file/" in path:
            _, found, name = path.partition("/file/")
        if not found:
            return False
        file = Path(os.path.realpath(name))
        if self.uploads in file.parents:
            return False
        return self.workspace not in file.parents or file.suffix.lower() not in SERVED


@takes_options(AppOptions)
def serve(options: AppOptions) -> None:
    """Serves the page until Ctrl-C, which raises `KeyboardInterrupt` with the final line.

    Raises:
        InputError: options that cannot be used, or a port in use.
    """
    options.check()
    check_installed("gradio", "app")
    address = "0.0.0.0" if options.listen else LOOPBACK
    _check_port(address, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="persam-dreambooth-", ignore_cleanup_errors=True) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # of this user alone, unlike Gradio's
        gr = _import_gradio()
        from starlette.middleware import Middleware

        from persam_dreambooth.app.desk import Desk
        from persam_dreambooth.app.page import build_page

        desk = Desk(options)
        hosts = set[str]() if options.listen else OWN_HOSTS
        guard = Middleware(Guard, hosts=hosts, workspace=desk.workspace, uploads=Path(uploads))
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        page = build_page(desk)
        try:
            page.launch(
                server_name=address, server_port=options.port, auth=options.login, share=False, inbrowser=False,
                prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
                mcp_server=False, enable_monitoring=False, max_file_size=LARGEST_UPLOAD,
                allowed_paths=[str(desk.workspace.resolve())], theme=gr.themes.Default(**fonts),
                app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
            )  # fmt: skip
        except OSError as error:
            raise _taken(options.port) from error
        url = f"http://{LOOPBACK}:{options.port}"
        print(f"the page: {url}; Ctrl-C closes it", flush=True)
        try:
            if not options.no_browser:
                import webbrowser

                webbrowser.open(url)
            threading.Thread(target=_load_torch, daemon=True).start()
            threading.Event().wait()
        except KeyboardInterrupt:
            alive = sum(job.is_alive for job in desk.jobs.all())
            going = f"; {counted(alive, 'job')} still running" if alive else ""
            page.close(verbose=False)
            raise KeyboardInterrupt(f"the page is closed{going}; the same command opens it again") from None


def _import_gradio() -> Any:
    """Gradio, without the type stubs that it writes beside its own files at each import, for half of the time."""
    with mock.patch.object(inspect, "getfile", side_effect=OSError):  # it takes a class without a file for a custom one
        return import_module("gradio")


def _load_torch() -> None:
    """Imports what the SAM needs, while the user looks at the page."""
    import_module("persam_dreambooth.segmentation.sams.checkpoints")


def _check_port(address: str, port: int) -> None:
    with socket.socket() as probe:
        if sys.platform != "win32":  # where it would allow a port in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            raise _taken(port) from None


def _taken(port: int) -> InputError:
    return InputError(f"port {port} is in use or not allowed: choose another with --port")
