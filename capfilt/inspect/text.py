"""Pairs of a run as plain text, for the terminal."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capfilt.errors import InputError, UsageError
from capfilt.inspect.tables import (
    REASON_NAMES,
    Strata,
    decided_shards,
    draw,
    read_pairs,
)
from capfilt.schema import SOURCES
from capfilt.shards import RunDir

_COLUMNS = ("pair_id", "source", "itm_prob", "reason", "caption")
_LONGEST_CAPTION = 160


def sample_pairs(
    run: RunDir,
    *,
    dropped: bool | None = None,
    reason: str | None = None,
    source: str | None = None,
    n: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draws pairs at random among those that fit, sorted by `pair_id`.

    Args:
        run: the run folder.
        dropped: only dropped (True) or only kept pairs (False); None is both.
        reason: only pairs of this reason.
        source: only `web`, `human` or `synthetic` pairs.
        n: how many at most.
        seed: of the draw.

    Returns:
        Rows with `pair_id`, `key`, `source`, `caption`, `itm_prob`, `itc_sim`, `keep`, `reason`.

    Raises:
        UsageError: an unknown reason or source, or one that contradicts `dropped`.
        InputError: nothing was decided yet.
    """
    for value, known, option in ((reason, REASON_NAMES, "reason"), (source, SOURCES, "source")):
        if value is not None and value not in known:
            raise UsageError(f"{option} {value!r} is unknown; there are {', '.join(known)}")
    if reason is not None and dropped is not None and (reason == "kept") == dropped:
        raise UsageError(f"reason {reason!r} holds no {'dropped' if dropped else 'kept'} pairs")
    if n < 1:
        raise UsageError(f"the number of pairs must be at least 1, not {n}")
    if not run.shards("decisions"):
        raise InputError(f"{run.path} has no decisions yet: run `capfilt filter` or `capfilt run`")
    strata = Strata(n)
    kept = REASON_NAMES.index("kept")
    for shard in decided_shards(run):
        fits = np.ones(len(shard.reason), bool)
        if dropped is not None:
            fits &= (shard.reason != kept) == dropped
        if reason is not None:
            fits &= shard.reason == REASON_NAMES.index(reason)
        if source is not None:
            fits &= shard.source == SOURCES.index(source)
        rows = np.flatnonzero(fits)
        strata.add((), shard.name, rows, draw(seed, shard.name, len(fits))[rows])
    hidden = ("others", "shard")
    pairs = [
        {name: value for name, value in row.items() if name not in hidden}
        for row in read_pairs(run, strata.take(n))
    ]
    return sorted(pairs, key=lambda row: str(row["pair_id"]))


def format_pairs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Pairs as an aligned table, one line each; safe to print whatever the captions hold."""
    if not rows:
        return "no such pairs"
    cells = [list(_COLUMNS)]
    for row in rows:
        probability = row["itm_prob"]
        cells.append(
            [
                printable(str(row["pair_id"])),
                printable(str(row["source"])),
                "-" if probability is None else f"{probability:.3f}",
                printable(str(row["reason"])),
                clipped(printable(str(row["caption"])), _LONGEST_CAPTION),
            ]
        )
    widths = [max(len(line[at]) for line in cells) for at in range(len(_COLUMNS) - 1)]
    lines = []
    for line in cells:
        padded = [
            cell.rjust(width) if name == "itm_prob" else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=False)
        ]
        lines.append("  ".join([*padded, line[-1]]).rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    r"""Text with everything that could steer a terminal or turn the reading order written out.

    Control characters (escape sequences start with one), direction overrides, line separators and
    other invisible format characters become `\x1b`, `\u202e` and so on. The two joiners stay: emoji
    and several scripts need them.
    """
    return "".join(_written_out(char) if _steers(char) else char for char in text)


def clipped(text: str, longest: int) -> str:
    """Text cut to a length, with an ellipsis where something is left out."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _steers(char: str) -> bool:
    if char in "\u200c\u200d":
        return False
    return unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def _written_out(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
