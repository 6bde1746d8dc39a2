"""Camera matrices of plain images, from files and without one."""

import json

import pytest
import torch

from data import cameras
from ops.geometry import apply_affine
from utils.errors import DataError, UsageError

ROWS = [[1266.0, 0.0, 816.0], [0.0, 1265.0, 491.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "text",
    [
        "1266 0 816\n0 1265 491\n0 0 1\n",
        "1266, 0, 816, 0, 0, 1265, 491, 0, 0, 0, 1, 0",
        "P0: 7 0 0 0 0 7 0 0 0 0 1 0\nP2: 1266 0 816 0 0 1265 491 0 0 0 1 0\nR0_rect: 1 0 0\n",
        json.dumps(ROWS),
        json.dumps({"token": "a", "camera_intrinsic": ROWS}),
        json.dumps({"calib": [[*row, 0.0] for row in ROWS]}),
    ],
)
def test_a_matrix_in_each_format(tmp_path, text):
    (tmp_path / "camera").write_text(text)
    expected = torch.tensor([[*row, 0.0] for row in ROWS])
    assert torch.equal(cameras.read_calib(tmp_path / "camera"), expected)


def test_the_fourth_column_is_kept(tmp_path):
    (tmp_path / "camera").write_text("700 0 600 45 0 700 180 -0.3 0 0 1 0.005")
    assert cameras.read_calib(tmp_path / "camera")[:, 3].tolist() == pytest.approx([45, -0.3, 0.005])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("focal 5", "is no camera matrix: 9 or 12 numbers"),
        ("[[1, 2], 3]", "is no camera matrix"),
        ("[" * 200_000, "is no camera matrix"),
        (f"[{'9' * 400}]", "is no camera matrix"),
        ('{"fx": 3}', "is no camera matrix"),
        ("1 2 3", "has 3 numbers"),
        ("0 0 1 0 5 1 0 0 1", "is no camera matrix: rows fx 0 cx, 0 fy cy, 0 0 1 are expected"),
        ("5 0 nan 0 5 1 0 0 1", "is no camera matrix: rows fx 0 cx"),
    ],
)
def test_what_is_no_matrix(tmp_path, text, reason):
    (tmp_path / "camera").write_text(text)
    with pytest.raises(DataError, match=f"camera: {reason}"):
        cameras.read_calib(tmp_path / "camera")
    with pytest.raises(DataError, match="none: No such file"):
        cameras.read_calib(tmp_path / "none")


def test_the_target_of_a_plain_image_has_no_objects_and_no_radar():
    target = cameras.target(torch.zeros(3, 90, 160), None)
    shapes = {name: tuple(target[name].shape) for name in ("boxes", "amodal", "radar", "affine")}
    assert shapes == {"boxes": (0, 4), "amodal": (0, 2), "radar": (0, 5), "affine": (2, 3)}
    assert target["size"] == (90, 160)
    pixels = torch.rand(7, 2)
    torch.testing.assert_close(apply_affine(pixels, target["affine"]), pixels, rtol=0, atol=0)


def test_a_matrix_of_another_image_size():
    image, calib = torch.zeros(3, 90, 160), torch.tensor(cameras.usual_calib(90, 160).tolist())
    assert torch.equal(cameras.target(image, calib)["calib"], cameras.target(image, None)["calib"])
    assert calib.tolist() == [[120, 0, 80, 0], [0, 120, 45, 0], [0, 0, 1, 0]]
    calib[0, 2] = 161
    with pytest.raises(UsageError, match=r"--calib: its center \(161, 45\) is outside the image of 160 x 90 pixels"):
        cameras.target(image, calib)
