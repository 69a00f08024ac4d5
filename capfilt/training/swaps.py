"""Word-swap negatives: a text with one word exchanged for a related one (a red dog, a black dog).

They teach ITM that a single wrong word is a mismatch. Related words are neighbours in the text
tower's own word embeddings, so no word list of any language is needed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from capfilt.models.med import MED

NEIGHBOURS = 20
MIN_COUNT = 4
"""A word must stand in the texts this often to be exchanged or put in."""
FUNCTION_WORDS = 30
"""The most frequent words ("a", "the", "in") are left alone."""
TOLD = 0.4
"""Nats that pictures must tell of a word, or of half of its `CLOSEST` neighbours, at least (see
`WordDetectors`), where a model knows that: then "man" and "red" are exchanged, however frequent
they are, and "from" isn't."""
CLOSEST = 6


@dataclass(frozen=True)
class WordSwaps:
    """What each word may be exchanged for.

    Attributes:
        neighbours: of each word, the nearest first.
        counts: how often each word stands in the captions.
    """

    neighbours: dict[str, list[str]]
    counts: dict[str, int]

    @classmethod
    def learn(
        cls, model: MED, tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]
    ) -> "WordSwaps":
        """Finds each word's neighbours among the words of the captions.

        Args:
            model: its word embeddings say which words are related. Its word detectors, if it has
                any, say of which words pictures tell something; without them all words are taken
                but the most frequent ones.
            tokenizer: words that it splits are left alone.
            captions: cleaned texts.
        """
        counts: Counter[str] = Counter()
        texts = 0
        for caption in captions:
            counts.update(caption.split())
            texts += 1
        vocabulary = tokenizer.get_vocab()
        told = _told(model)
        common = (
            {word for word, _ in counts.most_common(FUNCTION_WORDS)}
            if told is None and texts > 500
            else set()
        )
        words = [
            word
            for word, count in sorted(counts.items())
            if count >= MIN_COUNT and word in vocabulary and word.isalpha() and word not in common
        ]
        if len(words) < 10:
            return cls({}, {})
        table = model.encoder.embeddings.word.weight.detach().float().cpu()
        vectors = F.normalize(table[[vocabulary[word] for word in words]], dim=-1)
        similar = vectors @ vectors.T
        if told is not None:
            tells = told[[vocabulary[word] for word in words]]
            closest = similar.topk(min(CLOSEST, len(words))).indices
            kept = (torch.maximum(tells, tells[closest].median(1).values) >= TOLD).nonzero()[:, 0]
            words, similar = [words[i] for i in kept.tolist()], similar[kept][:, kept]
            if len(words) < 2:
                return cls({}, {})
        near = similar.fill_diagonal_(-1).topk(min(NEIGHBOURS, len(words) - 1)).indices
        neighbours = {}
        for word, row in zip(words, near.tolist(), strict=True):
            # another form of the same word ("dog", "dogs") is no mismatch
            others = [words[i] for i in row if not _same_stem(words[i], word)]
            if others:
                neighbours[word] = others
        return cls(neighbours, dict(counts))

    def swap(self, caption: str, rng: np.random.Generator) -> str | None:
        """The caption with one word exchanged; None when no word of it has a neighbour.

        A frequent word is put in more often: that a word is rare must not give away that it is
        wrong.
        """
        words = caption.split()
        places = [place for place, word in enumerate(words) if word in self.neighbours]
        if not places:
            return None
        place = places[int(rng.integers(len(places)))]
        choices = [word for word in self.neighbours[words[place]] if word not in words]
        if not choices:
            return None
        frequency = np.array([self.counts[word] for word in choices], float)
        words[place] = choices[int(rng.choice(len(choices), p=frequency / frequency.sum()))]
        return " ".join(words)


def _told(model: MED) -> Tensor | None:
    """`[vocab_size]`, what pictures tell of each token; None without taught detectors."""
    detectors = model.itm_start.words if model.config.itm_from_itc else None
    if detectors is None or not detectors.told.any():
        return None
    return F.pad(detectors.told, (0, 2))[detectors.columns].cpu()


def _same_stem(one: str, other: str) -> bool:
    return one[:4] == other[:4] or one.startswith(other) or other.startswith(one)
