import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LITE, tiny

from capfilt.models import med
from capfilt.models.itm_start import UNSEEN, ITMStart, WordDetectors

SPECIAL = (0, 101, 102)
NO_IDS = torch.zeros(5, 3, dtype=torch.long)


def make(bank: int = 0, words: int = 0) -> ITMStart:
    torch.manual_seed(0)
    return ITMStart(16, bank=bank, words=words, vocab_size=200, special_ids=SPECIAL).eval()


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_alone_it_is_a_line_of_the_similarity() -> None:
    start = make()
    images, texts = unit(5, 16), unit(5, 16)
    with torch.no_grad():
        start.weights.copy_(torch.tensor([7.0]))
        start.bias.fill_(-2.0)
        found = start(images, texts, NO_IDS)
    torch.testing.assert_close(found, 7.0 * (images * texts).sum(-1) - 2.0)


def test_commonness_and_style_are_held_against_a_pair() -> None:
    start = make(bank=6)
    images, texts = unit(5, 16), unit(5, 16)
    with torch.no_grad():
        start.bank_images.copy_(unit(6, 16))
        start.bank_texts.copy_(unit(6, 16))
        start.style.weight.copy_(torch.randn(1, 16))
        start.weights.copy_(torch.tensor([10.0, -3.0, -2.0, 0.5]))
        start.bias.fill_(0.25)
        found = start(images, texts, NO_IDS)
        for row in range(5):
            image, text = images[row], texts[row]
            like_text = np.mean([np.exp(20 * float(text @ other)) for other in start.bank_images])
            like_image = np.mean([np.exp(20 * float(image @ other)) for other in start.bank_texts])
            style = min(0.0, float(start.style(text)))
            wanted = (
                10 * float(image @ text) - 3 * np.log(like_text) / 20 - 2 * np.log(like_image) / 20
                + 0.5 * style + 0.25
            )  # fmt: skip
            assert float(found[row]) == pytest.approx(wanted, abs=1e-4)


def test_words_that_the_picture_lacks_are_held_against_a_text() -> None:
    torch.manual_seed(0)
    words = WordDetectors(16, 3, 200, SPECIAL).eval()
    with torch.no_grad():
        words.columns[[150, 160, 170]] = torch.arange(3)
        words.prior.copy_(torch.tensor([-1.0, -2.0, 0.5]))
        words.head[-1].weight.normal_(std=0.3)
    images = unit(2, 16)
    ids = torch.tensor([[101, 150, 160, 102, 0, 0], [101, 170, 150, 199, 102, 0]])
    with torch.no_grad():
        found = words(images, ids)
        logits = words.head(images).double().numpy()
    probable, usual = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-words.prior.double().numpy()))
    less = np.minimum(0, np.log(probable / usual))
    assert float(found[0]) == pytest.approx(less[0, 0] + less[0, 1], abs=1e-5)
    assert float(found[1]) == pytest.approx(less[1, 2] + less[1, 0] + UNSEEN, abs=1e-5)
    assert (less < 0).any() and (less == 0).any()
    more = np.maximum(0, np.log(probable / usual))
    with torch.no_grad():
        bonus = words.bonus(images, torch.tensor([102, 150, 160, 170, 199]))
    expected = np.concatenate([np.zeros((2, 1)), more, np.zeros((2, 1))], axis=1)
    np.testing.assert_allclose(bonus.numpy(), expected, atol=1e-5)
    assert (more > 0).any()


def test_padding_and_first_token_do_not_matter() -> None:
    start = make(bank=4, words=5)
    with torch.no_grad():
        assert start.words is not None
        start.words.columns[[150, 151]] = torch.tensor([3, 1])
        start.words.head[-1].weight.normal_(std=0.3)
        start.weights.fill_(1.0)
        images, texts = unit(1, 16), unit(1, 16)
        short = start(images, texts, torch.tensor([[101, 150, 151, 102]]))
        long = start(images, texts, torch.tensor([[102, 151, 150, 102, 0, 0, 0]]))
    torch.testing.assert_close(short, long)


def test_a_saved_model_knows_the_same(tmp_path: Path) -> None:
    model = tiny(dataclasses.replace(LITE, itm_bank=4, itm_words=6))
    start = model.itm_start
    assert start.words is not None
    with torch.no_grad():
        start.words.columns[[103, 110]] = torch.tensor([0, 5])
        start.words.prior.normal_()
        start.bank_images.normal_()
    med.save(model, tmp_path)
    again = med.load(tmp_path).itm_start
    images, texts = unit(2, LITE.embed_dim), unit(2, LITE.embed_dim)
    ids = torch.tensor([[101, 103, 102], [101, 110, 111]])
    with torch.no_grad():
        assert torch.equal(again.evidence(images, texts, ids), start.evidence(images, texts, ids))
        assert start.evidence(images, texts, ids).shape == (2, 5)


def test_detectors_are_taught_in_the_warm_up_alone() -> None:
    """In training the rest of the model has dropout; what they say of a pair stays the same."""
    start = make(words=5).train()
    assert start.words is not None and start.words.special_ids() == list(SPECIAL)
    with torch.no_grad():
        start.words.know([150, 160], torch.tensor([0.5, 0.1, 0.0, 0.0, 0.0]))
        assert start.words.columns[[150, 160, 170, 101]].tolist() == [0, 1, 6, 5]
        images = unit(3, 16)
        ids = torch.tensor([[101, 150, 160, 102]]).expand(3, 4)
        # not taught yet: every word is as probable as in any caption
        torch.testing.assert_close(start.words(images, ids), torch.zeros(3))
        start.words.head[-1].weight.normal_()
        assert torch.equal(start.words(images, ids), start.words(images, ids))
