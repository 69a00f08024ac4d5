"""The matcher's losses with weighted web pairs."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from small_run import COLOURS, THINGS, TINY, config_of, picture, tiny_med, write_run

from capfilt.config import Itc, Itm, Matcher
from capfilt.models import folder as model_folder
from capfilt.models.images import open_rgb, pixels
from capfilt.models.tokens import load_tokenizer, tokenize
from capfilt.training import objectives
from capfilt.training.data import Batch
from capfilt.training.loop import slices
from capfilt.training.matcher import finetune_matcher, matcher_losses
from capfilt.training.swaps import WordSwaps

ROWS = 6


def small_batch() -> Batch:
    shown = [picture(row) for row in range(ROWS)]
    return Batch(
        keys=[f"web-00000-{row:05d}" for row in range(ROWS)],
        image_ids=torch.arange(ROWS),
        captions=[text for _, text in shown],
        human=torch.zeros(ROWS, dtype=torch.bool),
        features=None,
        pixels=pixels([open_rgb(data) for data, _ in shown], 32, "vit"),
    )


def losses_with(weights: dict[str, float], swap: float = 0.0) -> dict[str, float]:
    model, batch = tiny_med().train(), small_batch()
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


@pytest.mark.parametrize("learns", [True, False])
def test_a_tower_that_learns_has_a_slow_one_of_its_own(learns: bool) -> None:
    """The paper's momentum encoders are of both: the image's too, where it moves."""
    batch, tokenizer = small_batch(), load_tokenizer()
    ids, mask = tokenize(tokenizer, batch.captions, 16)
    itc = []
    for noise in (0.0, 1.0):
        model = tiny_med()
        model.vision.requires_grad_(learns)
        contrast = objectives.Contrast(model, Itc(momentum=0.9, alpha=0.4, queue_size=8), "cpu", 1)
        with torch.no_grad():
            for parameter in contrast.slow.vision.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        features = objectives.image_features(model, batch, "cpu")
        embedded = objectives.embed(model, features, ids, mask)
        itc.append(
            contrast.loss(
                model, embedded, features, batch.pixels, ids, mask, batch.image_ids, 1
            ).item()
        )
    assert (itc[0] != itc[1]) == learns


def test_slices_of_a_batch_move_the_momentum_encoders_once() -> None:
    model, batch = tiny_med(), small_batch()
    contrast = objectives.Contrast(model, Itc(momentum=0.9, queue_size=12), "cpu", 1)
    before = contrast.slow.temp.item()
    with torch.no_grad():
        model.temp.add_(1.0)
    for step in (0, 1):
        for part in slices(batch, 3):
            ids, mask = tokenize(load_tokenizer(), part.captions, 16)
            features = objectives.image_features(model, part, "cpu")
            embedded = objectives.embed(model, features, ids, mask)
            contrast.loss(model, embedded, features, None, ids, mask, part.image_ids, step)
    after = [before]
    for _ in range(2):
        after.append(0.9 * after[-1] + 0.1 * (before + 1.0))
    assert contrast.slow.temp.item() == pytest.approx(after[2], rel=1e-5)
    assert contrast.queue.filled == 12


def test_itm_reads_further_texts_as_it_reads_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the head's dropout, as when scoring; else a swapped text is told by the noise."""
    config = dataclasses.replace(
        TINY, projection_hidden=24, projection_dropout=0.5, itm_from_itc=True
    )
    model, batch, tokenizer = tiny_med(config).train(), small_batch(), load_tokenizer()
    seen, start_of = [], model.itm_start_of

    def watched(images, texts, *rest):
        seen.append(texts)
        return start_of(images, texts, *rest)

    monkeypatch.setattr(model, "itm_start_of", watched)
    ids, mask = tokenize(tokenizer, batch.captions, 16)
    features = objectives.image_features(model, batch, "cpu").detach()
    embedded = objectives.embed(model, features, ids, mask)
    adapted = model.adapt(features)
    objectives.itm_objective(
        model, tokenizer, batch.captions, embedded, adapted, model.cross_keys_values(adapted, "encoder"),
        batch.image_ids, hardness=1.0, max_tokens=16, generator=torch.Generator().manual_seed(0),
        further=[(0, batch.captions[1]), (2, batch.captions[3])],
    )  # fmt: skip
    model.eval()
    plain = model.embed_text(ids, mask)
    torch.testing.assert_close(seen[0][:ROWS], plain)
    torch.testing.assert_close(seen[0][-2:], plain[[1, 3]])


def test_a_training_shows_texts_with_a_word_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", {"human-00000": 40, "human-00001": 30})
    model_folder.save(tiny_med(), load_tokenizer(), tmp_path / "init", vocabulary=None)
    shown: list[tuple[str, str]] = []
    objective = objectives.itm_objective

    def watched(model, tokenizer, captions, *rest, further, **options):
        shown.extend((captions[row], text) for row, text in further)
        return objective(model, tokenizer, captions, *rest, further=further, **options)

    monkeypatch.setattr(objectives, "itm_objective", watched)
    for swap in (0.0, 1.0):
        settings = {
            "init": str(tmp_path / "init"), "epochs": 2, "batch_size": 14, "freeze_image": False,
            "itm": {"word_swap": swap},
        }  # fmt: skip
        config = config_of(tmp_path / "run", matcher=settings)
        found = finetune_matcher(run, config, tmp_path / f"matcher-{swap}", "x", "cpu", None)
        assert found["steps"] == 10
        assert bool(shown) is (swap > 0)
    assert len(shown) > 0.9 * 10 * 14
    for caption, text in shown:
        pairs = zip(caption.split(), text.split(), strict=True)
        changed = [(old, new) for old, new in pairs if old != new]
        assert len(changed) == 1, (caption, text)
    words = {new for caption, text in shown for new in set(text.split()) - set(caption.split())}
    assert len(words & {*COLOURS, *THINGS}) > 10
