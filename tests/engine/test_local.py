from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from capfilt.engine.local import StageResult, run_stage
from capfilt.errors import MismatchError
from capfilt.schema import DECISIONS
from capfilt.shards import RunDir, Shard


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)

    keep: bool = True


KEEP = Options()


@dataclass(frozen=True)
class Toy:
    """Writes one row a shard; fails where it is told to, and counts how often it is opened."""

    config: Options = KEEP
    broken: frozenset[str] = frozenset()
    error: type[BaseException] = ValueError
    opened: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    cheap: bool = False
    name: str = "toy"
    version: int = 1
    table: str = "decisions"
    schema: pa.Schema = field(default=DECISIONS, repr=False)
    reads: tuple[str, ...] = ()
    reads_all: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("web",)
    count_by: str | None = "reason"

    def weights(self) -> dict[str, Path]:
        return {}

    def open(self, device: str) -> Callable[[Shard], pa.Table]:
        self.opened.append(device)

        def work(shard: Shard) -> pa.Table:
            self.ran.append(shard.name)
            if shard.name in self.broken:
                raise self.error(f"no {shard.name}")
            keep = self.config.keep
            row = {
                "pair_id": shard.name,
                "source": "web",
                "keep": keep,
                "reason": "kept" if keep else "duplicate",
            }
            return pa.Table.from_pylist([row], self.schema)

        return work


NAMES = [f"web-{number:05d}" for number in range(4)]


def test_all_shards_once(tmp_path: Path) -> None:
    run, stage, seen = RunDir(str(tmp_path)), Toy(), []

    def progress(result: StageResult, done: int, total: int) -> None:
        seen.append((result.rows, done, total))

    result = run_stage(stage, run, NAMES, device="cpu", progress=progress)
    assert (result.done, result.skipped, result.rows, result.counts) == (4, 0, 4, {"kept": 4})
    assert seen == [(1, 1, 4), (2, 2, 4), (3, 3, 4), (4, 4, 4)] and stage.opened == ["cpu"]
    again = run_stage(stage, run, NAMES)
    assert (again.done, again.skipped, again.rows, again.counts) == (0, 4, 0, {"kept": 4})
    assert stage.opened == ["cpu"], "weights are not loaded when there is nothing to do"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_what_a_killed_process_left_of_a_table_is_removed(tmp_path: Path, prefix: str) -> None:
    run = RunDir(f"{prefix}{tmp_path}")
    left = [
        tmp_path / "decisions" / f"{NAMES[0]}.{kind}.0a1b2c3d.tmp"
        for kind in ("parquet", "manifest.json")
    ]
    others = tmp_path / "labels" / "a.jsonl.0a1b2c3d.tmp"
    for path in (*left, others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    run_stage(Toy(), run, NAMES[:1])
    assert not any(path.exists() for path in left) and others.exists()
    assert len(list((tmp_path / "decisions").iterdir())) == 2


def test_a_table_that_is_gone_is_made_again(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run_stage(Toy(), run, NAMES)
    Path(run.table("decisions", NAMES[2])).unlink()
    stage = Toy()
    result = run_stage(stage, run, NAMES)
    assert (result.done, result.skipped, stage.ran) == (1, 3, [NAMES[2]])
    assert run.exists(run.table("decisions", NAMES[2]))


def test_a_shard_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    result = run_stage(Toy(broken=frozenset(NAMES[1:3])), run, NAMES)
    assert result.done == 2 and result.failed == {
        name: f"ValueError: no {name}" for name in NAMES[1:3]
    }
    healed = Toy()
    run_stage(healed, run, NAMES)
    assert healed.ran == NAMES[1:3]


def test_another_config_is_an_error_before_anything_is_done(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run_stage(Toy(), run, NAMES[:1])
    other = Toy(Options(keep=False))
    with pytest.raises(MismatchError, match=r"toy\.keep: True there, False now"):
        run_stage(other, run, NAMES)
    assert other.opened == [] and run.shards("decisions") == NAMES[:1]
    assert run_stage(other, run, NAMES, redo=True).counts == {"duplicate": 4}
    cheap = run_stage(Toy(cheap=True), run, NAMES)
    assert (cheap.done, cheap.counts) == (4, {"kept": 4})


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.sampled_from(NAMES), max_size=4))
def test_stopped_anywhere_the_end_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, stops: list[str]
) -> None:
    run = RunDir(str(tmp_path_factory.mktemp("run")))
    ran = []
    for stop in stops:
        stage = Toy(broken=frozenset([stop]), error=KeyboardInterrupt)
        try:
            run_stage(stage, run, NAMES)
        except KeyboardInterrupt:
            stage.ran.pop()
        ran += stage.ran
    last = Toy()
    result = run_stage(last, run, NAMES)
    assert result.done + result.skipped == len(NAMES)
    assert sorted(ran + last.ran) == NAMES, "no shard is done twice or left out"
