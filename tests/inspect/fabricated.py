"""A small run, made up: every reason, hostile texts, no model."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from capfilt import manifest
from capfilt.manifest import Identity
from capfilt.schema import DECISIONS, IMAGES, SCORES
from capfilt.shards import RunDir

HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>",
    "</textarea></title>\"'><svg onload=window.hacked=1>",
    "{{constructor.constructor('window.hacked=1')()}} javascript:window.hacked=1",
    "a\u202edrow gnol\u202c \u0000 نص عربي 文字",
)


def jpeg(number: int, side: int = 48) -> bytes:
    """A picture of one colour with a bright square, different for each number."""
    pixels = np.full((side, side, 3), [(number * 67) % 256, (number * 29) % 256, 90], np.uint8)
    pixels[8:24, 8:24] = 240
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def make_run(folder: Path, shards: int = 2, pictures: int = 30, threshold: float = 0.5) -> Path:
    """Writes images/, scores/ and decisions/ of a run: a web and a synthetic text a picture."""
    run = RunDir(str(folder))
    random = np.random.default_rng(0)
    for number in range(shards):
        name = f"web-{number:05d}"
        images, scores, decisions = [], [], []
        for row in range(pictures):
            key = f"{name}-{row:05d}"
            lost = row % 10 == 9
            data = None if lost else jpeg(number * pictures + row)
            if row == 5:
                data = b"not a picture"
            digest = None if data is None else hashlib.sha256(data).hexdigest()
            texts = [("web", "text0", f"photo {row} of a dog by the lake {number}")]
            if row < len(HOSTILE):
                texts = [("web", "text0", HOSTILE[row])]
            if not lost:
                texts.append(("synthetic", "synthetic0", f"a dog number {row} runs"))
            url = "javascript:alert(1)" if row == 1 else f"https://example.org/{key}.jpg?<b>"
            images.append(
                {
                    "key": key,
                    "source": "web",
                    "url": url,
                    "captions": [texts[0][2]],
                    "status": "failed_to_download" if lost else "success",
                    "error_message": "404 <i>gone</i>" if lost else None,
                    "reason": "download_failed" if lost else None,
                    "width": None if lost else 48,
                    "height": None if lost else 48,
                    "original_width": None if lost else 48,
                    "original_height": None if lost else 48,
                    "exif": None,
                    "sha256": digest,
                    "image": data,
                }
            )
            for source, suffix, text in sorted(texts, key=lambda each: each[1]):
                itm = None if lost else float(np.float32(random.random()))
                uid = None
                if digest:
                    uid = hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
                itc = None if lost else float(np.float32(random.uniform(-0.2, 0.6)))
                reason = "kept" if itm is None or itm >= threshold else "itm_below_threshold"
                reason = "download_failed" if lost else reason
                if row == 7 and source == "web":
                    reason = "duplicate"
                pair_id = f"{key}/{suffix}"
                scores.append(
                    {
                        "pair_id": pair_id,
                        "key": key,
                        "source": source,
                        "caption": text,
                        "uid": uid,
                        "itm_prob": itm,
                        "itc_sim": itc,
                        "error": "download_failed" if lost else None,
                    }
                )
                decisions.append(
                    {
                        "pair_id": pair_id,
                        "source": source,
                        "keep": reason == "kept",
                        "reason": reason,
                    }
                )
        for table, schema, rows, config in (
            ("images", IMAGES, images, {}),
            ("scores", SCORES, scores, {}),
            (
                "decisions",
                DECISIONS,
                decisions,
                {"itm_threshold": threshold, "itc_threshold": None},
            ),
        ):
            run.write_table(run.table(table, name), pa.Table.from_pylist(rows, schema))
            weights = {"matcher": "f" * 64} if table == "scores" else {}
            identity = Identity(table, 1, config, {}, weights)
            path = run.manifest(table, name)
            manifest.sign(run, path, identity, rows=len(rows), counts={}, seconds=0.0)
    return folder


def calibrate(folder: Path, score: str = "itm", **config: object) -> dict[str, float]:
    """Signs the decisions anew, as if a calibration had made them; its thresholds by source."""
    run = RunDir(str(folder))
    thresholds = {"web": 0.4, "synthetic": -0.3}
    promise = {
        "target": 0.95,
        "score": score,
        "weights": [1.0, 2.0],
        "sources": {name: {"threshold": value} for name, value in thresholds.items()},
    }
    for name in run.shards("decisions"):
        settings = {"itm_threshold": None, "itc_threshold": None, **config}
        identity = Identity("decisions", 1, settings, {}, {"calibration": "c" * 64})
        path = run.manifest("decisions", name)
        extra = {"calibration": promise}
        manifest.sign(run, path, identity, rows=1, counts={}, seconds=0.0, extra=extra)
    return thresholds


def add_embeddings(folder: Path, width: int = 8, as_binary: bool = False) -> None:
    """Writes embeddings/: a picture and its web text point the same way."""
    run = RunDir(str(folder))
    random = np.random.default_rng(1)
    for name in run.shards("scores"):
        ids, kinds, vectors = [], [], []
        for row in range(30):
            key = f"{name}-{row:05d}"
            vector = random.normal(size=width)
            for identifier, kind, noise in (
                (key, "image", 0.0),
                (f"{key}/synthetic0", "text", 2.0),
                (f"{key}/text0", "text", 0.05),
            ):
                ids.append(identifier)
                kinds.append(kind)
                vectors.append((vector + noise * random.normal(size=width)).astype(np.float32))
        if as_binary:
            column = pa.array([each.astype(np.float16).tobytes() for each in vectors], pa.binary())
        else:
            flat = pa.array(np.concatenate(vectors), pa.float32())
            column = pa.FixedSizeListArray.from_arrays(flat, width)
        table = pa.table({"id": ids, "kind": kinds, "vector": column})
        run.write_table(run.table("embeddings", name), table)
        identity = Identity("embeddings", 1, {})
        path = run.manifest("embeddings", name)
        manifest.sign(run, path, identity, rows=len(ids), counts={}, seconds=0.0)


def add_human(folder: Path, pictures: int = 20) -> None:
    """Adds a shard of human pairs, scored, as a run has them beside those of the web."""
    run = RunDir(str(folder))
    name, random = "human-00000", np.random.default_rng(2)
    tables: dict[str, list[dict[str, object]]] = {"images": [], "scores": [], "decisions": []}
    for row in range(pictures):
        key = f"{name}-{row:05d}"
        data, text = jpeg(row + 200), f"people wrote this of picture {row}"
        digest = hashlib.sha256(data).hexdigest()
        uid = hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
        pair = {"pair_id": f"{key}/text0", "source": "human"}
        image = {"key": key, "source": "human", "captions": [text], "status": "success"}
        image |= {"sha256": digest, "image": data, "width": 48, "height": 48}
        scores = {"key": key, "caption": text, "uid": uid, "itm_prob": float(random.random())}
        tables["images"].append({**dict.fromkeys(IMAGES.names), **image})
        tables["scores"].append({**pair, **scores, "itc_sim": 0.3, "error": None})
        tables["decisions"].append({**pair, "keep": True, "reason": "kept"})
    schemas = {"images": IMAGES, "scores": SCORES, "decisions": DECISIONS}
    for table, rows in tables.items():
        run.write_table(run.table(table, name), pa.Table.from_pylist(rows, schemas[table]))
        weights = {"matcher": "f" * 64} if table == "scores" else {}
        config = {"itm_threshold": 0.5, "itc_threshold": None} if table == "decisions" else {}
        identity = Identity(table, 1, config, {}, weights)
        manifest.sign(
            run, run.manifest(table, name), identity, rows=pictures, counts={}, seconds=0.0
        )
