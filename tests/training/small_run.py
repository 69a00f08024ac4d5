"""A run folder of a few pictures, a tiny MED, and a config: what the training tests share."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from capfilt.config import Config
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig
from capfilt.schema import IMAGES
from capfilt.shards import RunDir

TINY = MEDConfig(
    image_size_px=32, vision_width=32, vision_depth=1, vision_heads=2, vision_mlp_width=48, text_width=32,
    text_depth=2, text_heads=4, text_ffn_width=48, max_positions=40, embed_dim=16, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
WITH_DROPOUT = dataclasses.replace(TINY, dropout=0.1, attention_dropout=0.1)
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "pink", "brown", "orange", "gray")
THINGS = ("dog", "house", "tree", "boat", "ball", "horse", "chair")


def tiny_med(config: MEDConfig = TINY) -> MED:
    torch.manual_seed(0)
    model = MED(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05 if "embeddings" in name else 0.2)
    return model


def png(colour: str, size: int = 40) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (size, size), colour)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(i: int) -> tuple[bytes, str]:
    """A picture and its text; different for i < 70."""
    colour, thing = COLOURS[i % len(COLOURS)], THINGS[i // len(COLOURS) % len(THINGS)]
    return png(colour, 24 + i // len(COLOURS)), f"a {colour} {thing}" + " near the water" * (i % 3)


def write_shard(run: RunDir, name: str, rows: list[dict]) -> None:
    """Rows give `image`, `captions`, `reason`; the rest is filled in."""
    source = name.split("-")[0]
    full = []
    for i, row in enumerate(rows):
        data = row.get("image")
        full.append(
            {
                **dict.fromkeys(IMAGES.names),
                "key": f"{name}-{i:05d}",
                "source": source,
                "status": "success" if data else "failed_to_download",
                "sha256": hashlib.sha256(data).hexdigest() if data else None,
                **row,
            }
        )
    run.write_table(run.table("images", name), pa.Table.from_pylist(full, schema=IMAGES))
    run.write_text(run.manifest("images", name), "{}")


def write_run(folder: Path, sizes: dict[str, int]) -> RunDir:
    run = RunDir(str(folder))
    number = 0
    for name, size in sizes.items():
        rows = []
        for _ in range(size):
            data, text = picture(number)
            rows.append({"image": data, "captions": [text, f"{text} again"]})
            number += 1
        write_shard(run, name, rows)
    return run


def write_features(run: RunDir, name: str, keys: list[str], tokens: int, width: int) -> None:
    values = [np.full((tokens, width), i, np.float16).tobytes() for i in range(len(keys))]
    table = pa.table({"key": keys, "tokens": pa.array(values, pa.large_binary())})
    run.write_table(run.table("features", name), table)


def config_of(folder: Path, **sections: object) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(folder),
            "human": {"pairs": "h.csv"},
            "web": {"pairs": "w.csv"},
            "model": {"preset": "base"},
            **sections,
        }
    )
