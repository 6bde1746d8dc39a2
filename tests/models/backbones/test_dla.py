"""DLA-34 against the published names and against batch norms that are not folded."""

import pytest
import torch
from torch import nn

import models
from models.backbones import dla
from tests import golden
from tests.model_helpers import randomize_norms


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def test_names_are_the_published_ones():
    """The body of CenterFusion; 15.8 million parameters with ImageNet's classes."""
    shapes = golden.case("centerfusion")["state_dict"]
    expected = {name.removeprefix("base."): shape for name, shape in shapes.items() if name.startswith("base.")}
    assert {name: list(value.shape) for name, value in dla.DLA34().state_dict().items()} == expected
    assert sum(p.numel() for p in models.build("dla34", 1000).parameters()) == 15783832


@pytest.mark.parametrize("size", [(64, 96), (50, 75)])
def test_levels(size):
    with torch.no_grad():
        levels = dla.DLA34().feature_maps(torch.randn(1, 3, *size))
    for i, (level, channels) in enumerate(zip(levels, dla.CHANNELS, strict=True)):
        assert level.shape == (1, channels, *(-(-side // 2**i) for side in size))


def test_folded_norms_change_nothing():
    """In evaluation the outputs are those of batch norms that run after their convolutions."""
    net = randomize_norms(dla.DLA34().double()).eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = net.feature_maps(images)[-1]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = True  # so that it is not folded
            module.forward = lambda x, m=module: nn.functional.batch_norm(
                x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps
            )
    torch.testing.assert_close(net.feature_maps(images)[-1], folded)
