"""Every classifier: torchvision's names and outputs, and a first training step."""

import pytest
import torch
import torchvision

import models
from models import backbones
from tests.model_helpers import assert_same_state, randomize_norms

IN_TORCHVISION = [name for name in backbones.NETWORKS if hasattr(torchvision.models, name)]
LARGE = ("vgg16", "vgg16_bn", "resnet101", "resnet152")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_names_are_torchvisions(name):
    with torch.device("meta"):
        net, expected = models.build(name, 7), getattr(torchvision.models, name)(weights=None, num_classes=7)
    shapes, expected = ([(key, value.shape) for key, value in n.state_dict().items()] for n in (net, expected))
    assert shapes == expected
    assert (net.name, net.num_classes, net.image_mean) == (name, 7, (123.675, 116.28, 103.53))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("training", [False, True])
def test_resnet_is_torchvisions(depth, training):
    net = randomize_norms(models.build(f"resnet{depth}", 5)).train(training)
    expected_net = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=5).train(training)
    expected_net.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 64, 96)
    logits, expected = net(images), expected_net(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert_same_state(net, expected_net)
    assert [x.shape[1] for x in net.feature_maps(images)] == list(net.channels)


@pytest.mark.parametrize("name", [name for name in backbones.NETWORKS if name not in LARGE])
def test_new_network_trains(name):
    """Every trainable parameter gets a finite gradient, and the first logits are of moderate size."""
    net = models.build(name, 3)
    logits = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert 1e-4 < logits.std() < 10
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    gradients = {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def test_width_mult():
    net = models.build("mobilenet_v2", 3, width_mult=0.5)
    assert net.arguments == {"width_mult": 0.5}
    assert net.features[0][0].out_channels == 16
