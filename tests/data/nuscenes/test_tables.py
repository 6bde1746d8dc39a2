"""The tables of nuScenes as flat arrays: cached, parsed again when they change, and invalid ones as one line."""

import json
import os
import shutil

import numpy as np
import pytest

from data.cache import load_arrays, save_arrays
from data.nuscenes import tables
from data.packed import PackedPaths
from tests.small_nuscenes import SmallNuScenes
from utils.errors import DataError


def test_tables_are_parsed_once_and_again_when_they_change(small, tmp_path, monkeypatch):
    shutil.copytree(small.root / "v1.0-mini", tmp_path / "set" / "v1.0-mini")
    first = tables.load(tmp_path / "set", "v1.0-mini")
    monkeypatch.setattr(tables, "_read", lambda folder: pytest.fail("parsed again"))
    again = tables.load(tmp_path / "set", "v1.0-mini")
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert value.dtype != object, name
    assert again.frame_paths[5] == first.frame_paths[5] and again.sample_tokens[1] == first.sample_tokens[1]
    monkeypatch.undo()
    file = tmp_path / "set" / "v1.0-mini" / "sample_annotation.json"
    file.write_text(json.dumps(small.tables["sample_annotation"][:9]))
    assert len(tables.load(tmp_path / "set", "v1.0-mini").annotation_label) == 9
    before = file.stat()
    file.write_text(file.read_text().replace('"num_lidar_pts": 1', '"num_lidar_pts": 2'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    changed = tables.load(tmp_path / "set", "v1.0-mini")
    assert 1 not in changed.annotation_points and file.stat().st_size == before.st_size


def test_where_the_cache_is(small, tmp_path):
    shutil.copytree(small.root / "v1.0-mini", tmp_path / "set" / "v1.0-mini")
    cache, lines = tmp_path / "cache", []
    tables.load(tmp_path / "set", "v1.0-mini", cache)
    (folder,) = cache.glob(".sightline_tables_v1.0-mini_*")
    assert not list((tmp_path / "set").glob(".sightline*"))
    next(folder.glob("*.npy")).write_bytes(b"broken")
    assert len(tables.load(tmp_path / "set", "v1.0-mini", cache, lines.append).scene_names) == 2
    assert len(lines) == 1 and "damaged" in lines[0]
    (tmp_path / "file").write_text("")
    tables.load(tmp_path / "set", "v1.0-mini", tmp_path / "file", lines.append)
    assert "cannot be written" in lines[-1] and len(lines) == 2


def test_a_cache_without_read_permission_is_not_called_damaged(small, tmp_path, monkeypatch):
    lines = []
    tables.load(small.root, "v1.0-mini", tmp_path)

    def refused(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "load_arrays", refused)
    assert len(tables.load(small.root, "v1.0-mini", tmp_path, lines.append).scene_names) == 2
    assert "no permission to read" in lines[0] and "damaged" not in lines[0]


def test_invalid_boxes_are_left_out_and_listed(tmp_path):
    small = SmallNuScenes(tmp_path, scenes=("scene-0061",))
    records, nan = small.tables["sample_annotation"], float("nan")
    whole = tables._read(tmp_path / "v1.0-mini")
    records[0]["size"], records[3]["size"] = [0, 1, 1], [2, -1, 1]
    records[4]["rotation"], records[5]["translation"] = [0, 0, 0, 0], [nan, float("inf"), 1]
    records[-1]["size"] = [0, 0, 0]  # of an animal, which is not detected
    small.write()
    less = tables.load(tmp_path, "v1.0-mini")
    assert len(less.annotation_label) == len(whole["annotation_label"]) - 4 == less.annotation_first[-1]
    assert less.invalid_record.tolist() == [1, 4, 5, 6]
    assert less.invalid_reason.tolist() == [
        "invalid box: size 0, 1, 1",
        "invalid box: size 2, -1, 1",
        "invalid box: rotation 0, 0, 0, 0",
        "invalid box: translation nan, inf, 1",
    ]
    tokens = [less.sample_tokens[sample] for sample in less.invalid_sample]
    assert tokens == [records[row]["sample_token"] for row in (0, 3, 4, 5)]
    valid = np.isin(whole["annotation_center"], less.annotation_center).all(axis=1)
    for name in ("label", "size"):
        np.testing.assert_array_equal(getattr(less, f"annotation_{name}"), whole[f"annotation_{name}"][valid])
    velocity, expected = less.annotation_velocity, whole["annotation_velocity"][valid]
    unknown = np.isnan(velocity).any(axis=1)  # of the neighbor of the annotation without a place
    np.testing.assert_allclose(velocity[~unknown], expected[~unknown], rtol=1e-5)
    assert unknown.sum() <= 1


def test_tables_larger_than_a_chunk(small, monkeypatch):
    whole = tables._read(small.root / "v1.0-mini")
    monkeypatch.setattr(tables, "CHUNK", 1500)  # a record or two
    for name, value in tables._read(small.root / "v1.0-mini").items():
        np.testing.assert_array_equal(value, whole[name])


@pytest.mark.parametrize(
    ("table", "text", "reason"),
    [
        ("sample", "{}", "not a JSON list"),
        ("sample", '[{"token": "a"}]', "record 1: no field or no record elsewhere for 'scene_token'"),
        ("sample", '[{"token": "a", "scene_token": "nowhere", "timestamp": 1}]', "for 'nowhere'"),
        ("sample", "[3]", "record 1: not a record of this table"),
        ("sample", "[3, {}, 4, 5]", "record 1: not a .*, record 2: no field .*, record 3: not a .* and 1 more$"),
        ("scene", '[{"token": "x"}, {"token": "y"}]', "record 1: no field .*, record 2: no field"),
        (
            "sample",
            '[{"token": "a", "scene_token": "scene-0061", "timestamp": 99999999999999999999}]',
            "record 1: not a record of this table",
        ),
        ("scene", '[{"token": "x", "name": "y"}, {"token":', "record 2: not valid JSON"),
        ("ego_pose", "[]", "126 poses that .* are missing"),
        (
            "calibrated_sensor",
            '[{"token": "k", "sensor_token": "s CAM_BACK", "rotation": [1]}]',
            "rotation has 1 numbers, not 4",
        ),
        (
            "calibrated_sensor",
            '[{"token": "k", "sensor_token": "s CAM_BACK", "rotation": [1, 0, 0, 0], "translation": [0, 0, 0], '
            '"camera_intrinsic": [[1, 0], [0, 1], [0, 0]]}]',
            "camera_intrinsic has a row of 2 numbers, not 3",
        ),
        ("sample_annotation", "", "not a JSON list"),
        ("instance", None, "instance.json missing"),
    ],
)
def test_invalid_tables_are_named(small, tmp_path, table, text, reason):
    shutil.copytree(small.root / "v1.0-mini", tmp_path / "v1.0-mini")
    file = tmp_path / "v1.0-mini" / f"{table}.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        tables.load(tmp_path, "v1.0-mini")
    assert table in str(caught.value) and "\n" not in str(caught.value)


def test_velocities_need_neighbors_close_in_time():
    center = np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0], [9, 0, 0]])
    neighbors = np.array([[-1, 1], [0, 2], [1, -1], [-1, -1]])
    seconds = [0, 0.5, 1.5, 2]
    velocity = tables._velocity(center, (1e6 * np.array(seconds)).astype(np.int64), neighbors)
    np.testing.assert_allclose(velocity[:, 0], [2, 4 / 1.5, 3, np.nan])
    slow = tables._velocity(center, (4e6 * np.array(seconds)).astype(np.int64), neighbors)
    np.testing.assert_allclose(slow[:, 0], [np.nan, np.nan, np.nan, np.nan])


def test_a_version_that_is_not_there(small):
    with pytest.raises(
        DataError, match=r"v1\.0-trainval: no such folder of tables; versions in .*: v1\.0-mini; choose"
    ):
        tables.load(small.root, "v1.0-trainval")


@pytest.mark.parametrize(
    ("table", "changes", "reason"),
    [
        ("sample_data", {"filename": "../../../../etc/passwd"}, "filename .* is not in the folder of the data"),
        ("sample_data", {"filename": "/etc/passwd"}, "filename .* is not in the folder of the data"),
        ("sample_data", {"height": 70000}, "the image cannot be 160 x 70000"),
        ("sample_data", {"prev": [1]}, r"prev \[1\] is not text"),
        ("sample", {"token": 7.5}, "token 7.5 is not text"),
        ("sample", {"token": "\ud800"}, "surrogates not allowed"),
        ("scene", {"name": ["a"]}, r"name \['a'\] is not text"),
        ("calibrated_sensor", {"rotation": [0, 0, 0, 0]}, "no valid pose"),
        ("ego_pose", {"translation": [float("nan"), 0, 0]}, "no valid pose"),
        ("sample_annotation", {"next": {}}, "next {} is not text"),
    ],
)
def test_hostile_records(small, tmp_path, table, changes, reason):
    shutil.copytree(small.root / "v1.0-mini", tmp_path / "v1.0-mini")
    file = tmp_path / "v1.0-mini" / f"{table}.json"
    records = json.loads(file.read_text())
    records[2 % len(records)] |= changes  # of a camera's key frame, of whose frames the first two are not used
    file.write_text(json.dumps(records))
    with pytest.raises(DataError, match=reason):
        tables.load(tmp_path, "v1.0-mini")


def test_deeply_nested_tables(small, tmp_path):
    shutil.copytree(small.root / "v1.0-mini", tmp_path / "v1.0-mini")
    (tmp_path / "v1.0-mini/scene.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="nested too deeply"):
        tables.load(tmp_path, "v1.0-mini")


def test_a_cache_whose_paths_leave_the_folder_is_not_used(small, tmp_path, capsys):
    """It may have come with the data."""
    cache = tmp_path / "cache"
    whole = tables.load(small.root, "v1.0-mini", cache)
    (folder,) = cache.iterdir()
    arrays = load_arrays(folder)
    paths = PackedPaths(["../secret.jpg", *map(whole.frame_paths.__getitem__, range(1, len(whole.frame_paths)))])
    assert save_arrays(folder, arrays | {"frame_paths": paths.content, "frame_paths_first": paths.first})
    again = tables.load(small.root, "v1.0-mini", cache)
    assert again.frame_paths[0] == whole.frame_paths[0]
    assert "damaged" in capsys.readouterr().out
