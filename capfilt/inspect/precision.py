"""How right a selection is, by what reviewers found, with its interval."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from capfilt.evaluation.calibration_report import Z


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), in 0..1."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def precision_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
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


def pooled(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The precision over sources, by random labels; each weighs as many pairs as it would keep.

    The interval is put together from those of the sources (MOVER; Zou and Donner, 2008).

    Returns:
        As `precision_of` gives it for `random`, and the `sources` that have such labels: it
        is about these alone.
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
