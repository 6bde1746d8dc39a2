"""Predictions in images of any size; tests/test_predict.py has those of checkpoints and files."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import inference
import models

RUN = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_five_of_the_given_classes():
    net = models.build("resnet18", 9).eval()
    net.image_size = (32, 32)
    image, labels = torch.randint(256, (3, 40, 60), dtype=torch.uint8), torch.tensor([0, 2, 3, 5, 7, 8])
    (every,) = inference.classify(net, [image], RUN, 0, torch.arange(9))
    assert every["scores"].tolist() == sorted(every["scores"].tolist(), reverse=True) and len(every["scores"]) == 5
    (some,) = inference.classify(net, [image], RUN, 0, labels)
    assert set(some["labels"].tolist()) <= set(labels.tolist()) and len(some["labels"].unique()) == 5
    (three,) = inference.classify(net, [image], RUN, some["scores"][2].item(), labels)
    torch.testing.assert_close(three, {name: value[:3] for name, value in some.items()})


@pytest.mark.parametrize("fixed_size", [False, True])
def test_boxes_are_in_pixels_of_each_file(fixed_size):
    """The same image in twice the size: the same objects, with boxes of twice the size."""
    net = models.build("mb1-ssd-lite", 2) if fixed_size else models.build("retinanet", 2, depth=18)
    net.eval().image_size, net.min_side, net.max_side = (96, 96) if fixed_size else None, 64, 96
    color = torch.tensor([200, 90, 30], dtype=torch.uint8).view(3, 1, 1)
    images = [color.expand(3, 64, 90), color.expand(3, 90, 64), color.expand(3, 128, 180)]
    small, upright, large = inference.detect(net, images, RUN, 0, torch.arange(2))
    torch.testing.assert_close(large["scores"], small["scores"])
    torch.testing.assert_close(large["boxes"], 2 * small["boxes"])
    for detection, (width, height) in ((small, (90, 64)), (upright, (64, 90)), (large, (180, 128))):
        assert len(detection["boxes"]) > 5 and (detection["boxes"] >= 0).all()
        assert (detection["boxes"] <= torch.tensor([width, height]).repeat(2) + 1e-3).all()
    assert {label for detection in (small, large) for label in detection["labels"].tolist()} <= {0, 1}


def test_boxes_of_a_camera_image_are_in_pixels_of_the_file():
    """The same image in twice the size: the same objects in 3D, with boxes of twice the size inside the image."""
    net = models.build("centerfusion_resnet18", 10, radar=False).eval()
    net.image_size = (64, 96)
    torch.nn.init.constant_(net.wh[-1].bias, 8.0)
    color = torch.tensor([200, 90, 30], dtype=torch.uint8).view(3, 1, 1)
    images = [color.expand(3, 64, 96), color.expand(3, 128, 192)]
    small, large = inference.detect_in_camera(net, images, RUN, 0, torch.arange(10), None, ())
    for name in ("center", "dims", "yaw", "labels", "scores"):
        torch.testing.assert_close(large[name], small[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(large["boxes"], 2 * small["boxes"], rtol=1e-4, atol=1e-3)
    boxes = small["boxes"]
    assert boxes.shape == (100, 4) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.amin(0).tolist()[:2] == [0, 0] and boxes.amax(0).tolist()[2:] == [96, 64]
    torch.testing.assert_close(large["calib"][:2], 2 * small["calib"][:2])


def test_only_selected_detections_remain():
    detections = {"scores": torch.tensor([0.9, 0.5, 0.49, 0.8]), "labels": torch.tensor([1, 2, 1, 0])}
    selected = inference.select(detections, 0.5, torch.tensor([1, 2]))
    assert selected["labels"].tolist() == [1, 2] and selected["scores"].tolist() == pytest.approx([0.9, 0.5])
