"""COCO folders: images as pycocotools reads them, and every error of a file in one pass."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import masks_to_boxes

import synthetic
from data import DataError, check_target, detection
from data.detection import coco
from data.detection.dataset import BoxDataset
from synthetic.shapes import drawing

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "emu"}]


def image_item(number, **changes):
    return {"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 20} | changes


def annotation(number, image, category=2, box=(5, 5, 10, 10), **changes):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0} | changes


def coco_root(root, images, annotations, categories=CATEGORIES, name="train2017", folder="{}", files=None):
    """A data set of 40 x 20 images; `files` are those that exist, by default all."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for item in images if files is None else files:
        path = root / folder.format(name) / item["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(path)
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


def read(root, classes=None, **options):
    annotations = coco.read([root], "train", **options)
    return BoxDataset(annotations, classes), annotations.errors


def assert_as_pycocotools_reads_it(root, split):
    """Ids, paths, boxes, masks and crowds of a data set are those that pycocotools finds; returns the data set."""
    annotations = coco.read([root], split, masks=True)
    assert not annotations.errors
    dataset, truth = BoxDataset(annotations), COCO(str(root / f"annotations/instances_{split}2017.json"))
    assert dataset.image_ids.dtype == np.int64
    assert sorted(dataset.image_ids.tolist()) == sorted(truth.getImgIds())
    assert dataset.category_ids.tolist() == sorted(truth.getCatIds())
    assert dataset.classes == [truth.cats[number]["name"] for number in dataset.category_ids.tolist()]
    for index in range(len(dataset)):
        image, target = dataset[index]
        check_target(image, target, len(dataset.classes))
        number = int(dataset.image_ids[index])
        assert dataset.paths[index].endswith(truth.imgs[number]["file_name"])
        items = truth.loadAnns(truth.getAnnIds(number))
        assert dataset.category_ids[target["labels"].numpy()].tolist() == [item["category_id"] for item in items]
        assert target["ignore"].tolist() == [bool(item["iscrowd"]) for item in items]
        boxes = np.array([item["bbox"] for item in items]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(target["boxes"].numpy(), boxes, atol=0.02)  # some are 0.01 outside of the image
        masks = np.array([truth.annToMask(item) for item in items]).reshape(-1, *target["size"])
        np.testing.assert_array_equal(target["masks"].numpy(), masks)
    return dataset


@pytest.mark.realdata
@pytest.mark.parametrize(("split", "crowds"), [("train", 6), ("val", 11)])
def test_photos_are_as_pycocotools_reads_them(shared, split, crowds):
    dataset = assert_as_pycocotools_reads_it(shared / "data/coco_tiny", split)
    assert len(dataset) == 80 and int(dataset.ignore.sum()) == crowds
    assert dataset.category_ids.tolist() != list(range(1, 81))  # COCO's ids have gaps


def test_synthetic_images_are_as_pycocotools_reads_them(tmp_path):
    root = synthetic.draw_coco(tmp_path, images=24, seed=1, size=(96, 80))
    dataset = assert_as_pycocotools_reads_it(root, "train")
    assert len(dataset) == 20 and dataset.ignore.any() and dataset.category_ids.tolist() == [1, 3, 7, 10, 18]
    for index in range(len(dataset)):
        target, scene = dataset[index][1], drawing.draw_shapes(1, index, (96, 80))
        np.testing.assert_array_equal(target["masks"].numpy().astype(bool), scene.masks)
        if len(scene.masks):
            boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
            torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=0)
    assert (np.diff(dataset.offsets) == 0).sum() == 2  # background images


def test_labels_are_in_the_order_of_the_ids(tmp_path):
    images = [image_item(50), image_item(10), image_item(30)]
    items = [annotation(1, 30, 90), annotation(2, 50, 7, iscrowd=1), annotation(3, 30, 2, (0, 0, 40.01, 99))]
    dataset, errors = read(coco_root(tmp_path, images, items))
    assert not errors
    assert (dataset.classes, dataset.category_ids.tolist()) == (["cat", "dog", "emu"], [2, 7, 90])
    assert dataset.image_ids.tolist() == [50, 10, 30]
    targets = [dataset[index][1] for index in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[1], [], [2, 0]]  # 10 is background
    assert [target["ignore"].tolist() for target in targets] == [[True], [], [False, False]]
    assert targets[2]["boxes"].tolist() == [[5, 5, 15, 15], [0, 0, 40, 20]]
    assert targets[0]["size"] == (20, 40)


def test_the_truth_for_the_official_score_has_the_numbers_of_the_file(tmp_path):
    """Boxes as they are in the file, not clipped; areas as they are, or of the box where a file has none."""
    images = [image_item(50), image_item(10), image_item(30)]
    items = [annotation(1, 30, 90, area=33.25), annotation(2, 50, 7, iscrowd=1), annotation(3, 30, 2, (-1, 0, 50, 9))]
    dataset, _ = read(coco_root(tmp_path, images, items))
    truth = dataset.coco_truth()
    assert (truth.image_ids.tolist(), truth.category_ids.tolist()) == ([50, 10, 30], [2, 7, 90])
    columns = {name: values.tolist() for name, values in truth.annotations.items()}
    assert columns.pop("bbox") == [[5, 5, 10, 10], [5, 5, 10, 10], [-1, 0, 50, 9]]
    expected = {"image_id": [50, 30, 30], "category_id": [7, 90, 2], "iscrowd": [1, 0, 0], "area": [100, 33.25, 450]}
    assert columns == expected
    part = dataset.without([0]).coco_truth()
    assert part.image_ids.tolist() == [10, 30] and part.annotations["area"].tolist() == [33.25, 450]


def test_the_truth_has_masks(tmp_path):
    outline = [[5, 5, 15, 5, 15, 15, 5, 15]]
    root = coco_root(tmp_path, [image_item(4)], [annotation(1, 4, segmentation=outline)])
    columns = read(root, masks=True)[0].coco_truth().annotations
    truth = COCO(str(root / "annotations/instances_train2017.json"))
    assert columns["counts"].tolist() == [truth.annToRLE(truth.anns[1])["counts"]]
    assert (columns["height"].tolist(), columns["width"].tolist()) == ([20], [40])


def test_other_classes_are_mapped_by_name(tmp_path):
    items = [annotation(1, 1, 7), annotation(2, 1, 2), annotation(3, 1, 90)]
    dataset, errors = read(coco_root(tmp_path, [image_item(1)], items), classes=["emu", "gnu", "cat"])
    assert not errors
    assert (dataset.category_ids.tolist(), dataset.unknown) == ([90, -1, 2], {"dog": 1})
    assert dataset.annotation(0)["labels"].tolist() == [2, 0]


def test_the_file_is_parsed_once(tmp_path, monkeypatch):
    """Also with the classes of a checkpoint, which differ from those of the file."""
    root = coco_root(tmp_path, [image_item(1)], [annotation(1, 1)])
    coco_root(tmp_path, [image_item(1)], [annotation(1, 1)], name="val2017")
    parsed, loads = [], json.loads
    monkeypatch.setattr(coco.json, "loads", lambda text, **options: parsed.append(text) or loads(text, **options))
    val = detection.load("coco", [root], classes=["emu", "cat"])[1]
    assert len(parsed) == 2 and val.coco_truth().category_ids.tolist() == [90, 2]


def test_several_roots(tmp_path):
    """The ids of two files may clash: they are not kept."""
    one = coco_root(tmp_path / "one", [image_item(1)], [annotation(1, 1, 7)])
    two = coco_root(tmp_path / "two", [image_item(1)], [annotation(1, 1, 2)], [{"id": 2, "name": "gnu"}])
    dataset = BoxDataset(coco.read([one, two], "train"))
    assert dataset.classes == ["gnu", "cat", "dog", "emu"]
    labels = [[dataset.classes[label] for label in dataset.annotation(i)["labels"]] for i in range(2)]
    assert labels == [["dog"], ["gnu"]]
    assert dataset.image_ids is dataset.category_ids is dataset.coco_truth() is None


@pytest.mark.parametrize("folder", ["{}", "images/{}", "images"])
def test_image_folders_and_names_of_sets(tmp_path, folder):
    images = [image_item(1), image_item(2, file_name="night/2.jpg"), image_item(3, file_name="./3.jpg")]
    root = coco_root(tmp_path, images, [], folder=folder, name="mine")
    coco_root(tmp_path, images[:1], [], folder=folder, name="yours")
    train, val, errors = detection.load("coco", [root], coco_sets=("mine", "yours"))
    assert not errors
    assert (len(train), len(val)) == (3, 1)
    assert train[1][0].shape == (3, 20, 40)
    assert train.paths[2] == str(root / folder.format("mine") / "3.jpg")


BAD_ITEMS = [  # what one annotation may have wrong, and the message
    (annotation(11, 1, box=(5, 5, 0, 10)), "annotation 11: cat has no area: x 5, y 5, width 0, height 10"),
    (annotation(12, 1, box=(5, 5, 3, -1)), "annotation 12: cat has no area: x 5, y 5, width 3, height -1"),
    (annotation(13, 1, box=(5, float("nan"), 3, 3)), "annotation 13: cat has no area: x 5, y nan, width 3, height 3"),
    (annotation(14, 1, box=(5, 5, float("inf"), 3)), "annotation 14: cat has no area: x 5, y 5, width inf, height 3"),
    (annotation(15, 1, box=(41, 5, 9, 3)), "annotation 15: cat 41,5 to 50,8 is outside of the image (40 x 20)"),
    (annotation(16, 1, box=(5, 5, 9)), "annotation 16: cat: bbox [5, 5, 9] is not four numbers"),
    (annotation(17, 1, box=(5, 5, "9", 9)), "annotation 17: cat: bbox [5, 5, '9', 9] is not four numbers"),
    (annotation(18, 1, bbox=None), "annotation 18: cat: bbox None is not four numbers"),
    (annotation(19, 1, 3), "annotation 19: unknown category_id 3"),
    (annotation(20, 1, [2]), "annotation 20: unknown category_id [2]"),
    (annotation(21, 999), "annotation 21: unknown image_id 999"),
    ({"id": 22, "image_id": 1}, "annotation 22: without category_id, bbox"),
    ({"image_id": 1, "bbox": [1, 1, 1, 1]}, "annotation number 13: without category_id"),
    (annotation(24, 1, box=(10**400, 5, 9, 9)), "annotation 24: int too large to convert to float"),
]


def test_all_errors_in_one_pass(tmp_path):
    images = [
        image_item(1),
        image_item(1, file_name="1b.jpg"),
        image_item(3, width=0),
        image_item(4, height=None),
        {"file_name": "5.jpg", "width": 40, "height": 20},
        image_item("six"),
        *(image_item(number) for number in range(100, 130)),
        image_item(7),
    ]
    items = [item for item, _ in BAD_ITEMS]
    items += [annotation(30, 100), annotation(31, 3), annotation(32, 7), annotation(33, 1)]
    root = coco_root(tmp_path, images, items, files=[image_item(1), image_item(7)])
    dataset, errors = read(root)
    file = root / "annotations/instances_train2017.json"
    assert [str(error) for error in errors] == [
        f"{file}: image 1: id is repeated: 1b.jpg",
        f"{file}: image 3: width 0 and height 20 are not the size of an image",
        f"{file}: image 4: without height",
        f"{file}: image number 5: without id",
        f"{file}: image number 6: id 'six' is not an integer",
        f"{file}: image 100: no image in {root / 'train2017'} for 100.jpg, 101.jpg, 102.jpg and 27 more",
        *(f"{file}: {line}" for _, line in BAD_ITEMS),
    ]
    assert [error.kind for error in errors] == ["image"] * 6 + ["box"] * len(BAD_ITEMS)
    assert dataset.image_ids.tolist() == [1, 7]  # annotations of images that are left out are not errors
    assert [len(dataset.annotation(index)["labels"]) for index in range(2)] == [1, 1]


@pytest.mark.parametrize("segmentation", [None, [[1, 1, 9, 9, 4, 4, 5]], {"size": [20, 40], "counts": "5"}])
def test_an_invalid_segmentation_is_an_error_if_masks_are_read(tmp_path, segmentation):
    """The messages are those of ops.rle.from_coco."""
    items = [annotation(1, 1, segmentation=[[10, 5, 20, 5, 20, 15]]), annotation(2, 1, segmentation=segmentation)]
    root = coco_root(tmp_path, [image_item(1)], items)
    dataset, errors = read(root, masks=True)
    assert [(error.kind, error.place) for error in errors] == [("box", "annotation 2")]
    assert errors[0].reason.startswith("cat: ")
    assert len(dataset.labels) == len(dataset.masks) == 1
    dataset, errors = read(root)
    assert not errors and dataset.masks is None and len(dataset.labels) == 2


CATEGORY = '{"images": [], "annotations": [], "categories": [%s]}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON: "),
        ("[]", "has no list of images, no list of annotations, no list of categories; give an instances file"),
        ('{"images": [], "categories": []}', "has no list of annotations; give an instances file .those of COCO's"),
        ('{"images": [1], "annotations": [], "categories": []}', "images: not a list of JSON objects"),
        (CATEGORY % "", "categories: is empty"),
        (CATEGORY % '{"id": "1", "name": "a"}', "no integer id or no name"),
        (CATEGORY % '{"id": 1, "name": " "}', "no integer id or no name"),
        (
            CATEGORY % '{"id": 1, "name": "a"}, {"id": 2, "name": "a "}',
            "categories: id 2 or name 'a' is repeated; keep one of each",
        ),
    ],
)
def test_files_that_are_not_coco_files(tmp_path, content, reason):
    root = coco_root(tmp_path, [image_item(1)], [])
    (root / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        coco.read([root], "train")
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_coco_data_sets(tmp_path):
    with pytest.raises(DataError, match=r"no instances_train2017\.json; available: none; .* --coco-train"):
        coco.read([tmp_path], "train")
    root = coco_root(tmp_path, [], [])
    with pytest.raises(DataError, match=r"no instances_val2017\.json; available: instances_train2017\.json"):
        coco.read([root], "val")
    with pytest.raises(DataError, match=r"no folder of images; expected one of .*/train2017, .*/images/train2017, "):
        coco.read([root], "train")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (image_item(2, height=10**6, width=10**6), "are not the size of an image"),
        (image_item(2, file_name="../../1.jpg"), "no image in"),
        (image_item(2, file_name="/etc/passwd"), "no image in"),
    ],
)
def test_images_too_large_to_be_read_and_outside_the_folder(tmp_path, item, reason):
    root = coco_root(tmp_path, [image_item(1), item], [annotation(1, 1)], files=[image_item(1)])
    dataset, errors = read(root)
    assert len(dataset) == 1 and reason in str(errors[0])


def test_numbers_beyond_float64(tmp_path):
    """The area of a box of whole numbers was too large for an array."""
    boxes = [(5, 5, 10, 10), (0, 0, 10**200, 10**200), (0, 0, 10**400, 1)]
    objects = [annotation(number, 1, box=box) for number, box in enumerate(boxes)]
    dataset, errors = read(coco_root(tmp_path, [image_item(1)], objects))
    assert len(dataset.labels) == 2 and "too large" in str(errors[0])


def test_deeply_nested_json(tmp_path):
    root = coco_root(tmp_path, [image_item(1)], [annotation(1, 1)])
    (root / "annotations/instances_train2017.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"not valid JSON: .*recursion"):
        read(root)


def test_class_names_with_control_characters(tmp_path):
    categories = [{"id": 1, "name": "a\x1b[2J"}]
    coco_root(tmp_path, [image_item(1)], [annotation(1, 1, category=1)], categories)
    coco_root(tmp_path, [image_item(1)], [annotation(1, 1, category=1)], categories, name="val2017")
    with pytest.raises(DataError, match="has a control character; rename the class"):
        detection.load("coco", [tmp_path])
