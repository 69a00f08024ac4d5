"""A run's pairs as one table that answers the review page: filters, orders, histograms, thresholds.

`index` reads the run into duckdb. Text from a request only ever becomes a bound parameter, and once
the tables are open duckdb has no access to files.
"""

import io
import json
import logging
import math
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.inspect.index import attach, import_duckdb, version_of
from capfilt.inspect.labels import VERDICTS, Label, LabelStore
from capfilt.inspect.thresholds import Thresholds, decided_thresholds
from capfilt.schema import REASONS, SOURCES
from capfilt.shards import RunDir

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

ORDERS = {
    "pair": "p.row",
    "itm": "p.itm",
    "itc": "p.itc",
    "threshold": (
        "abs(p.itm::DOUBLE"
        " - CASE p.source WHEN 'synthetic' THEN $threshold_synthetic ELSE $threshold END)"
    ),
    "uncertain": "abs(p.itm::DOUBLE - 0.5)",
    "disagreement": "-p.disagreement",
    "random": "mix(mix(xor(mix(p.row), ($seed * 2654435761) & 4294967295)))",
    "similar": "-s.similarity",
}
"""What pairs can be sorted by; each ascends from the most interesting."""

_OTHER_RULES = (
    "fused_threshold",
    "expression",
    "best_of",
    "top_fraction",
    "synthetic_only_where_web_dropped",
)
CHANGES = ("joins", "leaves", "any")
TRIED = ("t_itm", "t_itc", "t_synthetic_itm", "t_synthetic_itc")
"""The parameters of thresholds that are tried."""
REVIEWS = ("todo", "mine", "labelled", "disputed", *VERDICTS)
LARGEST_PAGE = 200
LARGEST_AREA_PX = 80_000_000
THUMBNAIL_PX = 256

_LAST = 1e300
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Query:
    """Which pairs to show; every filter is optional and they combine.

    Attributes:
        keep: kept or dropped.
        reason: one of the run's reasons.
        source: `web`, `human` or `synthetic`.
        itm_min: lowest ITM probability; itm_max, itc_min, itc_max likewise.
        words: each must be in the text, in any case.
        shard: name of a shard.
        key: of a picture, or its beginning.
        review: `todo` (no verdict of this reviewer), `mine`, `labelled`, `disputed`, or a verdict.
        changes: pairs that the thresholds would change: `joins`, `leaves`, `any`.
        order: one of `ORDERS`.
        descending: turns the order round.
        seed: of the random order.
        limit: pairs a page.
        after: the last row of the page before, as `Page.next` gives it.
        before: the first row of the page after.
    """

    keep: bool | None = None
    reason: str | None = None
    source: str | None = None
    itm_min: float | None = None
    itm_max: float | None = None
    itc_min: float | None = None
    itc_max: float | None = None
    words: str | None = None
    shard: str | None = None
    key: str | None = None
    review: str | None = None
    changes: str | None = None
    order: str = "pair"
    descending: bool = False
    seed: int = 0
    limit: int = 24
    after: tuple[float, int] | None = None
    before: tuple[float, int] | None = None

    @property
    def sampling(self) -> str:
        """What labels given in this view count as.

        A random order is a sample of the whole only while nothing but the source and the review
        state narrows it down; another filter or order would bias the estimate.
        """
        narrowed = any(
            getattr(self, each.name) is not None
            for each in fields(self)
            if each.name not in ("source", "review", "after", "before") and each.default is None
        )
        if self.order == "random" and not narrowed and self.review in (None, "todo"):
            return "random"
        return self.order if self.order in ("threshold", "uncertain") else "browse"


def parse_query(params: Mapping[str, str]) -> Query:
    """A query from the parameters of a URL; those it does not know are left alone.

    Raises:
        InputError: a value is not one that the parameter takes.
    """
    values: dict[str, Any] = {}
    if params.get("keep"):
        values["keep"] = _one_of(params, "keep", ("yes", "no")) == "yes"
    for name, allowed in (
        ("source", SOURCES),
        ("review", REVIEWS),
        ("changes", CHANGES),
        ("order", tuple(ORDERS)),
    ):
        if params.get(name):
            values[name] = _one_of(params, name, allowed)
    for name in ("itm_min", "itm_max", "itc_min", "itc_max"):
        if params.get(name):
            values[name] = _number(params, name)
    for name in ("reason", "words", "shard", "key"):
        if params.get(name):
            values[name] = params[name][:500]
    for name in ("after", "before"):
        if params.get(name):
            values[name] = _cursor(params, name)
    values["descending"] = params.get("desc") in ("1", "true")
    if params.get("seed"):
        values["seed"] = _whole(params, "seed", 0, 2**31 - 1)
    if params.get("limit"):
        values["limit"] = _whole(params, "limit", 1, LARGEST_PAGE)
    return Query(**values)


def parse_thresholds(params: Mapping[str, str], default: Thresholds) -> Thresholds:
    """Thresholds from `t_itm` and `t_itc`, a number or `off`; the run's own where not given.

    For synthetic texts `t_synthetic_itm` and `t_synthetic_itc`; where they are not given, the run's
    own if it has some for them, else the same.

    Raises:
        InputError: neither a number nor `off`.
    """
    given: dict[str, float | None] = {}
    for name in TRIED:
        if params.get(name):
            given[name] = None if params[name] == "off" else _number(params, name)
    web = given.get("t_itm", default.itm), given.get("t_itc", default.itc)
    before = default.synthetic or web
    own = given.get("t_synthetic_itm", before[0]), given.get("t_synthetic_itc", before[1])
    return Thresholds(*web, own if own != web else None, default.as_run and not given)


def _one_of(params: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    value = params[name]
    if value not in allowed:
        raise InputError(f"{name} is {value[:80]!r}, expected one of {', '.join(allowed)}")
    return value


def _number(params: Mapping[str, str], name: str) -> float:
    try:
        value = float(params[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} is {params[name][:80]!r}, expected a number")
    return value


def _whole(params: Mapping[str, str], name: str, low: int, high: int) -> int:
    value = params[name]
    if not re.fullmatch(r"[0-9]{1,10}", value) or not low <= int(value) <= high:
        raise InputError(f"{name} is {value[:80]!r}, expected a whole number from {low} to {high}")
    return int(value)


def _cursor(params: Mapping[str, str], name: str) -> tuple[float, int]:
    value, _, row = params[name].partition("~")
    try:
        return float(value), int(row)
    except ValueError:
        raise InputError(f"{name} is {params[name][:80]!r}, expected a cursor of a page") from None


@dataclass(frozen=True)
class Page:
    """One screen of pairs.

    Attributes:
        pairs: as the page shows them; each with the other texts of its picture.
        total: how many pairs the filters leave.
        next: cursor of the page after, or None.
        previous: cursor of the page before, or None.
        sampling: what labels given here count as.
    """

    pairs: list[dict[str, Any]]
    total: int
    next: str | None
    previous: str | None
    sampling: str


@dataclass
class Run:
    """A run, opened for review. `open_run` makes one.

    Attributes:
        run: its folder.
        connection: duckdb, with the pairs attached as `run`.
        shards: names by number, in the order of the rows.
        labels: its label files.
        version: what the pairs were read from, as a digest.
    """

    run: RunDir
    connection: "duckdb.DuckDBPyConnection"
    shards: list[str]
    labels: LabelStore
    version: str
    _thumbnails: "OrderedDict[str, bytes]" = field(default_factory=OrderedDict)
    _groups: "OrderedDict[tuple[str, int], pa.Array]" = field(default_factory=OrderedDict)
    _matchers: dict[str, str | None] = field(default_factory=dict)
    _cached: dict[Any, Any] = field(default_factory=dict)
    _kept: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _label_lock: threading.RLock = field(default_factory=threading.RLock)

    def close(self) -> None:
        """Lets go of the duckdb file."""
        self.connection.close()

    def _rows(self, sql: str, params: Any = None) -> list[dict[str, Any]]:
        # a cursor of its own for each call: requests run on several threads
        with self.connection.cursor() as cursor:
            result = cursor.execute(sql, params) if params is not None else cursor.execute(sql)
            names = [column[0] for column in result.description]
            return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    # -- what the page shows ------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Counts of the whole run, its thresholds and its reviewers."""
        self.refresh_labels()
        if "counts" not in self._cached:
            counts = self._rows(
                "SELECT source, reason, count(*) AS pairs FROM run.pairs GROUP BY ALL ORDER BY ALL"
            )
            pictures = self._rows("SELECT count(*) AS n FROM run.pictures")[0]["n"]
            self._cached["counts"] = (counts, pictures)
        counts, pictures = self._cached["counts"]
        thresholds = self.thresholds()
        return {
            "run": os.path.basename(self.run.path.rstrip("/")) or self.run.path,
            "pairs": sum(row["pairs"] for row in counts),
            "pictures": pictures,
            "counts": counts,
            "reasons": REASONS,
            "shards": len(self.shards),
            "shard_names": self.shards[:500],
            "thresholds": thresholds.by_source(),
            "rules": self.other_rules(),
            "version": self.version,
            "labels": self.label_counts(),
        }

    def thresholds(self) -> Thresholds:
        """What the run's decisions were made with; the defaults where there are none yet."""
        config = self._decided_with().get("config") or {}
        if "itm_threshold" not in config:
            return Thresholds()
        return replace(decided_thresholds(config), as_run=bool(self.other_rules()))

    def synthetic_thresholds(self) -> list[str]:
        """The thresholds of their own that synthetic texts had, by their name in `filter`."""
        config = self._decided_with().get("config") or {}
        names = ("synthetic_itm_threshold", "synthetic_itc_threshold")
        return [name for name in names if config.get(name) is not None]

    def other_rules(self) -> dict[str, Any]:
        """The rules beside ITM's and ITC's thresholds that decided, by their name in `filter`."""
        record = self._decided_with()
        config = record.get("config") or {}
        found = {name: config[name] for name in _OTHER_RULES if config.get(name)}
        digest = (record.get("weights") or {}).get("calibration")
        if digest is not None:
            found["calibration"] = {"target": self._promise().get("target"), "digest": digest}
        return found

    def _promise(self) -> Mapping[str, Any]:
        """What the calibration that decided promised; empty where none did."""
        return self._decided_with().get("calibration") or {}

    def _decided_with(self) -> Mapping[str, Any]:
        """A manifest of the run's decisions; empty where there are none yet."""
        if "decisions" not in self._kept:
            for name in self.shards:
                record = manifest.read(self.run, self.run.manifest("decisions", name))
                if record and isinstance(record.get("config"), Mapping):
                    self._kept["decisions"] = record
                    break
            else:
                self._kept["decisions"] = {}
        return self._kept["decisions"]

    def page(
        self,
        query: Query,
        thresholds: Thresholds,
        reviewer: str,
        similar: Sequence[tuple[int, float]] | None = None,
        similar_is_picture: bool = False,
    ) -> Page:
        """One screen of pairs.

        Args:
            query: filters, order and position.
            thresholds: what `changes` and the order `threshold` refer to.
            reviewer: whose verdicts `review` and the cards show.
            similar: rows (or pictures) with their similarity: only these are shown.
            similar_is_picture: `similar` names pictures, not rows.
        """
        self.refresh_labels()
        where, params = _conditions(query, thresholds, reviewer, self.shards)
        source = "run.pairs p"
        if similar is not None:
            column = "picture" if similar_is_picture else "row"
            source += (
                " JOIN (SELECT unnest($found) AS found, unnest($similarities) AS similarity) s"
                f" ON s.found = p.{column}"
            )
            params["found"] = [row for row, _ in similar]
            params["similarities"] = [similarity for _, similarity in similar]
        elif query.order == "similar":
            query = replace(query, order="pair")
        expression = ORDERS[query.order]
        order_params = dict(params)
        if query.order == "threshold" and thresholds.as_run and self._promise():
            expression, limits = _distance_to_calibrated(self._promise())
            order_params |= limits
        if "$threshold" in expression:
            for name, kind in (("threshold", "web"), ("threshold_synthetic", "synthetic")):
                limit = thresholds.of(kind)["itm"]
                order_params[name] = 0.5 if limit is None else limit
        if "$seed" in expression:
            order_params["seed"] = query.seed
        total_key = ("total", where, repr(params)) if query.review is None else None
        total = self._cached.get(total_key) if total_key and similar is None else None
        if total is None:
            total = self._rows(f"SELECT count(*) AS n FROM {source} WHERE {where}", params)[0]["n"]
            if total_key and similar is None:
                with self._lock:
                    if len(self._cached) > 500:
                        self._cached.clear()
                    self._cached[total_key] = total
        sign = "-" if query.descending else ""
        value = f"coalesce({sign}({expression})::DOUBLE, {_LAST})"
        backwards = query.before is not None
        cursor = query.before or query.after
        position, direction = "", "ASC"
        if backwards:
            direction = "DESC"
        if cursor is not None:
            sort_value, row = cursor
            comparison = "<" if backwards else ">"
            position = (
                f" AND ({value} {comparison} $value"
                f" OR ({value} = $value AND p.row {comparison} $row))"
            )
            order_params |= {"value": sort_value, "row": row}
        found = self._rows(
            f"SELECT p.row, {value} AS value FROM {source} WHERE {where}{position} "
            f"ORDER BY value {direction}, p.row {direction} LIMIT {int(query.limit) + 1}",
            order_params,
        )
        more = len(found) > query.limit
        found = found[: query.limit]
        if backwards:
            found.reverse()
        has_next = more if not backwards else True
        has_previous = more if backwards else cursor is not None
        pairs = self._cards([row["row"] for row in found], reviewer)
        if similar is not None:
            by_id = dict(similar)
            for pair in pairs:
                pair["similarity"] = by_id.get(pair["picture" if similar_is_picture else "row"])
        return Page(
            pairs,
            total,
            _cursor_text(found[-1]) if found and has_next else None,
            _cursor_text(found[0]) if found and has_previous else None,
            query.sampling,
        )

    def _cards(self, rows: list[int], reviewer: str) -> list[dict[str, Any]]:
        """What a card shows, for rows in this order: the pair, its picture, the other texts."""
        if not rows:
            return []
        found = self._rows(
            """
            SELECT p.row, p.picture, p.pair_id, p.key, p.source, p.caption, p.uid, p.keep, p.reason,
                   p.itm, p.itc, p.disagreement, i.url, i.width, i.height, i.has_image,
                   i.error_message, p.shard
            FROM run.pairs p LEFT JOIN run.pictures i ON i.picture = p.picture
            WHERE p.picture IN (
                SELECT picture FROM run.pairs WHERE row IN (SELECT unnest($rows))
            )
            ORDER BY p.row
            """,
            {"rows": rows},
        )
        verdicts: dict[int, list[dict[str, Any]]] = {}
        for verdict in self._rows(
            "SELECT row, reviewer, verdict FROM verdicts WHERE row IN (SELECT unnest($rows))",
            {"rows": [pair["row"] for pair in found]},
        ):
            verdicts.setdefault(verdict.pop("row"), []).append(verdict)
        by_picture: dict[int, list[dict[str, Any]]] = {}
        for pair in found:
            said = verdicts.get(pair["row"], [])
            pair["verdict"] = next(
                (each["verdict"] for each in said if each["reviewer"] == reviewer), None
            )
            pair["others_said"] = [each for each in said if each["reviewer"] != reviewer]
            pair["shard"] = self.shards[pair["shard"]]
            by_picture.setdefault(pair["picture"], []).append(pair)
        by_row = {pair["row"]: pair for pair in found}
        cards = []
        for row in rows:
            pair = by_row[row]
            texts = [
                {
                    name: other[name]
                    for name in ("pair_id", "source", "caption", "keep", "reason", "itm", "itc")
                }
                for other in by_picture[pair["picture"]]
                if other["row"] != row
            ]
            cards.append({**pair, "texts": texts[:20], "more_texts": max(0, len(texts) - 20)})
        return cards

    def pair(self, pair_id: str, reviewer: str) -> dict[str, Any] | None:
        """Everything that is known about a pair, with where it comes from; None if there is none.

        Raises:
            InputError: a manifest can't be read.
        """
        row = self.row_of(pair_id)
        if row is None:
            return None
        self.refresh_labels()
        card = self._cards([row], reviewer)[0]
        picture = self._rows(
            "SELECT key, url, sha256, status, error_message, width, height, original_width, "
            "original_height FROM run.pictures WHERE picture = $picture",
            {"picture": card["picture"]},
        )
        stages = {}
        for table in ("images", "captions", "scores", "decisions", "export"):
            record = manifest.read(self.run, self.run.manifest(table, card["shard"]))
            if record is not None:
                stages[table] = {
                    name: record.get(name)
                    for name in (
                        "stage",
                        "fingerprint",
                        "finished",
                        "config",
                        "weights",
                        "versions",
                    )
                }
        return {
            **card,
            "image": picture[0] if picture else None,
            "manifests": stages,
            "labels": self._rows(
                "SELECT reviewer, verdict, time, sampling FROM verdicts WHERE row = $row "
                "ORDER BY time",
                {"row": row},
            ),
        }

    def row_of(self, pair_id: str) -> int | None:
        """The row of a pair, or None."""
        # text statistics prune little; the shard's number, in the order of the rows, prunes well
        shard = _shard_number(pair_id, self.shards)
        narrow = "" if shard is None else f"shard = {int(shard)} AND "
        found = self._rows(
            f"SELECT row FROM run.pairs WHERE {narrow}pair_id = $pair_id", {"pair_id": pair_id}
        )
        return int(found[0]["row"]) if found else None

    def numbers_of(self, kind: str, ids: Sequence[tuple[str, float]]) -> list[tuple[int, float]]:
        """Search results by number: pictures for `image`, rows for `text`."""
        table, number, name = (
            ("run.pictures", "picture", "key")
            if kind == "image"
            else ("run.pairs", "row", "pair_id")
        )
        found = self._rows(
            f"SELECT {number} AS number, {name} AS id FROM {table} "
            f"WHERE {name} IN (SELECT unnest($ids))",
            {"ids": [each for each, _ in ids]},
        )
        numbers = {row["id"]: row["number"] for row in found}
        return [(numbers[each], value) for each, value in ids if each in numbers]

    def histogram(self, score: str, bins: int = 50) -> dict[str, Any]:
        """Counts of a score per source.

        Args:
            score: `itm` (0..1) or `itc` (-1..1).
            bins: how many, all of one width.

        Returns:
            `low`, `high`, `bins`, and per source the list of counts.
        """
        if score not in ("itm", "itc"):
            raise InputError(f"score is {score[:80]!r}, expected itm or itc")
        key = ("histogram", score, bins)
        if key not in self._cached:
            low, high = (0.0, 1.0) if score == "itm" else (-1.0, 1.0)
            rows = self._rows(
                f"SELECT source, greatest(0, least(floor(({score}::DOUBLE - $low) / ($high - $low) "
                f"* $bins), $bins - 1))::INTEGER AS bin, count(*) AS pairs FROM run.pairs "
                f"WHERE {score} IS NOT NULL GROUP BY ALL",
                {"low": low, "high": high, "bins": bins},
            )
            sources: dict[str, list[int]] = {}
            for row in rows:
                sources.setdefault(row["source"], [0] * bins)[row["bin"]] = row["pairs"]
            self._cached[key] = {
                "score": score,
                "low": low,
                "high": high,
                "bins": bins,
                "sources": {name: sources[name] for name in SOURCES if name in sources},
            }
        counted: dict[str, Any] = self._cached[key]
        return counted

    def try_thresholds(self, thresholds: Thresholds) -> dict[str, Any]:
        """What other thresholds would do, per source and in all, and how right that would be.

        The precision comes from labels: `random` from those given in random order (unbiased, with
        Wilson's 95 % interval), `any` from all of them, which is biased to where people looked.
        Over all, a source weighs as many pairs as would be kept of it, however many of the labels
        are its own; human pairs, which are kept unseen, weigh nothing.
        """
        self.refresh_labels()
        would, params = _would_keep(thresholds)
        rows = self._rows(
            f"""
            SELECT source, count(*) AS pairs,
                   count(*) FILTER (coalesce(keep, false)) AS kept,
                   count(*) FILTER ({would}) AS would_keep,
                   count(*) FILTER ({would} AND NOT coalesce(keep, false)) AS joins,
                   count(*) FILTER (NOT ({would}) AND coalesce(keep, false)) AS leaves
            FROM run.pairs p GROUP BY source
            """,
            params,
        )
        sources = {row["source"]: row for row in rows}
        labelled = self._rows(
            f"""
            WITH votes AS (
                SELECT row, count(*) FILTER (verdict = 'right') AS for_it,
                       count(*) FILTER (verdict = 'wrong') AS against_it,
                       bool_or(sampling = 'random') AS at_random
                FROM verdicts GROUP BY row
            )
            SELECT p.source, v.at_random, count(*) AS pairs,
                   count(*) FILTER (for_it > against_it) AS is_right,
                   count(*) FILTER (for_it < against_it) AS is_wrong
            FROM votes v JOIN run.pairs p ON p.row = v.row WHERE {would}
            GROUP BY ALL
            """,
            params,
        )
        result: dict[str, Any] = {
            "thresholds": thresholds.by_source(),
            "as_run": thresholds.as_run,
            "sources": {},
        }
        numbers = ("pairs", "kept", "would_keep", "joins", "leaves")
        for name in [each for each in SOURCES if each in sources]:
            result["sources"][name] = {key: sources[name][key] for key in numbers}
            mine = [row for row in labelled if row["source"] == name]
            result["sources"][name]["precision"] = _precision(mine)
        result["all"] = {key: sum(row[key] for row in rows) for key in numbers}
        judged = [row for row in labelled if row["source"] != "human"]
        parts = {name: part for name, part in result["sources"].items() if name != "human"}
        result["all"]["precision"] = {"any": _precision(judged)["any"], "random": _pooled(parts)}
        return result

    # -- pictures -----------------------------------------------------------------------------

    def thumbnail(self, key: str, side_px: int = THUMBNAIL_PX) -> bytes | None:
        """A picture of the run, small and encoded anew as JPEG; None where there is none.

        Args:
            key: of the picture; it is looked up, and never part of a path.
            side_px: longer side.
        """
        cached = f"{side_px}:{key}"
        with self._lock:
            if cached in self._thumbnails:
                self._thumbnails.move_to_end(cached)
                return self._thumbnails[cached]
        data = self.picture_bytes(key)
        made = None if data is None else shrink(data, side_px)
        if made is not None:
            with self._lock:
                self._thumbnails[cached] = made
                while len(self._thumbnails) > 3000:
                    self._thumbnails.popitem(last=False)
        return made

    def picture_bytes(self, key: str) -> bytes | None:
        """The stored bytes of a picture, or None."""
        shard = _shard_number(key, self.shards)
        narrow = "" if shard is None else f"shard = {int(shard)} AND "
        found = self._rows(
            f"SELECT shard, position FROM run.pictures WHERE {narrow}key = $key AND has_image",
            {"key": key},
        )
        if not found:
            return None
        return self._read_picture(self.shards[found[0]["shard"]], found[0]["position"])

    def _read_picture(self, shard: str, position: int) -> bytes | None:
        """One cell of `images/`: reads its row group, or only up to it where groups are large."""
        with fsspec.open(self.run.table("images", shard), "rb") as file:
            table = pq.ParquetFile(file, pre_buffer=False)
            group, start = 0, 0
            while position >= start + table.metadata.row_group(group).num_rows:
                start += table.metadata.row_group(group).num_rows
                group += 1
            key = (shard, group)
            with self._lock:
                cells = self._groups.get(key)
                if cells is not None:
                    self._groups.move_to_end(key)
            if cells is None:
                index = table.schema_arrow.get_field_index("image")
                column = _column_of(table.metadata.row_group(group), "image")
                if index >= 0 and column.total_uncompressed_size > 32 << 20:
                    skip = position - start
                    for batch in table.iter_batches(
                        batch_size=64, row_groups=[group], columns=["image"], use_threads=False
                    ):
                        if skip < batch.num_rows:
                            value: bytes | None = batch.column(0)[skip].as_py()
                            return value
                        skip -= batch.num_rows
                    return None
                cells = table.read_row_group(group, columns=["image"], use_threads=False)["image"]
                with self._lock:
                    self._groups[key] = cells
                    while sum(each.nbytes for each in self._groups.values()) > 192 << 20:
                        self._groups.popitem(last=False)
            value = cells[position - start].as_py()
            return value

    # -- labels -------------------------------------------------------------------------------

    def refresh_labels(self) -> None:
        """Takes in what any reviewer has written since."""
        with self._label_lock:
            changed = self.labels.refresh()
            if changed:
                self._attach(changed)

    def _attach(self, changed: set[str]) -> None:
        """Brings the verdicts of changed pairs into duckdb, by position and content."""
        standing = [label for label in self.labels.standing.values() if label.pair in changed]
        with self.connection.cursor() as cursor:
            cursor.execute(
                "DELETE FROM verdicts WHERE pair IN (SELECT unnest($pairs))",
                {"pairs": sorted(changed)},
            )
            if not standing:
                return
            rows = self._rows_of(standing)
            placed = [(rows[label], label) for label in standing if label in rows]
            if not placed:
                return
            columns = {
                "row": [row for row, _ in placed],
                "pair": [label.pair for _, label in placed],
                "reviewer": [label.reviewer for _, label in placed],
                "verdict": [label.verdict for _, label in placed],
                "sampling": [label.sampling for _, label in placed],
                "time": [label.time for _, label in placed],
            }
            unnested = ", ".join(f"unnest(${name})" for name in columns)
            cursor.execute(f"INSERT INTO verdicts SELECT {unnested}", columns)

    def _rows_of(self, labels: Sequence[Label]) -> dict[Label, int]:
        """The row of each label: its position if the content is the same, else where it is now."""
        rows: dict[Label, int] = {}
        if len(labels) == 1:
            shard = _shard_number(labels[0].pair_id, self.shards)
            narrow = "" if shard is None else f"shard = {int(shard)} AND "
        else:
            narrow = ""
        by_id: dict[str, list[Label]] = {}
        for label in labels:
            by_id.setdefault(label.pair_id, []).append(label)
        for found in self._rows(
            f"SELECT row, pair_id, uid FROM run.pairs "
            f"WHERE {narrow}pair_id IN (SELECT unnest($ids))",
            {"ids": sorted(by_id)},
        ):
            for label in by_id[found["pair_id"]]:
                if label.uid == found["uid"]:
                    rows[label] = int(found["row"])
        moved: dict[str, list[Label]] = {}
        for label in labels:
            if label not in rows and label.uid is not None:
                moved.setdefault(label.uid, []).append(label)
        if moved:
            for found in self._rows(
                "SELECT min(row) AS row, uid FROM run.pairs "
                "WHERE uid IN (SELECT unnest($uids)) GROUP BY uid",
                {"uids": sorted(moved)},
            ):
                for label in moved[found["uid"]]:
                    rows[label] = int(found["row"])
        return rows

    def label_counts(self) -> dict[str, Any]:
        """How many verdicts stand, by reviewer and kind."""
        reviewers: dict[str, dict[str, int]] = {}
        for (reviewer, _), label in self.labels.standing.items():
            counts = reviewers.setdefault(reviewer, dict.fromkeys(VERDICTS, 0))
            counts[label.verdict] += 1
        placed = self._rows("SELECT count(DISTINCT row) AS n FROM verdicts")[0]["n"]
        return {"pairs": placed, "reviewers": reviewers, "skipped_lines": self.labels.skipped}

    def label_basis(self, pair_id: str) -> dict[str, Any] | None:
        """What a label stores about its pair, or None where there is no such pair."""
        row = self.row_of(pair_id)
        if row is None:
            return None
        found = self._rows(
            "SELECT pair_id, uid, itm, itc, shard FROM run.pairs WHERE row = $row", {"row": row}
        )[0]
        return {
            "pair_id": found["pair_id"],
            "uid": found["uid"],
            "itm_prob": found["itm"],
            "itc_sim": found["itc"],
            "matcher": self._matcher(self.shards[found["shard"]]),
        }

    def _matcher(self, shard: str) -> str | None:
        if shard not in self._matchers:
            record = manifest.read(self.run, self.run.manifest("scores", shard)) or {}
            weights = record.get("weights") or {}
            self._matchers[shard] = weights.get("matcher") or record.get("fingerprint")
        return self._matchers[shard]


def _column_of(group: Any, name: str) -> Any:
    for index in range(group.num_columns):
        if group.column(index).path_in_schema == name:
            return group.column(index)
    raise InputError(f"images/ has no column {name!r}")


def _cursor_text(row: Mapping[str, Any]) -> str:
    return f"{row['value']!r}~{row['row']}"


def _shard_number(name: str, shards: Sequence[str]) -> int | None:
    """The number of the shard that a key or pair id names, where it names one."""
    shard = name.split("/", 1)[0].rpartition("-")[0]
    low, high = 0, len(shards)
    while low < high:
        middle = (low + high) // 2
        if shards[middle] < shard:
            low = middle + 1
        else:
            high = middle
    return low if low < len(shards) and shards[low] == shard else None


def _would_keep(thresholds: Thresholds) -> tuple[str, dict[str, float]]:
    """SQL for "these thresholds keep the pair", as the stage `filter` decides."""
    params: dict[str, float] = {}
    if thresholds.as_run:
        return "coalesce(p.keep, false)", params
    cases = ["WHEN 'human' THEN true"]
    for source, limits in thresholds.by_source().items():
        judged = []
        for name, value in limits.items():
            if value is not None:
                judged.append(f"coalesce(p.{name}::DOUBLE >= $t_{source}_{name}, false)")
                params[f"t_{source}_{name}"] = value
        cases.append(f"WHEN '{source}' THEN {' AND '.join(judged) or 'true'}")
    return f"(p.eligible AND CASE p.source {' '.join(cases)} END)", params


def _distance_to_calibrated(promise: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """SQL for how far a pair is from its source's calibrated threshold, in the calibrated score."""
    limits, cases = {}, []
    for source in SOURCES:
        threshold = ((promise.get("sources") or {}).get(source) or {}).get("threshold")
        if threshold is not None:
            cases.append(f"WHEN '{source}' THEN $calibrated_{source}")
            limits[f"calibrated_{source}"] = float(threshold)
    if not cases:
        return "NULL", {}
    clipped = "least(greatest(p.itm::DOUBLE, 1e-6), 1 - 1e-6)"
    logit = f"ln({clipped} / (1 - {clipped}))"
    score = {"itm": logit, "itc": "p.itc::DOUBLE"}.get(promise["score"])
    if score is None:
        score = f"($weight_itm * {logit} + $weight_itc * p.itc::DOUBLE)"
        weights = (float(each) for each in promise["weights"])
        limits |= dict(zip(("weight_itm", "weight_itc"), weights, strict=True))
    return f"abs({score} - CASE p.source {' '.join(cases)} END)", limits


def _conditions(
    query: Query, thresholds: Thresholds, reviewer: str, shards: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The filters as SQL with bound parameters."""
    parts: list[str] = []
    params: dict[str, Any] = {}
    if query.keep is not None:
        parts.append("coalesce(p.keep, false) = $keep")
        params["keep"] = query.keep
    for name in ("reason", "source"):
        if getattr(query, name) is not None:
            parts.append(f"p.{name} = ${name}")
            params[name] = getattr(query, name)
    for score in ("itm", "itc"):
        for end, comparison in (("min", ">="), ("max", "<=")):
            value = getattr(query, f"{score}_{end}")
            if value is not None:
                parts.append(f"p.{score}::DOUBLE {comparison} ${score}_{end}")
                params[f"{score}_{end}"] = value
    for number, word in enumerate((query.words or "").lower().split()[:20]):
        parts.append(f"contains(p.words, $word{number})")
        params[f"word{number}"] = word
    if query.shard is not None:
        parts.append("p.shard = $shard")
        params["shard"] = next(
            (number for number, name in enumerate(shards) if name == query.shard), -1
        )
    if query.key is not None:
        parts.append("starts_with(p.pair_id, $key)")
        params["key"] = query.key
        shard = _shard_number(query.key, shards)
        if shard is not None:
            parts.append(f"p.shard = {int(shard)}")
    if query.changes is not None:
        would, would_params = _would_keep(thresholds)
        params |= would_params
        joins = f"({would} AND NOT coalesce(p.keep, false))"
        leaves = f"(NOT {would} AND coalesce(p.keep, false))"
        sides = {"joins": joins, "leaves": leaves, "any": f"({joins} OR {leaves})"}
        parts.append(sides[query.changes])
    if query.review in ("todo", "mine"):
        negated = "NOT " if query.review == "todo" else ""
        parts.append(f"p.row {negated}IN (SELECT row FROM verdicts WHERE reviewer = $reviewer)")
        params["reviewer"] = reviewer
    elif query.review == "labelled":
        parts.append("p.row IN (SELECT row FROM verdicts)")
    elif query.review == "disputed":
        parts.append(
            "p.row IN (SELECT row FROM verdicts GROUP BY row HAVING count(DISTINCT verdict) > 1)"
        )
    elif query.review is not None:
        parts.append("p.row IN (SELECT row FROM verdicts WHERE verdict = $verdict)")
        params["verdict"] = query.review
    return " AND ".join(parts) or "true", params


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), in 0..1."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _precision(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of right pairs among labelled ones that would be kept."""
    rows = list(rows)
    result = {}
    for name, chosen in (("random", [row for row in rows if row["at_random"]]), ("any", rows)):
        right = sum(row["is_right"] for row in chosen)
        judged = right + sum(row["is_wrong"] for row in chosen)
        low, high = wilson(right, judged)
        result[name] = {
            "labels": judged,
            "unsure": sum(row["pairs"] for row in chosen) - judged,
            "precision": right / judged if judged else None,
            "low": low,
            "high": high,
        }
    return result


def _pooled(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The precision over sources, by random labels; each weighs as many pairs as it would keep.

    The interval is put together from those of the sources (MOVER; Zou and Donner, 2008).

    Returns:
        As `_precision` gives it for `random`, and the `sources` that have such labels: it is about
        these alone.
    """
    found = {
        name: part
        for name, part in sources.items()
        if part["precision"]["random"]["labels"] and part["would_keep"]
    }
    total = sum(part["would_keep"] for part in found.values())
    shares = [part["would_keep"] / total for part in found.values()]
    parts = [part["precision"]["random"] for part in found.values()]
    counts = {name: sum(part[name] for part in parts) for name in ("labels", "unsure")}
    if not parts:
        return {**counts, "precision": None, "low": 0.0, "high": 1.0, "sources": []}
    precision = math.fsum(w * part["precision"] for w, part in zip(shares, parts, strict=True))
    below, above = (
        math.hypot(
            *(w * (part[end] - part["precision"]) for w, part in zip(shares, parts, strict=True))
        )
        for end in ("low", "high")
    )
    return {
        **counts,
        "precision": precision,
        "low": max(0.0, precision - below),
        "high": min(1.0, precision + above),
        "sources": list(found),
    }


def shrink(data: bytes, side_px: int) -> bytes | None:
    """A picture made small and encoded anew, so that nothing of the original bytes is served.

    Returns:
        JPEG bytes, or None where `data` is not a picture or too large to decode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > LARGEST_AREA_PX:
                return None
            picture.draft("RGB", (side_px, side_px))
            small = ImageOps.exif_transpose(picture)
            small.thumbnail((side_px, side_px))
            if small.mode in ("RGBA", "LA", "P"):
                layer = small.convert("RGBA")
                small = Image.new("RGB", layer.size, "white")
                small.paste(layer, mask=layer.getchannel("A"))
            out = io.BytesIO()
            small.convert("RGB").save(out, "JPEG", quality=82)
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, TypeError, KeyError):
        return None


def open_run(run_dir: str, *, may_write: bool = True) -> Run:
    """Opens a run for review; reads its tables once, or takes what an earlier call has read.

    Args:
        run_dir: the run folder, a path or fsspec URL.
        may_write: keep what was read in `<run_dir>/.inspect/` for the next time.

    Raises:
        InputError: there is no run, or it has no scores yet.
        MissingExtraError: duckdb is not installed.
    """
    duckdb = import_duckdb()
    run = RunDir(run_dir)
    if not run.exists(run_dir):
        raise InputError(f"run folder {run_dir!r} is not there")
    shards = run.shards("scores")
    if not shards:
        raise InputError(
            f"{run_dir} has no scores yet, so there is nothing to review: "
            "run `capfilt score CONFIG` or `capfilt run CONFIG` first"
        )
    version = version_of(run, shards)
    connection = duckdb.connect(":memory:")
    try:
        attach(connection, run, shards, version, may_write)
        # duckdb has read all that it needs: whatever it is sent from here on, it opens no file
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        connection.execute(
            "CREATE TABLE verdicts (row BIGINT, pair VARCHAR, reviewer VARCHAR, verdict VARCHAR, "
            "sampling VARCHAR, time VARCHAR)"
        )
        connection.execute(
            "CREATE MACRO mix(x) AS "
            "((xor(x, x >> 16) & 4294967295) * 73244475 + 2654435769) & 4294967295"
        )
    except BaseException:
        connection.close()
        raise
    try:
        folder = run.local("labels")
    except InputError:
        folder = os.path.join(tempfile.mkdtemp(prefix="capfilt-labels-"), "labels")
        log.warning("%s is remote: labels of this review go to %s", run_dir, folder)
    opened = Run(run, connection, shards, LabelStore(folder), version)
    opened.refresh_labels()
    return opened


def dumps(value: Any) -> bytes:
    """JSON for the page: numbers that are none become null."""

    def clean(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, Mapping):
            return {str(key): clean(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [clean(each) for each in part]
        return part

    return json.dumps(clean(value), ensure_ascii=False, separators=(",", ":")).encode()
