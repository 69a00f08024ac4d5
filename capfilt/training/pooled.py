"""All pairs as the ITC heads see them: the pooled output of both towers, worked out once.

Dimensions: N pictures, M distinct texts, B batch, P image tokens, Dv width of the image tower.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capfilt.models.med import MED
from capfilt.models.tokens import tokenize
from capfilt.training.data import Stream

TEXTS_AT_A_TIME = 128
CELLS, CELL_PICTURES = 4, 6000
"""So many cells of so many pictures, at most, are what the grid's components are found from."""


@dataclass(frozen=True)
class Pooled:
    """All pairs, as the heads see them.

    Attributes:
        keys: of the pictures, N.
        human: bool `[N]`.
        images: `[N, pooled_width]`, what ITC's image head reads.
        captions: M distinct texts, cleaned.
        texts: `[M, D]`, their pooled encoder output.
        owned: for each picture the rows of `texts` that are its own.
    """

    keys: list[str]
    human: np.ndarray
    images: Tensor
    captions: list[str]
    texts: Tensor
    owned: list[list[int]]


@torch.inference_mode()
def pool_pairs(model: MED, tokenizer: Any, stream: Stream, max_tokens: int, device: str) -> Pooled:
    """Runs both towers once over everything.

    Args:
        model: the MED; the scale of its channels and its principal components are set, if it has
            any.
        tokenizer: of its text tower.
        stream: all pairs, not augmented.
        max_tokens: longest text.
        device: where the model runs.
    """
    model.eval()
    keys: list[str] = []
    human: list[bool] = []
    images, cells = [], []
    scale = _ChannelScale(model.config.image_width)
    drawn = _drawn_cells(model, len(stream.inventory))
    for batch in stream.in_order():
        first = len(keys)
        keys += batch.keys
        human += batch.human.tolist()
        features = batch.features
        if features is None:
            assert batch.pixels is not None
            features = model.encode_image(batch.pixels.to(device))
        images.append(model.pool_tokens(features.to(device)))
        if model.config.lite_levels == "all":
            scale.add(features)
        rows = [row for row in range(len(batch.keys)) if first + row in drawn]
        if rows:
            assert model.adapter is not None
            grid = model.adapter.cells(features[rows].float())
            places = torch.tensor([drawn[first + row] for row in rows])
            cells.append(grid[torch.arange(len(rows))[:, None], places].flatten(0, 1))
    if model.config.lite_levels == "all":
        model.set_channel_scale(*scale.mean_and_std())
    if cells:
        model.set_grid_components(torch.cat(cells).to(device))
    pooled = torch.cat(images)
    if model.config.pooled_components is not None:
        model.set_components(pooled)
    owned = list(stream.inventory.texts())
    captions = sorted({text for own in owned for text in own}, key=len)
    place = {text: row for row, text in enumerate(captions)}
    return Pooled(
        keys,
        np.array(human),
        model.reduce(pooled).clone(),
        captions,
        pool_texts(model, tokenizer, captions, max_tokens, device).clone(),
        [[place[text] for text in own] for own in owned],
    )


def _drawn_cells(model: MED, pictures: int) -> dict[int, list[int]]:
    """The cells that the grid's components are found from: picture to `CELLS` places in its grid.

    Of more than `CELL_PICTURES` pictures, a draw of so many; none once the components are found.
    """
    if model.adapter is None or not model.adapter.lacks_components:
        return {}
    rng = np.random.default_rng(17)
    count = model.adapter.side**2
    chosen = rng.permutation(pictures)[:CELL_PICTURES]
    return {int(row): rng.permutation(count)[:CELLS].tolist() for row in chosen}


class _ChannelScale:
    """Mean and standard deviation of each channel over the cells of all pictures."""

    def __init__(self, channels: int) -> None:
        self.cells = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Counts some pictures' tokens, `[B, P, Dv]`."""
        cells = tokens.flatten(0, 1).float().cpu()
        self.cells += len(cells)
        self.sums += torch.stack([cells.sum(0), cells.square().sum(0)])

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """`[Dv]` each."""
        mean, square = self.sums / max(1, self.cells)
        return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


@torch.inference_mode()
def pool_texts(
    model: MED, tokenizer: Any, texts: list[str], max_tokens: int, device: str
) -> Tensor:
    """Pooled encoder output `[M, D]` of M texts; sorted by length they cost least."""
    found = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        part = texts[start : start + TEXTS_AT_A_TIME]
        ids, mask = (x.to(device) for x in tokenize(tokenizer, part, max_tokens))
        found.append(model.pool_text(ids, mask))
    return torch.cat(found)
