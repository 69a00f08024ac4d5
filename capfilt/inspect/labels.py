"""Review labels: an append-only JSONL file per reviewer, which survives a kill at any moment.

A line is a verdict on a pair, or the retraction of the reviewer's last verdict on it; nothing is
ever rewritten. What holds goes by the times in the lines, so that older labels may be imported
after newer ones; of equal times, by the order of the lines. A line counts from its newline on, and
is on the disk (fsync) before `append` returns: what a killed process leaves behind is at most half
a line, which readers skip and the next append closes.
"""

import bisect
import json
import logging
import math
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from capfilt.errors import InputError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows, where appends are then not locked
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

VERDICTS = ("right", "wrong", "unsure")
RETRACTED = "retracted"
SAMPLING = ("random", "high", "threshold", "uncertain", "browse")
"""How a pair came before the reviewer's eyes. Only `random` gives an unbiased estimate."""

LONGEST_NAME = 64


@dataclass(frozen=True)
class Label:
    """One line of a label file.

    Attributes:
        pair_id: the pair's position in the run that was reviewed.
        uid: its content address; it finds the pair again after shards have changed.
        verdict: `right`, `wrong`, `unsure`, or `retracted`: the reviewer's last verdict on the pair
            is void.
        reviewer: who.
        time: when, UTC, ISO 8601.
        itm_prob: ITM's probability that the reviewer saw.
        itc_sim: ITC's similarity that the reviewer saw.
        matcher: digest of the matcher's weights that gave both.
        sampling: how the pair was picked; see `SAMPLING`.
    """

    pair_id: str
    uid: str | None
    verdict: str
    reviewer: str
    time: str
    itm_prob: float | None = None
    itc_sim: float | None = None
    matcher: str | None = None
    sampling: str = "browse"

    @property
    def pair(self) -> str:
        """What the label is about: the content where it has an address, else the position."""
        return self.uid or self.pair_id

    def line(self) -> str:
        """The label as JSON, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def utc_now() -> str:
    """The time as labels write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_reviewer(name: str) -> str:
    """A reviewer's name as it is stored: trimmed, in Unicode's composed form.

    Raises:
        InputError: it is empty, too long, or holds control characters.
    """
    name = unicodedata.normalize("NFC", str(name)).strip()
    if not name or len(name) > LONGEST_NAME:
        raise InputError(
            f"reviewer {name[:LONGEST_NAME]!r}: expected a name of 1 to {LONGEST_NAME} characters"
        )
    if any(unicodedata.category(character).startswith("C") for character in name):
        raise InputError(f"reviewer {name!r}: control characters can't be part of a name")
    return name


def file_name(reviewer: str) -> str:
    """The file that a reviewer's labels go to: letters, digits, `-` and `_` only, so no path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", reviewer).strip("_") or "reviewer"
    return f"{stem}.jsonl"


def parse(line: str, where: str) -> Label:
    """A label from its JSON line.

    Raises:
        InputError: it is not JSON, or a field is missing, unknown or of another form.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, found {type(values).__name__}")
    known = {field.name for field in fields(Label)}
    unknown = sorted(set(values) - known)
    missing = sorted({"pair_id", "verdict", "reviewer", "time"} - set(values))
    if unknown or missing:
        raise InputError(f"{where}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    values.setdefault("uid", None)
    for name in ("pair_id", "verdict", "reviewer", "time"):
        if not isinstance(values[name], str) or not values[name]:
            raise InputError(f"{where}: {name!r} is {values[name]!r}, expected text")
    for name in ("uid", "matcher"):
        if not isinstance(values.get(name), str | None):
            raise InputError(f"{where}: {name!r} is {values[name]!r}, expected text or null")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: a text holds half of a surrogate pair") from None
    for name in ("itm_prob", "itc_sim"):
        value = values.get(name)
        if value is not None and not _is_number(value):
            shown = repr(value)[:80]
            raise InputError(f"{where}: {name!r} is {shown}, expected a number or null")
    if values["verdict"] not in (*VERDICTS, RETRACTED):
        raise InputError(
            f"{where}: 'verdict' is {values['verdict']!r}, expected one of {[*VERDICTS, RETRACTED]}"
        )
    if values.get("sampling", "browse") not in SAMPLING:
        raise InputError(
            f"{where}: 'sampling' is {values['sampling']!r}, expected one of {list(SAMPLING)}"
        )
    try:
        datetime.fromisoformat(values["time"])
    except ValueError:
        raise InputError(
            f"{where}: 'time' is {values['time']!r}, expected ISO 8601 as 2025-01-31T12:00:00Z"
        ) from None
    values["reviewer"] = check_reviewer(values["reviewer"])
    return Label(**values)


def _is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; a whole one may have any number of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass
class _Tail:
    """How far a file has been read."""

    offset: int = 0
    line: int = 0


class LabelStore:
    """The labels of a run: reads all reviewers' files, appends to one's own.

    Other processes may append to the same folder; `refresh` takes in what they wrote.

    Attributes:
        folder: `<run>/labels`; made by the first append.
        standing: the verdicts that hold, by reviewer and pair (`Label.pair`).
        skipped: lines that were no labels (half a line after a kill, or damage).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.standing: dict[tuple[str, str], Label] = {}
        self.skipped = 0
        self._lines: dict[tuple[str, str], list[Label]] = {}
        self._history: dict[tuple[str, str], list[Label]] = {}
        self._tails: dict[str, _Tail] = {}
        self._lock = threading.RLock()

    def refresh(self) -> set[str]:
        """Reads what was appended since the last call.

        Returns:
            The pairs (`Label.pair`) of which a verdict changed.
        """
        with self._lock:
            changed: set[str] = set()
            for path in self._files():
                for label in self._read_on(path):
                    self._apply(label)
                    changed.add(label.pair)
            return changed

    def append(self, label: Label) -> None:
        """Writes a label and waits until it is on the disk.

        Raises:
            InputError: the folder can't be written.
        """
        self._write(file_name(label.reviewer), [label])

    def undo(self, reviewer: str, time: str | None = None) -> Label | None:
        """Retracts the reviewer's latest verdict that still stands.

        Args:
            reviewer: who.
            time: of the retraction; `time_for` by default.

        Returns:
            The verdict that was retracted, or None where there was none.
        """
        with self._lock:
            self.refresh()
            mine = [label for (who, _), label in self.standing.items() if who == reviewer]
            if not mine:
                return None
            last = max(mine, key=lambda label: moment_of(label.time))
            self.append(
                Label(
                    **{
                        **asdict(last),
                        "verdict": RETRACTED,
                        "time": time or self.time_for(reviewer, last.pair),
                    }
                )
            )
            return last

    def time_for(self, reviewer: str, pair: str) -> str:
        """The time of a new line: now, or that of the verdict that stands where it is later."""
        now, standing = utc_now(), self.standing.get((reviewer, pair))
        ahead = standing is not None and moment_of(standing.time) > moment_of(now)
        return standing.time if standing is not None and ahead else now

    def at_random(self, label: Label) -> bool:
        """Whether its reviewer ever judged the pair in a random sample: a correction counts too."""
        history = self._history.get((label.reviewer, label.pair), [])
        return any(each.sampling == "random" for each in history)

    def lines(self) -> Iterator[str]:
        """Every label of every reviewer as JSONL, with newlines; what `import_lines` takes."""
        for path in self._files():
            for label in _whole_labels(path):
                yield label.line() + "\n"

    def import_lines(self, text: str) -> tuple[int, int]:
        """Appends labels from JSONL; those that are there already are left out.

        All lines are checked before the first is written.

        Returns:
            How many were added, and how many were there already.

        Raises:
            InputError: a line is no label; the message names it.
        """
        labels = [
            parse(line, f"line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        with self._lock:
            present = {label for path in self._files() for label in _whole_labels(path)}
            new = list(dict.fromkeys(label for label in labels if label not in present))
            by_file: dict[str, list[Label]] = {}
            for label in new:
                by_file.setdefault(file_name(label.reviewer), []).append(label)
            for name, group in by_file.items():
                self._write(name, group)
        return len(new), len(labels) - len(new)

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("*.jsonl") if path.is_file())

    def _write(self, name: str, labels: Iterable[Label]) -> None:
        data = "".join(label.line() + "\n" for label in labels).encode()
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data  # close what a killed process left
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                _sync_folder(self.folder)
        except OSError as error:
            raise InputError(
                f"{path} can't be written ({error}); the label is not stored"
            ) from None

    def _read_on(self, path: Path) -> Iterator[Label]:
        tail = self._tails.setdefault(path.name, _Tail())
        try:
            size = path.stat().st_size
            if size == tail.offset:
                return
            if size < tail.offset:
                raise InputError(
                    f"{path} became shorter, and label files only ever grow; "
                    "stop inspect, put the file back and start again"
                )
            with path.open("rb") as file:
                file.seek(tail.offset)
                data = file.read()
        except FileNotFoundError:
            return
        data = data[: data.rfind(b"\n") + 1]  # the rest is not finished
        tail.offset += len(data)
        for raw in data.split(b"\n")[:-1]:
            tail.line += 1
            label = self._parse_or_skip(raw, f"{path}, line {tail.line}")
            if label is not None:
                yield label

    def _parse_or_skip(self, raw: bytes, where: str) -> Label | None:
        if not raw.strip():
            return None
        try:
            return parse(raw.decode(), where)
        except (InputError, UnicodeDecodeError) as error:
            self.skipped += 1
            log.warning("%s is no label and is left out (%s)", where, error)
            return None

    def _apply(self, label: Label) -> None:
        identity = (label.reviewer, label.pair)
        lines = self._lines.setdefault(identity, [])
        bisect.insort(lines, label, key=lambda each: moment_of(each.time))
        history: list[Label] = []
        for line in lines:
            if line.verdict != RETRACTED:
                history.append(line)
            elif history:
                history.pop()
        self._history[identity] = history
        if history:
            self.standing[identity] = history[-1]
        else:
            self.standing.pop(identity, None)


def _whole_labels(path: Path) -> Iterator[Label]:
    """The labels of a file, without what is no label."""
    data = path.read_bytes()
    for number, raw in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            yield parse(raw.decode(), f"{path}, line {number}")
        except (InputError, UnicodeDecodeError):
            continue


def moment_of(time: str) -> datetime:
    """The time of a line; one without a zone is UTC."""
    moment = datetime.fromisoformat(time)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name survive a power cut too."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # pragma: no cover - Windows can't open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_labels(folder: str | Path) -> list[Label]:
    """The verdicts that stand in a label folder, for training and calibration; sorted by time.

    Args:
        folder: `<run>/labels`.

    Returns:
        One label for each reviewer and pair; empty where the folder is not there.
    """
    store = LabelStore(folder)
    store.refresh()
    return sorted(store.standing.values(), key=lambda label: (moment_of(label.time), label.pair_id))


def verdicts_of(labels: Iterable[Label]) -> dict[str, bool]:
    """Whether each judged pair (`Label.pair`) is right, by the majority of its reviewers.

    `unsure` says nothing, and a pair on which they are split is left out.
    """
    votes: dict[str, int] = {}
    for label in labels:
        if label.verdict in ("right", "wrong"):
            votes[label.pair] = votes.get(label.pair, 0) + (1 if label.verdict == "right" else -1)
    return {pair: vote > 0 for pair, vote in votes.items() if vote}
