"""Images as they are meant to be looked at, in 8 bits a channel: the same ones for training and for predictions."""

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def upright(image: "Image.Image", mode: Literal["RGB", "L"]) -> "Image.Image":
    """Return an image turned as its camera was held, in `mode`, without transparency.

    Of 16 bits the upper eight are kept, as of 16 bit RGB: Pillow itself would cut off all above 255. Raises ValueError
    for numbers of 32 bits, of which it is not known what is white.
    """
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16") or (turned.mode == "I" and image.format == "PNG"):
        turned = Image.fromarray((np.asarray(turned).astype(np.uint16) >> 8).astype(np.uint8))
    if turned.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of 32 bits ({turned.mode}); save it with 8 or 16 bits a channel")
    return turned.convert(mode)
