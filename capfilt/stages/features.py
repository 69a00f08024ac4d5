"""`features`: the frozen image tower's output of each usable picture, computed once for all stages.

Only for the small preset, whose tower is never trained: pretraining, finetuning, captioning and
scoring all read these tokens instead of decoding pictures again. What needs torch is imported when
the tower is opened, so that a run with nothing to do ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from capfilt.config import Model
from capfilt.models.weights import lite_files
from capfilt.schema import FEATURES
from capfilt.shards import Shard
from capfilt.stage import Transform

if TYPE_CHECKING:
    import torch

    from capfilt.models.med_config import MEDConfig

BATCH = 32


class FeaturesConfig(BaseModel):
    """What of the config's `model` section decides the output."""

    model_config = ConfigDict(frozen=True)

    lite: str
    lite_levels: str
    image_size_px: int | None


@dataclass(frozen=True)
class FeaturesStage:
    """The stage `features`: `images/` to `features/`, usable pictures only."""

    settings: Model
    name: str = "features"
    version: int = 1
    table: str = "features"
    schema: pa.Schema = field(default=FEATURES, repr=False)
    reads: tuple[str, ...] = ("images",)
    reads_all: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("web", "human")
    count_by: str | None = None
    cheap: bool = False

    @property
    def config(self) -> FeaturesConfig:
        """The tower and its picture size; the rest of the model does not matter here."""
        return FeaturesConfig(
            lite=self.settings.lite,
            lite_levels=self.settings.lite_levels,
            image_size_px=self.settings.image_size_px,
        )

    def weights(self) -> dict[str, Path]:
        """The ImageNet weights of the tower."""
        return lite_files(self.settings.lite)

    def open(self, device: str) -> Transform:
        """Loads the tower."""
        from capfilt.models.folder import preset_config
        from capfilt.models.initial import init_lite
        from capfilt.models.med import MED

        model = MED(preset_config(self.settings))
        init_lite(model)
        tower = model.vision.to(device).eval()
        return partial(encode_shard, tower=tower, config=model.config, device=device)


def encode_shard(
    shard: Shard, *, tower: torch.nn.Module, config: MEDConfig, device: str
) -> pa.Table:
    """Image tokens `[P, Dv]` of each usable picture of a shard, as float16."""
    import torch

    from capfilt.stages.batches import pixel_batches

    names: list[str] = []
    rows: list[bytes] = []
    for keys, batch in pixel_batches(shard, config, BATCH):
        with torch.inference_mode():
            maps = tower(batch.to(device))
            tokens = maps.flatten(2).transpose(1, 2).to("cpu", torch.float16).numpy()
        names += keys
        rows += [np.ascontiguousarray(row).tobytes() for row in tokens]
    return pa.table(
        {"key": pa.array(names, pa.string()), "tokens": pa.array(rows, pa.large_binary())}
    )
