"""Filter metrics against counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import InputError
from capfilt.evaluation.filtering import (
    auc_by_kind,
    kept_quality,
    roc_auc,
)

pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[bool, int]]) -> None:
    labels, scores = [r[0] for r in rows], [r[1] / 5 for r in rows]
    right = [s for y, s in zip(labels, scores, strict=True) if y]
    wrong = [s for y, s in zip(labels, scores, strict=True) if not y]
    if not right or not wrong:
        with pytest.raises(InputError, match="needs both"):
            roc_auc(labels, scores)
        return
    won = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert roc_auc(labels, scores) == pytest.approx(won / len(right) / len(wrong))


@settings(max_examples=60, deadline=None)
@given(pairs, st.sampled_from([0.0, 0.5, 2.0]))
def test_threshold(rows: list[tuple[bool, int]], threshold: float) -> None:
    labels, scores = [r[0] for r in rows], [r[1] / 5 for r in rows]
    kept = [y for y, s in zip(labels, scores, strict=True) if s >= threshold]
    got = kept_quality(labels, np.array(scores) >= threshold)
    assert got["kept"] == pytest.approx(len(kept) / len(rows))
    assert got["precision"] == (pytest.approx(sum(kept) / len(kept)) if kept else None)
    assert got["recall"] == (pytest.approx(sum(kept) / sum(labels)) if any(labels) else None)
    wrong = len(labels) - sum(labels)
    dropped = wrong - (len(kept) - sum(kept))
    assert got["noise_dropped"] == (pytest.approx(dropped / wrong) if wrong else None)


def test_by_kind() -> None:
    labels = [True, True, False, False, False]
    scores = [0.9, 0.4, 0.5, 0.1, 0.95]
    kinds = ["clean", "clean", "foil", "swap", "swap"]
    assert auc_by_kind(labels, scores, kinds) == {"foil": 0.5, "swap": 0.5}


def test_unscored_is_refused_by_the_auc() -> None:
    with pytest.raises(InputError, match="1 of 2 scores are NaN, the first in row 0"):
        roc_auc([True, False], [math.nan, 0.9])


def test_refuses() -> None:
    with pytest.raises(InputError, match="labels"):
        kept_quality([], [])
    with pytest.raises(InputError, match="2 labels"):
        kept_quality([True, False], [True])
    with pytest.raises(InputError, match="2 labels"):
        roc_auc([True, False], [0.1])
    with pytest.raises(InputError, match="kinds"):
        auc_by_kind([True, False], [0.1, 0.2], ["a"])
