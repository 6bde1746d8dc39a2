"""VOCEvaluator against a slow but simple implementation and against pycocotools."""

import csv

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.voc import VOCEvaluator

CLASSES = ["apple", "pear", "plum", "fig"]


def random_boxes(rng, count, side=100.0):
    corner = rng.uniform(0, 0.7 * side, size=(count, 2))
    return np.concatenate([corner, corner + rng.uniform(0.05 * side, 0.5 * side, size=(count, 2))], axis=1)


def random_case(seed, images=30, ignore=0.2, spread=4.0, side=100.0, levels=8):
    """Targets and detections; few score levels make many ties. Some images have no boxes, some no detections."""
    rng = np.random.default_rng(seed)
    targets, detections = [], []
    for image in rng.permutation(images).tolist():
        boxes = random_boxes(rng, int(rng.choice([0, 1, 2, 5])), side)
        labels = rng.integers(0, 3, len(boxes))  # the last class has no box
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, spread, size=(2 * len(boxes), 4))
        detected = np.concatenate([near, random_boxes(rng, 3, side)])
        detected[:, 2:] = np.maximum(detected[:, 2:], detected[:, :2] + 1)
        wrong = rng.integers(0, len(CLASSES), len(detected))
        right = np.concatenate([np.repeat(labels, 2), wrong[:3]])
        target = {"boxes": boxes, "labels": labels, "ignore": rng.random(len(boxes)) < ignore}
        kept = rng.random(len(detected)) < 0.7
        detection = {"boxes": detected[kept], "labels": np.where(rng.random(len(detected)) < 0.8, right, wrong)[kept]}
        detection["scores"] = rng.integers(1, levels, kept.sum()) / levels
        targets.append({**tensors(target), "image_id": image})
        detections.append(tensors(detection))
    return targets, detections


def tensors(arrays):
    out = {key: torch.as_tensor(value) for key, value in arrays.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in out.items()}


def plain_iou(a, b):
    a, b = [float(v) for v in a], [float(v) for v in b]
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def plain_outcomes(targets, detections, label, threshold):
    """([(score, is true positive)] in descending order of score, without those that do not count; number of boxes)."""
    everything = sorted(zip(targets, detections, strict=True), key=lambda pair: pair[0]["image_id"])
    detected = [
        (float(detection["scores"][i]), target, detection["boxes"][i])
        for target, detection in everything
        for i in range(len(detection["boxes"]))
        if detection["labels"][i] == label
    ]
    outcomes, taken = [], set()
    for score, target, box in sorted(detected, key=lambda item: -item[0]):
        best, highest = None, -1.0
        for g in range(len(target["boxes"])):
            iou = plain_iou(box, target["boxes"][g]) if target["labels"][g] == label else -1.0
            if iou > highest:
                best, highest = g, iou
        if best is None or highest < threshold:
            outcomes.append((score, False))
        elif not target["ignore"][best]:
            outcomes.append((score, (target["image_id"], best) not in taken))
            taken.add((target["image_id"], best))
    positives = sum(int(((t["labels"] == label) & ~t["ignore"]).sum()) for t in targets)
    return outcomes, positives


def plain_ap(outcomes, positives):
    """(area under the curve, 11-point mean) as in VOC's development kit."""
    true, points = 0, []
    for number, (_, hit) in enumerate(outcomes, start=1):
        true += hit
        points.append((true, true / number))
    area = sum(
        (points[i][0] - (points[i - 1][0] if i else 0)) / positives * max(p for _, p in points[i:])
        for i in range(len(points))
    )
    eleven = [max([p for t, p in points if 10 * t >= k * positives], default=0.0) for k in range(11)]
    return area, sum(eleven) / 11


def evaluate(targets, detections, classes=CLASSES, iou=0.5, batch=7):
    evaluator = VOCEvaluator(classes, iou)
    for i in range(0, len(targets), batch):
        evaluator.update(targets[i : i + batch], detections[i : i + batch])
    return evaluator, evaluator.compute()


@pytest.mark.parametrize("threshold", [0.5, 0.75])
@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_the_simple_implementation(seed, threshold):
    targets, detections = random_case(seed)
    evaluator, metrics = evaluate(targets, detections, iou=threshold)
    expected = {}
    for label, name in enumerate(CLASSES):
        outcomes, positives = plain_outcomes(targets, detections, label, threshold)
        if not positives:
            assert f"AP/{name}" not in metrics
            continue
        expected[f"AP/{name}"], expected[f"AP_11point/{name}"] = plain_ap(outcomes, positives)
        precision, recall, scores = evaluator.curves()[name]
        true = np.cumsum([hit for _, hit in outcomes])
        np.testing.assert_array_equal(scores, [score for score, _ in outcomes])
        np.testing.assert_array_equal(precision, true / np.arange(1, len(true) + 1))
        np.testing.assert_array_equal(recall, true / positives)
    for form in ("AP", "AP_11point"):
        values = [value for key, value in expected.items() if key.startswith(f"{form}/")]
        assert len(values) == 3
        expected[f"m{form}"] = sum(values) / len(values)
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, abs=1e-12)


def coco_ap(targets, detections):
    """COCO's AP at IoU 0.5 over all classes with boxes, without crowds."""
    coco, boxes, results = COCO(), [], []
    for target, detection in zip(targets, detections, strict=True):
        for box, label in zip(target["boxes"].double().tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            row = {"id": len(boxes) + 1, "image_id": target["image_id"], "category_id": label + 1, "iscrowd": 0}
            boxes.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        for i, (x1, y1, x2, y2) in enumerate(detection["boxes"].double().tolist()):
            row = {"image_id": target["image_id"], "category_id": int(detection["labels"][i]) + 1}
            results.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(detection["scores"][i])})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    coco.dataset = {"info": {}, "images": [{"id": t["image_id"]} for t in targets], "categories": categories}
    coco.dataset["annotations"] = boxes
    coco.createIndex()
    scorer = COCOeval(coco, coco.loadRes(results), "bbox")
    scorer.params.iouThrs, scorer.params.maxDets = np.array([0.5]), [1, 10, 10000]
    scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
    scorer.evaluate()
    scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return float(precision[precision > -1].mean())


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_pycocotools(seed, capsys):
    # large images, where boxes seldom overlap: COCO lets a detection match its second-best box, VOC does not
    targets, detections = random_case(seed, images=150, ignore=0.0, side=400.0, spread=12.0, levels=10**6)
    _, metrics = evaluate(targets, detections)
    assert 0.2 < metrics["mAP"] < 0.95
    assert metrics["mAP"] == pytest.approx(coco_ap(targets, detections), abs=0.01)


def as_detections(targets):
    return [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in targets]


def test_ground_truth_as_detections_is_exactly_one():
    targets, _ = random_case(3, images=100)
    evaluator, metrics = evaluate(targets, as_detections(targets))
    assert set(metrics.values()) == {1.0}
    counted = torch.cat([t["labels"][~t["ignore"]] for t in targets])
    expected = np.zeros((5, 5), np.int64)
    np.fill_diagonal(expected, np.bincount(counted, minlength=5))
    np.testing.assert_array_equal(evaluator.confusion(), expected)


def test_two_processes_equal_one():
    targets, detections = random_case(5)
    whole, metrics = evaluate(targets, detections)
    others = []
    parts = [VOCEvaluator(CLASSES), VOCEvaluator(CLASSES)]
    parts[0].update(targets[1::2], detections[1::2])
    parts[1].update(targets[0::2] + targets[1:2], detections[0::2] + detections[1:2])  # one image in both
    parts[1].compute(lambda mine: others.append(mine) or [mine])
    assert parts[0].compute(lambda mine: [mine, *others]) == metrics
    np.testing.assert_array_equal(parts[0].confusion(0.3), whole.confusion(0.3))


def target(boxes, labels, ignore=None, image_id=0):
    ignore = [False] * len(labels) if ignore is None else ignore
    arrays = {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels, int), "ignore": ignore}
    return {**tensors(arrays), "image_id": image_id}


def detection(boxes, labels, scores):
    return tensors({"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels, int), "scores": scores})


BOX, NEAR, FAR = [10, 10, 50, 50], [12, 10, 52, 50], [60, 60, 90, 90]


def test_no_detections_and_no_images_give_zero():
    _, metrics = evaluate([target([BOX], [1])], [detection([], [], [])])
    assert metrics == {"mAP": 0.0, "mAP_11point": 0.0, "AP/pear": 0.0, "AP_11point/pear": 0.0}
    evaluator, metrics = evaluate([], [])
    assert metrics == {"mAP": 0.0, "mAP_11point": 0.0}
    assert evaluator.confusion().sum() == 0
    _, metrics = evaluate([target([], [])], [detection([BOX], [0], [0.9])])
    assert metrics == {"mAP": 0.0, "mAP_11point": 0.0}


def test_detections_of_ignored_boxes_do_not_count():
    truth = target([BOX, FAR], [0, 0], [False, True])
    _, metrics = evaluate([truth], [detection([FAR, FAR, BOX], [0, 0, 0], [0.9, 0.8, 0.7])])
    assert metrics["mAP"] == 1.0
    _, metrics = evaluate([truth], [detection([FAR, NEAR, BOX], [1, 0, 0], [0.9, 0.8, 0.7])])
    assert metrics["mAP"] == 1.0  # a second detection of a box comes after all boxes are found
    _, metrics = evaluate([target([FAR], [0], [True])], [detection([FAR], [0], [0.9])])
    assert metrics == {"mAP": 0.0, "mAP_11point": 0.0}


def test_recall_of_three_in_ten_reaches_0_3():
    targets = [target([BOX], [0], image_id=i) for i in range(10)]
    detected = [detection([BOX] if i < 3 else [], [0] if i < 3 else [], [0.5] if i < 3 else []) for i in range(10)]
    _, metrics = evaluate(targets, detected)
    assert metrics["AP_11point/apple"] == 4 / 11
    assert metrics["AP/apple"] == 0.3


def test_detections_without_area_or_with_nan_are_false_positives():
    detected = detection([[20, 20, 20, 20], [float("nan")] * 4, BOX], [0, 0, 0], [0.9, 0.8, 0.7])
    _, metrics = evaluate([target([BOX], [0])], [detected])
    assert metrics["AP/apple"] == pytest.approx(1 / 3)


def plain_confusion(targets, detections, score, threshold=0.5):
    table = np.zeros((len(CLASSES) + 1,) * 2, np.int64)
    for truth, detected in zip(targets, detections, strict=True):
        taken = set()
        for i in sorted(range(len(detected["scores"])), key=lambda i: -float(detected["scores"][i])):
            if detected["scores"][i] < score:
                continue
            choice = []
            for g in range(len(truth["boxes"])):
                iou = plain_iou(detected["boxes"][i], truth["boxes"][g])
                if g not in taken and iou >= threshold:
                    other = bool(truth["labels"][g] != detected["labels"][i])
                    choice.append((-iou, other, bool(truth["ignore"][g]), g))
            if not choice:
                table[-1, detected["labels"][i]] += 1
            elif not min(choice)[2]:
                taken.add(min(choice)[3])
                table[truth["labels"][min(choice)[3]], detected["labels"][i]] += 1
        for g in range(len(truth["boxes"])):
            if g not in taken and not truth["ignore"][g]:
                table[truth["labels"][g], -1] += 1
    return table


@pytest.mark.parametrize("seed", range(6))
def test_confusion_equals_the_simple_implementation(seed):
    targets, detections = random_case(seed, images=60, spread=6.0)
    evaluator, _ = evaluate(targets, detections)
    for score in (0.0, 0.5, 2.0):
        np.testing.assert_array_equal(evaluator.confusion(score), plain_confusion(targets, detections, score))


def test_confusion_of_equal_boxes_of_two_classes():
    truth = target([BOX, BOX], [0, 1])
    evaluator, _ = evaluate([truth], [detection([BOX, BOX], [1, 0], [0.9, 0.8])])
    np.testing.assert_array_equal(evaluator.confusion()[:2, :2], np.eye(2))


def test_written_tables(tmp_path):
    targets = [target([BOX, FAR], [0, 0], image_id=0), target([BOX], [1], image_id=1)]
    detected = [detection([BOX, NEAR, FAR], [0, 0, 0], [0.9, 0.6, 0.6]), detection([BOX], [2], [0.8])]
    evaluator, metrics = evaluate(targets, detected, classes=["a, b", "pear", "plum", "fig"])
    assert evaluator.write(tmp_path / "run") == ["per_class.csv", "confusion.csv", "pr_curves.csv"]
    with open(tmp_path / "run/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["a, b", "pear", "plum", "fig"]
    assert list(rows[0]) == ["class", "ground_truth_boxes", "detections", "AP", "AP_11point", "best_F1_threshold",
                             "precision_there", "recall_there"]  # fmt: skip
    assert float(rows[0]["AP"]) == pytest.approx(metrics["AP/a, b"], abs=1e-6)
    # both detections at 0.6 pass a threshold together: precision 2/3, recall 1
    assert [float(rows[0][key]) for key in list(rows[0])[5:]] == pytest.approx([0.6, 2 / 3, 1.0], abs=1e-6)
    assert [rows[1][key] for key in ("AP", "best_F1_threshold")] == ["0.000000", ""]
    assert (rows[2]["AP"], rows[2]["detections"]) == ("", "1")
    with open(tmp_path / "run/confusion.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["truth / detection", "a, b", "pear", "plum", "fig", "background"]
    assert table[2] == ["pear", "0", "0", "1", "0", "0"]
    assert table[5] == ["background", "1", "0", "0", "0", "0"]


def read_results(folder, classes, images, offset):
    """Detections per image from VOC's results files, boxes back in pixels that count from 0."""
    found = [{"boxes": [], "labels": [], "scores": []} for _ in range(images)]
    for label, name in enumerate(classes):
        for line in (folder / f"det_test_{name}.txt").read_text(encoding="utf-8").splitlines():
            image, score, *corners = line.split(" ")
            x1, y1, x2, y2 = map(float, corners)
            columns = {"boxes": [x1 - offset, y1 - offset, x2, y2], "labels": label, "scores": float(score)}
            for key, value in columns.items():
                found[int(image.removeprefix("photo."))][key].append(value)
    return [detection(**rows) for rows in found]


@pytest.mark.parametrize("offset", [1, 0])
def test_the_results_files_score_the_same(offset, tmp_path):
    targets, detections = random_case(2, levels=1000)
    names = {"offset": offset, "image_path": lambda image_id: f"/data/JPEGImages/photo.{image_id:03d}.JPG"}
    classes = ["Größe", "кот", "a%2Fb", "never seen"]
    evaluator = VOCEvaluator([name.replace("%2F", "/") for name in classes], **names)
    evaluator.update(targets, detections)
    metrics = evaluator.compute()
    files = [f"det_test_{name}.txt" for name in classes]
    assert evaluator.write(tmp_path) == ["per_class.csv", "confusion.csv", "pr_curves.csv", *files]
    found = read_results(tmp_path, classes, len(targets), offset)
    assert [len(rows["scores"]) for rows in found] == [
        len(d["scores"]) for _, d in sorted(zip(targets, detections), key=lambda pair: pair[0]["image_id"])
    ]
    by_image = sorted(targets, key=lambda target: target["image_id"])
    areas = [plain_ap(*plain_outcomes(by_image, found, label, 0.5))[0] for label in range(3)]
    assert metrics["mAP"] == pytest.approx(np.mean(areas), abs=1e-12) and 0.1 < metrics["mAP"] < 0.9


def test_a_results_file_has_the_first_and_the_last_pixel(tmp_path):
    evaluator = VOCEvaluator(["cat"], image_path=lambda image_id: "sub/000012.jpg")
    evaluator.update([target([BOX], [0])], [detection([[0, 10, 500, 375]], [0], [0.25])])
    evaluator.compute()
    evaluator.write(tmp_path)
    assert (tmp_path / "det_test_cat.txt").read_text() == "000012 0.25 1 11 500 375\n"


def test_the_metric_of_2007():
    targets, detections = random_case(1)
    _, metrics = evaluate(targets, detections)
    evaluator = VOCEvaluator(CLASSES, use_2007=True)
    evaluator.update(targets, detections)
    of_2007 = evaluator.compute()
    assert of_2007["mAP"] == of_2007["mAP_11point"] == metrics["mAP_11point"] != metrics["mAP"]
    assert all(of_2007[f"AP/{name}"] == metrics[f"AP_11point/{name}"] for name in CLASSES[:3])
    assert list(of_2007) == list(metrics)
    assert float(evaluator.per_class()[1][3]) == pytest.approx(of_2007["AP/apple"], abs=1e-6)


def test_errors_of_the_caller():
    evaluator = VOCEvaluator(CLASSES)
    with pytest.raises(ValueError, match="1 targets, but 2 detections"):
        evaluator.update([target([BOX], [0])], [detection([BOX], [0], [0.9])] * 2)
    with pytest.raises(ValueError, match="labels from 4 to 4, but 4 classes"):
        evaluator.update([target([BOX], [0])], [detection([BOX], [4], [0.9])])
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.curves()
    assert evaluator.compute()["mAP"] == 0.0  # nothing of the refused updates is kept


def test_table_has_every_class_with_boxes_and_a_hint_without_detections():
    evaluator = VOCEvaluator(["cat", "giraffe", "unseen"])
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([0, 1])}
    target |= {"ignore": torch.zeros(2, dtype=torch.bool), "image_id": 0}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    evaluator.update([target], [nothing])
    assert evaluator.compute()["mAP"] == 0
    lines = evaluator.table().splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["cat", "1"], ["giraffe", "1"], ["mean", "2"]]
    assert "no detection" in lines[4]
