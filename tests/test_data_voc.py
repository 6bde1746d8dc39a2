"""Pascal VOC folders as people have them: every trap is one line, and all of them come in one pass."""

import pytest
from PIL import Image

from data import DataError, voc

BOX = {"xmin": 11, "ymin": 21, "xmax": 40, "ymax": 60}


def item(name="cat", difficult="<difficult>0</difficult>", **corners):
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in (BOX | corners).items() if value is not None)
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox></object>"


def xml(*items, size=(100, 80)):
    told = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{told}{''.join(items)}</annotation>"


def voc_root(root, annotations, split="train", suffix=".jpg", lines=None):
    """A VOC set of 100 x 80 pictures: {name: xml, or None to leave it out}."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in annotations.items():
        (root / "JPEGImages" / f"{name}{suffix}").parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF"}[suffix.lower()]
        Image.new("RGB", (100, 80), (90, 120, 30)).save(root / "JPEGImages" / f"{name}{suffix}", kind)
        if content is not None:
            (root / "Annotations" / f"{name}.xml").parent.mkdir(parents=True, exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(content)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(annotations if lines is None else lines))
    return root


def read(root, **options):
    faults = []
    return voc.load([root], "train", faults=faults, **options), faults


def boxes_of(root, **options):
    dataset, faults = read(root, **options)
    assert not faults
    return dataset.annotation(0)["boxes"].tolist()


def test_corners_count_from_one_and_the_last_pixel_belongs_to_the_box(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item(), item(xmin=1, ymin=1, xmax=100, ymax=80))})
    assert boxes_of(root) == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert boxes_of(root, offset=0) == [[11, 21, 40, 60], [1, 1, 100, 80]]


def test_float_corners_and_boxes_over_the_border(tmp_path):
    items = (item(xmin="11.5", ymax=" 60.25 "), item(xmin=0, ymin=-3), item(xmax=130, ymax=90))
    root = voc_root(tmp_path, {"a": xml(*items)})
    assert boxes_of(root) == [[10.5, 20, 40, 60.25], [0, 0, 40, 60], [10, 20, 100, 80]]


def test_difficult_may_lack(tmp_path):
    marks = ("", "<difficult>1</difficult>", "<difficult>0</difficult>", "<difficult></difficult>")
    dataset, faults = read(voc_root(tmp_path, {"a": xml(*(item(difficult=mark) for mark in marks))}))
    assert not faults
    assert dataset.annotation(0)["ignore"].tolist() == [False, True, False, False]


def test_size_may_lack(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item(xmax=130), size=None), "b": xml(item(ymax=90), size=(0, 0))})
    dataset, faults = read(root)
    assert not faults
    assert [dataset.annotation(i)["boxes"].tolist() for i in (0, 1)] == [[[10, 20, 100, 60]], [[10, 20, 40, 80]]]
    assert dataset.annotation(0)["size"] == (80, 100)


def test_names_with_spaces_dots_and_folders(tmp_path):
    names = ["my photo 1", "IMG.2020.01", "day 1/a"]
    dataset, faults = read(voc_root(tmp_path, {name: xml(item("traffic light ")) for name in names}))
    assert not faults
    assert dataset.classes == ["traffic light"]
    assert [dataset.paths[i] for i in range(3)] == [str(tmp_path / "JPEGImages" / f"{name}.jpg") for name in names]
    assert dataset[0][0].shape == (3, 80, 100)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".PNG", ".bmp", ".tif"])
def test_suffixes_in_either_case(tmp_path, suffix):
    dataset, faults = read(voc_root(tmp_path, {"a": xml(item())}, suffix=suffix))
    assert not faults
    assert dataset[0][0].shape == (3, 80, 100)


def test_split_files(tmp_path):
    annotations = {"a": xml(item()), "b": xml()}
    voc_root(tmp_path, annotations, split="default", lines=["a.JPG\r", "", "  b  ", "", ""])
    assert [len(voc.load([tmp_path], split)) for split in ("train", "val")] == [2, 2]  # CVAT: one file for both
    voc_root(tmp_path, annotations, split="val", lines=["b"])
    voc_root(tmp_path, annotations, split="train", lines=["a"])
    assert [len(voc.load([tmp_path], split)) for split in ("train", "val")] == [1, 1]
    voc_root(tmp_path, annotations, split="test", lines=["a", "b"])
    voc_root(tmp_path, annotations, split="trainval", lines=["b", "a"])
    assert [len(voc.load([tmp_path], split)) for split in ("train", "val")] == [2, 2]


def test_classes_come_from_labels_txt_or_sorted(tmp_path):
    first = voc_root(tmp_path / "first", {"a": xml(item("dog"), item("cat"))})
    second = voc_root(tmp_path / "second", {"b": xml(item("emu"))})
    assert voc.load([first, second], "train").classes == ["cat", "dog", "emu"]
    (first / "labels.txt").write_text("BACKGROUND\ndog\ncat\n\n")
    assert voc.load([first], "train").classes == ["dog", "cat"]
    (second / "labels.txt").write_text("emu\ndog\n")
    dataset = voc.load([first, second], "train")
    assert dataset.classes == ["dog", "cat", "emu"]
    assert [dataset.annotation(i)["labels"].tolist() for i in (0, 1)] == [[0, 1], [2]]
    given = voc.load([first, second], "train", classes=["emu", "cat"])
    assert (given.classes, given.unknown) == (["emu", "cat"], {"dog": 1})


def test_a_class_that_labels_txt_lacks_is_a_fault(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item("dog"), item("cat"), item("bat"))})
    (root / "labels.txt").write_text("dog\n")
    dataset, faults = read(root)
    assert [str(fault) for fault in faults] == [
        f"{root / 'labels.txt'}: lacks class {name!r}, which objects have; add it" for name in ("bat", "cat")
    ]
    assert {fault.kind for fault in faults} == {"file"}
    assert dataset.classes == ["dog"]
    with pytest.raises(DataError, match="'bat'"):
        voc.load([root], "train")


def test_all_faults_in_one_pass(tmp_path):
    """Fault by fault: file, the text after it, and what it costs."""
    objects = [
        (item(xmax=11), "cat has no area: xmin=xmax=11"),
        (item(ymin=60, ymax=60), "cat has no area: ymin=ymax=60"),
        (item(xmin=40, xmax=11), "cat: xmax 11 < xmin 40"),
        (item(ymin=60, ymax=21), "cat: ymax 21 < ymin 60"),
        (item(xmin="ten"), "cat: a corner is no number: ten 21 40 60"),
        (item(xmin="nan"), "cat: xmax 40 < xmin nan"),
        (item(xmin=None), "has no name or no bndbox with four corners"),
        (item(xmin="1\n2"), "cat: a corner is no number: 1 2 21 40 60"),
        (item(name=""), "has no name or no bndbox with four corners"),
        ("<object><name>cat</name></object>", "has no name or no bndbox with four corners"),
        (item(xmin=300, xmax=320), "cat 300,21 to 320,60 outside 100 x 80"),
        (item(xmin=-9, xmax=-3), "cat -9,21 to -3,60 outside 100 x 80"),
    ]
    annotations = {
        "good": xml(item()),
        "boxes": xml(item(), *(text for text, _ in objects)),
        "cut": xml(item())[:-9],
        "empty": "",
        "odd size": xml(item(), size=("wide", 80)),
        "odd code": '<?xml version="1.0" encoding="klingon"?>' + xml(item()),
        "wide code": '<?xml version="1.0" encoding="gbk"?>' + xml(item()),
        "no_xml": None,
        "last": xml(item()),
    }
    root = voc_root(tmp_path, annotations, lines=["good", "", *list(annotations)[1:], "no_picture"])
    (root / "Annotations/no_picture.xml").write_text(xml(item()))
    dataset, faults = read(root)
    assert [dataset.paths[i].rsplit("/", 1)[1] for i in range(len(dataset))] == ["good.jpg", "boxes.jpg", "last.jpg"]
    assert len(dataset.annotation(1)["labels"]) == 1
    told, split_file = [str(fault) for fault in faults], root / "ImageSets/Main/train.txt"
    count = len(objects)
    assert told[:count] == [
        f"{root / 'Annotations/boxes.xml'}: object {number}: {reason}"
        for number, (_, reason) in enumerate(objects, start=2)
    ]
    invalid = ("cut", "empty", "odd size", "odd code", "wide code")
    for name, line in zip(invalid, told[count:]):
        assert line.startswith(f"{root / 'Annotations' / name}.xml: not a valid annotation: ")
    assert told[count + 5 :] == [
        f"{split_file}: line 9: no_xml: no {root / 'Annotations/no_xml.xml'}",
        f"{split_file}: line 11: no_picture: no picture in {root / 'JPEGImages'}",
    ]
    assert [fault.kind for fault in faults] == ["box"] * count + ["image"] * 7
    assert not any("\n" in line for line in told)


def test_folders_that_are_no_voc_set(tmp_path):
    with pytest.raises(DataError, match="no split file for train: expected one of trainval, train, default"):
        voc.load([tmp_path], "train")
    root = voc_root(tmp_path / "a", {"a": xml(item())}, split="other")
    with pytest.raises(DataError, match=r"found: other\.txt"):
        voc.load([root], "train")
    root = voc_root(tmp_path / "b", {"a": xml(item())}, lines=["", ""])
    with pytest.raises(DataError, match=r"train\.txt: lists no picture"):
        voc.load([root], "train")
    (root / "ImageSets/Main/train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"train\.txt: not UTF-8"):
        voc.load([root], "train")
    (root / "ImageSets/Main/train.txt").write_text("a")
    (root / "JPEGImages").rename(root / "images")
    with pytest.raises(DataError, match="JPEGImages: no such folder"):
        voc.load([root], "train")


def test_an_annotation_of_another_size_is_named_when_the_picture_is_read(tmp_path):
    dataset = voc.load(
        [voc_root(tmp_path, {"a": xml(item(), size=(200, 160)), "b": xml(item(), size=(80, 100))})], "train"
    )
    with pytest.raises(
        DataError, match=r"a\.jpg: the annotation says 200 x 160, the file 100 x 80; annotate"
    ) as caught:
        dataset[0]
    assert caught.value.kind == "image"
    with pytest.raises(DataError, match=r"b\.jpg: .* says 80 x 100, .*turned by its EXIF orientation"):
        dataset[1]


def test_real_blood_cells(shared):
    faults = []
    root = shared / "data/bccd_voc"
    train = voc.load([root], "train", faults=faults)
    val = voc.load([root], "val", train.classes, faults=faults)
    assert (len(train), len(val), train.classes) == (292, 72, ["RBC", "WBC", "Platelets"])
    assert len(train.labels) + len(val.labels) == 4888 - 2
    assert sorted(fault.path.rsplit("/", 1)[1] for fault in faults) == ["BloodImage_00338.xml", "BloodImage_00343.xml"]
    assert all(fault.kind == "box" and "has no area" in fault.reason for fault in faults)
