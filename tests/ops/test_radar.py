"""Pillars and frustum association against plain loops over points and boxes."""

import math

import pytest
import torch

from ops import radar
from ops.geometry import alpha_to_yaw, corners
from ops.rotation import decode

CALIB = torch.tensor([[1266.0, 0, 816, 0], [0, 1266, 491, 0], [0, 0, 1, 0]])
AFFINE = torch.tensor([[0.5, 0, 0], [0, 0.5, -1]])
SIZE = (28, 50)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_points(count):
    z = torch.rand(count) * 55 + 3
    return torch.stack([(torch.rand(count) - 0.5) * 1.5 * z, torch.rand(count) * 2, z, *torch.randn(2, count)], 1)


def random_map(images, points):
    """Radar maps [images,3,h,w] with runs of several rows, as pillars have, and single cells; some overlap."""
    radar_map = torch.zeros(images, 3, *SIZE)
    for image in radar_map:
        for _ in range(points):
            row, column = int(torch.randint(SIZE[0], ())), int(torch.randint(SIZE[1], ()))
            value = torch.stack([torch.rand(()) * 50 + 0.5, *torch.randn(2)])
            height = int(torch.randint(1, 6, ()))
            image[:, max(0, row - height) : row + 1, column : column + 2] = value[:, None, None]
    return radar_map


def random_boxes(images, count):
    """Boxes [images,count] as `associate` and `depth_tolerance` take them; some extend beyond the map or are empty."""
    center = torch.rand(images, count, 2) * torch.tensor([SIZE[1] + 8.0, SIZE[0] + 8]) - 4
    half = torch.rand(images, count, 2) * torch.tensor([10.0, 8]) * (torch.rand(images, count, 1) > 0.1)
    return {
        "boxes": torch.cat([center - half, center + half], -1),
        "depth": torch.rand(images, count) * 55,
        "dims": torch.rand(images, count, 3) * 6,
        "alpha": torch.rand(images, count) * 6.2 - 3.1,
        "x": center[..., 0],
        "calib": CALIB.repeat(images, 1, 1),
    }


def associate(radar_map, boxes, depth, dims, alpha, x, calib, threshold="published", **options):
    tolerance = radar.depth_tolerance(dims, alpha, x, calib, threshold)
    return radar.associate(radar_map, boxes, depth, tolerance, **options)


def plain_associate(radar_map, boxes, depth, dims, alpha, x, calib, threshold="published", area=0.3, max_distance=60.0):
    result = torch.zeros_like(radar_map)
    height, width = radar_map.shape[-2:]
    for b, n in torch.cartesian_prod(torch.arange(len(boxes)), torch.arange(boxes.shape[1])).tolist():
        x1, y1, x2, y2 = boxes[b, n].tolist()
        yaw = float(alpha[b, n]) + math.atan2(float(x[b, n] - calib[b, 0, 2]), float(calib[b, 0, 0]))
        z = corners(torch.zeros(3), dims[b, n], torch.tensor(yaw))[:, 2]
        tolerance = float(z.max() - z.min() / 2 if threshold == "published" else (z.max() - z.min()) / 2)
        rows = slice(max(0, math.floor(y1)), max(0, math.ceil(y2) + 1))
        columns = slice(max(0, math.floor(x1)), max(0, math.ceil(x2) + 1))
        returns = radar_map[b, :, rows, columns].flatten(1)
        d = float(depth[b, n])
        returns = returns[:, (returns[0] > max(0, d - tolerance)) & (returns[0] < d + tolerance)]
        if not returns.shape[1]:
            continue
        value = returns[:, returns[0].argmin()] / torch.tensor([max_distance, 1, 1])
        cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * area / 2, (y2 - y1) * area / 2
        for row in range(max(0, int(cy - h)), min(height, int(cy + h) + 1)):
            for column in range(max(0, int(cx - w)), min(width, int(cx + w) + 2)):
                result[b, :, row, column] = value
    return result


@pytest.mark.parametrize("threshold", ["published", "paper"])
def test_association_equals_plain_loops(threshold):
    radar_map, boxes = random_map(3, 60), random_boxes(3, 60)
    result = associate(radar_map, **boxes, threshold=threshold)
    expected = plain_associate(radar_map, **boxes, threshold=threshold)
    assert (expected[:, 0] > 0).sum() > 200
    torch.testing.assert_close(result, expected)
    other = associate(radar_map, **boxes, threshold="paper" if threshold == "published" else "published")
    assert not torch.equal(result, other)


def test_a_return_right_before_the_camera_is_associated():
    radar_map = torch.zeros(1, 3, 8, 8)
    radar_map[0, :, 4, 4] = torch.tensor([0.5, 1, 2])
    box, depth, tolerance = torch.tensor([[[2.0, 2, 6, 6]]]), torch.tensor([[1.0]]), torch.tensor([[3.0]])
    result = radar.associate(radar_map, box, depth, tolerance, max_distance=50.0)
    torch.testing.assert_close(result[0, :, 4, 4], torch.tensor([0.01, 1, 2]))


def test_association_with_other_area_and_distance():
    radar_map, boxes = random_map(1, 60), random_boxes(1, 40)
    result = associate(radar_map, **boxes, area=0.8, max_distance=30.0)
    torch.testing.assert_close(result, plain_associate(radar_map, **boxes, area=0.8, max_distance=30.0))


def test_association_of_a_batch_equals_single_images():
    """Also if one image has no return, and with padding."""
    radar_map, boxes = random_map(3, 40), random_boxes(3, 30)
    radar_map[1] = 0
    batch = associate(radar_map, **boxes)
    for i in range(3):
        single = associate(radar_map[i : i + 1], **{name: value[i : i + 1] for name, value in boxes.items()})
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=0)
    assert batch[0].any() and not batch[1].any()
    valid = torch.arange(30).expand(3, -1) < 12
    first = associate(radar_map, **{name: v if name == "calib" else v[:, :12] for name, v in boxes.items()})
    torch.testing.assert_close(associate(radar_map, **boxes, valid=valid), first, rtol=0, atol=0)


def test_association_without_boxes_or_returns():
    radar_map, boxes = random_map(2, 10), random_boxes(2, 5)
    none = {name: value if name == "calib" else value[:, :0] for name, value in boxes.items()}
    assert not associate(radar_map, **none).any()
    assert not associate(torch.zeros_like(radar_map), **boxes).any()
    assert associate(radar_map, **none).shape == radar_map.shape


def one_box(depth=10.0):
    """A box in the middle of the map, 2 m long and wide, seen along z: its half extent is 1 m, its tolerance 1.5 m."""
    return {
        "boxes": torch.tensor([[[10.0, 8, 20, 18]]]),
        "depth": torch.tensor([[depth]]),
        "dims": torch.tensor([[[1.5, 2.0, 2.0]]]),
        "alpha": torch.tensor([[0.0]]),
        "x": torch.tensor([[816.0]]),  # straight ahead if it were in pixels
        "calib": CALIB[None],
    }


def test_the_nearest_return_within_the_tolerance():
    radar_map = torch.zeros(1, 3, *SIZE)
    for column, depth in enumerate([8.4, 8.6, 9.5, 11.4], 12):
        radar_map[0, :, 10, column] = torch.tensor([depth, depth / 10, -depth])
    result = associate(radar_map, **one_box())
    torch.testing.assert_close(result[0, :, 13, 15], torch.tensor([8.6 / 60, 0.86, -8.6]))
    result = associate(radar_map, **one_box(), threshold="paper")
    torch.testing.assert_close(result[0, :, 13, 15], torch.tensor([9.5 / 60, 0.95, -9.5]))
    rows, columns = result[0, 0].nonzero().unbind(1)  # 11.5 to 14.5, 13.5 to 16.5 and one more column
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 14, 13, 17)
    assert not associate(radar_map, **one_box(depth=20.0)).any()


@pytest.mark.parametrize("best_last", [False, True])
def test_association_with_the_highest_peaks_not_suppressed(best_last):
    radar_map = random_map(2, 80)
    channels = {"hm": 3, "wh": 2, "dep": 1, "rot": 8, "dim": 3}
    outputs = {name: torch.randn(2, count, *SIZE) for name, count in channels.items()}
    outputs["wh"] = outputs["wh"] * 4 + 6
    outputs["dep"] -= 3
    outputs["dim"] += 3
    result = radar.associate_peaks(outputs, radar_map, CALIB.expand(2, 3, 4), count=20, best_last=best_last)
    order = outputs["hm"].flatten(1).argsort(descending=True)[:, :20] % (SIZE[0] * SIZE[1])
    order = order.flip(1) if best_last else order
    at = {name: torch.stack([v.flatten(1)[:, i].T for v, i in zip(outputs[name], order)]) for name in channels}
    center = torch.stack([order % SIZE[1], order // SIZE[1]], -1) + 0.5
    half = at["wh"].clamp(min=0) / 2
    expected = plain_associate(
        radar_map,
        torch.cat([center - half, center + half], -1),
        1 / (at["dep"][..., 0].sigmoid() + 1e-6) - 1,
        at["dim"],
        decode(at["rot"]),
        center[..., 0],
        CALIB.expand(2, 3, 4),
        area=0.15 if best_last else 0.3,
    )
    assert expected.any(1).sum() > 30
    torch.testing.assert_close(result, expected)


def test_depth_tolerance_is_that_of_the_corners():
    boxes = random_boxes(2, 30)
    dims, alpha, x, calib = (boxes[name] for name in ("dims", "alpha", "x", "calib"))
    z = corners(torch.zeros_like(dims), dims, alpha_to_yaw(alpha, x, calib))[..., 2]
    paper, published = (radar.depth_tolerance(dims, alpha, x, calib, name) for name in ("paper", "published"))
    torch.testing.assert_close(paper, (z.amax(-1) - z.amin(-1)) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(published, z.amax(-1) - z.amin(-1) / 2, rtol=1e-4, atol=1e-4)


def plain_pillars(points, size, dims):
    result = torch.zeros(3, *size)
    for x, y, z, vx, vz in sorted(points.tolist(), key=lambda point: -point[2]):
        if z <= 0:
            continue
        pixels = [
            (1266 * (x + i * dims[2] / 2) / (z + j * dims[1] / 2) + 816, 1266 * (y + k) / (z + j * dims[1] / 2) + 491)
            for i in (-1, 1)
            for j in (-1, 1)
            for k in (0, -dims[0])
        ]
        columns, rows = [u * 0.5 / 4 for u, _ in pixels], [(v * 0.5 - 1) / 4 for _, v in pixels]
        width, height = max(columns) - min(columns), max(rows) - min(rows)
        cx, cy = (1266 * x / z + 816) * 0.5 / 4, ((1266 * y / z + 491) * 0.5 - 1) / 4
        if not (0 <= cx < size[1] and 0 <= cy < size[0]):
            continue
        for row in range(max(0, round(cy - height)), min(size[0], round(cy))):
            for column in range(max(0, round(cx - width / 2)), min(size[1], round(cx + width / 2))):
                result[:, row, column] = torch.tensor([z, vx, vz])
    return result


@pytest.mark.parametrize("dims", [(1.5, 0.2, 0.2), (1.0, 0.5, 2.0)])
def test_pillars_equal_plain_loops(dims):
    points = torch.cat([random_points(150), -random_points(20)])
    result = radar.pillar_map(points, CALIB, AFFINE, dims=dims)
    expected = plain_pillars(points, (112, 200), dims)
    assert result.shape == (3, 112, 200) and (expected[0] > 0).sum() > 500
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def test_a_pillar_is_on_its_point_and_nearer_ones_overwrite_farther_ones():
    far, near = [0.0, 1.0, 20.0, 3.0, 4.0], [0.0, 1.0, 10.0, 1.0, 2.0]
    result = radar.pillar_map(torch.tensor([near, far]), CALIB, AFFINE)
    rows, columns = (result[0] == 10).nonzero().unbind(1)
    foot, height = ((1266 * 1.0 / 10 + 491) / 2 - 1) / 4, 1.5 * 1266 / 9.9 / 8
    assert (int(rows.max()) + 1, int(rows.min())) == (round(foot), round(foot - height))
    assert columns.float().mean().sub(816 / 8).abs() < 1
    torch.testing.assert_close(result[:, rows[0], columns[0]], torch.tensor([10.0, 1, 2]))
    torch.testing.assert_close(result, radar.pillar_map(torch.tensor([far, near]), CALIB, AFFINE), rtol=0, atol=0)
    alone = radar.pillar_map(torch.tensor([far]), CALIB, AFFINE)
    assert (alone[0] == 20).sum() > (result[0] == 20).sum()


def test_no_pillars_without_visible_points():
    hidden = torch.tensor([[0.0, 1, -10, 0, 0], [30, 1, 10, 0, 0], [0, 30, 10, 0, 0]])
    for points in (torch.zeros(0, 5), hidden):
        result = radar.pillar_map(points, CALIB, AFFINE, size=SIZE)
        assert result.shape == (3, *SIZE) and not result.any()


def test_later_rectangles_cover_earlier_ones_and_are_clipped():
    areas = torch.tensor([[[-3.0, -3, 2, 2], [1, 1, 9, 9], [3, 3, 3, 8], [7, 7, 2, 2]]])
    values = torch.arange(1.0, 5).reshape(1, 4, 1)
    expected = torch.tensor([[1.0, 1, 0, 0], [1, 2, 2, 2], [0, 2, 2, 2]])
    torch.testing.assert_close(radar.paint_rectangles(areas, values, (3, 4)), expected[None, None])


def test_network_inputs():
    targets = [{"radar": random_points(count), "calib": CALIB, "affine": AFFINE / 4} for count in (60, 0)]
    inputs = radar.network_inputs(targets, SIZE, dims=(1.0, 0.5, 2.0))
    torch.testing.assert_close(inputs["calib"], torch.stack([CALIB, CALIB]))
    assert inputs["radar_map"].shape == (2, 3, *SIZE)
    assert inputs["radar_map"][0].any() and not inputs["radar_map"][1].any()
    pillars = radar.pillar_map(targets[0]["radar"], CALIB, AFFINE / 4, SIZE, dims=(1.0, 0.5, 2.0))
    torch.testing.assert_close(inputs["radar_map"][0], pillars)
    assert radar.network_inputs(targets, SIZE, radar=False).keys() == {"calib"}
