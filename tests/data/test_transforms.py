"""Transforms: boxes stay on their pixels, crops obey SSD's rules, and all fields of an object stay together."""

import pickle

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import check_target, transforms
from data.detection import voc
from data.detection.dataset import BoxDataset
from data.transforms import (
    RGB_TO_YIQ,
    YIQ_TO_RGB,
    ColorJitter,
    PhotometricDistort,
    ZoomOutIoUCrop,
    adjust_color,
    color_matrix,
    filter_objects,
    iou_crop,
)

BACKGROUND = 40  # gray; objects have a channel of 255
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
GRID = [[10 + 60 * (i % 3), 10 + 60 * (i // 3), 50 + 60 * (i % 3), 50 + 60 * (i // 3)] for i in range(6)]


def sample(height, width, boxes, colors=COLORS):
    """A gray image with filled rectangles, and its target: labels count up, objects with odd labels are ignored."""
    image = torch.full((3, height, width), BACKGROUND, dtype=torch.uint8)
    for (x1, y1, x2, y2), color in zip(boxes, colors):
        image[:, int(y1) : int(y2), int(x1) : int(x2)] = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = torch.arange(len(boxes))
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": labels,
        "ignore": labels % 2 == 1,
        "image_id": 7,
        "size": (height, width),
    }
    return tv_tensors.Image(image), target


def noise(height, width):
    return tv_tensors.Image(torch.randint(1, 255, (3, height, width), dtype=torch.uint8))


def red_rectangle(image):
    """xyxy of the pixels whose red channel is above the middle of background and 255."""
    red = image[0].float() > (BACKGROUND + 255) / 2
    (x1, x2), (y1, y2) = (line.nonzero()[:, 0][[0, -1]].tolist() for line in (red.any(0), red.any(1)))
    return torch.tensor([x1, y1, x2 + 1, y2 + 1], dtype=torch.float32)


# ---- SSD ----


def test_a_region_is_resized_with_all_its_pixels():
    """The whole image, a part of it, and a canvas around it that is filled."""
    image, transform = noise(40, 60), ZoomOutIoUCrop((80, 120), fill=(1, 2, 3))
    assert torch.equal(transform.resample(image, (0, 0, 40, 60)), F.resize(image, [80, 120]))
    assert torch.equal(transform.resample(image, (3, 5, 20, 30)), F.resize(image[:, 3:23, 5:35], [80, 120]))
    canvas = transform.resample(image, (-20, -30, 80, 120))
    assert torch.equal(canvas[:, 20:60, 30:90], image)
    canvas[:, 20:60, 30:90] = transform.fill
    assert torch.equal(canvas, transform.fill.expand(3, 80, 120))


def test_a_sliver_of_the_image_at_the_edge_of_a_region_keeps_a_row_or_a_column():
    image, transform = noise(40, 60), ZoomOutIoUCrop((10, 10), fill=(1, 2, 3))
    below = transform.resample(image, (-99, 0, 100, 60))
    assert torch.equal(below[:, 9:], F.resize(image[:, :1], [1, 10], antialias=True))
    assert torch.equal(below[:, :9], transform.fill.expand(3, 9, 10))
    right = transform.resample(image, (0, -99, 40, 100))
    assert torch.equal(right[:, :, 9:], F.resize(image[:, :, :1], [10, 1], antialias=True))


def test_ssd_training_zooms_out_of_half_of_the_images():
    transform, image = transforms.ssd_train((40, 50), (BACKGROUND,) * 3, iou_crop=0, color=0), noise(80, 100)
    image[0] = 255
    zoomed = 0
    for seed in range(200):
        torch.manual_seed(seed)
        zoomed += bool((transform(image, sample(80, 100, [])[1])[0][0] == BACKGROUND).any())
    assert 80 < zoomed < 120


@pytest.mark.parametrize("shape", [(120, 160), (333, 211), (90, 400)])
@pytest.mark.parametrize(("zoom_out", "crop"), [(0, 0), (1, 0), (0, 1), (0.5, 1)])
def test_boxes_stay_on_their_pixels(shape, zoom_out, crop):
    height, width = shape
    box = [width // 3, height // 4, width // 3 + width // 4, height // 4 + height // 3]
    transform = transforms.ssd_train((100, 140), (BACKGROUND,) * 3, zoom_out=zoom_out, iou_crop=crop, color=0)
    with_object, flipped = 0, 0
    for seed in range(25):
        torch.manual_seed(seed)
        image, target = transform(*sample(height, width, [box], [(255, BACKGROUND, BACKGROUND)]))
        assert image.dtype == torch.uint8 and image.shape == (3, 100, 140)
        if len(target["boxes"]):
            torch.testing.assert_close(red_rectangle(image), torch.Tensor(target["boxes"])[0], rtol=0, atol=1.5)
            with_object += 1
            flipped += target["boxes"][0, 0] + target["boxes"][0, 2] > 140
    assert with_object >= 24  # an IoU crop keeps an object
    if zoom_out == crop == 0:
        assert 5 < flipped < 20


def test_boxes_of_the_evaluation_stay_on_their_pixels_and_inside():
    image, target = sample(333, 211, [[50, 100, 90, 200]], [(255, BACKGROUND, BACKGROUND)])
    image, target = transforms.ssd_eval((100, 140))(image, target)
    torch.testing.assert_close(red_rectangle(image), torch.Tensor(target["boxes"])[0], rtol=0, atol=1.5)
    for side in range(60, 400):  # for some sides, 300 / side * side is above 300 in float32
        _, target = transforms.ssd_eval((300, 300))(*sample(side, side, [[0, 0, side, side]]))
        assert (target["boxes"] <= 300).all(), side


def test_fields_of_an_object_stay_together():
    """Each object has its own color: its box, label and ignore must belong to it after every transform."""
    transform, dropped = transforms.ssd_train((128, 128), (BACKGROUND,) * 3, color=0), 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transform(*sample(130, 190, GRID))
        assert len(target["boxes"]) == len(target["labels"]) == len(target["ignore"]) > 0
        dropped += 6 - len(target["labels"])
        for box, label, ignore in zip(target["boxes"], target["labels"].tolist(), target["ignore"].tolist()):
            assert ignore == (label % 2 == 1)
            x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
            assert (image[:, y, x].int() - torch.tensor(COLORS[label])).abs().max() < 60
        assert target["image_id"] == 7 and target["size"] == (130, 190)
    assert dropped > 60


def test_filter_objects():
    _, target = sample(50, 60, [[0, 0, 9, 9], [1, 1, 9, 9], [2, 2, 9, 9]])
    target["masks"] = tv_tensors.Mask(torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 50, 60))
    selected = filter_objects(target, torch.tensor([True, False, True]))
    assert selected["labels"].tolist() == [0, 2] and selected["ignore"].tolist() == [False, False]
    assert selected["boxes"][:, 0].tolist() == [0, 2] and selected["masks"][:, 0, 0].tolist() == [0, 2]
    assert selected["size"] == (50, 60) and selected["boxes"].canvas_size == (50, 60)
    assert {name: type(value) for name, value in selected.items()} == {n: type(value) for n, value in target.items()}
    assert len(target["labels"]) == 3  # the input does not change


@pytest.mark.parametrize(
    "transform",
    [
        ZoomOutIoUCrop((50, 50)),
        transforms.ssd_train((50, 50), (0, 0, 0)),
        transforms.ssd_eval((50, 50)),
        transforms.multiscale_train((60,), 100, flip=1.0, color=1.0),
    ],
)
def test_transforms_do_not_change_their_input(transform):
    (image, target), (same_image, same_target) = sample(130, 190, GRID), sample(130, 190, GRID)
    for _ in range(3):
        transform(image, target)
        torch.testing.assert_close((image, target), (same_image, same_target), rtol=0, atol=0)


def test_ssd_images_without_objects():
    transform = transforms.ssd_train((64, 64), (BACKGROUND,) * 3)
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = transform(*sample(90, 110, []))
        assert image.shape == (3, 64, 64)
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == target["ignore"].shape == (0,)
    _, target = transforms.ssd_eval((64, 64))(*sample(90, 110, []))
    assert target["boxes"].shape == (0, 4)


def test_objects_thinner_than_a_pixel_are_dropped():
    transform = ZoomOutIoUCrop((50, 50), zoom_out=0, iou_crop=0)
    _, target = transform(*sample(200, 200, [[10, 10, 13, 100], [10, 10, 14, 100], [10, 10, 100, 13]]))
    assert target["labels"].tolist() == [1]


def test_objects_with_their_center_outside_the_crop_are_dropped(monkeypatch):
    monkeypatch.setattr(transforms, "iou_crop", lambda boxes, region: (20, 40, 60, 50))
    boxes = [[50, 30, 60, 40], [20, 30, 59, 70], [22, 30, 60, 70], [60, 60, 80, 99], [60, 60, 80, 101]]
    _, target = ZoomOutIoUCrop((60, 100), zoom_out=0)(*sample(100, 100, boxes))
    assert target["labels"].tolist() == [0, 2, 3]
    assert target["boxes"].tolist() == [[20, 10, 40, 20], [0, 10, 40, 50], [40, 40, 80, 60]]


BOXES = torch.tensor([[20.0, 30, 170, 110], [5, 5, 40, 60], [150, 80, 198, 118]])


@pytest.mark.parametrize(("draw", "min_iou"), list(enumerate([0.0, 0.1, 0.3, 0.5, 0.7])))
def test_iou_crops_obey_the_rules_of_ssd(monkeypatch, draw, min_iou):
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
        assert iou.max() >= min_iou
        areas.add(height * width)
    assert len(areas) > 30


def test_iou_crop_may_be_no_crop():
    region, unchanged = (0, 0, 120, 200), 0
    for seed in range(300):
        torch.manual_seed(seed)
        unchanged += iou_crop(BOXES, region) == region
    assert 0.08 < unchanged / 300 < 0.35  # one draw of seven, and again after draws without a valid crop


def test_canvas_of_zooming_out():
    zoom = ZoomOutIoUCrop((50, 50), max_zoom_out=4.0)
    ratios = []
    for seed in range(200):
        torch.manual_seed(seed)
        top, left, height, width = zoom.canvas(100, 200)
        assert top <= 0 <= top + height - 100 and left <= 0 <= left + width - 200
        assert width == pytest.approx(2 * height, abs=2)
        ratios.append(height / 100)
    assert min(ratios) >= 1 and max(ratios) <= 4
    assert sum(ratios) / 200 == pytest.approx(2.5, abs=0.2)


def test_zooming_out_fills_the_canvas():
    torch.manual_seed(3)
    image, _ = ZoomOutIoUCrop((60, 60), zoom_out=1, iou_crop=0, fill=(200, 10, 90))(*sample(100, 100, []))
    filled = (image == torch.tensor([200, 10, 90]).view(3, 1, 1)).all(0)
    background = (image == BACKGROUND).all(0)
    assert filled.sum() > 200 and background.sum() > 200
    assert (filled | background).all()


# ---- RetinaNet and Mask R-CNN: images of any size ----


@pytest.mark.parametrize(
    ("size", "result"),
    [
        ((100, 150), (60, 90)),  # the shortest side decides
        ((150, 100), (90, 60)),
        ((100, 250), (40, 100)),  # the longest side decides
        ((30, 40), (60, 80)),  # small images are enlarged
        ((97, 131), (60, 81)),  # 81.03
        ((2, 900), (1, 100)),  # at least one pixel, not 0.2
    ],
)
def test_sizes_of_multiscale_images(size, result):
    image, target = transforms.multiscale_eval(60, 100)(*sample(*size, [[0, 0, size[1], size[0]]]))
    assert image.shape == (3, *result) and image.dtype == torch.uint8
    expected = torch.tensor([[0.0, 0, result[1], result[0]]])  # boxes are scaled by the rounded size
    torch.testing.assert_close(torch.Tensor(target["boxes"]), expected)
    assert target["boxes"].canvas_size == result
    assert target["size"] == size and target["image_id"] == 7


def test_multiscale_boxes_stay_on_their_pixels():
    image, target = transforms.multiscale_eval(77, 200)(*sample(120, 160, [[40, 30, 80, 90]]))
    torch.testing.assert_close(red_rectangle(image), torch.Tensor(target["boxes"])[0], rtol=0, atol=1)


def test_multiscale_sides_and_flips_are_random():
    image, target = noise(100, 200), sample(100, 200, [[0, 0, 20, 100]])[1]
    results = set()
    for seed in range(60):
        torch.manual_seed(seed)
        resized, scaled = transforms.multiscale_train((40, 50, 60), 110, flip=0.5)(image, target)
        results.add((resized.shape[-2], bool(scaled["boxes"][0, 0] > 0)))
    assert results == {(height, flipped) for height in (40, 50, 55) for flipped in (False, True)}
    resized, _ = transforms.multiscale_train((50,), 110, flip=0)(image, target)
    assert torch.equal(resized, transforms.multiscale_eval(50, 110)(image, target)[0])


def test_flipping_twice_is_the_identity_and_moves_boxes_with_the_pixels():
    image, target = noise(20, 30), sample(20, 30, [[2, 3, 10, 9], [0, 1, 30, 2]])[1]
    flip = transforms.multiscale_train((20,), 30, flip=1.0)
    flipped_image, flipped = flip(image, target)
    assert torch.equal(flipped_image[:, 3:9, 20:28], image[:, 3:9, 2:10].flip(-1))
    assert flipped["boxes"].tolist() == [[20, 3, 28, 9], [0, 1, 30, 2]]
    assert flipped["labels"].tolist() == [0, 1] and flipped["ignore"].tolist() == [False, True]
    torch.testing.assert_close(flip(flipped_image, flipped), (image, target), rtol=0, atol=0)


def test_multiscale_color_changes_are_optional():
    image, target = noise(50, 60), sample(50, 60, [])[1]
    unchanged = transforms.multiscale_train((50,), 110, flip=0, color=0.0)(image, target)[0]
    changed = transforms.multiscale_train((50,), 110, flip=0, color=1.0)(image, target)[0]
    assert torch.equal(unchanged, image) and not torch.equal(changed, image)


def test_multiscale_boxes_of_almost_no_width_are_dropped_with_all_their_fields():
    boxes = [[0, 0, 400, 300], [10, 10, 10.05, 200], [10, 10, 10.2, 200], [10, 10, 300, 10.05], [0, 0, 1, 1]]
    _, target = transforms.multiscale_eval(30, 100)(*sample(300, 400, boxes))  # a tenth: 0.05 is 0.005, 0.2 is 0.02
    assert target["labels"].tolist() == [0, 2, 4] and target["ignore"].tolist() == [False, False, False]
    assert len(target["boxes"]) == 3


def test_multiscale_boxes_stay_inside():
    for side in range(60, 400, 7):
        _, target = transforms.multiscale_eval(300, 1000)(*sample(side, side, [[0, 0, side, side]]))
        assert (target["boxes"] <= 300).all(), side


def test_multiscale_images_without_objects():
    _, target = transforms.multiscale_train((32,), 64, color=1.0)(*sample(40, 50, []))
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == target["ignore"].shape == (0,)


def test_multiscale_data_set_meets_the_contract(drawn_voc):
    dataset = BoxDataset(voc.read([drawn_voc], "train"), transform=transforms.multiscale_train((90, 120), 150))
    for index in range(len(dataset)):
        image, target = dataset[1, index]
        check_target(image, target, len(dataset.classes))
        assert max(image.shape) <= 150
    unpickled = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(unpickled[1, 0][0], dataset[1, 0][0])


# ---- color ----


def test_color_changes_do_not_change_boxes():
    image, target = sample(80, 100, [[10, 10, 60, 60]], [(200, 90, 20)])
    torch.manual_seed(0)
    for _ in range(3):
        changed, same = PhotometricDistort(1.0)(image, target)
        assert same["boxes"].tolist() == target["boxes"].tolist()
        assert isinstance(changed, tv_tensors.Image) and changed.shape == image.shape and changed.dtype == torch.uint8
        assert not torch.equal(changed, image)
    assert torch.equal(PhotometricDistort(0.0)(image, target)[0], image)


@pytest.mark.parametrize(
    ("transform", "reference"),
    [
        (PhotometricDistort(0.5), v2.RandomPhotometricDistort()),
        (lambda image, target: ColorJitter(0.2)(image), v2.ColorJitter(0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_color_changes_are_drawn_as_by_torchvision(transform, reference, monkeypatch):
    """From the same ranges up to their ends; contrast is as often first as last, and every order of channels occurs."""
    calls = []
    monkeypatch.setattr(transforms, "adjust_color", lambda *args: calls.append(args) or args[0])
    for seed in range(400):
        torch.manual_seed(seed)
        transform(*sample(4, 4, []))
    for name in ("brightness", "contrast", "saturation", "hue"):
        values = [factors[name] for _, factors, *_ in calls if name in factors]
        low, high = getattr(reference, name)
        margin = (high - low) / 20
        assert low <= min(values) < low + margin and high - margin < max(values) <= high
        assert len(values) == 400 or 150 < len(values) < 250
    assert 0.4 < np.mean([contrast_first for _, _, contrast_first, *_ in calls]) < 0.6
    assert {len(call) for call in calls} == {3} or len({tuple(channels) for *_, channels in calls}) == 6


@pytest.mark.parametrize(
    ("name", "factor", "reference"),
    [
        ("brightness", 0.925, F.adjust_brightness),
        ("contrast", 1.4, F.adjust_contrast),
        ("saturation", 0.6, F.adjust_saturation),
    ],
)
def test_color_changes_are_those_of_torchvision(name, factor, reference):
    image = tv_tensors.Image(torch.randint(40, 200, (3, 16, 16), dtype=torch.uint8))  # far from where clipping differs
    adjusted = adjust_color(image, {name: factor}, contrast_first=True)
    torch.testing.assert_close(torch.Tensor(adjusted), torch.Tensor(reference(image, factor)), atol=2, rtol=0)
    assert not torch.equal(adjusted, image)


def test_black_and_white_stay_what_they_are():
    image = tv_tensors.Image(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2))
    assert torch.equal(adjust_color(image, {"saturation": 0.5, "hue": 0.1}, contrast_first=True), image)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_color_changes_are_applied_in_order(contrast_first):
    """All changes in one matrix are the single changes one after the other, but for rounding."""
    image = tv_tensors.Image(torch.randint(100, 150, (3, 16, 16), dtype=torch.uint8))
    factors = {"brightness": 1.1, "contrast": 1.4, "saturation": 0.7, "hue": 0.03}
    order = list(factors) if contrast_first else ["brightness", "saturation", "hue", "contrast"]
    expected = image
    for name in order:
        expected = adjust_color(expected, {name: factors[name]}, contrast_first)
    adjusted = adjust_color(image, factors, contrast_first)
    torch.testing.assert_close(torch.Tensor(adjusted), torch.Tensor(expected), atol=3, rtol=0)


def test_channels_are_permuted():
    image = noise(16, 16)
    assert torch.equal(adjust_color(image, {}, True, channels=[1, 0, 2]), image[[1, 0, 2]])


def test_a_hue_shift_keeps_gray_and_luma():
    matrix, offset = color_matrix({"hue": 0.05}, True, np.zeros(3))
    np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-9)
    np.testing.assert_allclose(np.array([0.299, 0.587, 0.114]) @ matrix, [0.299, 0.587, 0.114], atol=1e-9)
    assert np.abs(matrix - np.eye(3)).max() > 0.1
    assert not offset.any()


def test_a_hue_shift_is_an_angle():
    """In the plane of I and Q, where 1 is the full circle."""
    quarter, eighth, whole = (color_matrix({"hue": shift}, True, np.zeros(3))[0] for shift in (0.25, 0.125, 1.0))
    in_phase, quadrature = RGB_TO_YIQ @ quarter @ YIQ_TO_RGB @ [[0, 0], [1, 0], [0, 1]], [[0, 0], [0, -1], [1, 0]]
    np.testing.assert_allclose(in_phase, quadrature, atol=1e-9)
    np.testing.assert_allclose(eighth @ eighth, quarter, atol=1e-9)
    np.testing.assert_allclose(whole, np.eye(3), atol=1e-9)


# ---- classification ----


def coordinates(height, width):
    """An image with the column in red and the row in green, both 0 to 250; blue is 30."""
    image = torch.full((3, height, width), 30, dtype=torch.uint8)
    image[0] = torch.linspace(0, 250, width).to(torch.uint8)
    image[1] = torch.linspace(0, 250, height).to(torch.uint8)[:, None]
    return tv_tensors.Image(image)


@pytest.mark.parametrize("size", [(50, 90), (90, 50), (20, 20), (300, 200)])
def test_sizes_of_classified_images(size):
    image = coordinates(*size)
    for transform, side in ((transforms.classification_train(32), 32), (transforms.classification_eval(40, 36), 36)):
        result = transform(image)
        assert result.shape == (3, side, side) and result.dtype == torch.uint8


def test_a_random_crop_has_its_share_of_the_image():
    shares, flipped = [], 0
    for seed in range(100):
        torch.manual_seed(seed)
        result = transforms.classification_train(40, crop_scale=(0.53, 1.0), jitter=0)(coordinates(200, 200)).int()
        width = (result[0, 20, -1] - result[0, 20, 0]) / 250
        shares.append(float(abs(width) * (result[1, -1, 20] - result[1, 0, 20]) / 250))
        flipped += bool(width < 0)
    assert min(shares) > 0.45 and max(shares) > 0.8  # less than 0.53: the centers of the outer pixels are inside
    assert 30 < flipped < 70


def test_classification_evaluates_the_center():
    result = transforms.classification_eval(100, 80)(coordinates(200, 400)).int()
    assert abs(result[1, 0, 40] - 25) <= 3 and abs(result[1, -1, 40] - 225) <= 3  # without a tenth of the rows per side
    assert abs(result[0, 40, 0] - 75) <= 3 and abs(result[0, 40, -1] - 175) <= 3  # and three tenths of the columns
    assert torch.equal(transforms.classification_eval(100, 80)(coordinates(200, 400)).int(), result)


def test_erased_parts_have_the_mean_color():
    image = tv_tensors.Image(torch.full((3, 60, 60), 10, dtype=torch.uint8))
    torch.manual_seed(0)
    result = transforms.classification_train(60, jitter=0, erase=1.0)(image)
    erased = (result == torch.tensor([124, 116, 104]).view(3, 1, 1)).all(0)
    assert 0.01 < erased.float().mean() < 0.4
    assert (result[:, ~erased] == 10).all()


def test_color_jitter_is_slight_and_varied():
    image = tv_tensors.Image(torch.full((3, 4, 4), 100, dtype=torch.uint8))  # only brightness changes a uniform gray
    values = set()
    for seed in range(100):
        torch.manual_seed(seed)
        changed = ColorJitter(0.03)(image)
        assert changed.dtype == torch.uint8 and changed.shape == image.shape
        values.add(changed[0, 0, 0].item())
    assert values == set(range(97, 104))
    assert torch.equal(ColorJitter(0.0)(image), image)


def test_color_jitter_changes_hue_contrast_and_saturation():
    image = coordinates(40, 40)
    changes = []
    for seed in range(50):
        torch.manual_seed(seed)
        changes.append((ColorJitter(0.05)(image).int() - image.int()).float().flatten(1))
    mean = torch.stack([change.mean(1) for change in changes])
    assert (mean[:, 0] - mean[:, 2]).std() > 1  # brightness alone would change the channels in proportion
    assert 30 < torch.stack(changes).abs().amax() < 110  # a shift of a saturated hue by 0.05 is about 0.3 * 250


def test_classification_transforms_can_be_pickled():
    image = coordinates(50, 60)
    for transform in (transforms.classification_train(32, erase=0.5), transforms.classification_eval(40, 32)):
        results = []
        for copy in (transform, pickle.loads(pickle.dumps(transform))):
            torch.manual_seed(3)
            results.append(copy(image))
        assert torch.equal(*results)
