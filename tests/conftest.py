"""Fixtures for every test folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import COLOURS, Said, Tiny, picture

from capfilt import cli


@pytest.fixture
def capfilt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """The command line in this process, as its entry point runs it."""

    def call(*words: str | Path) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["capfilt", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    for source, count in (("human", 5), ("web", 7)):
        folder = tmp_path / source
        folder.mkdir()
        lines = []
        for number in range(count):
            name = f"{number}.png"
            (folder / name).write_bytes(picture(COLOURS[number], 24 + (source == "web")))
            lines.append({"image": name, "caption": f"a {COLOURS[number]} square"})
        if source == "web":
            (folder / "1.png").write_text("not a picture")
            (folder / "2.png").unlink()
            lines[4]["caption"] = "  "
        listed = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{source}.jsonl").write_text(listed)
    values = {
        "run_dir": str(tmp_path / "run"),
        "human": {"pairs": str(tmp_path / "human.jsonl"), "images": str(tmp_path / "human")},
        "web": {"pairs": str(tmp_path / "web.jsonl"), "images": str(tmp_path / "web")},
        "download": {"shard_size": 3},
        "pretrain": None,
    }
    return Tiny(tmp_path, values)
