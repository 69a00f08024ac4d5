"""Recall at k of image-text retrieval, in both directions.

Dimensions: I images, T texts, E embedding.

Ties and NaN count against the model: a candidate that scores the same as the right one ranks before
it, so that constant or broken scores cannot look like hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import InputError

Rows = Callable[[int, int], NDArray[Any]]


def recall_at(
    sim: ArrayLike,
    text_to_image: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Measure recall at k from a matrix of scores.

    Args:
        sim: scores of images by texts [I, T] (similarities, or ITM scores of the best candidates
            with the others far below); an array or a CPU tensor.
        text_to_image: row of each text's image [T].
        ks: the k of recall at k.
        chunk: rows that are looked at together; only memory depends on it.

    Returns:
        Shares, 0 to 1: `text_to_image_r<k>` (texts whose image is among the k best), and
        `image_to_text_r<k>` (images that have one of their texts among the k best; images without a
        text are left out), and `mean_recall` over all of these.

    Raises:
        InputError: nothing to rank, or `text_to_image` does not fit `sim`.
    """
    scores = np.asarray(sim)
    if scores.ndim != 2:
        raise InputError(f"sim has shape {scores.shape}; give [images, texts]")
    return _recalls(
        text_rows=lambda start, stop: scores[:, start:stop].T,
        image_rows=lambda start, stop: scores[start:stop],
        images=scores.shape[0],
        texts=scores.shape[1],
        text_to_image=text_to_image,
        ks=ks,
        chunk=chunk,
    )


def recall_at_embeds(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    text_to_image: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Measure recall at k from embeddings, without the whole matrix of scores in memory.

    Args:
        image_embeds: image features of length 1 [I, E].
        text_embeds: text features of length 1 [T, E].
        text_to_image: row of each text's image [T].
        ks: the k of recall at k.
        chunk: queries that are ranked together; memory is chunk times max(I, T).

    Returns:
        As `recall_at`.

    Raises:
        InputError: nothing to rank, or `text_to_image` does not fit the embeddings.
    """
    image, text = np.asarray(image_embeds), np.asarray(text_embeds)
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise InputError(
            f"embeddings have shapes {image.shape} and {text.shape}; give [images, E], [texts, E]"
        )
    return _recalls(
        text_rows=lambda start, stop: text[start:stop] @ image.T,
        image_rows=lambda start, stop: image[start:stop] @ text.T,
        images=len(image),
        texts=len(text),
        text_to_image=text_to_image,
        ks=ks,
        chunk=chunk,
    )


def _recalls(
    text_rows: Rows,
    image_rows: Rows,
    images: int,
    texts: int,
    text_to_image: ArrayLike,
    ks: Sequence[int],
    chunk: int,
) -> dict[str, float]:
    owner = np.asarray(text_to_image)
    if images == 0 or texts == 0:
        raise InputError(f"{images} images and {texts} texts: nothing to rank")
    if owner.shape != (texts,) or owner.min() < 0 or owner.max() >= images:
        raise InputError(
            f"text_to_image has shape {owner.shape} and values {owner.min()}..{owner.max()}; "
            f"give one image row (0..{images - 1}) for each of the {texts} texts"
        )

    text_ranks = np.empty(texts, dtype=np.int64)
    for start in range(0, texts, chunk):
        stop = min(start + chunk, texts)
        scores = text_rows(start, stop)
        right = scores[np.arange(stop - start), owner[start:stop]]
        # Not "scores >= right": where a score is NaN, both would be false and the rank the best.
        text_ranks[start:stop] = (~(scores < right[:, None])).sum(axis=1) - 1

    image_ranks = np.full(images, -1, dtype=np.int64)
    for start in range(0, images, chunk):
        stop = min(start + chunk, images)
        scores = image_rows(start, stop)
        own = owner[None, :] == np.arange(start, stop)[:, None]
        best = np.where(own, scores, -np.inf).max(axis=1)
        ranks = (~(scores < best[:, None]) & ~own).sum(axis=1)
        image_ranks[start:stop] = np.where(own.any(axis=1), ranks, -1)
    image_ranks = image_ranks[image_ranks >= 0]

    recalls = {f"text_to_image_r{k}": float((text_ranks < k).mean()) for k in ks}
    recalls |= {f"image_to_text_r{k}": float((image_ranks < k).mean()) for k in ks}
    return {**recalls, "mean_recall": float(np.mean(list(recalls.values())))}
