"""CIDEr and BLEU of captions, with the scorers of pycocoevalcap and without Java.

The COCO evaluation splits captions with the Stanford PTB tokenizer, a Java program. `tokenize`
follows its rules as far as they matter in captions; see there for what is left out. References and
candidates go through the same tokenizer, so the figures come close to published ones but need not
equal them to the last digit.

Source: Vedantam et al., CIDEr, 2015 (arXiv 1411.5726), of which the scorer computes the CIDEr-D
variant; Papineni et al., BLEU, 2002.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from capfilt.errors import InputError, MissingExtraError

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
        `cider` (CIDEr-D as the field prints it: 1.0 is written as 100 in tables), and `bleu1` to
        `bleu4`, 0 to 1, of the whole set.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
        InputError: no candidates, another number of references, or an image without a reference
            that holds a word.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as error:
        raise MissingExtraError(
            "CIDEr and BLEU need the package pycocoevalcap, which is not installed; run: "
            "pip install 'capfilt[evaluate]'"
        ) from error
    if not candidates or len(candidates) != len(references):
        raise InputError(
            f"{len(candidates)} candidates and {len(references)} sets of references; "
            "give one candidate and its references for each image, and at least one image"
        )
    cider, bleu = CiderScorer(n=4, sigma=6.0), BleuScorer(n=4)
    for number, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        words = [" ".join(tokenize(text)) for text in texts]
        if not any(words):
            raise InputError(
                f"image {number}: no reference caption holds a word ({list(texts)!r}); leave it out"
            )
        # The scorers split at spaces, take the references as a list, and keep state in `+=`.
        entry = (" ".join(tokenize(candidate)), [text for text in words if text])
        cider += entry
        bleu += entry
    cider_value, _ = cider.compute_score()
    bleu_values, _ = bleu.compute_score(option="closest")
    return {
        "cider": float(cider_value),
        **{f"bleu{n}": float(value) for n, value in enumerate(bleu_values, start=1)},
    }
