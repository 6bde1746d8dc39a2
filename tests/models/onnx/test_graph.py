"""The modules that are exported, run by torch: the same results as evaluation, and networks that are refused."""

import itertools

import pytest
import torch

import export
import models
from models import onnx
from models.onnx import centerfusion
from models.onnx.padding import PaddedImages
from models.retinanet import LEVELS
from ops import radar
from tests import export_helpers
from utils.errors import WeightsError

SIZE = (96, 128)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "arguments"), [("mb1-ssd-lite", {}), ("retinanet", {"depth": 18})])
@torch.no_grad()
def test_nms_selects_the_detections_of_evaluation(name, arguments):
    """With outputs of fixed size; nothing is selected at a threshold of 1."""
    net = export_helpers.randomize(models.build(name, 3, **arguments), SIZE)
    images = export_helpers.generated_images(SIZE, 2)
    sizes = [torch.tensor([SIZE, SIZE]).float()] * (name == "retinanet")
    boxes, labels, scores, *_ = onnx.graph(net, SIZE, with_nms=True)(images.float(), *sizes)
    detections = export_helpers.without_unused_rows({"boxes": boxes, "labels": labels, "scores": scores})
    export_helpers.assert_same_detections(detections, export_helpers.detect(net, images))
    boxes, labels, scores, *_ = onnx.graph(net, SIZE, with_nms=True, threshold=1.0)(images.float(), *sizes)
    assert boxes.abs().max() == scores.max() == 0
    assert labels.max() == -1


@pytest.mark.parametrize("anchors", ["yhenon", "torchvision"])
def test_anchors_of_a_padded_image(anchors):
    net, size, sizes = models.build("retinanet_resnet18", 1, anchors=anchors), (160, 192), [(96, 64), (128, 192)]
    padded = PaddedImages(torch.tensor(sizes).float(), size, LEVELS)
    own = onnx.graph(net, size, with_nms=True).own_anchors(padded).expand(2, -1, -1)
    for part, own_anchors in zip(sizes, own):
        expected = net.anchors(part)
        torch.testing.assert_close(own_anchors[export.rows_of_part(net, part, size)], expected, rtol=0, atol=0)


@pytest.mark.parametrize("anchors", ["yhenon", "torchvision"])
@torch.no_grad()
def test_a_padded_image_has_the_detections_that_it_has_alone(anchors):
    """Here it is padded with more of the image, which must not be seen either."""
    size, sizes = (160, 192), [(160, 192), (70, 192), (129, 64), (65, 90)]
    net = export_helpers.randomize(models.build("retinanet", 3, depth=18, anchors=anchors), size)
    images = export_helpers.generated_images(size, 4)
    outputs = onnx.graph(net, size, with_nms=True)(images.float(), torch.tensor(sizes).float())
    candidates = export.candidates_alone(net, images, torch.tensor(sizes))
    torch.testing.assert_close(dict(zip(onnx.CANDIDATES, outputs[3:])), candidates, rtol=0, atol=1e-3)
    detections = export_helpers.without_unused_rows(dict(zip(("boxes", "labels", "scores"), outputs)))
    expected = [export_helpers.detect_alone(net, *image) for image in zip(images, sizes)]
    export_helpers.assert_same_detections(detections, expected)


def centerfusion_net():
    """With boxes of many sizes and depths, so that many returns are associated and rectangles overlap."""
    net = models.build("centerfusion_resnet18", 3).eval()
    for name, bias in (("wh", 12.0), ("dim", 9.0), ("dep", -3.2)):
        torch.nn.init.normal_(getattr(net, name)[-1].weight, std=0.3)
        torch.nn.init.constant_(getattr(net, name)[-1].bias, bias)
    return net


@torch.no_grad()
def test_centerfusion():
    net = centerfusion_net()
    graph = onnx.graph(net, SIZE)
    graph_inputs, net_inputs = export.make_inputs(net, graph, export_helpers.generated_images(SIZE, 2))
    outputs = net(*net_inputs)
    assert 0.02 < (outputs["pc_hm"] > 0).float().mean() < 0.98
    assert outputs["pc_hm"].unique().numel() > 10
    torch.testing.assert_close(dict(zip(graph.outputs, graph(*graph_inputs))), outputs, rtol=1e-5, atol=1e-5)
    for threshold, best_last in itertools.product(radar.THRESHOLDS, (False, True)):
        expected = radar.associate_peaks(outputs, *net_inputs[1:], threshold, 50.0, best_last=best_last)
        association = centerfusion.associate_peaks(outputs, *net_inputs[1:], threshold, 50.0, best_last)
        torch.testing.assert_close(association, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_centerfusion_in_onnxruntime(tmp_path):
    given = export_helpers.save_checkpoint(centerfusion_net(), tmp_path / "best.pt", SIZE)
    largest = export.main([given, "--out", str(tmp_path / "net.onnx"), "--dynamic-batch"])
    assert set(largest) >= {"hm", "pc_hm", "dep_sec"} and max(largest.values()) < 1e-3


def test_networks_without_a_graph_are_refused():
    for name, arguments, line in (
        ("retinanet_resnet18", {"layout": "jetson"}, "jetson-inference cannot run retinanet"),
        ("resnet18", {"with_nms": True}, "resnet18 has no boxes for NMS; remove --nms"),
        ("mb1-ssd-lite", {"layout": "jetson", "with_nms": True}, "jetson-inference does NMS itself; remove --nms"),
        ("maskrcnn_resnet18", {}, "maskrcnn_resnet18 cannot be exported to ONNX: .* use predict.py"),
    ):
        with pytest.raises(WeightsError, match=line):
            onnx.graph(models.build(name, 2), (300, 300), **arguments)
