"""Pictures of 3D boxes and radar."""

import torch

from training import pictures3d


def box(x, z, length=4.0, width=2.0):
    """Corners [8,3] of a box at (x, 0, z) that looks along z, front first, in the order of ops.geometry."""
    sides = torch.tensor([(1, 1), (1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1), (-1, -1), (-1, 1)]) / 2
    down = torch.tensor([-1.0, -1, 1, 1, -1, -1, 1, 1])
    return torch.stack([x + sides[:, 1] * width, down, z + sides[:, 0] * length], dim=-1)


def test_from_above_shows_boxes_arrows_and_radar_where_they_are():
    truth = {
        "corners": box(0, 30)[None],
        "center": torch.tensor([[0.0, 0, 30]]),
        "velocity": torch.full((1, 3), torch.nan),
    }
    found = {
        "corners": box(15, 30)[None],
        "center": torch.tensor([[15.0, 0, 30]]),
        "velocity": torch.tensor([[0.0, 0, 10]]),
    }
    points = torch.tensor([[-15.0, 0, 30, 0, 5]])
    image = pictures3d.from_above(truth, found, points, reach=60, side=480)
    assert image.shape == (3, 480, 480) and image.dtype == torch.uint8

    def columns(colour):
        rows, cols = torch.where((image == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0))
        return rows.min().item(), rows.max().item(), cols.min().item(), cols.max().item()

    assert columns(pictures3d.GREEN)[2:] == (232, 248)  # 2 m wide at 8 pixels a metre, around the middle
    top, bottom, left, right = columns(pictures3d.ORANGE)
    assert left >= 352 and right <= 368 and 155 <= top <= 161  # its arrow ends 10 m farther on
    assert bottom <= 256
    assert columns(pictures3d.BLUE)[0] <= 200 + 2 and columns(pictures3d.BLUE)[3] <= 122 + 1


def test_on_camera_draws_boxes_and_returns_and_no_edge_from_behind():
    image = torch.full((3, 100, 200), 255, dtype=torch.uint8)
    corners = torch.tensor([[(80.0, 40), (120, 40), (120, 60), (80, 60), (90, 45), (110, 45), (110, 55), (90, 55)]])
    depth, none = torch.full((1, 8), 10.0), torch.zeros(0)
    shown = pictures3d.on_camera(image, corners, depth, torch.tensor([0]), none.view(0, 2), none)
    assert (shown != 255).any() and shown.shape == image.shape
    behind = pictures3d.on_camera(image, corners, -depth, torch.tensor([0]), none.view(0, 2), none)
    assert torch.equal(behind, image)
    dots = pictures3d.on_camera(
        image, corners, -depth, torch.tensor([0]), torch.tensor([[50.0, 50]]), torch.tensor([5.0])
    )
    rows, cols = torch.where((dots != 255).any(0))
    assert abs(rows.float().mean() - 50) < 1 and abs(cols.float().mean() - 50) < 1
