"""The matcher's losses with weighted web pairs."""

from functools import partial

import torch
from small_run import picture, tiny_med

from capfilt.config import Itm, Matcher
from capfilt.models.images import open_rgb, pixels
from capfilt.models.tokens import load_tokenizer
from capfilt.training import objectives
from capfilt.training.data import Batch
from capfilt.training.matcher import matcher_losses
from capfilt.training.swaps import WordSwaps

ROWS = 6


def losses_with(weights: dict[str, float], swap: float = 0.0) -> dict[str, float]:
    model = tiny_med().train()
    shown = [picture(row) for row in range(ROWS)]
    batch = Batch(
        keys=[f"web-00000-{row:05d}" for row in range(ROWS)],
        image_ids=torch.arange(ROWS),
        captions=[text for _, text in shown],
        human=torch.zeros(ROWS, dtype=torch.bool),
        features=None,
        pixels=pixels([open_rgb(data) for data, _ in shown], 32, "vit"),
    )
    settings = Matcher(itm=Itm(word_swap=swap), freeze_image=False)
    found = partial(
        matcher_losses,
        model=model,
        tokenizer=load_tokenizer(),
        contrast=objectives.Contrast(model, settings.itc, "cpu", 1),
        settings=settings,
        swaps=WordSwaps({}, {}),
        foreign=[],
        weights=weights,
        labelled=None,
        easy_steps=0,
        device="cpu",
    )(batch, 0, torch.Generator().manual_seed(0))
    return {name: float(value.detach()) for name, value in found.items()}


def test_equal_weights_change_nothing() -> None:
    plain = losses_with({})
    equal = losses_with({f"web-00000-{row:05d}": 1.0 for row in range(ROWS)})
    assert plain == equal
    # a picture that is not listed weighs 1, as a human one does
    assert losses_with({"web-00000-00000": 1.0}) == plain


def test_pairs_that_are_not_believed_count_less() -> None:
    plain = losses_with({})
    some = losses_with({"web-00000-00000": 0.0, "web-00000-00001": 0.5})
    assert some["itc"] != plain["itc"] and some["itm"] != plain["itm"]
    none = losses_with({f"web-00000-{row:05d}": 0.0 for row in range(1, ROWS)})
    assert all(value == value for value in none.values())  # one pair is left, and no NaN
