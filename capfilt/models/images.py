"""Bytes to pixels: safe decoding, the evaluation transform, and the training augmentation.

Dimensions: B images, S image side in pixels.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from capfilt.errors import InputError
from capfilt.models.grey import eight_bits

PartT = TypeVar("PartT")
BatchT = TypeVar("BatchT")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MB of 24-bit pixels
DECODERS = min(8, os.cpu_count() or 1)
"""Threads that decode pictures (Pillow lets go of the interpreter's lock)."""


class ImageError(InputError):
    """A picture that can't be used.

    Attributes:
        reason: `image_unreadable` or `image_too_large`, as in the tables.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB.

    Transparency is flattened on white, EXIF's orientation applied, and of an animation the first
    frame is taken.

    Args:
        data: the encoded file.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        ImageError: the bytes are no picture, cut short, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns at half of what it refuses; the limit below is ours
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"a picture of {image.width} x {image.height} pixels; "
                    f"the limit is {max_pixels} pixels",
                    "image_too_large",
                )
            image.load()
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"picture too large: {error}", "image_too_large") from None
    except MemoryError:
        raise ImageError("the picture does not fit into memory", "image_too_large") from None
    except Exception as error:
        # decoders of hostile bytes raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(
            f"not a readable picture ({type(error).__name__}: {error})", "image_unreadable"
        ) from None


def open_stored(data: bytes, path: str, key: str) -> Image.Image:
    """Decode a picture that could be decoded when a run took it in.

    Args:
        data: the encoded file.
        path: of the table that holds it, for the message.
        key: of the picture, for the message.

    Raises:
        InputError: it can't be decoded any more.
    """
    try:
        return open_rgb(data)
    except ImageError as error:
        raise InputError(
            f"{path}: the picture {key} could be read when it was taken in, and can't be now "
            f"({error}): the file is damaged. Delete it and its manifest and run `capfilt run "
            "CONFIG` to make it again"
        ) from None


def one_ahead(
    parts: Iterable[PartT], load: Callable[[PartT, ThreadPoolExecutor], BatchT]
) -> Iterator[BatchT]:
    """Loads each part while what was made of the one before is worked on.

    Args:
        parts: what to load, in order.
        load: is given a part, and threads to decode pictures with.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(DECODERS) as decoders:
        waiting: Future[BatchT] | None = None
        for part in parts:
            coming = reader.submit(load, part, decoders)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # broken EXIF data says nothing about the pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    image = eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def squash(image: Image.Image, size_px: int) -> Image.Image:
    """The evaluation transform: S x S whatever the aspect ratio, bicubic."""
    if image.size == (size_px, size_px):
        return image
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC)


def pixels(images: Sequence[Image.Image], size_px: int, image_tower: str) -> Tensor:
    """Normalised pixels for `MED.encode_image`.

    Args:
        images: B pictures, RGB; squashed to S x S where they aren't.
        size_px: S.
        image_tower: `vit` (CLIP's mean and standard deviation) or `efficientnet_lite` ((x - 127) /
            128).

    Returns:
        `[B, 3, S, S]` float32.
    """
    array = np.stack([np.asarray(squash(image, size_px), dtype=np.uint8) for image in images])
    return normalise(torch.from_numpy(array), image_tower)


def normalise(values: Tensor, image_tower: str) -> Tensor:
    """Grey levels `[B, S, S, 3]` uint8 to pixels `[B, 3, S, S]` float32; see `pixels`."""
    scaled = values.permute(0, 3, 1, 2).float()
    if image_tower == "efficientnet_lite":
        return (scaled - 127.0) / 128.0
    mean = torch.tensor(CLIP_MEAN, device=values.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=values.device).view(1, 3, 1, 1)
    return (scaled / 255.0 - mean) / std


# augmentation


def augment(
    image: Image.Image,
    rng: np.random.Generator,
    size_px: int,
    scale: tuple[float, float] = (0.5, 1.0),
) -> Image.Image:
    """The training transform: random resized crop, flip, RandAugment(2, 5).

    Args:
        image: RGB.
        rng: where all randomness comes from.
        size_px: S.
        scale: share of the area that the crop keeps: from 0.5 in fine-tuning, from 0.2 in
            pretraining.

    Returns:
        S x S, RGB.
    """
    image = random_resized_crop(image, rng, size_px, scale)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, rng)


def random_resized_crop(
    image: Image.Image, rng: np.random.Generator, size_px: int, scale: tuple[float, float]
) -> Image.Image:
    """Crop a random part, 3:4 to 4:3 in aspect, and resize it to S x S, bicubic."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        # no crop fitted (very long pictures): the largest allowed one in the middle
        ratio = min(max(width / height, 3 / 4), 4 / 3)
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)


_OPERATIONS = (
    "identity",
    "autocontrast",
    "brightness",
    "sharpness",
    "equalize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)


def rand_augment(
    image: Image.Image, rng: np.random.Generator, operations: int = 2, magnitude: int = 5
) -> Image.Image:
    """RandAugment with BLIP's list of operations: none changes a colour that a caption may name.

    Args:
        image: RGB.
        rng: picks the operations and their signs.
        operations: how many, one after another.
        magnitude: 0..10.
    """
    level = magnitude / 10.0
    for name in rng.choice(_OPERATIONS, size=operations):
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if name == "autocontrast":
            image = ImageOps.autocontrast(image)
        elif name == "equalize":
            image = ImageOps.equalize(image)
        elif name == "brightness":
            image = ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level)
        elif name == "sharpness":
            image = ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level)
        elif name == "shear_x":
            image = _affine(image, (1.0, sign * 0.3 * level, 0.0, 0.0, 1.0, 0.0))
        elif name == "shear_y":
            image = _affine(image, (1.0, 0.0, 0.0, sign * 0.3 * level, 1.0, 0.0))
        elif name == "translate_x":
            image = _affine(image, (1.0, 0.0, sign * 10.0 * level, 0.0, 1.0, 0.0))
        elif name == "translate_y":
            image = _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, sign * 10.0 * level))
        elif name == "rotate":
            image = image.rotate(
                sign * 30.0 * level, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
            )
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(128, 128, 128),
    )
