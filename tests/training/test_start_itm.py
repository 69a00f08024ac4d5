import numpy as np
import pytest
import torch

from capfilt.models.itm_start import Neighbours, WordDetectors
from capfilt.models.tokens import load_tokenizer, tokenize
from capfilt.training import start_itm
from capfilt.training.pooled import Pooled


@pytest.mark.parametrize("human", [(1, 3), ()])
def test_neighbours_are_pictures_that_people_described(human: tuple[int, ...]) -> None:
    """Each with a caption of its own; all pictures where people described none."""
    torch.manual_seed(0)
    owned = [[0], [1, 2], [3], [4, 5, 6], [7]]
    described = np.isin(np.arange(5), human)
    pooled = Pooled(
        list("abcde"), described, torch.zeros(5, 1), list("tuvwxyz-"), 3 * torch.randn(8, 4), owned
    )
    images, neighbours = torch.eye(6)[:5], Neighbours(12, 6, 4)
    start_itm._fill_neighbours(neighbours, images, pooled, np.random.default_rng(0))
    texts = torch.nn.functional.normalize(pooled.texts, dim=-1)
    rows = neighbours.images.argmax(1).tolist()
    found = [
        (row, int((texts @ text).argmax()))
        for row, text in zip(rows, neighbours.texts, strict=True)
    ]
    allowed = {(row, text) for row in human or range(5) for text in owned[row]}
    assert set(found) == allowed and len(allowed) == (5 if human else 8)
    torch.testing.assert_close(neighbours.texts, texts[[text for _, text in found]])


def test_detectors_of_a_handful_of_pictures_say_something_finite(monkeypatch) -> None:
    """All pictures may be in one part, and a net would have none to learn from."""
    captions = ["a red dog", "a dog in the snow"]
    pooled = Pooled(
        ["web-00000-00000"], np.array([False]), torch.randn(1, 12), captions, torch.randn(2, 8), [[0, 1]]
    )  # fmt: skip
    tokenizer = load_tokenizer()
    words = WordDetectors(12, 9, 30524, (0, 101, 102))
    monkeypatch.setattr(start_itm, "WORD_MIN_COUNT", 1)
    ids = tokenize(tokenizer, captions, 8)[0]
    unseen = start_itm._learn_words(words, tokenizer, ids, pooled, np.ones(1), 3, 0)
    assert torch.isfinite(unseen).all() and torch.isfinite(words.told).all()
    assert torch.isfinite(words.logits(torch.randn(3, 12))).all()


def test_the_blind_detector_has_not_read_the_pictures_own_text(monkeypatch) -> None:
    """Pictures that have nothing in common: a word can only be learned by heart."""
    torch.manual_seed(0)
    monkeypatch.setattr(start_itm, "WORD_MIN_COUNT", 1)
    words = ["dog", "cat", "horse", "bird", "cow", "sheep", "fish", "bear", "wolf", "duck"]
    captions = [f"a {word}" for word in words]
    pooled = Pooled(
        [f"web-00000-{row:05}" for row in range(200)],
        np.zeros(200, bool),
        torch.randn(200, 32),
        captions,
        torch.randn(len(words), 8),
        [[row % len(words)] for row in range(200)],
    )
    detectors, tokenizer = WordDetectors(32, 12, 30524, (0, 101, 102)), load_tokenizer()
    ids = tokenize(tokenizer, captions, 8)[0]
    unseen = start_itm._learn_words(detectors, tokenizer, ids, pooled, np.ones(200), 150, 0)
    fold = detectors.fold(pooled.images)
    assert fold.bincount(minlength=5).min() > 15
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detectors.fold(pooled.images), fold)
    # nearly the same picture is in another fold as often as not
    assert (detectors.fold(pooled.images * 1.1) == fold).float().mean() < 0.6
    said = detectors.by_net(pooled.images)
    blind = detectors.blind(said, pooled.images)
    torch.testing.assert_close(blind, unseen.float(), atol=1e-2, rtol=1e-2)
    own = torch.tensor([detectors.columns[ids[texts[0], 2]] for texts in pooled.owned])[:, None]
    assert said.mean(0).gather(1, own).mean() > blind.gather(1, own).mean() + 1
