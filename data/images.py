"""Reading a picture: whatever the file holds, RGB comes out."""

import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def read_image(path):
    """The picture in `path` as uint8 [3,H,W], RGB, turned upright by its EXIF orientation.

    Grey, palette, RGBA and CMYK become RGB (transparency is dropped), 16 bits become 8 by their high byte. In memory a
    pixel's colours lie together (channels last). Raises DataError of kind "image".

    By Pillow: torchvision's decoders are twice as quick and to be removed.
    """
    with _opened(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        image = file
        if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would clip instead of scale
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info:  # else Pillow warns of it
            image = image.convert("RGBA")
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path):
    """(height, width) of the upright picture in `path`, without decoding it. Raises DataError of kind "image"."""
    with _opened(path) as file:
        width, height = file.size
        on_its_side = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if on_its_side else (height, width)


@contextmanager
def _opened(path):
    """The file as a Pillow image; what goes wrong while it is in use becomes a DataError."""
    try:
        content = Path(path).read_bytes()  # at once: Pillow reading in pieces takes a tenth longer
        if content.startswith(b"version https://git-lfs"):
            raise DataError(path, "", "a git-LFS pointer, not a picture; fetch it with: git lfs pull", kind="image")
        with Image.open(io.BytesIO(content)) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise DataError(
            path, "", f"cannot be read as a picture: {_reason(error)}; mend or replace it", kind="image"
        ) from None


def _reason(error):
    if isinstance(error, UnidentifiedImageError):  # its text names the buffer
        return "no picture format known to Pillow"
    return getattr(error, "strerror", None) or str(error)
