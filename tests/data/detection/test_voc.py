"""Pascal VOC folders as people have them: what files may contain, and every error in one pass."""

import pytest
from PIL import Image

from data import DataError
from data.detection import load, voc
from data.detection.dataset import BoxDataset

BOX = {"xmin": 11, "ymin": 21, "xmax": 40, "ymax": 60}
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF"}


def item(name="cat", difficult="<difficult>0</difficult>", **corners):
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in (BOX | corners).items() if value is not None)
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox></object>"


def xml(*items, size=(100, 80)):
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{size}{''.join(items)}</annotation>"


def voc_root(root, annotations, split="train", suffix=".jpg", lines=None):
    """A VOC data set of 100 x 80 images: {name: xml, or None for no file}."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in annotations.items():
        file = root / "JPEGImages" / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80), (90, 120, 30)).save(file, FORMATS[suffix.lower()])
        if content is not None:
            (root / "Annotations" / f"{name}.xml").parent.mkdir(parents=True, exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(content)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(annotations if lines is None else lines))
    return root


def read(root, split="train", **options):
    annotations = voc.read([root], split, **options)
    return BoxDataset(annotations), annotations.errors


def boxes_of(root, **options):
    dataset, errors = read(root, **options)
    assert not errors
    return dataset.annotation(0)["boxes"].tolist()


def test_corners_count_from_one_and_the_last_pixel_belongs_to_the_box(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item(), item(xmin=1, ymin=1, xmax=100, ymax=80))})
    assert boxes_of(root) == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert boxes_of(root, offset=0) == [[11, 21, 40, 60], [1, 1, 100, 80]]


def test_fractional_corners_and_boxes_that_leave_the_image(tmp_path):
    items = (item(xmin="11.5", ymax=" 60.25 "), item(xmin=0, ymin=-3), item(xmax=130, ymax=90))
    root = voc_root(tmp_path, {"a": xml(*items)})
    assert boxes_of(root) == [[10.5, 20, 40, 60.25], [0, 0, 40, 60], [10, 20, 100, 80]]


def test_difficult_is_optional(tmp_path):
    flags = ("", "<difficult>1</difficult>", "<difficult>0</difficult>", "<difficult></difficult>")
    dataset, errors = read(voc_root(tmp_path, {"a": xml(*(item(difficult=flag) for flag in flags))}))
    assert not errors
    assert dataset.annotation(0)["ignore"].tolist() == [False, True, False, False]


def test_size_is_optional(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item(xmax=130), size=None), "b": xml(item(ymax=90), size=(0, 80))})
    dataset, errors = read(root)
    assert not errors
    assert [dataset.annotation(i)["boxes"].tolist() for i in (0, 1)] == [[[10, 20, 100, 60]], [[10, 20, 40, 80]]]
    assert dataset.annotation(0)["size"] == (80, 100)


def test_names_with_spaces_dots_and_folders(tmp_path):
    names = ["my photo 1", "IMG.2020.01", "day 1/a"]
    dataset, errors = read(voc_root(tmp_path, {name: xml(item("traffic light ")) for name in names}))
    assert not errors
    assert dataset.classes == ["traffic light"]
    assert [dataset.paths[i] for i in range(3)] == [str(tmp_path / "JPEGImages" / f"{name}.jpg") for name in names]
    assert dataset[0][0].shape == (3, 80, 100)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".PNG", ".bmp", ".tif"])
def test_suffixes_in_either_case(tmp_path, suffix):
    dataset, errors = read(voc_root(tmp_path, {"a": xml(item())}, suffix=suffix))
    assert not errors
    assert dataset[0][0].shape == (3, 80, 100)


def test_split_files(tmp_path):
    annotations = {"a": xml(item()), "b": xml()}

    def lengths():
        return [len(read(tmp_path, split)[0]) for split in ("train", "val")]

    voc_root(tmp_path, annotations, split="default", lines=["a.JPG\r", "", "  b  ", "", ""])
    assert lengths() == [2, 2]  # CVAT: one file for both
    voc_root(tmp_path, annotations, split="val", lines=["b"])
    voc_root(tmp_path, annotations, split="train", lines=["a"])
    assert lengths() == [1, 1]
    voc_root(tmp_path, annotations, split="test", lines=["a", "b"])
    voc_root(tmp_path, annotations, split="trainval", lines=["b", "a"])
    assert lengths() == [2, 2]


def test_classes_come_from_labels_txt_or_are_sorted(tmp_path):
    first = voc_root(tmp_path / "first", {"a": xml(item("dog"), item("cat"))})
    second = voc_root(tmp_path / "second", {"b": xml(item("emu"))})
    assert voc.read([first, second], "train").classes == ["cat", "dog", "emu"]
    (first / "labels.txt").write_text("BACKGROUND\ndog\ncat\n\n")
    assert voc.read([first], "train").classes == ["dog", "cat"]
    (second / "labels.txt").write_text("emu\ndog\n")
    annotations = voc.read([first, second], "train")
    dataset = BoxDataset(annotations)
    assert dataset.classes == ["dog", "cat", "emu"]
    assert [dataset.annotation(i)["labels"].tolist() for i in (0, 1)] == [[0, 1], [2]]
    given = BoxDataset(annotations, ["emu", "cat"])
    assert (given.classes, given.unknown) == (["emu", "cat"], {"dog": 1})


def test_a_class_that_is_not_in_labels_txt_is_an_error(tmp_path):
    """Of training with these classes; with those of a checkpoint, objects of other classes are left out."""
    root = voc_root(tmp_path, {"a": xml(item("dog"), item("cat"), item("bat"))})
    (root / "labels.txt").write_text("dog\n")
    voc_root(tmp_path, {"a": xml(item("dog"), item("cat"), item("bat"))}, split="val")
    train, val, errors = load("voc", [root])
    assert [str(error) for error in errors] == [
        f"{root / 'labels.txt'}: class {name!r} of the annotations is missing; add it" for name in ("bat", "cat")
    ]
    assert {error.kind for error in errors} == {"file"}
    assert train.classes == val.classes == ["dog"]
    assert len(load("voc", [root], classes=["dog"])[2]) == 2  # a checkpoint with the same classes
    train, _, errors = load("voc", [root], classes=["dog", "cat"])
    assert (train.unknown, errors) == ({"bat": 1}, [])


def test_all_errors_in_one_pass(tmp_path):
    """Each error: the file, the text after it, and its kind."""
    objects = [
        (item(xmax=11), "cat has no area: xmax 11 <= xmin 11"),
        (item(ymin=60, ymax=60), "cat has no area: ymax 60 <= ymin 60"),
        (item(xmin=40, xmax=11), "cat has no area: xmax 11 <= xmin 40"),
        (item(ymin=60, ymax=21), "cat has no area: ymax 21 <= ymin 60"),
        (item(xmin="ten"), "cat: a corner is not a number: ten 21 40 60"),
        (item(xmin="nan"), "cat has no area: xmax 40 <= xmin nan"),
        (item(xmin=None), "has no name or no bndbox with four corners"),
        (item(xmin="1\n2"), "cat: a corner is not a number: 1 2 21 40 60"),
        (item(name=""), "has no name or no bndbox with four corners"),
        ("<object><name>cat</name></object>", "has no name or no bndbox with four corners"),
        (item(xmin=300, xmax=320), "cat 300,21 to 320,60 is outside of the image (100 x 80)"),
        (item(xmin=-9, xmax=-3), "cat -9,21 to -3,60 is outside of the image (100 x 80)"),
    ]
    annotations = {
        "good": xml(item()),
        "boxes": xml(item(), *(text for text, _ in objects)),
        "truncated": xml(item())[:-9],
        "empty": "",
        "odd size": xml(item(), size=("wide", 80)),
        "impossible size": xml(item(), size=(2**31, 80)),
        "unknown encoding": '<?xml version="1.0" encoding="klingon"?>' + xml(item()),
        "multi-byte encoding": '<?xml version="1.0" encoding="gbk"?>' + xml(item()),
        "no_xml": None,
        "last": xml(item()),
    }
    root = voc_root(tmp_path, annotations, lines=["good", "", *list(annotations)[1:], "no_image", "neither"])
    (root / "Annotations/no_image.xml").write_text(xml(item()))
    dataset, errors = read(root)
    assert [dataset.paths[i].rsplit("/", 1)[1] for i in range(len(dataset))] == ["good.jpg", "boxes.jpg", "last.jpg"]
    assert len(dataset.annotation(1)["labels"]) == 1
    lines, split_file = [str(error) for error in errors], root / "ImageSets/Main/train.txt"
    count = len(objects)
    assert lines[:count] == [
        f"{root / 'Annotations/boxes.xml'}: object {number}: {reason}"
        for number, (_, reason) in enumerate(objects, start=2)
    ]
    invalid = ("truncated", "empty", "odd size", "impossible size", "unknown encoding", "multi-byte encoding")
    for name, line in zip(invalid, lines[count:]):
        assert line.startswith(f"{root / 'Annotations' / name}.xml: not a valid annotation: ")
    assert lines[count + 6 :] == [
        f"{split_file}: line 10: no_xml: no {root / 'Annotations/no_xml.xml'}",
        f"{split_file}: line 12: no_image: no image in {root / 'JPEGImages'}",
        f"{split_file}: line 13: neither: no {root / 'Annotations/neither.xml'}",
    ]
    assert [error.kind for error in errors] == ["box"] * count + ["image"] * 9
    assert not any("\n" in line for line in lines)


def test_folders_that_are_not_voc_data_sets(tmp_path):
    with pytest.raises(DataError, match=r"no split file for train; expected one of trainval\.txt, train\.txt, default"):
        voc.read([tmp_path], "train")
    root = voc_root(tmp_path / "a", {"a": xml(item())}, split="other")
    with pytest.raises(DataError, match=r"available: other\.txt"):
        voc.read([root], "train")
    root = voc_root(tmp_path / "b", {"a": xml(item())}, lines=["", ""])
    with pytest.raises(DataError, match=r"train\.txt: lists no image"):
        voc.read([root], "train")
    (root / "ImageSets/Main/train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"train\.txt: not UTF-8"):
        voc.read([root], "train")
    (root / "ImageSets/Main/train.txt").write_text("a")
    (root / "JPEGImages").rename(root / "images")
    with pytest.raises(DataError, match="JPEGImages: no such folder"):
        voc.read([root], "train")


def test_an_annotation_of_another_size_is_an_error_when_the_image_is_read(tmp_path):
    root = voc_root(tmp_path, {"a": xml(item(), size=(200, 160)), "b": xml(item(), size=(80, 100))})
    dataset, errors = read(root)
    assert not errors
    with pytest.raises(DataError, match=r"a\.jpg: annotated as 200 x 160 pixels, the file has 100 x 80; annotate") as e:
        dataset[0]
    assert e.value.kind == "image"
    with pytest.raises(DataError, match=r"b\.jpg: annotated as 80 x 100 .* EXIF orientation turns the image"):
        dataset[1]


@pytest.mark.realdata
def test_blood_cells(shared):
    train, val, errors = load("voc", [shared / "data/bccd_voc"])
    assert (len(train), len(val), train.classes) == (292, 72, ["RBC", "WBC", "Platelets"])
    assert len(train.labels) + len(val.labels) == 4888 - 2
    assert sorted(error.path.rsplit("/", 1)[1] for error in errors) == ["BloodImage_00338.xml", "BloodImage_00343.xml"]
    assert all(error.kind == "box" and "has no area" in error.reason for error in errors)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "{}/secret"])
def test_names_that_lead_out_of_the_folder_are_not_opened(tmp_path, name):
    """Not even where the file of that name is a valid annotation."""
    name = name.format(tmp_path)
    root = voc_root(tmp_path / "voc/sub", {"a": xml(item())}, lines=["a", name])
    for folder in (root, tmp_path / "voc/sub/Annotations/.."):
        (folder / "secret.xml").write_text(xml(item()))
    Image.new("RGB", (100, 80)).save(root / "JPEGImages/secret.jpg")
    dataset, errors = read(root)
    assert len(dataset) == 1
    assert "is not in the folder of the data" in str(errors[0]) and errors[0].place == "line 2"


def test_a_name_of_300_characters(tmp_path):
    dataset, errors = read(voc_root(tmp_path, {"a": xml(item())}, lines=["a", "b" * 300]))
    assert len(dataset) == 1 and f"{'b' * 300}: no " in str(errors[0])


def test_entities_are_refused(tmp_path):
    text = '<!DOCTYPE a [<!ENTITY x "cat">]>' + xml(item("&x;"))
    dataset, errors = read(voc_root(tmp_path, {"a": text, "b": xml(item())}))
    assert len(dataset) == 1 and "has a DOCTYPE, which may define entities; remove it" in str(errors[0])
