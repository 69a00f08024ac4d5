import hashlib
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.schema import IMAGES, REASONS, check
from capfilt.stages.pictures import FORMATS, Limits, images_table, in_threads, inspect, not_fetched

LIMITS = Limits(min_side_px=4, max_area_px=5000, max_side_px=None)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_kept_as_fetched(kind: str) -> None:
    data = encoded(Image.new("RGB", (20, 10), "red"), kind)
    found = inspect(data, LIMITS)
    assert (found.reason, found.width, found.height, found.image) == (None, 20, 10, data)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_limits_are_inclusive() -> None:
    pictures = [
        inspect(encoded(Image.new("L", size), "PNG"), LIMITS)
        for size in [(4, 4), (3, 9), (100, 50), (101, 50)]
    ]
    assert [found.reason for found in pictures] == [
        None,
        "image_too_small",
        None,
        "image_too_large",
    ]


def test_a_large_picture_is_shrunk_upright_on_white() -> None:
    image = Image.new("RGBA", (60, 30), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    found = inspect(encoded(image, "PNG", exif=exif), Limits(4, 5000, 20))
    assert (found.original_width, found.original_height) == (60, 30)
    assert (found.width, found.height) == (10, 20)
    assert found.image is not None
    shrunk = Image.open(io.BytesIO(found.image))
    assert (shrunk.format, shrunk.size, shrunk.mode) == ("JPEG", (10, 20), "RGB")
    assert min(shrunk.getpixel((5, 5))) > 250  # type: ignore[type-var]
    small = encoded(Image.new("L", (20, 20)), "PNG")
    assert inspect(small, Limits(4, 5000, 20)).image == small


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_shrunk_picture_of_16_bits_keeps_its_greys(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    image = Image.frombytes("I;16", (64, 32), ramp.tobytes())
    found = inspect(encoded(image, kind), Limits(4, 5000, 32))
    assert found.image is not None and (found.width, found.height) == (32, 16)
    grey = np.asarray(Image.open(io.BytesIO(found.image)).convert("L"), dtype=int)[8]
    assert abs(grey - np.linspace(2, 253, 32)).max() < 6


def test_a_shrunk_float_picture_keeps_its_greys() -> None:
    image = Image.fromarray(np.full((32, 64), 100.0, np.float32), "F")
    found = inspect(encoded(image, "TIFF"), Limits(4, 5000, 32))
    assert found.image is not None
    assert abs(np.asarray(Image.open(io.BytesIO(found.image)), dtype=int) - 100).max() < 4


def test_a_picture_that_is_too_thin_once_it_is_shrunk() -> None:
    found = inspect(encoded(Image.new("RGB", (800, 6)), "PNG"), Limits(4, 5000, 256))
    assert (found.reason, found.image) == ("image_too_small", None)
    assert found.error == "800 x 6, shrunk to 256 x 2: a side is under 4 pixels"
    assert (found.original_width, found.original_height) == (800, 6)
    assert inspect(encoded(Image.new("RGB", (800, 6)), "PNG"), Limits(2, 5000, 256)).reason is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_broken_bytes_are_a_reason_and_never_an_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    noise = Image.frombytes("RGB", (24, 24), random.Random(0).randbytes(24 * 24 * 3))
    raw = bytearray(encoded(noise, kind))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    for _ in range(data.draw(st.integers(0, 8))):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    (found,) = in_threads(lambda b: inspect(b, LIMITS), [bytes(raw)], 1)
    assert found.reason is None or found.reason in REASONS
    assert (found.image is None) == (found.reason is not None) == (found.error is not None)


def test_the_table_fits_the_contract() -> None:
    good = inspect(encoded(Image.new("RGB", (9, 9)), "PNG"), LIMITS)
    rows = [good, not_fetched("HTTP Error 404"), inspect(b"", LIMITS)]
    table = images_table("web-00003", "web", ["a", None, "c"], [["x"], [""], ["y", "z"]], rows)
    table = check(table, IMAGES, "images/web-00003")
    assert table.column("key").to_pylist() == [f"web-00003-0000{row}" for row in range(3)]
    assert table.column("status").to_pylist() == [
        "success",
        "failed_to_download",
        "failed_to_resize",
    ]


def test_pillow_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert len(in_threads(lambda b: inspect(b, LIMITS), [b"", b""], 2)) == 2
    assert before == Image.MAX_IMAGE_PIXELS
