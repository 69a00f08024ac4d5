"""A run's pairs as one table that answers the review page: filters, orders, histograms, thresholds.

`index` reads the run into duckdb. Text from a request only ever becomes a bound parameter, and once
the tables are open duckdb has no access to files.
"""

import json
import logging
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.inspect.filters import (
    HIGH,
    ORDERS,
    Query,
    conditions,
    distance_to_calibrated,
    shard_number,
    would_keep,
)
from capfilt.inspect.index import attach, import_duckdb, prints_of, version_of
from capfilt.inspect.labels import VERDICTS, Label, LabelStore, moment_of
from capfilt.inspect.pictures import THUMBNAIL_PX, Pictures, shrink
from capfilt.inspect.precision import pooled, precision_of
from capfilt.inspect.thresholds import Thresholds, decided_thresholds
from capfilt.schema import REASONS, SOURCES
from capfilt.shards import RunDir

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

_OTHER_RULES = (
    "fused_threshold",
    "expression",
    "best_of",
    "top_fraction",
    "synthetic_only_where_web_dropped",
)
_LAST = 1e300


@dataclass(frozen=True)
class Page:
    """One screen of pairs.

    Attributes:
        pairs: as the page shows them; each with the other texts of its picture.
        total: how many pairs the filters leave.
        next: cursor of the page after, or None.
        previous: cursor of the page before, or None.
        sampling: what labels given here count as.
        changed: whether tables of these pairs were made anew since the run was opened.
    """

    pairs: list[dict[str, Any]]
    total: int
    next: str | None
    previous: str | None
    sampling: str
    changed: bool


@dataclass
class Run:
    """A run, opened for review. `open_run` makes one.

    Attributes:
        run: its folder.
        connection: duckdb, with the pairs attached as `run`.
        shards: names by number, in the order of the rows.
        labels: its label files.
        version: what the pairs were read from, as a digest.
        prints: what each shard was known by then, from `prints_of`.
        matchers: digest of the matcher that gave the scores, by shard.
    """

    run: RunDir
    connection: "duckdb.DuckDBPyConnection"
    shards: list[str]
    labels: LabelStore
    version: str
    prints: dict[str, list[Any]]
    matchers: dict[str, str | None]
    _pictures: Pictures
    _thumbnails: "OrderedDict[str, bytes]" = field(default_factory=OrderedDict)
    _cached: dict[Any, Any] = field(default_factory=dict)
    _kept: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _label_lock: threading.RLock = field(default_factory=threading.RLock)

    def close(self) -> None:
        """Lets go of the duckdb file."""
        self.connection.close()

    def changed(self, shards: Collection[str] | None = None) -> bool:
        """Whether tables were made anew since the run was opened, of some shards or of any."""
        if shards is None and self.run.shards("scores") != self.shards:
            return True
        try:
            return any(
                prints_of(self.run, name) != self.prints[name]
                for name in (self.shards if shards is None else shards)
            )
        except InputError:  # a manifest that is being written, or was damaged
            return True

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
            "changed": self.changed(),
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

    def _high(self) -> Mapping[str, float]:
        """The ITM from which on a pair is among the best `HIGH` of its source."""
        if "high" not in self._kept:
            rows = self._rows(
                "SELECT source, quantile_disc(itm::DOUBLE, $below) AS lowest FROM run.pairs "
                "WHERE eligible GROUP BY source",
                {"below": 1 - HIGH},
            )
            found = {row["source"]: row["lowest"] for row in rows}
            self._kept["high"] = {
                "high": found.get("web", 0.0),
                "high_synthetic": found.get("synthetic", 0.0),
            }
        return self._kept["high"]

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
        where, params = conditions(query, thresholds, reviewer, self.shards)
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
            expression, limits = distance_to_calibrated(self._promise())
            order_params |= limits
        if "$threshold" in expression:
            for name, kind in (("threshold", "web"), ("threshold_synthetic", "synthetic")):
                limit = thresholds.of(kind)["itm"]
                order_params[name] = 0.5 if limit is None else limit
        if "$high" in expression:
            order_params |= self._high()
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

        def ranked(position: str, direction: str, limit: int) -> list[dict[str, Any]]:
            return self._rows(
                f"SELECT p.row, {value} AS value FROM {source} WHERE {where}{position} "
                f"ORDER BY value {direction}, p.row {direction} LIMIT {limit}",
                order_params,
            )

        found = ranked(position, direction, query.limit + 1)
        if not found and cursor is not None:
            # all that was there has been reviewed since, say: what is left starts anew
            return self.page(
                replace(query, after=None, before=None),
                thresholds,
                reviewer,
                similar,
                similar_is_picture,
            )
        more = len(found) > query.limit
        found = found[: query.limit]
        if backwards:
            found.reverse()
        has_next = more if not backwards else True
        has_previous = more if backwards else cursor is not None
        if has_previous and not backwards and query.review is not None:
            # the pairs before may have been reviewed since, and are then none of these
            before = f" AND ({value} < $value OR ({value} = $value AND p.row < $row))"
            order_params |= {"value": found[0]["value"], "row": found[0]["row"]}
            has_previous = bool(ranked(before, "ASC", 1))
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
            # what a search has found is no sample of the run, in whatever order
            query.sampling if similar is None else "browse",
            self.changed({pair["shard"] for pair in pairs}),
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
        shard = shard_number(pair_id, self.shards)
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
        are its own; human pairs, which are kept unseen, weigh nothing. Labels that were given with
        another matcher are left out, as `calibrate` does (this one may have learnt from them);
        `other_matcher` says on how many pairs.
        """
        self.refresh_labels()
        would, params = would_keep(thresholds)
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
                SELECT v.row, count(*) FILTER (verdict = 'right') AS for_it,
                       count(*) FILTER (verdict = 'wrong') AS against_it,
                       bool_or(sampling = 'random') AS at_random
                FROM current_verdicts v GROUP BY v.row
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
            result["sources"][name]["precision"] = precision_of(mine)
        result["all"] = {key: sum(row[key] for row in rows) for key in numbers}
        result["all"]["other_matcher"] = self._rows(
            "SELECT count(DISTINCT row) AS n FROM verdicts "
            "WHERE row NOT IN (SELECT row FROM current_verdicts)"
        )[0]["n"]
        judged = [row for row in labelled if row["source"] != "human"]
        parts = {name: part for name, part in result["sources"].items() if name != "human"}
        result["all"]["precision"] = {"any": precision_of(judged)["any"], "random": pooled(parts)}
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
        shard = shard_number(key, self.shards)
        narrow = "" if shard is None else f"shard = {int(shard)} AND "
        found = self._rows(
            f"SELECT shard, position FROM run.pictures WHERE {narrow}key = $key AND has_image",
            {"key": key},
        )
        if not found:
            return None
        return self._pictures.read(self.shards[found[0]["shard"]], found[0]["position"])

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
                "DELETE FROM placed WHERE pair IN (SELECT unnest($pairs))",
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
                "sampling": [
                    "random" if self.labels.at_random(label) else label.sampling
                    for _, label in placed
                ],
                "time": [label.time for _, label in placed],
                "moment": [moment_of(label.time).timestamp() for _, label in placed],
                "matcher": [label.matcher for _, label in placed],
            }
            unnested = ", ".join(f"unnest(${name})" for name in columns)
            cursor.execute(f"INSERT INTO placed SELECT {unnested}", columns)

    def _rows_of(self, labels: Sequence[Label]) -> dict[Label, int]:
        """The row of each label: its position if the content is the same, else where it is now.

        A label that says nothing of the content is of the pair at its position.
        """
        rows: dict[Label, int] = {}
        if len(labels) == 1:
            shard = shard_number(labels[0].pair_id, self.shards)
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
                if label.uid in (None, found["uid"]):
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

    def scored_anew(self, pair_id: str) -> bool:
        """Whether the scores of a pair's shard were made anew since the run was opened."""
        shard = shard_number(pair_id, self.shards)
        if shard is None:
            return False
        name = self.shards[shard]
        # the second of `prints_of` is of the scores: other decisions don't change what a label says
        return bool(prints_of(self.run, name)[1] != self.prints[name][1])

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
            "matcher": self.matchers[self.shards[found["shard"]]],
        }


def _matcher_of(run: RunDir, shard: str) -> str | None:
    """What a label says of the matcher that scored a shard: the digest of its weights."""
    record = manifest.read(run, run.manifest("scores", shard)) or {}
    return (record.get("weights") or {}).get("matcher") or record.get("fingerprint")


def _cursor_text(row: Mapping[str, Any]) -> str:
    return f"{row['value']!r}~{row['row']}"


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
    prints = {name: prints_of(run, name) for name in shards}
    version = version_of(prints)
    connection = duckdb.connect(":memory:")
    try:
        attach(connection, run, shards, version, may_write)
        # duckdb has read all that it needs: whatever it is sent from here on, it opens no file
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        connection.execute(
            "CREATE TABLE placed (row BIGINT, pair VARCHAR, reviewer VARCHAR, verdict VARCHAR, "
            "sampling VARCHAR, time VARCHAR, moment DOUBLE, matcher VARCHAR)"
        )
        # a label of the content and one of the position may be about the same pair
        connection.execute(
            "CREATE VIEW verdicts AS SELECT * FROM placed QUALIFY row_number() OVER "
            "(PARTITION BY row, reviewer ORDER BY moment DESC, pair) = 1"
        )
        matchers = {name: _matcher_of(run, name) for name in shards}
        connection.execute(
            "CREATE TABLE matchers AS SELECT unnest(range($count)) AS shard, "
            "unnest($matchers) AS matcher",
            {"count": len(shards), "matchers": list(matchers.values())},
        )
        connection.execute(
            "CREATE VIEW current_verdicts AS SELECT v.* FROM verdicts v "
            "JOIN run.pairs p ON p.row = v.row JOIN matchers m ON m.shard = p.shard "
            "WHERE v.matcher IS NULL OR v.matcher = m.matcher"
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
    opened = Run(
        run, connection, shards, LabelStore(folder), version, prints, matchers, Pictures(run)
    )
    opened._decided_with()  # now: later it may be that of other decisions than were read
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
