import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.errors import InputError, UsageError
from capfilt.shards import LOCK, RunDir, Shard, locked


def test_paths(tmp_path: Path) -> None:
    run = RunDir(f"{tmp_path}/")
    assert run.table("images", "web-00000") == f"{tmp_path}/images/web-00000.parquet"
    assert run.manifest("images", "web-00000") == f"{tmp_path}/images/web-00000.manifest.json"
    assert RunDir(f"file://{tmp_path}").local("a") == f"{tmp_path}/a"
    with pytest.raises(InputError, match=r"run_dir 's3://b/run' is remote"):
        RunDir("s3://b/run").local("models")


def test_only_signed_shards_are_listed(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    assert run.shards() == []
    names = ("web-00001", "web-00000", "human-00000", "web-123456")
    for name in (*names, "other-00000", "web-1", "web-00002x"):
        run.write_text(run.manifest("images", name), "{}")
    run.write_text(run.table("images", "web-00009"), "unsigned")
    assert run.shards() == sorted(names)
    assert run.shards(sources=("human",)) == ["human-00000"]


@pytest.mark.parametrize("prefix", ["", "file://", "memory://"])
def test_a_table_comes_back(tmp_path: Path, prefix: str) -> None:
    run = RunDir(f"{prefix}{tmp_path}")
    table = pa.table({"key": ["a", "b"], "n": [1, 2]}).replace_schema_metadata({"x": "y"})
    run.write_table(run.table("t", "web-00000"), table)
    shard = Shard(run, "web-00000")
    assert shard.read("t").equals(table) and shard.read("t").schema.metadata == {b"x": b"y"}
    assert shard.read("t", ["n"]).column_names == ["n"]


_COUNT_THREADS = """
import os, sys
from capfilt.inspect.tables import read_pictures
from capfilt.shards import RunDir, Shard

def threads():
    return len(os.listdir("/proc/self/task"))

run = RunDir(sys.argv[1])
before = threads()
assert Shard(run, "web-00000").read("images").num_rows == 2
assert list(read_pictures(run, "web-00000", {"b"}, ["image"])) == ["b"]
print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="/proc counts the threads")
def test_reading_leaves_no_thread_behind(tmp_path: Path) -> None:
    """One that still held the Python file at the interpreter's end would abort the process."""
    run = RunDir(str(tmp_path))
    table = pa.table({"key": ["a", "b"], "image": [b"1", b"2"]})
    run.write_table(run.table("images", "web-00000"), table)
    said = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS, str(tmp_path)], capture_output=True, text=True
    )
    assert (said.stdout, said.stderr) == ("0\n", "")


def test_row_groups_are_bounded_and_never_empty(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    for rows, groups in [(0, 0), (1, 1), (1000, 1), (2001, 3)]:
        path = run.table("t", f"web-{rows:05d}")
        run.write_table(path, pa.table({"n": pa.array(range(rows), pa.int64())}))
        assert (pq.ParquetFile(path).num_row_groups, pq.read_table(path).num_rows) == (groups, rows)


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    path = run.at("t", "file")
    run.write_text(path, "old")

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run._write(path, fail)
    assert [found.name for found in (tmp_path / "t").iterdir()] == ["file"]
    assert run.read_text(path) == "old"


def test_what_is_missing_or_broken_says_how_to_redo_it(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    with pytest.raises(InputError, match=r"images/web-00000\.parquet is missing although"):
        Shard(run, "web-00000").read("images")
    run.write_text(run.table("images", "web-00000"), "not parquet")
    with pytest.raises(InputError, match=r"can't be read .* delete it and its manifest"):
        Shard(run, "web-00000").read("images")


def test_remove(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.write_text(run.at("a", "b"), "x")
    run.remove(run.at("a"))
    run.remove(run.at("a"))
    assert not run.exists(run.at("a"))


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    with locked(run):
        said = rf"run is being written by process {os.getpid()} on {platform.node()}: wait"
        with pytest.raises(UsageError, match=said), locked(run):
            pass
        with locked(RunDir(str(tmp_path / "other"))):
            run.write_text(run.at("a"), "x")
    with locked(run):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "a"], "it leaves nothing behind"
    with locked(RunDir("memory://run")), locked(RunDir("memory://run")):
        pass


_HOLD = """
import sys
from capfilt.shards import RunDir, locked
with locked(RunDir(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    words = [sys.executable, "-c", _HOLD, run.path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"by process {child.pid} on "), locked(run):
            pass
        child.kill()
    assert run.exists(run.at(LOCK)), "what it left"
    with locked(run):
        assert str(os.getpid()) in run.read_text(run.at(LOCK))
    assert not run.exists(run.at(LOCK))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with locked(RunDir(str(tmp_path))):
        pass


def test_the_digest_is_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what stands under the name by then."""
    run = RunDir(str(tmp_path))
    path = run.table("t", "web-00000")
    expected = run.write_table(path, pa.table({"n": [1]}))
    assert expected == run.digest(path)
    digest = RunDir.digest

    def other_first(self: RunDir, path_: str) -> str:
        monkeypatch.setattr(RunDir, "digest", digest)
        run.write_table(path, pa.table({"n": [2]}))
        return digest(self, path_)

    monkeypatch.setattr(RunDir, "digest", other_first)
    assert run.write_table(path, pa.table({"n": [1]})) == expected == run.digest(path)
