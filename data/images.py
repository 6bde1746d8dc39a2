"""Reading a picture: whatever the file holds, RGB comes out."""

import io
import struct
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
POINTER = b"version https://git-lfs"


def read_image(path):
    """The picture in `path` as uint8 [3,H,W], RGB, turned upright by its EXIF orientation.

    Grey, palette, RGBA and CMYK become RGB (transparency is dropped), 16 bits become 8 by their high byte. In memory a
    pixel's colours lie together (channels last). Raises DataError of kind "image".

    By Pillow: torchvision's decoders are twice as quick and to be removed.
    """
    with opened(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        image = file
        if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would clip instead of scale
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "transparency" in image.info:  # else Pillow warns of it
            image = image.convert("RGBA")
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path):
    """(height, width) of the upright picture in `path`, from its header alone. Raises DataError of kind "image"."""
    with opened(path, whole=False) as file:
        width, height = file.size
        on_its_side = _exif(file).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if on_its_side else (height, width)


def _exif(file):
    """The EXIF of a picture not yet decoded. For that of a PNG Pillow decodes it all, because it may stand behind the
    pixels; few tools write it there, so the names of the parts are looked at first."""
    if file.format != "PNG" or _tells_more_behind_the_pixels(file.fp):
        return file.getexif()
    return Image.Image.getexif(file)


def _tells_more_behind_the_pixels(stream):
    """Does the PNG in `stream` hold any part behind its pixels but the end mark?"""
    position, pixels, more = stream.tell(), False, False
    stream.seek(8)
    while not more and len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        pixels = pixels or name == b"IDAT"
        more = pixels and name not in (b"IDAT", b"IEND")
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(position)
    return more


@contextmanager
def opened(path, whole=True):
    """The file as a Pillow image, its bytes read at once if `whole`; what goes wrong while it is in use becomes a
    DataError."""
    try:
        with open(path, "rb") as stream:
            content = io.BytesIO(stream.read()) if whole else stream  # Pillow reading in pieces takes a tenth longer
            if content.read(len(POINTER)) == POINTER:
                reason = "a git-LFS pointer, not a picture; fetch it with: git lfs pull"
                raise DataError(path, "", reason, kind="image")
            content.seek(0)
            with Image.open(content) as file:
                yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise DataError(
            path, "", f"cannot be read as a picture: {_reason(error)}; mend or replace it", kind="image"
        ) from None


def _reason(error):
    if isinstance(error, UnidentifiedImageError):  # its text names the buffer
        return "no picture format known to Pillow"
    return getattr(error, "strerror", None) or str(error)
