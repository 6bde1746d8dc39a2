"""The files that several evaluators write: confusion.csv, pr_curves.csv and pr_curves.png."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import files

BINS = 100  # of recall, see `thinned`
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # precision, recall, scores, see Evaluator.curves
Draw = Callable[[Mapping[str, Curve], Mapping[str, float], str], torch.Tensor]


def write_confusion(folder: Path, table: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Write a confusion matrix of K classes and background, int [K+1,K+1]; returns the names of the files."""
    names = [*classes, "background"]
    rows = [[name, *counts] for name, counts in zip(names, table.tolist(), strict=True)]
    files.write_csv(Path(folder) / "confusion.csv", [["truth / detection", *names], *rows])
    return ["confusion.csv"]


def write_curves(
    folder: Path, curves: Mapping[str, Curve], ap: Mapping[str, float], title: str, draw: Draw | None = None
) -> list[str]:
    """Write pr_curves.csv, at most 2 * (BINS + 1) points per class, and pr_curves.png; returns the names of the files.

    ap     AP of each class that has a curve
    draw   draw(curves, ap, title) -> uint8 [3,H,W]; None: no image
    """
    curves = {name: tuple(values[thinned(curve[1])] for values in curve) for name, curve in curves.items()}
    rows = [["class", "recall", "precision", "score"]]
    for name, (precision, recall, scores) in curves.items():
        points = zip(recall.tolist(), precision.tolist(), scores.tolist(), strict=True)
        rows += [[name, *(f"{value:.6g}" for value in point)] for point in points]
    files.write_csv(Path(folder) / "pr_curves.csv", rows)
    if draw is None:
        return ["pr_curves.csv"]
    image = Image.fromarray(draw(curves, ap, title).permute(1, 2, 0).numpy())
    files.write(Path(folder) / "pr_curves.png", lambda file: image.save(file, "PNG"))
    return ["pr_curves.csv", "pr_curves.png"]


def thinned(recall: np.ndarray) -> np.ndarray:
    """Indices of the points to keep of a curve with rising recall [N]: of each hundredth of recall the first and the
    last. A line through them is nowhere farther than that from the curve's own recall."""
    if not len(recall):
        return np.zeros(0, np.int64)
    first = np.flatnonzero(np.diff(np.floor(recall * BINS), prepend=-1))
    return np.union1d(first, np.append(first[1:] - 1, len(recall) - 1))
