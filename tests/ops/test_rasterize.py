"""The cells that rectangles cover, against slices."""

import torch

from ops.rasterize import covered_cells

SIZE = (6, 9)


def test_cells_of_random_rectangles():
    random = torch.Generator().manual_seed(0)
    areas = torch.randint(-4, 13, (200, 4), generator=random)  # some beyond the map, some empty
    box, row, line, column = covered_cells(areas, SIZE)
    cells = torch.stack([box[line], row[line], column], 1).tolist()
    expected = []
    for i, (left, top, right, bottom) in enumerate(areas.tolist()):
        rows, columns = range(max(0, top), min(SIZE[0], bottom)), range(max(0, left), min(SIZE[1], right))
        expected += [[i, y, x] for y in rows for x in columns]
    assert cells == expected and len({i for i, _, _ in cells}) > 30


def test_no_rectangle_covers_no_cell():
    for areas in (torch.zeros(0, 4, dtype=torch.int64), torch.tensor([[3, 2, 3, 5], [9, 0, 12, 6]])):
        assert all(len(each) == 0 for each in covered_cells(areas, SIZE))
