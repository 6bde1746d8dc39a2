"""Pictures of any size for RetinaNet: resized by their sides, padded to one batch."""

import pickle

import pytest
import torch
from torchvision import tv_tensors

from data import check_target, transforms, voc
from data.loader import PadCollate, Targets, collate_labels


def picture(height, width, boxes):
    image = tv_tensors.Image(torch.randint(1, 255, (3, height, width), dtype=torch.uint8))
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "ignore": torch.arange(len(boxes)) % 2 == 1,
        "image_id": 7,
        "size": (height, width),
    }
    return image, target


@pytest.mark.parametrize(
    ("size", "result"),
    [
        ((100, 150), (60, 90)),  # the shortest side rules
        ((150, 100), (90, 60)),
        ((100, 250), (40, 100)),  # the longest side rules
        ((30, 40), (60, 80)),  # small pictures grow
        ((97, 131), (60, 81)),  # 81.03
        ((2, 900), (1, 100)),  # 0.2 pixels are one
    ],
)
def test_the_shortest_side_unless_the_longest_passes_its_limit(size, result):
    image, target = transforms.pyramid_evaluate(60, 100)(*picture(*size, [[0, 0, size[1], size[0]]]))
    assert image.shape == (3, *result) and image.dtype == torch.uint8
    expected = torch.tensor([[0.0, 0, result[1], result[0]]])  # by what came out, not by the scale asked for
    torch.testing.assert_close(torch.Tensor(target["boxes"]), expected)
    assert target["boxes"].canvas_size == result
    assert target["size"] == size and target["image_id"] == 7


def test_a_box_stays_on_its_pixels():
    image, target = picture(120, 160, [[40, 30, 80, 90]])
    image[:] = 0
    image[0, 30:90, 40:80] = 255
    image, target = transforms.pyramid_evaluate(77, 200)(image, target)
    rows, columns = (image[0].amax(side) > 127 for side in (1, 0))
    edges = [columns.nonzero()[[0, -1], 0], rows.nonzero()[[0, -1], 0]]
    seen = torch.tensor([edges[0][0], edges[1][0], edges[0][1] + 1, edges[1][1] + 1]).float()
    torch.testing.assert_close(torch.Tensor(target["boxes"])[0], seen, rtol=0, atol=1)


def test_sides_are_drawn_and_flips_too():
    image, target = picture(100, 200, [[0, 0, 20, 100]])
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        moved, changed = transforms.pyramid_train((40, 50, 60), 110, flip=0.5)(image, target)
        seen.add((moved.shape[-2], bool(changed["boxes"][0, 0] > 0)))
    assert seen == {(height, flipped) for height in (40, 50, 55) for flipped in (False, True)}
    torch.manual_seed(0)
    still, _ = transforms.pyramid_train((50,), 110, flip=0)(image, target)
    assert torch.equal(still, transforms.pyramid_evaluate(50, 110)(image, target)[0])


def test_colour_changes_only_where_asked_for():
    image, target = picture(50, 60, [])
    plain = transforms.pyramid_train((50,), 110, flip=0, colour=0.0)(image, target)[0]
    other = transforms.pyramid_train((50,), 110, flip=0, colour=1.0)(image, target)[0]
    assert torch.equal(plain, image) and not torch.equal(other, image)


def test_boxes_of_next_to_no_width_are_left_out_with_all_their_fields():
    boxes = [[0, 0, 400, 300], [10, 10, 10.05, 200], [10, 10, 10.2, 200], [10, 10, 300, 10.05], [0, 0, 1, 1]]
    image, target = picture(300, 400, boxes)
    _, changed = transforms.pyramid_evaluate(30, 100)(image, target)  # a tenth: 0.05 is 0.005, 0.2 is 0.02
    assert changed["labels"].tolist() == [0, 2, 4] and changed["ignore"].tolist() == [False, False, False]
    assert len(changed["boxes"]) == 3 and len(target["boxes"]) == 5  # the input is left alone


def test_scaled_corners_stay_inside():
    for side in range(60, 400, 7):
        _, target = transforms.pyramid_evaluate(300, 1000)(*picture(side, side, [[0, 0, side, side]]))
        assert (target["boxes"] <= 300).all(), side


def test_pictures_without_objects():
    _, target = transforms.pyramid_train((32,), 64, colour=1.0)(*picture(40, 50, []))
    assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
    assert target["labels"].shape == target["ignore"].shape == (0,)


def test_a_data_set_keeps_the_contract(drawn_voc):
    dataset = voc.load([drawn_voc], "train", transform=transforms.pyramid_train((90, 120), 150))
    for index in range(len(dataset)):
        image, target = dataset[1, index]
        check_target(image, target, len(dataset.classes))
        assert max(image.shape) <= 150
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[1, 0][0], dataset[1, 0][0])


# ---- one batch of them ----


def test_pad_collate():
    samples = [picture(40, 70, [[1, 2, 30, 40]]), picture(65, 33, []), picture(10, 64, [])]
    images, targets = pickle.loads(pickle.dumps(PadCollate(32)))(samples)
    assert type(images) is torch.Tensor and images.dtype == torch.uint8 and images.shape == (3, 3, 96, 96)
    assert isinstance(targets, Targets) and type(targets[0]["boxes"]) is torch.Tensor
    assert [target["shape"] for target in targets] == [(40, 70), (65, 33), (10, 64)]
    assert "shape" not in samples[0][1]
    for pixels, (image, _), (height, width) in zip(images, samples, [(40, 70), (65, 33), (10, 64)]):
        assert torch.equal(pixels[:, :height, :width], torch.Tensor(image).to(torch.uint8))
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_a_multiple_is_not_rounded_further():
    images, _ = PadCollate(32)([picture(64, 96, [])])
    assert images.shape == (1, 3, 64, 96)
    images, _ = PadCollate(1)([picture(61, 90, []), picture(60, 91, [])])
    assert images.shape == (2, 3, 61, 91)


def test_collate_labels():
    samples = [
        (tv_tensors.Image(torch.full((3, 4, 5), value, dtype=torch.uint8)), value, value + 1) for value in (3, 9)
    ]
    images, labels, image_ids = collate_labels(samples)
    assert type(images) is torch.Tensor and images.shape == (2, 3, 4, 5) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 9] and image_ids == [4, 10]
    assert images[1].unique().tolist() == [9]
