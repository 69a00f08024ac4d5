"""What the report and `inspect --text` read off a run's tables: counts, histograms, samples.

Everything goes shard by shard over narrow columns, so that memory stays that of one shard without
its pictures; pictures are read only for the pairs that were chosen, in small batches.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.errors import InputError
from capfilt.schema import REASONS, SOURCES
from capfilt.shards import RunDir, Shard

REASON_NAMES = tuple(REASONS)
BELOW_THRESHOLD = (
    "itm_below_threshold",
    "itc_below_threshold",
    "fused_below_threshold",
    "below_precision",
)
NO_PICTURE = ("download_failed", "image_unreadable", "image_too_small", "image_too_large")

ITM_BINS = 200
"""Fine bins over 0..1: a keep curve with a point every 0.005, merged to 20 histogram bars."""
ITC_BINS = 80
"""Fine bins over -1..1, cropped to those in use for the histogram."""

SHARDS_TOGETHER = 8
"""Pictures come from so many shards drawn at random, and from others only where these lack some."""


@dataclass(frozen=True)
class DecidedShard:
    """The scores and decisions of one shard, row by row.

    Attributes:
        name: of the shard.
        source: index into `SOURCES`, int8 [N].
        reason: index into `REASON_NAMES`, int8 [N].
        itm_prob: float32 [N], NaN where there is none.
        itc_sim: float32 [N], NaN where there is none.
    """

    name: str
    source: npt.NDArray[np.int8]
    reason: npt.NDArray[np.int8]
    itm_prob: npt.NDArray[np.float32]
    itc_sim: npt.NDArray[np.float32]


@dataclass
class Tally:
    """Counts and histograms of a run, filled shard by shard.

    Attributes:
        counts: pairs by (source, reason).
        itm: pairs by source, kept or not, and fine bin: int64 [S, 2, ITM_BINS]; index 1 is kept.
        itc: the same over ITC_BINS.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    itm: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(SOURCES), 2, ITM_BINS), np.int64)
    )
    itc: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(SOURCES), 2, ITC_BINS), np.int64)
    )

    def add(self, rows: DecidedShard) -> None:
        """Counts a shard."""
        cells = rows.source.astype(np.int64) * len(REASON_NAMES) + rows.reason
        for cell, count in zip(*np.unique(cells, return_counts=True), strict=True):
            source, reason = divmod(int(cell), len(REASON_NAMES))
            self.counts[SOURCES[source], REASON_NAMES[reason]] += int(count)
        kept = (rows.reason == REASON_NAMES.index("kept")).astype(np.int64)
        for scores, low, high, bins in (
            (rows.itm_prob, 0.0, 1.0, self.itm),
            (rows.itc_sim, -1.0, 1.0, self.itc),
        ):
            there = np.isfinite(scores)
            edges = np.linspace(low, high, bins.shape[-1] + 1).astype(np.float32)
            place = np.searchsorted(edges, scores[there], side="right") - 1
            place = np.clip(place, 0, bins.shape[-1] - 1)
            np.add.at(bins, (rows.source[there], kept[there], place), 1)

    def of_source(self, source: str) -> dict[str, int]:
        """Pairs of a source by reason; only the reasons that occur, in the order of `REASONS`."""
        found = {reason: self.counts[source, reason] for reason in REASON_NAMES}
        return {reason: count for reason, count in found.items() if count}


@dataclass(frozen=True, order=True)
class Drawn:
    """A row that was drawn: the lower the draw, the earlier it is taken."""

    draw: float
    shard: str
    row: int


@dataclass
class Strata:
    """Keeps, for each stratum, the `size` rows of the lowest draws.

    Attributes:
        size: rows a stratum.
        rows: by stratum, sorted by draw.
    """

    size: int
    rows: dict[tuple[str, ...], list[Drawn]] = field(default_factory=dict)

    def add(
        self,
        stratum: tuple[str, ...],
        shard: str,
        rows: npt.NDArray[np.int64],
        draws: npt.NDArray[np.float64],
    ) -> None:
        """Offers rows of a shard, with their draws."""
        lowest = np.argsort(draws, kind="stable")[: self.size]
        offered = [Drawn(float(draws[at]), shard, int(rows[at])) for at in lowest]
        self.rows[stratum] = sorted(self.rows.get(stratum, []) + offered)[: self.size]

    def take(self, count: int) -> list[Drawn]:
        """Takes up to `count` rows, one of each stratum in turn, so that rare ones are seen."""
        queues = [list(self.rows[stratum]) for stratum in sorted(self.rows)]
        taken: list[Drawn] = []
        while len(taken) < count and any(queues):
            for queue in queues:
                if queue and len(taken) < count:
                    taken.append(queue.pop(0))
        return taken


def decided_shards(run: RunDir) -> Iterator[DecidedShard]:
    """Streams the scores and reasons of every decided shard, in the order of their names.

    Raises:
        InputError: a table is missing, or a shard's scores and decisions hold other pairs.
    """
    for name in run.shards("decisions"):
        table = _joined(Shard(run, name), ["source", "itm_prob", "itc_sim"])
        yield DecidedShard(
            name,
            _codes(table.column("source"), SOURCES, f"decisions/{name}: source"),
            _codes(table.column("reason"), REASON_NAMES, f"decisions/{name}: reason"),
            _floats(table.column("itm_prob")),
            _floats(table.column("itc_sim")),
        )


def count_reasons(run: RunDir) -> Tally:
    """Counts pairs by source and reason, from `decisions/` alone; no histograms."""
    tally = Tally()
    for name in run.shards("decisions"):
        table = Shard(run, name).read("decisions", ["source", "reason"])
        counted = table.group_by(["source", "reason"]).aggregate([([], "count_all")])
        for row in counted.to_pylist():
            tally.counts[row["source"], row["reason"]] += row["count_all"]
    return tally


def draw(seed: int, shard: str, rows: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row of a shard; depends on nothing but its arguments."""
    return np.random.default_rng([seed, zlib.crc32(shard.encode())]).random(rows)


def shard_groups(names: Sequence[str], seed: int) -> dict[str, int]:
    """Puts shards in groups of `SHARDS_TOGETHER` at random, web and human apart.

    Added to a draw, the group makes the first group's rows come first: a grid of 48 pictures then
    opens 8 shards and not 1,000.
    """
    groups = {}
    for kind in sorted({name.split("-")[0] for name in names}):
        same = sorted(name for name in names if name.startswith(f"{kind}-"))
        order = np.random.default_rng([seed, zlib.crc32(kind.encode())]).permutation(len(same))
        for rank, at in enumerate(order):
            groups[same[at]] = rank // SHARDS_TOGETHER
    return groups


def read_pairs(run: RunDir, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The rows that were drawn, in the same order, with the other texts of each picture.

    Returns:
        For each: `pair_id`, `key`, `source`, `caption`, `itm_prob`, `itc_sim`, `keep`, `reason`,
        `shard`, and `others`: the same of the picture's other texts.
    """
    found: dict[Drawn, dict[str, Any]] = {}
    columns = ["pair_id", "key", "source", "caption", "itm_prob", "itc_sim"]
    for name in sorted({one.shard for one in drawn}):
        table = _joined(Shard(run, name), columns)
        here = [one for one in drawn if one.shard == name]
        rows = table.take([one.row for one in here]).to_pylist()
        keys = pa.array({row["key"] for row in rows}, pa.string())
        siblings = table.filter(pc.is_in(table.column("key"), value_set=keys)).to_pylist()
        for one, row in zip(here, rows, strict=True):
            others = [
                other
                for other in siblings
                if other["key"] == row["key"] and other["pair_id"] != row["pair_id"]
            ]
            found[one] = {**row, "shard": name, "others": others}
    return [found[one] for one in drawn]


def read_pictures(
    run: RunDir, shard: str, keys: set[str], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Rows of `images/` by key, without holding more than a few pictures that weren't asked for.

    Args:
        run: the run folder.
        shard: whose images to read.
        keys: which rows.
        columns: which columns, beside `key`.

    Raises:
        InputError: the table is missing or can't be read.
    """
    path = run.table("images", shard)
    wanted = pa.array(sorted(keys), pa.string())
    found: dict[str, dict[str, Any]] = {}
    try:
        with fsspec.open(path, "rb") as file:
            # a shard may be one row group: buffered reading keeps it from being loaded whole
            parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            for group in range(parquet.num_row_groups):
                there = parquet.read_row_group(group, ["key"], use_threads=False).column("key")
                if not pc.any(pc.is_in(there, value_set=wanted)).as_py():
                    continue
                for batch in parquet.iter_batches(
                    256, [group], ["key", *columns], use_threads=False
                ):
                    chosen = batch.filter(pc.is_in(batch.column("key"), value_set=wanted))
                    found.update({row["key"]: row for row in chosen.to_pylist()})
                if len(found) == len(keys):
                    break
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing although pairs of it were decided; "
            "copy it back, or download or ingest again"
        ) from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} can't be read ({error}); delete it to redo it") from None
    return found


def _joined(shard: Shard, columns: list[str]) -> pa.Table:
    """Columns of `scores/` with `keep` and `reason` of `decisions/`, row by row."""
    scores = shard.read("scores", list(dict.fromkeys(["pair_id", *columns])))
    decisions = shard.read("decisions", ["pair_id", "keep", "reason"])
    if not scores.column("pair_id").equals(decisions.column("pair_id")):
        raise InputError(
            f"scores/{shard.name} and decisions/{shard.name} don't hold the same pairs "
            f"({scores.num_rows} and {decisions.num_rows} rows): run `capfilt filter` again"
        )
    for name in ("keep", "reason"):
        scores = scores.append_column(name, decisions.column(name))
    return scores


def _codes(column: pa.ChunkedArray, names: Sequence[str], where: str) -> npt.NDArray[np.int8]:
    codes = pc.index_in(column, value_set=pa.array(names))
    if codes.null_count:
        unknown = column.filter(pc.is_null(codes))[0].as_py()
        raise InputError(f"{where} holds {unknown!r}, expected one of {', '.join(names)}")
    return np.asarray(codes.to_numpy()).astype(np.int8)


def _floats(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    return np.asarray(column.cast(pa.float32()).to_numpy()).astype(np.float32, copy=False)
