"""A shard's usable pictures in batches, as the image tower's output, for `caption` and `score`.

Dimensions: B batch, P image tokens, Dv width of the image tower.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from capfilt.models.images import open_rgb, pixels
from capfilt.models.med import MED
from capfilt.shards import Shard


def image_batches(
    shard: Shard, model: MED, use_features: bool, batch_size: int, device: str
) -> Iterator[tuple[list[str], Tensor]]:
    """Yields keys (B) and the tower's tokens `[B, P, Dv]`, in key order.

    Args:
        shard: read from `features/`, or from `images/` and encoded here.
        model: the MED, on `device`.
        use_features: which of the two.
        batch_size: B.
        device: where the tokens go.
    """
    if use_features:
        table = shard.read("features", ["key", "tokens"])
    else:
        table = shard.read("images", ["key", "image", "reason"])
        table = table.filter(pa.compute.is_null(table["reason"]))
    config = model.config
    for start in range(0, table.num_rows, batch_size):
        part = table.slice(start, batch_size)
        keys = part["key"].to_pylist()
        if use_features:
            raw = [np.frombuffer(value.as_buffer(), np.float16) for value in part["tokens"]]
            stacked = np.stack(raw).reshape(len(keys), -1, config.image_width)
            yield keys, torch.from_numpy(stacked).to(device, torch.float32)
        else:
            pictures = [open_rgb(value.as_py()) for value in part["image"]]
            values = pixels(pictures, config.image_size_px, config.image_tower)
            yield keys, model.encode_image(values.to(device))
