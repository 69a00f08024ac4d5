"""From matching scores to probabilities, and to thresholds that keep a promised precision.

The precision of what a threshold keeps depends on how many of the web's texts are right to begin
with. Review labels of the run's own pairs tell that. Human pairs against made-up mismatches don't:
there the mix is estimated first, from the unlabelled scores themselves, as the shares of matches
and of each kind of mismatch that together explain them best (EM over known component densities;
Titterington, Smith and Makov, 1985), and the examples are weighted by it.

Dimensions: N examples, U unlabelled pairs of a source, K kinds of examples, C score cells.
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt import manifest
from capfilt.errors import InputError, UsageError
from capfilt.shards import RunDir

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FORMAT = "capfilt-calibration-1"
SCORES = ("itm", "itc", "fused")
FEWEST = 20
"""Labelled matches, and labelled mismatches, that a calibration needs."""
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
MORE_NOISE = 1.5
"""A promise is called unreliable when the noise may be so many times what was asked for."""
USEFUL_RECALL = 0.1
"""Of the matches, the share that a threshold should keep; below it the user is told."""
Z = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class SourceCalibration:
    """One source's threshold and curve.

    Attributes:
        threshold: scores from here on are kept; None where no threshold reaches the precision.
        match_share: estimated share of matches among the source's scored pairs.
        x: scores, ascending.
        y: probability of a match at each of them; linear between, constant beyond.
    """

    threshold: float | None
    match_share: float
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What `capfilt calibrate` writes and `filter.calibration` reads.

    Attributes:
        matcher: digest of the weights that gave the scores.
        score: `itm` (its logit), `itc`, or `fused` (a weighted sum of both).
        weights: of ITM's logit and of ITC, for `fused`.
        target: the precision that was asked for.
        sources: by source.
        report: what was measured, for people.
    """

    matcher: str
    score: str
    weights: tuple[float, float]
    target: float
    sources: dict[str, SourceCalibration]
    report: dict[str, Any] = field(default_factory=dict)

    def score_of(self, itm: Floats, itc: Floats) -> Floats:
        """The score that is calibrated, from ITM probabilities and ITC similarities, [N]."""
        return combined(self.score, self.weights, itm, itc)

    def probability(self, itm: Floats, itc: Floats, source: str) -> Floats:
        """Probability of a match of pairs of a source, [N].

        Raises:
            InputError: the calibration has nothing on that source.
        """
        curve = self._source(source)
        return np.interp(self.score_of(itm, itc), curve.x, curve.y)

    def keeps(self, itm: Floats, itc: Floats, source: str) -> Bools:
        """Whether pairs of a source reach its threshold, [N].

        Raises:
            InputError: the calibration has nothing on that source.
        """
        threshold = self._source(source).threshold
        if threshold is None:
            return np.zeros(len(itm), dtype=bool)
        return np.asarray(self.score_of(itm, itc) >= threshold)

    def _source(self, source: str) -> SourceCalibration:
        if source not in self.sources:
            raise InputError(
                f"the calibration has nothing on {source} texts ({', '.join(self.sources)} only); "
                "redo it with `capfilt calibrate CONFIG`"
            )
        return self.sources[source]

    def check_matcher(self, run: RunDir, shard: str) -> None:
        """Sees that a shard's scores are of the matcher that was calibrated.

        Raises:
            InputError: they are of another one.
        """
        path = run.manifest("scores", shard)
        record = manifest.read(run, path)
        found = (record or {}).get("weights", {}).get("matcher")
        if found != self.matcher:
            raise InputError(
                f"the calibration is of matcher {self.matcher[:12]}…, and {path} says that the "
                f"scores are of {str(found)[:12]}…; redo it with `capfilt calibrate CONFIG`"
            )


def read_calibration(path: str | Path) -> Calibration:
    """Reads a calibration file.

    Raises:
        InputError: it is missing, or no calibration.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        sources = {}
        for name, part in values.pop("sources").items():
            x, y = np.asarray(part["x"], np.float64), np.asarray(part["y"], np.float64)
            fits = x.ndim == 1 and x.shape == y.shape and len(x) > 0
            if not fits or not np.isfinite([x, y]).all() or (np.diff(x) < 0).any():
                raise ValueError(f"the curve of {name} is not two rows of ascending numbers")
            threshold = part["threshold"]
            sources[name] = SourceCalibration(
                None if threshold is None else float(threshold),
                float(part["match_share"]),
                tuple(x.tolist()),
                tuple(y.tolist()),
            )
        weights = (float(values["weights"][0]), float(values["weights"][1]))
        if values["score"] not in SCORES:
            raise ValueError(f"its score is {values['score']!r}, expected one of {SCORES}")
        return Calibration(
            str(values["matcher"]),
            values["score"],
            weights,
            float(values["target"]),
            sources,
            dict(values.get("report") or {}),
        )
    except FileNotFoundError:
        raise InputError(
            f"calibration {str(path)!r} is not there; write it with `capfilt calibrate CONFIG`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path} is no calibration ({type(error).__name__}: {error}); write it again with "
            "`capfilt calibrate CONFIG`"
        ) from None


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Writes a calibration file by rename; the same calibration gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def combined(score: str, weights: tuple[float, float], itm: Floats, itc: Floats) -> Floats:
    """The score that is calibrated, [N]: ITM's logit, ITC's cosine, or a weighted sum."""
    if score == "itm":
        return _logit(itm)
    if score == "itc":
        return np.asarray(itc, np.float64)
    return weights[0] * _logit(itm) + weights[1] * np.asarray(itc, np.float64)


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
    """

    itm: Floats
    itc: Floats
    match: Bools
    image: NDArray[np.object_]
    kind: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.match)

    def take(self, rows: NDArray[Any]) -> "Examples":
        """Some of them, in another order or number."""
        parts = (self.itm, self.itc, self.match, self.image, self.kind)
        return Examples(*(part[rows] for part in parts))

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

    def sample(self, count: int, random: np.random.Generator) -> "Pool":
        """So many of them at random, with repeats."""
        rows = random.integers(len(self.itm), size=min(count, len(self.itm)))
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
            "both; review pairs near the threshold or at random with `capfilt inspect RUN`"
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


def promise(calibration: Calibration) -> dict[str, Any]:
    """What a calibration says of the pairs that it keeps, short enough to be cited.

    Returns:
        `target`, `score`, `weights`, `matcher`, `labels`, `noise_ratio`, `warnings`, and in
        `sources`, for each, its `threshold`, the expected `precision` and `recall` with their
        intervals, the `held_out` check, and its `noise_ratio`; what a file does not say is None.
    """
    report = calibration.report
    wanted = (
        "threshold",
        "precision",
        "precision_interval",
        "recall",
        "recall_interval",
        "held_out",
        "noise_ratio",
    )
    return {
        "target": calibration.target,
        "score": calibration.score,
        "weights": list(calibration.weights),
        "matcher": calibration.matcher,
        "labels": report.get("labels"),
        "noise_ratio": report.get("noise_ratio"),
        "warnings": list(report.get("warnings") or ()),
        "sources": {
            source: {name: part.get(name) for name in wanted}
            for source, part in (report.get("sources") or {}).items()
        },
    }


def cite(path: str | Path | None) -> dict[str, Any]:
    """What a manifest quotes of a calibration file; nothing where there is none.

    Raises:
        InputError: it is missing, or no calibration.
    """
    return {} if path is None else {"calibration": promise(read_calibration(path))}


def _out_of_reach(target: float, reports: dict[str, Any]) -> str:
    """The message where no source reaches the precision."""
    best = max(part["best_precision"] for part in reports.values())
    reached = ", ".join(
        f"{name} texts {part['best_precision']:.3f} (which keeps {part['best_recall']:.1%} of the "
        "right ones)"
        for name, part in reports.items()
    )
    lower = math.floor(100 * best) / 100
    ask = f"ask for less (--target precision={lower:.2f})" if lower > 0 else "ask for less"
    return (
        f"no threshold reaches precision {target}: by the labels, the best that one reaches is, "
        f"for {reached}; {ask}, review more pairs with high scores, or train a better matcher"
    )


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
    """A logistic curve (Platt, 1999), as 400 points."""
    from sklearn.linear_model import LogisticRegression

    middle, width = float(np.mean(scores)), float(np.std(scores)) or 1.0
    model = LogisticRegression(C=1e3, max_iter=500)
    scaled = ((scores - middle) / width)[:, None]
    model.fit(scaled, match, sample_weight=weights * len(weights))
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
        itm.append(_logit(part.itm))
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
    probability = curve(in_pool)
    threshold, _ = pick_threshold(in_pool, probability, target)
    best = min(
        best_reachable(scores[used], examples.match[used], weights[used], FEWEST),
        best_reachable(in_pool, probability, np.ones(len(in_pool)), 1),
    )
    if best[0] < target:  # the curve may say otherwise: it can end in a step of a few labels
        threshold = None
    kept = in_pool >= threshold if threshold is not None else np.zeros(len(in_pool), dtype=bool)
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {"match_share": [], "precision": [], "recall": [], "auc": []}
    lines = curves(scores, examples.match, weights)
    bands: list[Floats] = []
    for again in _resampled(examples, random, resamples):
        part = examples.take(again)
        if part.match.all() or not part.match.any():
            continue
        sample = pool.sample(POOL, random)
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
            drawn["precision"].append(float(p[above].mean()))
            drawn["recall"].append(float(p[above].sum() / max(p.sum(), 1e-12)))
    share = float(probability.mean())
    precision = float(probability[kept].mean()) if kept.any() else None
    interval = _interval(drawn["precision"])
    checked = None
    if threshold is not None:
        checked = _check_held_out(method, scores, examples.match, weights, folds, in_pool, target)
    found_here = {
        "threshold": threshold,
        "precision": precision,
        "precision_interval": interval,
        "recall": float(probability[kept].sum() / max(probability.sum(), 1e-12)),
        "held_out": checked,
        "best_precision": best[0],
        "best_recall": best[1],
        "kept_labels": _worth(weights[scores >= threshold]) if threshold is not None else 0,
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
        "match_share_interval": _interval(drawn["match_share"]),
        **found_here,
        "itm_threshold": _unlogit(threshold) if score == "itm" else None,
        "kept": round(float(kept.mean()) * pool.total),
        "kept_share": float(kept.mean()),
        "recall_interval": _interval(drawn["recall"]),
        "noise_ratio": 1 - precision if precision is not None else 0.0,
        "auc": weighted_auc(scores, examples.match, weights),
        "auc_interval": _interval(drawn["auc"]),
        "more_labels": more_labels(examples, precision, interval),
        "curves": lines | _bands(bands),
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
        threshold, _ = pick_threshold(in_pool, curve(in_pool), target)
        if threshold is not None:
            kept |= here & (scores >= threshold)
    kept &= weights > 0
    right = float(weights[kept & match].sum())
    return {
        "precision": right / float(weights[kept].sum()) if kept.any() else None,
        "recall": right / max(float(weights[match].sum()), 1e-12),
        "labels": int(kept.sum()),
    }


def _worth(weights: Floats) -> int:
    """How many labels of equal weight tell as much as these (Kish, 1965)."""
    total = float(weights.sum())
    return int(total**2 / float((weights**2).sum())) if total > 0 else 0


def labels_to_show(target: float) -> int:
    """The fewest labels, all of them right, that show a precision: Wilson's bound reaches it."""
    return math.ceil(Z**2 * target / (1 - target))


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
    if found["threshold"] is None:
        return [
            f"no threshold reaches a precision of {target:.1%}, so none of them are kept; the best "
            f"that the labels bear out is {found['best_precision']:.1%}, which keeps "
            f"{found['best_recall']:.1%} of the right ones"
        ]
    said = []
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
    examples: Examples, precision: float | None, interval: tuple[float, float] | None
) -> int | None:
    """How many more labels would halve the interval of the precision.

    An interval shrinks with the root of the number, so that takes four times the labels. Where the
    examples were made up, it is the number of kept pairs to review at random that would give an
    interval half as wide on their own.
    """
    if precision is None or interval is None:
        return None
    if examples.reviewed:
        return 3 * len(examples)
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


def _bands(drawn: list[Floats]) -> dict[str, Any]:
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


def _resampled(
    examples: Examples, random: np.random.Generator, times: int
) -> "list[NDArray[np.int64]]":
    """Rows of the examples of pictures that are drawn with repeats, so many times."""
    _, which = np.unique(examples.image.astype(str), return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(which.max() + 2))
    groups = [order[a:b] for a, b in itertools.pairwise(starts)]
    return [
        np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))])
        for _ in range(times)
    ]


def _interval(values: list[float]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values."""
    if len(values) < 20:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _edges(values: Floats) -> Floats:
    """Inner edges of quantile bins; fewer where many values are equal."""
    return np.unique(np.quantile(values, np.linspace(0, 1, CELLS + 1)[1:-1]))


def _cell(itm: Floats, itc: Floats, edges: list[Floats]) -> NDArray[np.int64]:
    rows = np.searchsorted(edges[0], itm, side="right")
    columns = np.searchsorted(edges[1], itc, side="right")
    return np.asarray(rows * (len(edges[1]) + 1) + columns, np.int64)


def _logit(probability: Floats) -> Floats:
    p = np.clip(np.asarray(probability, np.float64), 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _unlogit(value: float | None) -> float | None:
    return None if value is None else float(1 / (1 + np.exp(-value)))


def _plain(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _round(values: Floats) -> list[float]:
    return [round(float(value), 5) for value in values]
