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
