"""CenterFusion for a graph: radar is handed to boxes by comparing every box with every cell.

`ops.radar` visits only the cells that hold a return or that a box covers, whose number differs from picture to picture:
what a graph has no shape for. Here each of the 100 boxes looks at each cell: more work, the same answer.
"""

import torch
from torch import nn

from models.centerfusion import Deformable
from ops.geometry import depth_of
from ops.heatmap import gather, peaks
from ops.radar import AREA, SURE_AREA, THRESHOLDS, half_extent
from ops.rotation import decode

PEAKS = 100


class CameraRadar(nn.Module):
    """Images (and radar map [B,3,h,w], calib [B,3,4]) -> the network's raw heads, each [B,C,h,w], in `outputs`' order.

    before: the module that normalises.
    """

    def __init__(self, net, before):
        super().__init__()
        self.net, self.before = net, before
        self.inputs = ("images", "radar_map", "calib") if net.second_stage else ("images",)
        self.outputs = (*net.first_stage, *(("pc_hm",) if net.second_stage else ()), *net.second_stage)
        deformable = any(isinstance(module, Deformable) for module in net.modules())
        self.opset = 19 if deformable else 18  # DeformConv came with 19

    def forward(self, images, radar_map=None, calib=None):
        net = self.net
        seen, outputs = net.first(self.before(images))
        if net.second_stage:
            how = net.arguments["threshold"], net.arguments["max_distance"]
            association = associate_peaks(outputs, radar_map, calib, *how, surest_last=net.refines)
            outputs |= net.second(seen, outputs["dep"], association)
        return self.answers(outputs)

    def answers(self, outputs):
        return tuple(outputs[name] for name in self.outputs)


def associate_peaks(outputs, radar_map, calib, threshold, max_distance, surest_last):
    """`ops.radar.associate_peaks`, in operations of fixed shapes."""
    width = outputs["hm"].shape[-1]
    _, _, index = peaks(outputs["hm"], PEAKS, suppress=False)  # [B,N]
    index = index.flip(1) if surest_last else index
    depth, dims, rot, size = (gather(outputs[name], index) for name in ("dep", "dim", "rot", "wh"))
    center = torch.stack([index % width, index // width], dim=-1) + 0.5
    half = size.clamp(min=0) / 2  # [B,N,2]
    depth = depth_of(depth[..., 0])
    reach = THRESHOLDS[threshold] * half_extent(dims, decode(rot), center[..., 0], calib)
    found, values = nearest(radar_map, center, half, (depth - reach).clamp(min=0), depth + reach)
    values = values / values.new_tensor([max_distance, 1, 1])
    half = half * (SURE_AREA if surest_last else AREA)
    first, last = (center - half).trunc(), (center + half).trunc()
    return overlay(first, last + last.new_tensor([2, 1]), found, values, radar_map.shape[-2:])


def grid(size, like):
    """Columns and rows of the cells of a map of `size` (h, w), row by row: float [h*w] each."""
    row = torch.arange(size[0], dtype=like.dtype, device=like.device)[:, None].expand(*size)
    column = torch.arange(size[1], dtype=like.dtype, device=like.device).expand(*size)
    return column.flatten(), row.flatten()


def nearest(radar_map, center, half, low, high):
    """Has a box a return between low and high [B,N] metres: bool [B,N]; and the nearest one's values [B,N,3]."""
    left, top = (center - half).floor()[..., None].unbind(2)  # [B,N,1]
    right, bottom = (center + half).ceil()[..., None].unbind(2)
    column, row = grid(radar_map.shape[-2:], radar_map)
    distance = radar_map[:, :1].flatten(2)  # [B,1,h*w]
    inside = (column >= left) & (column <= right) & (row >= top) & (row <= bottom) & (distance > 0)
    inside &= (distance > low[..., None]) & (distance < high[..., None])  # [B,N,h*w]
    far = torch.finfo(distance.dtype).max
    least, index = torch.where(inside, distance, far).min(-1)  # [B,N]
    return least < far, gather(radar_map, index)


def overlay(first, end, painted, values, size):
    """Rectangles first to end [B,N,2] (x, y; the end not included) of values [B,N,3] -> maps [B,3,h,w].

    Later boxes cover earlier ones; only those of `painted` [B,N] count.
    """
    column, row = grid(size, values)
    left, top, right, bottom = (*first[..., None].unbind(2), *end[..., None].unbind(2))  # [B,N,1]
    covered = (column >= left) & (column < right) & (row >= top) & (row < bottom) & painted[..., None]
    order = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]  # [N,1]
    top_box = torch.where(covered, order, 0).amax(1)  # [B,h*w], 0 where there is none
    held = values.gather(1, (top_box - 1).clamp(min=0)[..., None].expand(-1, -1, 3))  # [B,h*w,3]
    return torch.where(top_box[..., None] > 0, held, 0.0).transpose(1, 2).unflatten(2, size)
