import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from capfilt import demo
from capfilt.errors import InputError, UsageError


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    web = tmp_path / "web"
    web.mkdir()
    (web / "a b.txt").write_text("hello")
    (web / "link.txt").symlink_to(tmp_path / "secret.txt")
    return web


def test_serves_the_folder_on_loopback_and_stops(folder: Path) -> None:
    with demo.serve(folder, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(f"{address}/a%20b.txt", timeout=5).read() == b"hello"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/a%20b.txt", timeout=1)


@pytest.mark.parametrize(
    "path", ["../secret.txt", "%2e%2e/secret.txt", "/../secret.txt", "link.txt"]
)
def test_nothing_outside_the_folder(folder: Path, path: str) -> None:
    with demo.serve(folder, 0) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"404" in answer.splitlines()[0]
    assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1]


def test_a_port_that_is_taken_names_the_key(folder: Path) -> None:
    with demo.serve(folder, 0) as address:
        port = int(address.rsplit(":", 1)[1])
        with (
            pytest.raises(UsageError, match=rf"demo\.port: port {port} "),
            demo.serve(folder, port),
        ):
            pass


def test_the_port_is_free_again_at_once(folder: Path) -> None:
    with demo.serve(folder, 0) as address:
        port = int(address.rsplit(":", 1)[1])
        urllib.request.urlopen(f"{address}/a%20b.txt", timeout=5).read()
    with demo.serve(folder, port) as again:
        assert again == address


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"demo\.serve: folder .*nope"),
        demo.serve(tmp_path / "nope", 0),
    ):
        pass
