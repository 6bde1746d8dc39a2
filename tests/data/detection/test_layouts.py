"""All 2D layouts: the same scenes come out of each, and every target meets the data contract."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import tv_tensors

import synthetic
from data import DataError, check_target, detection, transforms
from data.detection import LAYOUTS
from data.detection.dataset import BoxDataset
from synthetic.shapes import drawing

IMAGES, SEED = 24, 1


@pytest.fixture(scope="module")
def roots(drawn_voc, tmp_path_factory):
    draw = {"open_images": synthetic.draw_open_images, "coco": synthetic.draw_coco, "csv": synthetic.draw_csv}
    folder = tmp_path_factory.mktemp("drawn")
    return {"voc": drawn_voc} | {name: draw[name](folder / name, images=IMAGES, seed=SEED) for name in draw}


def read(layout, roots, split="train", **options):
    return BoxDataset(LAYOUTS[layout](roots, split), **options)


def scene_of(dataset, index):
    """The scene of an image: the file's name is its number."""
    stem = dataset.paths[index].rsplit("/", 1)[-1].removesuffix(".jpg")
    number = int(stem, 16 if len(stem) == 16 else 10)
    return drawing.draw_shapes(SEED, (number - 101) // 3 if dataset.image_ids is not None else number)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_are_those_that_were_drawn(roots, layout, split):
    dataset = read(layout, [roots[layout]], split, classes=drawing.CLASSES)
    assert len(dataset) == {"train": 16 if layout == "open_images" else 20, "val": 4}[split]
    for index in range(len(dataset)):
        scene, (image, target) = scene_of(dataset, index), dataset[index]
        check_target(image, target, len(drawing.CLASSES))
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert target["boxes"].canvas_size == target["size"] == tuple(image.shape[-2:]) == scene.image.shape[:2]
        assert target["image_id"] == index
        ignored = scene.crowd | scene.difficult if layout in ("voc", "csv") else scene.crowd
        written = ~ignored if layout == "csv" else np.ones_like(ignored)  # csv cannot mark objects to ignore
        boxes = torch.tensor(scene.boxes[written], dtype=torch.float32).view(-1, 4)
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=1e-3)
        assert target["labels"].tolist() == scene.labels[written].tolist()
        assert target["ignore"].tolist() == ignored[written].tolist()
        assert (image.float() - torch.tensor(scene.image).permute(2, 0, 1)).abs().mean() < 8  # JPEG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_contract_holds_after_every_transform(roots, layout):
    dataset, objects, empty = read(layout, [roots[layout]]), 0, 0
    assert dataset.classes == (sorted(drawing.CLASSES) if layout == "open_images" else list(drawing.CLASSES))
    for size, epochs, transform in (
        ((48, 64), 5, transforms.ssd_train((48, 64), (123, 117, 104))),
        ((300, 300), 1, transforms.ssd_eval((300, 300))),
    ):
        dataset.transform = transform
        for epoch in range(epochs):
            for index in range(len(dataset)):
                image, target = dataset[epoch, index]
                check_target(image, target, len(dataset.classes))
                assert tuple(image.shape[-2:]) == target["boxes"].canvas_size == size
                objects, empty = objects + len(target["labels"]), empty + (len(target["labels"]) == 0)
    assert objects > 100
    assert empty > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_roots_are_joined(roots, layout):
    one = read(layout, [roots[layout]])
    two = read(layout, [roots[layout], str(roots[layout])])
    assert len(two) == 2 * len(one)
    assert two.classes == one.classes
    assert two.image_ids is two.category_ids is None
    for index in range(len(one)):
        assert two.paths[index] == two.paths[index + len(one)] == one.paths[index]
        assert two.annotation(index)["boxes"].tolist() == two.annotation(index + len(one))["boxes"].tolist()


@pytest.mark.slow
def test_a_spawned_worker_reads_the_same(roots):
    """A data set must be picklable: not every system can fork."""
    resize = transforms.ssd_eval((32, 32))
    dataset = ConcatDataset([read(layout, [roots[layout]], "val", transform=resize) for layout in LAYOUTS])
    assert len(dataset) == 4 * len(LAYOUTS)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for (image, target), (own_image, own_target) in zip(loader, dataset, strict=True):
        assert (image == own_image).all()
        assert (target["boxes"] == own_target["boxes"]).all() and target["image_id"] == own_target["image_id"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_aspect_ratios(roots, layout):
    dataset = read(layout, [roots[layout]])
    aspects = dataset.aspects()
    assert aspects.dtype == np.float64
    assert aspects.tolist() == [h / w for h, w in (dataset[i][1]["size"] for i in range(len(dataset)))]
    assert len(set(aspects)) > 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_of_transformed_images(roots, layout):
    """Known without reading the images; Open Images has no sizes, so their headers are read."""
    dataset = read(layout, [roots[layout]], transform=transforms.multiscale_eval(50, 70))
    indices = range(1, len(dataset), 2)
    shapes = dataset.shapes(indices)
    assert shapes == [tuple(dataset[i][0].shape[-2:]) for i in indices]
    assert len(set(shapes)) > 3


def test_the_classes_of_a_checkpoint_apply(drawn_voc):
    order = ["star", "ring", "disc", "square", "triangle"]
    with pytest.raises(DataError, match="--remap-by-name"):
        detection.load("voc", [drawn_voc], classes=order)
    own = detection.load("voc", [drawn_voc])[0]
    train, val, errors = detection.load("voc", [drawn_voc], classes=order, remap_by_name=True)
    assert (train.classes, val.classes, errors) == (order, order, [])
    for index in range(len(train)):
        names = [[data.classes[label] for label in data.annotation(index)["labels"]] for data in (own, train)]
        assert names[0] == names[1]


def test_a_missing_folder():
    with pytest.raises(DataError, match=r"^nowhere: no such folder; give --data the folder of the data set$"):
        detection.load("voc", ["nowhere"])


def sample_paths(dataset):
    return [dataset.paths[index] for index in range(len(dataset))]


@pytest.mark.parametrize(
    ("layout", "split", "available"),
    [
        ("voc", "train", "available: test.txt, train.txt, trainval.txt, val.txt"),
        ("open_images", "train", "available: "),
        ("coco", "train2017", "available: instances_train2017.json, instances_val2017.json"),
        ("csv", "train.csv", "available: .*train.csv, .*val.csv"),
    ],
)
def test_a_validation_set_alone_and_any_split(roots, tmp_path, layout, split, available):
    root = roots[layout]
    train, val, _ = detection.load(layout, [root])
    first, second, errors = detection.load(layout, [root], val_only=True)
    assert first is second and not errors
    assert (sample_paths(first), first.classes) == (sample_paths(val), val.classes)
    chosen, _, _ = detection.load(layout, [root], val_only=True, split=split)
    if layout == "voc":  # train.txt is a part of the trainval.txt that training reads
        assert set(sample_paths(chosen)) < set(sample_paths(train))
    else:
        assert sample_paths(chosen) == sample_paths(train)
    with pytest.raises(DataError, match=rf"nowhere.*{available}"):
        detection.load(layout, [root], val_only=True, split="nowhere")


def test_the_validation_set_alone_has_the_classes_of_the_checkpoint(roots):
    names = [*drawing.CLASSES[:2], "moon"]
    val, _, _ = detection.load("voc", [roots["voc"]], classes=names, val_only=True)
    assert val.classes == names and set(val.unknown) == set(drawing.CLASSES[2:])
    with pytest.raises(DataError, match="no class in common"):
        detection.load("voc", [roots["voc"]], classes=["moon"], val_only=True)
    reversed_names = list(drawing.CLASSES)[::-1]
    with pytest.raises(DataError, match="another order"):
        detection.load("csv", [roots["csv"]], classes=reversed_names, val_only=True)
    files = ("", str(roots["csv"] / "val.csv"), "")  # without classes.csv, the data have no order
    assert (
        detection.load("csv", [], classes=reversed_names, val_only=True, csv_files=files)[0].classes == reversed_names
    )
