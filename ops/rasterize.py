"""The cells that rectangles cover, for all rectangles at once; no other cell is visited."""

import torch


@torch.no_grad()
def covered_cells(areas, size):
    """The cells that rectangles cover, rectangle after rectangle, row by row.

    areas   int64 [N,4]: left, top, right, bottom in cells, the last two exclusive; clipped to the map. N may be 0
    size    (h, w) of the map

    Returns four int64 tensors: box [L] (0 to N - 1) and row [L] of each line, the part of a row that a rectangle
    covers; then line [C] (0 to L - 1) and column [C] of each cell. A cell under several rectangles is repeated.
    """
    low = areas[:, :2].clamp(min=0)
    end = torch.stack([areas[:, 2].clamp(max=size[1]), areas[:, 3].clamp(max=size[0])], dim=1)
    sides = (end - low).clamp(min=0)  # [N,2] columns, rows
    num_lines = torch.where(sides[:, 0] > 0, sides[:, 1], 0)  # [N]
    lines, cells = torch.stack([num_lines.sum(), (sides[:, 0] * num_lines).sum()]).tolist()  # a GPU is waited for once
    box, offset = _repeat_index(num_lines, lines)
    row = low[box, 1] + offset
    line, offset = _repeat_index(sides[box, 0], cells)
    return box, row, line, low[box, 0][line] + offset


def _repeat_index(counts, total):
    """Each index i of counts [N] repeated counts[i] times, and 0 to counts[i] - 1 beside it: two int64 [total]."""
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return index, torch.arange(total, device=counts.device) - first[index]
