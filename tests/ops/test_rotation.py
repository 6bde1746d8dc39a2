"""Rotation bins: their limits, and angles decoded again."""

import math

import pytest
import torch

from ops import rotation
from ops.geometry import wrap


def test_limits_of_the_bins():
    """Both bins have the angles within pi/6 of 0 and of pi."""
    degrees = torch.tensor([-179.0, -151, -149, -90, -31, -29, 0, 29, 31, 90, 149, 151, 180])
    bins, residuals = rotation.encode(degrees.deg2rad())
    assert bins[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert bins[:, 1].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(residuals, torch.stack([degrees + 90, degrees - 90], -1).deg2rad() * bins)
    assert bins.dtype == torch.int64


@pytest.mark.parametrize("side", [0, 1])
def test_each_bin_decodes_its_angles(side):
    """Also if sine and cosine are not of unit length."""
    alpha = torch.linspace(-math.pi, math.pi, 1001)[1:]
    bins, residuals = rotation.encode(alpha)
    assert bins.any(-1).all()
    inside = bins[:, side] > 0
    rot = torch.zeros(len(alpha), 2, 4)
    rot[:, side, 1] = 1
    rot[..., 2], rot[..., 3] = 3 * residuals.sin(), 3 * residuals.cos()
    decoded = rotation.decode(rot.flatten(1))
    assert decoded.abs().max() <= math.pi + 1e-6
    torch.testing.assert_close(wrap(decoded - alpha)[inside], torch.zeros(int(inside.sum())), rtol=0, atol=1e-5)


def test_decode_of_a_batch():
    rot = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    decoded = rotation.decode(rot)
    assert decoded.shape == (2, 5)
    first = rot[..., 1] > rot[..., 5]
    assert first.any() and not first.all()
    expected = torch.where(
        first,
        torch.atan2(rot[..., 2], rot[..., 3]) - math.pi / 2,
        torch.atan2(rot[..., 6], rot[..., 7]) + math.pi / 2,
    )
    torch.testing.assert_close(decoded.cos(), expected.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.sin(), expected.sin(), rtol=0, atol=1e-5)
