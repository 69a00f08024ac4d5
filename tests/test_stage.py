from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, ConfigDict

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, IMAGES
from capfilt.shards import RunDir, Shard
from capfilt.stage import identify, identify_shared, run_shard


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)

    threshold: float = 0.5


OPTIONS = Options()


@dataclass(frozen=True)
class Toy:
    pairs: tuple[str, ...] = ("a/text0", "b/text0")
    models: tuple[tuple[str, Path], ...] = ()
    reads: tuple[str, ...] = ()
    reads_all: tuple[str, ...] = ()
    config: Options = OPTIONS
    name: str = "toy"
    version: int = 1
    table: str = "decisions"
    schema: pa.Schema = field(default=DECISIONS, repr=False)
    sources: tuple[str, ...] = ("web",)
    count_by: str | None = "reason"
    cheap: bool = False

    def weights(self) -> dict[str, Path]:
        return dict(self.models)

    def open(self, device: str) -> Callable[[Shard], pa.Table]:
        def work(shard: Shard) -> pa.Table:
            rows = [
                {"pair_id": pair, "source": "web", "keep": True, "reason": "kept"}
                for pair in self.pairs
            ]
            return pa.Table.from_pylist(rows, self.schema)

        return work


@dataclass(frozen=True)
class ToyPictures(Toy):
    table: str = "images"
    schema: pa.Schema = field(default=IMAGES, repr=False)
    count_by: str | None = None

    def open(self, device: str) -> Callable[[Shard], pa.Table]:
        blank = {
            **dict.fromkeys(IMAGES.names),
            "source": "web",
            "captions": [],
            "status": "success",
        }
        rows = [{**blank, "key": key, "image": b"x"} for key in self.pairs]
        return lambda shard: pa.Table.from_pylist(rows, IMAGES)


def do(run: RunDir, stage: Toy) -> None:
    identity = identify(stage, run, "web-00000", identify_shared(stage, run))
    written = run_shard(stage.open("cpu"), stage, Shard(run, "web-00000"), identity)
    assert written.rows == len(stage.pairs)


def test_pictures_lie_in_small_row_groups(tmp_path: Path) -> None:
    """A thumbnail reads a whole row group; the narrow tables are read whole anyway."""
    run = RunDir(str(tmp_path))
    names = tuple(f"{number:04d}" for number in range(250))
    do(run, ToyPictures(names))
    written = pq.ParquetFile(run.table("images", "web-00000"))
    assert [written.metadata.row_group(at).num_rows for at in range(3)] == [100, 100, 50]
    assert written.read()["key"].to_pylist() == list(names)
    do(run, Toy(names))
    assert pq.ParquetFile(run.table("decisions", "web-00000")).num_row_groups == 1


def test_a_shard_is_written_and_signed(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    do(run, Toy())
    record = manifest.read(run, run.manifest("decisions", "web-00000"))
    assert record is not None and record["counts"] == {"kept": 2} and record["rows"] == 2
    assert record["config"] == {"threshold": 0.5}
    do(run, Toy(pairs=()))


@pytest.mark.parametrize("pairs", [("b", "a"), ("a", "a")])
def test_rows_must_be_sorted_and_unique(tmp_path: Path, pairs: tuple[str, ...]) -> None:
    run = RunDir(str(tmp_path))
    do(run, Toy())
    with pytest.raises(
        InputError, match=r"decisions/web-00000: rows are not sorted by a unique pair_id"
    ):
        do(run, Toy(pairs=pairs))
    assert manifest.read(run, run.manifest("decisions", "web-00000")) is not None, "the old stays"


def test_an_old_signature_never_stands_beside_a_new_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(str(tmp_path))
    do(run, Toy())
    monkeypatch.setattr(manifest, "sign", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        do(run, Toy(pairs=("c",)))
    assert run.shards("decisions") == []


def test_upstream_and_weights_are_part_of_the_identity(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    (tmp_path / "model").write_text("1")
    stage = Toy(models=(("matcher", tmp_path / "model"),), reads=("scores",), reads_all=("scores",))

    def sign(table: str, shard: str, version: int) -> None:
        path = run.manifest(table, shard)
        manifest.sign(run, path, Identity(table, version, {}), rows=0, counts={}, seconds=0)

    def fingerprint() -> str:
        return identify(stage, run, "web-00000", identify_shared(stage, run)).fingerprint

    sign("scores", "web-00000", 1)
    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    sign("scores", "web-00000", 2)
    seen.append(fingerprint())
    sign("scores", "web-00001", 1)
    seen.append(fingerprint())
    (tmp_path / "model").write_text("2")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_the_path_of_the_run_is_not_part_of_the_identity(tmp_path: Path) -> None:
    prints = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text("same")
        run = RunDir(str(tmp_path / name))
        stage = Toy(models=(("matcher", tmp_path / name / "model"),))
        prints.add(identify(stage, run, "web-00000", identify_shared(stage, run)).fingerprint)
    assert len(prints) == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    with pytest.raises(InputError, match=r"toy reads scores/web-00000, and .* is not there"):
        do(run, Toy(reads=("scores",)))
    with pytest.raises(InputError, match=r"needs the matcher model, and .*nope is not there"):
        do(run, Toy(models=(("matcher", tmp_path / "nope"),)))
