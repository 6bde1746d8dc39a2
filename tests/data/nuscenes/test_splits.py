"""Splits of nuScenes, with and without nuscenes-devkit, and key frames to show."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from data import nuscenes
from data.nuscenes import splits
from utils.errors import DataError


def load(small, split):
    return nuscenes.load_split(small.root, "v1.0-mini", split)


def test_splits_of_the_mini_set(small):
    for split, scene in (("mini_train", "scene-0061"), ("mini_val", "scene-0103")):
        dataset = load(small, split)
        assert len(dataset) == 18
        assert {dataset.annotation(index)["sample_token"][:10] for index in range(18)} == {scene}


def test_a_split_can_be_a_text_file(small, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("scene-0103\n\nscene-0061\n")
    assert len(load(small, str(file))) == 36
    file.write_text("scene-9999\n")
    with pytest.raises(DataError, match=r"no scene of the split .*; it has scene-0061, scene-0103"):
        load(small, str(file))


def test_other_splits_need_the_devkit_or_a_file(monkeypatch, tmp_path):
    for found in (None, ModuleSpec("nuscenes", None, is_package=True)):  # the latter: a folder of that name
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(DataError, match=r"split val: .*install nuscenes-devkit, or write .*val\.txt"):
            splits.scenes_of("val", tmp_path)
    (tmp_path / "val.txt").write_text("scene-0003\n")
    assert splits.scenes_of("val", tmp_path) == ["scene-0003"]


def test_splits_of_the_devkit(tmp_path):
    pytest.importorskip("nuscenes")
    from nuscenes.utils import splits as official

    assert len(splits.scenes_of("train", tmp_path)) == 700
    for name, scenes in splits.SPLITS.items():
        assert sorted(scenes) == sorted(getattr(official, name))
    with pytest.raises(DataError, match="no such split"):
        splits.scenes_of("night", tmp_path)


def test_versions_and_splits_that_are_available(tmp_path):
    with pytest.raises(DataError, match=r"not a nuScenes folder: it has no v1\.0-mini and no v1\.0-trainval"):
        splits.available(tmp_path)
    for version, expected in (("v1.0-test", ("test",)), ("v1.0-trainval", ("val", "train"))):
        (tmp_path / version).mkdir()
        assert splits.available(tmp_path) == (version, expected)
    assert splits.available(tmp_path, "v1.0-test", "mine") == ("v1.0-test", ("mine",))
    with pytest.raises(DataError, match=r"it has no v1\.0-mini$"):
        splits.available(tmp_path, "v1.0-mini")


def test_the_first_split_with_images_is_loaded(small, tmp_path):
    dataset = nuscenes.load_available(small.root, "", "", nuscenes.RadarOptions(1), tmp_path)
    assert (dataset.version, dataset.split, len(dataset)) == ("v1.0-mini", "mini_val", 18)
    with pytest.raises(DataError, match="split night"):
        nuscenes.load_available(small.root, "", "night", nuscenes.RadarOptions(1), tmp_path)


@pytest.mark.parametrize(("count", "expected"), [(0, [0, 1, 2]), (1, [0]), (2, [0, 2]), (9, [0, 1, 2])])
def test_key_frames_are_evenly_spaced(small, count, expected):
    selected = splits.select_key_frames(load(small, "mini_train"), count)
    assert selected == [(f"scene-0061_{number:03d}", list(range(6 * number, 6 * number + 6))) for number in expected]
