"""The ResNet body of detectors: folded norms change neither values nor gradients."""

import pytest
import torch
import torchvision
from torch import nn

from models.backbones import resnet
from tests.model_helpers import randomize_norms


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("train_norms", [False, True])
def test_folded_norms_change_nothing(depth, train_norms):
    """Against torchvision's, which runs every norm separately.

    In float64: the sums of a gradient over many cells depend on their order in float32.
    """
    torch.manual_seed(0)
    body = randomize_norms(resnet.body(depth).double(), affine=True)
    expected_net = getattr(torchvision.models, f"resnet{depth}")(weights=None).double().eval()
    expected_net.load_state_dict(body.state_dict(), strict=False)
    body.eval()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(train_norms)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    actual = body.feature_maps(images)[-1]
    x = expected_net.maxpool(expected_net.relu(expected_net.bn1(expected_net.conv1(images))))
    expected = expected_net.layer4(expected_net.layer3(expected_net.layer2(expected_net.layer1(x))))
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    expected.square().mean().backward()
    parameters = dict(expected_net.named_parameters())
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, parameters[name].grad, msg=name)
        else:
            assert parameter.grad is None and parameter.ndim == 1


def test_stages_are_all_layers_in_order():
    body = resnet.body(18)
    assert len(body.stages()) == 5
    assert [id(p) for stage in body.stages() for p in stage.parameters()] == [id(p) for p in body.parameters()]
