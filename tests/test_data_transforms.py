"""Paired transforms: boxes stay on their pixels, crops obey SSD's rules, all fields of an object stay together."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from data import transforms
from data.transforms import (
    HorizontalFlip,
    PhotometricDistort,
    ZoomOrCrop,
    change_colour,
    colour_map,
    iou_crop,
    keep_objects,
)

GROUND = 40  # grey of the ground; objects have two strong channels


def picture(height, width, boxes, colours):
    """A plain ground with filled rectangles, and its target; label = row, odd rows are to be ignored."""
    image = torch.full((3, height, width), GROUND, dtype=torch.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, colours):
        image[:, y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    count = len(boxes)
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(count),
        "ignore": torch.arange(count) % 2 == 1,
        "image_id": 7,
        "size": (height, width),
    }
    return tv_tensors.Image(image), target


def rectangle_of(image, channel):
    """[x1, y1, x2, y2] of the pixels where `channel` is strong."""
    cover = (image[channel].float() - GROUND).clamp(min=0) / (255 - GROUND)
    rows, columns = cover.amax(1), cover.amax(0)
    (x1, x2), (y1, y2) = ((line > 0.5).nonzero()[:, 0][[0, -1]].tolist() for line in (columns, rows))
    return torch.tensor([x1, y1, x2 + 1, y2 + 1], dtype=torch.float32)


@pytest.mark.parametrize("shape", [(120, 160), (333, 211), (90, 400)])
@pytest.mark.parametrize(("zoom_out", "crop"), [(0, 0), (1, 0), (0, 1), (0.5, 1)])
def test_boxes_stay_on_their_pixels(shape, zoom_out, crop):
    height, width = shape
    box = [width // 3, height // 4, width // 3 + width // 4, height // 4 + height // 3]
    change = transforms.ssd_train((100, 140), (GROUND,) * 3, zoom_out=zoom_out, iou_crop=crop, colour=0)
    seen, flipped = 0, 0
    for seed in range(25):
        torch.manual_seed(seed)
        image, target = change(*picture(height, width, [box], [(255, GROUND, GROUND)]))
        assert image.dtype == torch.uint8 and image.shape == (3, 100, 140)
        if len(target["boxes"]):
            torch.testing.assert_close(rectangle_of(image, 0), torch.Tensor(target["boxes"])[0], rtol=0, atol=1.5)
            seen += 1
            flipped += target["boxes"][0, 0] + target["boxes"][0, 2] > 140
    assert seen >= 24  # the crop keeps an object
    if zoom_out == crop == 0:
        assert 5 < flipped < 20


def test_evaluation_boxes_stay_on_their_pixels_and_inside():
    change = transforms.ssd_evaluate((100, 140))
    image, target = change(*picture(333, 211, [[50, 100, 90, 200]], [(255, GROUND, GROUND)]))
    torch.testing.assert_close(rectangle_of(image, 0), torch.Tensor(target["boxes"])[0], rtol=0, atol=1.5)
    for side in range(60, 400):  # float32 puts 300 / side * side above 300 for some
        _, target = transforms.ssd_evaluate((300, 300))(*picture(side, side, [[0, 0, side, side]], [(9, 9, 9)]))
        assert (target["boxes"] <= 300).all(), side


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
GRID = [[10 + 60 * (i % 3), 10 + 60 * (i // 3), 50 + 60 * (i % 3), 50 + 60 * (i // 3)] for i in range(6)]


def test_fields_of_an_object_stay_together():
    """Each object is known by its colour: box, label and ignore must belong to it after any change."""
    change, dropped = transforms.ssd_train((128, 128), (GROUND,) * 3, colour=0), 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = change(*picture(130, 190, GRID, COLOURS))
        assert len(target["boxes"]) == len(target["labels"]) == len(target["ignore"]) > 0
        dropped += 6 - len(target["labels"])
        for box, label, ignore in zip(target["boxes"], target["labels"].tolist(), target["ignore"].tolist()):
            assert ignore == (label % 2 == 1)
            x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
            assert (image[:, y, x].int() - torch.tensor(COLOURS[label])).abs().max() < 60
        assert target["image_id"] == 7 and target["size"] == (130, 190)
    assert dropped > 60


def test_keep_objects_copies():
    target = picture(50, 60, [[0, 0, 9, 9], [1, 1, 9, 9], [2, 2, 9, 9]], COLOURS)[1]
    kept = keep_objects(target, torch.tensor([True, False, True]))
    assert kept["labels"].tolist() == [0, 2] and kept["ignore"].tolist() == [False, False]
    assert len(kept["boxes"]) == 2 and kept["size"] == (50, 60)
    assert len(target["labels"]) == 3


def test_transforms_leave_their_input_alone():
    for change in (ZoomOrCrop((50, 50)), transforms.ssd_train((50, 50), (0, 0, 0)), transforms.ssd_evaluate((50, 50))):
        image, target = picture(130, 190, GRID, COLOURS)
        before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in target.items()}
        pixels = image.clone()
        change(image, target)
        assert target.keys() == before.keys() and torch.equal(image, pixels)
        for name, value in before.items():
            assert torch.equal(target[name], value) if isinstance(value, torch.Tensor) else target[name] == value


def test_pictures_without_objects():
    change = transforms.ssd_train((64, 64), (GROUND,) * 3)
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = change(*picture(90, 110, [], []))
        assert image.shape == (3, 64, 64)
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == target["ignore"].shape == (0,)
    _, target = transforms.ssd_evaluate((64, 64))(*picture(90, 110, [], []))
    assert target["boxes"].shape == (0, 4)


def test_objects_thinner_than_a_pixel_are_left_out():
    change = ZoomOrCrop((50, 50), zoom_out=0, iou_crop=0)
    _, target = change(*picture(200, 200, [[10, 10, 13, 100], [10, 10, 14, 100], [10, 10, 100, 13]], COLOURS))
    assert target["labels"].tolist() == [1]


def test_objects_whose_centre_a_crop_cuts_off_are_left_out(monkeypatch):
    monkeypatch.setattr(transforms, "iou_crop", lambda boxes, region: (20, 40, 60, 50))
    boxes = [[50, 30, 60, 40], [20, 30, 59, 70], [22, 30, 60, 70], [60, 60, 80, 99], [60, 60, 80, 101]]
    _, target = ZoomOrCrop((60, 100), zoom_out=0)(*picture(100, 100, boxes, COLOURS))
    assert target["labels"].tolist() == [0, 2, 3]
    assert target["boxes"].tolist() == [[20, 10, 40, 20], [0, 10, 40, 50], [40, 40, 80, 60]]


# ---- the crop's rules ----

BOXES = torch.tensor([[20.0, 30, 170, 110], [5, 5, 40, 60], [150, 80, 198, 118]])


@pytest.mark.parametrize(("draw", "least"), list(enumerate([0.0, 0.1, 0.3, 0.5, 0.7])))
def test_a_crop_obeys_ssds_rules(monkeypatch, draw, least):
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(draw))
    region, areas = (-30, -10, 180, 240), set()
    for seed in range(40):
        torch.manual_seed(seed)
        top, left, height, width = iou_crop(BOXES, region)
        assert region[0] <= top and top + height <= region[0] + region[2]
        assert region[1] <= left and left + width <= region[1] + region[3]
        assert height >= 0.3 * region[2] - 1 and width >= 0.3 * region[3] - 1
        assert 0.5 <= width / height <= 2
        x, y = (BOXES[:, 0] + BOXES[:, 2]) / 2, (BOXES[:, 1] + BOXES[:, 3]) / 2
        inside = (left < x) & (x < left + width) & (top < y) & (y < top + height)
        iou = box_iou(BOXES[inside], torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32))
        assert iou.max() >= least
        areas.add(height * width)
    assert len(areas) > 30


def test_no_crop_is_one_of_the_draws():
    results = []
    for seed in range(300):
        torch.manual_seed(seed)
        results.append(iou_crop(BOXES, (0, 0, 120, 200)) == (0, 0, 120, 200))
    assert 0.08 < sum(results) / 300 < 0.35  # a seventh, and what draws without a good crop add


def test_the_canvas_of_a_zoom():
    zoom = ZoomOrCrop((50, 50), largest_canvas=4.0)
    ratios = []
    for seed in range(200):
        torch.manual_seed(seed)
        top, left, height, width = zoom.canvas(100, 200)
        assert top <= 0 <= top + height - 100 and left <= 0 <= left + width - 200
        assert width == pytest.approx(2 * height, abs=2)
        ratios.append(height / 100)
    assert min(ratios) >= 1 and max(ratios) <= 4
    assert sum(ratios) / 200 == pytest.approx(2.5, abs=0.2)


def test_what_lies_outside_the_picture_has_the_fill_colour():
    change = ZoomOrCrop((60, 60), zoom_out=1, iou_crop=0, fill=(200, 10, 90))
    torch.manual_seed(3)
    image, _ = change(*picture(100, 100, [], []))
    filled = (image == torch.tensor([200, 10, 90]).view(3, 1, 1)).all(0)
    ground = (image == GROUND).all(0)
    assert filled.sum() > 200 and ground.sum() > 200
    assert (filled | ground).all()


def test_colour_changes_leave_boxes_alone():
    image, target = picture(80, 100, [[10, 10, 60, 60]], [(200, 90, 20)])
    torch.manual_seed(0)
    results = [PhotometricDistort(1.0)(image, target) for _ in range(3)]
    for changed, same in results:
        assert same["boxes"].tolist() == target["boxes"].tolist()
        assert isinstance(changed, tv_tensors.Image) and changed.shape == image.shape and changed.dtype == torch.uint8
        assert not torch.equal(changed, image)
    assert torch.equal(PhotometricDistort(0.0)(image, target)[0], image)


def test_flip_twice_is_the_identity_and_moves_boxes_with_the_pixels():
    image = tv_tensors.Image(torch.randint(0, 255, (3, 20, 30), dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[2.0, 3, 10, 9]], format="XYXY", canvas_size=(20, 30))
    target = {"boxes": boxes, "labels": torch.tensor([1]), "ignore": torch.tensor([False])}
    flip = HorizontalFlip(1.0)
    once, moved = flip(image, target)
    assert torch.equal(once[:, 3:9, 20:28], image[:, 3:9, 2:10].flip(-1))
    assert moved["boxes"].tolist() == [[20.0, 3, 28, 9]]
    again, back = flip(once, moved)
    assert torch.equal(again, image)
    assert torch.equal(back["boxes"], boxes)
    assert torch.equal(HorizontalFlip(0.0)(image, target)[0], image)


@pytest.mark.parametrize(
    ("which", "factor", "reference"),
    [
        (0, 0.925, lambda image: F.adjust_brightness(image, 0.925)),
        (1, 1.4, lambda image: F.adjust_contrast(image, 1.4)),
        (2, 0.6, lambda image: F.adjust_saturation(image, 0.6)),
    ],
)
def test_each_colour_change_is_torchvisions(which, factor, reference):
    image = tv_tensors.Image(torch.randint(40, 200, (3, 16, 16), dtype=torch.uint8))  # far from where clipping differs
    ours = change_colour(image, [factor if i == which else None for i in range(4)], contrast_first=True)
    torch.testing.assert_close(torch.Tensor(ours), torch.Tensor(reference(image)), atol=2, rtol=0)
    assert not torch.equal(ours, image)


def test_channels_change_places():
    image = tv_tensors.Image(torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8))
    assert torch.equal(change_colour(image, [None] * 4, True, order=[1, 0, 2]), image[[1, 0, 2]])


def test_a_turn_of_hue_keeps_grey_and_luma():
    matrix, offset = colour_map([None, None, None, 0.05], True, np.zeros(3))
    np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-9)
    np.testing.assert_allclose(np.array([0.299, 0.587, 0.114]) @ matrix, [0.299, 0.587, 0.114], atol=1e-9)
    assert np.abs(matrix - np.eye(3)).max() > 0.1
    assert not offset.any()
