"""Files of synthetic data sets: each layout against the scenes that were drawn."""

import csv
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools

import synthetic
from synthetic.shapes import layouts
from synthetic.shapes.drawing import CLASSES, draw_shapes, draw_single_shape

ARGUMENTS = {"images": 40, "seed": 3, "size": (96, 80)}


def scene_of(index):
    return draw_shapes(3, index, (96, 80))


def image_size(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return image.size


@pytest.mark.parametrize(
    ("images", "options", "expected"),
    [
        (40, {}, {"train": range(34), "val": range(34, 40)}),
        (3, {}, {"train": range(2), "val": range(2, 3)}),
        (40, {"parts": ("a", "b", "c")}, {"a": range(28), "b": range(28, 34), "c": range(34, 40)}),
        (3, {"parts": ("a", "b", "c")}, {"a": range(1), "b": range(1, 2), "c": range(2, 3)}),
        (10, {"min_images": 5}, {"train": range(5), "val": range(5, 10)}),
    ],
)
def test_split(images, options, expected):
    assert layouts.split(images, **options) == expected


def test_voc(tmp_path):
    root, empty = synthetic.draw_voc(tmp_path, **ARGUMENTS), 0
    names = {part: (root / f"ImageSets/Main/{part}.txt").read_text().split() for part in ("train", "val", "test")}
    assert {part: len(lines) for part, lines in names.items()} == {"train": 28, "val": 6, "test": 6}
    assert (root / "ImageSets/Main/trainval.txt").read_text().split() == names["train"] + names["val"]
    assert names["train"] + names["val"] + names["test"] == [f"{index:06d}" for index in range(40)]
    assert (root / "labels.txt").read_text().split() == list(CLASSES)
    for index in range(40):
        tree = ElementTree.parse(root / "Annotations" / f"{index:06d}.xml").getroot()
        scene = scene_of(index)
        size = image_size(root / "JPEGImages" / tree.findtext("filename"))
        assert size == (int(tree.findtext("size/width")), int(tree.findtext("size/height"))) == (96, 80)
        objects = tree.findall("object")
        corners = [[int(o.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        np.testing.assert_array_equal(np.reshape(corners, (-1, 4)) - [1, 1, 0, 0], scene.boxes)
        assert [o.findtext("name") for o in objects] == [CLASSES[label] for label in scene.labels]
        assert [o.findtext("difficult") == "1" for o in objects] == (scene.difficult | scene.crowd).tolist()
        assert [o.findtext("truncated") == "1" for o in objects] == scene.truncated.tolist()
        empty += not objects
    assert empty == 3


def test_open_images(tmp_path):
    root, index = synthetic.draw_open_images(tmp_path, **ARGUMENTS), 0
    for split, count in (("train", 28), ("validation", 6), ("test", 6)):
        with open(root / f"sub-{split}-annotations-bbox.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        images = sorted((root / split).glob("*.jpg"))
        assert len(images) == count
        assert {row["ImageID"] for row in rows} <= {path.stem for path in images}
        for path in images:
            own, scene = [row for row in rows if row["ImageID"] == path.stem], scene_of(index)
            corners = [[float(row[key]) for key in ("XMin", "YMin", "XMax", "YMax")] for row in own]
            np.testing.assert_allclose(np.reshape(corners, (-1, 4)) * [96, 80, 96, 80], scene.boxes, atol=1e-3)
            assert image_size(path) == (96, 80)
            assert [row["ClassName"] for row in own] == [CLASSES[label] for label in scene.labels]
            assert [row["IsGroupOf"] == "1" for row in own] == scene.crowd.tolist()
            assert [row["IsOccluded"] == "1" for row in own] == scene.difficult.tolist()
            assert [row["IsTruncated"] == "1" for row in own] == scene.truncated.tolist()
            index += 1


def test_coco(tmp_path):
    root, ids, index = synthetic.draw_coco(tmp_path, **ARGUMENTS), set(), 0
    for part, count in (("train", 34), ("val", 6)):
        content = json.loads((root / f"annotations/instances_{part}2017.json").read_text())
        assert [(c["id"], c["name"]) for c in content["categories"]] == list(zip((1, 3, 7, 10, 18), CLASSES))
        assert len(content["images"]) == count == len(list((root / f"{part}2017").iterdir()))
        labels = {category["id"]: label for label, category in enumerate(content["categories"])}
        for image in content["images"]:
            scene = scene_of(index)
            assert image_size(root / f"{part}2017" / image["file_name"]) == (image["width"], image["height"])
            assert image["id"] > 0 and image["file_name"] == f"{image['id']:012d}.jpg"
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [labels[a["category_id"]] for a in own] == scene.labels.tolist()
            assert [a["iscrowd"] == 1 for a in own] == scene.crowd.tolist()
            for annotation, box, mask in zip(own, scene.boxes, scene.masks, strict=True):
                x, y, w, h = annotation["bbox"]
                assert [x, y, x + w, y + h] == box.tolist()
                np.testing.assert_array_equal(decoded(annotation["segmentation"]), mask)
                assert annotation["area"] == mask.sum()
                ids.add(annotation["id"])
            index += 1
    assert index == 40 and len(ids) > 40  # annotation ids are unique over both files


def decoded(segmentation):
    """Uncompressed RLE -> bool [H,W]: runs down the columns, the first one outside the mask."""
    inside = np.arange(len(segmentation["counts"])) % 2 == 1
    return np.repeat(inside, segmentation["counts"]).reshape(segmentation["size"], order="F")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # in pycocotools
def test_pycocotools_reads_the_masks():
    for mask in (np.zeros((4, 5), bool), np.ones((4, 5), bool), np.eye(4, 5, dtype=bool)):
        rle = layouts.run_lengths(mask)
        np.testing.assert_array_equal(decoded(rle), mask)
        np.testing.assert_array_equal(mask_tools.decode(mask_tools.frPyObjects(rle, 4, 5)).astype(bool), mask)


def test_csv(tmp_path):
    root = synthetic.draw_csv(tmp_path, **ARGUMENTS)
    with open(root / "classes.csv", newline="") as file:
        assert list(csv.reader(file)) == [[name, str(label)] for label, name in enumerate(CLASSES)]
    left_out = background = index = 0
    for part, count in (("train", 34), ("val", 6)):
        with open(root / f"{part}.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert all(len(row) == 6 for row in rows)
        paths = list(dict.fromkeys(row[0] for row in rows))
        assert len(paths) == count
        for path in paths:
            scene = scene_of(index)
            assert image_size(root / path) == (96, 80)
            own = [row[1:] for row in rows if row[0] == path]
            annotated = ~(scene.crowd | scene.difficult)
            if annotated.any():
                assert [[int(value) for value in row[:4]] for row in own] == scene.boxes[annotated].tolist()
                assert [row[4] for row in own] == [CLASSES[label] for label in scene.labels[annotated]]
            else:
                assert own == [[""] * 5]
                background += 1
            left_out += (~annotated).sum()
            index += 1
    assert index == 40 and background >= 3 and left_out > 0


def test_imagefolder(tmp_path):
    root = synthetic.draw_imagefolder(tmp_path, images=40, seed=3)
    for part, indices in (("train", range(34)), ("val", range(34, 40))):
        assert sorted(folder.name for folder in (root / part).iterdir()) == sorted(CLASSES)
        for index in indices:
            scene = draw_single_shape(3, index)
            assert len(scene.labels) == 1
            size = image_size(root / part / CLASSES[scene.labels[0]] / f"{index:06d}.jpg")
            assert size == scene.image.shape[1::-1] and 80 <= min(size) <= max(size) <= 128
    assert sum(1 for _ in root.rglob("*.jpg")) == 40


def test_smallest_imagefolder_has_every_class_in_both_splits(tmp_path):
    root = synthetic.draw_imagefolder(tmp_path, images=10, size=(64, 64))
    assert all(len(list((root / part / name).iterdir())) == 1 for part in ("train", "val") for name in CLASSES)


def test_pennfudan(tmp_path):
    root = synthetic.draw_pennfudan(tmp_path, **ARGUMENTS)
    scenes = [scene for scene in map(scene_of, range(60)) if not scene.crowd.any()][:40]
    for number, scene in enumerate(scenes, start=1):
        with Image.open(root / f"PNGImages/Drawn{number:05d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), scene.image)
        with Image.open(root / f"PedMasks/Drawn{number:05d}_mask.png") as image:
            mask = np.asarray(image)
        later = np.zeros(mask.shape, bool)
        for label in range(len(scene.masks), 0, -1):
            np.testing.assert_array_equal(mask == label, scene.masks[label - 1] & ~later)
            later |= scene.masks[label - 1]
        np.testing.assert_array_equal(mask == 0, ~later)
    assert len(list((root / "PNGImages").iterdir())) == len(list((root / "PedMasks").iterdir())) == 40
