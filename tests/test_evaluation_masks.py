"""COCOEvaluator's numbers for masks against pycocotools run by hand, on drawn and real truth, and its promises."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import coco, drawn, pennfudan
from evaluation import score_truth
from evaluation.coco import MASK_MEASURES, MEASURES, COCOEvaluator
from ops import run_lengths

CLASSES = ["apple", "pear", "plum", "fig"]
SIZE = (150, 200)


def ellipses(boxes, size=SIZE):
    """bool [M,h,w]: the ellipse in each box."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    centers, radii = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across = (columns - centers[:, 0, None, None]) / radii[:, 0, None, None]
    down = (rows - centers[:, 1, None, None]) / radii[:, 1, None, None]
    return torch.from_numpy(across**2 + down**2 <= 1)


def target(boxes, labels, ignore=None, image_id=0, size=SIZE):
    ignore = torch.tensor(ignore or [False] * len(labels), dtype=torch.bool)
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    one = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "ignore": ignore}
    return one | {"image_id": image_id, "size": size, "masks": ellipses(boxes, size)}


def noisy(truth, random, classes, spread=0.08):
    """Each object found about twice, box and mask moved a little, sometimes by another name, with scores of few levels;
    the truth's masks are pixels or run lengths."""
    size, masks = truth["size"], truth["masks"]
    if isinstance(masks, list):
        masks = run_lengths.decode([one["counts"] for one in masks], size)
    count = 2 * len(masks)
    masks = masks.repeat(2, 1, 1).bool()
    boxes = truth["boxes"].repeat(2, 1)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + spread * sides * torch.randn(boxes.shape, generator=random)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    steps = (spread * sides[:, :2] * torch.randn(count, 2, generator=random)).int().tolist()
    masks = [mask.roll(step, (1, 0)) for mask, step in zip(masks, steps)]
    masks = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    labels, other = truth["labels"].repeat(2), torch.randint(classes, (count,), generator=random)
    labels = torch.where(torch.rand(count, generator=random) < 0.85, labels, other)
    kept = torch.rand(count, generator=random) < 0.7
    scores = torch.randint(1, 20, (count,), generator=random) / 20
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept], "masks": masks[kept]}


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(random):
    """30 pictures with ellipses from 10 to 130 pixels, a fifth of them crowds, the last class in none."""
    targets = []
    for image_id in torch.randperm(30, generator=random).tolist():
        corner = 60 * torch.rand(image_id % 6, 2, generator=random)
        boxes = torch.cat([corner, corner + 10 + 80 * torch.rand(corner.shape, generator=random)], 1)
        labels = torch.randint(3, (len(boxes),), generator=random).tolist()
        crowd = (torch.rand(len(boxes), generator=random) < 0.2).tolist()
        targets.append(target(boxes.tolist(), labels, crowd, image_id))
    return targets, [noisy(truth, random, 4) for truth in targets]


def by_hand(truth, results, kind="segm", images=None):
    """pycocotools' twelve numbers: truth a json's path or its content, results a file that COCOEvaluator wrote."""
    with contextlib.redirect_stdout(io.StringIO()):
        goal = COCO(None if isinstance(truth, dict) else truth)
        if isinstance(truth, dict):
            goal.dataset = truth
            goal.createIndex()
        scorer = COCOeval(goal, goal.loadRes(str(results)), kind)
        if images is not None:
            scorer.params.imgIds = images
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def evaluate(targets, detections, classes=CLASSES, **settings):
    evaluator = COCOEvaluator(classes, masks=True, **settings)
    for i in range(0, len(targets), 7):
        evaluator.update(targets[i : i + 7], detections[i : i + 7])
    return evaluator, evaluator.compute()


def as_json(targets):
    """COCO's content of the same truth, category ids from 1, areas those of the masks."""
    rows = []
    for one in targets:
        runs = coco_masks.encode(np.asfortranarray(one["masks"].permute(1, 2, 0).numpy().astype(np.uint8)))
        for box, label, crowd, mask in zip(one["boxes"].double(), one["labels"].tolist(), one["ignore"].tolist(), runs):
            x1, y1, x2, y2 = box.tolist()
            row = {"id": len(rows) + 1, "image_id": one["image_id"], "category_id": label + 1, "iscrowd": int(crowd)}
            row |= {"area": int(coco_masks.area(mask)), "segmentation": {**mask, "counts": mask["counts"].decode()}}
            rows.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    images = [{"id": one["image_id"], "height": one["size"][0], "width": one["size"][1]} for one in targets]
    return {"info": {}, "images": images, "categories": categories, "annotations": rows}


def assert_as_by_hand(metrics, truth, results, images=None):
    """Both kinds of numbers equal pycocotools' with the files that were written."""
    masks = results.with_stem(results.stem + "_masks")
    boxes = by_hand(truth, results, "bbox", images)
    assert [metrics[name] for name in MEASURES] == pytest.approx(boxes, abs=1e-12)
    assert [metrics[name] for name in MASK_MEASURES] == pytest.approx(by_hand(truth, masks, "segm", images), abs=1e-12)
    assert metrics["mask AP"] != metrics["AP"]


def test_twelve_numbers_equal_pycocotools_by_hand(case, tmp_path):
    evaluator, metrics = evaluate(*case)
    evaluator.write(tmp_path / "run/detections.json")
    assert list(metrics) == [*MEASURES, *MASK_MEASURES] and MASK_MEASURES[1] == "mask AP50"
    assert_as_by_hand(metrics, as_json(case[0]), tmp_path / "run/detections.json")
    assert 0.1 < metrics["mask AP"] < metrics["mask AP50"] < 0.95
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["detections.json", "detections_masks.json"]


def test_truth_may_come_from_its_file(case, tmp_path):
    path = tmp_path / "truth.json"
    content = as_json(case[0])
    path.write_text(json.dumps(content))
    told = {"annotation_file": path, "image_ids": np.arange(30), "category_ids": [1, 2, 3, 4]}
    targets = [{name: value for name, value in one.items() if name != "masks"} for one in case[0]]  # not asked for
    some = [index for index, one in enumerate(targets) if one["image_id"] < 20]
    evaluator, metrics = evaluate([targets[i] for i in some], [case[1][i] for i in some], **told)
    evaluator.write(tmp_path / "detections.json")
    assert_as_by_hand(metrics, str(path), tmp_path / "detections.json", list(range(20)))
    assert metrics == pytest.approx(evaluate([case[0][i] for i in some], [case[1][i] for i in some])[1], abs=1e-12)


def test_real_truth_from_its_file(shared, random, tmp_path):
    val_set = coco.load([shared / "data/coco_tiny"], "val", masks=True)
    about = (val_set.annotation_file, val_set.source_ids, val_set.category_ids)
    evaluator = COCOEvaluator(val_set.classes, *about, masks=True)
    for index in range(len(val_set)):
        truth = val_set.annotation(index)
        evaluator.update([truth], [noisy(truth, random, len(val_set.classes))])
    metrics = evaluator.compute()
    evaluator.write(tmp_path / "detections.json")
    assert_as_by_hand(metrics, val_set.annotation_file, tmp_path / "detections.json")
    assert 0.05 < metrics["mask AP"] < 0.9


def test_truth_scored_as_predictions_gives_one(shared, tmp_path):
    val_set = coco.load([shared / "data/coco_tiny"], "val", masks=True)
    about = (val_set.annotation_file, val_set.source_ids, val_set.category_ids)
    people = pennfudan.load([shared / "data/PennFudanPed"])
    shapes = coco.load([drawn.draw_coco(tmp_path, images=20, seed=2, size=(96, 80))], "train", masks=True)
    for dataset, told in ((val_set, about), (val_set, ()), (people, ()), (shapes, ())):
        metrics = score_truth(COCOEvaluator(dataset.classes, *told, masks=True), dataset)
        assert [metrics[name] for name in (*MEASURES[:3], *MASK_MEASURES[:3])] == pytest.approx([1] * 6)
    assert "mask AP" not in score_truth(COCOEvaluator(people.classes), people)


def test_two_processes_equal_one(case):
    targets, detections = case
    metrics = evaluate(targets, detections)[1]
    others, parts = [], [COCOEvaluator(CLASSES, masks=True), COCOEvaluator(CLASSES, masks=True)]
    parts[0].update(targets[1::2], detections[1::2])
    parts[1].update(targets[0::2] + targets[1:2], detections[0::2] + detections[1:2])  # one picture in both
    parts[1].compute(lambda mine: others.append(mine) or [mine])
    assert parts[0].compute(lambda mine: [mine, *others]) == metrics


def test_all_forms_of_a_mask_count_alike(case):
    """Pixels as bool or numbers, tensor or array, run lengths as bytes or text."""
    targets, detections = case
    metrics = evaluate(targets, detections)[1]

    def runs(masks, read=bytes):
        return [{"size": list(SIZE), "counts": read(one)} for one in run_lengths.encode(masks)]

    for form in (
        runs,
        lambda masks: runs(masks, bytes.decode),
        torch.Tensor.numpy,
        lambda masks: masks.to(torch.uint8),
    ):
        assert evaluate(targets, [one | {"masks": form(one["masks"])} for one in detections])[1] == metrics
        assert evaluate([one | {"masks": form(one["masks"])} for one in targets], detections)[1] == metrics


def test_what_is_kept_of_a_mask_is_small():
    evaluator = COCOEvaluator(CLASSES, masks=True)
    kept = []
    truth = target([[20, 20, 140, 120]] * 50, [0] * 50)
    found = {name: truth[name] for name in ("boxes", "labels", "masks")} | {"scores": torch.ones(50)}
    evaluator.update([truth], [found])
    evaluator.compute(lambda mine: kept.append(mine) or [mine])
    sizes = [len(mask) for mask in kept[0]["found_masks"]]
    assert len(sizes) == 50 and max(sizes) < 400 < SIZE[0] * SIZE[1] / 50  # bytes, of 30,000 pixels


def test_a_mask_decides_apart_from_its_box():
    """The right box around a mask of the left half: a box AP of 1, and a mask found up to an IoU of one half."""
    truth = target([[20, 20, 120, 100]], [1])
    found = {name: truth[name] for name in ("boxes", "labels")} | {"scores": torch.tensor([0.9])}
    half = truth["masks"].clone()
    half[:, :, 76:] = False  # 56 of 100 columns stay
    metrics = evaluate([truth], [found | {"masks": half}])[1]
    overlap = float(half.sum() / truth["masks"].sum())
    assert 0.55 < overlap < 0.6
    assert (metrics["AP"], metrics["mask AP50"], metrics["mask AP75"]) == pytest.approx((1, 1, 0))
    assert metrics["mask AP"] == pytest.approx(0.2)  # found at 0.5 and 0.55 of ten


def test_crowds_are_neither_missed_nor_wrong():
    goal = target([[10, 10, 50, 50], [80, 40, 180, 140]], [0, 0], [False, True])
    found = target([[100, 60, 140, 110], [90, 60, 120, 90], [10, 10, 50, 50]], [0, 0, 0])
    found = {name: found[name] for name in ("boxes", "labels", "masks")} | {"scores": torch.tensor([0.9, 0.8, 0.7])}
    assert evaluate([goal], [found])[1]["mask AP"] == pytest.approx(1)


def test_areas_are_those_of_the_masks():
    """A ring of 40 x 40 pixels is a medium box, and as a mask a small object."""
    truth = target([[50, 50, 90, 90]], [0])
    truth["masks"] = truth["masks"] & ~ellipses([[55, 55, 85, 85]])
    found = {name: truth[name] for name in ("boxes", "labels", "masks")} | {"scores": torch.tensor([0.9])}
    metrics = evaluate([truth], [found])[1]
    assert (metrics["mask AP_small"], metrics["mask AP_medium"]) == pytest.approx((1, -1))


def test_no_detections_no_objects_no_pictures(tmp_path):
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    for masks in (torch.zeros(0, *SIZE, dtype=torch.bool), []):
        evaluator, metrics = evaluate([target([[10, 10, 50, 50]], [1])], [none | {"masks": masks}])
        assert metrics["mask AP"] == metrics["mask AP50"] == metrics["AP"] == 0.0
        evaluator.write(tmp_path / "none.json")
        assert json.loads((tmp_path / "none_masks.json").read_text()) == []
        assert set(evaluate([target([], [])], [none | {"masks": masks}])[1].values()) == {-1.0}
    assert set(evaluate([], [])[1].values()) == {-1.0}


def test_an_object_without_a_valid_outline_counts_among_boxes_alone(case, tmp_path):
    content, path = as_json(case[0]), tmp_path / "truth.json"
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    del content["annotations"][3]["segmentation"]
    path.write_text(json.dumps(content))
    told = {"annotation_file": path, "image_ids": np.arange(30), "category_ids": [1, 2, 3, 4]}
    evaluator, metrics = evaluate(*case, **told)
    evaluator.write(tmp_path / "detections.json")
    whole = content | {"annotations": [*content["annotations"][1:3], *content["annotations"][4:]]}
    expected = by_hand(whole, tmp_path / "detections_masks.json")
    assert [metrics[name] for name in MASK_MEASURES] == pytest.approx(expected, abs=1e-12)


def test_mistakes_of_the_caller():
    truth = target([[10, 10, 50, 50]], [1])
    found = {name: truth[name] for name in ("boxes", "labels")} | {"scores": torch.tensor([0.9])}
    for masks in (truth["masks"][:, 1:], [{"size": [149, 200], "counts": b"0"}]):
        with pytest.raises(ValueError, match=r"masks of h, w \(149, 200\), but the file has \(150, 200\)"):
            evaluate([truth], [found | {"masks": masks}])
    with pytest.raises(ValueError, match="found fields differ in length"):
        evaluate([truth], [found | {"masks": truth["masks"][:0]}])
    with pytest.raises(KeyError, match="masks"):
        evaluate([truth], [found])


def test_nothing_is_printed(case, capsys):
    evaluate(*case)
    assert capsys.readouterr().out == ""
