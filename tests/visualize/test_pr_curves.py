"""Precision-recall curves as an image."""

import numpy as np
import pytest

from visualize import fonts, pr_curves

NOTHING = tuple(np.zeros(0) for _ in range(3))


def stairs(precision, top_recall=1.0, points=200):
    """A curve of constant precision up to a recall."""
    return np.full(points, precision), np.linspace(1 / points, top_recall, points), np.linspace(1, 0, points)


def colored(image):
    """Which pixels inside the axes are neither white nor gray: bool [h,w]."""
    left, top, right, bottom = pr_curves.PLOT
    inside = image[:, top + 2 : bottom - 2, left + 2 : right - 2].int()
    return (inside.max(0).values - inside.min(0).values) > 60


def test_a_curve_is_where_its_points_are():
    image = pr_curves.draw({"person": stairs(0.75, 0.5)}, {"person": 0.375}, "title")
    assert image.shape == (3, pr_curves.SIZE[1], pr_curves.SIZE[0])
    rows, columns = colored(image).nonzero(as_tuple=True)
    height, width = colored(image).shape
    assert rows.float().mean() / height == pytest.approx(0.25, abs=0.01)
    assert columns.max() / width == pytest.approx(0.5, abs=0.02) and columns.min() <= 1


def test_the_mean_curve():
    curves = {"a": stairs(0.8), "b": stairs(0.4, 0.5), "c": NOTHING}
    precision, recall = pr_curves.mean_curve(curves)
    assert recall[[0, 50, 51, 100]].tolist() == pytest.approx([0, 0.5, 0.51, 1])
    assert precision[[0, 50, 51, 100]].tolist() == pytest.approx([0.4, 0.4, 0.8 / 3, 0.8 / 3])


def test_of_many_classes_the_best_and_the_worst_are_named(monkeypatch):
    written = []
    monkeypatch.setattr(
        fonts, "fitting", lambda text, size, fitting=fonts.fitting: written.append(text) or fitting(text, size)
    )
    curves = {f"größe {i}": stairs(0.01 + i / 100) for i in range(80)}
    pr_curves.draw(curves, {name: values[0][0] for name, values in curves.items()})
    names = [text for text in written if text.startswith("größe")]
    assert names == [f"größe {i}" for i in (79, 78, 77, 76, 75, 4, 3, 2, 1, 0)]
    assert "mean of 80 classes" in written and "0.405" in written and "0.800" in written


def test_classes_without_a_curve_and_long_names():
    assert not colored(pr_curves.draw({}, {})).any()
    assert not colored(pr_curves.draw({"a": NOTHING}, {"a": 0.0})).any()
    long, short = (pr_curves.draw({name: NOTHING}, {name: 0.0})[:, :, -60:] for name in ("W" * 500, "W"))
    assert (long == short).all()  # the name ends before the AP
