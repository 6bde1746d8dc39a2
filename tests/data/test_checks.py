"""The data check and the policies for errors: all are printed, nothing is left out silently."""

import json
import shutil

import pytest

from data import DataError, checks, detection
from utils.errors import WriteError


@pytest.fixture
def faulty(drawn_voc, tmp_path):
    """A synthetic data set with one error of each kind in train and one in val: (root, the files with errors)."""
    root = shutil.copytree(drawn_voc, tmp_path / "set")
    truncated = root / "JPEGImages/000002.jpg"
    truncated.write_bytes(truncated.read_bytes()[:500])
    annotation = root / "Annotations/000000.xml"
    corners = "<xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>20</ymax>"
    flat = f"<object><name>disc</name><bndbox>{corners}</bndbox></object></annotation>"
    annotation.write_text(annotation.read_text().replace("</annotation>", flat))
    (root / "JPEGImages/000004.jpg").unlink()
    resized = root / "JPEGImages/000021.jpg"
    shutil.copy(root / "JPEGImages/000001.jpg", resized)
    return root, [annotation, root / "ImageSets/Main/trainval.txt", truncated, resized]


def make_error(kind, name="a"):
    return DataError(name, "place", "reason", kind=kind)


def test_load_joins_the_errors_of_both_splits(faulty):
    root, files = faulty
    train, val, errors = detection.load("voc", [root])
    assert (len(train), len(val)) == (19, 4)
    assert [(error.path, error.kind) for error in errors] == [(str(files[0]), "box"), (str(files[1]), "image")]


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
        errors = checks.unreadable(train, workers, progress=False)
        assert list(errors) == [2]
        assert [(error.path, error.kind) for error in errors[2]] == [(str(files[2]), "image")]
    assert [error.path for (error,) in checks.unreadable(val, 0, progress=False).values()] == [str(files[3])]


def test_check_data_lists_every_error_and_writes_json(faulty, tmp_path):
    root, files = faulty
    lines = []
    with pytest.raises(DataError, match=r"4 errors in the data, listed above: --bad-boxes .*; --bad-images "):
        checks.check_data(*detection.load("voc", [root]), 0, tmp_path / "run", lines.append)
    assert [line.split(": ")[0] for line in lines] == [str(file) for file in files]
    report = json.loads((tmp_path / "run/data_errors.json").read_text())
    assert report["images"] == {"train": 19, "val": 4}
    assert [entry["path"] for entry in report["errors"]] == [str(file) for file in files]
    assert [entry["kind"] for entry in report["errors"]] == ["box", "image", "image", "image"]
    for entry, line in zip(report["errors"], lines, strict=True):
        assert line == ": ".join(entry[part] for part in ("path", "place", "reason") if entry[part])
        assert "\n" not in line


def test_errors_that_cannot_be_written_are_printed(faulty, tmp_path):
    root, files = faulty
    (tmp_path / "run").touch()
    lines = []
    with pytest.raises(WriteError, match=r"run.data_errors\.json: not written: File exists; move away the file"):
        checks.check_data(*detection.load("voc", [root]), 0, tmp_path / "run", lines.append)
    assert [line.split(": ")[0] for line in lines] == list(map(str, files))


def test_check_data_without_errors(drawn_voc, tmp_path):
    lines = []
    assert checks.check_data(*detection.load("voc", [drawn_voc]), 0, tmp_path, lines.append) == {}
    assert lines == ["no errors in 20 training and 4 validation images"]
    report = json.loads((tmp_path / "data_errors.json").read_text())
    assert report == {"images": {"train": 20, "val": 4}, "errors": []}


def test_policies():
    errors, lines = [make_error("box", "b"), make_error("image", "i")], []
    checks.apply_fault_policy(errors, "drop", "skip", lines.append)
    assert lines == ["b: place: reason (box dropped)", "i: place: reason (image skipped)"]
    lines.clear()
    with pytest.raises(DataError, match=r"^i: place: reason; --bad-images skip leaves out such images$"):
        checks.apply_fault_policy(errors, "drop", "error", lines.append)
    assert lines == ["b: place: reason (box dropped)"]  # a single error that stops the run is raised itself
    lines.clear()
    with pytest.raises(DataError, match=r"2 errors in the data, listed above: --bad-boxes drop .*; --bad-images skip"):
        checks.apply_fault_policy(errors, "error", "error", lines.append)
    assert lines == ["b: place: reason", "i: place: reason"]
    with pytest.raises(DataError, match=r"^f: place: reason$"):
        checks.apply_fault_policy([make_error("file", "f")], "drop", "skip", lines.append)
    checks.apply_fault_policy([], "error", "error", lines.append)
    assert len(lines) == 2


def test_before_training_only_the_first_errors_are_printed():
    errors, lines = [make_error("box", str(i)) for i in range(checks.MAX_LINES + 9)], []
    checks.apply_fault_policy(errors, "drop", "error", lines.append)
    assert len(lines) == checks.MAX_LINES + 1
    assert lines[-1] == "... and 9 more; --check-data lists them all"


def test_skipping_images(faulty):
    root, files = faulty
    lines = []
    loaded = detection.load("voc", [root])
    train, val = checks.apply(*loaded, "drop", "skip", 0, lines.append)
    assert (len(train), len(val)) == (18, 3)
    assert str(files[2]) not in [train.paths[i] for i in range(len(train))]
    for dataset in (train, val):
        for index in range(len(dataset)):
            assert dataset[index][1]["image_id"] == index
    for file in files:
        assert sum(line.startswith(str(file)) for line in lines) == 1, file
    with pytest.raises(DataError, match=r"trainval\.txt: line 5: .*--bad-images skip"):
        checks.apply(*loaded, "drop", "error", 0, lines.append)


def test_different_classes_are_printed(drawn_voc, tmp_path):
    root, lines = shutil.copytree(drawn_voc, tmp_path / "set"), []
    (root / "labels.txt").unlink()
    test = (root / "ImageSets/Main/test.txt").read_text().split()
    for name in test:
        file = root / f"Annotations/{name}.xml"
        file.write_text(file.read_text().replace("<name>disc<", "<name>disk<").replace("<name>star<", "<name>disk<"))
    train, val, errors = detection.load("voc", [root])
    assert not errors
    checks.apply(train, val, errors, "error", "error", 0, lines.append)
    text = "\n".join(lines)
    assert f"left out, classes unknown to training: disk ({val.unknown['disk']})" in text
    assert "not in the validation set, so not measured: disc" in text
    assert "train: images 20, background " in text
    # also where images are skipped
    (root / f"JPEGImages/{test[-1]}.jpg").write_bytes(b"")
    lines.clear()
    checks.apply(train, val, errors, "error", "skip", 0, lines.append)
    assert "classes unknown to training: disk" in "\n".join(lines)


def test_nothing_left_to_train_on(drawn_voc, tmp_path):
    root = shutil.copytree(drawn_voc, tmp_path / "set")

    def apply(bad_images):
        checks.apply(*detection.load("voc", [root]), "drop", bad_images, 0, print=lambda line: None)

    for file in (root / "Annotations").iterdir():
        file.write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="nothing to train on: all training images are background"):
        apply("skip")
    for file in (root / "JPEGImages").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no image left for train"):
        apply("skip")
    with pytest.raises(DataError, match="errors in the data"):
        apply("error")
