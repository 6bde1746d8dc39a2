"""Matching anchors to boxes, for a whole batch at once."""

import torch

from ops.boxes import pairwise_iou

BACKGROUND, IGNORE = -1, -2
MAX_PAIRS = 1 << 26  # pairs of a box and an anchor at once: bounds each temporary tensor to 256 MB


def pad_boxes(targets):
    """A list of targets as {"boxes": float32 [B,M,4], "labels": int64 [B,M]}, M the maximum in the batch.

    A label is BACKGROUND where a row is padding and IGNORE where a box is to be ignored.
    """
    max_boxes = max(1, *(len(t["labels"]) for t in targets))
    boxes = torch.zeros(len(targets), max_boxes, 4)
    labels = torch.full((len(targets), max_boxes), BACKGROUND)
    for i, target in enumerate(targets):
        count = len(target["labels"])
        boxes[i, :count] = target["boxes"]
        labels[i, :count] = target["labels"].masked_fill(target["ignore"], IGNORE)
    return {"boxes": boxes, "labels": labels}


@torch.no_grad()
def match(boxes, labels, anchors, threshold, low=None, keep_best=True):
    """The box that each anchor is matched to: int64 [B,A], an index of `boxes`, or BACKGROUND, or IGNORE.

    boxes [B,M,4], labels [B,M]  of `pad_boxes`
    anchors    [A,4]
    threshold  an anchor is positive if its maximum IoU with a real box is at least this
    low        an anchor is BACKGROUND below this and IGNORE between it and the threshold; None: the threshold
    keep_best  each real box is matched to its best anchor, however small the IoU; where two boxes have the same best
               anchor, the later box is matched, as in dusty-nv/pytorch-ssd

    An anchor is also IGNORE if it is not positive and has an IoU of at least the threshold with a box to ignore. SSD
    (Liu et al. 2016) matches at 0.5 with keep_best; RetinaNet (Lin et al. 2017) at 0.5 and 0.4, without it in
    yhenon/pytorch-retinanet.
    """
    images_at_once = max(1, MAX_PAIRS // (boxes.shape[1] * max(1, len(anchors))))
    low = threshold if low is None else low
    parts = zip(boxes.split(images_at_once), labels.split(images_at_once))
    return torch.cat([_match_part(*part, anchors, threshold, low, keep_best) for part in parts])


def _match_part(boxes, labels, anchors, threshold, low, keep_best):
    """`match` for as many images as fit into one [B,M,A] tensor."""
    real = labels >= 0  # [B,M]
    sign = real.float() - (labels == IGNORE).float()  # 1 real, -1 to ignore, 0 padding
    iou = pairwise_iou(boxes, anchors).mul_(sign[..., None])  # [B,M,A]; one tensor serves both kinds of box
    max_iou, box_index = iou.max(dim=1)  # [B,A]
    matched = box_index.masked_fill(max_iou < threshold, IGNORE)
    matched = matched.masked_fill((max_iou < low) | (max_iou <= 0), BACKGROUND)
    ignored_iou = -iou.amin(dim=1)  # the maximum over boxes to ignore
    on_ignored = (ignored_iou > 0) & (ignored_iou >= threshold)
    matched = matched.masked_fill((matched == BACKGROUND) & on_ignored, IGNORE)
    if not keep_best:
        return matched
    best_anchor = iou.argmax(dim=2)  # [B,M]
    order = torch.arange(boxes.shape[1], device=boxes.device).expand_as(labels).masked_fill(~real, BACKGROUND)
    forced = torch.full_like(matched, BACKGROUND).scatter_reduce(1, best_anchor, order, "amax")
    return torch.where(forced >= 0, forced, matched)
