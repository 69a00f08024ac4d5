"""Label files: append-only, whole lines only, several reviewers."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import InputError
from capfilt.inspect.labels import (
    Label,
    LabelStore,
    check_reviewer,
    file_name,
    parse,
    read_labels,
    utc_now,
)


def label(pair: str = "web-00000-00000/text0", verdict: str = "right", **changes: object) -> Label:
    values = {
        "pair_id": pair,
        "uid": None,
        "verdict": verdict,
        "reviewer": "ann",
        "time": utc_now(),
        "itm_prob": 0.25,
        "itc_sim": -0.5,
        "matcher": "f" * 64,
        "sampling": "random",
    }
    return Label(**{**values, **changes})  # type: ignore[arg-type]


def test_a_label_is_read_back_by_another_process(tmp_path: Path) -> None:
    store, other = LabelStore(tmp_path / "labels"), LabelStore(tmp_path / "labels")
    written = label()
    store.append(written)
    assert other.refresh() == {written.pair}
    assert list(other.standing.values()) == [written]
    assert other.refresh() == set()


def test_the_last_verdict_holds_and_undo_brings_the_one_before_back(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.append(label(verdict="right", time="2025-01-01T00:00:00Z"))
    store.append(label(verdict="wrong", time="2025-01-01T00:00:01Z"))
    store.refresh()
    assert [each.verdict for each in store.standing.values()] == ["wrong"]
    undone = store.undo("ann")
    assert undone is not None and undone.verdict == "wrong"
    store.refresh()
    assert [each.verdict for each in store.standing.values()] == ["right"]
    assert store.undo("bob") is None
    # nothing was rewritten
    assert len((tmp_path / "ann.jsonl").read_text().splitlines()) == 3


def test_an_older_label_that_comes_later_changes_nothing(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "labels")
    new = label(verdict="right", time="2025-02-01T00:00:00Z")
    old = label(verdict="wrong", time="2025-01-01T00:00:00Z")
    void = label(verdict="retracted", time="2025-01-02T00:00:00+00:00")
    for line in (new, old, void):
        store.import_lines(line.line())
        store.refresh()
        assert [each.verdict for each in store.standing.values()] == ["right"]
    assert [each.verdict for each in read_labels(tmp_path / "labels")] == ["right"]
    undone = store.undo("ann")
    assert undone == new
    store.refresh()
    assert store.standing == {}  # the older one was void
    # a verdict from a machine whose clock is ahead can be undone and changed too
    ahead = label(verdict="wrong", time="2999-01-01T00:00:00Z")
    store.append(ahead)
    store.refresh()
    store.append(label(time=store.time_for("ann", ahead.pair)))
    store.refresh()
    assert [each.verdict for each in store.standing.values()] == ["right"]
    assert store.undo("ann").verdict == "right" and store.refresh()
    assert [each.verdict for each in store.standing.values()] == ["wrong"]


def test_reviewers_have_their_own_files_and_verdicts(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.append(label(reviewer="ann"))
    store.append(label(reviewer="bob", verdict="wrong"))
    store.refresh()
    assert {path.name for path in tmp_path.iterdir()} == {"ann.jsonl", "bob.jsonl"}
    assert len(store.standing) == 2
    assert [each.reviewer for each in read_labels(tmp_path)] == ["ann", "bob"]


@pytest.mark.parametrize(
    "tail",
    [b'{"pair_id": "web-0', b"\xff\xfe{", b"{}", b"\x00" * 40, b"[" * 100_000,
     json.dumps({**label().__dict__, "itm_prob": 10**400}).encode()],
)  # fmt: skip
def test_half_a_line_is_skipped_and_closed_by_the_next(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = LabelStore(tmp_path)
    store.append(label("a/text0"))
    with (tmp_path / "ann.jsonl").open("ab") as file:
        file.write(tail)
    store.refresh()
    assert len(store.standing) == 1
    store.append(label("b/text0"))
    store.refresh()
    assert {each.pair_id for each in store.standing.values()} == {"a/text0", "b/text0"}
    assert store.skipped == 1
    assert "line 2" in caplog.text
    assert len(read_labels(tmp_path)) == 2


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from capfilt.inspect.labels import Label, LabelStore, utc_now\n"
        "store = LabelStore(sys.argv[1])\n"
        "for number in range(100_000):\n"
        "    store.append(Label(f'k-{number}/text0', None, 'right', 'ann', utc_now()))\n"
        "    print(number, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(40):
        acknowledged = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split()[:-1])])
    process.wait()
    store = LabelStore(tmp_path)
    store.append(label("after/text0"))
    store.refresh()
    found = {each.pair_id for each in store.standing.values()}
    assert {f"k-{number}/text0" for number in range(acknowledged + 1)} | {"after/text0"} <= found


def test_many_threads_and_stores_lose_nothing(tmp_path: Path) -> None:
    def work(number: int) -> None:
        store = LabelStore(tmp_path)
        for row in range(20):
            store.append(label(f"k-{number}-{row}/text0"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_labels(tmp_path)) == 80


def test_export_and_import_are_each_other_s_inverse(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "one")
    store.append(label("a/text0"))
    store.append(label("b/text0", reviewer="Bob Ünlü \u2028", verdict="unsure"))
    store.refresh()
    store.undo("ann")
    text = "".join(store.lines())
    other = LabelStore(tmp_path / "two")
    assert other.import_lines(text) == (3, 0)
    assert other.import_lines(text) == (0, 3)
    store.refresh()
    other.refresh()
    assert other.standing == store.standing
    assert len(other.standing) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is not JSON"),
        ("[]", "expected an object"),
        ('{"pair_id": "a"}', "missing"),
        (json.dumps({**label().__dict__, "extra": 1}), "unknown"),
        (json.dumps({**label().__dict__, "verdict": "maybe"}), "'verdict' is 'maybe'"),
        (json.dumps({**label().__dict__, "time": "yesterday"}), "'time'"),
        (json.dumps({**label().__dict__, "itm_prob": "high"}), "'itm_prob'"),
        (json.dumps({**label().__dict__, "itm_prob": float("nan")}), "'itm_prob'"),
        (json.dumps({**label().__dict__, "itm_prob": 10**400}), "'itm_prob'"),
        (json.dumps({**label().__dict__, "itm_prob": True}), "'itm_prob'"),
        ("[" * 100_000, "line 2 is not JSON"),
        (json.dumps({**label().__dict__, "sampling": "x"}), "'sampling'"),
        (json.dumps({**label().__dict__, "pair_id": "\ud800"}), "surrogate"),
        (json.dumps({**label().__dict__, "reviewer": "a\nb"}), "control characters"),
    ],
)
def test_an_import_with_a_bad_line_writes_nothing(tmp_path: Path, line: str, message: str) -> None:
    store = LabelStore(tmp_path / "labels")
    with pytest.raises(InputError, match=message):
        store.import_lines(label().line() + "\n" + line + "\n")
    assert not (tmp_path / "labels").exists()


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.append(label())
    store.refresh()
    (tmp_path / "ann.jsonl").write_text("")
    with pytest.raises(InputError, match="only ever grow"):
        store.refresh()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a file")
    with pytest.raises(InputError, match="can't be written"):
        LabelStore(tmp_path / "labels").append(label())


@given(st.text(max_size=80))
def test_a_name_never_leaves_the_folder(name: str) -> None:
    stored = file_name(name)
    assert os.path.basename(stored) == stored
    assert stored.endswith(".jsonl") and not stored.startswith(".")
    assert len(file_name("..")) > len(".jsonl")


@given(st.text(min_size=1, max_size=60), st.text(max_size=60))
def test_any_name_and_id_round_trip(pair: str, name: str) -> None:
    try:
        name = check_reviewer(name)
    except InputError:
        return
    try:
        (pair + name).encode()
    except UnicodeEncodeError:
        return
    written = label(pair, reviewer=name)
    assert "\n" not in written.line()
    assert parse(written.line(), "here") == written
