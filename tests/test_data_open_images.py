"""Open Images folders: both layouts, and the csv files that people really have."""

import shutil

import pytest
from PIL import Image

from data import DataError, detection, drawn, open_images

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"
BAD = {  # file: what its one line must name beside itself
    "adamzaidi_train-annotations-bbox.csv": ("line 1", "no column ImageID, XMin, YMin, XMax, YMax"),
    "enjoy82_can_real-sub-test.csv": ("a header and no row", "add a row for each box"),
    "enjoy82_can_real-sub-train.csv": ("line 2", "no picture in", "--bad-images skip"),
    "vidhya_train-annotations-bbox.csv": ("line 2", "in pixels", "divide by the picture's width and height"),
}


@pytest.fixture(scope="module")
def drawn_set(tmp_path_factory):
    return drawn.draw_open_images(tmp_path_factory.mktemp("drawn") / "oi", images=3, seed=1, size=(64, 64))


def row(image, label="/m/01", box=(0.1, 0.5, 0.2, 0.6), group=0):
    left, right, top, bottom = box
    return f"{image},x,{label},1,{left},{right},{top},{bottom},0,0,{group}"


def open_images_root(root, rows, pictures=("a", "b", "c"), file="train-annotations-bbox.csv", header=HEADER):
    """A set of 40 x 20 pictures in train/."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for name in pictures:
        Image.new("RGB", (40, 20)).save(root / "train" / f"{name}.jpg")
    (root / file).write_text("\n".join([header, *rows]) + "\n")
    return root


def read(root):
    faults = []
    return open_images.load([root], "train", faults=faults), [str(fault) for fault in faults]


def test_official_layout(tmp_path):
    """Rows of a picture lie apart, groups are ignored, codes become names, a picture without rows is background."""
    rows = [row("b"), row("a", "/m/02", (0, 1, 0, 1), group=1), row("b", "/m/02", (0.25, 0.5, 0.5, 1))]
    root = open_images_root(tmp_path, rows)
    (root / "class-descriptions-boxable.csv").write_text('/m/01,Teddy bear\n/m/02,"Cat, big"\n')
    dataset, faults = read(root)
    assert not faults
    assert dataset.classes == ["Cat, big", "Teddy bear"]
    assert [dataset.paths[i].rsplit("/", 1)[1] for i in range(3)] == ["b.jpg", "a.jpg", "c.jpg"]
    targets = [dataset[i][1] for i in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[1, 0], [0], []]
    assert [target["ignore"].tolist() for target in targets] == [[False, False], [True], []]
    assert targets[0]["boxes"].tolist() == [[4, 4, 20, 12], [10, 10, 20, 20]]
    assert targets[2]["boxes"].shape == (0, 4)
    assert targets[0]["size"] == (20, 40)


@pytest.mark.parametrize("file", ["sub-train-annotations-bbox.csv", "oidv6-train-annotations-bbox.csv"])
def test_class_names_in_the_file_and_suffixes_in_the_ids(tmp_path, file):
    rows = [row("a.jpg") + ",Apple", row("b.JPG") + ",Bun"]
    dataset, faults = read(open_images_root(tmp_path, rows, file=file, header=HEADER + ",ClassName"))
    assert not faults
    assert dataset.classes == ["Apple", "Bun"]
    assert [len(dataset.annotation(i)["labels"]) for i in range(3)] == [1, 1, 0]


def test_labels_txt_gives_the_order_and_must_know_every_class(tmp_path):
    rows = [row("a", "cat"), row("b", "dog")]
    root = open_images_root(tmp_path, rows)
    (root / "labels.txt").write_text("BACKGROUND\ndog\ncat\n")
    dataset, faults = read(root)
    assert (dataset.classes, faults) == (["dog", "cat"], [])
    (root / "labels.txt").write_text("dog\n")
    assert read(root)[1] == [f"{root / 'labels.txt'}: lacks class 'cat', which objects have; add it"]


def test_validation_split(drawn_set):
    assert open_images.load([drawn_set], "val").paths[0].startswith(str(drawn_set / "test"))


def test_all_faults_in_one_pass(tmp_path):
    rows = [
        row("a", box=(0.5, 0.5, 0, 1)),  # line 2
        "",
        row("a", box=(0.1, "x", 0, 1)),  # line 4
        row("a", box=(0.1, "nan", 0, 1)),
        row("a", box=(0.6, 0.5, 0, 1)),
        row("a", label=""),
        "a,x",
        row("gone"),
        row("away"),
        row("gone"),
        row("a", box=(4, 20, 4, 12)),  # line 12
        row("b", box=(-0.1, 1.1, 0, 1)),  # a little over the border is clipped
    ]
    root = open_images_root(tmp_path, rows)
    dataset, told = read(root)
    file = root / "train-annotations-bbox.csv"
    assert told == [
        f"{file}: line 2: /m/01 has no area: x 0.5 to 0.5, y 0 to 1",
        f"{file}: line 4: /m/01: a corner is no number: 0.1, 0, x, 1",
        f"{file}: line 5: /m/01: a corner is no number: 0.1, 0, nan, 1",
        f"{file}: line 6: /m/01 has no area: x 0.6 to 0.5, y 0 to 1",
        f"{file}: line 7: has no class name",
        f"{file}: line 8: has no class name",
        f"{file}: line 12: corner 20 is in pixels (one such line); divide by the picture's width and height",
        f"{file}: line 9: no picture in {root / 'train'} for gone, away",
    ]
    assert [dataset.paths[i].rsplit("/", 1)[1] for i in range(len(dataset))] == ["b.jpg", "a.jpg", "c.jpg"]
    assert dataset.annotation(0)["boxes"].tolist() == [[0, 0, 1, 1]]
    with pytest.raises(DataError, match="line 2: "):
        open_images.load([root], "train")


def test_many_missing_pictures_are_one_line(tmp_path):
    told = read(open_images_root(tmp_path, [row("a"), *(row(f"no{i}") for i in range(30))]))[1]
    assert len(told) == 1
    assert told[0].endswith("for no0, no1, no2 and 27 more")


@pytest.mark.parametrize("name", BAD)
def test_real_files_end_in_one_clear_line(shared, drawn_set, tmp_path, name):
    root = tmp_path / "set"
    shutil.copytree(drawn_set, root)
    file = root / "sub-train-annotations-bbox.csv"
    shutil.copy(shared / "data/bad_inputs/openimages_csv" / name, file)
    with pytest.raises(DataError) as caught:
        detection.settle(*detection.load("open_images", [root]), "drop", "error", 0, say=lambda line: None)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message and len(message) < 600
    assert all(part in message for part in BAD[name]), message


def test_folders_that_are_no_open_images_set(tmp_path):
    with pytest.raises(
        DataError, match=r"no annotation file for train: expected one of sub-train-annotations-bbox.csv"
    ):
        open_images.load([tmp_path], "train")
    root = open_images_root(tmp_path / "a", [row("a")])
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match="train: no such folder"):
        open_images.load([root], "train")
    root = open_images_root(
        tmp_path / "b", [row("a")], header=HEADER.replace("LabelName", "Name").replace("YMax", "Y2")
    )
    with pytest.raises(
        DataError, match=r"line 1: no column YMax, ClassName or LabelName: .*found: ImageID, Source, Name"
    ):
        open_images.load([root], "train")
    (root / "train-annotations-bbox.csv").write_text("")
    with pytest.raises(DataError, match="an empty file"):
        open_images.load([root], "train")
    (root / "train-annotations-bbox.csv").write_bytes((HEADER + "\n" + row("caf\u00e9")).encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_images.load([root], "train")
    (root / "train-annotations-bbox.csv").write_text(f'{HEADER}\n"{"a" * 200_000}"\n')
    with pytest.raises(DataError, match="not valid csv"):
        open_images.load([root], "train")


def test_real_photos(shared):
    train, val, faults = detection.load("open_images", [shared / "data/openimages_layout"])
    assert (len(train), len(val), faults) == (40, 24, [])
    assert train.classes == sorted(train.classes)
    assert len(train.labels) > 100
