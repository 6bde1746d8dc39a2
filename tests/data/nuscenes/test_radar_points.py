"""Radar files: every field of every point, with or without padding, and every kind of damaged file as one line."""

import numpy as np
import pytest

from data.nuscenes import radar_points
from tests.small_nuscenes import PCD_FIELDS, PCD_SIZE, PCD_TYPE, POINT, pcd
from utils.errors import DataError


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["scene_1", "scene_3"])
def test_real_sweeps_equal_their_csv(shared, name):
    folder = shared / "data" / "radar_pcd"
    points, names = radar_points.read(folder / f"{name}.pcd")
    expected = np.loadtxt(folder / f"{name}.csv", delimiter=",", dtype=np.float64).T
    assert names == PCD_FIELDS and points.dtype == np.float32 and len(points) > 50
    np.testing.assert_array_equal(points, expected.astype(np.float32))


@pytest.mark.realdata
def test_padding_of_a_real_sweep_makes_no_difference(shared):
    folder = shared / "data" / "radar_pcd"
    padded, unpadded = folder / "scene_1.pcd", folder / "scene_1_unpadded.pcd"
    assert padded.stat().st_size - unpadded.stat().st_size > 3000
    np.testing.assert_array_equal(radar_points.read(padded)[0], radar_points.read(unpadded)[0])


@pytest.mark.parametrize("padding", [0, 1, 43, 4096])
def test_every_field_of_a_point(tmp_path, padding):
    (tmp_path / "a.pcd").write_bytes(pcd([POINT, [9.0] * 18], padding))
    points, names = radar_points.read(tmp_path / "a.pcd")
    assert points.shape == (2, 18) and points.dtype == np.float32 and names == PCD_FIELDS
    assert points.tolist() == [POINT, [9.0] * 18]


def test_sweeps_without_points(tmp_path):
    (tmp_path / "none.pcd").write_bytes(pcd([], padding=4096))
    (tmp_path / "nan.pcd").write_bytes(pcd([[np.nan] * 3 + POINT[3:], POINT]))
    for name in ("none", "nan"):
        points, _ = radar_points.read(tmp_path / f"{name}.pcd")
        assert points.shape == (0, 18) and points.dtype == np.float32


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pcd([POINT] * 3)[:-44], "truncated: 3 points in the header, 1 in the file"),
        (pcd([POINT], POINTS=5, WIDTH=5), "truncated: 5 points in the header, 1 in the file"),
        (b"", "no DATA line"),
        (b"\xff\xd8\xff\xe0 an image \n" * 30, "no DATA line"),
        (pcd([POINT], DATA="ascii"), "DATA is ascii, only binary"),
        (pcd([POINT], SIZE=None), "no SIZE line"),
        (pcd([POINT], POINTS=None), "no POINTS line"),
        (pcd([POINT], POINTS="many"), "many"),
        (pcd([POINT], POINTS=-1), "POINTS is -1"),
        (pcd([POINT], TYPE=PCD_TYPE[:-2]), "17 TYPE do not match"),
        (pcd([POINT], TYPE="Q" + PCD_TYPE[1:]), "invalid SIZE and TYPE of x"),
        (pcd([POINT], SIZE="3" + PCD_SIZE[1:]), "invalid SIZE and TYPE of x"),
        (pcd([POINT], COUNT=" ".join("2" * 18)), "COUNT above 1"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid 1\n",
            "a git-LFS pointer, not a radar sweep; .*git lfs pull$",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, content, reason):
    (tmp_path / "damaged.pcd").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        radar_points.read(tmp_path / "damaged.pcd")
    assert str(caught.value).startswith(str(tmp_path / "damaged.pcd")) and "\n" not in str(caught.value)
    assert caught.value.kind == "image"


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.pcd: cannot be read"):
        radar_points.read(tmp_path / "none.pcd")


def test_points_that_are_used(tmp_path):
    """The devkit's default filter, and no returns from the vehicle itself: less than a meter away along x and y."""
    column = {name: number for number, name in enumerate(PCD_FIELDS)}
    changes = [{}, {"x": 0.9}, {"x": 0.9, "y": 0.9}, {"x": -0.9, "y": -0.9}, {"invalid_state": 4}, {"ambig_state": 2}]
    changes += [{"dyn_prop": 7}, {"dyn_prop": -1}, {"dyn_prop": 0}, {"dyn_prop": 6}]
    points = np.tile(np.array(POINT), (len(changes), 1))
    for row, change in zip(points, changes):
        for name, value in change.items():
            row[column[name]] = value
    expected = [True, True, False, False, False, False, False, False, True, True]
    assert radar_points.is_valid(points, column).tolist() == expected
