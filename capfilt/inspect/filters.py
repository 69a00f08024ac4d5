"""What the URL of the review page asks for, and the SQL that answers it.

Text from a request only ever becomes a bound parameter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from capfilt.errors import InputError
from capfilt.inspect.labels import VERDICTS
from capfilt.inspect.thresholds import Thresholds
from capfilt.schema import SOURCES

_SHUFFLED = "mix(mix(xor(mix(p.row), ($seed * 2654435761) & 4294967295)))"

ORDERS = {
    "pair": "p.row",
    "itm": "p.itm",
    "itc": "p.itc",
    "threshold": (
        "abs(p.itm::DOUBLE - CASE p.source WHEN 'synthetic' THEN $threshold_synthetic"
        " WHEN 'web' THEN $threshold END)"
    ),
    "uncertain": "CASE WHEN p.source <> 'human' THEN abs(p.itm::DOUBLE - 0.5) END",
    "disagreement": "-p.disagreement",
    "high": (
        "CASE WHEN p.source = 'human' OR NOT p.eligible THEN 2 * 4294967296"
        " WHEN p.itm::DOUBLE >= CASE p.source WHEN 'synthetic' THEN $high_synthetic ELSE $high END"
        f" THEN 0 ELSE 4294967296 END + {_SHUFFLED}"
    ),
    "random": (
        f"CASE WHEN p.source = 'human' OR NOT p.eligible THEN 4294967296 ELSE 0 END + {_SHUFFLED}"
    ),
    "similar": "-s.similarity",
}
"""What pairs can be sorted by; each ascends from the most interesting.

Those that are offered as samples end with the pairs that no threshold decides on: the human ones,
and in both random orders those without a picture or a text, and duplicates.
"""

HIGH = 0.4
"""The share of a source's pairs, those with the best ITM, that the order `high` begins with. A
precision of 0.9 or more is decided there, and few labels of a random sample lie there."""

CHANGES = ("joins", "leaves", "any")
TRIED = ("t_itm", "t_itc", "t_synthetic_itm", "t_synthetic_itc")
"""The parameters of thresholds that are tried."""
REVIEWS = ("todo", "mine", "labelled", "disputed", *VERDICTS)
LARGEST_PAGE = 200


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
        review: `todo` (no verdict of this reviewer, in a random sample none that was given there),
            `mine`, `labelled`, `disputed`, or a verdict.
        changes: pairs that the thresholds would change: `joins`, `leaves`, `any`.
        order: one of `ORDERS`.
        descending: turns the order round.
        seed: of the random orders.
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
        return self.order if self.order in ("threshold", "uncertain", "high") else "browse"


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
        place = float(value)
    except ValueError:
        place = math.nan
    if not math.isfinite(place) or not re.fullmatch(r"[0-9]{1,18}", row):
        raise InputError(f"{name} is {params[name][:80]!r}, expected a cursor of a page")
    return place, int(row)


def shard_number(name: str, shards: Sequence[str]) -> int | None:
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


def would_keep(thresholds: Thresholds) -> tuple[str, dict[str, float]]:
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


def distance_to_calibrated(promise: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
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


def conditions(
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
        shard = shard_number(query.key, shards)
        if shard is not None:
            parts.append(f"p.shard = {int(shard)}")
    if query.changes is not None:
        would, would_params = would_keep(thresholds)
        params |= would_params
        joins = f"({would} AND NOT coalesce(p.keep, false))"
        leaves = f"(NOT {would} AND coalesce(p.keep, false))"
        sides = {"joins": joins, "leaves": leaves, "any": f"({joins} OR {leaves})"}
        parts.append(sides[query.changes])
    if query.review in ("todo", "mine"):
        negated = "NOT " if query.review == "todo" else ""
        drawn = ""
        if query.review == "todo" and query.sampling == "random":
            # what was picked for its score comes again: without it the sample would be biased
            drawn = " AND sampling = 'random'"
        parts.append(
            f"p.row {negated}IN (SELECT row FROM verdicts WHERE reviewer = $reviewer{drawn})"
        )
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
