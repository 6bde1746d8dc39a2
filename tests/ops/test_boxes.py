"""Box offsets and IoU against torchvision."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from ops.boxes import decode, encode, pairwise_iou, to_file_pixels
from tests.box_helpers import random_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_decode_is_the_inverse_of_encode(random):
    anchors, boxes = random_boxes(200, random), random_boxes(200, random)
    offsets = encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(decode(offsets, anchors, WEIGHTS), boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(encode(anchors, anchors, WEIGHTS), torch.zeros(200, 4))


def test_offsets_equal_torchvision(random):
    anchors, boxes = random_boxes(200, random), random_boxes(200, random)
    coder = BoxCoder(WEIGHTS)
    offsets = encode(boxes, anchors, WEIGHTS)
    torch.testing.assert_close(offsets, coder.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4)
    wild = 20 * torch.randn(200, 4, generator=random)  # beyond the limit on the exponent
    torch.testing.assert_close(decode(wild, anchors, WEIGHTS), coder.decode_single(wild, anchors), rtol=1e-4, atol=1e-2)


def test_decode_batches_and_half_precision(random):
    anchors = random_boxes(20, random)
    offsets = torch.randn(3, 20, 4, generator=random)
    batch = decode(offsets, anchors, WEIGHTS)
    torch.testing.assert_close(batch, torch.stack([decode(each, anchors, WEIGHTS) for each in offsets]))
    half = decode(offsets.bfloat16(), anchors, WEIGHTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, decode(offsets.bfloat16().float(), anchors, WEIGHTS))
    assert decode(torch.full((1, 4), 1e4), anchors[:1], WEIGHTS).isfinite().all()


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_pairwise_iou_equals_torchvision(random, scale):
    boxes, anchors = scale * random_boxes(60, random).view(3, 20, 4), scale * random_boxes(30, random)
    iou = pairwise_iou(boxes, anchors)
    assert iou.shape == (3, 20, 30)
    torch.testing.assert_close(iou, torch.stack([box_iou(each, anchors) for each in boxes]), rtol=0, atol=0)
    assert pairwise_iou(boxes[0, :0], anchors).shape == (0, 30)


def test_a_box_without_area_overlaps_nothing():
    point, anchors = torch.tensor([[5.0, 5, 5, 5]]), torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    torch.testing.assert_close(pairwise_iou(point, anchors), torch.zeros(1, 2))


def test_to_file_pixels():
    targets = [{"boxes": torch.tensor([[10.0, 10, 20, 40]]), "shape": (100, 200), "size": (50, 400), "image_id": 7}]
    targets.append({"boxes": torch.zeros(0, 4), "shape": (10, 10), "size": (20, 20), "image_id": 8})
    scaled = to_file_pixels(targets, targets)
    torch.testing.assert_close(scaled[0]["boxes"], torch.tensor([[20.0, 5, 40, 20]]))
    assert scaled[1]["boxes"].shape == (0, 4) and [target["image_id"] for target in scaled] == [7, 8]
    assert targets[0]["boxes"][0, 0] == 10  # a copy
    detections = to_file_pixels([{"boxes": targets[0]["boxes"], "scores": 1}, targets[1]], targets)
    assert set(detections[0]) == {"boxes", "scores"}
    torch.testing.assert_close(detections[0]["boxes"], scaled[0]["boxes"])
