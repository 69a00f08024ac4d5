"""A second table of `score`, when asked for: ITC embeddings of pictures and texts, for search."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from capfilt.schema import EMBEDDINGS
from capfilt.shards import Shard
from capfilt.stage import Transform

if TYPE_CHECKING:
    import torch

    from capfilt.models.med import MED


class Embedding(BaseModel):
    """What decides the embeddings: `score.max_tokens`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_tokens: int
    batch_size: int = Field(json_schema_extra={"runtime": True})


@dataclass(frozen=True)
class EmbedStage:
    """Embeds the pictures and texts of a shard; goes by the name of `score`, as its part."""

    config: Embedding
    model: Path
    use_features: bool
    source: str
    name: str = "score"
    version: int = 1
    table: str = "embeddings"
    schema: pa.Schema = field(default=EMBEDDINGS, repr=False)
    reads_all: tuple[str, ...] = ()
    count_by: str | None = None
    cheap: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Web and human shards are embedded apart: only web ones have captions."""
        return (self.source,)

    @property
    def reads(self) -> tuple[str, ...]:
        """The pictures (or features), and the synthetic texts of web ones."""
        pictures = ("images", "features") if self.use_features else ("images",)
        return (*pictures, "captions") if self.source == "web" else pictures

    def weights(self) -> dict[str, Path]:
        """The matcher."""
        return {"matcher": self.model / "model.safetensors"}

    def open(self, device: str) -> Transform:
        """Loads the matcher."""
        from capfilt.models import folder as model_folder

        model, tokenizer, _ = model_folder.load(self.model)
        return partial(
            embed_shard,
            model=model.to(device).eval(),
            tokenizer=tokenizer,
            config=self.config,
            use_features=self.use_features,
            source=self.source,
            device=device,
        )


def embed_shard(
    shard: Shard,
    *,
    model: MED,
    tokenizer: object,
    config: Embedding,
    use_features: bool,
    source: str,
    device: str,
) -> pa.Table:
    """Embeddings of a shard's usable pictures, and of their texts that aren't empty."""
    import torch

    from capfilt.models.tokens import clean, tokenize
    from capfilt.stages.batches import image_batches

    texts: dict[str, str] = {}
    for image in shard.read("images", ["key", "captions", "reason"]).to_pylist():
        if image["reason"] is None:
            for number, text in enumerate(image["captions"]):
                texts[f"{image['key']}/text{number}"] = clean(text or "")
    if source == "web":
        for caption in shard.read("captions", ["pair_id", "caption"]).to_pylist():
            texts[caption["pair_id"]] = clean(caption["caption"])
    # texts of like length go together, so that a long one does not pad the others
    names = sorted((name for name, text in texts.items() if text), key=lambda n: len(texts[n]))
    vectors: dict[str, bytes] = {}
    with torch.inference_mode():
        for keys, features in image_batches(
            shard, model, use_features, config.batch_size, device, "fp32"
        ):
            vectors.update(zip(keys, _float16(model.embed_image(features)), strict=True))
        for start in range(0, len(names), 2 * config.batch_size):
            part = names[start : start + 2 * config.batch_size]
            ids, mask = tokenize(
                tokenizer,  # type: ignore[arg-type]
                [texts[name] for name in part],
                config.max_tokens,
                first_token="cls",
            )
            found = model.embed_text(ids.to(device), mask.to(device))
            vectors.update(zip(part, _float16(found), strict=True))
    ordered = sorted(vectors)
    return pa.table(
        {
            "id": pa.array(ordered, pa.string()),
            "kind": pa.array(["text" if "/" in name else "image" for name in ordered], pa.string()),
            "vector": pa.array([vectors[name] for name in ordered], pa.binary()),
        }
    )


def _float16(vectors: torch.Tensor) -> list[bytes]:
    """Each row as the bytes of float16 numbers."""
    return [row.tobytes() for row in vectors.half().cpu().numpy()]
