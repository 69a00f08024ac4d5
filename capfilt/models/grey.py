"""Grey pictures of more than 8 bits; without torch, which reading a list needn't wait for."""

import numpy as np
from PIL import Image


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of more bits scaled to 8, any other as it is.

    Pillow clips these at 255 instead of scaling; "I" is how some of its versions open 16-bit PNGs.
    """
    if image.mode not in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    if image.mode != "F" or values.max(initial=0.0) > 255.0:
        values = values / 257.0
    return Image.fromarray(values.clip(0, 255).astype(np.uint8), "L")
