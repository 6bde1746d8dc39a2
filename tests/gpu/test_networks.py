"""Outputs, losses and gradients of one batch through each network on the device and on the CPU, in fp32."""

import pytest
import torch

from tests.gpu.conftest import DEVICE, EXACT
from tests.gpu.recording import record
from tests.script_helpers import Script

CASES = {  # script -> flags of its networks
    "backbone": ["--freeze-bn --arch resnet50", "--arch vgg16 --resolution 64", ""],
    "ssd": ["--freeze-bn", "--arch vgg16-ssd --resolution 300 --batch-size 2"],
    "retinanet": ["", "--depth 50"],
    "centerfusion": ["", "--freeze-bn --arch dla34"],
    "maskrcnn": ["", "--arch maskrcnn_resnet50"],
}
# Maximum norm of a difference, relative to the norm of the tensor, of outputs and gradients; relative difference of
# losses. Two kinds of convolution on a CPU differ by up to 2e-5, 1e-2 and 3e-6. In Mask R-CNN rounding can put
# another region of interest into the batch.
TOLERANCE = {"outputs": 5e-4, "gradients": 5e-2, "losses": 1e-3}
OF_MASKRCNN = {"outputs": 5e-4, "gradients": 0.2, "losses": 2e-2}
OF_ROIS = ("logits", "offsets", "masks")  # outputs of Mask R-CNN with a row per region of interest


def start_with_random_outputs(net, **_):
    """In place of initial weights. RetinaNet's last layers start as zeros: nothing before them would get a gradient."""
    if net.name == "retinanet":
        for layer in (net.head["classification_head"].cls_logits, net.head["regression_head"].bbox_reg):
            torch.nn.init.normal_(layer.weight, std=0.01)


def distance(actual, expected, floor=0.0):
    """Norm of the difference, relative to the norm of `expected`, or to `floor` if that is more."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / max(float(expected.double().norm()), floor, 1e-12))


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, each in CASES.items() for flags in each])
def test_one_batch(name, flags, drawn, tmp_path, monkeypatch):
    script, tolerance = Script(name, drawn(name)), OF_MASKRCNN if name == "maskrcnn" else TOLERANCE
    monkeypatch.setattr(script.module.pretrained, "init_weights", start_with_random_outputs)
    words = [*flags.split(), *EXACT, "--preflight"]
    cpu = record(script, tmp_path, *words, "--device", "cpu")
    seen = record(script, tmp_path, *words, "--device", DEVICE)
    outputs = [r.outputs if isinstance(r.outputs, dict) else {"logits": r.outputs} for r in (seen, cpu)]
    for key, expected in outputs[1].items():
        if name != "maskrcnn" or key not in OF_ROIS:
            assert distance(outputs[0][key], expected) < tolerance["outputs"], key
    assert seen.losses[0] == pytest.approx(cpu.losses[0], rel=tolerance["losses"])
    assert seen.gradients.keys() == cpu.gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in cpu.gradients.values()]).norm()
    for key, expected in cpu.gradients.items():  # that of a bias before a batch norm is zero but for rounding
        assert distance(seen.gradients[key], expected, floor=1e-3 * float(whole)) < tolerance["gradients"], key
