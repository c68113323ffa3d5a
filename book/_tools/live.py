"""Serve the built book with a Python kernel: every code cell of a page can be edited and run.

Only this machine can reach the server, and only with the token in the address that it prints. The
pages themselves stay as they are: what makes them live is added while they are served.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import AuthenticatedFileHandler
from jupyter_server.serverapp import ServerApp
from tornado import web
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
STATIC = ROOT / "book" / "_static"


class Page(AuthenticatedFileHandler):
    """A file of the site; a page gets the script that runs its cells, and the token for it."""

    # Jupyter shows files in a sandbox without access to kernels. A page of the book may reach this
    # server, and no other.
    content_security_policy = (
        "frame-ancestors 'self'; default-src 'self' 'unsafe-inline' data: blob:; connect-src 'self'"
    )

    @web.authenticated
    @authorized
    def get(self, path: str, **options: Any) -> Any:
        """Send the file."""
        file = (SITE / path).resolve()
        if file.suffix != ".html" or not file.is_file() or SITE not in file.parents:
            return super().get(path, **options)
        live = (
            '<link rel="stylesheet" href="/live/live.css">'
            f'<script defer src="/live/live.js" data-token="{self.identity_provider.token}" '
            f'data-folder="{file.stem}"></script>'
        )
        text = file.read_text(encoding="utf-8")
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        return self.finish(text.replace("</head>", f"{live}</head>", 1))


def server(port: int, folder: str, *, browser: bool = False) -> Any:
    """Make the server, not yet started; it takes the next free port if `port` is in use.

    Args:
        port: Where to listen, on this machine only; 0 for any.
        folder: Where chapters write their files, each in a folder of its own.
        browser: Whether to open the start page.
    """
    for page in SITE.glob("**/*.html"):
        Path(folder, page.stem).mkdir(exist_ok=True)
    settings = Config()
    settings.ServerApp.update(
        ip="127.0.0.1",
        port=port,
        root_dir=folder,
        open_browser=browser,
        default_url="/book/index.html",
        allow_root=True,  # as in most containers
        answer_yes=True,  # to "Shut down this server?" after Ctrl-C
        terminals_enabled=False,
        jpserver_extensions={},
        log_level="ERROR",
    )
    if os.name == "posix":
        settings.KernelManager.transport = "ipc"  # no port that others on this machine could read
    settings.MappingKernelManager.update(cull_idle_timeout=1800, cull_interval=60)
    settings.ZMQChannelsWebsocketConnection.limit_rate = False  # a figure of many states is large
    app = ServerApp(config=settings)
    app.initialize(argv=[], find_extensions=False)
    app.web_app.add_handlers(
        ".*$",
        [
            (r"/live/(live\.(?:js|css))", AuthenticatedFileHandler, {"path": str(STATIC)}),
            (r"/((?:book|_static|_images|_downloads)/.*|[\w-]+\.html)", Page, {"path": str(SITE)}),
        ],
    )
    return app


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--port", type=int, default=8888, help="default: 8888, or the next free one"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args()
    if not (SITE / "book" / "index.html").exists():
        parser.error(f"no built book in {SITE}; run `make book` first")
    with tempfile.TemporaryDirectory() as folder:
        # It prints the address, token included.
        server(options.port, folder, browser=not options.no_browser).start()


if __name__ == "__main__":
    main()
