"""`caption`: synthetic texts for the web pictures, by the captioner (paper, section 3.3).

What needs torch is imported when the captioner is opened: a run with nothing to do ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from capfilt.config import Caption
from capfilt.schema import CAPTIONS
from capfilt.shards import Shard
from capfilt.stage import Transform

if TYPE_CHECKING:
    import torch

    from capfilt.models.med import MED


class CaptionSettings(BaseModel):
    """What decides the captions: `caption` of the config, the captioner's prompt, and the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    caption: Caption
    prompt: str
    seed: int


@dataclass(frozen=True)
class CaptionStage:
    """The stage `caption`: web `images/` to `captions/`, so many rows a usable picture."""

    config: CaptionSettings
    model: Path
    use_features: bool
    name: str = "caption"
    version: int = 1
    table: str = "captions"
    schema: pa.Schema = field(default=CAPTIONS, repr=False)
    reads_all: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("web",)
    count_by: str | None = "source"
    cheap: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The pictures, or what the frozen tower made of them."""
        return ("images", "features") if self.use_features else ("images",)

    def weights(self) -> dict[str, Path]:
        """The captioner."""
        return {"captioner": self.model / "model.safetensors"}

    def open(self, device: str) -> Transform:
        """Loads the captioner."""
        from capfilt.models import folder as model_folder

        model, tokenizer, vocabulary = model_folder.load(self.model)
        return partial(
            caption_shard,
            model=model.to(device).eval(),
            tokenizer=tokenizer,
            vocabulary=None if vocabulary is None else vocabulary.to(device),
            settings=self.config,
            use_features=self.use_features,
            device=device,
        )


def caption_shard(
    shard: Shard,
    *,
    model: MED,
    tokenizer: object,
    vocabulary: torch.Tensor | None,
    settings: CaptionSettings,
    use_features: bool,
    device: str,
) -> pa.Table:
    """Captions of a shard's usable pictures, each decided by seed, pair id and picture alone."""
    import torch

    from capfilt.models.generation import generate, read_images
    from capfilt.models.tokens import decode, prompt_ids
    from capfilt.stages.batches import autocast, image_batches

    options = settings.caption
    count = options.captions_per_image
    prompt = prompt_ids(tokenizer, settings.prompt)  # type: ignore[arg-type]
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for keys, features in image_batches(
            shard, model, use_features, options.batch_size, device, options.precision
        ):
            pair_ids = [f"{key}/synthetic{n}" for key in keys for n in range(count)]
            with autocast(device, options.precision):
                cross, bonus = read_images(model, features, options.word_bonus, vocabulary)
                captions = generate(
                    model,
                    cross,
                    prompt,
                    pair_ids=pair_ids,
                    seed=settings.seed,
                    method=options.method,
                    top_p=options.top_p,
                    top_k=options.top_k,
                    temperature=options.temperature,
                    repetition_penalty=options.repetition_penalty,
                    min_length=options.min_tokens,
                    max_length=options.max_tokens,
                    num_beams=options.num_beams,
                    captions_per_image=count,
                    vocab_ids=vocabulary,
                    bonus=bonus,
                )
            for pair_id, caption in zip(pair_ids, captions, strict=True):
                rows.append(
                    {
                        "pair_id": pair_id,
                        "key": pair_id.rpartition("/")[0],
                        "source": "synthetic",
                        "caption": decode(tokenizer, caption.token_ids),  # type: ignore[arg-type]
                        "logprob": np.float32(caption.logprob),
                    }
                )
    rows.sort(key=lambda row: str(row["pair_id"]))
    return pa.Table.from_pylist(rows, schema=CAPTIONS)
