from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY, tiny
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capfilt.errors import ConfigError
from capfilt.models.generation import Generated, _draw, generate, uniform
from capfilt.models.med import MED

PROMPT = [5, 110, 111]
MODEL = tiny(dataclasses.replace(TINY, max_positions=32), seed=6)
with torch.no_grad():
    MODEL.lm_head.bias[102] += 2.0
IMAGES = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(7))


def captions(
    images: torch.Tensor, pair_ids: list[str] | None = None, model: MED = MODEL, **more: object
) -> list[Generated]:
    kv = model.cross_keys_values(images, "decoder")
    return generate(model, kv, PROMPT, pair_ids=pair_ids, **more)  # type: ignore[arg-type]


def close(one: list[Generated], other: list[Generated]) -> None:
    assert [c.token_ids for c in one] == [c.token_ids for c in other]
    np.testing.assert_allclose([c.logprob for c in one], [c.logprob for c in other], atol=1e-4)


@pytest.mark.parametrize("method", ["nucleus", "top_k", "greedy", "beam"])
def test_batch_and_order_change_nothing(method: str) -> None:
    names = [f"web-00000-{i:05d}/synthetic0" for i in range(6)]
    whole = captions(IMAGES, names, method=method)
    single = [captions(IMAGES[i : i + 1], [names[i]], method=method)[0] for i in range(6)]
    close(whole, single)
    order = [4, 1, 5, 0, 3, 2]
    close(
        captions(IMAGES[order], [names[i] for i in order], method=method), [whole[i] for i in order]
    )
    assert len({tuple(c.token_ids) for c in whole}) > 1
    assert len({len(c.token_ids) for c in whole}) > 1  # images leave the batch at different steps


def test_draws_depend_on_seed_and_pair_id() -> None:
    same_image = IMAGES[:1].expand(4, -1, -1)
    names = ["a", "b", "c", "d"]
    first = captions(same_image, names)
    assert len({tuple(c.token_ids) for c in first}) > 1
    close(first, captions(same_image, names))
    assert captions(same_image, names, seed=1) != first


def test_several_captions_an_image() -> None:
    names = [f"{i}/synthetic{j}" for i in range(3) for j in range(2)]
    together = captions(IMAGES[:3], names, captions_per_image=2)
    for j in range(2):
        close(together[j::2], captions(IMAGES[:3], names[j::2]))


def test_logprob_is_the_models_own() -> None:
    for method in ("nucleus", "beam", "greedy"):
        for row, caption in enumerate(
            captions(IMAGES, list("abcdef"), method=method, max_length=12)
        ):
            text = caption.token_ids
            if len(PROMPT) + len(text) < 12:
                text = [*text, 102]
            ids = torch.tensor([PROMPT + text])
            with torch.no_grad():
                kv = MODEL.cross_keys_values(IMAGES[row : row + 1], "decoder")
                logs = MODEL.lm_logits(ids, None, kv).log_softmax(-1)[0]
            expected = sum(float(logs[len(PROMPT) - 1 + i, token]) for i, token in enumerate(text))
            assert caption.logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", ["nucleus", "beam"])
def test_lengths(method: str) -> None:
    for caption in captions(IMAGES, list("abcdef"), method=method, min_length=7, max_length=9):
        assert 7 <= len(PROMPT) + len(caption.token_ids) <= 9
        assert 102 not in caption.token_ids


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_vocabulary_in_use(method: str) -> None:
    some = torch.tensor([102, *range(120, 150)])
    for caption in captions(IMAGES, list("abcdef"), method=method, vocab_ids=some):
        assert set(caption.token_ids) <= set(range(120, 150))
    everything = captions(IMAGES, list("abcdef"), method=method)
    close(captions(IMAGES, list("abcdef"), method=method, vocab_ids=torch.arange(160)), everything)
    with pytest.raises(ConfigError, match="SEP"):
        captions(IMAGES, list("abcdef"), method=method, vocab_ids=torch.arange(110, 120))


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_a_bonus_brings_its_token_in_once(method: str) -> None:
    some = torch.tensor([102, *range(120, 150)])
    bonus = torch.zeros(6, len(some))
    close(
        captions(IMAGES, list("abcdef"), method=method, vocab_ids=some, bonus=bonus),
        captions(IMAGES, list("abcdef"), method=method, vocab_ids=some),
    )
    bonus[torch.arange(6), torch.arange(1, 7)] = 100.0  # another token for each picture
    options = {"method": method, "vocab_ids": some, "repetition_penalty": 1e6}
    whole = captions(IMAGES, list("abcdef"), bonus=bonus, **options)
    for row, caption in enumerate(whole):
        assert caption.token_ids.count(120 + row) == 1 and caption.logprob > -100
        close(
            captions(IMAGES[row : row + 1], ["abcdef"[row]], bonus=bonus[row : row + 1], **options),
            [caption],
        )


def test_a_bonus_goes_with_each_caption_of_its_picture() -> None:
    bonus = torch.zeros(2, 160)
    bonus[0, 130] = bonus[1, 140] = 100.0
    names = ["a/0", "a/1", "b/0", "b/1"]
    written = captions(IMAGES[:2], names, captions_per_image=2, bonus=bonus)
    assert [caption.token_ids[0] for caption in written] == [130, 130, 140, 140]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 1.0),
    st.one_of(st.none(), st.integers(1, 40)),
    st.floats(0.3, 2.0),
)
def test_draws_follow_transformers_distribution(
    seed: int, top_p: float, top_k: int | None, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 30, generator=generator) * 2
    kept = TemperatureLogitsWarper(temperature)(None, scores.double())  # type: ignore[arg-type]
    if top_k is not None:
        kept = TopKLogitsWarper(top_k)(None, kept)  # type: ignore[arg-type]
    if top_p < 1.0:
        kept = TopPLogitsWarper(top_p)(None, kept)  # type: ignore[arg-type]
    expected = kept.softmax(1)[0]
    numbers = (
        torch.arange(2000, dtype=torch.float64) + 0.5
    ) / 2000  # an even grid instead of random numbers
    drawn = _draw(scores.expand(2000, -1), numbers, top_p, top_k, temperature)
    frequency = torch.bincount(drawn, minlength=30) / 2000
    assert (frequency.double() - expected).abs().max() < 2e-3
    assert set(drawn.tolist()) <= set(torch.nonzero(expected)[:, 0].tolist())


def test_uniform() -> None:
    numbers = [uniform(0, f"key-{i}", step) for i in range(500) for step in range(4)]
    assert all(0.0 <= u < 1.0 for u in numbers) and len(set(numbers)) == 2000
    assert abs(float(np.mean(numbers)) - 0.5) < 0.03
    assert uniform(0, "a", 1) == uniform(0, "a", 1) != uniform(1, "a", 1)


@pytest.mark.parametrize(
    "bad", [{"top_p": 0.0}, {"temperature": 0.0}, {"max_length": 3}, {"method": "beam", "captions_per_image": 2},
            {"method": "top_k", "top_k": None}]
)  # fmt: skip
def test_contradictions_are_refused(bad: dict[str, object]) -> None:
    names = list("abcdef") * int(str(bad.get("captions_per_image", 1)))
    with pytest.raises(ConfigError):
        captions(IMAGES, names, **bad)


def test_misuse() -> None:
    with pytest.raises(ValueError, match="pair_ids"):
        captions(IMAGES)
    MODEL.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        captions(IMAGES, list("abcdef"))
    MODEL.eval()
