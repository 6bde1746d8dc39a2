"""Center heatmaps (Zhou et al. 2019, Objects as Points): drawing objects and finding peaks, for a whole batch at once.

A map has h rows and w columns of cells; the flat index of a cell is row * w + column. B batch, K classes, N objects or
peaks.
"""

import torch
from torch.nn import functional as F

from ops.rasterize import covered_cells


def gaussian_radius(height, width, overlap=0.7):
    """CornerNet's radius (Law and Deng 2018) of a box's Gaussian, float [...] in cells, not rounded, at least 0.

    height, width  of the box in cells, float tensors [...], at least 0
    overlap        IoU with the box that boxes with both corners shifted by up to the radius should have

    The formula of CornerNet's first release, with which CenterNet, CenterTrack and CenterFusion are trained. It takes
    the minimum over three quadratic equations (one corner moves in and one out, both in, both out) but adds the root
    and divides by 2 in all of them. So the last is always the minimum, and the radius of a square is about three times
    that of the definition.
    """
    b = -2 * overlap * (height + width)
    root = (b * b + 16 * overlap * (height * width * (1 - overlap))).sqrt()
    return ((b + root) / 2).clamp(min=0)


@torch.no_grad()
def draw_gaussian(centers, radii, map_index, num_maps, size):
    """Heatmaps float32 [num_maps,h,w] with a Gaussian of height 1 at each center; the maximum where they overlap.

    centers    int64 [N,2] x, y in cells; the part of a Gaussian outside its map is cut off. N may be 0
    radii      [N] in cells, at least 0, rounded down: the Gaussian ends there; its sigma is (2 * radius + 1) / 6
    map_index  int64 [N], 0 to num_maps - 1, the map of each object
    size       (h, w)
    """
    height, width = size
    radii = radii.long()[:, None]
    box, row, line, column = covered_cells(torch.cat([centers - radii, centers + radii + 1], dim=1), size)
    twice_variance = 2 * ((2 * radii[:, 0] + 1) / 6) ** 2
    x, y = centers[box].unbind(-1)
    down = (row - y).square() / twice_variance[box]  # of each line
    across = (column - x[line]).square() / twice_variance[box][line]
    cell = ((map_index[box] * height + row) * width)[line] + column
    heatmaps = torch.zeros(num_maps * height * width, device=centers.device)
    value = torch.exp(-(across + down[line]))
    return heatmaps.scatter_reduce_(0, cell, value, "amax").view(num_maps, height, width)


@torch.no_grad()
def cells_in_boxes(boxes, map_index, num_maps, size):
    """The cells that a box touches: bool [num_maps,h,w]. boxes [N,4] xyxy in cells, the others as in `draw_gaussian`.

    Each box adds 1 at two corners and subtracts 1 at the other two; cumulative sums along columns and rows then count
    the boxes over each cell.
    """
    height, width = size
    high = boxes.new_tensor([width, height])
    low, end = boxes[:, :2].floor().clamp(min=0).minimum(high).long(), boxes[:, 2:].ceil().long()
    end = end.minimum(high.long()).maximum(low)
    corners = torch.zeros(num_maps, height + 1, width + 1, dtype=torch.int32, device=boxes.device)
    for x, y, sign in ((low, low, 1), (end, low, -1), (low, end, -1), (end, end, 1)):
        index = (map_index * (height + 1) + y[:, 1]) * (width + 1) + x[:, 0]
        corners.view(-1).scatter_add_(0, index, torch.full_like(index, sign, dtype=torch.int32))
    return corners.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)[:, :height, :width] > 0


@torch.no_grad()
def topk_peaks(hm, count, suppress=True):
    """The `count` highest values of each image, over classes and cells, highest first.

    hm        [B,K,h,w] after the sigmoid, 0 to 1
    suppress  set a cell to 0 if one of its eight neighbors of the same class is higher

    Returns scores [B,count], labels int64 [B,count] and flat cells int64 [B,count]; fewer if the maps have fewer cells.
    """
    if suppress:
        hm = torch.where(F.max_pool2d(hm, 3, stride=1, padding=1) == hm, hm, 0)
    cells = hm.shape[2] * hm.shape[3]
    flat = hm.flatten(1)  # [B,K*h*w]
    scores, index = flat.topk(min(count, flat.shape[1]), dim=1)
    return scores, index // cells, index % cells


def gather_cells(maps, index):
    """The values of maps [B,C,h,w] at flat cells index [B,N]: [B,N,C]. Gradients flow to `maps`."""
    index = index[:, None].expand(-1, maps.shape[1], -1)  # [B,C,N]
    return maps.flatten(2).gather(2, index).transpose(1, 2)
