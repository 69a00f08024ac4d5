"""How well scores or decisions tell matching pairs from the others, where the truth is known.

Dimensions: N pairs. Labels are true for a pair whose text matches its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import InputError


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a match scores above a mismatch (ties count half).

    Args:
        labels: true for a match [N].
        scores: any scores that rise with the match [N].

    Returns:
        0 to 1; 0.5 is chance.

    Raises:
        InputError: lengths differ, a score is NaN, or one of the two classes is missing.
    """
    from sklearn.metrics import roc_auc_score

    truth, values = _labels(labels), np.asarray(scores, dtype=np.float64)
    if values.shape != truth.shape:
        raise InputError(f"{truth.size} labels and scores of shape {values.shape}; give one each")
    if np.isnan(values).any():
        raise InputError(
            f"{int(np.isnan(values).sum())} of {values.size} scores are NaN, the first in row "
            f"{int(np.isnan(values).argmax())}; leave pairs out that were not scored"
        )
    if truth.all() or not truth.any():
        raise InputError(
            f"all {truth.size} pairs are {'matches' if truth.all() else 'mismatches'}; "
            "the AUC needs both"
        )
    return float(roc_auc_score(truth, values))


def auc_by_kind(labels: ArrayLike, scores: ArrayLike, kinds: Sequence[str]) -> dict[str, float]:
    """AUC of all matches against each kind of mismatch on its own.

    Args:
        labels: true for a match [N].
        scores: any scores that rise with the match [N].
        kinds: name of the kind of each pair [N] (such as foil or near_swap); those of matches are
            not looked at.

    Returns:
        AUC by kind of mismatch, by name.

    Raises:
        InputError: as `roc_auc`.
    """
    truth, values, names = _labels(labels), np.asarray(scores), np.asarray(kinds, dtype=object)
    if names.shape != truth.shape or values.shape != truth.shape:
        raise InputError(
            f"{truth.size} labels, {values.size} scores and {names.size} kinds; give one each"
        )
    found = sorted({str(name) for name in names[~truth]})
    picks = {kind: truth | (names == kind) & ~truth for kind in found}
    return {kind: roc_auc(truth[pick], values[pick]) for kind, pick in picks.items()}


def kept_quality(labels: ArrayLike, keep: ArrayLike) -> dict[str, float | None]:
    """Judge decisions.

    Args:
        labels: true for a match [N].
        keep: true for a kept pair [N].

    Returns:
        `kept` (share of the pairs), `precision` (share of matches among the kept; None when nothing
        is kept), `recall` (share of the matches that are kept) and `noise_dropped` (share of the
        mismatches that are dropped), the last two None when there are none of them.

    Raises:
        InputError: lengths differ, or there are no pairs.
    """
    truth, kept = _labels(labels), np.asarray(keep, dtype=bool)
    if kept.shape != truth.shape:
        raise InputError(f"{truth.size} labels and decisions of shape {kept.shape}; give one each")
    return {
        "kept": float(kept.mean()),
        "precision": _share(truth[kept]),
        "recall": _share(kept[truth]),
        "noise_dropped": _share(~kept[~truth]),
    }


def _labels(labels: ArrayLike) -> NDArray[np.bool_]:
    truth = np.asarray(labels, dtype=bool)
    if truth.ndim != 1 or truth.size == 0:
        raise InputError(f"labels have shape {truth.shape}; give one for each pair, at least one")
    return truth


def _share(flags: NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if flags.size else None
