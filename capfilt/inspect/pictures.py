"""Pictures of a run for the review page: single cells of `images/`, and small ones made anew."""

import io
import threading
from collections import OrderedDict
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from capfilt.errors import InputError
from capfilt.shards import RunDir

LARGEST_AREA_PX = 80_000_000
LARGEST_UPLOAD_PX = 30_000_000
THUMBNAIL_PX = 256

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LARGEST_GROUPS = 192 << 20
"""Bytes of row groups that are kept."""


_DECODING = threading.BoundedSemaphore(2)
"""So many pictures are decoded at a time: a large one takes some hundred MB."""


class Pictures:
    """Reads the pictures of a run one by one; the row groups that were read last are kept.

    Attributes:
        run: the run.
        groups: shard and number of a row group to its pictures, at most `LARGEST_GROUPS` bytes.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.groups: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, position: int) -> bytes | None:
        """One cell of `images/`: reads its row group, or only up to it where groups are large."""
        with fsspec.open(self.run.table("images", shard), "rb") as file:
            table = pq.ParquetFile(file, pre_buffer=False)
            group, start = 0, 0
            while position >= start + table.metadata.row_group(group).num_rows:
                start += table.metadata.row_group(group).num_rows
                group += 1
            key = (shard, group)
            with self._lock:
                cells = self.groups.get(key)
                if cells is not None:
                    self.groups.move_to_end(key)
            if cells is None:
                index = table.schema_arrow.get_field_index("image")
                column = _column_of(table.metadata.row_group(group), "image")
                if index >= 0 and column.total_uncompressed_size > 32 << 20:
                    skip = position - start
                    for batch in table.iter_batches(
                        batch_size=64, row_groups=[group], columns=["image"], use_threads=False
                    ):
                        if skip < batch.num_rows:
                            value: bytes | None = batch.column(0)[skip].as_py()
                            return value
                        skip -= batch.num_rows
                    return None
                cells = table.read_row_group(group, columns=["image"], use_threads=False)["image"]
                with self._lock:
                    self.groups[key] = cells
                    while sum(each.nbytes for each in self.groups.values()) > LARGEST_GROUPS:
                        self.groups.popitem(last=False)
            value = cells[position - start].as_py()
            return value


def _column_of(group: Any, name: str) -> Any:
    for index in range(group.num_columns):
        if group.column(index).path_in_schema == name:
            return group.column(index)
    raise InputError(f"images/ has no column {name!r}")


def shrink(data: bytes, side_px: int, largest_px: int = LARGEST_AREA_PX) -> bytes | None:
    """A picture made small and encoded anew, so that nothing of the original bytes is served.

    Args:
        data: the encoded picture.
        side_px: longer side.
        largest_px: the area from which on it is not decoded.

    Returns:
        JPEG bytes, or None where `data` is not a picture or too large to decode.
    """
    try:
        with _DECODING, Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > largest_px:
                return None
            picture.draft("RGB", (side_px, side_px))
            # first small, then turned: turning copies all that is there
            picture.thumbnail((side_px, side_px))
            small = ImageOps.exif_transpose(picture)
            if small.mode in ("RGBA", "LA", "P"):
                layer = small.convert("RGBA")
                small = Image.new("RGB", layer.size, "white")
                small.paste(layer, mask=layer.getchannel("A"))
            out = io.BytesIO()
            small.convert("RGB").save(out, "JPEG", quality=82)
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, TypeError, KeyError):
        return None
