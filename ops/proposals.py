"""Proposals and detections of a two-stage detector, in tensors whose sizes do not depend on values.

torchvision selects with torch.where, image by image, and each time waits until the GPU has counted. Here every image
has the same number of rows. Where it has fewer boxes, the last rows are padding: their score is -1, their box zeros.

B batch, A anchors, N proposals or candidates per image, K classes.
"""

import torch

from ops import nms
from ops.boxes import clip, decode, take

PAIRS_PER_IMAGE = 8192  # of a proposal and a class, that enter the NMS of `select_detections`


@torch.no_grad()
def select_proposals(objectness, deltas, anchors, shapes, level_sizes, before_nms, after_nms, iou_threshold, min_size):
    """The proposals of torchvision's RegionProposalNetwork.filter_proposals: [B,N,4] xyxy pixels, the best first.

    objectness [B,A], deltas [B,A,4], anchors [A,4]  of all levels; offsets from anchors have weights 1
    shapes       (h, w) of each image, to which its boxes are clipped
    level_sizes  number of anchors of each level
    before_nms   maximum number of boxes of each level that enter its NMS
    after_nms    maximum number of proposals, of all levels
    min_size     minimum width and height in pixels
    """
    starts = [sum(level_sizes[:level]) for level in range(len(level_sizes))]
    levels = objectness.split(level_sizes, dim=1)
    top = [x.topk(min(before_nms, x.shape[1]), dim=1).indices + start for x, start in zip(levels, starts)]
    group = torch.cat([torch.full_like(index, level) for level, index in enumerate(top)], dim=1)
    top = torch.cat(top, dim=1)  # [B,n]
    boxes = clip(decode(take(deltas, top), anchors[top], (1.0, 1.0, 1.0, 1.0)), shapes)
    scores = take(objectness, top).float().sigmoid()
    scores = scores.masked_fill(~(is_large(boxes, min_size) & (scores >= 0)), -1)
    scores, best = best_after_nms(boxes, scores, group, iou_threshold, after_nms)
    if not scores.is_cuda:  # the number is known at no cost: no heads for rows that are padding in every image
        best = best[:, : int((scores >= 0).sum(1).max())]
    return take(boxes, best).masked_fill(scores[:, : best.shape[1], None] < 0, 0)


@torch.no_grad()
def select_detections(logits, offsets, proposals, shapes, weights, score_threshold, iou_threshold, max_detections):
    """The detections of torchvision's RoIHeads.postprocess_detections: boxes [B,N,4] xyxy pixels, scores [B,N], highest
    first, labels int64 [B,N] from 0, without background.

    logits [B,P,K+1], offsets [B,P,4(K+1)], proposals [B,P,4]  background first; weights: those of the offsets
    shapes     (h, w) of each image, to which its boxes are clipped

    Of each image, the PAIRS_PER_IMAGE top-scoring pairs of a proposal and a class enter NMS. torchvision has no limit;
    pairs beyond it matter only if these leave fewer than `max_detections`.
    """
    classes = logits.shape[-1] - 1
    scores = logits.float().softmax(-1)[..., 1:].masked_fill(is_padding(proposals)[..., None], -1).flatten(1)
    scores, pair = highest(scores, PAIRS_PER_IMAGE)
    proposal, label = pair // classes, pair % classes
    offsets = take(offsets.unflatten(-1, (-1, 4)).flatten(1, 2), proposal * (classes + 1) + label + 1)
    boxes = clip(decode(offsets, take(proposals, proposal), weights), shapes)
    scores = scores.masked_fill(~((scores > score_threshold) & is_large(boxes, 1e-2)), -1)
    scores, best = best_after_nms(boxes, scores, label, iou_threshold, max_detections)
    return take(boxes, best), scores, take(label, best)


def is_padding(boxes):
    """Which of the boxes [...,4] are the zeros that fill up an image's rows: bool [...]."""
    return boxes[..., 2] <= boxes[..., 0]


def is_large(boxes, min_size):
    """Boxes [...,4] at least `min_size` pixels wide and high: bool [...]."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)


def highest(scores, limit):
    """(scores, index), [B,n] each, of scores [B,N]. In this order where scores are equal, which topk does not promise:
    close to 1, many probabilities of float32 are equal."""
    scores, index = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :limit], index[:, :limit]


def best_after_nms(boxes, scores, group, iou_threshold, limit):
    """NMS in each image and group: (scores [B,n] of those that remain, the best first, -1 padding; their index [B,n]).

    boxes [B,N,4], group int64 [B,N]
    scores [B,N]   boxes with a score below 0 suppress none and do not remain
    """
    if boxes.is_cuda:
        keep = nms_without_counting(boxes, scores, group, iou_threshold)
    else:
        keep = nms.suppress(boxes, scores, group, scores >= 0, iou_threshold)
    return highest(scores.masked_fill(~keep, -1), limit)


def nms_without_counting(boxes, scores, group, iou_threshold):
    """The boxes that are kept, bool [B,N]: as many images as allowed in one call of NMS, each of which waits once."""
    parts = -(-scores.numel() // nms.MAX_CANDIDATES)
    if parts > 1 and len(scores) > 1:
        parts = zip(*(x.chunk(parts) for x in (boxes, scores, group)))
        return torch.cat([nms_without_counting(*part, iou_threshold) for part in parts])
    boxes = boxes.masked_fill(scores[..., None] < 0, 0)  # may be NaN
    image = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(group)
    flat = (x.flatten(0, 1) for x in (boxes, scores, group, image))
    keep = nms.nms_of_groups(*flat, iou_threshold)
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, keep, True).view(scores.shape)
