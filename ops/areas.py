"""Cells that rectangles cover, of all rectangles at once; no other cell is visited."""

import torch


@torch.no_grad()
def lines(areas, size, device=None):
    """The covered cells of rectangles, rectangle after rectangle, line by line.

    areas   int64 [N,4]: left, top, right, bottom in cells, the last two not included; what lies outside is cut off
    size    (h, w) of the map
    device  of what is returned, None: that of areas. Areas on the CPU cost a GPU no wait

    Returns box [L] (0 to N - 1) and row [L] of each line, then line [C] (0 to L - 1) and column [C] of each cell, all
    int64. A cell that several rectangles cover comes several times. N may be 0.
    """
    device = device or areas.device
    low = areas[:, :2].clamp(min=0)
    sides = (areas[:, 2:].minimum(areas.new_tensor([size[1], size[0]])) - low).clamp(min=0)  # columns, rows
    counts = torch.where(sides[:, 0] > 0, sides[:, 1], 0)  # of lines
    totals = int(counts.sum()), int((sides[:, 0] * counts).sum())
    low, sides, counts = (each.to(device, non_blocking=True) for each in (low, sides, counts))
    box, place = spread(counts, totals[0])
    row = place + low[box, 1]
    line, place = spread(sides[box, 0], totals[1])
    return box, row, line, place + low[box, 0][line]


def spread(counts, total):
    """Each i of counts [N] counts[i] times, and which time it is: two of int64 [total]. No division: those are slow."""
    number = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return number, torch.arange(total, device=counts.device) - first[number]
