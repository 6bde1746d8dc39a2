"""Open Images folders: both layouts, and the csv files that people really have."""

import shutil

import pytest
from PIL import Image

import synthetic
from data import DataError, checks, detection
from data.detection import open_images
from data.detection.dataset import BoxDataset

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"
CLASS_HEADER = "ImageID,LabelName,Confidence,XMin,XMax,YMin,YMax,ClassName"
PUBLISHED = {  # csv files such as people published, and parts of the one line in which reading them ends
    "other columns": (
        ["image,xmin,ymin,xmax,ymax,label", "1.png,49.8,305.5,68.4,322.4,ball"],
        ("line 1", "no column ImageID, XMin, YMin, XMax, YMax"),
    ),
    "no rows": ([CLASS_HEADER], ("has a header but no rows", "add a row for each box")),
    "other images": (
        [CLASS_HEADER, "./can_real/1.png,me,1.0,0.27,0.58,0.28,0.9,can", "./can_real/2.png,me,1.0,0.4,0.7,0.1,0.6,can"],
        ("line 2", "no image in", "--bad-images skip"),
    ),
    "pixels": (
        [HEADER, r"Data_1,C:\1.jpg,header,1,1,1600,6,8,0,0,0", r"Data_1,C:\1.jpg,image,1,202,793,556,935,0,0,0"],
        ("line 2", "corner 1600 is in pixels (2 such lines)", "divide by the width and height of the image"),
    ),
}


@pytest.fixture(scope="module")
def drawn_set(tmp_path_factory):
    return synthetic.draw_open_images(tmp_path_factory.mktemp("drawn") / "oi", images=3, seed=1, size=(64, 64))


def row(image, label="/m/01", box=(0.1, 0.5, 0.2, 0.6), group=0):
    left, right, top, bottom = box
    return f"{image},x,{label},1,{left},{right},{top},{bottom},0,0,{group}"


def open_images_root(root, rows, images=("a", "b", "c"), file="train-annotations-bbox.csv", header=HEADER):
    """A data set of 40 x 20 images in train/."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for name in images:
        Image.new("RGB", (40, 20)).save(root / "train" / f"{name}.jpg")
    (root / file).write_text("\n".join([header, *rows]) + "\n")
    return root


def read(root):
    annotations = open_images.read([root], "train")
    return BoxDataset(annotations), [str(error) for error in annotations.errors]


def names(dataset):
    return [dataset.paths[index].rsplit("/", 1)[1] for index in range(len(dataset))]


def test_official_layout(tmp_path):
    """The rows of an image in any order, groups to ignore, names of codes, background images without rows."""
    rows = [row("b"), row("a", "/m/02", (0, 1, 0, 1), group=1), row("b", "/m/02", (0.25, 0.5, 0.5, 1))]
    root = open_images_root(tmp_path, rows)
    (root / "class-descriptions-boxable.csv").write_text('/m/01,Teddy bear\n/m/02,"Cat, big"\n')
    dataset, errors = read(root)
    assert not errors
    assert dataset.classes == ["Cat, big", "Teddy bear"]
    assert names(dataset) == ["b.jpg", "a.jpg", "c.jpg"]
    targets = [dataset[i][1] for i in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[1, 0], [0], []]
    assert [target["ignore"].tolist() for target in targets] == [[False, False], [True], []]
    assert targets[0]["boxes"].tolist() == [[4, 4, 20, 12], [10, 10, 20, 20]]
    assert targets[2]["boxes"].shape == (0, 4)
    assert targets[0]["size"] == (20, 40)


@pytest.mark.parametrize("file", ["sub-train-annotations-bbox.csv", "oidv6-train-annotations-bbox.csv"])
def test_class_names_in_the_file_and_suffixes_in_the_ids(tmp_path, file):
    rows = [row("a.jpg") + ",Apple", row("b.JPG") + ",Bun"]
    dataset, errors = read(open_images_root(tmp_path, rows, file=file, header=HEADER + ",ClassName"))
    assert not errors
    assert dataset.classes == ["Apple", "Bun"]
    assert [len(dataset.annotation(i)["labels"]) for i in range(3)] == [1, 1, 0]


def test_labels_txt_gives_the_order_and_must_have_every_class(tmp_path):
    rows = [row("a", "cat"), row("b", "dog")]
    root = open_images_root(tmp_path, rows)
    (root / "labels.txt").write_text("BACKGROUND\ndog\ncat\n")
    annotations = open_images.read([root], "train")
    assert (annotations.classes, annotations.class_errors) == (["dog", "cat"], [])
    (root / "labels.txt").write_text("dog\n")
    (error,) = open_images.read([root], "train").class_errors
    assert str(error) == f"{root / 'labels.txt'}: class 'cat' of the annotations is missing; add it"


def test_validation_split(drawn_set):
    assert open_images.read([drawn_set], "val").paths[0].startswith(str(drawn_set / "test"))


def test_all_errors_in_one_pass(tmp_path):
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
        row("b", box=(-0.1, 1.1, 0, 1)),  # somewhat outside of the image: clipped
        row(""),  # line 14
    ]
    root = open_images_root(tmp_path, rows)
    dataset, errors = read(root)
    file = root / "train-annotations-bbox.csv"
    assert errors == [
        f"{file}: line 2: /m/01 has no area: x 0.5 to 0.5, y 0 to 1",
        f"{file}: line 4: /m/01: a corner is not a number: 0.1, 0, x, 1",
        f"{file}: line 5: /m/01: a corner is not a number: 0.1, 0, nan, 1",
        f"{file}: line 6: /m/01 has no area: x 0.6 to 0.5, y 0 to 1",
        f"{file}: line 7: has no class name",
        f"{file}: line 8: has no class name",
        f"{file}: line 14: has no ImageID",
        f"{file}: line 12: corner 20 is in pixels (one such line); divide by the width and height of the image",
        f"{file}: line 9: no image in {root / 'train'} for gone, away",
    ]
    assert names(dataset) == ["b.jpg", "a.jpg", "c.jpg"]
    assert dataset.annotation(0)["boxes"].tolist() == [[0, 0, 1, 1]]


def test_a_short_row_without_its_id(tmp_path):
    """The columns may be in any order: the ImageID of a row that ends early may be missing."""
    header = "ClassName,XMin,YMin,XMax,YMax,ImageID"
    root = open_images_root(tmp_path, ["Cat,0,0,1,1", "Cat,0,0,1,1,a"], header=header)
    dataset, errors = read(root)
    assert errors == [f"{root / 'train-annotations-bbox.csv'}: line 2: has no ImageID"]
    assert len(dataset.labels) == 1


def test_many_missing_images_are_one_line(tmp_path):
    errors = read(open_images_root(tmp_path, [row("a"), *(row(f"no{i}") for i in range(30))]))[1]
    assert len(errors) == 1
    assert errors[0].endswith("for no0, no1, no2 and 27 more")


def assert_one_clear_line(root, parts):
    """Training on `root` ends in one line that names the csv file and has `parts`."""
    with pytest.raises(DataError) as caught:
        checks.apply(*detection.load("open_images", [root]), "drop", "error", 0, print=lambda line: None)
    message = str(caught.value)
    assert message.startswith(f"{root / 'sub-train-annotations-bbox.csv'}: ")
    assert "\n" not in message and len(message) < 600
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", PUBLISHED)
def test_invalid_files_end_in_one_clear_line(drawn_set, tmp_path, name):
    root = shutil.copytree(drawn_set, tmp_path / "set")
    lines, parts = PUBLISHED[name]
    (root / "sub-train-annotations-bbox.csv").write_text("\n".join(lines) + "\n")
    assert_one_clear_line(root, parts)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("adamzaidi_train-annotations-bbox.csv", ("line 1", "no column ImageID, XMin, YMin, XMax, YMax")),
        ("enjoy82_can_real-sub-test.csv", ("has a header but no rows", "add a row for each box")),
        ("enjoy82_can_real-sub-train.csv", ("line 2", "no image in", "--bad-images skip")),
        ("vidhya_train-annotations-bbox.csv", ("line 2", "in pixels", "divide by the width and height of the image")),
    ],
)
def test_published_files_end_in_one_clear_line(shared, drawn_set, tmp_path, name, parts):
    root = shutil.copytree(drawn_set, tmp_path / "set")
    shutil.copy(shared / "data/bad_inputs/openimages_csv" / name, root / "sub-train-annotations-bbox.csv")
    assert_one_clear_line(root, parts)


def test_folders_that_are_not_open_images_data_sets(tmp_path):
    expected = r"no annotation file for train; expected one of sub-train-annotations-bbox.csv"
    with pytest.raises(DataError, match=expected):
        open_images.read([tmp_path], "train")
    root = open_images_root(tmp_path / "a", [row("a")])
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match="train: no such folder"):
        open_images.read([root], "train")
    header = HEADER.replace("LabelName", "Name").replace("YMax", "Y2")
    root = open_images_root(tmp_path / "b", [row("a")], header=header)
    expected = r"line 1: no column YMax, ClassName or LabelName; .*columns: ImageID, Source, Name"
    with pytest.raises(DataError, match=expected):
        open_images.read([root], "train")
    file = root / "train-annotations-bbox.csv"
    for content, reason in (
        (b"", "the file is empty"),
        ((HEADER + "\n" + row("caf\u00e9")).encode("latin-1"), "not UTF-8"),
        (f'{HEADER}\n"{"a" * 200_000}"\n'.encode(), "not valid csv"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_images.read([root], "train")


@pytest.mark.realdata
def test_photos(shared):
    train, val, errors = detection.load("open_images", [shared / "data/openimages_layout"])
    assert (len(train), len(val), errors) == (40, 24, [])
    assert train.classes == sorted(train.classes)
    assert len(train.labels) > 100
