"""Every kind of network through export.py: onnxruntime gives our boxes within 1e-3 pixels and our classes exactly."""

import pytest
import torch

import export
import models
from ops.images import normalize
from tests import exports

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)
pytestmark = pytest.mark.slow

DETECTORS = [(name, {}, (300, 300)) for name in ("mb1-ssd", "mb1-ssd-lite", "mb2-ssd-lite", "sq-ssd-lite", "vgg16-ssd")]
DETECTORS += [("retinanet", {"depth": depth}, (96, 128)) for depth in (18, 50)]


def exported(name, size, tmp_path, **arguments):
    """(network, its file for any number of pictures)."""
    torch.manual_seed(0)
    net, path = exports.lively(models.build(name, 3, **arguments), size), tmp_path / "net.onnx"
    given = exports.checkpoint(net, tmp_path / "best.pt", size)
    export.main([given, "--out", str(path), "--dynamic-batch"])
    return net, path


@pytest.mark.parametrize(("name", "arguments", "size"), DETECTORS)
def test_detectors(name, arguments, size, tmp_path):
    net, path = exported(name, size, tmp_path, **arguments)
    for count in (1, 3):
        images = torch.stack(export.real_pictures("", size)[:count])
        found = exports.detections_in(net, exports.run_file(path, images), size)
        exports.assert_same_detections(found, exports.detections_of(net, images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_backbones(name, tmp_path):
    net, path = exported(name, (64, 64), tmp_path)
    for count in (1, 3):
        images = torch.stack(export.real_pictures("", (64, 64))[:count])
        with torch.no_grad():
            expected = net(normalize(images, net.image_mean, net.image_std)).softmax(1)
        assert expected.amax() - expected.amin() > 0.01
        found = exports.run_file(path, images)["scores"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.argmax(1), expected.argmax(1), rtol=0, atol=0)
