"""Radar on the maps of a camera network: points drawn as pillars, and radar returns associated with boxes (Nabati and
Qi 2021, CenterFusion).

A radar map is float32 [...,3,h,w]: depth in meters (0: no return), and vx, vz in m/s in the camera frame.
B images, N boxes per image, P points, R runs.
"""

import torch

from ops.boxes import take
from ops.geometry import apply_affine, corners, decode_depth, project
from ops.heatmaps import gather_cells, topk_peaks
from ops.rasterize import covered_cells
from ops.rotation import decode

# Maximum distance in depth between a box and its radar return, in half extents of the box along z. The published
# weights were trained with max - min / 2 of the corners' z, where (max - min) / 2, as in the paper, was intended.
THRESHOLDS = {"published": 1.5, "paper": 1.0}
# The part of a box's width and height, around its center, that its radar return is written to.
AREA, BEST_LAST_AREA = 0.3, 0.15


@torch.no_grad()
def pillar_map(radar, calib, affine, size=(112, 200), stride=4, dims=(1.5, 0.2, 0.2)):
    """Radar points [P,5] (x, y, z, vx, vz in the camera frame) -> radar map [3,h,w] of `size` (h, w).

    calib [3,4], affine [2,3] from pixels of the image file to those of the network's input
    stride   pixels of the input per cell
    dims     height, width and length of a pillar in meters; its foot is at its point

    A pillar covers the rows round(y - height) to round(y) and the columns round(x - width / 2) to round(x + width / 2),
    the last of each excluded, as published: one narrower than a cell may cover none. Nearer pillars overwrite farther
    ones; points outside the image are left out.
    """
    radar = radar[radar[:, 2] > 0]
    radar = radar[radar[:, 2].argsort(descending=True, stable=True)]
    center = radar[:, :3] - radar.new_tensor([0, dims[0] / 2, 0])
    boxes = corners(center, radar.new_tensor(dims).expand_as(center), center.new_zeros(len(center)))  # [P,8,3]
    points = torch.cat([boxes, radar[:, None, :3]], dim=1)
    cells = apply_affine(project(points, calib)[0], affine) / stride  # [P,9,2]
    x, y = cells[:, 8].unbind(-1)
    width, height = (cells[:, :8].amax(1) - cells[:, :8].amin(1)).unbind(-1)
    visible = (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    areas = torch.stack([x - width / 2, y - height, x + width / 2, y], dim=-1)[visible].round()
    return paint_rectangles(areas[None], radar[None, visible, 2:5], size)[0]


def network_inputs(targets, size, radar=True, stride=4, dims=(1.5, 0.2, 0.2)):
    """What a CenterFusion network gets beside the images: {"calib": [B,3,4], "radar_map": [B,3,h,w]}, on the CPU.

    targets  B dicts with radar, calib and affine
    size     (h, w) of the output maps
    radar    False: no radar_map
    stride, dims  of `pillar_map`

    Not for autocast, which would round the projection of the points to its precision.
    """
    inputs = {"calib": torch.stack([target["calib"] for target in targets])}
    if radar:
        rows = ([target[name] for name in ("radar", "calib", "affine")] for target in targets)
        inputs["radar_map"] = torch.stack([pillar_map(*row, size, stride, dims) for row in rows])
    return inputs


def depth_tolerance(dims, alpha, x, calib, threshold="published"):
    """How far in depth a box may be from its radar return: meters [B,N], THRESHOLDS[threshold] half extents along z.

    dims [B,N,3] h, w, l in meters; alpha [B,N] observation angle; x [B,N] column of the center; calib [B,3,4]

    x is in cells although calib is in pixels of the image file, as in training of the published weights.
    """
    yaw = alpha + torch.atan2(x - calib[:, None, 0, 2], calib[:, None, 0, 0])
    _, width, length = dims.abs().unbind(-1)
    return THRESHOLDS[threshold] * ((yaw.sin().abs() * length + yaw.cos().abs() * width) / 2)


@torch.no_grad()
def associate(radar_map, boxes, depth, tolerance, area=AREA, max_distance=60.0, valid=None):
    """Write the nearest radar return in each box's frustum into the box: [B,3,h,w], depth / max_distance, vx, vz.

    radar_map  [B,3,h,w]
    boxes      [B,N,4] xyxy in cells; where two overlap, the later is written over the earlier
    depth      [B,N] of the box's center in meters
    tolerance  [B,N] of `depth_tolerance`
    area       the part of a box that is written to, see AREA
    valid      bool [B,N], False where a box is padding; None: all are boxes

    The frustum is the rows and columns floor(min) to ceil(max) of the box, at depths strictly between
    max(0, depth - tolerance) and depth + tolerance.
    """
    near, far = (depth - tolerance).clamp(min=0), depth + tolerance
    low_corner, high_corner = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    returns, *position = vertical_runs(radar_map)
    distance, column, top, bottom = (value[:, None] for value in (returns[..., 0], *position))  # [B,1,R]
    inside = (column >= low_corner[..., :1]) & (column <= high_corner[..., :1])  # [B,N,R]
    inside &= (bottom >= low_corner[..., 1:]) & (top <= high_corner[..., 1:])
    inside &= (distance > near[..., None]) & (distance < far[..., None])
    if valid is not None:
        inside &= valid[..., None]
    nearest, index = torch.where(inside, distance, torch.inf).min(-1)  # [B,N]
    values = take(returns, index)  # [B,N,3]
    values = torch.cat([values[..., :1] / max_distance, values[..., 1:]], dim=-1)
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * (area / 2)
    # mrnabati/CenterFusion truncates both corners with int() and writes one column more than rows.
    first, last = (center - half).trunc(), (center + half).trunc()
    end = torch.stack([last[..., 0] + 2, last[..., 1] + 1], dim=-1)
    areas = torch.cat([first, torch.where(nearest.isfinite()[..., None], end, first)], dim=-1)
    return paint_rectangles(areas, values, radar_map.shape[-2:])


@torch.no_grad()
def associate_peaks(outputs, radar_map, calib, threshold="published", max_distance=60.0, count=100, best_last=False):
    """`associate` for the boxes at the `count` highest values of raw first-stage outputs, not suppressed: [B,3,h,w].

    outputs    hm [B,K,h,w], wh [B,2,h,w], dep [B,1,h,w], rot [B,8,h,w], dim [B,3,h,w]. A box is centered in its cell;
               a negative width or height counts as 0
    best_last  False, as published: lower-scoring boxes are written over higher-scoring ones, each to AREA of the box.
               True: higher-scoring ones over lower-scoring ones, to BEST_LAST_AREA
    """
    _, _, index = topk_peaks(outputs["hm"].float(), count, suppress=False)  # [B,N]
    index = index.flip(1) if best_last else index
    depth, dims, rot, sides = (gather_cells(outputs[name].float(), index) for name in ("dep", "dim", "rot", "wh"))
    width = outputs["hm"].shape[-1]
    center = torch.stack([index % width, index // width], dim=-1) + 0.5
    half = sides.clamp(min=0) / 2
    boxes = torch.cat([center - half, center + half], dim=-1)
    tolerance = depth_tolerance(dims, decode(rot), center[..., 0], calib, threshold)
    area = BEST_LAST_AREA if best_last else AREA
    return associate(radar_map, boxes, decode_depth(depth[..., 0]), tolerance, area, max_distance)


def vertical_runs(radar_map):
    """The runs of returns in a radar map [B,3,h,w]: (values [B,R,3], columns, first rows, last rows, float [B,R] each).

    A run is adjacent cells of one column with the same values: one for each column of a pillar, so there are many times
    fewer runs than cells. R is the maximum over images, at least 1; padding has depth 0. A GPU is waited for once, for
    R.
    """
    batch, _, height, width = radar_map.shape
    columns = radar_map.mT  # [B,3,w,h]: a column's cells follow each other
    is_return = columns[:, 0] > 0  # [B,w,h]
    continues = torch.zeros_like(is_return)
    continues[..., 1:] = is_return[..., 1:] & (columns.diff(dim=-1) == 0).all(1)
    begins, ends = is_return & ~continues, is_return.clone()
    ends[..., :-1] &= ~continues[..., 1:]
    number = begins.flatten(1).cumsum(1) - 1  # of the run that a cell is in
    count = max(1, int(number.amax()) + 1)
    column = torch.arange(width, device=radar_map.device)[:, None].expand(width, height).to(columns.dtype)
    row = torch.arange(height, device=radar_map.device).expand(width, height).to(columns.dtype)
    runs = radar_map.new_zeros(batch, 6, count + 1)  # the last takes what is in no run
    for is_end, fields, values in (
        (begins, slice(0, 5), torch.cat([columns, torch.stack([column, row]).expand(batch, -1, -1, -1)], 1)),
        (ends, slice(5, 6), row.expand(batch, 1, width, height)),
    ):
        index = number.masked_fill(~is_end.flatten(1), count)[:, None].expand(-1, values.shape[1], -1)
        runs[:, fields].scatter_(2, index, values.flatten(2))
    runs = runs[..., :count].mT
    return runs[..., :3], *runs[..., 3:].unbind(-1)


def paint_rectangles(areas, values, size):
    """Rectangles painted in order, later ones over earlier ones: maps [B,C,h,w] of `size` (h, w), 0 elsewhere.

    areas   [B,N,4] left, top, right, bottom in cells, whole numbers, the last two exclusive; clipped to the map
    values  [B,N,C]

    All boxes are painted at once, and only covered cells are visited.
    """
    (batch, count), (height, width) = areas.shape[:2], size
    box, row, line, column = covered_cells(areas.flatten(0, 1).long(), size)
    cell = ((box // max(1, count) * height + row) * width)[line] + column
    box = box[line]
    last = box.new_zeros(batch * height * width).scatter_reduce_(0, cell, box, "amax")  # 0 also where there is none
    maps = values.new_zeros(len(last), values.shape[2])
    maps[cell] = values.flatten(0, 1)[last[cell]]
    return maps.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
