"""The core installation stays small."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 75


@pytest.mark.slow
def test_the_core_is_at_most_75_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-e", str(ROOT)], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    names = sorted(package["name"] for package in json.loads(listed) if package["name"] != "pip")
    print(f"{len(names)} packages on Python {sys.version.split()[0]}")
    assert len(names) <= MOST, names
