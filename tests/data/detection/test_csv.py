"""csv files with one box per line, and every error of a file in one pass."""

import pytest
from PIL import Image

from data import DataError, check_target, detection
from data.detection import csv
from data.detection.dataset import BoxDataset

BLOOD_CELLS = ("RBC", "WBC", "Platelets")


def save_image(path):
    """A 40 x 20 image at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(path)


def csv_root(root, rows, classes=("cat,1", "dog,0"), name="train.csv", images=("a.jpg", "b.jpg", "c.jpg")):
    for path in images:
        save_image(root / path)
    (root / name).write_text("\n".join(rows) + "\n")
    if classes:
        (root / "classes.csv").write_text("\n".join(classes) + "\n")
    return root


def read(root):
    annotations = csv.read([root], "train")
    return BoxDataset(annotations), annotations.errors


@pytest.mark.realdata
def test_blood_cells(shared):
    folder = shared / "data/bccd_csv"
    train, val, errors = detection.load("csv", [folder])
    assert (len(train), len(val), tuple(train.classes)) == (205, 87, BLOOD_CELLS)
    assert [str(error) for error in errors] == [
        f"{folder}/train.csv: line 2288: x2 181 <= x1 181; y2 329 <= y1 329",
        f"{folder}/val.csv: line 887: x2 504 <= x1 504; y2 337 <= y1 337",
    ]
    assert len(train.labels) + len(val.labels) == 2805 + 1138 - 2
    for dataset in (train, val):
        for index in range(len(dataset)):
            check_target(*dataset[index], 3)
    lines = [line.split(",") for line in (folder / "val.csv").read_text().splitlines()]
    rows = [line for line in lines if line[0] == lines[0][0]]
    boxes, labels = (val.annotation(0)[key].tolist() for key in ("boxes", "labels"))
    assert boxes == [[min(float(corner), 640) for corner in row[1:5]] for row in rows]
    assert labels == [BLOOD_CELLS.index(row[5]) for row in rows]


def test_files_by_name(tmp_path):
    """Files that are given by name replace those of the folders; without a classes file names are sorted."""
    root = csv_root(tmp_path, ["a.jpg,0,0,9,9,dog", "b.jpg,0,0,9,9,cat"])
    csv_root(tmp_path, ["c.jpg,0,0,9,9,cat"], name="other.csv")
    csv_root(tmp_path, ["a.jpg,,,,,", "b.jpg,,,,,"], name="val.csv")
    files = [str(root / name) for name in ("train.csv", "other.csv", "classes.csv")]
    train, val, errors = detection.load("csv", ["no such folder"], csv_files=files)
    assert (len(train), len(val), errors, train.classes) == (2, 1, [], ["dog", "cat"])
    assert detection.load("csv", [], csv_files=(*files[:2], ""))[0].classes == ["cat", "dog"]
    assert [len(each) for each in detection.load("csv", [root], csv_files=("", files[1], ""))[:2]] == [2, 1]
    with pytest.raises(DataError, match=r"train\.csv: a training file without a validation file; .*--csv-val"):
        detection.load("csv", [root], csv_files=(files[0], "", files[2]))
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read: No such file"):
        detection.load("csv", [root], csv_files=(files[0], "gone.csv", ""))


def test_rows(tmp_path):
    """Fractions, quotes and spaces; boxes are clipped to the image; an image without boxes is background."""
    rows = ["b.jpg,1.5,2.25,10,12.0,cat", "c.jpg,,,,,", '"a.jpg", -3 ,0,50,20.5,"dog"', "", "b.jpg,0,0,1e1,5,dog"]
    dataset, errors = read(csv_root(tmp_path, rows))
    assert not errors
    assert dataset.classes == ["dog", "cat"]
    assert [dataset.paths[i] for i in range(3)] == [str(tmp_path / name) for name in ("b.jpg", "c.jpg", "a.jpg")]
    targets = [dataset[i][1] for i in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[1, 0], [], [0]]
    assert targets[0]["boxes"].tolist() == [[1.5, 2.25, 10, 12], [0, 0, 10, 5]]
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[2]["boxes"].tolist() == [[0, 0, 40, 20]]
    assert not any(target["ignore"].any() for target in targets)
    assert dataset.aspects().tolist() == [0.5] * 3


def test_paths_from_the_working_folder(tmp_path, monkeypatch):
    """The csv file's own folder comes first."""
    rows = ["a.jpg,0,0,9,9,cat", "photos/d.jpg,,,,,", f"{tmp_path}/else/e.jpg,,,,,"]
    root = csv_root(tmp_path / "set", rows)
    for path in ("else/e.jpg", "work/a.jpg", "work/photos/d.jpg"):
        save_image(tmp_path / path)
    monkeypatch.chdir(tmp_path / "work")
    dataset, errors = read(root)
    assert not errors
    assert [dataset.paths[i] for i in range(3)] == [str(root / "a.jpg"), "photos/d.jpg", f"{tmp_path}/else/e.jpg"]


def test_all_errors_in_one_pass(tmp_path):
    rows = [
        "a.jpg,5,5,9,9,cat",
        "a.jpg,31,5,13,9,cat",  # line 2
        "a.jpg,5,9.5,9,9,cow",
        "a.jpg,x,5,9,,cat",
        "a.jpg,5,nan,9,inf,cat",
        "a.jpg,5,5,9,9,",
        "a.jpg,5,5,9,9,cow",
        "gone.jpg,5,5,9,9,cat",  # line 8
        "gone.jpg,5,5,4,9,cat",
        "gone.jpg,5,5,9,9,cat",
        "text.jpg,5,5,9,9,cat",
        "a.jpg,5,5,9,9",  # line 12
        ",5,5,9,9,cat",
        "a.jpg,41,5,50,9,cat",
        "a.jpg,5,5,,,",
        "b.jpg,5,5,9,9,dog",
    ]
    root = csv_root(tmp_path, rows)
    (root / "text.jpg").write_text("<html>")
    dataset, errors = read(root)
    file, row = root / "train.csv", "path,x1,y1,x2,y2,class"
    lines = [str(error) for error in errors]
    assert lines.pop(8).startswith(f"{root / 'text.jpg'}: cannot be read")
    assert lines == [
        f"{file}: line 2: x2 13 <= x1 31",
        f"{file}: line 3: y2 9 <= y1 9.5; class 'cow' is not in {root / 'classes.csv'}",
        f"{file}: line 4: x1 'x' is not a number; y2 '' is not a number",
        f"{file}: line 5: y1 'nan' is not a number; y2 'inf' is not a number",
        f"{file}: line 6: no class",
        f"{file}: line 7: class 'cow' is not in {root / 'classes.csv'}",
        f"{file}: line 8: no image gone.jpg in {root} or the working folder",
        f"{file}: line 9: x2 4 <= x1 5",
        f"{file}: line 12: 5 columns; write {row}",
        f"{file}: line 13: no path; write {row}",
        f"{file}: line 14: cat 41,5 to 50,9 is outside of the image (40 x 20)",
        f"{file}: line 15: x2 '' is not a number; y2 '' is not a number; no class",
    ]
    kinds = ["box"] * 6 + ["image", "box", "image"] + ["box"] * 4
    assert [error.kind for error in errors] == kinds
    assert [dataset.annotation(i)["labels"].tolist() for i in range(len(dataset))] == [[1], [0]]


def test_a_file_without_a_valid_row(tmp_path):
    _, errors = read(csv_root(tmp_path / "short", ["a.jpg,5,5"]))
    assert [error.place for error in errors] == ["line 1"]
    _, errors = read(csv_root(tmp_path / "empty", [""]))
    assert "has no rows" in str(errors[0])


def test_classes_without_a_file(tmp_path):
    """The names in the training rows, sorted; those that only validation has are left out, as in every layout."""
    root = csv_root(tmp_path, ["a.jpg,0,0,9,9,emu", "b.jpg,0,0,9,9,cat"], classes=None)
    csv_root(tmp_path, ["c.jpg,0,0,9,9,gnu", "c.jpg,0,0,9,9,cat"], classes=None, name="test.csv")
    train, val, errors = detection.load("csv", [root])
    assert not errors
    assert train.classes == val.classes == ["cat", "emu"]
    assert val.unknown == {"gnu": 1}
    assert val.annotation(0)["labels"].tolist() == [0]


def test_the_classes_of_a_checkpoint_apply(tmp_path):
    root = csv_root(tmp_path, ["a.jpg,0,0,9,9,dog", "b.jpg,0,0,9,9,cat"])
    (root / "val.csv").write_text((root / "train.csv").read_text())
    with pytest.raises(DataError, match=r"^classes: .*\(cat, dog\).*\(dog, cat\).*--remap-by-name"):
        detection.load("csv", [root], classes=["cat", "dog"])
    train = detection.load("csv", [root], classes=["cat", "dog"], remap_by_name=True)[0]
    assert [train.annotation(i)["labels"].tolist() for i in range(2)] == [[1], [0]]


def test_several_folders(tmp_path):
    one = csv_root(tmp_path / "one", ["a.jpg,0,0,9,9,dog"])
    two = csv_root(tmp_path / "two", ["a.jpg,0,0,9,9,ant", "a.jpg,0,0,9,9,cat"], ["cat,0", "ant,1"])
    dataset = BoxDataset(csv.read([one, two], "train"))
    assert dataset.classes == ["dog", "cat", "ant"]
    assert [dataset.annotation(i)["labels"].tolist() for i in range(2)] == [[0], [2, 1]]


@pytest.mark.parametrize("header", ["path,x1,y1,x2,y2,class", "filename,width,height,class,xmin,ymin,xmax,ymax"])
def test_a_header_is_one_error(tmp_path, header):
    root = csv_root(tmp_path, [header, *["a.jpg,cat,0,0,9,9"] * 100])
    with pytest.raises(DataError, match=rf"train\.csv: line 1: {header} is a header; remove it: rows") as caught:
        read(root)
    assert caught.value.kind == "file"
    root = csv_root(tmp_path / "good", ["a.jpg,,,,,", "b.jpg,one,2,3,4,cat"])
    assert len(read(root)[1]) == 1


def test_folders_and_files_without_such_a_data_set(tmp_path):
    with pytest.raises(DataError, match=r"no train\.csv; available: none; give the file by --csv-train"):
        csv.read([tmp_path], "train")
    root = csv_root(tmp_path, [""])
    with pytest.raises(DataError, match=r"no val\.csv or test\.csv; available: classes\.csv, train\.csv; .*--csv-val"):
        csv.read([root], "val")
    assert [str(error) for error in read(root)[1]] == [
        f"{root}/train.csv: has no rows; write path,x1,y1,x2,y2,class for each box"
    ]
    (root / "train.csv").write_bytes(b"caf\xe9.jpg,0,0,9,9,cat\n")
    with pytest.raises(DataError, match="not UTF-8"):
        csv.read([root], "train")
    (root / "train.csv").write_text("a" * 200_000)
    with pytest.raises(DataError, match=r"line 1: not valid csv"):
        csv.read([root], "train")
