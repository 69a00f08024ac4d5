"""A fabricated run folder: small real pictures, scores, decisions and loss logs, properly signed."""

import io
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from capfilt import manifest
from capfilt.config import Config
from capfilt.manifest import Identity
from capfilt.schema import TABLES, check
from capfilt.shards import RunDir

WORDS = ("red ball", "blue box", "green leaf", "yellow sun", "black cat", "white cup")
COLOURS = ("crimson", "royalblue", "seagreen", "gold", "black", "lightgrey")
HOSTILE = (
    "<script>alert('x')</script> & \"quoted\"",
    "IMG_2041.JPG \x1b[31mred\x1b[0m",
    "صورة قطة سوداء",
    "黒い猫 👩‍👩‍👧 naïve café",
    "buy now " * 60,
    "left \u202eright",
)


def picture(word: int, shape: int, rng: np.random.Generator) -> bytes:
    transparent = shape % 3 == 2
    size = (int(rng.integers(60, 160)), int(rng.integers(60, 160)))
    image = Image.new(
        "RGBA" if transparent else "RGB", size, (0, 0, 0, 0) if transparent else "white"
    )
    ImageDraw.Draw(image).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=COLOURS[word])
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if transparent else "JPEG")
    return buffer.getvalue()


def put(
    run: RunDir, table: str, shard: str, rows: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    schema = TABLES[table]
    run.write_table(
        run.table(table, shard),
        check(pa.Table.from_pylist(rows, schema), schema, f"{table}/{shard}"),
    )
    manifest.sign(
        run,
        run.manifest(table, shard),
        Identity(table, 1, config, {"shard": shard}),
        rows=len(rows),
        counts=Counter(str(row.get("reason")) for row in rows),
        seconds=1.5,
    )


def fabricate(
    path: Path,
    *,
    shards: tuple[str, ...] = ("human-00000", "web-00000", "web-00001"),
    pictures: int = 60,
    synthetic: bool = True,
    models: bool = True,
    threshold: float = 0.5,
) -> RunDir:
    """Writes a run; a threshold of 0 keeps all that was scored, one above 1 drops all."""
    run = RunDir(str(path))
    rng = np.random.default_rng(7)
    for shard in shards:
        kind = shard.split("-")[0]
        images: list[dict[str, Any]] = []
        scores: list[dict[str, Any]] = []
        for row in range(pictures):
            key = f"{shard}-{row:05d}"
            word = int(rng.integers(len(WORDS)))
            reason = None
            if kind == "web" and row % 11 == 10:
                reason = ("download_failed", "image_unreadable", "image_too_large")[row % 3]
            images.append(
                {
                    "key": key,
                    "source": kind,
                    "url": f"http://127.0.0.1:1/{'a' * (row % 90)}/{row}.jpg?<b>"
                    if kind == "web"
                    else None,
                    "captions": ["x"],
                    "status": "failed_to_download" if reason else "success",
                    "error_message": "<urlopen error [Errno 111] Connection refused>"
                    if reason
                    else None,
                    "reason": reason,
                    "image": None if reason else picture(word, row, rng),
                }
            )
            texts = (
                [("synthetic0", "synthetic", f"a picture of a {WORDS[word]}")]
                if synthetic and kind == "web" and not reason
                else []
            )
            right = rng.random() < 0.65 or kind == "human"
            caption = (
                f"a {WORDS[word]} on a white ground" if right else WORDS[(word + 1) % len(WORDS)]
            )
            if kind == "web" and row % 9 == 5:
                caption, right = HOSTILE[row // 9 % len(HOSTILE)], False
            if kind == "web" and row % 23 == 22:
                caption = "  "
            texts.append(("text0", kind, caption))
            for name, source, text in texts:
                error = reason or (None if text.strip() else "empty_caption")
                itm = float(
                    rng.beta(5, 1)
                    if right or (source == "synthetic" and rng.random() < 0.8)
                    else rng.beta(1, 5)
                )
                scores.append(
                    {
                        "pair_id": f"{key}/{name}",
                        "key": key,
                        "source": source,
                        "caption": text,
                        "uid": None,
                        "itm_prob": None if error else itm,
                        "itc_sim": None if error else 0.1 + 0.4 * itm + float(rng.normal(0, 0.05)),
                        "error": error,
                    }
                )
        decisions = []
        for at, pair in enumerate(scores):
            reason = pair["error"]
            if reason is None and pair["source"] != "human" and pair["itm_prob"] < threshold:
                reason = "itm_below_threshold"
            if reason is None and kind == "web" and at % 31 == 30:
                reason = "duplicate"
            decisions.append(
                {
                    "pair_id": pair["pair_id"],
                    "source": pair["source"],
                    "keep": reason is None,
                    "reason": reason or "kept",
                }
            )
        put(run, "images", shard, images, {"shard_size": pictures})
        put(run, "scores", shard, scores, {"max_tokens": 35})
        put(run, "decisions", shard, decisions, {"itm_threshold": threshold, "itc_threshold": None})
    if models:
        for model, losses in (
            ("pretrain", ("itc", "itm", "lm")),
            ("captioner", ("lm",)),
            ("matcher", ("itc", "itm")),
        ):
            lines = [
                json.dumps(
                    {
                        "step": step,
                        **{
                            name: 3 * math.exp(-step / 400) + 0.5 + float(rng.normal(0, 0.1))
                            for name in losses
                        },
                        "lr": 1e-4,
                        "seconds": step / 10,
                    }
                )
                for step in range(10, 1000, 10)
            ]
            run.write_text(
                run.at("models", model, "log.jsonl"), "\n".join(lines) + '\n{"step": 1000, "it'
            )
            manifest.sign(
                run,
                run.at("models", model, "manifest.json"),
                Identity(f"finetune {model}", 1, {}),
                rows=1500,
                counts={},
                seconds=60.0,
            )
    return run


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunDir]:
    return fabricate


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return fabricate(tmp_path_factory.mktemp("runs") / "quick <b>start")


@pytest.fixture()
def config() -> Config:
    return Config.model_validate(
        {"run_dir": "runs/x", "human": {"pairs": "human.jsonl"}, "web": {"urls": "<i>urls</i>.csv"}}
    )
