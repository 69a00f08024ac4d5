"""From matching scores to probabilities, and to thresholds that keep a promised precision.

The precision of what a threshold keeps depends on how many of the web's texts are right to begin
with. Review labels of the run's own pairs tell that. Human pairs against made-up mismatches don't:
there the mix is estimated first, from the unlabelled scores themselves, as the shares of matches
and of each kind of mismatch that together explain them best (EM over known component densities;
Titterington, Smith and Makov, 1985), and the examples are weighted by it.

Dimensions: N examples, U unlabelled pairs of a source, K kinds of examples, C score cells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt.errors import UsageError
from capfilt.evaluation.calibration import (
    SCORES,
    Bools,
    Calibration,
    Floats,
    SourceCalibration,
    combined,
    logit,
)
from capfilt.evaluation.calibration_report import (
    bands_of,
    bare_text,
    curves,
    interval_of,
    more_labels,
    rates,
    reliability,
    resampled,
    warnings_of,
    weighted_auc,
    worth,
)

FEWEST = 20
"""Labelled matches, and labelled mismatches, that a calibration needs."""
HANDFUL = 10
"""Labels that must lie at or above a threshold, or it would stand on chance."""
COVER = 12
"""Labels that a cell of the pool holds on average where they were drawn at random. One in some
160,000 such cells then holds none, so a cell without a label tells of labels that were picked."""
LIKELY = (0.5, 0.75)
"""From where on a match is so probable, the curve is fitted anew to the examples there alone."""
FOLDS = 5
RESAMPLES = 200
CELLS = 8
"""Quantile bins of each score, for the estimate of the mix."""
POOL = 20_000
"""Unlabelled pairs that a resample of the bootstrap looks at."""
PRIOR = {"match": 0.5, "random": 0.35, "near": 0.1, "swap": 0.05}
"""Where the estimate of the mix starts, and what the division of mismatches into kinds is drawn to:
scores alone hardly tell a text with one wrong word from a right one that scores badly."""
PRIOR_WEIGHT = 0.1
"""Weight of that, as a share of the unlabelled pairs."""


@dataclass(frozen=True)
class Examples:
    """Pairs of which it is known whether they match.

    Attributes:
        itm: ITM probabilities, N.
        itc: ITC similarities, N.
        match: whether they match, N.
        image: what their picture is called, N; a picture is never on both sides of a split.
        kind: `match`, and kinds of mismatches (a key of `PRIOR`), where they were made up; `label`
            where they were reviewed. N.
        own: how many of them are of the source itself, where these are too few and labels of all
            sources stand in; None where all are its own.
    """

    itm: Floats
    itc: Floats
    match: Bools
    image: NDArray[np.object_]
    kind: NDArray[np.object_]
    own: int | None = None

    def __len__(self) -> int:
        return len(self.match)

    def take(self, rows: NDArray[Any]) -> "Examples":
        """Some of them, in another order or number."""
        names = ("itm", "itc", "match", "image", "kind")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @property
    def reviewed(self) -> bool:
        """Whether people judged these very pairs."""
        return bool((self.kind == "label").all())


@dataclass(frozen=True)
class Pool:
    """The unlabelled scores of a source in the run.

    Attributes:
        itm: ITM probabilities, U.
        itc: ITC similarities, U.
        total: pairs of which these are a sample.
    """

    itm: Floats
    itc: Floats
    total: int

    def take(self, rows: NDArray[np.int64]) -> "Pool":
        """Some of them, in another order or number."""
        return Pool(self.itm[rows], self.itc[rows], self.total)


def check_examples(examples: Examples, what: str) -> None:
    """Sees that there is enough to learn from.

    Raises:
        UsageError: too few, or all of one class.
    """
    right, wrong = int(examples.match.sum()), int((~examples.match).sum())
    if (right and not wrong) or (wrong and not right):
        raise UsageError(
            f"all {right + wrong} {what} are {'right' if right else 'wrong'}: a calibration needs "
            "both; review pairs at random with `capfilt inspect RUN`"
        )
    if right < FEWEST or wrong < FEWEST:
        raise UsageError(
            f"{right} right and {wrong} wrong {what} are too few: a calibration needs at least "
            f"{FEWEST} of each; review more pairs with `capfilt inspect RUN`"
        )


def calibrate(
    examples: dict[str, Examples],
    pools: dict[str, Pool],
    *,
    target: float,
    matcher: str,
    score: str = "auto",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Calibration:
    """Fits probabilities and picks thresholds.

    Args:
        examples: by source, what is known; all of one kind (reviewed or made up).
        pools: by source, the scores to choose thresholds on.
        target: precision that what is kept of each source shall have, 0..1.
        matcher: digest of the weights.
        score: one of `SCORES`, or `auto`: whichever has the lowest held-out log loss.
        seed: of splits and resamples.
        resamples: of the bootstrap.

    Returns:
        The calibration with its report.

    Raises:
        UsageError: no source can reach the precision, or there are too few examples.
    """
    if not 0 < target < 1:
        raise UsageError(f"target precision {target} is not between 0 and 1; try precision=0.95")
    for source, part in examples.items():
        check_examples(
            part, f"labels of {source} texts" if part.reviewed else f"pairs for {source} texts"
        )
    chosen = _choose_score(examples, pools, score, seed)
    weights = (1.0, 1.0)
    if chosen == "fused":
        weights = _fuse(examples, pools)
    sources: dict[str, SourceCalibration] = {}
    reports: dict[str, Any] = {}
    for source, pool in pools.items():
        sources[source], reports[source] = _calibrate_source(
            examples[source], pool, chosen, weights, target, seed, resamples
        )
    if all(part.threshold is None for part in sources.values()):
        raise UsageError(_out_of_reach(target, reports))
    kept = sum(part["kept"] for part in reports.values())
    wrong = sum(part["kept"] * part["noise_ratio"] for part in reports.values())
    report = {
        "target": target,
        "labels": "reviewed" if all(part.reviewed for part in examples.values()) else "made up",
        "noise_ratio": wrong / kept if kept else None,
        "warnings": [
            f"{source} texts: {each}"
            for source, part in reports.items()
            for each in part["warnings"]
        ],
        "sources": reports,
    }
    return Calibration(matcher, chosen, weights, target, sources, report)


def _out_of_reach(target: float, reports: dict[str, Any]) -> str:
    """The message where no source reaches the precision."""
    lent = [
        f"; {name} texts have too few labels of their own ({part['own_labels']})"
        for name, part in reports.items()
        if part["own_labels"] is not None
    ]
    reports = {name: part for name, part in reports.items() if part["own_labels"] is None}
    best = max(part["best_precision"] for part in reports.values())
    reached = ", ".join(
        f"{name} texts {part['best_precision']:.3f} (which keeps {part['best_recall']:.1%} of the "
        "right ones)"
        for name, part in reports.items()
    )
    lower = math.floor(100 * best) / 100
    said = (
        f"no threshold reaches precision {target}: by the labels, the best that one reaches is, "
        f"for {reached}{''.join(lent)}"
    )
    bare = [
        f"; {name} texts: {bare_text(part['uncovered'])}"
        for name, part in reports.items()
        if part["uncovered"]["share"]
    ]
    if bare:
        return said + "".join(bare)
    ask = f"ask for less (--target precision={lower:.2f})" if lower > 0 else "ask for less"
    return f"{said}; {ask}, review more pairs with high scores, or train a better matcher"


def example_weights(examples: Examples, pool: Pool) -> tuple[Floats, dict[str, float]]:
    """Weights that make the examples stand for the pool, and the shares that they come from.

    Made-up examples get their kind's share of the mix. Reviewed ones get the pool's share of their
    cell of scores, so that a review near a threshold does not count for more than it is.

    Returns:
        Weights of sum 1, [N], and for made-up examples the share of each kind.
    """
    if examples.reviewed:
        edges = [_edges(pool.itm), _edges(pool.itc)]
        cells = (len(edges[0]) + 1) * (len(edges[1]) + 1)
        where = _cell(examples.itm, examples.itc, edges)
        have = np.bincount(where, minlength=cells)
        want = np.bincount(_cell(pool.itm, pool.itc, edges), minlength=cells)
        weights = want[where] / have[where]
        return weights / weights.sum(), {}
    shares = mix(examples, pool)
    weights = np.zeros(len(examples))
    for kind, share in shares.items():
        rows = examples.kind == kind
        weights[rows] = share / rows.sum()
    return weights / weights.sum(), shares


def coverage(examples: Examples, pool: Pool) -> tuple[Bools, dict[str, Any]]:
    """Which pairs of the pool the labels tell of: beyond these a curve only guesses.

    The pool is cut into cells of equal size: along ITM, along ITC, and along both. Each would hold
    `COVER` labels on average if these were drawn at random; pairs in a cell that holds none are not
    covered. Labels that were picked, near a threshold say, cover what lies around them. Made-up
    examples, of which the mix is estimated, cover all.

    Returns:
        Whether each pair is covered, [U]; and of those that are not their `share` of the pool,
        `where` most of them are, in words, and how many pairs to `review` at random to cover all
        but some hundredth.
    """
    found = np.ones(len(pool.itm), dtype=bool)
    if not examples.reviewed:
        return found, {"share": 0.0, "where": "", "review": 0}
    count = max(len(examples) // COVER, 2)
    side = math.isqrt(count)
    most, where = 0.0, "of some combinations of ITM and ITC"
    for rows, columns in ((count, 1), (1, count), (side, side)):
        labelled = _equal_cells(examples.itm, examples.itc, pool, rows, columns)
        here = _equal_cells(pool.itm, pool.itc, pool, rows, columns)
        bare = ~np.isin(here, labelled)
        found &= ~bare
        if bare.mean() > most and 1 in (rows, columns):
            name, values = ("ITM", pool.itm) if columns == 1 else ("ITC", pool.itc)
            most, where = float(bare.mean()), f"{name} {_ranges(values, here, bare)}"
    empty = math.log(100)  # a cell of c labels on average holds none with probability exp(-c)
    share = float(1 - found.mean())
    return found, {
        "share": share,
        "where": where,
        "review": math.ceil(len(examples) * empty / (COVER - empty) / 10) * 10 if share else 0,
    }


def _equal_cells(
    itm: Floats, itc: Floats, pool: Pool, rows: int, columns: int
) -> NDArray[np.int64]:
    """The cell of each pair; all hold as many of the pool's pairs, more where scores are equal.

    They are bands of ITM, and in each of these bands of ITC.
    """
    edges = _edges(pool.itm, rows)
    band = np.searchsorted(edges, itm, side="right")
    in_pool = np.searchsorted(edges, pool.itm, side="right")
    cells = band * columns
    for number in np.unique(in_pool):
        here = band == number
        inner = _edges(pool.itc[in_pool == number], columns)
        cells[here] += np.searchsorted(inner, itc[here], side="right")
    return np.asarray(cells, np.int64)


def _ranges(values: Floats, cells: NDArray[np.int64], bare: Bools) -> str:
    """The scores of bare cells in words; neighbouring cells are one range."""
    numbers = np.unique(cells[bare])
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    ends = [values[np.isin(cells, run)] for run in runs]
    return " and ".join(f"from {each.min():.3f} to {each.max():.3f}" for each in ends)


def mix(examples: Examples, pool: Pool) -> dict[str, float]:
    """Share of each kind of example among the pool's pairs, as EM finds it from the scores.

    Args:
        examples: N, of K kinds, `match` among them.
        pool: U pairs.

    Returns:
        Shares by kind, of sum 1.
    """
    edges = [_edges(pool.itm), _edges(pool.itc)]
    cells = (len(edges[0]) + 1) * (len(edges[1]) + 1)
    kinds = sorted(set(examples.kind.tolist()))
    counts = np.bincount(_cell(pool.itm, pool.itc, edges), minlength=cells).astype(np.float64)
    density = np.empty((len(kinds), cells))
    for row, kind in enumerate(kinds):
        part = examples.kind == kind
        found = np.bincount(_cell(examples.itm[part], examples.itc[part], edges), minlength=cells)
        density[row] = (found + 0.25) / (found.sum() + 0.25 * cells)
    usual = np.array([PRIOR.get(kind, 0.05) for kind in kinds])
    wrong = np.array([kind != "match" for kind in kinds])
    pull = PRIOR_WEIGHT * counts.sum() * np.where(wrong, usual, 0.0) / usual[wrong].sum()
    shares = usual / usual.sum()
    for _ in range(1000):
        joint = shares[:, None] * density
        expected = (joint / joint.sum(0) * counts).sum(1)
        # the prior is on how mismatches divide into kinds, not on how many there are
        total = expected[wrong].sum()
        expected[wrong] = (expected + pull)[wrong] * total / (total + pull.sum())
        before, shares = shares, expected / expected.sum()
        if np.abs(shares - before).max() < 1e-7:
            break
    return dict(zip(kinds, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Curve:
    """A fitted map from scores to probabilities, as points of a line."""

    x: Floats
    y: Floats

    def __call__(self, scores: Floats) -> Floats:
        """Probabilities, [N]."""
        return np.interp(scores, self.x, self.y)


def fit_platt(scores: Floats, match: Bools, weights: Floats) -> Curve:
    """A logistic curve (Platt, 1999), and where a match is likely one of the examples there alone.

    What a threshold keeps is decided among the likely ones. A single curve follows the many
    mismatches that score low, and promises too much at the top: a text with one wrong word scores
    like a right one, so precision rises slowly there.

    Returns:
        The curve, as at most 1,200 points.
    """
    curve = _logistic(scores, match, weights)
    for level in LIKELY:
        likely = curve(scores) >= level
        right, wrong = int(match[likely].sum()), int((~match[likely]).sum())
        if right + wrong < 2 * FEWEST or not right or not wrong:
            break
        top = _logistic(scores[likely], match[likely], weights[likely])
        start = float(scores[likely].min())
        below, above = curve.x < start, top.x >= start
        x = np.concatenate([curve.x[below], [start], top.x[above]])
        y = np.concatenate([curve.y[below], [float(top(np.array([start]))[0])], top.y[above]])
        curve = Curve(x, np.maximum.accumulate(y))
    return curve


def _logistic(scores: Floats, match: Bools, weights: Floats) -> Curve:
    from sklearn.linear_model import LogisticRegression

    middle, width = float(np.mean(scores)), float(np.std(scores)) or 1.0
    model = LogisticRegression(C=1e3, max_iter=500)
    scaled = ((scores - middle) / width)[:, None]
    model.fit(scaled, match, sample_weight=weights / weights.mean())
    x = np.linspace(scores.min() - width, scores.max() + width, 400)
    slope = max(float(model.coef_[0, 0]), 0.0)  # more of the score is never less of a match
    logits = slope * (x - middle) / width + float(model.intercept_[0])
    return Curve(x, 1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def fit_isotonic(scores: Floats, match: Bools, weights: Floats) -> Curve:
    """The best curve that never falls (Zadrozny and Elkan, 2002)."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0)
    model.fit(scores, match.astype(np.float64), sample_weight=weights)
    return Curve(
        np.asarray(model.X_thresholds_, np.float64), np.asarray(model.y_thresholds_, np.float64)
    )


METHODS: dict[str, Callable[[Floats, Bools, Floats], Curve]] = {
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}


def fold_of(images: NDArray[np.object_], seed: int, folds: int = FOLDS) -> NDArray[np.int64]:
    """The fold of each example; all of a picture go to one. [N] 0..folds-1."""
    names, which = np.unique(images.astype(str), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.asarray(order[which] % folds, np.int64)


def held_out(
    method: str, scores: Floats, match: Bools, weights: Floats, folds: NDArray[np.int64]
) -> Floats:
    """Probabilities of examples from fits that saw no example of the same picture, [N]."""
    found = np.full(len(scores), np.nan)
    for fold in np.unique(folds):
        rest = (folds != fold) & (weights > 0)
        if match[rest].all() or not match[rest].any():
            found[folds == fold] = float(np.average(match, weights=weights))
            continue
        found[folds == fold] = METHODS[method](scores[rest], match[rest], weights[rest])(
            scores[folds == fold]
        )
    return found


def log_loss(probability: Floats, match: Bools, weights: Floats) -> float:
    """Weighted mean, in nats; probabilities are kept 0.001 away from 0 and 1."""
    p = np.clip(probability, 1e-3, 1 - 1e-3)
    return float(-np.average(np.where(match, np.log(p), np.log(1 - p)), weights=weights))


def _choose_score(
    examples: dict[str, Examples], pools: dict[str, Pool], score: str, seed: int
) -> str:
    if score != "auto":
        if score not in SCORES:
            raise UsageError(f"score {score!r} is none of {', '.join((*SCORES, 'auto'))}")
        return score
    losses = {}
    for name in SCORES:
        total = 0.0
        for source, pool in pools.items():
            part = examples[source]
            weights, _ = example_weights(part, pool)
            folds = fold_of(part.image, seed)
            fuse = _fuse({source: part}, {source: pool}) if name == "fused" else (1.0, 1.0)
            scores = combined(name, fuse, part.itm, part.itc)
            found = held_out("platt", scores, part.match, weights, folds)
            total += log_loss(found, part.match, weights)
        losses[name] = total
    # a fused score has to earn its keep
    losses["fused"] += 1e-3
    return min(losses, key=lambda name: losses[name])


def _fuse(examples: dict[str, Examples], pools: dict[str, Pool]) -> tuple[float, float]:
    """Weights of ITM's logit and of ITC by logistic regression over all sources; none below 0."""
    from sklearn.linear_model import LogisticRegression

    itm, itc, match, weights = [], [], [], []
    for source, pool in pools.items():
        part = examples[source]
        itm.append(logit(part.itm))
        itc.append(part.itc)
        match.append(part.match)
        weights.append(example_weights(part, pool)[0] * len(part))
    columns = np.stack([np.concatenate(itm), np.concatenate(itc)], 1)
    spread = np.maximum(columns.std(0), 1e-9)
    model = LogisticRegression(C=1e3, max_iter=500)
    model.fit(columns / spread, np.concatenate(match), sample_weight=np.concatenate(weights))
    found = np.maximum(model.coef_[0] / spread, 0.0)
    if not found.any():
        return 1.0, 1.0
    return float(found[0]), float(found[1])


def _calibrate_source(
    examples: Examples,
    pool: Pool,
    score: str,
    fuse: tuple[float, float],
    target: float,
    seed: int,
    resamples: int,
) -> tuple[SourceCalibration, dict[str, Any]]:
    weights, shares = example_weights(examples, pool)
    scores = combined(score, fuse, examples.itm, examples.itc)
    in_pool = combined(score, fuse, pool.itm, pool.itc)
    folds = fold_of(examples.image, seed)
    outside = {name: held_out(name, scores, examples.match, weights, folds) for name in METHODS}
    losses = {name: log_loss(p, examples.match, weights) for name, p in outside.items()}
    method = min(losses, key=lambda name: losses[name])
    used = weights > 0
    curve = METHODS[method](scores[used], examples.match[used], weights[used])
    covered, uncovered = coverage(examples, pool)
    probability = curve(in_pool)
    # of what no label covers nothing is known: it counts as wrong, whatever the curve says there
    sure = np.where(covered, probability, 0.0)
    threshold, _ = pick_threshold(in_pool, sure, target)
    # as many pairs as score like the best `HANDFUL` of the labels, or better
    handful = max(1, int((in_pool >= np.sort(scores[used])[-HANDFUL:][0]).sum()))
    best = min(
        best_reachable(scores[used], examples.match[used], weights[used], FEWEST),
        best_reachable(in_pool, sure, np.ones(len(in_pool)), handful),
    )
    # the curve may say otherwise: it can end in a step of a few labels; and what the labels of
    # other sources say of the best of these is no promise
    if best[0] < target or examples.own is not None:
        threshold = None
    kept = in_pool >= threshold if threshold is not None else np.zeros(len(in_pool), dtype=bool)
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {"match_share": [], "precision": [], "recall": [], "auc": []}
    lines = curves(scores, examples.match, weights)
    bands: list[Floats] = []
    for again in resampled(examples.image, random, resamples):
        part = examples.take(again)
        if part.match.all() or not part.match.any():
            continue
        rows = random.integers(len(in_pool), size=min(POOL, len(in_pool)))
        sample = pool.take(rows)
        again_weights, _ = example_weights(part, sample)
        again_scores = scores[again]
        used = again_weights > 0
        if part.match[used].all() or not part.match[used].any():
            continue
        found = METHODS[method](again_scores[used], part.match[used], again_weights[used])
        again_pool = combined(score, fuse, sample.itm, sample.itc)
        p = found(again_pool)
        drawn["match_share"].append(float(p.mean()))
        drawn["auc"].append(weighted_auc(again_scores, part.match, again_weights))
        bands.append(rates(again_scores, part.match, again_weights, lines["threshold"]))
        if threshold is not None and (above := again_pool >= threshold).any():
            drawn["precision"].append(float(np.where(covered[rows], p, 0.0)[above].mean()))
            drawn["recall"].append(float(p[above].sum() / max(p.sum(), 1e-12)))
    share = float(probability.mean())
    precision = float(sure[kept].mean()) if kept.any() else None
    interval = interval_of(drawn["precision"])
    checked = None
    if threshold is not None:
        checked = _check_held_out(
            method, scores, examples.match, weights, folds, in_pool, covered, target
        )
    found_here = {
        "threshold": threshold,
        "precision": precision,
        "precision_interval": interval,
        "recall": float(probability[kept].sum() / max(probability.sum(), 1e-12)),
        "held_out": checked,
        "best_precision": best[0],
        "best_recall": best[1],
        "own_labels": examples.own,
        "uncovered": uncovered,
        "kept_uncovered": float((~covered[kept]).mean()) if kept.any() else 0.0,
        "kept_labels": worth(weights[scores >= threshold]) if threshold is not None else 0,
    }
    report = {
        "examples": len(examples),
        "right": int(examples.match.sum()),
        "wrong": int((~examples.match).sum()),
        "pairs": pool.total,
        "method": method,
        "log_loss": losses,
        "mix": shares,
        "match_share": share,
        "match_share_interval": interval_of(drawn["match_share"]),
        **found_here,
        "itm_threshold": _unlogit(threshold) if score == "itm" else None,
        "kept": round(float(kept.mean()) * pool.total),
        "kept_share": float(kept.mean()),
        "recall_interval": interval_of(drawn["recall"]),
        "noise_ratio": 1 - precision if precision is not None else 0.0,
        "auc": weighted_auc(scores, examples.match, weights),
        "auc_interval": interval_of(drawn["auc"]),
        "more_labels": more_labels(
            len(examples) if examples.reviewed else None, precision, interval
        ),
        "curves": lines | bands_of(bands),
        "reliability": reliability(outside[method], examples.match, weights),
        "warnings": warnings_of(found_here, target, in_pool, probability),
    }
    return SourceCalibration(threshold, share, _plain(curve.x), _plain(curve.y)), report


def pick_threshold(
    scores: Floats, probability: Floats, target: float
) -> tuple[float | None, float]:
    """The lowest score from which on the mean probability is at least `target`.

    Args:
        scores: of the pool, [U].
        probability: of a match, [U].
        target: the precision asked for.

    Returns:
        The threshold, None when none reaches it; and the highest precision that any reaches.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    mean = np.cumsum(probability[order]) / np.arange(1, len(order) + 1)
    ends = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are kept or dropped together
    reached = np.flatnonzero(ends & (mean >= target))
    best = float(mean[ends].max())
    return (float(ranked[reached[-1]]) if len(reached) else None), best


def best_reachable(
    scores: Floats, match: Bools | Floats, weights: Floats, fewest: int
) -> tuple[float, float]:
    """The highest precision of any threshold that keeps at least `fewest` rows, and its recall.

    Args:
        scores: [N].
        match: whether each matches, or the probability that it does, [N].
        weights: [N].
        fewest: rows at and above a threshold from which on it counts; all of them where there are
            fewer.

    Returns:
        Precision and recall, 0..1; of equal precisions, that of the higher recall.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    right = np.cumsum((weights * match)[order])
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    ends = ends[ends + 1 >= min(fewest, len(order))]
    precision = right[ends] / np.maximum(np.cumsum(weights[order])[ends], 1e-12)
    place = len(ends) - 1 - int(np.argmax(precision[::-1]))
    return float(precision[place]), float(right[ends[place]] / max(right[-1], 1e-12))


def _check_held_out(
    method: str,
    scores: Floats,
    match: Bools,
    weights: Floats,
    folds: NDArray[np.int64],
    in_pool: Floats,
    covered: Bools,
    target: float,
) -> dict[str, Any]:
    """What thresholds keep of labels that had no part in finding them.

    For each fold of pictures a curve is fitted and a threshold picked without its labels.

    Returns:
        `precision` (None where nothing is kept) and `recall` of the labels that are kept, weighted,
        and how many `labels` those are.
    """
    kept = np.zeros(len(scores), dtype=bool)
    for fold in np.unique(folds):
        here, rest = folds == fold, (folds != fold) & (weights > 0)
        if match[rest].all() or not match[rest].any():
            continue
        curve = METHODS[method](scores[rest], match[rest], weights[rest])
        threshold, _ = pick_threshold(in_pool, np.where(covered, curve(in_pool), 0.0), target)
        if threshold is not None:
            kept |= here & (scores >= threshold)
    kept &= weights > 0
    right = float(weights[kept & match].sum())
    return {
        "precision": right / float(weights[kept].sum()) if kept.any() else None,
        "recall": right / max(float(weights[match].sum()), 1e-12),
        "labels": int(kept.sum()),
    }


def _edges(values: Floats, bins: int = CELLS) -> Floats:
    """Inner edges of quantile bins; fewer where many values are equal."""
    return np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))


def _cell(itm: Floats, itc: Floats, edges: list[Floats]) -> NDArray[np.int64]:
    rows = np.searchsorted(edges[0], itm, side="right")
    columns = np.searchsorted(edges[1], itc, side="right")
    return np.asarray(rows * (len(edges[1]) + 1) + columns, np.int64)


def _unlogit(value: float | None) -> float | None:
    return None if value is None else float(1 / (1 + np.exp(-value)))


def _plain(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
