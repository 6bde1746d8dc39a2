"""3D boxes, radar points and velocities are drawn where they are."""

import math

import pytest
import torch

from ops.geometry import corners
from visualize import draw2d, draw3d

CALIB = torch.tensor([[1260.0, 0, 800, 0], [0, 1260, 450, 0], [0, 0, 1, 0]])
NOTHING = {"corners": torch.zeros(0, 8, 3), "center": torch.zeros(0, 3), "velocity": torch.zeros(0, 3)}


def make_boxes(x, z, velocity=(0.0, 0.0, 0.0), length=4.0, width=2.0):
    """One box at (x, 0, z), heading along z."""
    boxes = {"center": torch.tensor([[x, 0.0, z]]), "dims": torch.tensor([[2.0, width, length]])}
    boxes |= {"yaw": torch.tensor([-math.pi / 2]), "velocity": torch.tensor([velocity])}
    boxes |= {"labels": torch.tensor([0]), "scores": torch.tensor([0.8])}
    return boxes | {"corners": corners(boxes["center"], boxes["dims"], boxes["yaw"])}


def make_target(camera="CAM_FRONT", rotation=None, **boxes):
    rotation = torch.eye(3, dtype=torch.float64) if rotation is None else rotation
    target = {"camera": camera, "calib": CALIB, "affine": torch.tensor([[0.5, 0, 0], [0, 0.5, 0]])}
    target |= {"rotation": rotation, "translation": torch.zeros(3, dtype=torch.float64)}
    return target | {"radar": torch.tensor([[-5.0, 0, 20, 0, 0]])} | boxes


def extent(image, color):
    """(top, bottom, left, right) of the pixels of a color."""
    rows, columns = torch.where((image == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all(0))
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


@pytest.fixture
def no_legend(monkeypatch):
    monkeypatch.setattr(draw3d, "LEGEND", [])


def test_birds_eye_view_of_boxes_arrows_and_radar(no_legend):
    truth, found = make_boxes(0.0, 30.0, (math.nan,) * 3), make_boxes(15.0, 30.0, (0.0, 0.0, 10.0))
    image = draw3d.draw_birds_eye(truth, found, torch.tensor([[-15.0, 0, 30, 0, 5]]), max_distance=60, side=480)
    assert image.shape == (3, 480, 480) and image.dtype == torch.uint8
    # 2 m wide at 8 pixels per meter, around the middle
    assert extent(image, draw3d.GREEN)[2:] == pytest.approx((232, 248), abs=1)
    top, bottom, left, right = extent(image, draw3d.ORANGE)
    assert left >= 352 and right <= 368 and 155 <= top <= 161  # the arrow ends 10 m ahead
    assert bottom <= 256
    assert extent(image, draw3d.BLUE)[0] <= 200 + 2 and extent(image, draw3d.BLUE)[3] <= 122 + 1


def test_a_birds_eye_view_around_the_camera_shows_what_is_behind_it(no_legend):
    points = torch.tensor([[0.0, 0, -30, 0, 0]])
    image = draw3d.draw_birds_eye(NOTHING, NOTHING, points, max_distance=60, side=480, center="CAM_FRONT")
    top, bottom, left, right = extent(image, draw3d.BLUE)
    assert top <= 360 <= bottom and left <= 240 <= right
    image = draw3d.draw_birds_eye(NOTHING, NOTHING, points, max_distance=60, side=480)
    assert not (image == torch.tensor(draw3d.BLUE, dtype=torch.uint8)[:, None, None]).all(0).any()


def test_the_legend_has_the_colors_of_what_it_names():
    image = draw3d.draw_birds_eye(NOTHING, NOTHING, torch.zeros(0, 5), side=1600)
    tops = [extent(image, color)[0] for color in (draw3d.GREEN, draw3d.ORANGE, draw3d.BLUE)]
    assert tops == sorted(tops) and tops[-1] < 120


def test_a_camera_image_has_boxes_and_radar_and_no_edges_from_behind():
    image = torch.full((3, 100, 200), 255, dtype=torch.uint8)
    pixels = torch.tensor([[(80.0, 40), (120, 40), (120, 60), (80, 60), (90, 45), (110, 45), (110, 55), (90, 55)]])
    depth, labels, nothing = torch.full((1, 8), 10.0), torch.tensor([0]), torch.zeros(0)
    drawn = draw3d.draw_camera(image, pixels, depth, labels, nothing.view(0, 2), nothing)
    assert drawn.shape == image.shape
    assert extent(drawn, draw2d.class_color(0)) == (40, 60, 80, 120)
    behind = draw3d.draw_camera(image, pixels, -depth, labels, nothing.view(0, 2), nothing)
    assert torch.equal(behind, image)
    points, distances = torch.tensor([[50.0, 50]]), torch.tensor([5.0])
    dots = draw3d.draw_camera(image, pixels, -depth, labels, points, distances)
    rows, columns = torch.where((dots != 255).any(0))
    assert abs(rows.float().mean() - 50) < 1 and abs(columns.float().mean() - 50) < 1
    pillars = draw3d.draw_camera(image, pixels, -depth, labels, points, distances, tops=torch.tensor([[50.0, 20]]))
    assert (pillars[:, 25, 50] != 255).any() and (dots[:, 25, 50] == 255).all()


def test_far_boxes_have_no_text_and_boxes_partly_behind_the_camera_have():
    pixels = torch.tensor([[[10.0, 10], [20, 40]] * 4, [[10.0, 10], [20, 14]] * 4])
    in_front, labels = torch.tensor([[True] * 4 + [False] * 4, [True] * 8]), torch.tensor([0, 1])
    texts = draw3d._labels(pixels, in_front, labels, ["car", "cone"], min_height=8)
    assert texts == ([[10.0, 10.0, 20.0, 40.0]], ["car"], [draw2d.class_color(0)])
    assert draw3d._labels(pixels, in_front & False, labels, ["car", "cone"], min_height=8) == ([], [], [])


def test_truth_is_above_the_predictions_that_reach_the_threshold():
    image = torch.full((3, 450, 800), 255, dtype=torch.uint8)
    sample = image, make_target(**make_boxes(0.0, 20.0)), make_boxes(3.0, 20.0)
    (name, views), (_, above) = draw3d.truth_and_predictions([sample])
    assert name == "truth above, predictions below/0" and views.shape == (3, 900, 800) and above.shape == (3, 480, 480)
    truth, predicted = (extent(view, draw2d.class_color(0)) for view in views.split(450, dim=1))
    assert truth[2] < 400 < truth[3] and predicted[2] > 400
    (_, views), _ = draw3d.truth_and_predictions([sample], threshold=0.9)
    assert not (views[:, 450:] == torch.tensor(draw2d.class_color(0), dtype=torch.uint8)[:, None, None]).all(0).any()


def test_a_key_frame_has_the_boxes_of_all_cameras_in_one_birds_eye_view(monkeypatch):
    """A camera that looks to the right: what is ahead of it is right of the first camera."""
    monkeypatch.setattr(draw3d, "LEGEND", [])
    right = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)
    image = torch.full((3, 900, 1600), 255, dtype=torch.uint8)
    samples = [(image, make_target()), (image, make_target("CAM_FRONT_RIGHT", right))]
    nothing = {name: value[:0] for name, value in make_boxes(0.0, 0.0).items()}
    box = make_boxes(0.0, 30.0, (0.0, 0.0, 5.0))
    drawn = draw3d.draw_key_frame(samples, [nothing] * 2, [nothing, box], ["car"])
    assert drawn.shape == (3, 906, 3 * 806 + 906)
    top, bottom, left, right = extent(drawn[:, :, 3 * 806 :], draw3d.ORANGE)
    assert (top, bottom) == pytest.approx((453 - 7.5, 453 + 7.5), abs=3)  # 7.5 pixels per meter
    assert (left, right) == pytest.approx((453 + 28 * 7.5, 453 + 35 * 7.5), abs=3)  # from the box to the arrow's end
    assert (drawn[:, 300:600, 2 * 806 :][:, :, :800] != 255).any()  # the box in the image of the second camera


def test_an_overview_has_each_camera_in_its_place():
    views = {"CAM_FRONT": torch.full((3, 9, 16), 10), "CAM_BACK_RIGHT": torch.full((3, 9, 16), 20)}
    views = {name: view.to(torch.uint8) for name, view in views.items()}
    drawn = draw3d.overview(views, torch.full((3, 30, 30), 30, dtype=torch.uint8))
    (height, width), gap = draw3d.CAMERA_SIZE, draw3d.GAP
    assert drawn.shape == (3, 2 * height + gap, 3 * (width + gap) + 2 * height + gap)
    center = height // 2, width // 2
    assert drawn[0, center[0], width + gap + center[1]] == 10
    assert drawn[0, height + gap + center[0], 2 * (width + gap) + center[1]] == 20
    assert drawn[0, center[0], center[1]] == 255 and drawn[0, height, -height] == 30
