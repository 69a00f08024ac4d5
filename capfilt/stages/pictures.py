"""From fetched bytes to a picture that later stages can trust, or the reason why there is none.

What comes from the web may be anything: text, half a file, a decompression bomb. Nothing here
raises on account of the bytes.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from capfilt.models.grey import eight_bits
from capfilt.schema import IMAGES
from capfilt.stages.lists import shard_keys

Row = TypeVar("Row")

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
"""What is tried: every further decoder is a way in for hostile bytes."""


@dataclass(frozen=True)
class Limits:
    """Which pictures are taken; the meaning of each is in the config's `download` section."""

    min_side_px: int
    max_area_px: int
    max_side_px: int | None


@dataclass(frozen=True)
class Picture:
    """What came of one row: `image` and its size, or `reason` and `error`.

    Attributes:
        reason: None, or one of the reasons of `capfilt.schema`.
        error: what failed, in words.
        sha256: of the fetched bytes.
        original_width: pixels, as fetched.
        original_height: pixels, as fetched.
        width: pixels, as stored.
        height: pixels, as stored.
        image: the encoded picture to store.
    """

    reason: str | None = None
    error: str | None = None
    sha256: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    width: int | None = None
    height: int | None = None
    image: bytes | None = None

    @property
    def status(self) -> str:
        """The row's status, in img2dataset's words."""
        if self.reason is None:
            return "success"
        return "failed_to_download" if self.reason == "download_failed" else "failed_to_resize"


def not_fetched(error: str) -> Picture:
    """The outcome for a row of which there are no bytes."""
    return Picture("download_failed", error)


def inspect(data: bytes, limits: Limits) -> Picture:
    """Decodes a picture in full, so that no later stage meets a broken one.

    The size in the header is checked first: a picture that is too large is never decoded. Run it
    by `in_threads`, which sees to Pillow's own limits.

    Args:
        data: the bytes as fetched.
        limits: which pictures to take.

    Returns:
        The picture as it is stored (as fetched, or shrunk), or the reason why it can't be used.
    """
    found = Picture(sha256=hashlib.sha256(data).hexdigest())
    if not data:
        return replace(found, reason="image_unreadable", error="the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            found = replace(found, original_width=width, original_height=height)
            if width * height > limits.max_area_px:
                error = f"{width} x {height} pixels are over {limits.max_area_px}"
                return replace(found, reason="image_too_large", error=error)
            if min(width, height) < limits.min_side_px:
                error = f"{width} x {height}: a side is under {limits.min_side_px} pixels"
                return replace(found, reason="image_too_small", error=error)
            picture.load()
            if limits.max_side_px is not None and max(width, height) > limits.max_side_px:
                data, (width, height) = _shrink(picture, limits.max_side_px)
                if min(width, height) < limits.min_side_px:
                    error = (
                        f"{picture.width} x {picture.height}, shrunk to {width} x {height}: a side "
                        f"is under {limits.min_side_px} pixels"
                    )
                    return replace(found, reason="image_too_small", error=error)
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        error = f"not a picture ({kinds}), or cut in its header; it starts with {data[:12]!r}"
        return replace(found, reason="image_unreadable", error=error)
    except Exception as error:
        # decoders raise whatever they like on broken bytes: struct.error, SyntaxError, KeyError …
        message = f"{type(error).__name__}: {error}"[:500]
        return replace(found, reason="image_unreadable", error=message)
    return replace(found, width=width, height=height, image=data)


def _shrink(picture: Image.Image, max_side_px: int) -> tuple[bytes, tuple[int, int]]:
    """The picture upright, on white, at most `max_side_px` long, as JPEG; and its size."""
    picture = eight_bits(ImageOps.exif_transpose(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), picture.size


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns off Pillow's warnings, and its limit on the area, since `inspect` has its own.

    Pillow's would warn at a fixed size, and refuse at twice that without saying how large it is.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def in_threads(work: Callable[[Row], Picture], rows: Iterable[Row], threads: int) -> list[Picture]:
    """`[work(row) for row in rows]` on several threads, the results in order."""
    with _decoding(), ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, rows))


def images_table(
    shard: str,
    source: str,
    urls: list[str | None],
    captions: list[list[str]],
    pictures: list[Picture],
    exif: list[str | None] | None = None,
) -> pa.Table:
    """The `images/` table of a shard from its rows, in the order of the list."""
    return pa.table(
        {
            "key": shard_keys(shard, len(pictures)),
            "source": [source] * len(pictures),
            "url": urls,
            "captions": captions,
            "status": [picture.status for picture in pictures],
            "error_message": [picture.error for picture in pictures],
            "reason": [picture.reason for picture in pictures],
            "width": [picture.width for picture in pictures],
            "height": [picture.height for picture in pictures],
            "original_width": [picture.original_width for picture in pictures],
            "original_height": [picture.original_height for picture in pictures],
            "exif": exif or [None] * len(pictures),
            "sha256": [picture.sha256 for picture in pictures],
            "image": [picture.image for picture in pictures],
        },
        schema=pa.schema([field.with_nullable(True) for field in IMAGES]),
    )
