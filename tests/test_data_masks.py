"""Masks: run lengths, COCO's segmentations, and every transform and loader that carries them."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from data import DataError, check_target, coco, drawn, loader, scene_files, scenes, transforms
from data.detection import load
from ops import run_lengths

SIZE = (60, 90)
RECTANGLES = [[10, 20, 60, 90], [50, 33, 157, 71], [3, 3, 40, 119]]


def picture(boxes, size=(120, 160)):
    """A picture of rectangles, whose masks are their boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
        "ignore": torch.zeros(len(boxes), dtype=torch.bool),
        "masks": tv_tensors.Mask(masks),
        "image_id": 3,
        "size": size,
    }
    return tv_tensors.Image(torch.randint(0, 255, (3, *size), dtype=torch.uint8)), target


def coco_set(folder, *segmentations):
    """A COCO folder of one picture of SIZE, and an object of this segmentation each; without any for None."""
    rows = [{"id": i, "image_id": 5, "category_id": 1, "bbox": [9, 9, 20, 20]} for i in range(len(segmentations))]
    for row, segmentation in zip(rows, segmentations):
        row |= {} if segmentation is None else {"segmentation": segmentation}
    image = {"id": 5, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    content = {"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "cup"}]}
    for path in (folder / "annotations", folder / "train2017"):
        path.mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(folder / "train2017/a.png")
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return folder


# ---- run lengths ----


def test_masks_come_back_from_run_lengths():
    masks = (
        torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0)) < torch.tensor([0, 0.3, 0.9, 1])[:, None, None]
    )
    again = run_lengths.decode(run_lengths.encode(masks), SIZE)
    assert again.dtype == torch.uint8 and again.is_contiguous()
    torch.testing.assert_close(again, masks.to(torch.uint8), rtol=0, atol=0)
    assert run_lengths.encode(masks[:0]) == [] and run_lengths.decode([], SIZE).shape == (0, *SIZE)


def test_all_forms_of_a_segmentation_are_one_mask():
    polygons = [[10.0, 5, 70, 8.5, 60.5, 50, 12, 40], [70, 40, 88, 40, 88, 58]]
    expected = coco_masks.merge(coco_masks.frPyObjects(polygons, *SIZE))
    pixels = coco_masks.decode(expected).astype(bool)
    plain = {"size": list(SIZE), "counts": scene_files.run_lengths(pixels)["counts"]}
    packed = {"size": list(SIZE), "counts": expected["counts"].decode()}
    for form in (polygons, plain, packed):
        assert run_lengths.from_coco(form, SIZE) == expected["counts"]
        assert run_lengths.from_coco(run_lengths.compact(form), SIZE) == expected["counts"]


def test_compressed_runs_of_any_mask_are_whole():
    """Long runs and steps down and up: numbers of several characters, and negative ones."""
    random = np.random.default_rng(0)
    for share in (0, 0.0005, 0.01, 0.5, 1):
        for size in ((1, 1), (300, 500), (7, 2000)):
            runs = run_lengths.encode(torch.from_numpy(random.random((1, *size)) < share))[0]
            assert run_lengths.from_coco({"size": list(size), "counts": runs.decode()}, size) == runs


FAULTS = {
    "no segmentation": None,
    "no segmentation: expected": [],
    "three or more x, y": [[1, 1, 9, 9]],
    "no list of three": [[1, 1, 9, 9, 4, 4, 5]],
    "corner that is no number": [[1, 1, 9, "9", 4, 4]],
    "corner that is no": [[1, 1, 9, float("nan"), 4, 4]],
    "far off the picture": [[1, 1, 9, 1e9, 4, 4]],
    r"of h, w \[90, 60\], the picture of \[60, 90\]": {"size": [90, 60], "counts": [5400]},
    "of h, w None": {"counts": [5400]},
    "holds no counts": {"size": [60, 90]},
    "whole number from 0": {"size": [60, 90], "counts": [-1, 5401]},
    "covers 5399 pixels of 5400": {"size": [60, 90], "counts": [5000, 399]},
    "covers 5 pixels": {"size": [60, 90], "counts": "5"},  # pycocotools takes this one and fills it with old memory
    "covers -1 pixels": {"size": [60, 90], "counts": "zzP"},
    "covers -1 pixels of": {"size": [60, 90], "counts": "é"},
    "covers -1 pixels of 5400": {"size": [60, 90], "counts": ""},
    "-1 pixels of 5400": {"size": [60, 90], "counts": "oooooooooooo0"},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_faults_of_a_segmentation(reason, tmp_path):
    root = coco_set(tmp_path / "set", [[10, 10, 20, 10, 20, 20]], FAULTS[reason])
    with pytest.raises(DataError, match=f"instances_train2017.json: annotation 1: cup: .*{reason}"):
        coco.load([root], "train", masks=True)
    faults = []
    dataset = coco.load([root], "train", masks=True, faults=faults)
    assert [fault.kind for fault in faults] == ["box"] and len(dataset.labels) == len(dataset.masks) == 1
    assert coco.load([root], "train").masks is None  # and nobody minds where masks are not asked for


# ---- data sets ----


def test_real_masks_are_as_pycocotools_reads_them(shared, capsys):
    dataset = coco.load([shared / "data/coco_tiny"], "val", masks=True)
    truth, crowds = COCO(dataset.annotation_file), 0
    for index in range(len(dataset)):
        image, target = dataset[index]
        check_target(image, target, 80)
        assert isinstance(target["masks"], tv_tensors.Mask)
        items = truth.loadAnns(truth.getAnnIds(int(dataset.source_ids[index])))
        expected = np.array([truth.annToMask(item) for item in items]).reshape(-1, *target["size"])
        np.testing.assert_array_equal(target["masks"].numpy(), expected)
        assert target["ignore"].tolist() == [bool(item["iscrowd"]) for item in items]
        crowds += sum(target["ignore"].tolist())
    assert crowds > 5


def test_drawn_masks_and_boxes_of_coco(tmp_path):
    root = drawn.draw_coco(tmp_path, images=9, seed=3, size=(96, 80))
    train, val, faults = load("coco", [root], masks=True)
    assert not faults and len(train) == 8 and len(val) == 1
    for index in range(len(train)):
        target, scene = train[index][1], scenes.draw_scene(3, index, (96, 80))
        np.testing.assert_array_equal(target["masks"].numpy().astype(bool), scene.masks)
        boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=0)
    assert [len(target["masks"]) for target in map(train.annotation, range(8))].count(0) == 1  # the empty picture


def test_masks_stay_run_lengths_until_a_picture_is_loaded(tmp_path):
    dataset = coco.load([drawn.draw_coco(tmp_path, images=12, seed=1, size=(96, 80))], "train", masks=True)
    before = vars(dataset.masks).copy()
    assert {type(value) for value in before.values()} == {np.ndarray}  # no Python object an object
    assert len(dataset.masks.content) < 200 * len(dataset.labels)
    dataset[0], dataset[1]
    assert vars(dataset.masks) == before
    target = dataset.annotation(0)
    assert target["masks"][0].keys() == {"size", "counts"} and target["masks"][0]["size"] == [80, 96]


def test_less_pictures_keep_their_masks(tmp_path):
    whole = coco.load([drawn.draw_coco(tmp_path, images=12, seed=1, size=(96, 80))], "train", masks=True)
    less = whole.without([0, 3])
    some = whole.subset(4, seed=5)
    assert len(less) == len(whole) - 2 and len(some) == 4
    paths = [whole.paths[index] for index in range(len(whole))]
    for part in (less, some):
        places = [paths.index(part.paths[index]) for index in range(len(part))]
        assert places == sorted(places)  # in the order of the whole
        for index, place in enumerate(places):
            assert part.annotation(index)["masks"] == whole.annotation(place)["masks"]
            torch.testing.assert_close(part[index][1]["masks"], whole[place][1]["masks"], rtol=0, atol=0)
            assert part.source_ids[index] == whole.source_ids[place]
    others = {tuple(whole.subset(4, seed).source_ids.tolist()) for seed in range(5, 9)}
    assert len(others) > 1 and tuple(some.source_ids.tolist()) in others
    assert whole.subset(99, seed=5) is whole


# ---- transforms ----

PYRAMID = {
    "larger": transforms.pyramid_evaluate(203, 999),
    "smaller": transforms.pyramid_evaluate(47, 999),
    "longest side": transforms.pyramid_evaluate(300, 111),
    "train": transforms.pyramid_train((61, 97, 173), 201, flip=0.5, colour=0.5),
    "ssd resize": transforms.ssd_evaluate((77, 133)),
}
TRANSFORMS = PYRAMID | {
    "crop": transforms.ZoomOrCrop((90, 90), zoom_out=0),
    "zoom out": transforms.ZoomOrCrop((300, 280), zoom_out=1, iou_crop=0),
    "ssd train": transforms.ssd_train((111, 90), (123, 117, 104)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_moved_mask_fills_its_moved_box(name):
    """The box of a rectangle's mask is within a pixel of the moved box, on every side, and full."""
    kept = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = TRANSFORMS[name](*picture(RECTANGLES))
        check_target(image, target, 3)
        assert isinstance(target["masks"], tv_tensors.Mask)
        for mask, box in zip(target["masks"], torch.Tensor(target["boxes"])):
            kept += 1
            if mask.any():
                found = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                assert (found - box).abs().max() <= 1, (seed, found, box)
                assert mask.sum() == (found[2:] - found[:2]).prod()
            else:
                assert (box[2:] - box[:2]).min() < 2, (seed, box)
    assert kept > 60


@pytest.mark.parametrize("name", PYRAMID)
def test_a_picture_of_nothing_keeps_no_mask(name):
    image, target = PYRAMID[name](*picture([]))
    assert target["masks"].shape == (0, *image.shape[-2:])


def test_resized_edges_stay_within_half_a_pixel():
    """v2's nearest neighbour moves the edges of a mask by up to a pixel, always to one side."""
    for side in range(30, 200, 7):
        _, target = transforms.pyramid_evaluate(side, 999)(*picture(RECTANGLES))
        found = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        assert (found - torch.Tensor(target["boxes"])).abs().max() <= 0.5 + 1e-3


def test_masks_flip_with_their_boxes():
    image, target = picture(RECTANGLES)
    flipped_image, flipped = transforms.HorizontalFlip(1.0)(image, target)
    torch.testing.assert_close(
        flipped["masks"].as_subclass(torch.Tensor), target["masks"].as_subclass(torch.Tensor).flip(2)
    )
    _, again = transforms.HorizontalFlip(1.0)(flipped_image, flipped)
    torch.testing.assert_close(again["masks"], target["masks"], rtol=0, atol=0)


def test_masks_are_left_out_with_their_objects():
    """A sliver thinner than `thinnest` goes; the mask of the next object does not become that of the one before."""
    image, target = picture([[10, 20, 60, 90], [50, 33, 51, 71], [3, 3, 40, 119]])
    _, small = transforms.ResizeSides((60,), 999, thinnest=0.9)(image, target)
    assert small["labels"].tolist() == [0, 2] and len(small["masks"]) == 2
    centers = [mask.nonzero().float().mean(0).flip(0) for mask in small["masks"]]
    boxes = torch.Tensor(small["boxes"])
    torch.testing.assert_close(torch.stack(centers), (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5, rtol=0, atol=0.5)
    kept = transforms.keep_objects(target, torch.tensor([False, True, False]))
    torch.testing.assert_close(kept["masks"], target["masks"][1:2], rtol=0, atol=0)


# ---- loaders ----


def test_padding_leaves_masks_as_they_are():
    samples = [picture(RECTANGLES), picture([], (90, 200)), picture(RECTANGLES[:1], (128, 97))]
    images, targets = loader.PadCollate(32)(samples)
    assert images.shape == (3, 3, 128, 224)
    for (_, before), target in zip(samples, targets):
        assert type(target["masks"]) is torch.Tensor and target["masks"].shape[-2:] == target["shape"]
        torch.testing.assert_close(target["masks"], before["masks"].as_subclass(torch.Tensor), rtol=0, atol=0)


def test_masks_travel_as_bits():
    batch = loader.PadCollate(32)([picture(RECTANGLES, (121, 163)), picture([], (90, 200))])[1]
    message = pickle.dumps(batch)
    assert len(message) < batch[0]["masks"].nbytes / 8 + 2000
    for again, target in zip(pickle.loads(message), batch):
        torch.testing.assert_close(again["masks"], target["masks"], rtol=0, atol=0)


def test_workers_change_no_mask(tmp_path):
    dataset = coco.load([drawn.draw_coco(tmp_path, images=10, seed=1, size=(96, 80))], "train", masks=True, seed=4)
    dataset.transform = transforms.pyramid_train((64, 80, 96), 160)
    seen = []
    for workers in (0, 2):
        sampler = loader.StepSampler(len(dataset), 2, 6, seed=0)
        batches = loader.train_loader(dataset, sampler, workers, collate=loader.PadCollate(32))
        seen.append([target["masks"] for _, targets in batches for target in targets])
    assert len(seen[0]) == 12 and sum(map(len, seen[0])) > 12
    for alone, sent in zip(*seen, strict=True):
        torch.testing.assert_close(alone, sent, rtol=0, atol=0)
