"""Heatmaps against plain loops, radii against the rule they follow, peaks and gathering."""

import math

import pytest
import torch

from ops import heatmaps


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def plain_draw_gaussian(centers, radii, map_index, num_maps, size):
    """One object after the other, one cell after the other."""
    out = torch.zeros(num_maps, *size)
    for (x, y), radius, number in zip(centers.tolist(), radii.long().tolist(), map_index.tolist()):
        sigma = (2 * radius + 1) / 6
        for row in range(max(0, y - radius), min(size[0], y + radius + 1)):
            for column in range(max(0, x - radius), min(size[1], x + radius + 1)):
                value = math.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * sigma**2))
                out[number, row, column] = max(out[number, row, column].item(), value)
    return out


def test_gaussians_equal_plain_loops(random):
    size, objects = (17, 23), 60
    columns, rows = (torch.randint(-3, side + 3, (objects,), generator=random) for side in (size[1], size[0]))
    centers = torch.stack([columns, rows], dim=1)  # some outside the map
    radii = 6 * torch.rand(objects, generator=random)
    map_index = torch.randint(5, (objects,), generator=random)
    result = heatmaps.draw_gaussian(centers, radii, map_index, 6, size)
    torch.testing.assert_close(result, plain_draw_gaussian(centers, radii, map_index, 6, size))
    assert result.shape == (6, *size) and (result[5] == 0).all()
    inside = (centers >= 0).all(1) & (columns < size[1]) & (rows < size[0])
    assert (result[map_index[inside], rows[inside], columns[inside]] == 1).all() and 20 < inside.sum() < objects


def test_gaussians_of_no_object_and_of_radius_zero():
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = heatmaps.draw_gaussian(nothing.view(0, 2), nothing.float(), nothing, 3, (4, 5))
    assert empty.shape == (3, 4, 5) and not empty.any()
    one = heatmaps.draw_gaussian(torch.tensor([[2, 1]]), torch.tensor([0.9]), torch.tensor([1]), 2, (4, 5))
    assert one.sum() == 1 and one[1, 1, 2] == 1


@pytest.mark.parametrize("overlap", [0.1, 0.3, 0.7, 0.95])
def test_radii_are_the_minimum_over_three_cases(random, overlap):
    """a r^2 + b r + c = 0 for one corner moved in and one out, for both in, for both out; published: (b + root) / 2."""
    height, width = 60 * torch.rand(2, 200, generator=random, dtype=torch.float64)
    total, area = height + width, height * width
    cases = [(1, total, area * (1 - overlap) / (1 + overlap)), (4, 2 * total, area * (1 - overlap))]
    cases += [(4 * overlap, -2 * overlap * total, -area * (1 - overlap))]
    expected = torch.stack([(b + (b * b - 4 * a * c).sqrt()) / 2 for a, b, c in cases]).amin(0)
    torch.testing.assert_close(heatmaps.gaussian_radius(height, width, overlap), expected)


def test_radii_of_squares():
    """10 cells with an overlap of 0.7: (-28 + sqrt(28 ** 2 + 4 * 2.8 * 30)) / 2."""
    sides = torch.tensor([10.0, 0.0, 3.0])
    result = heatmaps.gaussian_radius(sides, sides)
    assert result[0].item() == pytest.approx((-28 + math.sqrt(1120)) / 2, rel=1e-6)
    assert result[1] == 0
    torch.testing.assert_close(result[2], 0.3 * result[0])  # a length scales as the box does


def test_cells_in_boxes_equal_slices(random):
    size = (9, 14)
    low = 20 * torch.rand(30, 2, generator=random) - 4
    boxes = torch.cat([low, low + 5 * torch.rand(30, 2, generator=random)], 1)
    boxes[0] = torch.tensor([-5.0, -5, 50, 50])
    map_index = torch.arange(30) % 4
    expected = torch.zeros(5, *size, dtype=torch.bool)
    for (x1, y1, x2, y2), number in zip(boxes.tolist(), map_index.tolist()):
        rows = slice(max(0, math.floor(y1)), max(0, math.ceil(y2)))
        expected[number, rows, max(0, math.floor(x1)) : max(0, math.ceil(x2))] = True
    result = heatmaps.cells_in_boxes(boxes, map_index, 5, size)
    torch.testing.assert_close(result, expected)
    assert result[0].all() and not result[4].any() and not result[3].all()
    assert not heatmaps.cells_in_boxes(boxes[:0], map_index[:0], 2, size).any()


@pytest.mark.parametrize("suppress", [True, False])
def test_peaks_equal_plain_loops(random, suppress):
    hm = torch.rand(2, 3, 8, 9, generator=random)
    scores, labels, index = heatmaps.topk_peaks(hm, 7, suppress)
    assert scores.shape == labels.shape == index.shape == (2, 7)
    for image in range(2):
        peaks = []
        for k in range(3):
            for y in range(8):
                for x in range(9):
                    around = hm[image, k, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                    if not suppress or hm[image, k, y, x] == around.max():
                        peaks.append((hm[image, k, y, x].item(), k, y * 9 + x))
        peaks = sorted(peaks, reverse=True)[:7]
        expected = [list(column) for column in zip(*peaks)]
        torch.testing.assert_close(scores[image], torch.tensor(expected[0]))
        assert [labels[image].tolist(), index[image].tolist()] == expected[1:]


def test_no_more_peaks_than_values():
    scores, labels, index = heatmaps.topk_peaks(torch.rand(1, 2, 2, 2), 100, suppress=False)
    assert scores.shape == (1, 8) and (scores.diff() <= 0).all()
    assert sorted((labels * 4 + index)[0].tolist()) == list(range(8))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gather_cells(random, layout):
    maps = torch.rand(2, 3, 4, 5, generator=random).to(memory_format=layout).requires_grad_()
    index = torch.tensor([[0, 19, 7, 7], [3, 3, 3, 18]])
    result = heatmaps.gather_cells(maps, index)
    expected = torch.stack([maps[b, :, index[b] // 5, index[b] % 5].T for b in range(2)])
    torch.testing.assert_close(result, expected)
    (slope,) = torch.autograd.grad(result.sum(), maps)
    assert slope.sum() == 24 and slope[1, 0, 0, 3] == 3 and slope[0, 2, 1, 2] == 2
