"""Texts in any letters are drawn, or replaced."""

import pytest
from PIL import ImageFont

from visualize import fonts


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())
    fonts.fitting.cache_clear()
    yield
    fonts.fitting.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog 0.9", "dog 0.9"),
        ("Überführung", "Uberfuhrung"),
        ("Собака 1", "?????? 1"),
        ("犬\udcff", "??"),
        ("½", "?"),
    ],
)
def test_without_fonts_of_the_system(no_fonts, text, expected):
    drawn, font = fonts.fitting(text, 12)
    assert drawn == expected and font.getlength(drawn) > 0


def test_the_first_font_with_all_letters_is_used(monkeypatch):
    """Fonts of the system may be any: one that has every letter takes their place."""
    pillows, asked = ImageFont.load_default(12), []

    def load(name, size):
        asked.append(name)
        return {"": pillows, "none.ttf": None}.get(name, "all letters")

    monkeypatch.setattr(fonts, "_load", load)
    monkeypatch.setattr(fonts, "_has", lambda font, text: font == "all letters")
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("none.ttf", "all.ttf", "other.ttf"))
    fonts.fitting.cache_clear()
    assert fonts.fitting("Größe", 12) == ("Größe", "all letters")
    assert asked == ["", "none.ttf", "all.ttf"]
    fonts.fitting.cache_clear()


def test_pillows_font_has_ascii_and_no_umlauts():
    font = ImageFont.load_default(12)
    assert fonts._has(font, "".join(map(chr, range(32, 127)))) and not fonts._has(font, "ä")
