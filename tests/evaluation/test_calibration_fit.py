"""Calibration: probabilities that come true, thresholds that keep their word, clear refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_scores import MATCHER, fit, made_up, reviewed, web

from capfilt.errors import UsageError
from capfilt.evaluation import calibration as cal
from capfilt.evaluation import calibration_fit as cfit
from capfilt.evaluation import calibration_report as told


@pytest.mark.parametrize("share", [0.25, 0.45, 0.8])
@pytest.mark.parametrize("target", [0.9, 0.95])
def test_made_up_pairs_find_the_mix_and_keep_the_precision(share, target):
    pool, match = web(6000, share)
    found = fit(made_up(), pool, target)
    part = found.report["sources"]["web"]
    assert abs(part["match_share"] - share) < 0.06
    keep = found.keeps(pool.itm, pool.itc, "web")
    assert abs(match[keep].mean() - target) < 0.035
    assert abs(part["recall"] - keep[match].mean()) < 0.1
    assert part["precision"] >= target


def test_the_share_of_matches_matters():
    """The same examples on a worse web give a higher threshold."""
    good, bad = (fit(made_up(), web(4000, share)[0], score="itm") for share in (0.8, 0.25))
    assert good.sources["web"].threshold < bad.sources["web"].threshold


@pytest.mark.parametrize("near_threshold", [False, True])
def test_labels_keep_the_precision_however_they_were_picked(near_threshold):
    pool, match = web(8000, 0.45)
    random = np.random.default_rng(3)
    chance = np.exp(-np.abs(pool.itm - 0.5) * 3) if near_threshold else np.ones(len(match))
    precisions = []
    for _ in range(4):
        rows = random.choice(len(match), 400, False, chance / chance.sum())
        found = fit(reviewed(pool, match, rows), pool, 0.9)
        precisions.append(match[found.keeps(pool.itm, pool.itc, "web")].mean())
    assert abs(np.mean(precisions) - 0.9) < 0.03
    assert found.report["labels"] == "reviewed"


def test_an_image_is_never_on_both_sides_of_a_split():
    images = made_up().image
    folds = cfit.fold_of(images, 0)
    assert len({(image, fold) for image, fold in zip(images, folds, strict=True)}) == len(
        set(images)
    )
    assert np.bincount(folds).min() > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.floats(0, 1)), min_size=1, max_size=30), st.floats(0.01, 0.99))  # fmt: skip
def test_the_threshold_is_the_lowest_that_reaches_the_target(pairs, target):
    scores = np.array([score for score, _ in pairs])
    probability = np.array([p for _, p in pairs])
    threshold, best = cfit.pick_threshold(scores, probability, target)
    means = {t: probability[scores >= t].mean() for t in set(scores.tolist())}
    assert best == pytest.approx(max(means.values()))
    fitting = [t for t, mean in means.items() if mean >= target + 1e-9]
    if fitting:
        assert threshold is not None and threshold <= min(fitting)
    if threshold is not None:
        assert means[threshold] >= target - 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(cfit.METHODS)))
def test_more_score_is_never_less_probability(seed, method):
    random = np.random.default_rng(seed)
    scores = random.normal(size=60)
    match = random.random(60) < 0.5
    match[:2] = [True, False]
    curve = cfit.METHODS[method](scores, match, random.random(60) + 0.01)
    values = curve(np.linspace(-5, 5, 200))
    assert (np.diff(values) >= -1e-12).all() and (values >= 0).all() and (values <= 1).all()


def test_clear_errors():
    pool, match = web(2000, 0.5)
    some = np.arange(300)
    with pytest.raises(UsageError, match="too few"):
        fit(reviewed(pool, match, some[:15]), pool)
    with pytest.raises(UsageError, match="are right: a calibration needs both"):
        fit(reviewed(pool, np.ones(2000, bool), some), pool)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        fit(reviewed(pool, match, some), pool, 1.0)
    with pytest.raises(UsageError, match="none of itm"):
        fit(reviewed(pool, match, some), pool, score="sum")
    noise = np.random.default_rng(0).random(2000) < 0.3
    with pytest.raises(UsageError, match=r"no threshold reaches precision 0\.99"):
        fit(reviewed(pool, noise, some), pool, 0.99, score="itm")


def test_what_is_out_of_reach_says_how_far_it_is():
    pool, match = web(4000, 0.5)
    wrong = np.random.default_rng(5).random(4000) < 0.25  # a fourth of the best are wrong too
    rows = np.random.default_rng(6).choice(4000, 600, False)
    with pytest.raises(UsageError) as error:
        fit(reviewed(pool, match & ~wrong, rows), pool, 0.97, score="itm")
    said = str(error.value)
    assert "no threshold reaches precision 0.97" in said and "web texts 0." in said
    best = float(said.split("web texts ")[1].split(" ")[0])
    assert 0.7 < best < 0.97 and "% of the right ones" in said and "review more pairs" in said
    lower = float(said.split("--target precision=")[1].split(")")[0])
    assert lower <= best
    assert fit(reviewed(pool, match & ~wrong, rows), pool, lower - 0.05, score="itm")


def test_a_curve_that_ends_in_a_few_lucky_labels_reaches_nothing():
    """Isotonic regression says 1.0 at the top where the top ten happen to be right."""
    scores = np.linspace(0.01, 0.99, 400)
    pool = cfit.Pool(scores, scores, 400)
    match = np.random.default_rng(0).random(400) < 0.5
    match[-10:] = True
    match[-40:-10:2] = False
    examples = reviewed(pool, match, np.arange(400))
    with pytest.raises(UsageError, match=r"no threshold reaches precision 0\.95"):
        fit(examples, pool, 0.95, score="itc")


def test_few_labels_above_the_threshold_are_no_promise():
    pool, match = web(6000, 0.5)
    some = np.random.default_rng(1).choice(6000, 60, False)
    part = fit(reviewed(pool, match, some), pool, 0.9, resamples=60).report["sources"]["web"]
    assert part["kept_labels"] < told.labels_to_show(0.9) == 35 and told.labels_to_show(0.95) == 73
    assert any("few labels lie above the threshold" in each for each in part["warnings"])
    many = np.random.default_rng(1).choice(6000, 5000, False)
    found = fit(reviewed(pool, match, many), pool, 0.9, resamples=60)
    assert found.report["warnings"] == [] == found.report["sources"]["web"]["warnings"]
    checked = found.report["sources"]["web"]["held_out"]
    assert abs(checked["precision"] - 0.9) < 0.03 and checked["labels"] > 1000
    assert abs(checked["recall"] - found.report["sources"]["web"]["recall"]) < 0.05


def test_a_source_that_cannot_be_had_is_said_and_the_other_is_kept():
    pool, match = web(4000, 0.5)
    other, _ = web(4000, 0.5, seed=9)
    noise = np.random.default_rng(3).random(4000) < 0.4
    rows = np.random.default_rng(2).choice(4000, 1500, False)
    found = cfit.calibrate(
        {"web": reviewed(pool, match, rows), "synthetic": reviewed(other, noise, rows)},
        {"web": pool, "synthetic": other}, target=0.9, matcher=MATCHER, score="itm", resamples=0,
    )  # fmt: skip
    assert found.sources["synthetic"].threshold is None
    assert found.sources["web"].threshold is not None
    assert [each for each in found.report["warnings"] if "none of them are kept" in each] == [
        f"synthetic texts: {found.report['sources']['synthetic']['warnings'][0]}"
    ]
    assert not found.keeps(other.itm, other.itc, "synthetic").any()
    cited = cal.promise(found)
    assert cited["warnings"] == found.report["warnings"] and cited["target"] == 0.9
    json.dumps(cited, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans(), st.floats(0.1, 2)), min_size=1, max_size=30), st.integers(1, 8))  # fmt: skip
def test_the_best_that_can_be_reached(rows, fewest):
    scores, match, weights = (np.array(column) for column in zip(*rows, strict=True))
    precision, recall = cfit.best_reachable(scores, match, weights, fewest)
    allowed = {}
    for threshold in set(scores.tolist()):
        kept = scores >= threshold
        if kept.sum() >= min(fewest, len(rows)):
            right = weights[kept & match].sum()
            allowed[threshold] = (
                right / weights[kept].sum(),
                right / max(weights[match].sum(), 1e-12),
            )
    assert precision == pytest.approx(max(each[0] for each in allowed.values()))
    assert any(
        (precision, recall) == (pytest.approx(p), pytest.approx(r)) for p, r in allowed.values()
    )


@pytest.mark.parametrize(("spread", "centre"), [(3.0, -6.0), (4.0, -4.0)])
def test_mismatches_that_score_like_matches_are_not_promised_away(spread, centre):
    """One wrong word: such texts are at the top too, and precision hardly rises there."""
    random, count = np.random.default_rng(3), 20_000
    kinds = random.choice(["match", "alike", "random"], count, p=[0.46, 0.05, 0.49])
    scores = random.normal(
        np.select([kinds == "match", kinds == "alike"], [3.0, 2.5], centre),
        np.where(kinds == "random", spread, 1.4),
    )
    match = kinds == "match"
    curve = cfit.fit_platt(scores, match, np.full(count, 1 / count))
    promised = curve(scores)
    assert (np.diff(curve(np.linspace(-20, 12, 500))) >= 0).all()
    for threshold in (1.0, 2.0, 3.0, 4.0):
        kept = scores >= threshold
        assert promised[kept].mean() == pytest.approx(match[kept].mean(), abs=0.015)
    # one logistic curve over all scores would promise more than is there
    assert (
        cfit._logistic(scores, match, np.ones(count))(scores)[kept].mean()
        > 0.03 + match[kept].mean()
    )


PICKED = {
    "near the threshold": lambda pool: -np.abs(pool.itm - 0.5),
    "near a high one": lambda pool: -np.abs(pool.itm - 0.9),
    "near one of ITC": lambda pool: -np.abs(pool.itc - 0.2),
    "of middling sums": lambda pool: -np.abs(10 * pool.itm + 20 * pool.itc - 9),
    "of most disagreement": lambda pool: np.abs(
        np.argsort(np.argsort(pool.itm)) - np.argsort(np.argsort(pool.itc))
    ),
}


@pytest.mark.parametrize("picked", PICKED)
@pytest.mark.parametrize("score", ["auto", "itm", "itc"])
def test_scores_without_labels_are_not_promised(picked, score):
    """Whatever the curve says of them: at the top, fewer may match than near the threshold."""
    pool, match = web(8000, 0.5)
    match &= np.random.default_rng(1).random(8000) < np.where(pool.itm > 0.97, 0.5, 1.0)
    rows = np.argsort(-PICKED[picked](pool))[:400]
    with pytest.raises(UsageError) as error:
        fit(reviewed(pool, match, rows), pool, 0.8, score=score)
    said = str(error.value)
    assert "no label covers" in said and "count as wrong" in said
    assert "review about 250 of this source at random" in said
    if picked.startswith("near the"):
        assert "(ITM from 0.00" in said and "to 0.999), which" in said and "ask for" not in said


def test_labels_at_random_cover_the_pool():
    pool, match = web(8000, 0.5)
    for seed, count in enumerate((40, 60, 100, 200, 500) * 20):
        rows = np.random.default_rng(seed).choice(8000, count, False)
        covered, told_of = cfit.coverage(reviewed(pool, match, rows), pool)
        assert covered.all() and told_of["share"] == 0 == told_of["review"]
    # and so do those of a matcher that gives many pairs the very same score
    equal = cfit.Pool(np.round(pool.itm), pool.itc, 8000)
    assert cfit.coverage(reviewed(equal, match, rows), equal)[0].all()
    assert cfit.coverage(made_up(), pool)[0].all()


def test_what_is_not_covered_counts_as_wrong():
    """Labels near a threshold, with some at random: the more of these, the more is kept."""
    pool, match = web(8000, 0.5)
    near, kept = np.argsort(np.abs(pool.itm - 0.5))[:400], []
    for more in (60, 120, 400):
        rows = np.union1d(near, np.random.default_rng(0).choice(8000, more, False))
        part = fit(reviewed(pool, match, rows), pool, 0.85, resamples=40).report["sources"]["web"]
        found = pool.itm >= part["itm_threshold"] if part["itm_threshold"] else None
        kept.append(part["kept"])
        if found is not None:
            assert match[found].mean() > 0.82
        assert bool(part["kept_uncovered"]) == any("no label covers" in each for each in part["warnings"])  # fmt: skip
        assert part["precision_interval"][0] <= part["precision"] <= part["precision_interval"][1]
    assert kept == sorted(kept) and part["uncovered"]["share"] < 0.01


def test_a_promise_does_not_stand_on_a_handful_of_labels():
    """Where 0.95 is hardly in reach, some draws of labels find it among the very best few pairs."""
    random, count, promises = np.random.default_rng(0), 3000, 0
    itm = np.sort(random.random(count))
    match = random.random(count) < np.minimum(1.2 * itm, 0.92)
    pool = cfit.Pool(itm, np.full(count, 0.3), count)
    for draw in range(40, 65):
        rows = np.random.default_rng(draw).choice(count, 300, replace=False)
        try:
            found = fit(reviewed(pool, match, rows), pool, 0.95, score="itm", resamples=2)
        except UsageError:
            continue
        promises += 1
        kept = found.keeps(itm[rows], pool.itc[rows], "web")
        assert kept.sum() >= 10
    assert promises > 5
