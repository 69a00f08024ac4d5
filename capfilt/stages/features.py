"""`features`: the frozen image tower's output of every usable picture, computed once for all stages.

Only for the small preset, whose tower is never trained: pretraining, finetuning, captioning and
scoring all read these tokens instead of decoding pictures again.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from capfilt.config import Model
from capfilt.models import med
from capfilt.models.folder import med_config
from capfilt.models.images import open_rgb, pixels
from capfilt.schema import FEATURES
from capfilt.shards import Shard
from capfilt.stage import Transform

BATCH = 32


@dataclass(frozen=True)
class FeaturesStage:
    """The stage `features`: `images/` to `features/`, usable pictures only."""

    config: Model
    name: str = "features"
    version: int = 1
    table: str = "features"
    schema: pa.Schema = field(default=FEATURES, repr=False)
    reads: tuple[str, ...] = ("images",)
    reads_all: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("web", "human")
    count_by: str | None = None
    cheap: bool = False

    def weights(self) -> dict[str, Path]:
        """The ImageNet weights of the tower."""
        return {"image_tower": med.lite_weights(self.config.lite)}

    def open(self, device: str) -> Transform:
        """Loads the tower."""
        model = med.MED(med_config(self.config))
        med.init_lite(model)
        tower = model.vision.to(device).eval()
        return partial(encode_shard, tower=tower, config=model.config, device=device)


@torch.inference_mode()
def encode_shard(
    shard: Shard, *, tower: torch.nn.Module, config: med.MEDConfig, device: str
) -> pa.Table:
    """Image tokens `[P, Dv]` of each usable picture of a shard, as float16."""
    table = shard.read("images", ["key", "image", "reason"])
    table = table.filter(pa.compute.is_null(table["reason"]))
    rows: list[bytes] = []
    for start in range(0, table.num_rows, BATCH):
        pictures = [open_rgb(data.as_py()) for data in table["image"][start : start + BATCH]]
        batch = pixels(pictures, config.image_size_px, config.image_tower).to(device)
        maps = tower(batch)
        tokens = maps.flatten(2).transpose(1, 2).to("cpu", torch.float16).numpy()
        rows += [np.ascontiguousarray(row).tobytes() for row in tokens]
    return pa.table({"key": table["key"], "tokens": pa.array(rows, pa.large_binary())})
