"""What is told of a calibration: intervals that hold the truth, and every reason to doubt."""

import numpy as np
import pytest
from made_up_scores import fit, reviewed, web

from capfilt.evaluation import calibration_report as told


def test_every_reason_to_doubt_is_told():
    def said(**values):
        found = {
            "threshold": 0.5, "kept_labels": 500, "precision_interval": (0.94, 0.96),
            "held_out": {"precision": 0.95, "recall": 0.8, "labels": 500}, "recall": 0.8,
            "best_precision": 0.97, "best_recall": 0.5, **values,
        }  # fmt: skip
        scores = np.linspace(0, 1, 100)
        return told.warnings_of(found, 0.95, scores, scores)

    assert said() == []
    assert "takes 73" in said(kept_labels=40)[0]
    assert "as low as 88.0%" in said(precision_interval=(0.88, 0.99))[0]
    assert said(precision_interval=(0.93, 0.99)) == []
    assert (
        "91.0% of the 40 that are kept"
        in said(held_out={"precision": 0.91, "recall": 0.8, "labels": 40})[0]
    )
    assert "none are kept" in said(held_out={"precision": None, "recall": 0.0, "labels": 0})[0]
    assert "keeps 3.0% of the right ones; the precision that keeps 10%" in said(recall=0.03)[0]
    assert (
        "none of them are kept; the best that the labels bear out is 90.0%"
        in said(threshold=None, best_precision=0.9)[0]
    )
    assert "too few labels are of these texts (8)" in said(threshold=None, own_labels=8)[0]
    bare = {"share": 0.25, "where": "ITM from 0.500 to 1.000", "review": 120}
    told_of = "no label covers 25.0% of the pairs (ITM from 0.500 to 1.000)"
    assert said(uncovered=bare, kept_uncovered=0.0) == []
    (warning,) = said(uncovered=bare, kept_uncovered=0.125)
    assert (
        told_of in warning
        and "120 of this source at random" in warning
        and "kept, it is 12.5%" in warning
    )
    assert told_of in said(threshold=None, uncovered=bare)[1]


def test_curves_have_bands_that_hold_them():
    pool, match = web(3000, 0.5)
    rows = np.random.default_rng(0).choice(3000, 400, False)
    lines = fit(reviewed(pool, match, rows), pool, 0.8, resamples=60).report["sources"]["web"][
        "curves"
    ]
    for name in ("true_positive", "precision"):
        low, high = (np.array(each) for each in lines[f"{name}_interval"])
        line = np.array(lines[name])
        assert len(low) == len(high) == len(line) and (low <= high).all()
        inside = (low - 0.02 <= line) & (line <= high + 0.02)
        assert inside.mean() > 0.9
    assert "precision_interval" not in fit(reviewed(pool, match, rows), pool, 0.8).report["sources"]["web"]["curves"]  # fmt: skip


def test_the_interval_holds_the_truth_and_halving_it_is_told():
    pool, match = web(5000, 0.5)
    rows = np.random.default_rng(0).choice(len(match), 300, False)
    found = fit(reviewed(pool, match, rows), pool, 0.9, resamples=60)
    part = found.report["sources"]["web"]
    low, high = part["precision_interval"]
    true = match[found.keeps(pool.itm, pool.itc, "web")].mean()
    assert low - 0.02 < true < high + 0.02 and low < part["precision"] < high
    assert part["more_labels"] == 900
    assert part["auc_interval"][0] < part["auc"] < part["auc_interval"][1]
    assert found.report["noise_ratio"] == pytest.approx(1 - part["precision"])
