"""Pictures of the review page: made small with little memory, few at a time."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from capfilt.inspect import pictures

LEFT, RIGHT = (250, 10, 10), (10, 10, 250)


def encoded(size: tuple[int, int], form: str = "JPEG", orientation: int = 1) -> bytes:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, LEFT)
    picture.paste(RIGHT, (size[0] // 2, 0, *size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    picture.save(out, form, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_small_before_they_are_turned(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[tuple[int, int]] = []
    turn = pictures.ImageOps.exif_transpose

    def watched(picture: Image.Image) -> Image.Image:
        turned.append(picture.size)
        return turn(picture)

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", watched)
    made = pictures.shrink(encoded((1200, 600), form, orientation=6), 256)
    assert made is not None and turned == [(256, 128)]
    with Image.open(io.BytesIO(made)) as small:
        assert small.size == (128, 256)  # a quarter turn: the left is on top
        for place, colour in (((64, 20), LEFT), ((64, 235), RIGHT)):
            found = small.getpixel(place)
            assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 30


def test_few_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), 0, 0
    turn = pictures.ImageOps.exif_transpose

    def slow(picture: Image.Image) -> Image.Image:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return turn(picture)

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", slow)
    data = encoded((64, 64))
    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(lambda _: pictures.shrink(data, 32), range(12)))
    assert None not in made and most == 2
    # one that can't be read gives its place back
    for _ in range(5):
        assert pictures.shrink(b"no picture", 32) is None
    assert pictures.shrink(data, 32) is not None


def test_an_upload_has_a_lower_limit() -> None:
    data = encoded((6000, 5200), "PNG")
    assert pictures.shrink(data, 64, pictures.LARGEST_UPLOAD_PX) is None
    assert pictures.shrink(data, 64) is not None
