"""Conv3x3 on narrow maps, and conv_norm with a norm in training."""

import pytest
import torch
from torch import nn

from models.backbones import layers


@pytest.mark.parametrize(("groups", "stride"), [(1, 2), (1, 1), (8, 2)])
@pytest.mark.parametrize("height", [1, 2, 5])
def test_conv3x3_on_a_map_one_cell_wide(groups, stride, height):
    """The values and gradients of torch's own convolution, and in bf16 on a CPU the same bits every time."""
    torch.manual_seed(0)
    conv = layers.Conv3x3(8, 16, stride, groups=groups).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, height, 1).contiguous(memory_format=torch.channels_last)

    def output_and_gradient(forward):
        conv.zero_grad()
        y = forward(x)
        y.float().square().sum().backward()
        return y.detach(), conv.weight.grad.clone()

    expected = output_and_gradient(lambda x: torch.conv2d(x, conv.weight, conv.bias, stride, 1, 1, groups))
    torch.testing.assert_close(output_and_gradient(conv), expected)
    with torch.autocast("cpu", torch.bfloat16):
        first = output_and_gradient(conv)
        for _ in range(5):
            nans = [torch.full((4096,), float("nan"), dtype=torch.bfloat16) for _ in range(64)]
            del nans  # uninitialized memory will contain them
            torch.testing.assert_close(output_and_gradient(conv), first, rtol=0, atol=0)
    torch.testing.assert_close(first[1], expected[1], rtol=0.05, atol=0.5)


@pytest.mark.parametrize(("size", "padding"), [((5, 2), 1), ((1, 4), 1), ((5, 3), 0)])
def test_conv3x3_on_wider_maps(size, padding):
    torch.manual_seed(0)
    conv, x = layers.Conv3x3(4, 6, padding=padding), torch.randn(2, 4, *size)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, padding=padding))


def test_conv_norm_in_training_updates_the_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layers.conv_norm(x, conv, norm), nn.BatchNorm2d(4)(conv(x)), rtol=0, atol=0)
    assert norm.num_batches_tracked == 1
