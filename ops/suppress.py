"""From network outputs, scores and boxes to detections."""

import torch
from torchvision.ops import batched_nms

from ops.boxes import decode


@torch.no_grad()
def detections(scores, boxes, image_size, score_threshold=0.01, iou_threshold=0.45, candidates=400, most=200):
    """Class scores [B,P,K] in 0..1 (no background) and boxes [B,P,4] xyxy pixels -> one dict a picture.

    Each dict holds `boxes` float32 [N,4] clipped to image_size (h, w), `labels` int64 [N] from 0 and `scores` [N],
    highest first. A picture keeps its `candidates` best (prior, class) pairs above the threshold in each class, is
    suppressed class by class (torchvision.ops.batched_nms), and keeps `most`. The defaults are SSD's.
    """
    height, width = image_size
    low = boxes.new_tensor([0, 0, 0, 0])
    high = boxes.new_tensor([width, height, width, height])
    found = []
    for image_scores, image_boxes in zip(scores.float(), boxes.float().clamp(min=low, max=high)):
        keep = min(candidates, len(image_scores))
        best, prior = image_scores.topk(keep, dim=0)  # [keep,K]
        label = torch.arange(best.shape[1], device=best.device).expand_as(best)
        candidate = best > score_threshold
        best, prior, label = best[candidate], prior[candidate], label[candidate]
        kept = batched_nms(image_boxes[prior], best, label, iou_threshold)[:most]
        found.append({"boxes": image_boxes[prior[kept]], "labels": label[kept], "scores": best[kept]})
    return found


def from_multibox(outputs, anchors, box_weights, image_size, score_threshold=0.01):
    """SSD's raw outputs {"logits": [B,P,K+1] background first, "offsets": [B,P,4]} -> `detections` of the batch.

    anchors [P,4] xyxy pixels, box_weights of the coder, image_size (h, w) of the network's input.
    """
    scores = outputs["logits"].float().softmax(-1)[..., 1:]
    boxes = decode(outputs["offsets"], anchors, box_weights)
    return detections(scores, boxes, image_size, score_threshold)


@torch.no_grad()
def from_pyramid(
    outputs,
    anchors,
    box_weights,
    shapes,
    level_sizes,
    score_threshold=0.05,
    iou_threshold=0.5,
    candidates=1000,
    most=100,
):
    """RetinaNet's raw outputs {"logits": [B,A,K], "offsets": [B,A,4]} -> one dict a picture, as `detections` gives.

    anchors [A,4] xyxy pixels of the batch, of which level after level owns level_sizes; box_weights of the coder;
    shapes: (h, w) of each picture in the batch before padding, to which its boxes are clipped. Each level of a picture
    keeps its `candidates` best (anchor, class) pairs above the threshold; what all levels keep is suppressed together,
    class by class, and `most` remain. The order of these steps is torchvision's.
    """
    found = []
    for logits, offsets, (height, width) in zip(outputs["logits"], outputs["offsets"], shapes, strict=True):
        levels = zip(*(x.split(level_sizes) for x in (logits, offsets, anchors)))
        boxes, scores, labels = zip(*(best_pairs(*level, box_weights, score_threshold, candidates) for level in levels))
        high = anchors.new_tensor([width, height, width, height])
        boxes, scores, labels = torch.cat(boxes).clamp(min=high * 0, max=high), torch.cat(scores), torch.cat(labels)
        kept = batched_nms(boxes, scores, labels, iou_threshold)[:most]
        found.append({"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})
    return found


def best_pairs(logits, offsets, anchors, box_weights, score_threshold, candidates):
    """(boxes [N,4], scores [N], labels [N]) of a level's best (anchor, class) pairs, N <= candidates."""
    scores = logits.float().sigmoid().flatten()  # [A*K]
    pairs = torch.where(scores > score_threshold)[0]
    scores, best = scores[pairs].topk(min(candidates, len(pairs)))
    pairs = pairs[best]
    anchor = pairs // logits.shape[-1]
    return decode(offsets[anchor], anchors[anchor], box_weights), scores, pairs % logits.shape[-1]
