"""`filter`: which pairs are kept, and for each other one the reason why not (paper, section 3.3).

Reads scores only: another threshold needs no model. Human pairs are kept whatever their score, as
in the paper; only an empty text, a picture that can't be used or a duplicate drops one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from capfilt.config import Filter
from capfilt.errors import ConfigError, InputError
from capfilt.evaluation.calibration import Calibration, cite, read_calibration
from capfilt.expression import (
    IMAGE_COLUMNS,
    SCORE_COLUMNS,
    columns_of,
    compile_expression,
    own_columns_of,
)
from capfilt.schema import DECISIONS, IMAGES, RULE_REASONS, SCORES
from capfilt.shards import RunDir, Shard
from capfilt.stage import Transform
from capfilt.stages.lists import read_list

ORDER = ("duplicate", *RULE_REASONS)
"""Reasons in the order in which they are looked for; before them all comes having no score."""

MOST_AT_ONCE = 1_000_000
"""Candidates that the search for the top fraction holds in memory."""


@dataclass(frozen=True)
class FilterStage:
    """The stage `filter`: `scores/` to `decisions/`, the same rows."""

    config: Filter
    run: RunDir
    name: str = "filter"
    version: int = 3
    table: str = "decisions"
    schema: pa.Schema = field(default=DECISIONS, repr=False)
    sources: tuple[str, ...] = ("web", "human")
    count_by: str | None = "reason"
    cheap: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        """The scores, and the pictures' columns where an expression names one."""
        pictures = _picture_columns(self.config) or _own_columns(self.config)
        return ("scores", "images") if pictures else ("scores",)

    @property
    def reads_all(self) -> tuple[str, ...]:
        """Duplicates and the top fraction are looked for in the whole run."""
        everywhere = self.config.drop_duplicates or self.config.top_fraction is not None
        return self.reads if everywhere else ()

    def weights(self) -> dict[str, Path]:
        """No model takes part; the calibration and the user's table decide as one would.

        Raises:
            InputError: such a file is not there.
        """
        found = {}
        if self.config.calibration is not None:
            found["calibration"] = calibration_file(self.config.calibration)
        if self.config.columns is not None and _own_columns(self.config):
            found["columns"] = path = Path(self.config.columns)
            if not path.is_file():
                raise InputError(f"filter.columns: {path} is not there; give the path of a table")
        return found

    def citation(self) -> dict[str, Any]:
        """What the calibration promised."""
        return cite(self.config.calibration)

    def read_inputs(self) -> "tuple[Calibration | None, Own | None]":
        """The calibration and the user's table, where the config names them.

        Needs no scores: what doesn't fit is found before a run comes to them.

        Raises:
            ConfigError: the expression does not fit the columns' types.
            InputError: a file is missing, or not what it should be.
        """
        self.weights()
        cited, expression = self.config.calibration, self.config.expression
        calibration = None if cited is None else read_calibration(cited)
        own = read_own(self.config)
        if expression is not None:
            _check_types(expression, own)
        return calibration, own

    def open(self, device: str) -> Transform:
        """Finds what needs the whole run, once: the duplicates and where the top fraction ends.

        Raises:
            ConfigError: the expression does not fit the columns' types.
            InputError: the calibration is of another matcher, or lacks a source.
        """
        config = self.config
        calibration, own = self.read_inputs()
        if calibration is not None:
            for name in self.run.shards("scores", ("web",)):
                calibration.check_matcher(self.run, name)
        rules = Rules(config, pa.array([], pa.string()), calibration, own=own)
        if config.drop_duplicates:
            found = sorted(find_duplicates(self.run, rules))
            rules = replace(rules, duplicates=pa.array(found, pa.string()))
        if config.top_fraction is not None:
            rules = replace(rules, cut=find_cut(self.run, rules))
        return partial(decide, rules=rules)


def calibration_file(path: str) -> Path:
    """Where `filter.calibration` lies.

    Raises:
        InputError: it is not there.
    """
    if not Path(path).is_file():
        raise InputError(
            f"filter.calibration: {path} is not there; write it with `capfilt calibrate CONFIG`, "
            "or set filter.calibration: null"
        )
    return Path(path)


@dataclass(frozen=True)
class Cut:
    """The last pair of the top fraction; those after it, in the order of rank, are out.

    Attributes:
        score: rank score of that pair; None when the fraction holds no pair.
        uid: its content address.
        pair_id: its position.
    """

    score: float | None
    uid: str = ""
    pair_id: str = ""


@dataclass(frozen=True)
class Rules:
    """All that decides: the config, and what was found in the whole run.

    Attributes:
        config: of the filter.
        duplicates: ids of pairs in whose place another one of the same content counts.
        calibration: of `config.calibration`.
        cut: where the top fraction ends; None when there is none, or while it is looked for.
        own: the user's table, where the expression names a column of it.
    """

    config: Filter
    duplicates: pa.Array
    calibration: Calibration | None = None
    cut: Cut | None = None
    own: "Own | None" = None


@dataclass(frozen=True)
class Own:
    """The user's own columns.

    Attributes:
        by: what its rows are of: a column of `scores/` or `images/`.
        table: that column, and those that the expression names, as `own.name`.
    """

    by: str
    table: pa.Table


OWN_KEYS = ("pair_id", "uid", "key", "url")
"""What a user's table may say of which pair or picture a row is; the first that it has counts."""


def read_own(config: Filter) -> Own | None:
    """The user's table, where the expression names a column of it.

    Columns of numbers become float64, also where a CSV holds them as text.

    Raises:
        InputError: it can't be read, lacks a column, or has two rows for the same pair.
    """
    names = _own_columns(config)
    if not names or config.columns is None:
        return None
    table = read_list(config.columns, "filter.columns")
    by = next((name for name in OWN_KEYS if name in table.column_names), None)
    if by is None:
        raise InputError(
            f"filter.columns: {config.columns} has none of the columns {', '.join(OWN_KEYS)}, so "
            f"nothing says which pair a row is of; it has {', '.join(table.column_names)}"
        )
    for name in names:
        if name not in table.column_names:
            raise InputError(
                f"filter.columns: {config.columns} has no column {name!r}, which filter.expression "
                f"names; it has {', '.join(table.column_names)}"
            )
    keys = table[by].cast(pa.string()).combine_chunks()
    if pc.count_distinct(keys, mode="all").as_py() != len(keys):
        counted = pc.value_counts(keys).to_pylist()
        twice = next(row["values"] for row in counted if row["counts"] > 1)
        raise InputError(f"filter.columns: {config.columns} has {by} {twice!r} more than once")
    columns = {by: keys} | {f"own.{name}": _numbers(table[name]) for name in names}
    return Own(by, pa.table(columns))


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as float64 where all of it is numbers, or numbers as text; else as it is."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, column)
        if pa.types.is_boolean(column.type):
            return column
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return column


SOURCE_ORDER = ("human", "web", "synthetic")
"""Which of several pairs of the same content counts: one of the first source here."""


def find_duplicates(run: RunDir, rules: Rules) -> frozenset[str]:
    """The pair ids in whose place another pair with the same picture and text counts.

    That is one which the rules over the pair alone leave, if there is any; of several the one of
    the first source of `SOURCE_ORDER`, and of these the first of the run.

    Holds 16 bytes a pair of the run, 1.6 GB for a hundred million, and what is there more than
    once.
    """
    shards = run.shards("scores", ("human",)) + run.shards("scores", ("web",))
    seen: list[np.ndarray] = []
    for name in shards:
        # the first 64 bits of a sha256; candidates are confirmed by the whole uid below
        seen.append(_hashes(Shard(run, name).read("scores", ["uid"])["uid"].drop_null()))
    hashes = np.concatenate(seen) if seen else np.empty(0, np.uint64)
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    wanted = set(repeated.tolist())
    counts: dict[str, tuple[tuple[bool, int], str]] = {}
    duplicates: list[str] = []
    for name, own in zip(shards, seen, strict=True):
        if not np.isin(own, repeated).any():
            continue
        shard = Shard(run, name)
        scores = shard.read("scores")
        dropped = pc.or_(
            pc.is_valid(scores["error"]), pc.is_valid(_by_pair(shard, scores, rules)[0])
        )
        columns = (scores["uid"], scores["pair_id"], scores["source"], dropped)
        for uid, pair_id, source, out in zip(*(each.to_pylist() for each in columns), strict=True):
            if uid is None or int(uid[:16], 16) not in wanted:
                continue
            place = (out, SOURCE_ORDER.index(source))
            if uid not in counts:
                counts[uid] = place, pair_id
            elif place < counts[uid][0]:
                duplicates.append(counts[uid][1])
                counts[uid] = place, pair_id
            else:
                duplicates.append(pair_id)
    return frozenset(duplicates)


def _hashes(uids: pa.ChunkedArray) -> np.ndarray:
    return np.array([int(uid[:16], 16) for uid in uids.to_pylist()], dtype=np.uint64)


def decide(shard: Shard, *, rules: Rules) -> pa.Table:
    """One decision for every scored or unscorable pair of a shard; the first reason that holds.

    A score equal to a threshold is kept. The order is that of `ORDER`.
    """
    judged = judge(shard, rules)
    reason = judged.reason
    if rules.cut is not None:
        out = pa.array(judged.open & ~_within(judged, rules.cut))
        reason = pc.if_else(out, "below_top_fraction", reason)
    if rules.config.synthetic_only_where_web_dropped:
        kept_web = pc.and_(
            judged.is_source("web"), _none(pc.coalesce(judged.scores["error"], reason))
        )
        pictures = judged.scores["key"].filter(kept_web)
        out = pc.and_(
            pc.and_(judged.is_source("synthetic"), _none(reason)),
            pc.is_in(judged.scores["key"], value_set=pc.unique(pictures)),
        )
        reason = pc.if_else(out, "web_text_kept", reason)
    reason = pc.coalesce(judged.scores["error"], reason, "kept")
    return pa.table(
        {
            "pair_id": judged.scores["pair_id"],
            "source": judged.scores["source"],
            "keep": pc.equal(reason, "kept"),
            "reason": reason,
        },
    )


@dataclass(frozen=True)
class Judged:
    """A shard's pairs after the rules that need nothing but the pair and its picture. N pairs.

    Attributes:
        scores: `scores/`, all columns.
        reason: why a pair is out so far, or null. N.
        counted: web and synthetic pairs with a score that are no duplicates. [N] bool.
        open: those of them that no rule has dropped. [N] bool.
        rank: what `rank_by` names. [N] float64, NaN where there is no score.
    """

    scores: pa.Table
    reason: pa.ChunkedArray
    counted: np.ndarray
    open: np.ndarray
    rank: np.ndarray

    def is_source(self, name: str) -> pa.ChunkedArray:
        """Which pairs are of a source, N."""
        return pc.equal(self.scores["source"], name)


def judge(shard: Shard, rules: Rules) -> Judged:
    """Applies the rules up to `not_best` (see `ORDER`)."""
    config = rules.config
    scores = shard.read("scores")
    reason, ranks = _by_pair(shard, scores, rules)
    is_duplicate = pc.is_in(scores["pair_id"], value_set=rules.duplicates)
    reason = pc.if_else(is_duplicate, "duplicate", reason)
    has_score = pc.and_(pc.is_null(scores["error"]), pc.is_valid(scores["itm_prob"]))
    counted = _bools(
        pc.and_(
            pc.and_(pc.not_equal(scores["source"], "human"), has_score), pc.invert(is_duplicate)
        )
    )
    rank = ranks[config.rank_by] + 0.0  # -0.0 and 0.0 are the same score
    if config.best_of is not None:
        contenders = pc.and_(
            pc.and_(pc.equal(scores["source"], "synthetic"), has_score), _none(reason)
        )
        worse = _not_best(scores, rank, _bools(contenders), config.best_of)
        reason = pc.if_else(pc.and_(_none(reason), pa.array(worse)), "not_best", reason)
    return Judged(scores, reason, counted, counted & _bools(_none(reason)), rank)


def _by_pair(
    shard: Shard, scores: pa.Table, rules: Rules
) -> tuple[pa.ChunkedArray, dict[str, np.ndarray]]:
    """Why the rules over a pair alone drop it, or null; and what `rank_by` may name. N each."""
    config = rules.config
    itm, itc = _floats(scores["itm_prob"]), _floats(scores["itc_sim"])
    fused = (config.fuse.itm * itm + config.fuse.itc * itc) / (config.fuse.itm + config.fuse.itc)
    ranks = {"itm": itm, "itc": itc, "fused": fused}
    not_human = pc.not_equal(scores["source"], "human")
    reason = pa.chunked_array([pa.nulls(scores.num_rows, pa.string())])

    def drop(reason: pa.ChunkedArray, where: Any, name: str) -> pa.ChunkedArray:
        return pc.if_else(pc.and_(_none(reason), pc.and_(not_human, where)), name, reason)

    synthetic = _bools(pc.equal(scores["source"], "synthetic"))
    itm_limit = _limits(synthetic, config.itm_threshold, config.synthetic_itm_threshold)
    itc_limit = _limits(synthetic, config.itc_threshold, config.synthetic_itc_threshold)
    reason = drop(reason, pa.array(itm < itm_limit), "itm_below_threshold")
    reason = drop(reason, pa.array(itc < itc_limit), "itc_below_threshold")
    if config.fused_threshold is not None:
        reason = drop(reason, pa.array(fused < config.fused_threshold), "fused_below_threshold")
    if rules.calibration is not None:
        ranks["probability"], passes = _calibrated(rules.calibration, scores, itm, itc)
        reason = drop(reason, pa.array(~passes), "below_precision")
    if config.expression is not None:
        holds = _holds(config.expression, scores, shard, rules.own)
        reason = drop(reason, pc.invert(holds), "expression")
    return reason, ranks


def _limits(synthetic: np.ndarray, web: float | None, own: float | None) -> np.ndarray:
    """The threshold of each pair, NaN where it has none: web's, or synthetic texts' own. [N]."""
    limit = np.nan if web is None else web
    return np.where(synthetic, limit if own is None else own, limit)


def _none(reason: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_null(reason)


def _bools(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64; null is NaN, for which no comparison holds."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _calibrated(
    calibration: Calibration, scores: pa.Table, itm: np.ndarray, itc: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a match and whether the source's threshold is reached, N each."""
    sources = np.asarray(scores["source"].to_pylist(), dtype=object)
    probability = np.full(len(itm), np.nan)
    passes = np.ones(len(itm), dtype=bool)
    scored = ~np.isnan(itm)
    for source in ("web", "synthetic"):
        rows = scored & (sources == source)
        if rows.any():
            probability[rows] = calibration.probability(itm[rows], itc[rows], source)
            passes[rows] = calibration.keeps(itm[rows], itc[rows], source)
    return probability, passes


def _not_best(scores: pa.Table, rank: np.ndarray, contenders: np.ndarray, count: int) -> np.ndarray:
    """Which contenders are not among the `count` best of their picture; ties by uid. [N] bool."""
    rows = np.flatnonzero(contenders)
    out = np.zeros(len(rank), dtype=bool)
    if len(rows) == 0:
        return out
    keys = np.asarray(scores["key"].to_pylist(), dtype=object)[rows]
    uids = np.asarray(scores["uid"].to_pylist(), dtype=object)[rows]
    order = sorted(range(len(rows)), key=lambda i: (keys[i], -rank[rows[i]], uids[i], rows[i]))
    place, last = 0, None
    for i in order:
        place = place + 1 if keys[i] == last else 0
        last = keys[i]
        out[rows[i]] = place >= count
    return out


def _picture_columns(config: Filter) -> list[str]:
    if config.expression is None:
        return []
    return [name for name in columns_of(config.expression) if name in IMAGE_COLUMNS]


def _own_columns(config: Filter) -> tuple[str, ...]:
    return () if config.expression is None else own_columns_of(config.expression)


def _holds(
    expression: str, scores: pa.Table, shard: Shard, own: Own | None = None
) -> pa.ChunkedArray:
    """Whether the expression is true of a pair (missing is not true), N."""
    wanted = columns_of(expression)
    columns = {name: scores[name] for name in wanted if name in SCORE_COLUMNS}
    pictures = [name for name in wanted if name in IMAGE_COLUMNS]
    if pictures:
        images = shard.read("images", ["key", *pictures])
        rows = pc.index_in(scores["key"], value_set=images["key"].combine_chunks())
        columns |= {name: images[name].take(rows) for name in pictures}
    if own is not None:
        keys = scores[own.by] if own.by != "url" else None
        if keys is None:
            images = shard.read("images", ["key", "url"])
            rows = pc.index_in(scores["key"], value_set=images["key"].combine_chunks())
            keys = images["url"].take(rows)
        rows = pc.index_in(keys, value_set=own.table[own.by].combine_chunks(), skip_nulls=True)
        columns |= {name: own.table[name].take(rows) for name in own.table.column_names[1:]}
    if not columns:
        columns = {"pair_id": scores["pair_id"]}
    return _evaluate(expression, pa.table(columns))


def _evaluate(expression: str, table: pa.Table) -> pa.ChunkedArray:
    condition = compile_expression(expression)
    try:
        found = ds.dataset(table).to_table(columns={"holds": condition}, use_threads=False)
        return pc.fill_null(found["holds"].cast(pa.bool_()), False)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"filter.expression {expression!r} does not fit the columns' types or values: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _check_types(expression: str, own: Own | None = None) -> None:
    """Tries the expression on a made-up row, so that a mistake is found before anything is decided.

    A row, and not none: a regular expression is read only when there is something to match.
    """
    fields = [SCORES.field(name) for name in SCORE_COLUMNS]
    fields += [IMAGES.field(name) for name in IMAGE_COLUMNS]
    columns = {
        field.name: pa.array(["a" if pa.types.is_string(field.type) else 1], field.type)
        for field in fields
    }
    if own is not None:
        first = own.table.slice(0, 1)
        columns |= {name: first[name] for name in first.column_names if name != own.by}
    _evaluate(expression, pa.table(columns))


# --- top fraction --------------------------------------------------------------------------------


def find_cut(run: RunDir, rules: Rules, most_at_once: int = MOST_AT_ONCE) -> Cut | None:
    """Where the top fraction of the run ends, exactly, in bounded memory.

    Pairs are ordered by rank score (high to low), then uid, then pair id. The score's bits and the
    uid's are one long number; each pass over the shards counts the next 16 bits of those pairs that
    still lie where the cut does, until what lies there fits in memory (a radix selection).

    Args:
        run: its `scores/`, read once a pass.
        rules: all that decides before the top fraction.
        most_at_once: pairs held at a time.

    Returns:
        The cut; None when all pairs that are open are within the fraction.
    """
    names = run.shards("scores", ("web",))

    def shards() -> Iterator[Judged]:
        for name in names:
            yield judge(Shard(run, name), rules)

    counted = still_open = 0
    for judged in shards():
        counted += int(judged.counted.sum())
        still_open += int(judged.open.sum())
    assert rules.config.top_fraction is not None
    wanted = share_of(counted, rules.config.top_fraction)
    if wanted >= still_open:
        return None
    if wanted == 0:
        return Cut(None)
    prefix: tuple[int, ...] = ()
    inside = still_open
    while inside > most_at_once and len(prefix) < 8:
        counts = np.zeros(1 << 16, np.int64)
        for judged in shards():
            counts += np.bincount(_next_digits(judged, prefix), minlength=1 << 16)
        before = np.cumsum(counts)
        digit = int(np.searchsorted(before, wanted))
        wanted -= int(before[digit - 1]) if digit else 0
        inside = int(counts[digit])
        prefix = (*prefix, digit)
    candidates: list[tuple[float, str, str]] = []
    for judged in shards():
        rows = _rows_in(judged, prefix)
        taken = judged.scores.select(["uid", "pair_id"]).take(pa.array(rows))
        uids, ids = (column.to_pylist() for column in taken.columns)
        candidates.extend(zip((-judged.rank[rows]).tolist(), uids, ids, strict=True))
    score, uid, pair_id = sorted(candidates)[wanted - 1]
    return Cut(-score, uid, pair_id)


def share_of(count: int, fraction: float) -> int:
    """How many of `count` pairs a fraction is: the nearest whole number, halves up."""
    return int(np.floor(count * fraction + 0.5))


def _digits(rank: np.ndarray, uids: Callable[[], Iterable[str]], place: int) -> np.ndarray:
    """16 bits of each pair's place in the order: 0..3 of the score, 4..7 of the uid. [N]."""
    if place >= 4:
        start = 4 * (place - 4)
        return np.array([int(uid[start : start + 4], 16) for uid in uids()], dtype=np.int64)
    bits = np.ascontiguousarray(rank).view(np.uint64)
    sign = np.uint64(1 << 63)
    # ascending in the score once negative numbers are flipped whole, and the others' sign set
    ascending = np.where(bits & sign, ~bits, bits | sign)
    return ((~ascending >> np.uint64(48 - 16 * place)) & np.uint64(0xFFFF)).astype(np.int64)


def _rows_in(judged: Judged, prefix: tuple[int, ...]) -> np.ndarray:
    rows = np.flatnonzero(judged.open)
    for place, digit in enumerate(prefix):
        rows = rows[_digits_at(judged, rows, place) == digit]
    return rows


def _next_digits(judged: Judged, prefix: tuple[int, ...]) -> np.ndarray:
    return _digits_at(judged, _rows_in(judged, prefix), len(prefix))


def _digits_at(judged: Judged, rows: np.ndarray, place: int) -> np.ndarray:
    def uids() -> list[str]:
        return judged.scores["uid"].take(pa.array(rows)).to_pylist()

    return _digits(judged.rank[rows], uids, place)


def _within(judged: Judged, cut: Cut) -> np.ndarray:
    """Whether a pair stands at the cut or before it, [N] bool."""
    if cut.score is None:
        return np.zeros(len(judged.rank), dtype=bool)
    within = judged.rank > cut.score
    for row in np.flatnonzero(judged.rank == cut.score):
        uid, pair_id = (judged.scores[name][row].as_py() for name in ("uid", "pair_id"))
        within[row] = (uid or "", pair_id) <= (cut.uid, cut.pair_id)
    return within
