"""Evaluators: `update(targets, detections)` for every batch, then `compute(gather)` once: a flat dict of floats.

`targets` and `detections` are lists with one dict a picture, boxes of both on the same scale (the loop sees to that).
Labels count from 0 and background is no class.

target      boxes [M,4] xyxy, labels [M], ignore bool [M], image_id int
detection   boxes [N,4] xyxy, labels [N], scores [N]
both        where masks are scored: `masks`, bool or 0 and 1 [N,H,W] in the file's pixels, or a list of N of COCO's run
            lengths {"size": [h, w], "counts": bytes or str}; the target's `size` (h, w) is the file's

`gather(obj)` returns the list of every process's obj; None means one process. A picture that two processes evaluated
counts once.
"""

import torch


def score_truth(evaluator, dataset):
    """Metrics of the ground truth of `dataset` scored as predictions: 1.0, or evaluator and data do not fit each other.

    evaluator: a fresh one. Reads no picture, so it takes seconds also for a large set. Boxes to be ignored (crowds,
    groups, difficult ones) are no predictions.
    """
    for index in range(len(dataset)):
        truth = dataset.annotation(index)
        counts = ~truth["ignore"]
        found = {"boxes": truth["boxes"][counts], "labels": truth["labels"][counts]}
        if "masks" in truth:
            found["masks"] = [mask for mask, counted in zip(truth["masks"], counts.tolist()) if counted]
        evaluator.update([truth], [{**found, "scores": torch.ones(len(found["labels"]))}])
    return evaluator.compute()
