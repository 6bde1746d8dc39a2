"""What predict.py draws: masks, texts that leave each other readable, answers, sheets, key frames."""

import torch
from PIL import Image, ImageDraw

from training import pictures, pictures3d


def test_masks_are_translucent_with_an_edge_and_nothing_else_changes():
    image, masks = torch.full((3, 90, 120), 100, dtype=torch.uint8), torch.zeros(1, 90, 120, dtype=torch.bool)
    masks[0, 30:60, 40:80] = True
    boxes, labels = torch.tensor([[40.0, 30, 80, 60]]), torch.tensor([0])
    bare = pictures.draw(image, boxes, labels, ["cat"], torch.tensor([0.9]))
    drawn = pictures.draw(image, boxes, labels, ["cat"], torch.tensor([0.9]), masks)
    colour = torch.tensor(pictures.class_colour(0), dtype=torch.uint8)
    assert torch.equal(drawn[:, 52, 60], 50 + colour // 2)
    assert torch.equal(drawn[:, 58, 60], colour)  # just within the line of the box
    assert torch.equal(drawn[:, 70:], bare[:, 70:]) and torch.equal(drawn[:, :, 90:], bare[:, :, 90:])
    assert (image == 100).all()


def test_the_surer_mask_lies_on_top():
    image, masks = torch.zeros(3, 60, 60, dtype=torch.uint8), torch.ones(2, 60, 60, dtype=torch.bool)
    boxes, labels = torch.tensor([[0.0, 0, 60, 60]]).repeat(2, 1), torch.tensor([0, 1])
    for scores, top in (([0.9, 0.2], 0), ([0.2, 0.9], 1)):
        drawn = pictures.draw(image, boxes, labels, ["a", "b"], torch.tensor(scores), masks)
        other = torch.tensor(pictures.class_colour(1 - top), dtype=torch.uint8) // 2
        expected = other // 2 + torch.tensor(pictures.class_colour(top), dtype=torch.uint8) // 2
        assert torch.equal(drawn[:, 30, 30], expected)


class Pen:
    """Notes the rectangles that would be drawn."""

    def __init__(self):
        self.rectangles, self.texts = [], []

    def rectangle(self, corners, fill):
        self.rectangles.append(corners)

    def text(self, place, text, **more):
        self.texts.append(text)


def test_texts_never_cover_each_other_and_stay_in_the_picture():
    pen, size = Pen(), (300, 200)
    boxes = [[10 + i, 10 + i % 3, 90 + i, 60] for i in range(12)] + [[280, 180, 299, 199], [0, 0, 300, 200]]
    pictures.write_tags(pen, size, boxes, [f"person {i}" for i in range(14)], [(0, 0, 0)] * 14)
    assert pen.texts[0] == "person 0" and 5 <= len(pen.texts) < 14  # there is no room for all
    shown = torch.tensor(pen.rectangles)
    assert shown.min() >= 0 and (shown[:, 2:] < torch.tensor(size)).all()
    for i, (a, b, c, d) in enumerate(pen.rectangles):
        for e, f, g, h in pen.rectangles[:i]:
            assert c < e or g < a or d < f or h < b


def test_answers_stand_under_the_picture_with_bars_as_long_as_their_scores():
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    drawn = pictures.with_answers(image, ["ant", "bee"], [(255, 0, 0), (0, 255, 0)], [0.5, 0.25], least=400)
    assert drawn.shape[2] == 400 and (drawn[:, :160] == 0).all()
    height = (drawn.shape[1] - 160) // 2
    for row, colour, length in ((0, (255, 0, 0), 200), (1, (0, 255, 0), 100)):
        line = drawn[:, 160 + row * height + 2]
        bar = (line == torch.tensor(colour, dtype=torch.uint8)[:, None]).all(0)
        assert abs(int(bar.sum()) - length) <= 2 and bar[:90].all()


def test_a_thumbnail_keeps_its_shape_and_a_long_caption_its_end():
    cell = pictures.thumbnail(torch.zeros(3, 50, 200, dtype=torch.uint8), "x" * 300, side=100)
    assert cell.shape == (3, 100 + pictures.CAPTION, 100)
    rows = (cell[:, :100] == 0).all(0).any(1).nonzero().flatten()
    assert len(rows) == 25 and abs(int(rows.min()) - 37) <= 1
    assert pictures.shortened("a short one", 200, 12) == "a short one"
    short = pictures.shortened(f"{'very/' * 40}end.jpg", 100, 12)
    assert short.startswith("...") and short.endswith("end.jpg")
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert pen.textlength(short, font_size=12) <= 100
    assert pictures.contact_sheet([cell] * 7, columns=3).shape == (3, 3 * (118 + 4) + 4, 3 * 104 + 4)


def test_masks_of_truth_and_detections_beside_each_other():
    image, mask = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.zeros(1, 50, 50, dtype=torch.uint8)
    mask[0, 10:40, 10:40] = 1
    target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([0]), "size": (50, 50), "masks": mask}
    found = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    beside = pictures.beside_truth(image, target, found | {"masks": mask[:0]}, ["cat"], side=100)
    assert (beside[:, 60, 50] > 0).any() and beside[:, :, 108:].sum() == 0


def test_around_the_camera_what_lies_behind_it_is_shown_too():
    nothing = {"corners": torch.zeros(0, 8, 3), "center": torch.zeros(0, 3), "velocity": torch.zeros(0, 3)}
    points = torch.tensor([[0.0, 0, -30, 0, 0]])
    blue = torch.tensor(pictures3d.BLUE, dtype=torch.uint8)[:, None, None]
    for around, where in (("CAM_FRONT", [(360, 240)]), ("", [])):
        image = pictures3d.from_above(nothing, nothing, points, reach=60, side=480, around=around)
        shown = [(int(y), int(x)) for y, x in (image == blue).all(0).nonzero()]
        assert bool(shown) == bool(where) and set(where) <= set(shown)


def test_an_overview_has_every_camera_in_its_place():
    views = {"CAM_FRONT": torch.full((3, 9, 16), 10), "CAM_BACK_RIGHT": torch.full((3, 9, 16), 20)}
    views = {name: view.to(torch.uint8) for name, view in views.items()}
    drawn = pictures3d.overview(views, torch.full((3, 30, 30), 30, dtype=torch.uint8), size=(90, 160))
    gap = pictures3d.GAP
    assert drawn.shape == (3, 180 + gap, 3 * (160 + gap) + 180 + gap)
    assert drawn[0, 80, 160 + gap + 80] == 10 and drawn[0, 170 + gap, 2 * (160 + gap) + 80] == 20
    assert drawn[0, 80, 80] == 255 and drawn[0, 90, -90] == 30


def test_far_boxes_have_no_text_and_those_half_behind_have():
    corners = torch.tensor([[[10.0, 10], [20, 40]] * 4, [[10.0, 10], [20, 14]] * 4])
    ahead = torch.tensor([[True] * 4 + [False] * 4, [True] * 8])
    tags = pictures3d.tags_of(corners, ahead, torch.tensor([0, 1]), ["car", "cone"], least=8)
    assert tags == ([[10.0, 10.0, 20.0, 40.0]], ["car"], [pictures.class_colour(0)])
    assert pictures3d.tags_of(corners, ahead & False, torch.tensor([0, 1]), ["car", "cone"], least=8) == ([], [], [])
