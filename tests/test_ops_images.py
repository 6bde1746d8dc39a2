"""Normalising padded batches: pictures as without padding, exactly 0 around them."""

import pytest
import torch

from ops.images import normalize

MEAN, STD = (123.0, 117.0, 104.0), (58.0, 57.0, 2.0)


def test_padding_becomes_exactly_zero():
    images = torch.randint(1, 100, (3, 3, 8, 12), dtype=torch.uint8)  # below every mean
    shapes = [(8, 12), (5, 12), (3, 7)]
    result = normalize(images, MEAN, STD, shapes)
    assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == torch.float32
    whole = normalize(images, MEAN, STD)
    for picture, plain, (height, width) in zip(result, whole, shapes):
        assert torch.equal(picture[:, :height, :width], plain[:, :height, :width])
        assert not picture[:, height:].any() and not picture[:, :, width:].any()
        assert picture[:, :height, :width].all()  # and nothing else is 0 here
    assert not torch.equal(result, whole)


def test_without_shapes_the_whole_batch_is_picture():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    expected = -(torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(normalize(images, MEAN, STD), expected, check_stride=False)


def test_a_shape_for_every_picture():
    with pytest.raises(ValueError, match="zip"):
        normalize(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), MEAN, STD, [(4, 4)])
