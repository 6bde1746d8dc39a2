"""Normalizing batches on the device."""

import pytest
import torch

from ops.images import normalize

MEAN, STD = (123.0, 117.0, 104.0), (58.0, 57.0, 2.0)


def test_every_channel_is_normalized():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    result = normalize(images, MEAN, STD)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        torch.testing.assert_close(result[:, channel], (images[:, channel].float() - MEAN[channel]) / STD[channel])
    torch.testing.assert_close(normalize(images.contiguous(memory_format=torch.channels_last), MEAN, STD), result)


def test_padding_becomes_exactly_zero():
    images = torch.randint(1, 100, (3, 3, 8, 12), dtype=torch.uint8)  # below every mean
    shapes = [(8, 12), (5, 12), (3, 7)]
    result, unpadded = normalize(images, MEAN, STD, shapes), normalize(images, MEAN, STD)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for image, expected, (height, width) in zip(result, unpadded, shapes):
        assert torch.equal(image[:, :height, :width], expected[:, :height, :width])
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert image[:, :height, :width].all()  # and nothing else is 0 here


def test_every_image_needs_a_shape():
    with pytest.raises(ValueError, match="zip"):
        normalize(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), MEAN, STD, [(4, 4)])
