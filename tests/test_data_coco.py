"""COCO folders: real photos as pycocotools reads them, and every fault of a file in one pass."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data import DataError, check_target, coco, detection

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "emu"}]


def picture(number, **changes):
    return {"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 20} | changes


def annotation(number, image, category=2, box=(5, 5, 10, 10), **changes):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0} | changes


def coco_root(root, images, annotations, categories=CATEGORIES, name="train2017", folder="{}", pictures=None):
    """A set of 40 x 20 pictures."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for item in images if pictures is None else pictures:
        path = root / folder.format(name) / item["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(path)
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


def read(root, **options):
    faults = []
    return coco.load([root], "train", faults=faults, **options), faults


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_photos_are_as_pycocotools_reads_them(shared, split):
    root = shared / "data/coco_tiny"
    dataset = coco.load([root], split)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset.annotation_file)
    assert dataset.annotation_file == str(root / f"annotations/instances_{split}2017.json")
    assert len(dataset) == 80 and dataset.source_ids.dtype == np.int64
    assert sorted(dataset.source_ids.tolist()) == sorted(truth.getImgIds())
    assert dataset.category_ids == sorted(truth.getCatIds()) != list(range(1, 81))
    assert dataset.classes == [truth.cats[number]["name"] for number in dataset.category_ids]
    crowds = 0
    for index in range(80):
        image, target = dataset[index]
        check_target(image, target, 80)
        number = int(dataset.source_ids[index])
        assert dataset.paths[index].endswith(truth.imgs[number]["file_name"])
        items = truth.loadAnns(truth.getAnnIds(number))
        assert [dataset.category_ids[label] for label in target["labels"]] == [item["category_id"] for item in items]
        assert target["ignore"].tolist() == [bool(item["iscrowd"]) for item in items]
        boxes = np.array([item["bbox"] for item in items]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(target["boxes"].numpy(), boxes, atol=0.02)  # some go 0.01 over the border
        crowds += int(target["ignore"].sum())
    assert crowds == {"train": 6, "val": 11}[split]


def test_labels_follow_the_ids_and_lead_back_to_them(tmp_path):
    images = [picture(50), picture(10), picture(30)]
    items = [annotation(1, 30, 90), annotation(2, 50, 7, iscrowd=1), annotation(3, 30, 2, (0, 0, 40.01, 99))]
    dataset, faults = read(coco_root(tmp_path, images, items))
    assert not faults
    assert (dataset.classes, dataset.category_ids) == (["cat", "dog", "emu"], [2, 7, 90])
    assert dataset.source_ids.tolist() == [50, 10, 30]
    targets = [dataset[index][1] for index in range(3)]
    assert [target["labels"].tolist() for target in targets] == [[1], [], [2, 0]]  # 10 is background and stays
    assert [target["ignore"].tolist() for target in targets] == [[True], [], [False, False]]
    assert targets[2]["boxes"].tolist() == [[5, 5, 15, 15], [0, 0, 40, 20]]
    assert targets[0]["size"] == (20, 40)
    less = dataset.without([1])
    assert (less.source_ids.tolist(), less.category_ids) == ([50, 30], [2, 7, 90])
    assert less.annotation_file == dataset.annotation_file == str(tmp_path / "annotations/instances_train2017.json")


def test_other_classes_are_mapped_by_name(tmp_path):
    root = coco_root(tmp_path, [picture(1)], [annotation(1, 1, 7), annotation(2, 1, 2), annotation(3, 1, 90)])
    dataset, faults = read(root, classes=["emu", "gnu", "cat"])
    assert not faults
    assert (dataset.category_ids, dataset.unknown) == ([90, -1, 2], {"dog": 1})
    assert dataset.annotation(0)["labels"].tolist() == [2, 0]


def test_several_roots(tmp_path):
    """Ids of two files may clash: nothing leads back to them."""
    one = coco_root(tmp_path / "one", [picture(1)], [annotation(1, 1, 7)])
    two = coco_root(tmp_path / "two", [picture(1)], [annotation(1, 1, 2)], [{"id": 2, "name": "gnu"}])
    dataset = coco.load([one, two], "train")
    assert sorted(dataset.classes) == ["cat", "dog", "emu", "gnu"]
    found = [[dataset.classes[label] for label in dataset.annotation(i)["labels"]] for i in range(2)]
    assert found == [["dog"], ["gnu"]]
    assert dataset.annotation_file is dataset.source_ids is dataset.category_ids is None


@pytest.mark.parametrize("folder", ["{}", "images/{}", "images"])
def test_folders_of_pictures_and_names_of_sets(tmp_path, folder):
    images = [picture(1), picture(2, file_name="night/2.jpg"), picture(3, file_name="./3.jpg")]
    root = coco_root(tmp_path, images, [], folder=folder, name="mine")
    coco_root(tmp_path, images[:1], [], folder=folder, name="yours")
    train, val, faults = detection.load("coco", [root], coco_sets=("mine", "yours"))
    assert not faults
    assert (len(train), len(val)) == (3, 1)
    assert train[1][0].shape == (3, 20, 40)
    assert train.paths[2] == str(root / folder.format("mine") / "3.jpg")


BAD_ITEMS = [  # what one annotation may have wrong, and what is said of it
    (annotation(11, 1, box=(5, 5, 0, 10)), "annotation 11: cat has no area: x 5, y 5, width 0, height 10"),
    (annotation(12, 1, box=(5, 5, 3, -1)), "annotation 12: cat has no area: x 5, y 5, width 3, height -1"),
    (annotation(13, 1, box=(5, float("nan"), 3, 3)), "annotation 13: cat has no area: x 5, y nan, width 3, height 3"),
    (annotation(14, 1, box=(5, 5, float("inf"), 3)), "annotation 14: cat has no area: x 5, y 5, width inf, height 3"),
    (annotation(15, 1, box=(41, 5, 9, 3)), "annotation 15: cat 41,5 to 50,8 outside 40 x 20"),
    (annotation(16, 1, box=(5, 5, 9)), "annotation 16: cat: bbox [5, 5, 9] is not four numbers"),
    (annotation(17, 1, box=(5, 5, "9", 9)), "annotation 17: cat: bbox [5, 5, '9', 9] is not four numbers"),
    (annotation(18, 1, bbox=None), "annotation 18: cat: bbox None is not four numbers"),
    (annotation(19, 1, 3), "annotation 19: unknown category_id 3"),
    (annotation(20, 1, [2]), "annotation 20: unknown category_id [2]"),
    (annotation(21, 999), "annotation 21: unknown image_id 999"),
    ({"id": 22, "image_id": 1}, "annotation 22: lacks category_id, bbox"),
    ({"image_id": 1, "bbox": [1, 1, 1, 1]}, "annotation number 13: lacks category_id"),
    (annotation(24, 1, box=(10**400, 5, 9, 9)), "annotation 24: int too large to convert to float"),
]


def test_all_faults_in_one_pass(tmp_path):
    images = [
        picture(1),
        picture(1, file_name="1b.jpg"),
        picture(3, width=0),
        picture(4, height=None),
        {"file_name": "5.jpg", "width": 40, "height": 20},
        picture("six"),
        *(picture(number) for number in range(100, 130)),
        picture(7),
    ]
    items = [item for item, _ in BAD_ITEMS]
    items += [annotation(30, 100), annotation(31, 3), annotation(32, 7), annotation(33, 1)]
    root = coco_root(tmp_path, images, items, pictures=[picture(1), picture(7)])
    dataset, faults = read(root)
    file = root / "annotations/instances_train2017.json"
    assert [str(fault) for fault in faults] == [
        f"{file}: image 1: id comes twice: 1b.jpg",
        f"{file}: image 3: width 0 and height 20 are no size of a picture",
        f"{file}: image 4: lacks height",
        f"{file}: image number 5: lacks id",
        f"{file}: image number 6: id 'six' is no whole number",
        f"{file}: image 100: no picture in {root / 'train2017'} for 100.jpg, 101.jpg, 102.jpg and 27 more",
        *(f"{file}: {line}" for _, line in BAD_ITEMS),
    ]
    assert [fault.kind for fault in faults] == ["image"] * 6 + ["box"] * len(BAD_ITEMS)
    assert dataset.source_ids.tolist() == [1, 7]  # those of pictures that are left out cost nothing more
    assert [len(dataset.annotation(index)["labels"]) for index in range(2)] == [1, 1]
    with pytest.raises(DataError, match="image 1: id comes twice"):
        coco.load([root], "train")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON: "),
        ("[]", "has no list of images, no list of annotations, no list of categories; give an instances file"),
        (
            '{"images": [], "categories": []}',
            "has no list of annotations; give an instances file .those of COCO's test",
        ),
        ('{"images": [1], "annotations": [], "categories": []}', "images: holds something else than objects"),
        ('{"images": [], "annotations": [], "categories": []}', "categories: is empty"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}',
            "no whole number as id or no name",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a "}]}',
            "categories: id 2 or name 'a' comes twice",
        ),
    ],
)
def test_files_that_are_no_coco_file(tmp_path, content, reason):
    root = coco_root(tmp_path, [picture(1)], [])
    (root / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        coco.load([root], "train")
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_coco_set(tmp_path):
    with pytest.raises(DataError, match=r"no instances_train2017\.json; found: no json; name the sets by --coco-train"):
        coco.load([tmp_path], "train")
    root = coco_root(tmp_path, [], [])
    with pytest.raises(DataError, match=r"no instances_val2017\.json; found: instances_train2017\.json"):
        coco.load([root], "val")
    with pytest.raises(DataError, match=r"no folder of pictures: expected one of .*/train2017, .*/images/train2017, "):
        coco.load([root], "train")
