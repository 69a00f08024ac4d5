"""The demo's web: a folder, served on loopback while `download` fetches from it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from capfilt.errors import InputError, UsageError

log = logging.getLogger(__name__)


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder; what it would print goes to the debug log."""

    def log_message(self, format: str, *args: object) -> None:
        log.debug("demo server: " + format, *args)

    def send_head(self):  # type: ignore[no-untyped-def]
        # the handler strips `..` itself, but would follow a symbolic link out of the folder
        root = Path(self.directory).resolve()
        if not Path(self.translate_path(self.path)).resolve().is_relative_to(root):
            self.send_error(404, "File not found")
            return None
        return super().send_head()


class _Server(ThreadingHTTPServer):
    """A backlog for many connections at once; tracebacks of hung-up clients are not shown."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("demo server: connection of %s broke", client_address, exc_info=True)


@contextmanager
def serve(folder: str | Path, port: int) -> Iterator[str]:
    """Serves a folder on 127.0.0.1 until the block ends.

    Args:
        folder: what to serve; nothing outside it is.
        port: the TCP port; 0 takes any free one.

    Yields:
        The address, as `http://127.0.0.1:18780`.

    Raises:
        InputError: the folder is not there.
        UsageError: the port is taken.
    """
    if not Path(folder).is_dir():
        raise InputError(
            f"demo.serve: folder {str(folder)!r} is not there; give the folder that holds the "
            "demo's pictures (relative to the working directory)"
        )
    handler = partial(_Handler, directory=str(folder))
    try:
        server = _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise UsageError(
            f"demo.port: port {port} on 127.0.0.1 can't be used ({error.strerror or error}); "
            "end the program that holds it (perhaps another run of the demo)"
        ) from None
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
