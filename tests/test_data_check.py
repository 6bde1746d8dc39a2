"""The data check and what is done about faults: all said, none silently left out."""

import json
import shutil

import pytest

from data import DataError, check, detection


def nothing(line):
    """Say it to nobody."""


@pytest.fixture
def faulty(drawn_voc, tmp_path):
    """A drawn set with one fault of each kind in train, and one in test: (root, the files at fault)."""
    root = tmp_path / "set"
    shutil.copytree(drawn_voc, root)
    picture = root / "JPEGImages/000002.jpg"
    picture.write_bytes(picture.read_bytes()[:500])
    annotation = root / "Annotations/000000.xml"
    corners = "<xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>20</ymax>"
    flat = f"<object><name>disc</name><bndbox>{corners}</bndbox></object></annotation>"
    annotation.write_text(annotation.read_text().replace("</annotation>", flat))
    (root / "JPEGImages/000004.jpg").unlink()
    resized = root / "JPEGImages/000021.jpg"
    shutil.copy(root / "JPEGImages/000001.jpg", resized)
    return root, [annotation, root / "ImageSets/Main/trainval.txt", picture, resized]


def fault(kind, name="a"):
    return DataError(name, "place", "reason", kind=kind)


def test_load_joins_the_faults_of_both_splits(faulty):
    root, files = faulty
    train, val, faults = detection.load("voc", [root])
    assert (len(train), len(val)) == (19, 4)
    assert [(fault.path, fault.kind) for fault in faults] == [(str(files[0]), "box"), (str(files[1]), "image")]


def test_one_file_for_both_splits_is_reported_once(faulty):
    root, _ = faulty
    lists = root / "ImageSets/Main"
    (lists / "default.txt").write_text((lists / "trainval.txt").read_text())
    for name in ("trainval", "train", "val", "test"):
        (lists / f"{name}.txt").unlink()
    assert len(detection.load("voc", [root])[2]) == 2


def test_unreadable(faulty):
    root, files = faulty
    train, val, _ = detection.load("voc", [root])
    for workers in (0, 1):
        found = check.unreadable(train, workers, progress=False)
        assert list(found) == [2]
        assert [(each.path, each.kind) for each in found[2]] == [(str(files[2]), "image")]
    assert [error.path for (error,) in check.unreadable(val, 0, progress=False).values()] == [str(files[3])]


def test_check_data_lists_every_fault_and_writes_json(faulty, tmp_path):
    root, files = faulty
    report, said = tmp_path / "run/data_faults.json", []
    with pytest.raises(DataError, match=r"4 faults in the data, listed above: --bad-boxes .*; --bad-images "):
        check.check_data(*detection.load("voc", [root]), 0, report, said.append)
    assert [line.split(": ")[0] for line in said] == [str(file) for file in files]
    content = json.loads(report.read_text())
    assert content["images"] == {"train": 19, "val": 4}
    assert [entry["path"] for entry in content["faults"]] == [str(file) for file in files]
    assert [entry["kind"] for entry in content["faults"]] == ["box", "image", "image", "image"]
    for entry, line in zip(content["faults"], said, strict=True):
        assert line == ": ".join(entry[part] for part in ("path", "place", "reason") if entry[part])
        assert "\n" not in line


def test_check_data_on_clean_data(drawn_voc, tmp_path):
    said, report = [], tmp_path / "data_faults.json"
    assert check.check_data(*detection.load("voc", [drawn_voc]), 0, report, said.append) == {}
    assert said == ["no fault in 20 training and 4 validation pictures"]
    assert json.loads(report.read_text()) == {"images": {"train": 20, "val": 4}, "faults": []}


def test_settling_faults():
    faults, said = [fault("box", "b"), fault("image", "i")], []
    check.settle(faults, "drop", "skip", said.append)
    assert said == ["b: place: reason (box dropped)", "i: place: reason (picture skipped)"]
    said.clear()
    with pytest.raises(DataError, match=r"^i: place: reason; --bad-images skip leaves such pictures out$"):
        check.settle(faults, "drop", "error", said.append)
    assert said == ["b: place: reason (box dropped)"]  # the one that stops the run is the error itself
    with pytest.raises(DataError, match=r"2 faults in the data, listed above: --bad-boxes drop .*; --bad-images skip"):
        check.settle(faults, "error", "error", nothing)
    with pytest.raises(DataError, match=r"^f: place: reason$"):
        check.settle([fault("file", "f")], "drop", "skip", nothing)
    check.settle([], "error", "error", said.append)


def test_many_faults_are_cut_short_before_training_and_never_by_the_check():
    faults, said = [fault("box", str(i)) for i in range(check.SHOWN + 9)], []
    check.settle(faults, "drop", "error", said.append)
    assert len(said) == check.SHOWN + 1
    assert said[-1] == "... and 9 more; --check-data lists them all"


def test_skipping_pictures(faulty):
    root, files = faulty
    said = []
    loaded = detection.load("voc", [root])
    train, val = detection.settle(*loaded, "drop", "skip", 0, said.append)
    assert (len(train), len(val)) == (18, 3)
    assert str(files[2]) not in [train.paths[i] for i in range(len(train))]
    for dataset in (train, val):
        for index in range(len(dataset)):
            assert dataset[index][1]["image_id"] == index
    for file in files:
        assert sum(line.startswith(str(file)) for line in said) == 1, file
    with pytest.raises(DataError, match=r"trainval\.txt: line 5: .*--bad-images skip"):
        detection.settle(*loaded, "drop", "error", 0, nothing)


def test_classes_that_differ_are_said(drawn_voc, tmp_path):
    root, said = tmp_path / "set", []
    shutil.copytree(drawn_voc, root)
    (root / "labels.txt").unlink()
    test = (root / "ImageSets/Main/test.txt").read_text().split()
    for name in test:
        file = root / f"Annotations/{name}.xml"
        file.write_text(file.read_text().replace("<name>disc<", "<name>disk<").replace("<name>star<", "<name>disk<"))
    train, val, faults = detection.load("voc", [root])
    assert not faults
    detection.settle(train, val, faults, "error", "error", 0, said.append)
    text = "\n".join(said)
    assert f"left out, classes that training does not know: disk ({val.unknown['disk']})" in text
    assert "no validation box, so no AP, for: disc" in text
    assert "train: images 20, background " in text
    # what was left out is still said when pictures are skipped
    (root / f"JPEGImages/{test[-1]}.jpg").write_bytes(b"")
    said.clear()
    detection.settle(train, val, faults, "error", "skip", 0, said.append)
    assert "classes that training does not know: disk" in "\n".join(said)


def test_a_checkpoints_classes_rule(drawn_voc):
    order = ["star", "ring", "disc", "square", "triangle"]
    with pytest.raises(DataError, match="--remap-by-name"):
        detection.load("voc", [drawn_voc], trained=order)
    own = detection.load("voc", [drawn_voc])[0]
    train, val, faults = detection.load("voc", [drawn_voc], trained=order, remap_by_name=True)
    assert (train.classes, val.classes, faults) == (order, order, [])
    for index in range(len(train)):
        names = [[data.classes[label] for label in data.annotation(index)["labels"]] for data in (own, train)]
        assert names[0] == names[1]


def test_nothing_left_to_train_on(drawn_voc, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(drawn_voc, root)
    for file in (root / "Annotations").iterdir():
        file.write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="no box to train on"):
        detection.settle(*detection.load("voc", [root]), "drop", "skip", 0, nothing)
    for file in (root / "JPEGImages").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no picture left for train"):
        detection.settle(*detection.load("voc", [root]), "drop", "skip", 0, nothing)
    with pytest.raises(DataError, match="faults in the data"):
        detection.settle(*detection.load("voc", [root]), "drop", "error", 0, nothing)
