"""Every shipped YAML is a config that could run, and says how it is run."""

from pathlib import Path

import pytest

from capfilt.config import load

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "pipelines").glob("*.yaml"))


def test_there_is_a_quickstart() -> None:
    assert ROOT / "pipelines" / "quickstart.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_it_fits_and_opens_with_its_command(path: Path) -> None:
    config = load(path)
    assert config.run_dir == f"runs/{path.stem}", "each has a folder of its own"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#") and f"capfilt run pipelines/{path.name}" in first


def test_run_folders_differ() -> None:
    folders = [load(path).run_dir for path in SHIPPED]
    assert len(set(folders)) == len(folders)
