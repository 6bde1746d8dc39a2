"""Radar files: real sweeps against their csv, padding or none, and every kind of broken file in one clear line."""

import numpy as np
import pytest

from data import pcd
from data.errors import DataError

NAMES = ["x", "y", "z", "dyn_prop", "id", "rcs", "vx", "vy", "vx_comp", "vy_comp", "is_quality_valid", "ambig_state"]
NAMES += ["x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms"]
SIZE = "4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1"
TYPE = "F F F I I F F F F F I I I I I I I I"


def content(points, padding=0, **changed):
    """The bytes of a sweep with `points`, rows of 18 numbers; header lines may be `changed`, None leaves one out."""
    sizes, types = SIZE.split(), TYPE.split()
    layout = np.dtype([(n, f"<{t.lower()}{s}") for n, s, t in zip(NAMES, sizes, types)])
    body = np.array([tuple(point) for point in points], dtype=layout).tobytes()
    lines = {"VERSION": "0.7", "FIELDS": " ".join(NAMES), "SIZE": SIZE, "TYPE": TYPE, "COUNT": " ".join("1" * 18)}
    lines |= {"WIDTH": len(points), "HEIGHT": 1, "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": len(points), "DATA": "binary"}
    lines = {name: value for name, value in (lines | changed).items() if value is not None}
    header = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{n} {v}\n" for n, v in lines.items())
    return header.encode() + body + bytes(padding)


POINT = [8.5, -2.25, 0, 3, 300, 4.5, -1.5, 0.5, -7, 0.25, 1, 3, 19, -4, 0, 1, 16, 3]


@pytest.mark.parametrize("name", ["scene_1", "scene_3"])
def test_real_sweeps_equal_their_csv(shared, name):
    folder = shared / "data" / "radar_pcd"
    points, names = pcd.read(folder / f"{name}.pcd")
    expected = np.loadtxt(folder / f"{name}.csv", delimiter=",", dtype=np.float64).T
    assert list(names) == NAMES and points.dtype == np.float32 and len(points) > 50
    np.testing.assert_array_equal(points, expected.astype(np.float32))


def test_padding_makes_no_difference(shared):
    folder = shared / "data" / "radar_pcd"
    padded, cut = folder / "scene_1.pcd", folder / "scene_1_unpadded.pcd"
    assert padded.stat().st_size - cut.stat().st_size > 3000
    np.testing.assert_array_equal(pcd.read(padded)[0], pcd.read(cut)[0])


def test_every_field_of_a_written_point(tmp_path):
    for padding in (0, 1, 43, 4096):
        (tmp_path / "a.pcd").write_bytes(content([POINT, [9.0] * 18], padding))
        points, names = pcd.read(tmp_path / "a.pcd")
        assert points.shape == (2, 18) and names == tuple(NAMES)
        assert points.tolist() == [POINT, [9.0] * 18]


def test_sweeps_without_points(tmp_path):
    (tmp_path / "none.pcd").write_bytes(content([], padding=4096))
    (tmp_path / "nan.pcd").write_bytes(content([[np.nan] * 3 + POINT[3:], POINT]))
    for name in ("none", "nan"):
        points, _ = pcd.read(tmp_path / f"{name}.pcd")
        assert points.shape == (0, 18) and points.dtype == np.float32


def test_the_lfs_pointer_is_one_line(shared):
    with pytest.raises(DataError, match=r"radar\.pcd: a git-LFS pointer, not a radar sweep; .*git lfs pull$") as caught:
        pcd.read(shared / "data" / "bad_inputs" / "lfs_pointers" / "radar.pcd")
    assert "\n" not in str(caught.value) and caught.value.kind == "image"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (content([POINT] * 3)[:-44], "says 3 points, the file holds 1"),
        (content([POINT], POINTS=5, WIDTH=5), "says 5 points, the file holds 1"),
        (b"", "no line DATA"),
        (b"\xff\xd8\xff\xe0 a picture \n" * 30, "no line DATA"),
        (content([POINT], DATA="ascii"), "DATA is ascii, and only binary"),
        (content([POINT], SIZE=None), "lacks SIZE"),
        (content([POINT], POINTS=None), "lacks POINTS"),
        (content([POINT], POINTS="many"), "many"),
        (content([POINT], POINTS=-1), "POINTS is -1"),
        (content([POINT], TYPE=TYPE[:-2]), "17 TYPE"),
        (content([POINT], TYPE="Q" + TYPE[1:]), "SIZE and TYPE of x are no number's"),
        (content([POINT], SIZE="3" + SIZE[1:]), "SIZE and TYPE of x are no number's"),
        (content([POINT], COUNT=" ".join("2" * 18)), "COUNT above 1"),
    ],
)
def test_broken_files_are_named(tmp_path, written, reason):
    (tmp_path / "broken.pcd").write_bytes(written)
    with pytest.raises(DataError, match=reason) as caught:
        pcd.read(tmp_path / "broken.pcd")
    assert str(caught.value).startswith(str(tmp_path / "broken.pcd")) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.pcd: cannot be read"):
        pcd.read(tmp_path / "none.pcd")
