"""The rows of predict.py's JSON files."""

import json

import torch
from pycocotools import mask as coco_masks

from evaluation import prediction_files

NAMES = ["cat", "dog"]


def test_detections_in_cocos_results_format():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[1, 5:9, 3:7] = True
    detections = {"boxes": torch.tensor([[1.0, 2, 4.126, 8], [3, 5, 7, 9]]), "labels": torch.tensor([1, 0])}
    detections["scores"] = torch.tensor([0.987654321, 0.5])
    info = {"id": 7, "file_name": "clip.mp4", "frame": 3, "height": 20, "width": 30}
    expected = {"image_id": 7, "category_id": 2, "bbox": [1.0, 2.0, 3.13, 6.0], "score": 0.98765}
    expected |= {"category_name": "dog", "file_name": "clip.mp4", "frame": 3}
    assert prediction_files.coco(detections, NAMES, info)[0] == expected
    rows = json.loads(json.dumps(prediction_files.coco(detections | {"masks": masks}, NAMES, info)))
    decoded = coco_masks.decode([row["segmentation"] for row in rows])
    assert torch.equal(torch.from_numpy(decoded).permute(2, 0, 1).bool(), masks)


def test_without_detections_there_are_no_rows():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    info = {"id": 1, "file_name": "a.jpg"}
    assert prediction_files.coco(nothing, NAMES, info) == []
    assert prediction_files.coco(nothing | {"masks": torch.zeros(0, 9, 9).bool()}, NAMES, info) == []


def test_predictions_of_a_classifier():
    predictions = {"labels": torch.tensor([1, 0]), "scores": torch.tensor([0.75, 0.25])}
    row = prediction_files.classification(predictions, NAMES, {"id": 4, "file_name": "a.jpg", "height": 9, "width": 9})
    answers = [{"label": 1, "name": "dog", "score": 0.75}, {"label": 0, "name": "cat", "score": 0.25}]
    assert row == {"image_id": 4, "file_name": "a.jpg", "answers": answers}
