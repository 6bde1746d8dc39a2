"""Precision-recall curves of a detector as an image."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from visualize import fonts

SIZE, PLOT = (960, 560), (64, 56, 524, 516)  # (w, h) of the image; left, top, right, bottom of the axes: pixels
SCALE = 2  # Pillow's lines have hard edges: drawn larger and reduced, they are smooth
TEXT, LEGEND_ROW, LEGEND_LINE = 14, 24, 28  # height of the text, height of a row and length of its line
MAX_CLASSES, SHOWN = 10, 5  # of more classes, the best and the worst so many
LEVELS = np.linspace(0, 1, 101)  # of recall, at which curves are averaged
BLACK, GRAY, LIGHT = (0, 0, 0), (90, 90, 90), (225, 225, 225)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3294", "#a6761d", "#66a61e", "#b2182b")
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(curves: Mapping[str, Curve], ap: Mapping[str, float], title: str = "") -> torch.Tensor:
    """uint8 [3,560,960]: precision over recall of each class and their mean, with AP; of more than ten classes their
    mean and those of the five highest and the five lowest AP.

    curves   class name -> (precision, recall, scores), [N] each, by falling score; N may be 0
    ap       AP of each of them
    title    what AP means, in words
    """
    image = Image.new("RGB", [side * SCALE for side in SIZE], (255, 255, 255))
    pen = ImageDraw.Draw(image)
    _axes(pen, title)
    names = sorted(curves, key=lambda name: -ap[name])
    shown = names if len(names) <= MAX_CLASSES else [*names[:SHOWN], *names[-SHOWN:]]
    lines = [(name, ap[name], curves[name], color, 2) for name, color in zip(shown, COLORS)]
    if len(names) > 1:
        mean = f"mean of {len(names)} classes", sum(ap.values()) / len(ap), mean_curve(curves), BLACK, 3
        lines.insert(0, mean)
    for _, _, (precision, recall, *_), color, width in reversed(lines):
        if len(recall):
            points = zip(np.append(0.0, recall), np.append(precision[0], precision))
            pen.line([_place(*point) for point in points], fill=color, width=width * SCALE, joint="curve")
    _legend(pen, [(name, value, color, width) for name, value, _, color, width in lines], len(names) > len(shown))
    return F.pil_to_tensor(image.resize(SIZE, Image.Resampling.BOX))


def mean_curve(curves: Mapping[str, Curve]) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) [101]: the mean over classes of the highest precision at a recall or above it, 0 where a
    class does not reach it."""
    total = np.zeros(len(LEVELS))
    for precision, recall, *_ in curves.values():
        highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        total += highest[np.searchsorted(recall, LEVELS - 1e-9)]
    return total / len(curves), LEVELS


def _place(recall, precision):
    left, top, right, bottom = PLOT
    return (left + recall * (right - left)) * SCALE, (bottom - precision * (bottom - top)) * SCALE


def _axes(pen, title):
    for tick in np.linspace(0, 1, 6):
        for ends in (((tick, 0), (tick, 1)), ((0, tick), (1, tick))):
            pen.line([_place(*end) for end in ends], fill=LIGHT, width=SCALE)
        (x, bottom), (left, y) = _place(tick, 0), _place(0, tick)
        _write(pen, (x, bottom + 8 * SCALE), f"{tick:.1f}", GRAY, "mt")
        _write(pen, (left - 8 * SCALE, y), f"{tick:.1f}", GRAY, "rm")
    pen.rectangle([*_place(0, 1), *_place(1, 0)], outline=GRAY, width=SCALE)
    (middle, bottom), (left, top) = _place(0.5, 0), _place(0, 1)
    _write(pen, (middle, bottom + 28 * SCALE), "recall", BLACK, "mt")
    _write(pen, (left - 30 * SCALE, top - 12 * SCALE), "precision", BLACK, "ls")
    _write(pen, (middle, 12 * SCALE), title, BLACK, "mt")


def _legend(pen, lines, has_gap):
    """The lines' names and AP; `has_gap`: classes in the middle are left out."""
    left, right, top = PLOT[2] + 24, SIZE[0] - 16, PLOT[1]
    _write(pen, (right * SCALE, (top - 12) * SCALE), "AP", BLACK, "rs")
    for row, (name, value, color, width) in enumerate(lines):
        y = (top + (row + 0.5 + (has_gap and row > SHOWN)) * LEGEND_ROW) * SCALE
        pen.line([(left * SCALE, y), ((left + LEGEND_LINE) * SCALE, y)], fill=color, width=width * SCALE)
        room = (right - left - LEGEND_LINE - 64) * SCALE
        _write(pen, ((left + LEGEND_LINE + 8) * SCALE, y), name, BLACK, "lm", room)
        _write(pen, (right * SCALE, y), f"{value:.3f}", BLACK, "rm")
    if has_gap:
        _write(pen, ((left + LEGEND_LINE + 8) * SCALE, (top + (SHOWN + 1.5) * LEGEND_ROW) * SCALE), "...", GRAY, "lm")


def _write(pen, place, text, color, anchor, room=None):
    """Write `text`, cut off at its end where it is longer than `room` pixels."""
    text, font = fonts.fitting(text, TEXT * SCALE)
    if room and font.getlength(text) > room:
        while text and font.getlength(f"{text}...") > room:
            text = text[:-1]
        text = f"{text}..."
    pen.text(place, text, fill=color, font=font, anchor=anchor)
