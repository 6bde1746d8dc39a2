"""VOC's and COCO's evaluation together, and the files that it writes."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation import ground_truth_score
from evaluation.detection import MASK_MEASURES, MEASURES, DetectionEvaluator
from ops import rle
from visualize import pr_curves

SIZE = (60, 80)
CLASSES = ["Größe", "кот", "pear", "never seen"]


def filled(boxes):
    """uint8 [M,h,w]: the pixels in each box."""
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in SIZE), indexing="ij")
    x1, y1, x2, y2 = boxes.T[:, :, None, None]
    return ((columns > x1) & (columns < x2) & (rows > y1) & (rows < y2)).to(torch.uint8)


def random_boxes(generator, count):
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([50.0, 40])
    return torch.cat([corners, corners + 6 + 12 * torch.rand(count, 2, generator=generator)], 1)


def as_objects(boxes, labels, **fields):
    return {"boxes": boxes, "labels": labels, "masks": filled(boxes), **fields}


def random_case(images=24):
    """[(target, detections)]: each object detected twice, not exactly, with few different scores; the first image has
    no object, the second no detection."""
    generator, pairs = torch.Generator().manual_seed(3), []
    for image in range(images):
        count = 0 if image == 0 else 4
        boxes, labels = random_boxes(generator, count), torch.randint(3, (count,), generator=generator)
        ignore = torch.rand(count, generator=generator) < 0.1
        target = as_objects(boxes, labels, ignore=ignore, image_id=image, size=SIZE)
        near = boxes.repeat(2, 1) + torch.randn(2 * count, 4, generator=generator)
        near = torch.cat([near, random_boxes(generator, 2)])[: 0 if image == 1 else None]
        labels = torch.cat([labels.repeat(2), torch.tensor([0, 2])])[: len(near)]
        scores = torch.randint(1, 10, (len(near),), generator=generator) / 10
        pairs.append((target, as_objects(near, labels, scores=scores)))
    return pairs


def evaluate(pairs, batch=5, **options):
    evaluator = DetectionEvaluator(CLASSES, draw=pr_curves.draw, **options)
    for start in range(0, len(pairs), batch):
        evaluator.update(*zip(*pairs[start : start + batch]))
    return evaluator


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_order_of_images_batches_and_processes_change_no_metric_and_no_file(tmp_path):
    pairs, options = random_case(), {"masks": True, "image_path": lambda image_id: f"images/{image_id:03d}.jpg"}
    one = evaluate(pairs, **options)
    metrics = one.compute()
    assert set(metrics) > {*MEASURES, *MASK_MEASURES} and 0.2 < metrics["AP"] < metrics["mAP"] < 1
    names = one.write(tmp_path / "one")
    assert len(names) == 4 + len(CLASSES) + 2 == len(set(names)) == len(list((tmp_path / "one").iterdir()))
    shuffled = random.Random(0).sample(pairs, len(pairs))
    first, second, gathered = evaluate(shuffled[:9], 2, **options), evaluate(shuffled[8:], 7, **options), []
    second.compute(lambda share: gathered.append(share) or [share])
    assert first.compute(lambda share: [share, gathered.pop(0)]) == metrics
    first.write(tmp_path / "two")
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_coco_ap_of_each_class_is_that_of_pycocotools_for_this_class_alone(tmp_path, capsys):
    pairs = random_case()
    evaluator = evaluate(pairs, masks=True)
    metrics = evaluator.compute()
    evaluator.write(tmp_path)
    rows = read_csv(tmp_path / "per_class.csv")
    assert [row["class"] for row in rows] == CLASSES
    truth, annotations = COCO(), []
    for target, _ in pairs:
        for box, label, ignore, mask in zip(*(target[name] for name in ("boxes", "labels", "ignore", "masks"))):
            x1, y1, x2, y2 = box.double().tolist()
            row = {"id": len(annotations) + 1, "image_id": target["image_id"], "category_id": int(label) + 1}
            row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(mask.sum()), "iscrowd": int(ignore)}
            flat = np.concatenate([[0], mask.T.flatten().numpy(), [0]])
            edges = np.flatnonzero(np.diff(flat))
            counts = np.diff(np.concatenate([[0], edges, [mask.numel()]])).tolist()
            annotations.append(row | {"segmentation": {"size": list(SIZE), "counts": counts}})
    images = [{"id": target["image_id"], "height": SIZE[0], "width": SIZE[1]} for target, _ in pairs]
    categories = [{"id": label + 1} for label in range(4)]
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    truth.createIndex()
    cases = (("COCO", "", "bbox", "detections.json"), ("COCO_mask", "mask ", "segm", "detections_masks.json"))
    for column, prefix, kind, file in cases:
        for label, row in enumerate(rows):
            scored = COCOeval(truth, truth.loadRes(str(tmp_path / file)), kind)
            scored.params.catIds = [label + 1]
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
            expected = [f"{value:.6f}" if value >= 0 else "" for value in scored.stats[:2]]
            assert [row[f"{column}_AP"], row[f"{column}_AP50"]] == expected
        values = [float(row[f"{column}_AP"]) for row in rows[:3]]
        assert metrics[f"{prefix}AP"] == pytest.approx(np.mean(values), abs=1e-6)


def test_the_sums_of_the_confusion_matrix(tmp_path):
    """Of a row: the objects of the class, those to ignore left out; of a column: its detections from a score of 0.5, in
    this case where every object to ignore is left out."""
    pairs = [(t | {"ignore": torch.zeros_like(t["ignore"])}, d) for t, d in random_case()]
    evaluator = evaluate(pairs)
    evaluator.compute()
    evaluator.write(tmp_path)
    rows = read_csv(tmp_path / "confusion.csv")
    table = {row.pop("truth / detection"): {name: int(value) for name, value in row.items()} for row in rows}
    assert list(table) == [*CLASSES, "background"] == list(rows[0])
    for label, name in enumerate(CLASSES):
        assert sum(table[name].values()) == sum(int((t["labels"] == label).sum()) for t, _ in pairs)
        detected = sum(int(((d["labels"] == label) & (d["scores"] >= 0.5)).sum()) for _, d in pairs)
        assert sum(row[name] for row in table.values()) == detected
    assert table["pear"]["pear"] > 0 and table["background"]["background"] == 0


def test_curves_in_the_files_are_those_of_all_points(tmp_path):
    evaluator = evaluate(random_case(300))
    metrics = evaluator.compute()
    evaluator.write(tmp_path)
    rows = read_csv(tmp_path / "pr_curves.csv")
    for name, (precision, recall, scores) in evaluator.curves().items():
        points = [[float(row[key]) for key in ("precision", "recall", "score")] for row in rows if row["class"] == name]
        written = np.array(points).T
        assert 50 < written.shape[1] <= 202 < len(recall)
        everything = {tuple(f"{value:.6g}" for value in point) for point in zip(precision, recall, scores)}
        assert {tuple(f"{value:.6g}" for value in point) for point in points} <= everything
        assert (np.diff(written[1]) >= 0).all() and (np.diff(written[2]) <= 0).all()
        assert written[1][-1] == pytest.approx(recall[-1]) and written[2][-1] == pytest.approx(scores[-1])
        highest = np.maximum.accumulate(written[0][::-1])[::-1]
        area = np.sum(np.diff(written[1], prepend=0) * highest)
        assert area == pytest.approx(metrics[f"AP/{name}"], abs=0.01)


@pytest.mark.parametrize("case", ["no detection", "no object", "no image"])
def test_nothing_to_draw(case, tmp_path):
    pairs = random_case()
    if case == "no detection":
        pairs = [(t, {name: values[:0] for name, values in d.items()}) for t, d in pairs]
    if case == "no object":
        empty = ("boxes", "labels", "ignore", "masks")
        pairs = [({name: v[:0] if name in empty else v for name, v in t.items()}, d) for t, d in pairs]
    evaluator = evaluate([] if case == "no image" else pairs, masks=True)
    assert evaluator.compute()["mAP"] == 0
    names = evaluator.write(tmp_path)
    assert read_csv(tmp_path / "pr_curves.csv") == []
    assert {"pr_curves.png", "confusion.csv", "detections_masks.json"} < set(names)
    assert Image.open(tmp_path / "pr_curves.png").size == pr_curves.SIZE
    if case != "no object":
        assert json.loads((tmp_path / "detections.json").read_text()) == []


class Annotations(list):
    """Targets as a data set."""

    annotation = list.__getitem__


def test_the_line_about_the_ground_truth_names_the_rule():
    runs = [[{"size": SIZE, "counts": counts} for counts in rle.encode(t["masks"])] for t, _ in random_case(6)]
    data = Annotations(target | {"masks": masks} for (target, _), masks in zip(random_case(6), runs))
    evaluator = DetectionEvaluator(CLASSES, masks=True, iou=0.7, use_2007=True)
    line = "ground truth scored as predictions: AP 1.000, mask AP 1.000, mAP 1.000 (VOC2007 11-point AP at IoU 0.7)"
    assert ground_truth_score(evaluator, data) == line
