"""Pooling of RoIs against torchvision's, in the way for a CPU and in that for a GPU."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ops import roi_pool


@pytest.mark.parametrize("pool", [roi_pool.pool_by_level, roi_pool.pool_on_all_levels])
def test_pooled_rois_and_gradients_are_torchvisions(pool, monkeypatch):
    monkeypatch.setattr(roi_pool, "pool_by_level", pool)
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 512 // s, 640 // s, requires_grad=True) for s in roi_pool.STRIDES]
    side, corner = 2 ** (2 + 7 * torch.rand(2, 30, 1)), torch.rand(2, 30, 2) * 300
    rois = torch.cat([corner, corner + side], dim=-1)
    rois[1, -3:] = 0  # padding
    torchvisions = MultiScaleRoIAlign(list("0123"), 7, 2)
    torchvisions.scales, torchvisions.map_levels = [1 / s for s in roi_pool.STRIDES], LevelMapper(2, 5)
    assert len(set(torchvisions.map_levels(list(rois)).tolist())) == 4
    expected = torchvisions(dict(zip("0123", features)), list(rois), None)
    ours = roi_pool.pool_rois(features, rois, 7)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    gradients = (torch.autograd.grad((x * weight).sum(), features) for x in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
