"""The cells that rectangles cover, for all rectangles at once; no other cell is visited."""

import torch


@torch.no_grad()
def covered_cells(areas, size, device=None):
    """The cells that rectangles cover, rectangle after rectangle, row by row.

    areas   int64 [N,4]: left, top, right, bottom in cells, the last two exclusive; clipped to the map. N may be 0
    size    (h, w) of the map
    device  of the results, None: that of areas. With areas on the CPU, a GPU need not be waited for

    Returns four int64 tensors: box [L] (0 to N - 1) and row [L] of each line, the part of a row that a rectangle
    covers; then line [C] (0 to L - 1) and column [C] of each cell. A cell under several rectangles is repeated.
    """
    device = device or areas.device
    low = areas[:, :2].clamp(min=0)
    sides = (areas[:, 2:].minimum(areas.new_tensor([size[1], size[0]])) - low).clamp(min=0)  # [N,2] columns, rows
    num_lines = torch.where(sides[:, 0] > 0, sides[:, 1], 0)  # [N]
    lines, cells = int(num_lines.sum()), int((sides[:, 0] * num_lines).sum())
    low, sides, num_lines = (x.to(device, non_blocking=True) for x in (low, sides, num_lines))
    box, offset = _repeat_index(num_lines, lines)
    row = low[box, 1] + offset
    line, offset = _repeat_index(sides[box, 0], cells)
    return box, row, line, low[box, 0][line] + offset


def _repeat_index(counts, total):
    """Each index i of counts [N] repeated counts[i] times, and 0 to counts[i] - 1 beside it: two int64 [total]."""
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return index, torch.arange(total, device=counts.device) - first[index]
