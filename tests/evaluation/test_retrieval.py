"""Recall at k against a naive ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import InputError
from capfilt.evaluation.retrieval import recall_at, recall_at_embeds


def naive(sim: np.ndarray, owner: list[int], k: int) -> tuple[float, float]:
    hits = 0
    for t, i in enumerate(owner):
        before = [j for j in range(sim.shape[0]) if j != i and sim[j, t] >= sim[i, t]]
        hits += len(before) < k
    image_hits, judged = 0, 0
    for i in range(sim.shape[0]):
        own = [t for t, o in enumerate(owner) if o == i]
        if not own:
            continue
        judged += 1
        best = max(sim[i, t] for t in own)
        before = [t for t, o in enumerate(owner) if o != i and sim[i, t] >= best]
        image_hits += len(before) < k
    return hits / len(owner), image_hits / judged


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
def test_naive(images: int, texts: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sim = rng.integers(0, 4, size=(images, texts)).astype(np.float32)  # many ties
    owner = rng.integers(0, images, size=texts)
    got = recall_at(sim, owner, ks=(1, 3), chunk=chunk)
    wanted = []
    for k in (1, 3):
        text, image = naive(sim, owner.tolist(), k)
        assert got[f"text_to_image_r{k}"] == pytest.approx(text)
        assert got[f"image_to_text_r{k}"] == pytest.approx(image)
        wanted += [text, image]
    assert got["mean_recall"] == pytest.approx(np.mean(wanted))


def test_embeds_give_what_their_matrix_gives() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(9, 5)), rng.normal(size=(20, 5))
    owner = rng.integers(0, 9, size=20)
    got = recall_at_embeds(torch.from_numpy(image), torch.from_numpy(text), owner, chunk=4)
    assert got == recall_at(image @ text.T, owner)


def test_constant_and_broken_scores_are_no_hits() -> None:
    for value in (0.0, np.nan, -np.inf):
        got = recall_at(np.full((5, 5), value), np.arange(5), ks=(1,))
        assert got == {"text_to_image_r1": 0.0, "image_to_text_r1": 0.0, "mean_recall": 0.0}


def test_perfect() -> None:
    assert set(recall_at(np.eye(4), range(4)).values()) == {1.0}


def test_refuses() -> None:
    with pytest.raises(InputError, match="nothing to rank"):
        recall_at(np.zeros((0, 0)), [])
    with pytest.raises(InputError, match="text_to_image"):
        recall_at(np.zeros((2, 3)), [0, 1])
    with pytest.raises(InputError, match="text_to_image"):
        recall_at(np.zeros((2, 2)), [0, 2])
    with pytest.raises(InputError, match="shape"):
        recall_at(np.zeros(3), [0])
    with pytest.raises(InputError, match="shapes"):
        recall_at_embeds(np.zeros((2, 3)), np.zeros((2, 4)), [0, 1])
