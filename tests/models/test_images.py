from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from capfilt.models.images import (
    CLIP_STD,
    ImageError,
    augment,
    open_rgb,
    pixels,
    rand_augment,
    squash,
)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(small, mode).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(224, 224), (500, 333), (60, 400), (31, 17)])
def test_evaluation_pixels_match_transformers(size: tuple[int, int]) -> None:
    image = picture(*size)
    processor = BlipImageProcessorPil(size={"height": 96, "width": 96})
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    grey_level = torch.tensor([1 / 255 / s for s in CLIP_STD]).view(1, 3, 1, 1)
    assert ((pixels([image], 96, "vit") - expected).abs() <= grey_level * 1.001).all()


def test_lite_pixels() -> None:
    values = pixels([Image.new("RGB", (8, 8), (127, 255, 0))], 8, "efficientnet_lite")
    assert values.shape == (1, 3, 8, 8) and values.dtype == torch.float32
    assert values[0, :, 0, 0].tolist() == [0.0, 1.0, -127 / 128]


def test_transparency_is_flattened_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_rgb(encoded(rgba, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    red, green, _ = open_rgb(encoded(half, "PNG")).getpixel((1, 1))  # type: ignore[misc]
    assert red == 255 and abs(green - 127) <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert open_rgb(encoded(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    assert open_rgb(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(encoded(Image.new("LA", (4, 4), (9, 0)), "PNG")).getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_grey_cmyk_and_sixteen_bits() -> None:
    assert open_rgb(encoded(Image.new("L", (4, 4), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    cmyk = open_rgb(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert cmyk.mode == "RGB" and min(cmyk.getpixel((4, 4))) > 250  # type: ignore[type-var,arg-type]
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert open_rgb(encoded(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation() -> None:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(image, "JPEG", exif=exif)).size == (4, 8)


def test_unreadable_and_truncated() -> None:
    jpeg = encoded(picture(64, 64), "JPEG")
    for data in (b"", b"GIF89a", b"<html></html>", jpeg[: len(jpeg) // 2]):
        with pytest.raises(ImageError) as error:
            open_rgb(data)
        assert error.value.reason == "image_unreadable"


def test_too_large() -> None:
    with pytest.raises(ImageError, match="64 x 64 pixels") as error:
        open_rgb(encoded(picture(64, 64), "PNG"), max_pixels=4000)
    assert error.value.reason == "image_too_large"
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ImageError) as error:
        open_rgb(bomb)
    assert error.value.reason == "image_too_large"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    good = bytearray(encoded(picture(12, 9), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_rgb(bytes(good))
    except ImageError:
        return
    assert image.mode == "RGB"


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(0, 10_000),
    st.sampled_from([(0.5, 1.0), (0.2, 1.0)]),
)
def test_augment_shape_and_determinism(
    width: int, height: int, seed: int, scale: tuple[float, float]
) -> None:
    image = picture(width, height)
    one = augment(image, np.random.default_rng(seed), 48, scale)
    other = augment(image, np.random.default_rng(seed), 48, scale)
    assert one.size == (48, 48) and one.mode == "RGB"
    assert one.tobytes() == other.tobytes()


def test_augment_varies_and_keeps_the_colour() -> None:
    image = picture(100, 80)
    seen = {augment(image, np.random.default_rng(seed), 32).tobytes() for seed in range(20)}
    assert len(seen) > 15
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    for seed in range(30):
        centre = np.asarray(rand_augment(red, np.random.default_rng(seed)))[18:22, 18:22].mean(
            (0, 1)
        )
        assert centre[0] >= centre[1] and abs(centre[1] - centre[2]) < 1


def test_squash_of_the_right_size_is_the_same_picture() -> None:
    image = picture(32, 32)
    assert squash(image, 32) is image
