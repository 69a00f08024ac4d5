"""CIDEr-D and BLEU of captions, in plain Python.

The COCO evaluation splits captions with the Stanford PTB tokenizer, a Java program. `tokenize`
follows its rules as far as they matter in captions; see there for what is left out. References and
candidates go through the same tokenizer, so the figures come close to published ones but need not
equal them to the last digit.

Source: Vedantam et al., CIDEr, 2015 (arXiv 1411.5726), of which this is the CIDEr-D variant;
Papineni et al., BLEU, 2002, sections 2.1 to 2.3.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from capfilt.errors import InputError

_ORDERS = range(1, 5)
_SIGMA = 6.0

_Words: TypeAlias = list[str]
_NGram: TypeAlias = tuple[str, ...]

_STRAIGHT_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})
_CLITIC = re.compile(r"(?<=[^\W_])(n't|'(?:s|m|d|ll|re|ve))(?![^\W_])")
_FUSED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(lem|gim)(me)\b")
_TOKEN = re.compile(r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)|\w+(?:[-.,/'&@]+\w+)*|[^\w\s]")
_PUNCTUATION = frozenset("'\"`.,?!:;-()[]{}\u2013\u2014\u2026")


def tokenize(text: str) -> list[str]:
    """Split a caption into lower-case words, without punctuation.

    As the PTB tokenizer does: clitics come off (woman 's, do n't), a few fused words split (can
    not, gon na), words keep inner hyphens, points and commas (t-shirt, 3.5, 1,000), symbols are
    words ($, %, &), and quotes, brackets, dashes and `. , ? ! : ;` are dropped. Unlike it, a point
    at the end of an abbreviation goes (mr, not mr.), and brackets are dropped where it writes
    -lrb-.

    Args:
        text: one caption.

    Returns:
        The words.
    """
    text = text.lower().translate(_STRAIGHT_QUOTES)
    text = _CLITIC.sub(r" \1", text)
    text = _FUSED.sub(lambda match: " ".join(part for part in match.groups() if part), text)
    return [token for token in _TOKEN.findall(text) if token not in _PUNCTUATION]


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score captions against the references of their images.

    Args:
        candidates: one caption an image; an empty one scores 0.
        references: the captions that people wrote for each image, at least one each. CIDEr weighs
            n-grams by how rare they are among the references of these images, so its value depends
            on the set, and a single image always scores 0.

    Returns:
        `cider` (CIDEr-D, 0 to 10 as the paper scales it; tables print it times 100), and `bleu1` to
        `bleu4`, 0 to 1, of the whole set.

    Raises:
        InputError: no candidates, another number of references, or an image without a reference
            that holds a word.
    """
    if not candidates or len(candidates) != len(references):
        raise InputError(
            f"{len(candidates)} candidates and {len(references)} sets of references; "
            "give one candidate and its references for each image, and at least one image"
        )
    images = []
    for number, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        split = [words for words in map(tokenize, texts) if words]
        if not split:
            raise InputError(
                f"image {number}: no reference caption holds a word ({list(texts)!r}); leave it out"
            )
        images.append(_Image(_counted(tokenize(candidate)), [_counted(words) for words in split]))
    bleu = _bleu(images)
    return {
        "cider": _cider_d(images),
        **{f"bleu{order}": value for order, value in zip(_ORDERS, bleu, strict=True)},
    }


class _Text(NamedTuple):
    """A caption as its number of words, and one count of n-grams for each order."""

    length: int
    counts: list[Counter[_NGram]]


class _Image(NamedTuple):
    candidate: _Text
    references: list[_Text]


class _Vector(NamedTuple):
    """The tf-idf weights of one caption's n-grams of one order, and their Euclidean norm."""

    weights: dict[_NGram, float]
    norm: float


def _counted(words: _Words) -> _Text:
    # Copies of the words, each shifted by one more, side by side: the shortest ends the n-grams.
    shifted = [words[i:] for i in range(max(_ORDERS))]
    return _Text(len(words), [Counter(zip(*shifted[:n], strict=False)) for n in _ORDERS])


def _bleu(images: Sequence[_Image]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set, without smoothing.

    p_n is the number of candidate n-grams that a reference holds, each clipped to its largest count
    in one reference, over the number of candidate n-grams, both summed over the set (section 2.1).
    With c the candidates' length and r the sum of the reference lengths closest to each candidate's
    (the shorter of two equally close), BLEU-N = BP (p_1 ... p_N)^(1/N), where BP = 1 if c > r and
    exp(1 - r / c) otherwise (section 2.3).

    An order in which nothing matches, or which no candidate is long enough for, makes BLEU 0. Other
    implementations add a tiny constant there and print a number barely above 0.
    """
    matched, total = [0 for _ in _ORDERS], [0 for _ in _ORDERS]
    length = closest = 0
    for candidate, references in images:
        length += candidate.length
        closest += min(
            (text.length for text in references),
            key=lambda size: (abs(size - candidate.length), size),
        )
        for i, counts in enumerate(candidate.counts):
            total[i] += counts.total()
            matched[i] += sum(
                min(count, max(text.counts[i][gram] for text in references))
                for gram, count in counts.items()
            )
    if length == 0:
        return [0.0 for _ in _ORDERS]
    brevity = min(1.0, math.exp(1 - closest / length))
    scores, product = [], 1.0
    for order, right, all_grams in zip(_ORDERS, matched, total, strict=True):
        product *= right / all_grams if all_grams else 0.0
        scores.append(brevity * product ** (1 / order))
    return scores


def _cider_d(images: Sequence[_Image]) -> float:
    """Mean CIDEr-D of the images' candidates.

    With g_n the vector of tf-idf weights of a caption's n-grams, a candidate c scores against its m
    references s_j, for each n from 1 to 4,

        10 / m  sum_j  exp(-(l(c) - l(s_j))^2 / (2 sigma^2))  min(g_n(c), g_n(s_j)) . g_n(s_j)
                       / (|g_n(c)| |g_n(s_j)|),

    with l the number of words and sigma = 6, and the mean over n is its score. An n-gram's idf is
    the logarithm of the number of images over the number of those whose references hold it
    (equation 1), taken as one image where none do.

    The term frequency is the count itself, as in the COCO evaluation that published figures come
    from. Equation 1 divides it by the caption's number of n-grams; the cosine does not change with
    that, but what `min` clips does.
    """
    found_in: Counter[_NGram] = Counter()
    for image in images:
        found_in.update({gram for text in image.references for c in text.counts for gram in c})
    idf = {gram: math.log(len(images) / number) for gram, number in found_in.items()}
    unseen = math.log(len(images))

    def vectors(text: _Text) -> list[_Vector]:
        found = []
        for counts in text.counts:
            weights = {gram: count * idf.get(gram, unseen) for gram, count in counts.items()}
            found.append(_Vector(weights, math.hypot(*weights.values())))
        return found

    scores = []
    for candidate, references in images:
        ours = vectors(candidate)
        total = 0.0
        for reference in references:
            difference = candidate.length - reference.length
            penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, ours, vectors(reference)))
        scores.append(10 * total / len(_ORDERS) / len(references))
    return math.fsum(scores) / len(scores)


def _clipped_cosine(candidate: _Vector, reference: _Vector) -> float:
    """Cosine of two vectors, with the candidate's weights clipped to the reference's.

    A vector of zeros, of a caption too short for the order or of n-grams that all images share, is
    similar to none.
    """
    if not candidate.norm or not reference.norm:
        return 0.0
    dot = 0.0
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram, 0.0)
        dot += min(weight, other) * other
    return dot / (candidate.norm * reference.norm)
