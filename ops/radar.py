"""Radar on the maps of a camera network: points drawn as pillars, and pillars handed to boxes (CenterFusion).

A radar map is float32 [...,3,h,w]: depth in metres (0: no return), and vx, vz in m/s in the camera frame.
B pictures, N boxes a picture, P points.
"""

import torch

from ops.areas import lines
from ops.geometry import apply_affine, corners, depth_of, project
from ops.heatmap import gather, peaks
from ops.images import normalize
from ops.rotation import decode

# Distance between a box's depth and its radar, in half extents of the box along z. The published weights were made with
# max - min / 2 of the corners' z, where (max - min) / 2, the paper's, was meant.
THRESHOLDS = {"published": 1.5, "paper": 1.0}
# Part of a box's width and height, around its centre, that its return is written to.
AREA, SURE_AREA = 0.3, 0.15


@torch.no_grad()
def pillars(radar, calib, affine, size=(112, 200), stride=4, dims=(1.5, 0.2, 0.2)):
    """Radar points [P,5] (x, y, z, vx, vz in the camera frame) -> radar map [3,h,w] of `size` (h, w).

    calib   [3,4]; affine [2,3] from the pixels of the file that it speaks of to the network's input
    stride  input pixels a cell
    dims    height, width and length of a pillar in metres; it stands on its point

    A pillar covers the rows round(y - height) to round(y) and the columns round(x - width / 2) to round(x + width / 2),
    the last of each not included, as published: one narrower than a cell may cover none. Nearer pillars overwrite
    farther ones; a point that the picture does not show is left out.
    """
    radar = radar[radar[:, 2] > 0]
    radar = radar[radar[:, 2].argsort(descending=True, stable=True)]
    center = radar[:, :3] - radar.new_tensor([0, dims[0] / 2, 0])
    boxes = corners(center, radar.new_tensor(dims).expand_as(center), center.new_zeros(len(center)))  # [P,8,3]
    points = torch.cat([boxes, radar[:, None, :3]], dim=1)
    cells = apply_affine(project(points, calib)[0], affine) / stride  # [P,9,2]
    x, y = cells[:, 8].unbind(-1)
    width, height = (cells[:, :8].amax(1) - cells[:, :8].amin(1)).unbind(-1)
    shown = (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    areas = torch.stack([x - width / 2, y - height, x + width / 2, y], dim=-1)[shown].round()
    return paint(areas[None], radar[None, shown, 2:5], size)[0]


def inputs(images, targets, mean, std, device, radar=True, stride=4, dims=(1.5, 0.2, 0.2)):
    """What a CenterFusion is given of a batch, on `device`: (images, radar map or None, calib).

    images     uint8 [B,3,H,W], red first -> normalised by `mean` and `std` [3], blue first, as published
    targets    B dicts with radar, calib and affine
    radar map  [B,3,h,w] of `pillars`; None where `radar` is false;  calib [B,3,4]
    """
    images = normalize(images.to(device, non_blocking=True).flip(1), mean, std)
    rows = [[target[name].to(device) for name in ("radar", "calib", "affine")] for target in targets]
    size = [side // stride for side in images.shape[-2:]]
    radar_map = torch.stack([pillars(*row, size, stride, dims) for row in rows]) if radar else None
    return images, radar_map, torch.stack([calib for _, calib, _ in rows])


@torch.no_grad()
def associate(
    radar_map, boxes, depth, dims, alpha, x, calib, threshold="published", area=AREA, max_distance=60.0, valid=None
):
    """Hand each box the nearest radar return of its frustum -> [B,3,h,w]: depth / max_distance, vx, vz.

    radar_map     [B,3,h,w]
    boxes         [B,N,4] xyxy in cells; of two that cover one cell the later has it
    depth, dims   [B,N] metres of the box's centre; [B,N,3] h, w, l
    alpha, x      [B,N] observation angle; column of the centre in cells
    calib         [B,3,4] of the full-size camera
    threshold     a key of THRESHOLDS
    area          see AREA
    valid         bool [B,N], false where a box is padding; None: all are boxes

    A return counts in the rows and columns floor(min) to ceil(max) of the box, at a depth strictly between
    max(0, d - t) and d + t. The angle behind t takes x in cells for one in full-size pixels, as the published weights
    were trained with it.
    """
    reach = THRESHOLDS[threshold] * half_extent(dims, alpha, x, calib)
    low, high = (depth - reach).clamp(min=0), depth + reach
    low_corner, high_corner = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    returns, *place = runs_of(radar_map)
    distance, column, top, bottom = (value[:, None] for value in (returns[..., 0], *place))  # [B,1,R]
    inside = (column >= low_corner[..., :1]) & (column <= high_corner[..., :1])  # [B,N,R]
    inside &= (bottom >= low_corner[..., 1:]) & (top <= high_corner[..., 1:])
    inside &= (distance > low[..., None]) & (distance < high[..., None])
    if valid is not None:
        inside &= valid[..., None]
    nearest, index = torch.where(inside, distance, torch.inf).min(-1)  # [B,N]
    values = returns.gather(1, index[..., None].expand(-1, -1, 3))  # [B,N,3]
    values = values / values.new_tensor([max_distance, 1, 1])
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * (area / 2)
    # int() of the source cuts towards 0; one column more than rows is its way too
    first, last = (center - half).trunc(), (center + half).trunc()
    end = last + last.new_tensor([2, 1])
    areas = torch.cat([first, torch.where(nearest.isfinite()[..., None], end, first)], dim=-1)
    return paint(areas, values, radar_map.shape[-2:])


@torch.no_grad()
def associate_peaks(outputs, radar_map, calib, threshold="published", max_distance=60.0, count=100, surest_last=False):
    """`associate` for the `count` greatest values of a network's raw first-stage outputs, unsuppressed -> [B,3,h,w].

    outputs      hm [B,K,h,w], wh [B,2,h,w], dep [B,1,h,w], rot [B,8,h,w], dim [B,3,h,w]. A box is centred in its cell;
                 a negative width or height is 0
    surest_last  stronger peaks overwrite weaker ones, and each is written to SURE_AREA of its box; published: weaker
                 ones overwrite stronger ones, and AREA
    """
    _, _, index = peaks(outputs["hm"].float(), count, suppress=False)  # [B,N]
    index = index.flip(1) if surest_last else index

    def at_peaks(name):
        return gather(outputs[name].float(), index)  # [B,N,C]

    width = outputs["hm"].shape[-1]
    center = torch.stack([index % width, index // width], dim=-1) + 0.5
    half = at_peaks("wh").clamp(min=0) / 2
    boxes = torch.cat([center - half, center + half], dim=-1)
    depth = depth_of(at_peaks("dep")[..., 0])
    found = depth, at_peaks("dim"), decode(at_peaks("rot")), center[..., 0], calib
    area = SURE_AREA if surest_last else AREA
    return associate(radar_map, boxes, *found, threshold=threshold, area=area, max_distance=max_distance)


def half_extent(dims, alpha, x, calib):
    """Half the extent along z [B,N] of boxes dims [B,N,3] observed at alpha [B,N] in column x [B,N]."""
    yaw = alpha + torch.atan2(x - calib[:, None, 0, 2], calib[:, None, 0, 0])
    _, width, length = dims.abs().unbind(-1)
    return (yaw.sin().abs() * length + yaw.cos().abs() * width) / 2


def runs_of(radar_map):
    """Where a radar map [B,3,h,w] holds returns -> (values [B,R,3], columns, first rows, last rows, each float [B,R]).

    A run is cells of one column, one above the other, of the same values: all of a pillar's column, and many times
    fewer than cells. R is the most of a picture, at least 1, and padding has depth 0.
    """
    picture, column, row = (radar_map[:, 0] > 0).mT.nonzero(as_tuple=True)  # column after column
    values = radar_map[picture, :, row, column]
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (column.diff() != 0) | (row.diff() != 1) | (picture.diff() != 0) | (values.diff(dim=0) != 0).any(1)
    start = begins.nonzero()[:, 0]
    end = torch.cat([start, start.new_tensor([len(row)])])[1:]
    first, last = row[start], row[end - 1]
    picture, column, values = picture[start], column[start], values[start]
    counts = picture.bincount(minlength=len(radar_map))
    place = torch.arange(len(picture), device=picture.device) - (counts.cumsum(0) - counts)[picture]
    runs = radar_map.new_zeros(len(radar_map), max(1, int(counts.max())), 6)
    runs[picture, place] = torch.cat([values, torch.stack([column, first, last], 1).to(values.dtype)], 1)
    return runs[..., :3], *runs[..., 3:].unbind(-1)


def paint(areas, values, size):
    """Rectangles in order, later ones over earlier: areas [B,N,4], values [B,N,C] -> maps [B,C,h,w], 0 elsewhere.

    An area is the whole numbers left, top, right, bottom in cells of `size` (h, w), the last two not included; what
    lies outside is cut off. Only covered cells are visited, and no box waits for another.
    """
    (batch, count), (height, width) = areas.shape[:2], size
    box, row, line, column = lines(areas.flatten(0, 1).long(), size)
    cell = ((box // max(1, count) * height + row) * width)[line] + column
    box = box[line]
    last = box.new_zeros(batch * height * width).scatter_reduce_(0, cell, box, "amax")  # 0 also where there is none
    maps = values.new_zeros(len(last), values.shape[2])
    maps[cell] = values.flatten(0, 1)[last[cell]]
    return maps.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
