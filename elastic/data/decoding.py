"""Decode image files as 8-bit RGB, whatever format and mode they have."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from elastic.errors import DataError

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of Pillow, whose conversion would clip them at 255
SIXTEEN_IN_32 = ("PNG", "PPM")  # formats of 16 bits at most that Pillow may open in the mode of 32
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow knows by name alone
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
WHITE = (255, 255, 255, 255)


@cache
def list_suffixes() -> frozenset[str]:
    """List the endings of files that Pillow reads as images."""
    endings = Image.registered_extensions()
    return frozenset(e for e, name in endings.items() if name in Image.OPEN and name not in UNREADABLE)


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Raises:
        DataError: it cannot be decoded, or its values have no declared range.
    """
    try:
        with Image.open(path) as image:
            return convert_rgb(image, str(path))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
        raise DataError(f"{path} is not a readable image: delete or replace it") from error


def convert_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image to 8-bit RGB, as one sees it: turned as its EXIF says, what is transparent on white.

    Raises:
        DataError: its values have no declared range.
    """
    image.load()
    image = _turn(image)
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in SIXTEEN_IN_32):
        grey = (np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8)  # 65,535 is 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{name} has values of an unknown range: save it with 8 or 16 bits")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # of EXIF data that are damaged, where the image is not
        return image
    return image
