import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import TINY, tiny_med

from capfilt.models.med import MED
from capfilt.models.tokens import load_tokenizer
from capfilt.training.swaps import WordSwaps

WORDS = [
    "dog",
    "cat",
    "horse",
    "boat",
    "tree",
    "red",
    "blue",
    "green",
    "house",
    "ball",
    "chair",
    "bird",
]
CAPTIONS = [f"a {colour} {thing}" for colour in WORDS[5:8] for thing in WORDS for _ in range(4)]


def learned() -> WordSwaps:
    return WordSwaps.learn(tiny_med(), load_tokenizer(), CAPTIONS)


def test_every_swap_exchanges_one_word_for_another_known_word() -> None:
    swaps = learned()
    rng = np.random.default_rng(0)
    for caption in CAPTIONS[:40]:
        swapped = swaps.swap(caption, rng)
        assert swapped is not None
        pairs = list(zip(caption.split(), swapped.split(), strict=True))
        changed = [(old, new) for old, new in pairs if old != new]
        assert len(changed) == 1
        old, new = changed[0]
        assert new in swaps.neighbours[old] and new not in caption.split()


def test_another_form_of_the_word_is_no_swap() -> None:
    captions = [
        f"two {word}" for word in ("dog", "dogs", "horse", "horses", *WORDS) for _ in range(5)
    ]
    swaps = WordSwaps.learn(tiny_med(), load_tokenizer(), captions)
    assert "dogs" not in swaps.neighbours["dog"] and "horse" not in swaps.neighbours["horses"]


def test_a_text_of_unknown_words_cannot_be_swapped() -> None:
    assert learned().swap("zzz qqq", np.random.default_rng(0)) is None


def test_words_that_pictures_tell_of_are_exchanged_however_frequent_they_are() -> None:
    """Without detectors the most frequent words are left alone, and "red" is one of them here."""
    tokenizer = load_tokenizer()
    config = dataclasses.replace(
        TINY, image_tower="efficientnet_lite", image_pool="mean", itm_from_itc=True, itm_words=20
    )
    model = MED(config)
    function_words = ["a", "the", "of", "in", "at", "to", "by"]
    captions = 2 * CAPTIONS + [" ".join(function_words)] * 300
    assert "red" not in WordSwaps.learn(model, tokenizer, captions).neighbours
    detectors = model.itm_start.words
    table = model.encoder.embeddings.word.weight
    content, rest = (tokenizer.convert_tokens_to_ids(words) for words in (WORDS, function_words))
    with torch.no_grad():
        table[content, 0] += 3.0  # content words are near each other, and so are the others
        table[rest, 1] += 3.0
        detectors.know([*content, *rest], torch.full((20,), 0.1), [True] * 19)
        detectors.told[:12] = 0.5
        detectors.told[WORDS.index("green")] = 0.0  # hard to see, but its like are told
    swaps = WordSwaps.learn(model, tokenizer, captions)
    assert set(swaps.neighbours) == set(WORDS)
    assert {word for others in swaps.neighbours.values() for word in others} == set(WORDS)


def test_a_frequent_word_is_put_in_more_often() -> None:
    swaps = WordSwaps({"dog": ["cat", "horse"]}, {"dog": 5, "cat": 30, "horse": 10})
    rng = np.random.default_rng(0)
    found = [swaps.swap("a dog", rng) for _ in range(2000)]
    assert 0.7 < found.count("a cat") / len(found) < 0.8


def test_too_few_words_teach_no_swaps() -> None:
    swaps = WordSwaps.learn(tiny_med(), load_tokenizer(), ["a dog"] * 9)
    assert swaps.neighbours == {}


@given(st.integers(0, 2**31))
def test_the_draw_depends_on_the_generator_alone(seed: int) -> None:
    swaps = SWAPS
    first = swaps.swap("a red dog", np.random.default_rng(seed))
    assert first == swaps.swap("a red dog", np.random.default_rng(seed))


SWAPS = learned()
