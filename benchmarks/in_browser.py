"""The review page in chromium, for the benchmarks that look at it."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from playwright.sync_api import Page, sync_playwright

from capfilt.inspect import app


def find_chromium() -> str:
    """Where chromium is; ends the program where there is none."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not there: apt-get install chromium, or set CHROMIUM")
    return chromium


@contextmanager
def browser_tab(page: app.Page, chromium: str, **options: Any) -> Iterator[tuple[Page, str]]:
    """Serves the page on loopback; yields a tab of the browser, and the page's address.

    Args:
        page: of a run.
        chromium: the program.
        options: of the tab, such as `viewport`.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.create_app(page), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser.new_page(**options), f"http://127.0.0.1:{listener.getsockname()[1]}"
        browser.close()
    server.should_exit = True
    thread.join(10)
