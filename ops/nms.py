"""From raw network outputs to detections.

Detections are a dict for each image: boxes float32 [N,4] xyxy clipped to the image, labels int64 [N] from 0, scores
float32 [N], highest first.
"""

import torch
from torchvision.ops import batched_nms, clip_boxes_to_image

from ops.boxes import decode


@torch.no_grad()
def multiclass_nms(
    scores, boxes, image_size, score_threshold=0.01, iou_threshold=0.45, max_candidates=400, max_detections=200
):
    """Class scores [B,P,K] in 0..1 without background and boxes [B,P,4] xyxy pixels -> detections of each image.

    Of each class, the `max_candidates` top-scoring boxes above the threshold enter NMS (torchvision.ops.batched_nms);
    `max_detections` of all classes remain. image_size is (h, w). The defaults are SSD's.
    """
    detections = []
    for image_scores, image_boxes in zip(scores.float(), clip_boxes_to_image(boxes.float(), image_size)):
        top, prior = image_scores.topk(min(max_candidates, len(image_scores)), dim=0)  # [n,K]
        label = torch.arange(top.shape[1], device=top.device).expand_as(top)
        above = top > score_threshold
        top, prior, label = top[above], prior[above], label[above]
        keep = batched_nms(image_boxes[prior], top, label, iou_threshold)[:max_detections]
        detections.append({"boxes": image_boxes[prior[keep]], "labels": label[keep], "scores": top[keep]})
    return detections


@torch.no_grad()
def ssd_detections(outputs, anchors, box_weights, image_size, score_threshold=0.01):
    """SSD's raw outputs {"logits": [B,P,K+1] background first, "offsets": [B,P,4]} -> detections of each image.

    anchors [P,4] xyxy pixels, box_weights of ops.boxes.decode, image_size (h, w) of the network's input.
    """
    scores = outputs["logits"].float().softmax(-1)[..., 1:]
    boxes = decode(outputs["offsets"], anchors, box_weights)
    return multiclass_nms(scores, boxes, image_size, score_threshold)


@torch.no_grad()
def retinanet_detections(
    outputs,
    anchors,
    box_weights,
    shapes,
    level_sizes,
    score_threshold=0.05,
    iou_threshold=0.5,
    max_candidates=1000,
    max_detections=100,
):
    """RetinaNet's raw outputs {"logits": [B,A,K], "offsets": [B,A,4]} -> detections of each image.

    anchors      [A,4] xyxy pixels, level after level
    box_weights  of ops.boxes.decode
    shapes       (h, w) of each image in the batch before padding, to which its boxes are clipped
    level_sizes  number of anchors of each level

    As in torchvision: the `max_candidates` top-scoring (anchor, class) pairs of each level above the threshold enter
    NMS together; `max_detections` of all classes remain.
    """
    detections = []
    for logits, offsets, shape in zip(outputs["logits"], outputs["offsets"], shapes, strict=True):
        levels = zip(*(x.split(level_sizes) for x in (logits, offsets, anchors)))
        candidates = [topk_candidates(*level, box_weights, score_threshold, max_candidates) for level in levels]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates))
        boxes = clip_boxes_to_image(boxes, shape)
        keep = batched_nms(boxes, scores, labels, iou_threshold)[:max_detections]
        detections.append({"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]})
    return detections


def topk_candidates(logits, offsets, anchors, box_weights, score_threshold, max_candidates):
    """(boxes [N,4], scores [N], labels [N]) of a level's top-scoring (anchor, class) pairs, N <= max_candidates."""
    scores = logits.float().sigmoid().flatten()  # [A*K]
    pairs = torch.where(scores > score_threshold)[0]
    scores, top = scores[pairs].topk(min(max_candidates, len(pairs)))
    pairs = pairs[top]
    anchor = pairs // logits.shape[-1]
    return decode(offsets[anchor], anchors[anchor], box_weights), scores, pairs % logits.shape[-1]
