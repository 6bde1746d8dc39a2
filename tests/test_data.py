"""The data contract over every layout, through the real parsers, and what holds for every data set of boxes."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import tv_tensors

from data import DataError, check_target, coco, csv_boxes, drawn, open_images, scenes, transforms, voc
from data.boxes import BoxDataset, Paths, Records, clip
from data.classes import agree_on_classes, class_weights, read_labels, read_numbered

IMAGES, SEED = 24, 1


@pytest.fixture(scope="module")
def roots(drawn_voc, tmp_path_factory):
    draw = {"open_images": drawn.draw_open_images, "coco": drawn.draw_coco, "csv": drawn.draw_csv}
    folder = tmp_path_factory.mktemp("drawn")
    return {"voc": drawn_voc} | {name: draw[name](folder / name, images=IMAGES, seed=SEED) for name in draw}


LOAD = {"voc": voc.load, "open_images": open_images.load, "coco": coco.load, "csv": csv_boxes.load}
LAYOUTS = list(LOAD)


def scene_of(dataset, index):
    """The scene behind a picture: its number is the file's name."""
    stem = dataset.paths[index].rsplit("/", 1)[-1].removesuffix(".jpg")
    number = int(stem, 16 if len(stem) == 16 else 10)
    return scenes.draw_scene(SEED, (number - 101) // 3 if dataset.source_ids is not None else number)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parsed_objects_are_those_drawn(roots, layout, split):
    dataset = LOAD[layout]([roots[layout]], split, classes=scenes.CLASSES)
    assert len(dataset) == {"train": 16 if layout == "open_images" else 20, "val": 4}[split]
    for index in range(len(dataset)):
        scene, (image, target) = scene_of(dataset, index), dataset[index]
        check_target(image, target, len(scenes.CLASSES))
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert target["boxes"].canvas_size == target["size"] == tuple(image.shape[-2:]) == scene.image.shape[:2]
        assert target["image_id"] == index
        ignored = scene.crowd | scene.difficult if layout in ("voc", "csv") else scene.crowd
        told = ~ignored if layout == "csv" else np.ones_like(ignored)  # csv has no word for what is to be ignored
        boxes = torch.tensor(scene.boxes[told], dtype=torch.float32).view(-1, 4)
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=1e-3)
        assert target["labels"].tolist() == scene.labels[told].tolist()
        assert target["ignore"].tolist() == ignored[told].tolist()
        assert (image.float() - torch.tensor(scene.image).permute(2, 0, 1)).abs().mean() < 8  # the picture it says


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_contract_holds_after_every_transform(roots, layout):
    dataset, kept, empty = LOAD[layout]([roots[layout]], "train"), 0, 0
    assert dataset.classes == (sorted(scenes.CLASSES) if layout == "open_images" else list(scenes.CLASSES))
    for size, transform in (
        ((48, 64), transforms.ssd_train((48, 64), (123, 117, 104))),
        ((300, 300), transforms.ssd_evaluate((300, 300))),
    ):
        dataset.transform = transform
        for epoch in range(5 if size == (48, 64) else 1):
            for index in range(len(dataset)):
                image, target = dataset[epoch, index]
                check_target(image, target, len(dataset.classes))
                assert tuple(image.shape[-2:]) == target["boxes"].canvas_size == size
                kept, empty = kept + len(target["labels"]), empty + (len(target["labels"]) == 0)
    assert kept > 100
    assert empty > 0


def test_check_target_refuses_what_breaks_the_contract():
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    good = {
        "boxes": torch.tensor([[0.0, 0, 20, 10]]),
        "labels": torch.tensor([1]),
        "ignore": torch.tensor([False]),
        "image_id": 0,
        "size": (10, 20),
    }
    check_target(image, good, 2)
    for wrong in (
        {"boxes": torch.tensor([[0.0, 0, 20.5, 10]])},
        {"boxes": torch.tensor([[-0.5, 0, 20, 10]])},
        {"boxes": torch.tensor([[5.0, 0, 5, 10]])},
        {"boxes": torch.tensor([[0, 0, 20, 10]])},
        {"boxes": torch.zeros(0)},
        {"labels": torch.tensor([2])},
        {"labels": torch.tensor([-1])},
        {"ignore": torch.tensor([0])},
        {"ignore": torch.zeros(2, dtype=torch.bool)},
        {"image_id": torch.tensor(0)},
    ):
        with pytest.raises(AssertionError):
            check_target(image, good | wrong, 2)
    with pytest.raises(AssertionError):
        check_target(image.float(), good, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_roots_are_joined(roots, layout):
    one = LOAD[layout]([roots[layout]], "train")
    two = LOAD[layout]([roots[layout], str(roots[layout])], "train")
    assert len(two) == 2 * len(one)
    assert two.classes == one.classes
    assert two.annotation_file is two.source_ids is two.category_ids is None
    for index in range(len(one)):
        assert two.paths[index] == two.paths[index + len(one)] == one.paths[index]
        assert two.annotation(index)["boxes"].tolist() == two.annotation(index + len(one))["boxes"].tolist()


def test_a_spawned_worker_reads_the_same(roots):
    """Whatever a data set holds must be picklable: not every system can fork."""
    evaluate = transforms.ssd_evaluate((32, 32))
    dataset = ConcatDataset([LOAD[layout]([roots[layout]], "val", transform=evaluate) for layout in LAYOUTS])
    assert len(dataset) == 4 * len(LAYOUTS)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for (image, target), (own_image, own_target) in zip(loader, dataset, strict=True):
        assert (image == own_image).all()
        assert (target["boxes"] == own_target["boxes"]).all() and target["image_id"] == own_target["image_id"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_aspect_ratios(roots, layout):
    dataset = LOAD[layout]([roots[layout]], "train")
    aspects = dataset.aspects()
    assert aspects.dtype == np.float64
    assert aspects.tolist() == [h / w for h, w in (dataset[i][1]["size"] for i in range(len(dataset)))]
    assert len(set(aspects)) > 3


def test_a_picture_that_cannot_be_read_counts_as_square():
    records = records_of([], 2)
    records.sizes[2:] = records.sizes.__class__("i", (0, 0))
    assert BoxDataset(records, ["dog"]).aspects().tolist() == [0.5, 1]


# ---- flat arrays ----


def records_of(objects, images):
    """Records with `images` pictures and (picture, class name, ignore) objects."""
    records = Records()
    for index in range(images):
        records.add_image(f"pictures/{index} ü.jpg", (10, 20))
    for number, (image, name, ignore) in enumerate(objects):
        records.add_object(image, (0, 0, 1 + number, 5), name, ignore)
    return records


OBJECTS = [(3, "cat", False), (0, "dog", False), (3, "dog", True), (1, "dog", False), (3, "emu", False)]


def test_objects_in_any_order_reach_their_picture():
    dataset = BoxDataset(records_of(OBJECTS, 5), ["dog", "cat"])
    found = [dataset.annotation(index) for index in range(5)]
    assert [target["labels"].tolist() for target in found] == [[0], [0], [], [1, 0], []]
    assert [target["ignore"].tolist() for target in found] == [[False], [False], [], [False, True], []]
    assert found[3]["boxes"].tolist() == [[0, 0, 1, 5], [0, 0, 3, 5]]
    assert found[2]["boxes"].shape == (0, 4)
    assert found[2]["size"] == (10, 20)
    assert dataset.paths[4] == "pictures/4 ü.jpg"
    assert dataset.unknown == {"emu": 1}
    assert dataset.class_counts().tolist() == [2, 1]  # what is ignored does not count
    assert dataset.summary().splitlines() == [
        "images 5, background 2 (40 %), boxes 4 (1 to ignore)",
        "  dog 2, cat 1",
    ]


def test_clipping():
    assert list(clip((-5, 2.5, 30, 8), (10, 20))) == [0, 2.5, 20, 8]
    for nothing in ((20, 0, 30, 8), (-9, 0, 0, 8), (3, 10, 5, 12), (5, 2, 5 + 1e-7, 8), (5, 2, 4, 8)):
        assert clip(nothing, (10, 20)) is None, nothing


def test_without_pictures():
    dataset = BoxDataset(records_of(OBJECTS, 5), ["dog", "cat"], relative=True, transform=len, seed=3)
    assert dataset.without([0]).source_ids is None
    dataset.source_ids = np.array([9, 7, 5, 3, 1])
    less = dataset.without([0, 2])
    assert [less.paths[index] for index in range(len(less))] == [f"pictures/{i} ü.jpg" for i in (1, 3, 4)]
    assert [less.annotation(index)["labels"].tolist() for index in range(3)] == [[0], [1, 0], []]
    assert less.annotation(1)["boxes"].tolist() == dataset.annotation(3)["boxes"].tolist()
    assert less.annotation(1)["ignore"].tolist() == [False, True]
    assert less.source_ids.tolist() == [7, 3, 1]
    assert (less.relative, less.transform, less.seed, less.unknown) == (True, len, 3, {"emu": 1})
    assert len(dataset) == 5 and len(dataset.without(range(5))) == 0


def test_annotations_lie_in_flat_arrays():
    """No Python object a box or a picture: their reference counts would copy memory into every worker."""
    dataset = BoxDataset(records_of([(i % 1000, "cat", False) for i in range(5000)], 1000), ["cat"])
    values = {**vars(dataset), **vars(dataset.paths)}
    allowed = (np.ndarray, Paths, bool, int, type(None))
    assert {name for name, value in values.items() if not isinstance(value, allowed)} == {"classes", "unknown"}
    assert len(dataset.classes) + len(dataset.unknown) == 1
    assert all(value.dtype != object for value in values.values() if isinstance(value, np.ndarray))
    assert sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray)) < 5000 * 24 + 1000 * 50


def test_balance_weights():
    objects = [(0, "dog", False), (0, "dog", False), (1, "dog", False), (2, "dog", False), (2, "cat", False)]
    weights = BoxDataset(records_of([*objects, (3, "cat", True)], 5), ["dog", "cat"]).balance_weights()
    # dogs in 3 pictures, cats in 1: weights 1/3, 1/3, 1; without an object that counts: the median, 1/3
    np.testing.assert_allclose(weights * weights.size, np.array([1, 1, 3, 1, 1]) * 5 / 7)
    empty = BoxDataset(records_of([], 4), ["dog"]).balance_weights()
    np.testing.assert_allclose(empty, 0.25)


def test_balance_weights_even_out_classes():
    dataset = BoxDataset(
        records_of([(i, "rare" if i < 5 else "usual", False) for i in range(100)], 100), ["rare", "usual"]
    )
    assert dataset.balance_weights()[:5].sum() == pytest.approx(0.5)


# ---- class names ----


def test_labels_file(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes(b"\xef\xbb\xbfBACKGROUND\r\n\r\nteddy bear \r\ncat\r\n\r\n")
    assert read_labels(file) == ["teddy bear", "cat"]
    for content, reason in (
        ("cat\ndog\ncat\n", "named twice: cat"),
        ("\nBACKGROUND\n", "no class name"),
        (b"caf\xe9\n", "not UTF-8"),
    ):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=reason):
            read_labels(file)


def test_numbered_classes(tmp_path):
    file = tmp_path / "classes.csv"
    file.write_bytes(b'\xef\xbb\xbfteddy bear, 2\r\n\r\n"cat, big",0\r\ndog,1\r\n')
    assert read_numbered(file) == ["cat, big", "dog", "teddy bear"]
    for content, reason in (
        ("name,id\ncat,0\n", "line 1: 'name,id' is not name,id with a whole number as id; a header"),
        ("cat,0\ndog\n", "line 2: 'dog' is not name,id"),
        ("cat,0\ndog,-1\n", "line 2: 'dog,-1' is not"),
        ("cat,0\n\ncat,1\n", "line 3: class 'cat' comes twice"),
        ("cat,1\ndog,2\n", "ids are 1, 2: number the 2 classes from 0 to 1, each once"),
        ("cat,0\ndog,0\n", "ids are 0, 0: "),
        ("\n", "holds no class"),
        ("x" * 200_000, "not valid csv"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=reason):
            read_numbered(file)


def test_class_names_must_agree_with_a_checkpoint():
    assert agree_on_classes(["a", "b"], ["a", "b"], False) == ["a", "b"]
    assert agree_on_classes(["a", "b"], ["b", "c"], False) == ["a", "b"]
    assert agree_on_classes(["a", "b"], ["b", "a"], True) == ["a", "b"]
    with pytest.raises(DataError, match=r"\(a, b\).*\(b, a\).*--remap-by-name"):
        agree_on_classes(["a", "b"], ["b", "a"], False)
    with pytest.raises(DataError, match="no class in common"):
        agree_on_classes(["a"], ["b"], True)


def test_class_weights():
    assert class_weights("", ["a", "b"]) is None
    assert class_weights("b = 2.5", ["a", "b"]) == [1, 1, 2.5]
    for text in ("c=1", "a", "a=x", "a=nan", "a=-1", "a=1,,"):
        with pytest.raises(DataError, match="write NAME=NUMBER; names: a, b"):
            class_weights(text, ["a", "b"])


def test_fullest_pictures_come_first_and_come_again(drawn_voc):
    dataset = voc.load([drawn_voc], "train")
    counts = [len(dataset.annotation(i)["labels"]) for i in range(len(dataset))]
    chosen = dataset.fullest(len(dataset) + 2).tolist()
    assert sorted(chosen[:-2]) == list(range(len(dataset)))
    assert [counts[i] for i in chosen[:-2]] == sorted(counts, reverse=True)
    assert chosen[-2:] == chosen[:2]
