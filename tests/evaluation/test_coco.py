"""COCOEvaluator for boxes and masks against pycocotools itself, on random and drawn ground truth."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import synthetic
from data import detection
from evaluation import score_ground_truth
from evaluation.coco import MASK_MEASURES, MEASURES, COCOEvaluator
from ops import rle
from utils.coco import CocoTruth

CLASSES = ["apple", "pear", "plum", "fig"]
SIZE = (150, 200)
with_and_without_masks = pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])


def ellipses(boxes, size=SIZE):
    """bool [M,h,w]: the ellipse in each box."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    centers, radii = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across = (columns - centers[:, 0, None, None]) / radii[:, 0, None, None]
    down = (rows - centers[:, 1, None, None]) / radii[:, 1, None, None]
    return torch.from_numpy(across**2 + down**2 <= 1)


def make_target(boxes, labels, ignore=None, image_id=0):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    ignore = torch.tensor(ignore or [False] * len(labels), dtype=torch.bool)
    target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "ignore": ignore}
    return target | {"image_id": image_id, "size": SIZE, "masks": ellipses(boxes)}


def make_detection(boxes, labels, scores):
    target = make_target(boxes, labels)
    return {name: target[name] for name in ("boxes", "labels", "masks")} | {"scores": torch.tensor(scores).float()}


def noisy(target, random, num_classes):
    """Each object detected about twice, box and mask moved a little, sometimes with another label, with few different
    scores. The masks of the target are pixels, run lengths or missing."""
    count, size = 2 * len(target["boxes"]), target["size"]
    boxes = target["boxes"].repeat(2, 1)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.08 * sides * torch.randn(boxes.shape, generator=random)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels, other = target["labels"].repeat(2), torch.randint(num_classes, (count,), generator=random)
    labels = torch.where(torch.rand(count, generator=random) < 0.85, labels, other)
    keep = torch.rand(count, generator=random) < 0.7
    scores = torch.randint(1, 20, (count,), generator=random) / 20
    shifts = (0.08 * sides[:, :2] * torch.randn(count, 2, generator=random)).int().tolist()
    detected = {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}
    if "masks" in target:
        masks = target["masks"]
        masks = rle.decode([mask["counts"] for mask in masks], size) if isinstance(masks, list) else masks
        masks = [mask.bool().roll(shift, (1, 0)) for mask, shift in zip(masks.repeat(2, 1, 1), shifts)]
        detected["masks"] = torch.stack(masks)[keep] if masks else torch.zeros(0, *size, dtype=torch.bool)
    return detected


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(random):
    """(targets, detections) of 40 images: ellipses of 10 to 90 pixels, a fifth are crowds, none of the last class."""
    targets = []
    for image_id in torch.randperm(40, generator=random).tolist():
        corner = 60 * torch.rand(image_id % 6, 2, generator=random)
        boxes = torch.cat([corner, corner + 10 + 80 * torch.rand(corner.shape, generator=random)], 1)
        labels = torch.randint(3, (len(boxes),), generator=random).tolist()
        crowd = (torch.rand(len(boxes), generator=random) < 0.2).tolist()
        targets.append(make_target(boxes.tolist(), labels, crowd, image_id))
    return targets, [noisy(target, random, 4) for target in targets]


def pycocotools_stats(truth, results, kind, image_ids=None):
    """The twelve stats of a results file. truth: the path of an annotation file, or its content."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(None if isinstance(truth, dict) else truth)
        if isinstance(truth, dict):
            annotations.dataset = truth
            annotations.createIndex()
        scorer = COCOeval(annotations, annotations.loadRes(str(results)), kind)
        scorer.params.imgIds = scorer.params.imgIds if image_ids is None else image_ids
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def assert_equals_pycocotools(evaluator, metrics, truth, folder, image_ids=None):
    """The metrics are those of pycocotools for the files that the evaluator writes."""
    names = evaluator.write(folder)
    boxes = pycocotools_stats(truth, folder / "detections.json", "bbox", image_ids)
    assert [metrics[name] for name in MEASURES] == pytest.approx(boxes, abs=1e-12)
    assert 0.05 < metrics["AP"] < metrics["AP50"] < 0.95
    if evaluator.masks:
        masks = pycocotools_stats(truth, folder / "detections_masks.json", "segm", image_ids)
        assert [metrics[name] for name in MASK_MEASURES] == pytest.approx(masks, abs=1e-12)
        assert 0.05 < metrics["mask AP"] < metrics["mask AP50"] < 0.95 and metrics["mask AP"] != metrics["AP"]
    assert sorted(path.name for path in folder.iterdir()) == names == sorted(names)
    assert names == ["detections.json", "detections_masks.json"][: 1 + evaluator.masks]


def evaluate(targets, detections, **options):
    evaluator = COCOEvaluator(CLASSES, **options)
    for i in range(0, len(targets), 7):
        evaluator.update(targets[i : i + 7], detections[i : i + 7])
    return evaluator, evaluator.compute()


def as_json(targets, masks):
    """The targets as an annotation file, category ids from 1; areas are those of the masks, if there are any."""
    rows = []
    for target in targets:
        runs = coco_masks.encode(np.asfortranarray(target["masks"].permute(1, 2, 0).numpy().astype(np.uint8)))
        for box, label, crowd, mask in zip(
            target["boxes"].double(), target["labels"].tolist(), target["ignore"].tolist(), runs, strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            row = {"image_id": target["image_id"], "category_id": label + 1, "iscrowd": int(crowd)}
            row |= {"id": len(rows) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            if masks:
                row |= {"area": int(coco_masks.area(mask)), "segmentation": mask | {"counts": mask["counts"].decode()}}
            rows.append(row)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    images = [{"id": target["image_id"], "height": SIZE[0], "width": SIZE[1]} for target in targets]
    return {"info": {}, "images": images, "categories": categories, "annotations": rows}


def as_truth(content, image_ids, category_ids, masks=False):
    """What data.detection.coco makes of an annotation file."""
    rows = content["annotations"]
    columns = {name: np.array([row[name] for row in rows]) for name in ("image_id", "category_id", "iscrowd")}
    columns |= {name: np.array([row[name] for row in rows], dtype=np.float64) for name in ("bbox", "area")}
    if masks:
        columns["counts"] = np.array([row["segmentation"]["counts"].encode() for row in rows], dtype=object)
        columns["height"], columns["width"] = np.full(len(rows), SIZE[0]), np.full(len(rows), SIZE[1])
    return CocoTruth(np.asarray(image_ids), np.asarray(category_ids), columns)


@with_and_without_masks
def test_metrics_equal_those_of_pycocotools(case, masks, tmp_path, capsys):
    evaluator, metrics = evaluate(*case, masks=masks)
    assert list(metrics) == [*MEASURES, *MASK_MEASURES * masks]
    assert len(MEASURES) == 12 and MASK_MEASURES[1] == "mask AP50"
    assert_equals_pycocotools(evaluator, metrics, as_json(case[0], masks), tmp_path / "run")
    assert metrics["AR_1"] < metrics["AR_100"]
    assert len({round(value, 6) for value in metrics.values()}) >= 9  # no two metrics are swapped
    line = f"COCO: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}"
    assert evaluator.table().startswith(line) and ("mask AP" in evaluator.table()) == masks
    assert capsys.readouterr().out == ""


@with_and_without_masks
def test_ground_truth_of_a_file(case, masks, tmp_path):
    """Other image ids, and only the images that were evaluated count. The targets need no masks."""
    content = as_json(case[0], masks)
    for row in (*content["annotations"], *content["images"]):
        row["id" if "height" in row else "image_id"] = 500 - 3 * row["id" if "height" in row else "image_id"]
    truth = as_truth(content, 500 - 3 * np.arange(40), [1, 2, 3, 4], masks)
    targets = [{name: value for name, value in target.items() if name != "masks"} for target in case[0]]
    pairs = [pair for pair in zip(targets, case[1]) if pair[0]["image_id"] < 25]
    evaluator, metrics = evaluate(*map(list, zip(*pairs)), truth=truth, masks=masks)
    image_ids = [500 - 3 * i for i in range(25)]
    assert_equals_pycocotools(evaluator, metrics, content, tmp_path, image_ids)
    assert metrics["AP"] != evaluate(targets, case[1], truth=truth, masks=masks)[1]["AP"]


def test_labels_become_the_category_ids_of_the_file(tmp_path):
    """Other ids, 0 among them, another order, and a class that the file does not have."""
    rows = [{"image_id": 9, "category_id": 70, "iscrowd": 0, "bbox": [10, 10, 40, 40], "area": 1600}]
    rows.append(rows[0] | {"category_id": 0, "bbox": [60, 60, 30, 30], "area": 900})
    truth = as_truth({"annotations": rows}, [4, 9], [70, 0, -1, 8])
    detected = make_detection([[10, 10, 50, 50], [60, 60, 90, 90], [1, 1, 5, 5]], [0, 1, 2], [0.5, 0.75, 1.0])
    evaluator, metrics = evaluate([make_target([], [], image_id=1)], [detected], truth=truth)
    assert (metrics["AP"], metrics["AP_small"], metrics["AP_medium"], metrics["AP_large"]) == pytest.approx(
        (1, 1, 1, -1)
    )
    evaluator.write(tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == [
        {"image_id": 9, "category_id": 70, "bbox": [10, 10, 40, 40], "score": 0.5},
        {"image_id": 9, "category_id": 0, "bbox": [60, 60, 30, 30], "score": 0.75},
    ]


def assert_data_set_fits(dataset, annotation_file, random, folder):
    """Noisy detections score as in pycocotools, and ground truth scored as predictions gives 1."""
    evaluator = COCOEvaluator(dataset.classes, dataset.coco_truth(), masks=True)
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        evaluator.update([target], [noisy(target, random, len(dataset.classes))])
    assert_equals_pycocotools(evaluator, evaluator.compute(), annotation_file, folder)
    for truth in (dataset.coco_truth(), None):  # as in the file, and as the data set returns it
        metrics = score_ground_truth(COCOEvaluator(dataset.classes, truth, masks=True), dataset)
        assert [metrics[name] for name in (*MEASURES[:3], *MASK_MEASURES[:3])] == pytest.approx([1] * 6)


def test_drawn_coco_data_set(random, tmp_path):
    root = synthetic.draw_coco(tmp_path / "coco", images=20, seed=2, size=(96, 80))
    train_set, _, _ = detection.load("coco", [root], masks=True)
    annotation_file = str(root / "annotations/instances_train2017.json")
    assert_data_set_fits(train_set, annotation_file, random, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.realdata
def test_real_coco_data_set(shared, random, tmp_path):
    root = shared / "data/coco_tiny"
    _, val_set, _ = detection.load("coco", [root], masks=True)
    assert_data_set_fits(val_set, str(root / "annotations/instances_val2017.json"), random, tmp_path)


def test_invalid_annotations_are_not_ground_truth(tmp_path):
    """Objects that the data set leaves out as invalid do not count as missed either."""
    root = synthetic.draw_coco(tmp_path / "coco", images=20, seed=2, size=(96, 80))
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    rows = [row for row in content["annotations"] if not row["iscrowd"]][:6]
    for row, bbox in zip(rows, ([5, 5, 0, 9], [199, 5, 9, 9], [5, float("nan"), 9, 9], [5, 5, None, 9], None, 7)):
        row["bbox"] = bbox
    path.write_text(json.dumps(content))
    train_set, _, errors = detection.load("coco", [root])
    assert len(errors) == 6
    metrics = score_ground_truth(COCOEvaluator(train_set.classes, train_set.coco_truth()), train_set)
    assert (metrics["AP"], metrics["AR_100"]) == pytest.approx((1, 1))


def test_data_sets_of_other_layouts(tmp_path):
    root = synthetic.draw_pennfudan(tmp_path, images=4, seed=0, size=(96, 80))
    people, _, _ = detection.load_penn_fudan([root])
    assert people.coco_truth() is None
    metrics = score_ground_truth(COCOEvaluator(people.classes, masks=True), people)
    assert (metrics["AP"], metrics["mask AP"]) == pytest.approx((1, 1))
    assert "mask AP" not in score_ground_truth(COCOEvaluator(people.classes), people)


@with_and_without_masks
def test_two_processes_equal_one(case, masks):
    targets, detections = case
    metrics = evaluate(targets, detections, masks=masks)[1]
    first, second, shares = COCOEvaluator(CLASSES, masks=masks), COCOEvaluator(CLASSES, masks=masks), []
    first.update(targets[1::2], detections[1::2])
    second.update(targets[0::2] + targets[1:2], detections[0::2] + detections[1:2])  # one image in both
    second.compute(lambda share: shares.append(share) or [share])
    assert first.compute(lambda share: [share, *shares]) == metrics


@with_and_without_masks
def test_no_detections_no_objects_no_images(masks, tmp_path):
    nothing = make_detection([], [], [])
    evaluator, metrics = evaluate([make_target([[10, 10, 50, 50]], [1])], [nothing], masks=masks)
    names = (*MEASURES, *MASK_MEASURES * masks)
    assert {metrics[name] for name in names if "small" not in name and "large" not in name} == {0.0}
    assert metrics["AP_small"] == metrics["AP_large"] == -1
    for name in evaluator.write(tmp_path):
        assert json.loads((tmp_path / name).read_text()) == []
    for detected in (nothing, nothing | {"masks": []}, make_detection([[1, 1, 9, 9]], [0], [0.5])):
        assert set(evaluate([make_target([], [])], [detected], masks=masks)[1].values()) == {-1.0}
    assert set(evaluate([], [], masks=masks)[1].values()) == {-1.0}


@with_and_without_masks
def test_detections_of_a_crowd_do_not_count(masks):
    target = make_target([[10, 10, 50, 50], [80, 40, 180, 140]], [0, 0], [False, True])
    detected = make_detection([[80, 40, 180, 140], [100, 60, 140, 110], [10, 10, 50, 50]], [0, 0, 0], [0.9, 0.8, 0.7])
    metrics = evaluate([target], [detected], masks=masks)[1]
    assert metrics["AP"] == pytest.approx(1) and metrics.get("mask AP", 1) == pytest.approx(1)
    detected["labels"][:2] = 1  # there is no crowd of this class, and no ground truth
    assert evaluate([target], [detected], masks=masks)[1]["AP"] == pytest.approx(1)


class RelativeBoxes:
    """Two images with relative boxes, like Open Images before a file is read; one is a group around another."""

    def __len__(self):
        return 2

    def annotation(self, index):
        boxes = [[0.1, 0.1, 0.4, 0.9], [0.1, 0.1, 0.42, 0.92], [0.5, 0.5, 0.75, 0.625]]
        return make_target(boxes, [0, 0, 2], [False, True, False], image_id=index)


def test_relative_ground_truth_is_scored_too():
    dataset = RelativeBoxes()
    metrics = score_ground_truth(COCOEvaluator(CLASSES), dataset)
    assert [metrics[name] for name in ("AP", "AP75", "AR_100")] == pytest.approx([1] * 3)


def test_masks_in_all_forms_score_the_same(case):
    """Pixels as bool or numbers, tensor or array, run lengths as bytes or text."""
    targets, detections = (part[:12] for part in case)
    metrics = evaluate(targets, detections, masks=True)[1]

    def runs(masks, convert=bytes):
        return [{"size": list(SIZE), "counts": convert(counts)} for counts in rle.encode(masks)]

    forms = (runs, lambda masks: runs(masks, bytes.decode), torch.Tensor.numpy, lambda masks: masks.to(torch.uint8))
    for form in forms:
        converted = [detection | {"masks": form(detection["masks"])} for detection in detections]
        assert evaluate(targets, converted, masks=True)[1] == metrics
        converted = [target | {"masks": form(target["masks"])} for target in targets]
        assert evaluate(converted, detections, masks=True)[1] == metrics


def test_masks_are_kept_as_run_lengths():
    evaluator, shares = COCOEvaluator(CLASSES, masks=True), []
    boxes = [[20, 20, 140, 120]] * 50
    evaluator.update([make_target(boxes, [0] * 50)], [make_detection(boxes, [0] * 50, [1.0] * 50)])
    evaluator.compute(lambda share: shares.append(share) or [share])
    sizes = [len(mask) for mask in shares[0][0][-1]]
    assert len(sizes) == 50 and max(sizes) < 400 < SIZE[0] * SIZE[1] / 50  # bytes, of 30,000 pixels


def test_a_mask_scores_apart_from_its_box():
    """The right box around the left half of the mask: a box AP of 1, and a mask that matches up to an IoU of 0.55."""
    target, detected = make_target([[20, 20, 120, 100]], [1]), make_detection([[20, 20, 120, 100]], [1], [0.9])
    detected["masks"][:, :, 76:] = False  # 56 of 100 columns stay
    metrics = evaluate([target], [detected], masks=True)[1]
    assert 0.55 < float(detected["masks"].sum() / target["masks"].sum()) < 0.6
    assert (metrics["AP"], metrics["mask AP50"], metrics["mask AP75"]) == pytest.approx((1, 1, 0))
    assert metrics["mask AP"] == pytest.approx(0.2)  # matched at 0.5 and 0.55 of ten IoUs


def test_areas_are_those_of_the_masks():
    """A ring of 40 x 40 pixels has a medium box, and as a mask it is a small object."""
    ring = ellipses([[50, 50, 90, 90]]) & ~ellipses([[55, 55, 85, 85]])
    target, detected = make_target([[50, 50, 90, 90]], [0]), make_detection([[50, 50, 90, 90]], [0], [0.9])
    metrics = evaluate([target | {"masks": ring}], [detected | {"masks": ring}], masks=True)[1]
    assert (metrics["mask AP_small"], metrics["mask AP_medium"]) == pytest.approx((1, -1))


def test_errors_of_the_caller(tmp_path):
    target, detected = make_target([[10, 10, 50, 50]], [1]), make_detection([[10, 10, 50, 50]], [1], [0.9])
    evaluator = COCOEvaluator(CLASSES)
    with pytest.raises(ValueError, match="labels from 4 to 4, but 4 classes"):
        evaluator.update([target], [make_detection([[1, 1, 9, 9]], [4], [0.9])])
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.write(tmp_path)
    assert not list(tmp_path.iterdir())
    for masks in (detected["masks"][:, 1:], [{"size": [149, 200], "counts": b"0"}]):
        with pytest.raises(ValueError, match=r"masks of h, w \(149, 200\), but the file has \(150, 200\)"):
            evaluate([target], [detected | {"masks": masks}], masks=True)
    with pytest.raises(ValueError, match="fields differ in length"):
        evaluate([target], [detected | {"masks": detected["masks"][:0]}], masks=True)
    with pytest.raises(KeyError, match="masks"):
        evaluate([target], [{name: detected[name] for name in ("boxes", "labels", "scores")}], masks=True)
