import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_run import tiny_med

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


def test_too_few_words_teach_no_swaps() -> None:
    swaps = WordSwaps.learn(tiny_med(), load_tokenizer(), ["a dog"] * 9)
    assert swaps.neighbours == {}


@given(st.integers(0, 2**31))
def test_the_draw_depends_on_the_generator_alone(seed: int) -> None:
    swaps = SWAPS
    first = swaps.swap("a red dog", np.random.default_rng(seed))
    assert first == swaps.swap("a red dog", np.random.default_rng(seed))


SWAPS = learned()
