import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LITE, tiny

from capfilt.models import med_files
from capfilt.models.itm_start import (
    ABSENT,
    FOLDS,
    SURE,
    UNSEEN,
    ITMStart,
    Neighbours,
    WordDetectors,
    WrongWord,
)

SPECIAL = (0, 101, 102)
NO_IDS = torch.zeros(5, 3, dtype=torch.long)
POOLED = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
POOLED_TEXTS = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))


def make(bank: int = 0, words: int = 0) -> ITMStart:
    torch.manual_seed(0)
    return ITMStart(
        16,
        pooled_width=10,
        text_width=12,
        bank=bank,
        words=words,
        vocab_size=200,
        special_ids=SPECIAL,
    ).eval()


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_alone_it_is_a_line_of_the_similarity() -> None:
    start = make()
    images, texts = unit(5, 16), unit(5, 16)
    with torch.no_grad():
        start.weights.copy_(torch.tensor([7.0]))
        start.bias.fill_(-2.0)
        found = start(images, texts, NO_IDS, POOLED, POOLED_TEXTS)
    torch.testing.assert_close(found, 7.0 * (images * texts).sum(-1) - 2.0)


def test_commonness_and_style_are_held_against_a_pair() -> None:
    start = make(bank=6)
    images, texts = unit(5, 16), unit(5, 16)
    with torch.no_grad():
        start.bank_images.copy_(unit(6, 16))
        start.bank_texts.copy_(unit(6, 16))
        start.style.weight.copy_(torch.randn(1, 16))
        start.weights.copy_(torch.tensor([10.0, -3.0, -2.0, 0.5, 0.0]))
        start.bias.fill_(0.25)
        found = start(images, texts, NO_IDS, POOLED, POOLED_TEXTS)
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


def test_captions_of_similar_pictures_speak_for_a_text() -> None:
    neighbours = Neighbours(6, 16, 12)
    images, texts = unit(3, 16), torch.randn(3, 12)
    with torch.no_grad():
        neighbours.images.copy_(unit(6, 16))
        neighbours.texts.copy_(unit(6, 12))
        neighbours.images[4] = images[2]  # the third picture itself
        found = neighbours(images, texts)
        for row in range(3):
            loud = np.exp([20 * float(images[row] @ other) for other in neighbours.images])
            if row == 2:
                loud[4] = 0
            text = texts[row] / texts[row].norm()
            near = np.exp([15 * float(text @ other) - 15 for other in neighbours.texts])
            wanted = np.log((loud * near).sum() / loud.sum()) / 15
            assert float(found[row]) == pytest.approx(wanted, abs=1e-5)
        # the caption of the most similar picture is nearer than any other text
        neighbours.images.copy_(torch.eye(16)[:6])
        picture = torch.nn.functional.normalize(torch.eye(16)[:1] + 0.2, dim=-1)
        own = neighbours(picture, 3 * neighbours.texts[:1])
        assert -0.05 < own.item() <= 0
        assert own > neighbours(picture.expand(5, 16), neighbours.texts[1:]).max()
        # a bank of that one picture still says something
        neighbours.images.copy_(images[:1])
        assert neighbours(images[:1], texts[:1]).isfinite().all()


def detectors(words: int = 3) -> WordDetectors:
    """Of the tokens 150, 160, 170 and so on, with something to say."""
    torch.manual_seed(0)
    found = WordDetectors(10, words, 200, SPECIAL)
    with torch.no_grad():
        found.columns[torch.arange(150, 150 + 10 * words, 10)] = torch.arange(words)
        found.prior.copy_(torch.tensor([-1.0, -2.0, 0.5, -0.5, 0.1])[:words])
        found.whole[:2] = True
        for net in found.nets:
            net[-1].weight.normal_(std=0.5)
    return found


def test_words_that_the_picture_lacks_are_held_against_a_text() -> None:
    words = detectors()
    pooled = POOLED[:2]
    ids = torch.tensor([[101, 150, 160, 102, 0, 0], [101, 170, 150, 199, 102, 0]])
    with torch.no_grad():
        found = words(words.logits(pooled), ids)
        each = [net(pooled).double().numpy() for net in words.nets]
    assert len(each) == FOLDS and not np.allclose(each[0], each[1])
    logits = np.mean(each, axis=0)
    probable, usual = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-words.prior.double().numpy()))
    less = np.minimum(0, np.log(probable / usual))
    assert float(found[0]) == pytest.approx(less[0, 0] + less[0, 1], abs=1e-5)
    assert float(found[1]) == pytest.approx(less[1, 2] + less[1, 0] + UNSEEN, abs=1e-5)
    assert (less < 0).any() and (less == 0).any()
    more = np.maximum(0, np.log(probable / usual))
    assert (more[:, 2] > 0).any()
    more[:, 2] = 0  # a piece of a word
    with torch.no_grad():
        bonus = words.bonus(pooled, torch.tensor([102, 150, 160, 170, 199]))
    expected = np.concatenate([np.zeros((2, 1)), more, np.zeros((2, 1))], axis=1)
    np.testing.assert_allclose(bonus.numpy(), expected, atol=1e-5)
    assert (more > 0).any()


def test_padding_and_first_token_do_not_matter() -> None:
    start = make(bank=4, words=5)
    with torch.no_grad():
        assert start.words is not None
        start.words.columns[[150, 151]] = torch.tensor([3, 1])
        for net in start.words.nets:
            net[-1].weight.normal_(std=0.3)
        start.wrong_word.related[1, 0] = 4
        start.weights.fill_(1.0)
        embeds, pooled = (unit(1, 16), unit(1, 16)), (POOLED[:1], POOLED_TEXTS[:1])
        short = start(*embeds, torch.tensor([[101, 150, 151, 102]]), *pooled)
        long = start(*embeds, torch.tensor([[102, 151, 150, 102, 0, 0, 0]]), *pooled)
    torch.testing.assert_close(short, long)


def test_a_saved_model_knows_the_same(tmp_path: Path) -> None:
    model = tiny(dataclasses.replace(LITE, itm_bank=4, itm_words=6))
    start = model.itm_start
    assert start.words is not None
    with torch.no_grad():
        start.words.columns[[103, 110]] = torch.tensor([0, 5])
        start.words.prior.normal_()
        start.wrong_word.related.random_(7)
        start.bank_images.normal_()
        start.neighbours.images.normal_()
        start.neighbours.texts.normal_()
    med_files.save(model, tmp_path)
    again = med_files.load(tmp_path).itm_start
    images, texts = unit(2, LITE.embed_dim), unit(2, LITE.embed_dim)
    ids = torch.tensor([[101, 103, 102], [101, 110, 111]])
    pooled = torch.randn(2, LITE.pooled_width), torch.randn(2, LITE.text_width)
    with torch.no_grad():
        found = start.evidence(images, texts, ids, *pooled)
        assert torch.equal(again.evidence(images, texts, ids, *pooled), found)
    assert found.shape == (2, 7)


def test_detectors_are_taught_in_the_warm_up_alone() -> None:
    """In training the rest of the model has dropout; what they say of a pair stays the same."""
    start = make(words=5).train()
    assert start.words is not None and start.words.special_ids() == list(SPECIAL)
    with torch.no_grad():
        start.words.know([150, 160], torch.tensor([0.5, 0.1, 0.0, 0.0, 0.0]), [True, False])
        assert start.words.columns[[150, 160, 170, 101]].tolist() == [0, 1, 6, 5]
        assert start.words.whole.tolist() == [True, False, False, False, False]
        pooled = POOLED[:3]
        ids = torch.tensor([[101, 150, 160, 102]]).expand(3, 4)
        # not taught yet: every word is as probable as in any caption
        torch.testing.assert_close(start.words(start.words.logits(pooled), ids), torch.zeros(3))
        for net in start.words.nets:
            net[-1].weight.normal_()
        assert torch.equal(start.words.logits(pooled), start.words.logits(pooled))
    assert not start.wrong_word.training


def test_a_word_is_weighed_against_those_that_may_stand_in_its_place() -> None:
    """What the net reads, worked out by hand for each token."""
    words, wrong = detectors(5), WrongWord(5)
    wrong.relate({0: [1, 6, 2, 4], 3: [0, 5], 6: [1], 2: [5]})  # 5 and above have no detector
    ids = torch.tensor([[101, 150, 160, 199, 102, 0], [101, 180, 150, 170, 102, 0]])
    with torch.no_grad():
        logits = words.logits(POOLED[:2])
        found = wrong._columns(logits, words.columns[ids], words)
    likely = -np.logaddexp(0, -logits.double().numpy())
    lift = likely + np.logaddexp(0, -words.prior.double().numpy())
    related = {0: [1, 2, 4], 3: [0]}
    for row, text in enumerate([[None, 0, 1, None, None, None], [None, 3, 0, 2, None, None]]):
        for place, column in enumerate(text):
            wanted = np.zeros(8)
            # a word that the text itself holds does not stand in another's place
            others = [other for other in related.get(column, []) if other not in text]
            if column is not None:
                own, more = likely[row, column], lift[row, column]
                wanted[[0, 1, 2, 7]] = own / 3, more / 1.5, float(words.prior[column]) / 3, 1
                if others:
                    theirs = likely[row, others]
                    wanted[3] = (own - theirs.max()) / 3
                    wanted[4] = (more - lift[row, others].max()) / 1.5
                    wanted[5] = (own - np.log(np.exp(theirs).sum())) / 3
                    wanted[6] = 1
            np.testing.assert_allclose(found[row, place].numpy(), wanted, atol=1e-3)
    assert found[0, 1, 6] == 1 and found[1, 1, 6] == 0 and found[1, 2, 6] == 1


def test_the_most_doubtful_word_speaks_for_the_text() -> None:
    words, wrong = detectors(5), WrongWord(5)
    with torch.no_grad():
        wrong.net[-1].weight.normal_(std=3.0)
        ids = torch.tensor([[101, 150, 160, 102, 0], [101, 180, 150, 170, 102]])
        logits = words.logits(POOLED[:2])
        each = wrong.word_logits(logits, ids, words)
        assert each[0, [0, 3, 4]].tolist() == [ABSENT] * 3
        assert each[1, [0, 4]].tolist() == [ABSENT] * 2
        torch.testing.assert_close(wrong(logits, ids, words), each.amax(1).clamp(min=SURE))
        # a text without words is as good as one of words beyond doubt
        none = wrong(logits[:1], torch.tensor([[101, 102]]), words)
    assert none.tolist() == [SURE]
