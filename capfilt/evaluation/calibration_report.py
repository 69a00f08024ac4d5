"""What `capfilt calibrate` tells of a calibration: intervals, curves, reliability, doubts.

Dimensions: N examples, T thresholds, U unlabelled pairs of a source.
"""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt.evaluation.calibration import Bools, Floats

MORE_NOISE = 1.5
"""A promise is called unreliable when the noise may be so many times what was asked for."""
USEFUL_RECALL = 0.1
"""Of the matches, the share that a threshold should keep; below it the user is told."""
Z = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""


def worth(weights: Floats) -> int:
    """How many labels of equal weight tell as much as these (Kish, 1965)."""
    total = float(weights.sum())
    return int(total**2 / float((weights**2).sum())) if total > 0 else 0


def labels_to_show(target: float) -> int:
    """The fewest labels, all of them right, that show a precision: Wilson's bound reaches it."""
    return math.ceil(Z**2 * target / (1 - target))


def bare_text(uncovered: dict[str, Any]) -> str:
    """Which scores no label covers, and what to do, as part of a sentence."""
    return (
        f"no label covers {uncovered['share']:.1%} of the pairs ({uncovered['where']}), which "
        f"therefore count as wrong; review about {uncovered['review']} of this source at random"
    )


def warnings_of(
    found: dict[str, Any], target: float, in_pool: Floats, probability: Floats
) -> list[str]:
    """Why the precision of a source should not be relied on, in sentences; empty where it can be.

    Args:
        found: of the source, as in the report.
        target: the precision that was asked for.
        in_pool: scores of the unlabelled pairs, [U].
        probability: of a match of each, [U].
    """
    uncovered = found.get("uncovered") or {"share": 0.0}
    if found.get("own_labels") is not None:
        return [
            f"too few labels are of these texts ({found['own_labels']}), so no threshold is chosen "
            "and none of them are kept; what is said of them goes by the labels of all sources; "
            "review more of them at random"
        ]
    if found["threshold"] is None:
        none = (
            f"no threshold reaches a precision of {target:.1%}, so none of them are kept; the best "
            f"that the labels bear out is {found['best_precision']:.1%}, which keeps "
            f"{found['best_recall']:.1%} of the right ones"
        )
        return [none, bare_text(uncovered)] if uncovered["share"] else [none]
    said = []
    if found.get("kept_uncovered"):
        said.append(
            f"{bare_text(uncovered)} (of those that are kept, it is {found['kept_uncovered']:.1%})"
        )
    needed = labels_to_show(target)
    if found["kept_labels"] < needed:
        said.append(
            f"few labels lie above the threshold: they tell as much as {found['kept_labels']} at "
            f"random, and to show a precision of {target:.1%} takes {needed} even if all are "
            "right; review more pairs with high scores"
        )
    worst = 1 - MORE_NOISE * (1 - target)
    interval = found["precision_interval"]
    if interval is not None and interval[0] < worst:
        said.append(
            f"the precision may be as low as {interval[0]:.1%} (95 % interval to "
            f"{interval[1]:.1%}), and {target:.1%} was asked for; review more pairs"
        )
    checked = found["held_out"]
    if checked is not None and (checked["precision"] is None or checked["precision"] < worst):
        told = "none are kept"
        if checked["precision"] is not None:
            told = f"{checked['precision']:.1%} of the {checked['labels']} that are kept are right"
        said.append(f"of labels that were held out from the search for the threshold, {told}")
    if found["recall"] < USEFUL_RECALL:
        order = np.argsort(-in_pool, kind="stable")
        right = np.cumsum(probability[order])
        place = int(np.searchsorted(right, USEFUL_RECALL * right[-1]))
        place = min(place, len(right) - 1)
        said.append(
            f"the threshold keeps {found['recall']:.1%} of the right ones; the precision that "
            f"keeps {USEFUL_RECALL:.0%} of them is {right[place] / (place + 1):.1%}"
        )
    return said


def more_labels(
    labels: int | None, precision: float | None, interval: tuple[float, float] | None
) -> int | None:
    """How many more labels would halve the interval of the precision.

    An interval shrinks with the root of the number, so that takes four times the labels. Where the
    examples were made up, it is the number of kept pairs to review at random that would give an
    interval half as wide on their own.

    Args:
        labels: how many there are; None where the examples were made up.
        precision: that is expected; None where nothing is kept.
        interval: of the precision.
    """
    if precision is None or interval is None:
        return None
    if labels is not None:
        return 3 * labels
    width = max((interval[1] - interval[0]) / 2, 1e-3)
    spread = max(precision * (1 - precision), 1e-4)
    return int(np.ceil(spread * (2 * 1.96 / width) ** 2))


def weighted_auc(scores: Floats, match: Bools, weights: Floats) -> float:
    """Area under the ROC curve of weighted examples."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(match, scores, sample_weight=weights))


def curves(scores: Floats, match: Bools, weights: Floats, points: int = 60) -> dict[str, Any]:
    """ROC and precision-recall at about `points` thresholds, highest first, as rows of numbers."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    right = np.cumsum(np.where(match, weights, 0)[order])
    wrong = np.cumsum(np.where(match, 0, weights)[order])
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    ends = ends[np.unique(np.linspace(0, len(ends) - 1, points).astype(int))]
    right, wrong, totals = right[ends], wrong[ends], (right[-1], wrong[-1])
    return {
        "threshold": _round(ranked[ends]),
        "true_positive": _round(right / max(totals[0], 1e-12)),
        "false_positive": _round(wrong / max(totals[1], 1e-12)),
        "precision": _round(right / np.maximum(right + wrong, 1e-12)),
    }


def rates(scores: Floats, match: Bools, weights: Floats, thresholds: list[float]) -> Floats:
    """True positives, false positives and precision at thresholds, [3, T]; NaN where none pass."""
    order = np.argsort(scores, kind="stable")
    above = [
        np.append(np.cumsum(np.where(each, weights, 0.0)[order][::-1])[::-1], 0.0)
        for each in (match, ~match)
    ]
    # a threshold was rounded to 5 digits
    place = np.searchsorted(scores[order], np.asarray(thresholds) - 1e-5)
    right, wrong = above[0][place], above[1][place]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([right / above[0][0], wrong / above[1][0], right / (right + wrong)])


def bands_of(drawn: list[Floats]) -> dict[str, Any]:
    """The middle 95 % of resampled true positives and precisions at each threshold: low, high."""
    if len(drawn) < 20:
        return {}
    stacked = np.stack(drawn)
    found = {}
    for name, row in (("true_positive", 0), ("precision", 2)):
        # a resample of which nothing passes says nothing of the precision there
        values = np.ma.masked_invalid(stacked[:, row])
        middle = np.ma.filled(np.ma.median(values, axis=0), 0.0)
        filled = np.where(values.mask, middle, stacked[:, row])
        low, high = np.percentile(filled, [2.5, 97.5], axis=0)
        found[f"{name}_interval"] = [_round(low), _round(high)]
    return found


def reliability(
    probability: Floats, match: Bools, weights: Floats, bins: int = 10
) -> list[dict[str, float]]:
    """Held-out probabilities against how often they came true, in bins of equal width."""
    where = np.clip((probability * bins).astype(int), 0, bins - 1)
    rows = []
    for bin_ in range(bins):
        inside = (where == bin_) & (weights > 0)
        if inside.any():
            share = float(weights[inside].sum())
            rows.append(
                {
                    "predicted": float(np.average(probability[inside], weights=weights[inside])),
                    "observed": float(np.average(match[inside], weights=weights[inside])),
                    "share": share,
                    "examples": int(inside.sum()),
                }
            )
    return rows


def resampled(
    images: NDArray[np.object_], random: np.random.Generator, times: int
) -> list[NDArray[np.int64]]:
    """Rows of the examples of pictures that are drawn with repeats, so many times; images `[N]`."""
    _, which = np.unique(images.astype(str), return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(which.max() + 2))
    groups = [order[a:b] for a, b in itertools.pairwise(starts)]
    return [
        np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))])
        for _ in range(times)
    ]


def interval_of(values: list[float]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values."""
    if len(values) < 20:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _round(values: Floats) -> list[float]:
    return [round(float(value), 5) for value in values]
