"""Splits of nuScenes, with and without nuscenes-devkit, and key frames to show."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from data import nuscenes
from data.nuscenes import splits, tables
from tests.small_nuscenes import SmallNuScenes
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


def test_the_split_chooses_the_version(tmp_path):
    expected = {"mini_train": "v1.0-mini", "mini_val": "v1.0-mini", "test": "v1.0-test", "val": "v1.0-trainval"}
    assert {split: splits.version_of(tmp_path, split) for split in expected} == expected
    (tmp_path / "v1.0-trainval").mkdir()  # it has the scenes of v1.0-mini too
    assert splits.version_of(tmp_path, "mini_val") == "v1.0-trainval"
    assert splits.version_of(tmp_path, "test") == "v1.0-test"
    (tmp_path / "v1.0-mini").mkdir()
    assert splits.version_of(tmp_path, "mini_val") == "v1.0-mini"


def test_an_evaluation_reads_the_validation_split_alone(small):
    train, val, errors = nuscenes.load(small.root, "", "", "mini_val", print=len)
    assert train is val and (val.version, val.split, len(val)) == ("v1.0-mini", "mini_val", 18)
    assert errors == val.errors()


def test_a_version_without_annotations_is_evaluated_and_not_trained_on(tmp_path):
    small = SmallNuScenes(tmp_path)
    (small.root / "v1.0-mini").rename(small.root / "v1.0-test")
    for table in tables.ANNOTATION_TABLES:
        (small.root / "v1.0-test" / f"{table}.json").unlink()
    _, val, errors = nuscenes.load(small.root, "", "", "test", print=len)  # all its scenes, without the devkit
    assert not val.annotated and len(val) == 36 and not errors and not val.class_counts().any()
    with pytest.raises(DataError, match=r"split test: v1\.0-test has no annotations.*--train-split train"):
        nuscenes.load(small.root, "", "test", "test", print=len)
