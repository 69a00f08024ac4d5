"""What ITC says of a pair, as a logit that ITM starts from (not in BLIP).

BLIP's ITM learns from 14 million pairs what a match is. With some thousand pairs cross-attention
learns next to nothing, but the ITC embeddings know a lot already: a logistic regression on them is
where ITM starts, and its own layers add to that.

Dimensions: N pairs, K pictures and K texts of the bank, E ITC embedding, I width of the pooled
image, D of the pooled text, L text tokens, W words, v rows of the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.text_tower import Dropout

UNSEEN = -0.7
"""What a word that the detectors don't know counts, in units of log probability."""
FOLDS = 5
"""So many nets make up the detectors; each has not seen one of so many parts of the pictures."""
FOLD_CELLS = 20.0
"""Pictures are parted by cells of a direction of the pooled image, so many a standard deviation:
similar pictures, which are not alike to the last digit, fall apart at random."""
RELATED = 20
"""A word is compared with at most so many that may stand in its place."""
SURE = -2.0
"""Log-odds below which a word counts as right, and no more."""
ABSENT = -12.0
"""What stands for the log probability of a word where there is none to compare with, and for the
log-odds that a special token was exchanged."""


class ITMStart(nn.Module):
    """A logistic regression on what the ITC embeddings of a pair tell.

    Besides the similarity of the two it may look at how common each of them is. A plain text ("a
    man outside") is similar to many pictures, so its similarity with one of them says little; what
    it has in common with a bank of other pictures is held against it, and in the same way for the
    picture. And at the text alone: advertisements and file names don't sound like captions. And at
    what people wrote of similar pictures (`Neighbours`). And at single words: a text may be like
    the picture as a whole, and one word of it wrong (`WordDetectors`, `WrongWord`).

    Attributes:
        weights: the regression's, in the order of `evidence`.
        bias: the regression's.
    """

    SHARPNESS = 20.0
    """Similarities with the bank are averaged by log-mean-exp of so many times their value: the
    closest neighbours count most."""

    def __init__(
        self,
        embed_dim: int,
        *,
        pooled_width: int,
        text_width: int,
        bank: int,
        words: int,
        vocab_size: int,
        special_ids: Sequence[int],
    ) -> None:
        """Makes it.

        Args:
            embed_dim: E.
            pooled_width: I.
            text_width: D.
            bank: K; 0 for none, and no `Neighbours`.
            words: W, for `WordDetectors`; 0 for none.
            vocab_size: of the tokenizer.
            special_ids: its tokens that are no words.
        """
        super().__init__()
        self.has_bank = bank > 0
        if self.has_bank:
            self.bank_images = nn.Buffer(torch.zeros(bank, embed_dim))
            self.bank_texts = nn.Buffer(torch.zeros(bank, embed_dim))
            self.style = nn.Linear(embed_dim, 1)
            self.neighbours = Neighbours(bank, embed_dim, text_width)
        self.words: WordDetectors | None = None
        self.wrong_word: WrongWord | None = None
        if words:
            self.words = WordDetectors(pooled_width, words, vocab_size, special_ids)
            self.wrong_word = WrongWord(words)
        self.weights = nn.Parameter(torch.zeros(1 + 4 * (bank > 0) + 2 * (words > 0)))
        nn.init.constant_(self.weights[:1], 10.0)
        self.bias = nn.Parameter(torch.tensor(0.0))

    def evidence(
        self,
        images: Tensor,
        texts: Tensor,
        ids: Tensor,
        pooled_images: Tensor,
        pooled_texts: Tensor,
    ) -> Tensor:
        """What the regression reads.

        Args:
            images: ITC embeddings `[N, E]`.
            texts: `[N, E]`, the texts of these pictures.
            ids: `[N, L]`, the tokens of these texts.
            pooled_images: `[N, I]`.
            pooled_texts: `[N, D]`.

        Returns:
            A column each: similarity; with a bank the commonness of the text and of the picture,
            the style of the text (0 for a caption, below for what does not sound like one), and how
            near it is to captions of similar pictures; with word detectors what they hold against
            the text (0 or below), and how sure it is that no word of it is wrong.
        """
        columns = [(images * texts).sum(-1)]
        if self.has_bank:
            for ours, bank in ((texts, self.bank_images), (images, self.bank_texts)):
                similarities = self.SHARPNESS * ours @ bank.T
                common = torch.logsumexp(similarities, 1) - math.log(len(bank))
                columns.append(common / self.SHARPNESS)
            columns.append(self.style(texts)[:, 0].clamp(max=0.0))
            columns.append(self.neighbours(images, pooled_texts))
        if self.words is not None:
            assert self.wrong_word is not None
            said = self.words.by_net(pooled_images)
            columns.append(self.words(said.mean(0), ids))
            blind = self.words.blind(said, pooled_images)
            columns.append(-self.wrong_word(blind, ids, self.words))
        return torch.stack(columns, dim=1)

    def forward(self, *pairs: Tensor) -> Tensor:
        """Log-odds of a match, `[N]`; arguments as in `evidence`."""
        return self.evidence(*pairs) @ self.weights + self.bias


class Neighbours(nn.Module):
    """How near a text is to what people wrote of similar pictures.

    ITC's similarity is one number for a picture and a text; here the pictures that people described
    speak for themselves, those most similar to the picture at hand loudest. A caption of another
    dog on grass says what may stand in a caption of this one. Texts are compared as the text tower
    knows them, before ITC's head. It is a kernel density estimate of the text given the picture.

    Attributes:
        images: `[K, E]`, ITC embeddings of pictures.
        texts: `[K, D]`, a caption of each, pooled and of length 1.
    """

    IMAGE_SHARPNESS = 20.0
    """Pictures weigh by the softmax of so many times their similarity."""
    TEXT_SHARPNESS = 15.0
    """Likewise the similarities with their captions are averaged, by log-mean-exp."""
    SAME = 0.9999
    """A picture more similar than this is the same one; its own caption is no neighbour's."""

    def __init__(self, count: int, embed_dim: int, text_width: int) -> None:
        super().__init__()
        self.images = nn.Buffer(torch.zeros(count, embed_dim))
        self.texts = nn.Buffer(torch.zeros(count, text_width))

    def forward(self, images: Tensor, pooled_texts: Tensor) -> Tensor:
        """At most 0, for a text that is the caption of every similar picture.

        Args:
            images: ITC embeddings `[N, E]`.
            pooled_texts: `[N, D]`, the texts of these pictures.

        Returns:
            `[N]`, in units of cosine similarity.
        """
        similar = images @ self.images.T
        # finite, for a bank that holds no other picture
        loud = F.log_softmax(
            (self.IMAGE_SHARPNESS * similar).masked_fill(similar > self.SAME, -1e4), dim=1
        )
        near = F.normalize(pooled_texts.float(), dim=-1) @ self.texts.T - 1
        return torch.logsumexp(loud + self.TEXT_SHARPNESS * near, dim=1) / self.TEXT_SHARPNESS


class WordDetectors(nn.Module):
    """How probable each word is in a caption of a picture, read from its pooled image.

    Several nets say so and their logits are averaged. None has seen all pictures that they were
    taught with, so for each of these there is one that says of it what it would of a new one. Which
    one that is can be read off the pooled image.

    Attributes:
        size: W.
        nets: `FOLDS` of them.
        divide: `[I]`, the direction along which pictures are parted into folds, in `FOLD_CELLS`.
        columns: int64 `[vocab_size]`, the detector of each token; W for special tokens, W + 1 for
            tokens that have none.
        prior: `[W]`, log-odds of the words in captions of any picture.
        whole: bool `[W]`, whether the token is a word by itself, no piece of one and no sign.
        told: `[W]`, how much the pictures tell of each word: nats by which the detectors know
            better than the prior, for each time that the word stands in a caption. Next to nothing
            for "the".
    """

    HIDDEN = 512

    def __init__(
        self, pooled_width: int, words: int, vocab_size: int, special_ids: Sequence[int]
    ) -> None:
        super().__init__()
        self.size = words
        self.columns = nn.Buffer(torch.full((vocab_size,), words + 1))
        self.columns[list(special_ids)] = words
        self.prior = nn.Buffer(torch.zeros(words))
        self.whole = nn.Buffer(torch.zeros(words, dtype=torch.bool))
        self.told = nn.Buffer(torch.zeros(words))
        self.divide = nn.Buffer(torch.zeros(pooled_width))
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(pooled_width),
                Dropout(0.3),
                nn.Linear(pooled_width, self.HIDDEN),
                nn.GELU(),
                Dropout(0.6),
                nn.Linear(self.HIDDEN, words),
            ).requires_grad_(False)
            for _ in range(FOLDS)
        )
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: they are taught by the head warm-up alone, and then fixed."""
        return super().train(False)

    def special_ids(self) -> list[int]:
        """Tokens that are no words."""
        special: list[int] = torch.nonzero(self.columns == self.size)[:, 0].tolist()
        return special

    def know(self, ids: Sequence[int], share: Tensor, whole: Sequence[bool]) -> None:
        """Starts anew, with detectors of these words.

        Args:
            ids: the words, W at most.
            share: `[W]`, how often each stands in a caption of any picture, 0..1: what the
                detectors say before they are taught.
            whole: of each of these words, whether it is one by itself.
        """
        self.columns[self.columns != self.size] = self.size + 1
        self.columns[list(ids)] = torch.arange(len(ids), device=self.columns.device)
        self.prior.copy_(torch.logit(share, eps=1e-4))
        self.whole.zero_()
        self.whole[: len(ids)] = torch.tensor(whole, device=self.whole.device)
        self.told.zero_()
        for net in self.nets:
            assert isinstance(net, nn.Sequential)
            for part in net:
                if isinstance(part, nn.LayerNorm | nn.Linear):
                    part.reset_parameters()
            last = net[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            last.bias.copy_(self.prior)

    def part(self, pooled: Tensor, generator: torch.Generator) -> None:
        """Draws the direction along which pictures are parted, from those at hand, `[N, I]`."""
        direction = torch.randn(len(self.divide), generator=generator).to(pooled)
        spread = (pooled * direction).sum(1).std(correction=0).clamp(min=1e-6)
        self.divide.copy_(direction * FOLD_CELLS / spread)

    def fold(self, pooled: Tensor) -> Tensor:
        """The net that was not taught with a picture: pooled images `[N, I]` to int64 `[N]`."""
        # no matrix product: that would be rounded under autocast, and cells are narrow
        return (pooled.float() * self.divide).sum(1).floor().long() % FOLDS

    def by_net(self, pooled: Tensor) -> Tensor:
        """What each net says, log-odds: pooled images `[N, I]` to `[FOLDS, N, W]`."""
        return torch.stack([net(pooled) for net in self.nets])

    def logits(self, pooled: Tensor) -> Tensor:
        """Log-odds of each word in a caption: pooled images `[N, I]` to `[N, W]`."""
        return self.by_net(pooled).mean(0)

    def blind(self, said: Tensor, pooled: Tensor) -> Tensor:
        """Of what the nets say, `by_net`, that of the one that has not seen the picture: `[N, W]`.

        The others have read the very text that is to be judged, and expect its words.
        """
        return said[self.fold(pooled), torch.arange(len(pooled), device=said.device)]

    def lift(self, logits: Tensor) -> Tensor:
        """How much more probable each word is in a caption of a picture than in any caption.

        Args:
            logits: `[N, W]`, of the pictures.

        Returns:
            `[N, W]`, log probability less that of the prior.
        """
        return F.logsigmoid(logits) - F.logsigmoid(self.prior)

    def bonus(self, pooled: Tensor, vocab_ids: Tensor) -> Tensor:
        """The lift, where it is above 0, of each token that is a whole word; of others it is 0.

        A piece that is foreseen ("##ing") would be put behind any word.

        Args:
            pooled: images `[N, I]`.
            vocab_ids: int64 `[v]`.

        Returns:
            `[N, v]`.
        """
        more = self.lift(self.logits(pooled)).clamp(min=0.0) * self.whole
        return F.pad(more, (0, 2))[:, self.columns[vocab_ids]]

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        """What the words of a text are less probable here than in any caption, summed.

        Args:
            logits: `[N, W]`, of the pictures.
            ids: `[N, L]`, the texts' tokens.

        Returns:
            `[N]`, 0 or below: log probability less that of the prior, where it is less.
        """
        less = self.lift(logits).clamp(max=0.0)
        fixed = less.new_tensor([0.0, UNSEEN]).expand(len(less), 2)
        return torch.cat([less, fixed], dim=1).gather(1, self.columns[ids]).sum(1)


class WrongWord(nn.Module):
    """How probable it is that one word of a text was exchanged for another: a red dog, a black dog.

    A text with one word exchanged is as similar to its picture as the right one, or nearly so. What
    gives it away is that the detectors expect a related word in its place. A small net weighs that
    up for each word; it is taught with captions of which a word was exchanged on purpose. It reads
    the detector that has not seen the picture, always: the others were taught that the web's text
    is right, wrong words included.

    Attributes:
        related: int64 `[W + 2, RELATED]`, the detectors of the words that may stand in the place of
            each word; W where there are no more.
    """

    HIDDEN = 64
    COLUMNS = 8

    def __init__(self, words: int) -> None:
        super().__init__()
        self.related = nn.Buffer(torch.full((words + 2, RELATED), words))
        self.net = nn.Sequential(
            nn.Linear(self.COLUMNS, self.HIDDEN), nn.GELU(), nn.Linear(self.HIDDEN, 1)
        ).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, as the detectors do."""
        return super().train(False)

    def relate(self, neighbours: Mapping[int, Sequence[int]]) -> None:
        """Says which words may stand in the place of each: all by the columns of their detectors.

        Columns of words without a detector (W and above) are left out.
        """
        count = len(self.related) - 2
        self.related.fill_(count)
        for own, others in neighbours.items():
            known = [other for other in others if other < count][:RELATED]
            if own < count and known:
                self.related[own, : len(known)] = torch.tensor(known, device=self.related.device)

    def word_logits(self, logits: Tensor, ids: Tensor, words: WordDetectors) -> Tensor:
        """Log-odds that each token of a text was exchanged.

        Args:
            logits: of the blind detector, `[N, W]` (`WordDetectors.blind`).
            ids: `[N, L]`, the texts' tokens.
            words: the detectors.

        Returns:
            `[N, L]`; `ABSENT` for special tokens.
        """
        found: Tensor = self.net(self._columns(logits, words.columns[ids], words))[..., 0]
        return found.masked_fill(words.columns[ids] == words.size, ABSENT)

    def _columns(self, logits: Tensor, columns: Tensor, words: WordDetectors) -> Tensor:
        """What the net reads of each token, `[N, L, COLUMNS]`, in like units."""
        count = words.size
        known = columns < count
        # two more columns: special tokens, and tokens without a detector
        likely = F.pad(F.logsigmoid(logits), (0, 2))
        lift = F.pad(words.lift(logits), (0, 2))
        others = self.related[columns]
        there = torch.zeros_like(likely, dtype=torch.bool).scatter_(1, columns, True)
        # a word that the text itself holds is no other word in the place of this one
        absent = (others == count) | _each(there, others)
        likely_others = _each(likely, others).masked_fill(absent, ABSENT)
        lift_others = _each(lift, others).masked_fill(absent, ABSENT)
        compared = ~absent.all(2)
        own, own_lift = likely.gather(1, columns), lift.gather(1, columns)
        parts = [
            own * known / 3,
            own_lift * known / 1.5,
            F.pad(words.prior, (0, 2))[columns] * known / 3,
            (own - likely_others.amax(2)) * compared / 3,
            (own_lift - lift_others.amax(2)) * compared / 1.5,
            (own - likely_others.logsumexp(2)) * compared / 3,
            compared,
            known,
        ]
        return torch.stack([part.to(logits.dtype) for part in parts], dim=2)

    def forward(self, logits: Tensor, ids: Tensor, words: WordDetectors) -> Tensor:
        """Log-odds that the most doubtful word was exchanged, `[N]`, `SURE` at least.

        A text without a doubtful word is no better for it: advertisements have none either.
        Arguments as of `word_logits`.
        """
        return self.word_logits(logits, ids, words).amax(1).clamp(min=SURE)


def _each(values: Tensor, columns: Tensor) -> Tensor:
    """Some columns of each row: `[N, W']` and int64 `[N, L, M]` to `[N, L, M]`."""
    return values.gather(1, columns.flatten(1)).view(columns.shape)
