"""`export`: the kept pairs as Parquet that `datasets`, DuckDB and Polars read as it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.config import Export
from capfilt.errors import InputError
from capfilt.evaluation.calibration import cite
from capfilt.schema import EXPORT
from capfilt.shards import Shard
from capfilt.stages.decide import calibration_file

PICTURE_COLUMNS = ["key", "image", "width", "height", "url", "sha256"]
ROWS_A_CHUNK = 256


@dataclass(frozen=True)
class ExportStage:
    """Joins pictures, texts and scores of the pairs that were kept, ordered by `uid`.

    That order is a shuffle that is the same in every run: it comes from the content. A pair that
    stands twice (with `filter.drop_duplicates: false`) is there twice, under one `uid`.

    Attributes:
        config: whether human pairs are exported too.
        calibration: the file of the filter's thresholds; the manifests cite its digest, and what it
            promised.
    """

    config: Export
    calibration: Path | None = None

    name: str = field(default="export", init=False)
    version: int = field(default=1, init=False)
    table: str = field(default="export", init=False)
    schema: pa.Schema = field(default=EXPORT, init=False, repr=False)
    reads: tuple[str, ...] = field(default=("images", "scores", "decisions"), init=False)
    reads_all: tuple[str, ...] = field(default=(), init=False)
    sources: tuple[str, ...] = field(default=("web", "human"), init=False)
    count_by: str | None = field(default="source", init=False)
    cheap: bool = field(default=True, init=False)

    def weights(self) -> dict[str, Path]:
        """No model; the calibration is cited."""
        if self.calibration is None:
            return {}
        return {"calibration": calibration_file(str(self.calibration))}

    def citation(self) -> dict[str, Any]:
        """What the calibration promised, so that the export says it without the file."""
        return cite(self.calibration)

    def open(self, device: str) -> Callable[[Shard], pa.Table]:
        """Needs nothing; the function that it returns makes a shard's table."""
        return self._export

    def _export(self, shard: Shard) -> pa.Table:
        decisions = shard.read("decisions", ["pair_id", "source", "keep"])
        wanted = decisions.column("keep")
        if not self.config.human:
            wanted = pc.and_(wanted, pc.not_equal(decisions.column("source"), "human"))
        pairs = (
            decisions.filter(wanted)
            .select(["pair_id"])
            .join(shard.read("scores"), "pair_id", join_type="inner")
            .sort_by([("uid", "ascending"), ("pair_id", "ascending")])
        )
        images = shard.read("images", PICTURE_COLUMNS)
        # pictures are looked up in Python: Arrow's own join would copy them into one buffer,
        # whose 32-bit offsets end at 2 GB
        position = {key: row for row, key in enumerate(images.column("key").to_pylist())}
        rows = [position[key] for key in pairs.column("key").to_pylist()]
        columns = {name: pairs.column(name) for name in ("uid", "caption", "source")}
        columns |= {name: pairs.column(name) for name in ("itm_prob", "itc_sim")}
        columns |= {
            name: images.column(name).take(pa.array(rows, pa.int64()))
            for name in ("width", "height", "url", "sha256")
        }
        columns["image"] = _image_column(images, rows)
        return pa.table({name: columns[name] for name in EXPORT.names})


def _image_column(images: pa.Table, rows: list[int]) -> pa.ChunkedArray:
    """The pictures of `rows` as structs of bytes and path (the key), in chunks of bounded size."""
    data = images.column("image").to_pylist()
    keys = images.column("key").to_pylist()
    kind = EXPORT.field("image").type
    chunks = []
    for start in range(0, len(rows), ROWS_A_CHUNK):
        part = rows[start : start + ROWS_A_CHUNK]
        gone = [keys[row] for row in part if data[row] is None]
        if gone:
            raise InputError(
                f"decisions/ keeps pairs of picture {gone[0]}, which images/ has no bytes of; "
                "redo the filter (`capfilt filter CONFIG`)"
            )
        chunks.append(pa.array([{"bytes": data[row], "path": keys[row]} for row in part], kind))
    return pa.chunked_array(chunks, kind)
