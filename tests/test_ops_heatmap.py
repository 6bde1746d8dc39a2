"""Heatmaps against plain loops, radii against the rule they follow, peaks and gathering."""

import math

import pytest
import torch

from ops import heatmap


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def plain_splat(centers, radii, where, maps, size):
    """One object after the other, one cell after the other."""
    out = torch.zeros(maps, *size)
    for (x, y), reach, number in zip(centers.tolist(), radii.long().tolist(), where.tolist()):
        sigma = (2 * reach + 1) / 6
        for row in range(max(0, y - reach), min(size[0], y + reach + 1)):
            for column in range(max(0, x - reach), min(size[1], x + reach + 1)):
                value = math.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * sigma**2))
                out[number, row, column] = max(out[number, row, column].item(), value)
    return out


def test_splat_equals_a_plain_loop(random):
    size, objects = (17, 23), 60
    columns, rows = (torch.randint(-3, side + 3, (objects,), generator=random) for side in (size[1], size[0]))
    centers = torch.stack([columns, rows], dim=1)  # some off the map, whose peaks reach into it
    radii = 6 * torch.rand(objects, generator=random)
    where = torch.randint(5, (objects,), generator=random)
    found = heatmap.splat(centers, radii, where, 6, size)
    torch.testing.assert_close(found, plain_splat(centers, radii, where, 6, size))
    assert found.shape == (6, *size) and (found[5] == 0).all()
    inside = (centers >= 0).all(1) & (columns < size[1]) & (rows < size[0])
    assert (found[where[inside], rows[inside], columns[inside]] == 1).all() and 20 < inside.sum() < objects


def test_splat_of_nothing_and_of_radius_zero():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert (heatmap.splat(nothing.view(0, 2), nothing.float(), nothing, 3, (4, 5)) == torch.zeros(3, 4, 5)).all()
    one = heatmap.splat(torch.tensor([[2, 1]]), torch.tensor([0.9]), torch.tensor([1]), 2, (4, 5))
    assert one.sum() == 1 and one[1, 1, 2] == 1


def overlap_of(a, b):
    shared = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
    shared = shared.clamp(min=0).prod()
    return (shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)).item()


@pytest.mark.parametrize(("height", "width"), [(10.0, 10.0), (3.0, 40.0), (112.0, 200.0)])
@pytest.mark.parametrize("overlap", [0.3, 0.7])
def test_the_exact_radius_keeps_the_overlap(height, width, overlap):
    r = heatmap.radius(torch.tensor(height), torch.tensor(width), overlap, "exact").item()
    true = torch.tensor([0, 0, width, height], dtype=torch.float64)
    shifts = torch.tensor([[r, r, r, r], [-r, -r, r, r], [r, r, -r, -r]], dtype=torch.float64)
    worst = min(overlap_of(true, true + shift) for shift in shifts)
    assert worst == pytest.approx(overlap, abs=1e-5)


def test_published_radii():
    """By hand for a square of 10 cells: (-28 + sqrt(28 ** 2 + 4 * 2.8 * 30)) / 2, the smallest of the three."""
    sides = torch.tensor([10.0, 0.0, 3.0])
    found = heatmap.radius(sides, sides)
    assert found[0].item() == pytest.approx((-28 + math.sqrt(1120)) / 2, rel=1e-6)
    assert found[1] == 0
    torch.testing.assert_close(found[2], 0.3 * found[0])  # a length scales as the box does
    assert (heatmap.radius(sides, sides, roots="exact")[::2] < found[::2]).all()
    with pytest.raises(KeyError):
        heatmap.radius(sides, sides, roots="none")


def test_cover_equals_slices(random):
    size = (9, 14)
    low = 20 * torch.rand(30, 2, generator=random) - 4
    boxes = torch.cat([low, low + 5 * torch.rand(30, 2, generator=random)], 1)
    boxes[0] = torch.tensor([-5.0, -5, 50, 50])
    where = torch.arange(30) % 4
    expected = torch.zeros(5, *size, dtype=torch.bool)
    for (x1, y1, x2, y2), number in zip(boxes.tolist(), where.tolist()):
        rows = slice(max(0, math.floor(y1)), max(0, math.ceil(y2)))
        expected[number, rows, max(0, math.floor(x1)) : max(0, math.ceil(x2))] = True
    found = heatmap.cover(boxes, where, 5, size)
    torch.testing.assert_close(found, expected)
    assert found[0].all() and not found[4].any() and not found[3].all()
    assert not heatmap.cover(boxes[:0], where[:0], 2, size).any()


@pytest.mark.parametrize("suppress", [True, False])
def test_peaks_equal_a_plain_search(random, suppress):
    hm = torch.rand(2, 3, 8, 9, generator=random)
    scores, labels, index = heatmap.peaks(hm, 7, suppress)
    assert scores.shape == labels.shape == index.shape == (2, 7)
    for picture in range(2):
        found = []
        for k in range(3):
            for y in range(8):
                for x in range(9):
                    around = hm[picture, k, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                    if not suppress or hm[picture, k, y, x] == around.max():
                        found.append((hm[picture, k, y, x].item(), k, y * 9 + x))
        found = sorted(found, reverse=True)[:7]
        expected = [list(column) for column in zip(*found)]
        torch.testing.assert_close(scores[picture], torch.tensor(expected[0]))
        assert [labels[picture].tolist(), index[picture].tolist()] == expected[1:]


def test_no_more_peaks_than_values():
    scores, labels, index = heatmap.peaks(torch.rand(1, 2, 2, 2), 100, suppress=False)
    assert scores.shape == (1, 8) and (scores.diff() <= 0).all()
    assert sorted((labels * 4 + index)[0].tolist()) == list(range(8))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gather(random, layout):
    maps = torch.rand(2, 3, 4, 5, generator=random).to(memory_format=layout).requires_grad_()
    index = torch.tensor([[0, 19, 7, 7], [3, 3, 3, 18]])
    found = heatmap.gather(maps, index)
    expected = torch.stack([maps[b, :, index[b] // 5, index[b] % 5].T for b in range(2)])
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.sum(), maps)
    assert slope.sum() == 24 and slope[1, 0, 0, 3] == 3 and slope[0, 2, 1, 2] == 2
