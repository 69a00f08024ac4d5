"""What ITC says of a pair, as a logit that ITM starts from (not in BLIP).

BLIP's ITM learns from 14 million pairs what a match is. With some thousand pairs cross-attention
learns next to nothing, but the ITC embeddings know a lot already: a logistic regression on them is
where ITM starts, and its own layers add to that.

Dimensions: N pairs, K pictures and K texts of the bank, E ITC embedding, L text tokens, W words.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNSEEN = -0.7
"""What a word that the detectors don't know counts, in units of log probability."""


class ITMStart(nn.Module):
    """A logistic regression on what the ITC embeddings of a pair tell.

    Besides the similarity of the two it may look at how common each of them is. A plain text ("a
    man outside") is similar to many pictures, so its similarity with one of them says little; what
    it has in common with a bank of other pictures is held against it, and in the same way for the
    picture. And at the text alone: advertisements and file names don't sound like captions. And at
    single words: a text may be like the picture as a whole, and one word of it wrong.

    Attributes:
        weights: the regression's, in the order of `evidence`.
        bias: the regression's.
    """

    SHARPNESS = 20.0
    """Similarities with the bank are averaged by log-mean-exp of so many times their value: the
    closest neighbours count most."""

    def __init__(
        self, embed_dim: int, *, bank: int, words: int, vocab_size: int, special_ids: Sequence[int]
    ) -> None:
        """Makes it.

        Args:
            embed_dim: E.
            bank: K; 0 for none.
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
        self.words: WordDetectors | None = None
        if words:
            self.words = WordDetectors(embed_dim, words, vocab_size, special_ids)
        self.weights = nn.Parameter(torch.zeros(1 + 3 * (bank > 0) + (words > 0)))
        nn.init.constant_(self.weights[:1], 10.0)
        self.bias = nn.Parameter(torch.tensor(0.0))

    def evidence(self, images: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
        """What the regression reads.

        Args:
            images: ITC embeddings `[N, E]`.
            texts: `[N, E]`, the texts of these pictures.
            ids: `[N, L]`, the tokens of these texts.

        Returns:
            A column each: similarity; with a bank the commonness of the text and of the picture,
            and the style of the text (0 for a caption, below for what does not sound like one);
            with word detectors what they hold against the text (0 or below).
        """
        columns = [(images * texts).sum(-1)]
        if self.has_bank:
            for ours, bank in ((texts, self.bank_images), (images, self.bank_texts)):
                similarities = self.SHARPNESS * ours @ bank.T
                common = torch.logsumexp(similarities, 1) - math.log(len(bank))
                columns.append(common / self.SHARPNESS)
            columns.append(self.style(texts)[:, 0].clamp(max=0.0))
        if self.words is not None:
            columns.append(self.words(images, ids))
        return torch.stack(columns, dim=1)

    def forward(self, images: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
        """Log-odds of a match, `[N]`; arguments as in `evidence`."""
        return self.evidence(images, texts, ids) @ self.weights + self.bias


class WordDetectors(nn.Module):
    """How probable each word is in a caption of a picture, read from its ITC embedding.

    Attributes:
        size: W.
        columns: int64 `[vocab_size]`, the detector of each token; W for special tokens, W + 1 for
            tokens that have none.
        prior: `[W]`, log-odds of the words in captions of any picture.
    """

    HIDDEN = 512

    def __init__(
        self, embed_dim: int, words: int, vocab_size: int, special_ids: Sequence[int]
    ) -> None:
        super().__init__()
        self.size = words
        self.columns = nn.Buffer(torch.full((vocab_size,), words + 1))
        self.columns[list(special_ids)] = words
        self.prior = nn.Buffer(torch.zeros(words))
        self.head = nn.Sequential(
            nn.LayerNorm(embed_dim),
            nn.Dropout(0.3),
            nn.Linear(embed_dim, self.HIDDEN),
            nn.GELU(),
            nn.Dropout(0.6),
            nn.Linear(self.HIDDEN, words),
        ).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: they are taught by the head warm-up alone, and then fixed."""
        return super().train(False)

    def special_ids(self) -> list[int]:
        """Tokens that are no words."""
        special: list[int] = torch.nonzero(self.columns == self.size)[:, 0].tolist()
        return special

    def know(self, ids: Sequence[int], share: Tensor) -> None:
        """Starts anew, with detectors of these words.

        Args:
            ids: the words, W at most.
            share: `[W]`, how often each stands in a caption of any picture, 0..1: what the
                detectors say before they are taught.
        """
        self.columns[self.columns != self.size] = self.size + 1
        self.columns[list(ids)] = torch.arange(len(ids), device=self.columns.device)
        self.prior.copy_(torch.logit(share, eps=1e-4))
        for part in self.head:
            if isinstance(part, nn.LayerNorm | nn.Linear):
                part.reset_parameters()
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.copy_(self.prior)

    def lift(self, images: Tensor) -> Tensor:
        """How much more probable each word is in a caption of a picture than in any caption.

        Args:
            images: ITC embeddings `[N, E]`.

        Returns:
            `[N, W]`, log probability less that of the prior.
        """
        return F.logsigmoid(self.head(images)) - F.logsigmoid(self.prior)

    def bonus(self, images: Tensor, vocab_ids: Tensor) -> Tensor:
        """The lift, where it is above 0, of each token; of one without a detector it is 0.

        Args:
            images: ITC embeddings `[N, E]`.
            vocab_ids: int64 `[v]`.

        Returns:
            `[N, v]`.
        """
        more = self.lift(images).clamp(min=0.0)
        return F.pad(more, (0, 2))[:, self.columns[vocab_ids]]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """What the words of a text are less probable here than in any caption, summed.

        Args:
            images: ITC embeddings `[N, E]`.
            ids: `[N, L]`, the texts' tokens.

        Returns:
            `[N]`, 0 or below: log probability less that of the prior, where it is less.
        """
        less = self.lift(images).clamp(max=0.0)
        fixed = less.new_tensor([0.0, UNSEEN]).expand(len(less), 2)
        return torch.cat([less, fixed], dim=1).gather(1, self.columns[ids]).sum(1)
