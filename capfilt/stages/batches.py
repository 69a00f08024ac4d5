"""A shard's usable pictures in batches, as the image tower's output, for the stages with a model.

Dimensions: B batch, P image tokens, Dv width of the image tower, S side of the pictures.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from capfilt.models.images import one_ahead, open_stored, pixels, squash
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig
from capfilt.shards import Shard


def image_batches(
    shard: Shard, model: MED, use_features: bool, batch_size: int, device: str, precision: str
) -> Iterator[tuple[list[str], Tensor]]:
    """Yields keys (B) and the tower's tokens `[B, P, Dv]`, in key order.

    Args:
        shard: read from `features/`, or from `images/` and encoded here.
        model: the MED, on `device`.
        use_features: which of the two.
        batch_size: B.
        device: where the tokens go.
        precision: `fp32`, or `bf16` to encode under autocast.

    Raises:
        InputError: a picture can't be decoded any more; names it.
    """
    config = model.config
    if not use_features:
        for keys, values in pixel_batches(shard, config, batch_size):
            with autocast(device, precision):
                tokens = model.encode_image(values.to(device))
            yield keys, tokens
        return
    table = shard.read("features", ["key", "tokens"])
    for start in range(0, table.num_rows, batch_size):
        part = table.slice(start, batch_size)
        raw = [np.frombuffer(value.as_buffer(), np.float16) for value in part["tokens"]]
        stacked = np.stack(raw).reshape(part.num_rows, -1, config.image_width)
        yield part["key"].to_pylist(), torch.from_numpy(stacked).to(device, torch.float32)


def pixel_batches(
    shard: Shard, config: MEDConfig, batch_size: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Yields keys (B) and pixels `[B, 3, S, S]` of a shard's usable pictures, in key order.

    Threads decode a batch while the one before is worked on.

    Raises:
        InputError: a picture can't be decoded any more; names it.
    """
    table = shard.read("images", ["key", "image", "reason"])
    table = table.filter(pa.compute.is_null(table["reason"]))
    parts = [table.slice(start, batch_size) for start in range(0, table.num_rows, batch_size)]
    load = partial(_load, path=shard.run.table("images", shard.name), config=config)
    yield from one_ahead(parts, load)


def _load(
    part: pa.Table, decoders: ThreadPoolExecutor, *, path: str, config: MEDConfig
) -> tuple[list[str], Tensor]:
    keys: list[str] = part["key"].to_pylist()

    def decode(key: str, data: pa.Scalar) -> Image.Image:
        return squash(open_stored(data.as_py(), path, key), config.image_size_px)

    pictures = list(decoders.map(decode, keys, part["image"]))
    return keys, pixels(pictures, config.image_size_px, config.image_tower)


def autocast(device: str, precision: str) -> torch.autocast:
    """The context in which a model computes: bf16 under autocast, or fp32 as it is."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
