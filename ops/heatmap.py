"""Centre heatmaps (Zhou et al. 2019, Objects as Points): drawn from objects, read for peaks, for a whole batch at once.

A map has h rows and w columns of cells; the flat index of a cell is row * w + column. B batch, K classes, N objects or
peaks.
"""

import torch
from torch.nn import functional as F

from ops.areas import lines


def radius(height, width, overlap=0.7, roots="published"):
    """CornerNet's radius (Law and Deng 2018) of a box's Gaussian, float [...] in cells, not rounded, at least 0.

    height, width  of the box in cells, float tensors [...], at least 0
    overlap        two corners shifted by up to the radius should still make a box of this IoU with the true one
    roots          "published": as CornerNet first came out and CenterNet, CenterTrack and CenterFusion train: the three
                   quadratics' roots are all taken with a plus and a division by 2, which makes the radius of a square
                   about three times as large. "exact": the radius that the rule above asks for
    """
    total, area = height + width, height * width
    equations = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),  # one corner in, one out
        (4.0, 2 * total, area * (1 - overlap)),  # both in
        (4 * overlap, -2 * overlap * total, -area * (1 - overlap)),  # both out
    )
    found = []
    for (a, b, c), sign in zip(equations, (-1, -1, 1), strict=True):
        root = (b * b - 4 * a * c).clamp(min=0).sqrt()
        found.append({"published": (b + root) / 2, "exact": (b + sign * root) / (2 * a)}[roots])
    return torch.stack(found).amin(0).clamp(min=0)


@torch.no_grad()
def splat(centers, radii, where, maps, size, device=None):
    """Gaussian peaks: heatmaps float32 [maps,h,w], 1 at each centre, 0 far from all.

    centers  int64 [N,2] x, y in cells; the part of a peak that lies off its map is cut
    radii    [N] in cells, at least 0, rounded down: the peak ends there, at three standard deviations of (2 r + 1) / 6
    where    int64 [N], 0 to maps - 1, the map of each object
    size     (h, w)
    device   of the heatmaps, None: that of the objects. Objects on the CPU cost a GPU no wait

    Where peaks overlap the larger value stays. N may be 0.
    """
    height, width = size
    device = device or centers.device
    reach = radii.long()[:, None]
    box, row, line, column = lines(torch.cat([centers - reach, centers + reach + 1], dim=1), size, device)
    centers, where = centers.to(device, non_blocking=True), where.to(device, non_blocking=True)
    spread = 2 * ((2 * reach[:, 0].to(device, non_blocking=True) + 1) / 6) ** 2
    x, y = centers[box].unbind(-1)
    down = (row - y).square() / spread[box]  # of the lines
    across = (column - x[line]).square() / spread[box][line]
    cell = ((where[box] * height + row) * width)[line] + column
    heatmaps = torch.zeros(maps * height * width, device=device)
    value = torch.exp(-(across + down[line]))
    return heatmaps.scatter_reduce_(0, cell, value, "amax").view(maps, height, width)


@torch.no_grad()
def cover(boxes, where, maps, size):
    """Which cells lie in a box: bool [maps,h,w]. boxes [N,4] xyxy in cells, where and size as in `splat`.

    A cell counts if the box touches it. Each box adds 1 at two corners and takes 1 at the other two; running sums along
    rows and columns then count the boxes over each cell, whatever their areas.
    """
    height, width = size
    high = boxes.new_tensor([width, height])
    low, end = boxes[:, :2].floor().clamp(min=0).minimum(high).long(), boxes[:, 2:].ceil().long()
    end = end.minimum(high.long()).maximum(low)
    corners = torch.zeros(maps, height + 1, width + 1, dtype=torch.int32, device=boxes.device)
    for x, y, sign in ((low, low, 1), (end, low, -1), (low, end, -1), (end, end, 1)):
        at = (where * (height + 1) + y[:, 1]) * (width + 1) + x[:, 0]
        corners.view(-1).scatter_add_(0, at, torch.full_like(at, sign, dtype=torch.int32))
    return corners.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)[:, :height, :width] > 0


@torch.no_grad()
def peaks(hm, count=100, suppress=True):
    """The `count` greatest values of each picture, over classes and cells, in falling order.

    hm        [B,K,h,w] after the sigmoid, 0 to 1
    suppress  only cells that none of their eight neighbours of the same class exceeds count, the others as 0

    Returns scores [B,count], labels int64 [B,count] and index int64 [B,count], flat cells; fewer if the maps have fewer
    values.
    """
    if suppress:
        hm = torch.where(F.max_pool2d(hm, 3, stride=1, padding=1) == hm, hm, 0)
    cells = hm.shape[2] * hm.shape[3]
    flat = hm.flatten(1)  # [B,K*h*w]
    scores, place = flat.topk(min(count, flat.shape[1]), dim=1)
    return scores, place // cells, place % cells


def gather(maps, index):
    """What maps [B,C,h,w] say at flat cells index [B,N]: [B,N,C]. Gradients flow to `maps`."""
    index = index[:, None].expand(-1, maps.shape[1], -1)  # [B,C,N]
    return maps.flatten(2).gather(2, index).transpose(1, 2)
