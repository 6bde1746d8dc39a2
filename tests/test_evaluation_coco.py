"""COCOEvaluator's numbers against pycocotools run by hand, on drawn and real truth, and its promises."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import coco
from evaluation import score_truth
from evaluation.coco import MEASURES, COCOEvaluator, read_truth

CLASSES = ["apple", "pear", "plum", "fig"]


def target(boxes, labels, ignore=None, image_id=0):
    ignore = torch.tensor(ignore or [False] * len(labels), dtype=torch.bool)
    boxes, labels = torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "ignore": ignore, "image_id": image_id}


def detection(boxes, labels, scores):
    one = target(boxes, labels)
    return {"boxes": one["boxes"], "labels": one["labels"], "scores": torch.tensor(scores, dtype=torch.float32)}


def noisy(truth, random, classes, spread=0.08):
    """Each box found about twice, moved a little, sometimes by another name, with scores of few levels."""
    boxes = truth["boxes"].repeat(2, 1)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + spread * sides * torch.randn(boxes.shape, generator=random)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels, other = truth["labels"].repeat(2), torch.randint(classes, (len(boxes),), generator=random)
    labels = torch.where(torch.rand(len(boxes), generator=random) < 0.85, labels, other)
    kept = torch.rand(len(boxes), generator=random) < 0.7
    scores = torch.randint(1, 20, (len(boxes),), generator=random) / 20
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(random):
    """40 pictures with boxes from 10 to 200 pixels, a fifth of them crowds, the last class in none, and detections."""
    targets = []
    for image_id in torch.randperm(40, generator=random).tolist():
        corner = 400 * torch.rand(image_id % 6, 2, generator=random)
        boxes = torch.cat([corner, corner + 10 + 190 * torch.rand(corner.shape, generator=random)], 1)
        labels = torch.randint(3, (len(boxes),), generator=random)
        crowd = torch.rand(len(boxes), generator=random) < 0.2
        targets.append({"boxes": boxes, "labels": labels, "ignore": crowd, "image_id": image_id})
    return targets, [noisy(truth, random, 4) for truth in targets]


def by_hand(truth, results, images=None):
    """pycocotools' twelve numbers: truth a json's path or its content, results a file that COCOEvaluator wrote."""
    with contextlib.redirect_stdout(io.StringIO()):
        goal = COCO(None if isinstance(truth, dict) else truth)
        if isinstance(truth, dict):
            goal.dataset = truth
            goal.createIndex()
        scorer = COCOeval(goal, goal.loadRes(str(results)), "bbox")
        if images is not None:
            scorer.params.imgIds = images
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def evaluate(targets, detections, **settings):
    evaluator = COCOEvaluator(CLASSES, **settings)
    for i in range(0, len(targets), 7):
        evaluator.update(targets[i : i + 7], detections[i : i + 7])
    return evaluator, evaluator.compute()


def as_json(targets):
    """COCO's content of the same truth, category ids from 1."""
    rows = []
    for one in targets:
        for box, label, crowd in zip(
            one["boxes"].double(), one["labels"].tolist(), one["ignore"].tolist(), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            row = {"id": len(rows) + 1, "image_id": one["image_id"], "category_id": label + 1, "iscrowd": int(crowd)}
            rows.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    images = [{"id": one["image_id"]} for one in targets]
    return {"info": {}, "images": images, "categories": categories, "annotations": rows}


def test_twelve_numbers_equal_pycocotools_by_hand(case, tmp_path):
    evaluator, metrics = evaluate(*case)
    evaluator.write(tmp_path / "run/detections.json")
    expected = by_hand(as_json(case[0]), tmp_path / "run/detections.json")
    assert list(metrics) == list(MEASURES) and len(MEASURES) == 12
    assert list(metrics.values()) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < metrics["AP"] < metrics["AP50"] < 0.95
    assert metrics["AR_1"] < metrics["AR_100"]
    assert len({round(value, 6) for value in metrics.values()}) >= 9  # no number in another's place
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["detections.json"]


def test_real_truth_from_its_file(shared, random, tmp_path):
    val_set = coco.load([shared / "data/coco_tiny"], "val")
    about = (val_set.annotation_file, val_set.source_ids, val_set.category_ids)
    evaluator = COCOEvaluator(val_set.classes, *about)
    for index in range(len(val_set)):
        truth = val_set.annotation(index)
        evaluator.update([truth], [noisy(truth, random, len(val_set.classes))])
    metrics = evaluator.compute()
    evaluator.write(tmp_path / "detections.json")
    expected = by_hand(val_set.annotation_file, tmp_path / "detections.json")
    assert list(metrics.values()) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < metrics["AP"] < 0.9
    truth = score_truth(COCOEvaluator(val_set.classes, *about), val_set)
    assert [truth[name] for name in MEASURES[:6]] == pytest.approx([1] * 6)
    assert score_truth(COCOEvaluator(val_set.classes), val_set)["AP"] == pytest.approx(
        1
    )  # truth as the data set has it


def test_only_pictures_seen_count(case, tmp_path):
    path = tmp_path / "truth.json"
    content = as_json(case[0])
    for row in content["annotations"]:
        row["image_id"] = 500 - 3 * row["image_id"]
    content["images"] = [{"id": 500 - 3 * i} for i in range(40)]
    path.write_text(json.dumps(content))
    told = {"annotation_file": path, "image_ids": 500 - 3 * np.arange(40), "category_ids": [1, 2, 3, 4]}
    some = (list(part) for part in zip(*[pair for pair in zip(*case) if pair[0]["image_id"] < 25]))
    evaluator, metrics = evaluate(*some, **told)
    evaluator.write(tmp_path / "detections.json")
    seen = [500 - 3 * i for i in range(25)]
    assert list(metrics.values()) == pytest.approx(by_hand(str(path), tmp_path / "detections.json", seen), abs=1e-12)
    assert metrics["AP"] != evaluate(*case, **told)[1]["AP"]


def test_labels_become_the_files_categories(tmp_path):
    """Other ids, another order, a class that the file lacks, and no iscrowd and area."""
    rows = [{"id": 0, "image_id": 9, "category_id": 70, "bbox": [10, 10, 40, 40]}]
    rows.append({"id": 1, "image_id": 9, "category_id": 7, "bbox": [60, 60, 30, 30]})
    (tmp_path / "truth.json").write_text(json.dumps({"images": [{"id": 9}], "annotations": rows}))
    told = {"annotation_file": tmp_path / "truth.json", "image_ids": [4, 9], "category_ids": [70, 7, -1, 8]}
    found = detection([[10, 10, 50, 50], [60, 60, 90, 90], [1, 1, 5, 5]], [0, 1, 2], [0.5, 0.75, 1.0])
    evaluator, metrics = evaluate([target([], [], image_id=1)], [found], **told)
    assert (metrics["AP"], metrics["AP_medium"], metrics["AP_large"]) == pytest.approx((1, 1, -1))
    evaluator.write(tmp_path / "detections.json")
    assert json.loads((tmp_path / "detections.json").read_text()) == [
        {"image_id": 9, "category_id": 70, "bbox": [10, 10, 40, 40], "score": 0.5},
        {"image_id": 9, "category_id": 7, "bbox": [60, 60, 30, 30], "score": 0.75},
    ]


def test_truth_is_tolerant_where_the_loader_is(tmp_path):
    """Rows that data.coco reports and drops are no truth either, so truth scored as predictions stays 1.0."""
    ids = {"image_id": 9, "category_id": 3}
    rows = [
        {**ids, "bbox": [10, 10, 40, 40], "iscrowd": None, "area": None},
        {**ids, "bbox": [60, 30, 30, 40], "area": 10**400},
    ]
    boxes = [[5, 5, 0, 9], [5, 5, 9, -1], [99, 5, 9, 9], [95 - 2e-6, 5, 1e-6, 9], [5, 5, 9], [5, 5, None, 9]]
    boxes += [[5, float("nan"), 9, 9], [10**400, 5, 9, 9], None, 7]
    rows += [{**ids, "bbox": box} for box in boxes]
    whole = {"bbox": [1, 1, 9, 9]}
    rows += [ids, {"image_id": 9, **whole}, {**ids, "category_id": None, **whole}, {**ids, "image_id": [9], **whole}]
    for folder in ("annotations", "train2017"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (99, 80)).save(tmp_path / "train2017/9.jpg")
    images = [{"id": 9, "file_name": "9.jpg", "width": 99, "height": 80}, {"id": None}, {"id": 8, "height": None}]
    content = {"images": images, "annotations": rows, "categories": [{"id": 3, "name": "fig"}]}
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    faults = []
    dataset = coco.load([tmp_path], "train", faults=faults)
    assert len([fault for fault in faults if fault.kind == "box"]) == len(rows) - 2
    assert read_truth(str(path), 0)["area"].tolist() == [1600, 1200]
    assert not len(read_truth(str(path), 0, masks=True)["counts"])  # none has an outline
    told = (dataset.annotation_file, dataset.source_ids, dataset.category_ids)
    metrics = score_truth(COCOEvaluator(dataset.classes, *told), dataset)
    assert (metrics["AP"], metrics["AR_100"]) == pytest.approx((1, 1))


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "truth.json"
    told = {"annotation_file": path, "image_ids": [9], "category_ids": [1, 2, 3, 4]}
    for when, box, expected in ((1, [10, 10, 40, 40], 1.0), (2, [10, 10, 10, 40], 0.0)):
        path.write_text(json.dumps({"annotations": [{"image_id": 9, "category_id": 1, "bbox": box}]}))
        os.utime(path, (when, when))
        found = detection([[10, 10, 50, 50]], [0], [0.5])
        assert evaluate([target([], [])], [found], **told)[1]["AP"] == pytest.approx(expected)


def test_two_processes_equal_one(case):
    targets, detections = case
    metrics = evaluate(targets, detections)[1]
    others, parts = [], [COCOEvaluator(CLASSES), COCOEvaluator(CLASSES)]
    parts[0].update(targets[1::2], detections[1::2])
    parts[1].update(targets[0::2] + targets[1:2], detections[0::2] + detections[1:2])  # one picture in both
    parts[1].compute(lambda mine: others.append(mine) or [mine])
    assert parts[0].compute(lambda mine: [mine, *others]) == metrics


def test_no_detections_no_boxes_no_pictures(tmp_path):
    evaluator, metrics = evaluate([target([[10, 10, 50, 50]], [1])], [detection([], [], [])])
    assert {metrics[name] for name in MEASURES if "small" not in name and "large" not in name} == {0.0}
    assert metrics["AP_small"] == metrics["AP_large"] == -1
    evaluator.write(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []
    for empty in (([target([], [])], [detection([[1, 1, 9, 9]], [0], [0.5])]), ([], [])):
        assert set(evaluate(*empty)[1].values()) == {-1.0}


def test_a_crowd_scored_as_a_prediction_costs_nothing():
    goal = target([[10, 10, 50, 50], [100, 100, 300, 300]], [0, 0], [False, True])
    found = detection([[100, 100, 300, 300], [120, 120, 180, 180], [10, 10, 50, 50]], [0, 0, 0], [0.9, 0.8, 0.7])
    assert evaluate([goal], [found])[1]["AP"] == pytest.approx(1)
    stray = detection([[100, 100, 300, 300], [10, 10, 50, 50]], [1, 0], [0.9, 0.7])  # no crowd of its class, no truth
    assert evaluate([goal], [stray])[1]["AP"] == pytest.approx(1)


class Dataset:
    """Two pictures of relative boxes, as Open Images has them before a file is read; one is a crowd around another."""

    def __len__(self):
        return 2

    def annotation(self, index):
        boxes = [[0.1, 0.1, 0.4, 0.9], [0.1, 0.1, 0.42, 0.92], [0.5, 0.5, 0.75, 0.625]]
        return target(boxes, [0, 0, 2], [False, True, False], image_id=index)


def test_truth_in_relative_boxes_is_scored_too():
    metrics = score_truth(COCOEvaluator(CLASSES), Dataset())
    assert [metrics[name] for name in ("AP", "AP75", "AR_100")] == pytest.approx([1] * 3)


def test_mistakes_of_the_caller(tmp_path):
    evaluator = COCOEvaluator(CLASSES)
    with pytest.raises(ValueError, match="labels from 4 to 4, but 4 classes"):
        evaluator.update([target([[1, 1, 9, 9]], [0])], [detection([[1, 1, 9, 9]], [4], [0.9])])
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.write(tmp_path / "detections.json")
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed(case, capsys):
    evaluate(*case)
    assert capsys.readouterr().out == ""
