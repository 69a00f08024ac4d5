"""A run small enough for any test: a few drawn pictures on disk, and made-up scores of their texts."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from PIL import Image

from capfilt import manifest
from capfilt.manifest import Identity
from capfilt.schema import SCORES, pair_uid
from capfilt.shards import RunDir, Shard

COLOURS = ("red", "green", "blue", "gold", "black", "purple", "orange", "brown")


def picture(colour: str, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Said:
    """What a command said: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Tiny:
    """A run that ingests 5 human and 7 web pictures in shards of 3; three of the web are bad."""

    folder: Path
    values: dict[str, Any]

    @property
    def config(self) -> Path:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return path

    @property
    def run(self) -> RunDir:
        return RunDir(self.values["run_dir"])

    def score(self) -> None:
        """Signs made-up scores of what is in images/: the n-th text of the run gets n/10."""
        number = 0
        for name in self.run.shards("images"):
            rows = []
            for image in Shard(self.run, name).read("images").to_pylist():
                for place, text in enumerate(image["captions"]):
                    error = image["reason"] or (None if text.strip() else "empty_caption")
                    rows.append(
                        {
                            "pair_id": f"{image['key']}/text{place}",
                            "key": image["key"],
                            "source": image["source"],
                            "caption": text,
                            "uid": None if image["reason"] else pair_uid(image["sha256"], text),
                            "itm_prob": None if error else number / 10 % 1,
                            "itc_sim": None if error else 0.3,
                            "error": error,
                        }
                    )
                    number += 1
            self.run.write_table(
                self.run.table("scores", name), pa.Table.from_pylist(rows, schema=SCORES)
            )
            path = self.run.manifest("scores", name)
            manifest.sign(
                self.run, path, Identity("score", 1, {}), rows=len(rows), counts={}, seconds=0.1
            )
