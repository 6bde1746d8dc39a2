"""The tables of nuScenes as flat arrays: kept, read anew when they change, and broken ones in one clear line."""

import json
import os
import shutil

import numpy as np
import pytest

from data import tables
from data.errors import DataError
from tests.small_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("nuscenes"))


def test_tables_are_read_once_and_anew_when_they_change(world, tmp_path, monkeypatch):
    shutil.copytree(world.root / "v1.0-mini", tmp_path / "set" / "v1.0-mini")
    first = tables.load(tmp_path / "set", "v1.0-mini")
    monkeypatch.setattr(tables, "_read", lambda folder: pytest.fail("read anew"))
    again = tables.load(tmp_path / "set", "v1.0-mini")
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert value.dtype != object, name
    assert again.frame_paths[5] == first.frame_paths[5] and again.sample_tokens[1] == first.sample_tokens[1]
    monkeypatch.undo()
    file = tmp_path / "set" / "v1.0-mini" / "sample_annotation.json"
    file.write_text(json.dumps(world.tables["sample_annotation"][:9]))
    assert len(tables.load(tmp_path / "set", "v1.0-mini").annotation_label) == 9
    before = file.stat()
    file.write_text(file.read_text().replace('"num_lidar_pts": 1', '"num_lidar_pts": 2'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    changed = tables.load(tmp_path / "set", "v1.0-mini")
    assert 1 not in changed.annotation_points and file.stat().st_size == before.st_size


def test_where_tables_are_kept(world, tmp_path):
    shutil.copytree(world.root / "v1.0-mini", tmp_path / "set" / "v1.0-mini")
    cache, said = tmp_path / "cache", []
    tables.load(tmp_path / "set", "v1.0-mini", cache)
    assert len(list(cache.glob("*.npz"))) == 1 and not list((tmp_path / "set").glob(".sightline*"))
    next(cache.glob(".*.npz")).write_bytes(b"PK broken")
    assert len(tables.load(tmp_path / "set", "v1.0-mini", cache, said.append).scene_names) == 2
    assert len(said) == 1 and "damaged" in said[0]
    (tmp_path / "file").write_text("")
    tables.load(tmp_path / "set", "v1.0-mini", tmp_path / "file", said.append)
    assert "could not be written" in said[-1] and len(said) == 2


def test_kept_tables_that_may_not_be_read_are_not_damaged(world, tmp_path, monkeypatch):
    said = []
    tables.load(world.root, "v1.0-mini", tmp_path)

    def refused(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "kept_arrays", refused)
    assert len(tables.load(world.root, "v1.0-mini", tmp_path, said.append).scene_names) == 2
    assert "may not be read" in said[0] and "damaged" not in said[0]


def test_boxes_that_nothing_has_are_left_out_and_kept_in_mind(tmp_path):
    small = World(tmp_path, scenes=("scene-0061",))
    records, nan = small.tables["sample_annotation"], float("nan")
    whole = tables._read(tmp_path / "v1.0-mini")
    records[0]["size"], records[3]["size"] = [0, 1, 1], [2, -1, 1]
    records[4]["rotation"], records[5]["translation"] = [0, 0, 0, 0], [nan, float("inf"), 1]
    records[-1]["size"] = [0, 0, 0]  # of an animal, which no one looks for
    small.write()
    less = tables.load(tmp_path, "v1.0-mini")
    assert len(less.annotation_label) == len(whole["annotation_label"]) - 4 == less.annotation_first[-1]
    assert less.impossible_record.tolist() == [1, 4, 5, 6]
    assert less.impossible_reason.tolist() == [
        "no box: its size 0, 1, 1",
        "no box: its size 2, -1, 1",
        "no box: its rotation 0, 0, 0, 0",
        "no box: its translation nan, inf, 1",
    ]
    tokens = [less.sample_tokens[sample] for sample in less.impossible_sample]
    assert tokens == [records[row]["sample_token"] for row in (0, 3, 4, 5)]
    kept = np.isin(whole["annotation_center"], less.annotation_center).all(axis=1)
    for name in ("label", "size", "velocity"):
        values, expected = getattr(less, f"annotation_{name}"), whole[f"annotation_{name}"][kept]
        same = values == expected if name != "velocity" else np.isclose(values, expected).all(axis=1)
        lost = np.isnan(values).any(axis=-1) if name == "velocity" else np.zeros(len(values), bool)
        assert (same | lost[:, None] if same.ndim > 1 else same | lost).all() and lost.sum() <= 1


def test_tables_larger_than_a_piece(world, tmp_path, monkeypatch):
    whole = tables._read(world.root / "v1.0-mini")
    monkeypatch.setattr(tables, "PIECE", 1500)  # a record or two
    for name, value in tables._read(world.root / "v1.0-mini").items():
        np.testing.assert_array_equal(value, whole[name])


@pytest.mark.parametrize(
    ("table", "text", "reason"),
    [
        ("sample", "{}", "no JSON list"),
        ("sample", '[{"token": "a"}]', "record 1: has no field or no record elsewhere for 'scene_token'"),
        ("sample", '[{"token": "a", "scene_token": "nowhere", "timestamp": 1}]', "for 'nowhere'"),
        ("sample", "[3]", "record 1: is no such record"),
        ("sample", "[3, {}, 4, 5]", "record 1: is .*; record 2 has no field .*; record 3 is .*; 1 more$"),
        ("scene", '[{"token": "x"}, {"token": "y"}]', "record 1: has no field .*; record 2 has no field"),
        (
            "sample",
            '[{"token": "a", "scene_token": "scene-0061", "timestamp": 99999999999999999999}]',
            "record 1: is no such record",
        ),
        ("scene", '[{"token": "x", "name": "y"}, {"token":', "record 2: not valid JSON"),
        ("ego_pose", "[]", "lacks 126 poses"),
        (
            "calibrated_sensor",
            '[{"token": "k", "sensor_token": "s CAM_BACK", "rotation": [1]}]',
            "rotation has 1 numbers",
        ),
        ("sample_annotation", "", "no JSON list"),
        ("instance", None, "lacks instance.json"),
    ],
)
def test_broken_tables_are_named(world, tmp_path, table, text, reason):
    shutil.copytree(world.root / "v1.0-mini", tmp_path / "v1.0-mini")
    file = tmp_path / "v1.0-mini" / f"{table}.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        tables.load(tmp_path, "v1.0-mini")
    assert table in str(caught.value) and "\n" not in str(caught.value)


def test_velocities_need_a_neighbour_in_time():
    center = np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0], [9, 0, 0]])
    neighbours = np.array([[-1, 1], [0, 2], [1, -1], [-1, -1]])
    seconds = [0, 0.5, 1.5, 2]
    velocity = tables._velocity(center, (1e6 * np.array(seconds)).astype(np.int64), neighbours)
    np.testing.assert_allclose(velocity[:, 0], [2, 4 / 1.5, 3, np.nan])
    far = tables._velocity(center, (4e6 * np.array(seconds)).astype(np.int64), neighbours)
    np.testing.assert_allclose(far[:, 0], [np.nan, np.nan, np.nan, np.nan])
