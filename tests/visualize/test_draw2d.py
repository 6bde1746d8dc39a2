"""Boxes, masks, texts, predicted classes and thumbnails are drawn where and how they should be."""

import pytest
import torch
from PIL import Image, ImageDraw

from visualize import draw2d


def color_tensor(label):
    return torch.tensor(draw2d.class_color(label), dtype=torch.uint8)


def test_neighboring_classes_have_different_colors():
    colors = torch.tensor([draw2d.class_color(label) for label in range(8)], dtype=torch.float)
    assert torch.pdist(colors).min() > 60


def test_boxes_are_drawn_in_the_color_of_their_class():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    drawn = draw2d.draw_boxes(image, torch.tensor([[10.0, 20, 50, 40]]), torch.tensor([1]), ["cat", "dog"])
    assert torch.equal(drawn[:, 39, 30], color_tensor(1))
    assert torch.equal(drawn[:, 30, 10], color_tensor(1))
    assert drawn[:, 30, 60].sum() == 0
    assert image.sum() == 0


def test_without_boxes_the_image_is_unchanged():
    image = torch.randint(0, 255, (3, 20, 20), dtype=torch.uint8)
    assert torch.equal(draw2d.draw_boxes(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), []), image)


def test_truth_is_on_the_left_and_predictions_above_the_threshold_on_the_right():
    image = torch.zeros(3, 50, 60, dtype=torch.uint8)  # padded, 10 columns on the right
    image[:, :, 50:] = 255
    target = {"boxes": torch.tensor([[5.0, 10, 20, 45]]), "labels": torch.tensor([0])}
    target |= {"size": (100, 200), "shape": (50, 50)}
    detections = {"boxes": torch.tensor([[30.0, 10, 45, 45], [2, 10, 20, 45]]), "labels": torch.tensor([0, 1])}
    detections["scores"] = torch.tensor([0.9, 0.1])
    ((name, drawn),) = draw2d.truth_and_predictions([(image, target, detections)], ["cat", "dog"], side=100)
    assert name == "truth left, predictions right/0"
    assert drawn.shape == (3, 100, 2 * 200 + 8)
    left, right = drawn[:, :, :200].float().sum(0), drawn[:, :, 208:].float().sum(0)
    assert left[:, :90].sum() > 0
    assert left[:, 110:].sum() == 0
    assert right[:, 110:].sum() > 0
    assert right[:, :90].sum() == 0


def test_masks_of_truth_and_predictions():
    image, mask = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.zeros(1, 50, 50, dtype=torch.uint8)
    mask[0, 10:40, 10:40] = 1
    target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([0]), "size": (50, 50), "masks": mask}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0), "masks": mask[:0]}
    ((_, drawn),) = draw2d.truth_and_predictions([(image, target, nothing)], ["cat"], side=100)
    assert (drawn[:, 60, 50] > 0).any() and drawn[:, :, 108:].sum() == 0


def test_masks_are_translucent_with_an_edge_and_change_nothing_else():
    image, masks = torch.full((3, 90, 120), 100, dtype=torch.uint8), torch.zeros(1, 90, 120, dtype=torch.bool)
    masks[0, 30:60, 40:80] = True
    arguments = torch.tensor([[40.0, 30, 80, 60]]), torch.tensor([0]), ["cat"], torch.tensor([0.9])
    without_mask = draw2d.draw_boxes(image, *arguments)
    drawn = draw2d.draw_boxes(image, *arguments, masks)
    assert torch.equal(drawn[:, 52, 60], 50 + color_tensor(0) // 2)
    assert torch.equal(drawn[:, 58, 60], color_tensor(0))  # just inside the line of the box
    assert torch.equal(drawn[:, 70:], without_mask[:, 70:])
    assert torch.equal(drawn[:, :, 90:], without_mask[:, :, 90:])
    assert (image == 100).all()


def test_masks_of_one_class_have_different_colors():
    image, masks = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.zeros(2, 60, 90, dtype=torch.bool)
    masks[0, :, :40], masks[1, :, 50:] = True, True
    boxes = torch.tensor([[0.0, 0, 40, 60], [50, 0, 90, 60]])
    drawn = draw2d.draw_boxes(image, boxes, torch.tensor([3, 3]), ["cat"] * 4, torch.tensor([0.9, 0.8]), masks)
    first, second = (drawn[:, 50, column].int() for column in (20, 70))
    assert first.any() and second.any() and (first - second).abs().max() > 60


def test_small_images_are_enlarged_with_their_boxes_and_masks():
    image, masks = torch.zeros(3, 30, 40, dtype=torch.uint8), torch.zeros(1, 30, 40, dtype=torch.bool)
    masks[0, 15:30, 20:40] = True
    arguments = torch.tensor([[20.0, 15, 40, 30]]), torch.tensor([0]), ["cat"], torch.tensor([0.5]), masks
    drawn = draw2d.draw_boxes(image, *arguments, min_side=400)
    assert drawn.shape == (3, 300, 400)
    assert (drawn[:, :110] == 0).all() and (drawn[:, 290, 300] > 0).any()
    nothing = torch.zeros(0, 4), torch.zeros(0).long(), []
    assert draw2d.draw_boxes(image, *nothing, min_side=400).shape == (3, 300, 400)
    assert draw2d.draw_boxes(image, *nothing, min_side=20) is image


def test_texts_on_dark_colors_are_white():
    assert draw2d._readable_on((88, 36, 255)) == (255, 255, 255) and draw2d._readable_on((255, 160, 0)) == (0, 0, 0)


@pytest.mark.parametrize(("scores", "top"), [([0.9, 0.2], 0), ([0.2, 0.9], 1)])
def test_the_mask_of_the_higher_score_is_on_top(scores, top):
    image, masks = torch.zeros(3, 60, 60, dtype=torch.uint8), torch.ones(2, 60, 60, dtype=torch.bool)
    boxes = torch.tensor([[0.0, 0, 60, 60]]).repeat(2, 1)
    drawn = draw2d.draw_boxes(image, boxes, torch.tensor([0, 1]), ["a", "b"], torch.tensor(scores), masks)
    expected = color_tensor(1 - top) // 2 // 2 + color_tensor(top) // 2
    assert torch.equal(drawn[:, 30, 30], expected)


class RecordingPen:
    """Records what would be drawn."""

    def __init__(self):
        self.rectangles, self.texts = [], []

    def rectangle(self, corners, fill):
        self.rectangles.append(corners)

    def text(self, position, text, **options):
        self.texts.append(text)


def test_texts_do_not_cover_each_other_and_stay_in_the_image():
    pen, size = RecordingPen(), (300, 200)
    boxes = [[10 + i, 10 + i % 3, 90 + i, 60] for i in range(12)] + [[280, 180, 299, 199], [0, 0, 300, 200]]
    draw2d.draw_labels(pen, size, boxes, [f"person {i}" for i in range(14)], [(0, 0, 0)] * 14)
    assert pen.texts[0] == "person 0" and 5 <= len(pen.texts) < 14  # there is no room for all
    corners = torch.tensor(pen.rectangles)
    assert corners.min() >= 0 and (corners[:, 2:] < torch.tensor(size)).all()
    for i, (left, top, right, bottom) in enumerate(pen.rectangles):
        for x1, y1, x2, y2 in pen.rectangles[:i]:
            assert right < x1 or x2 < left or bottom < y1 or y2 < top


def test_predicted_classes_are_written_on_bars_as_long_as_their_scores():
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    scores = torch.tensor([0.5, 0.25])
    drawn = draw2d.draw_classes(image, torch.tensor([1, 0]), scores, ["ant", "bee"], min_width=400)
    assert drawn.shape[2] == 400 and (drawn[:, :160] == 0).all()
    height = (drawn.shape[1] - 160) // 2
    for row, label, length in ((0, 1, 200), (1, 0, 100)):
        line = drawn[:, 160 + row * height + 2]
        bar = (line == color_tensor(label)[:, None]).all(0)
        assert abs(int(bar.sum()) - length) <= 2 and bar[:90].all()


def test_a_thumbnail_keeps_the_aspect_ratio_above_its_caption():
    cell = draw2d.thumbnail(torch.zeros(3, 50, 200, dtype=torch.uint8), "x" * 300, side=100)
    assert cell.shape == (3, 100 + draw2d.CAPTION_HEIGHT, 100)
    rows = (cell[:, :100] == 0).all(0).any(1).nonzero().flatten()
    assert rows.tolist() == list(range(75, 100))
    square = draw2d.thumbnail(torch.zeros(3, 50, 50, dtype=torch.uint8), "x", side=100)
    for cells, height in (([cell] * 7, 43), ([cell] * 6 + [square], 118)):  # without what is white above all of them
        assert draw2d.contact_sheet(cells, columns=3).shape == (3, 3 * (height + 4) + 4, 3 * 104 + 4)


def test_a_long_caption_keeps_its_end():
    assert draw2d.shortened("a short one", 200, 12) == "a short one"
    short = draw2d.shortened(f"{'very/' * 40}end.jpg", 100, 12)
    assert short.startswith("...") and short.endswith("end.jpg")
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert pen.textlength(short, font_size=12) <= 100


def test_the_prediction_sheet_has_a_cell_per_image():
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    samples = [(image, 0, 0), (image, 1, 0), (image, 1, 1)]
    ((_, sheet),) = draw2d.prediction_sheet(samples, ["ant", "bee"], side=100, columns=2)
    assert sheet.shape == (3, 2 * (118 + 4) + 4, 2 * 104 + 4)
    captions = sheet[:, 4 + 100 : 4 + 118]
    right, wrong = (captions[:, :, left : left + 100].float().sum((1, 2)) for left in (4, 108))
    assert right.argmax() == 1 and wrong.argmax() == 0  # green, red
    assert not list(draw2d.prediction_sheet([], ["ant", "bee"]))
