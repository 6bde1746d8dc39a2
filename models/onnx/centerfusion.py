"""CenterFusion for ONNX, with fixed shapes.

`ops.radar` only processes cells with a return or within a box, whose number depends on the image. Here each of the 100
boxes is compared with each cell: more work, same result.
"""

import torch
from torch import nn

from models.centerfusion import DeformableConv2d
from ops.boxes import take
from ops.geometry import decode_depth
from ops.heatmaps import gather_cells, topk_peaks
from ops.radar import AREA, BEST_LAST_AREA, depth_tolerance
from ops.rotation import decode

PEAKS = 100


class CenterFusionGraph(nn.Module):
    """Images (and radar map [B,3,h,w], calib [B,3,4]) -> the network's raw heads, each [B,C,h,w], in `outputs`' order.

    normalize: a module that normalizes the images.
    """

    def __init__(self, net, normalize):
        super().__init__()
        self.net, self.normalize = net, normalize
        self.inputs = ("images", "radar_map", "calib") if net.second_heads else ("images",)
        self.outputs = (*net.first_heads, *(("pc_hm",) if net.second_heads else ()), *net.second_heads)
        deformable = any(isinstance(module, DeformableConv2d) for module in net.modules())
        self.opset = 19 if deformable else 18  # DeformConv was added in 19

    def forward(self, images, radar_map=None, calib=None):
        net = self.net
        features, outputs = net.first_stage(self.normalize(images))
        if net.second_heads:
            threshold, max_distance = net.arguments["threshold"], net.arguments["max_distance"]
            association = associate_peaks(outputs, radar_map, calib, threshold, max_distance, net.residual_depth)
            outputs |= net.second_stage(features, outputs["dep"], association)
        return self.postprocess(outputs)

    def postprocess(self, outputs):
        return tuple(outputs[name] for name in self.outputs)


def associate_peaks(outputs, radar_map, calib, threshold, max_distance, best_last):
    """`ops.radar.associate_peaks` in fixed shapes."""
    width = outputs["hm"].shape[-1]
    _, _, index = topk_peaks(outputs["hm"], PEAKS, suppress=False)  # [B,N]
    index = index.flip(1) if best_last else index
    depth, dims, rot, size = (gather_cells(outputs[name], index) for name in ("dep", "dim", "rot", "wh"))
    center = torch.stack([index % width, index // width], dim=-1) + 0.5
    half = size.clamp(min=0) / 2  # [B,N,2]
    depth = decode_depth(depth[..., 0])
    tolerance = depth_tolerance(dims, decode(rot), center[..., 0], calib, threshold)
    has_return, values = nearest_return(radar_map, center, half, (depth - tolerance).clamp(min=0), depth + tolerance)
    values = values / values.new_tensor([max_distance, 1, 1])
    half = half * (BEST_LAST_AREA if best_last else AREA)
    first, last = (center - half).trunc(), (center + half).trunc()
    return overlay(first, last + last.new_tensor([2, 1]), has_return, values, radar_map.shape[-2:])


def grid(size, like):
    """Columns and rows of the cells of a map of `size` (h, w), row by row: float [h*w] each."""
    row = torch.arange(size[0], dtype=like.dtype, device=like.device)[:, None].expand(*size)
    column = torch.arange(size[1], dtype=like.dtype, device=like.device).expand(*size)
    return column.flatten(), row.flatten()


def nearest_return(radar_map, center, half, low, high):
    """(whether a box has a return between low and high [B,N] meters, bool [B,N]; values of the nearest one [B,N,3])."""
    left, top = (center - half).floor()[..., None].unbind(2)  # [B,N,1]
    right, bottom = (center + half).ceil()[..., None].unbind(2)
    column, row = grid(radar_map.shape[-2:], radar_map)
    distance = radar_map[:, :1].flatten(2)  # [B,1,h*w]
    inside = (column >= left) & (column <= right) & (row >= top) & (row <= bottom) & (distance > 0)
    inside &= (distance > low[..., None]) & (distance < high[..., None])  # [B,N,h*w]
    far = torch.finfo(distance.dtype).max
    minimum, index = torch.where(inside, distance, far).min(-1)  # [B,N]
    return minimum < far, gather_cells(radar_map, index)


def overlay(first, end, visible, values, size):
    """Rectangles from first to end [B,N,2] (x, y; the end not included) with values [B,N,3] -> maps [B,3,h,w].

    Later ones overwrite earlier ones. visible: bool [B,N], which of them are drawn.
    """
    column, row = grid(size, values)
    left, top, right, bottom = (*first[..., None].unbind(2), *end[..., None].unbind(2))  # [B,N,1]
    covered = (column >= left) & (column < right) & (row >= top) & (row < bottom) & visible[..., None]
    order = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]  # [N,1]
    top_box = torch.where(covered, order, 0).amax(1)  # [B,h*w], 0 where there is none
    painted = take(values, (top_box - 1).clamp(min=0))  # [B,h*w,3]
    return torch.where(top_box[..., None] > 0, painted, 0.0).transpose(1, 2).unflatten(2, size)
