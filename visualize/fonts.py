"""Fonts for texts in any script: Pillow's own font has the letters of English alone."""

import functools
import unicodedata

from PIL import ImageFont

# Looked for in the folders of fonts of the system. The first that has all letters of a text is used.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",  # macOS
    "arial.ttf",  # Windows
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
)
NO_LETTER = "\U0010ffff"  # no font has it


@functools.lru_cache(maxsize=512)
def fitting(text: str, size: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """(text, font) to draw a text with, `size` pixels high. Where no font has all its letters, those without one become
    the letter without its accents, or a question mark."""
    for name in ("", *SYSTEM_FONTS):
        font = _load(name, size)
        if font and _has(font, text):
            return text, font
        if text.isascii():
            break
    font = _load("", size)
    return "".join(letter if _has(font, letter) else _simplified(letter) for letter in text), font


def _simplified(letter):
    return unicodedata.normalize("NFD", letter).encode("ascii", "ignore").decode() or "?"


@functools.lru_cache(maxsize=64)
def _load(name, size):
    """Pillow's own font for no name; None if the system has none of this name."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _has(font, text):
    return all(_has_letter(font, letter) for letter in set(text))


def _has_letter(font, letter):
    if letter.isspace():
        return True
    mask, none = font.getmask(letter), _no_letter(font)
    return (mask.size, bytes(mask)) != none


@functools.lru_cache(maxsize=64)
def _no_letter(font):
    mask = font.getmask(NO_LETTER)
    return mask.size, bytes(mask)
