"""From raw network outputs to detections.

Detections are a dict for each image, on the CPU: boxes float32 [N,4] xyxy clipped to the image, labels int64 [N] from
0, scores float32 [N], highest first.

A batch is computed as one: a GPU is waited for three times, for the number of candidates, for those that are kept and
for the results.
"""

import torch
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

from ops.boxes import clip, decode, take
from ops.transfer import to_cpu

MAX_CANDIDATES = 1 << 15  # of one call of `nms` on a GPU: its memory grows with the square, to 128 MB


@torch.no_grad()
def multiclass_nms(
    scores, boxes, image_size, score_threshold=0.01, iou_threshold=0.45, max_candidates=400, max_detections=200
):
    """Class scores [B,P,K] in 0..1 without background and boxes [B,P,4] xyxy pixels -> detections of each image.

    Of each class, the `max_candidates` top-scoring boxes above the threshold enter NMS; `max_detections` of all classes
    remain. image_size is (h, w). The defaults are SSD's.
    """
    scores, prior = scores.float().transpose(1, 2).topk(min(max_candidates, scores.shape[1]), dim=2)  # [B,K,n]
    labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(scores)
    boxes = take(clip_boxes_to_image(boxes.float(), image_size), prior.flatten(1))
    return _detections(boxes, scores.flatten(1), labels.flatten(1), score_threshold, iou_threshold, max_detections)


@torch.no_grad()
def ssd_detections(
    outputs, anchors, box_weights, image_size, score_threshold=0.01, iou_threshold=0.45, max_detections=200
):
    """SSD's raw outputs {"logits": [B,P,K+1] background first, "offsets": [B,P,4]} -> detections of each image.

    anchors [P,4] xyxy pixels, box_weights of ops.boxes.decode, image_size (h, w) of the network's input.
    """
    scores = outputs["logits"].float().softmax(-1)[..., 1:]
    boxes = decode(outputs["offsets"], anchors, box_weights)
    limits = {"iou_threshold": iou_threshold, "max_detections": max_detections}
    return multiclass_nms(scores, boxes, image_size, score_threshold, **limits)


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
    classes, levels = outputs["logits"].shape[2], []
    parts = (outputs[name].split(level_sizes, 1) for name in ("logits", "offsets"))
    for logits, offsets, level_anchors in zip(*parts, anchors.split(level_sizes)):
        logits = logits.flatten(1)  # [B,A*K]
        logits, pair = logits.topk(min(max_candidates, logits.shape[1]), dim=1)
        anchor = pair // classes
        boxes = decode(take(offsets, anchor), level_anchors[anchor], box_weights)
        levels.append((boxes, logits.float().sigmoid(), pair % classes))
    boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels))  # [B,n,4], [B,n], [B,n]
    return _detections(clip(boxes, shapes), scores, labels, score_threshold, iou_threshold, max_detections)


def _detections(boxes, scores, labels, score_threshold, iou_threshold, max_detections):
    """Candidates [B,n,4], [B,n], [B,n] -> detections: at most `max_detections` of each image after NMS."""
    keep = suppress(boxes, scores, labels, scores > score_threshold, iou_threshold)
    scores, index = scores.masked_fill(~keep, -1).topk(min(max_detections, scores.shape[1]), dim=1)
    scores, boxes, labels = to_cpu(scores, take(boxes, index), take(labels, index))
    found = scores >= 0
    images = zip(boxes, labels, scores, found)
    return [{"boxes": b[f], "labels": k[f], "scores": s[f]} for b, k, s, f in images]


def suppress(boxes, scores, labels, valid, iou_threshold):
    """Non-maximum suppression within each class of each image: bool [B,n], the boxes that are kept.

    boxes  [B,n,4] xyxy, coordinates of at least 0; scores [B,n]; labels int64 [B,n], at least 0
    valid  bool [B,n], which boxes are candidates
    """
    keep = torch.zeros_like(valid)
    image, row = valid.nonzero(as_tuple=True)
    if not len(row):
        return keep
    boxes, scores, labels = boxes[image, row], scores[image, row], labels[image, row]
    if boxes.is_cuda and len(row) <= MAX_CANDIDATES:
        keep.view(-1)[(image * valid.shape[1] + row)[nms_of_groups(boxes, scores, labels, image, iou_threshold)]] = True
        return keep
    counts = image.bincount(minlength=len(valid)).tolist()
    for of_image, *candidates in zip(keep, *(x.split(counts) for x in (row, boxes, scores, labels))):
        index, *candidates = candidates
        of_image[index[batched_nms(*candidates, iou_threshold)]] = True
    return keep


def nms_of_groups(boxes, scores, labels, image, iou_threshold):
    """torchvision's `nms` in one call for boxes [n,4] of several classes and images; returns the indices it keeps.

    Boxes of different groups are moved apart, as in `batched_nms`. In float64 that changes no IoU.
    """
    side = boxes.max() + 1
    group = image * (labels.max() + 1) + labels
    return nms(boxes.double() + (group * side.double())[:, None], scores.double(), iou_threshold)
