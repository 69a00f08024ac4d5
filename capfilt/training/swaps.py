"""Word-swap negatives: a text with one word exchanged for a related one (a red dog, a black dog).

They teach ITM that a single wrong word is a mismatch. Related words are neighbours in the text
tower's own word embeddings, so no word list of any language is needed.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from capfilt.models.med import MED

NEIGHBOURS = 20
MIN_COUNT = 4
"""A word must stand in the texts this often to be exchanged or put in."""
FUNCTION_WORDS = 30
"""The most frequent words ("a", "the", "in") are left alone."""


@dataclass(frozen=True)
class WordSwaps:
    """What each word may be exchanged for."""

    neighbours: dict[str, list[str]]

    @classmethod
    def learn(
        cls, model: MED, tokenizer: PreTrainedTokenizerBase, captions: list[str]
    ) -> "WordSwaps":
        """Finds each word's neighbours among the words of the captions.

        Args:
            model: its word embeddings say which words are related.
            tokenizer: words that it splits are left alone.
            captions: cleaned texts.
        """
        counts = Counter(word for caption in captions for word in caption.split())
        common = (
            {word for word, _ in counts.most_common(FUNCTION_WORDS)}
            if len(captions) > 500
            else set()
        )
        vocabulary = tokenizer.get_vocab()
        words = [
            word
            for word, count in sorted(counts.items())
            if count >= MIN_COUNT and word in vocabulary and word.isalpha() and word not in common
        ]
        if len(words) < 10:
            return cls({})
        table = model.encoder.embeddings.word.weight.detach().float().cpu()
        vectors = F.normalize(table[[vocabulary[word] for word in words]], dim=-1)
        near = (
            (vectors @ vectors.T).fill_diagonal_(-1).topk(min(NEIGHBOURS, len(words) - 1)).indices
        )
        neighbours = {}
        for word, row in zip(words, near.tolist(), strict=True):
            # another form of the same word ("dog", "dogs") is no mismatch
            others = [words[i] for i in row if not _same_stem(words[i], word)]
            if others:
                neighbours[word] = others
        return cls(neighbours)

    def swap(self, caption: str, rng: np.random.Generator) -> str | None:
        """The caption with one word exchanged; None when no word of it has a neighbour."""
        words = caption.split()
        places = [place for place, word in enumerate(words) if word in self.neighbours]
        if not places:
            return None
        place = places[int(rng.integers(len(places)))]
        choices = [word for word in self.neighbours[words[place]] if word not in words]
        if not choices:
            return None
        words[place] = choices[int(rng.integers(len(choices)))]
        return " ".join(words)


def _same_stem(one: str, other: str) -> bool:
    return one[:4] == other[:4] or one.startswith(other) or other.startswith(one)
