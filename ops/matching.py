"""Which anchor answers for which box, for a whole batch at once."""

import torch

from ops.boxes import pairwise_iou

BACKGROUND, IGNORE = -1, -2
PAIRS_AT_ONCE = 1 << 26  # pairs of a box and an anchor: bounds each temporary tensor to 256 MB


def pad_boxes(targets, device):
    """A list of targets as two tensors: boxes float32 [B,M,4] and kind int64 [B,M] of the most boxes M in the batch.

    `kind` is the label, -1 for padding, -2 for a box to ignore. One copy to the device, whatever the batch size.
    """
    most = max(1, *(len(t["labels"]) for t in targets))
    boxes = torch.zeros(len(targets), most, 4)
    kind = torch.full((len(targets), most), BACKGROUND)
    for i, target in enumerate(targets):
        count = len(target["labels"])
        boxes[i, :count] = target["boxes"]
        kind[i, :count] = target["labels"].masked_fill(target["ignore"], IGNORE)
    return boxes.to(device, non_blocking=True), kind.to(device, non_blocking=True)


@torch.no_grad()
def match(boxes, kind, anchors, threshold, low=None, keep_best=True):
    """Boxes [B,M,4], kind [B,M] (see `pad_boxes`), anchors [A,4] -> int64 [B,A]: the index of the box that an anchor
    answers for, BACKGROUND, or IGNORE.

    threshold  an anchor is positive at IoU >= threshold with its best real box
    low        below it an anchor is BACKGROUND, from there up to the threshold IGNORE; None: the threshold
    keep_best  every real box keeps its best anchor, however small the IoU; where two boxes want the same anchor the
               later one has it, as in SSD's source

    An anchor that is not positive and lies at IoU >= threshold on a box to ignore is IGNORE. SSD (Liu et al. 2016)
    matches at 0.5 and keeps the best; RetinaNet (Lin et al. 2017) at 0.5 and 0.4, and its source keeps none.
    """
    at_once = max(1, PAIRS_AT_ONCE // (boxes.shape[1] * max(1, len(anchors))))  # pictures
    rule = (anchors, threshold, threshold if low is None else low, keep_best)
    return torch.cat([match_some(*some, *rule) for some in zip(boxes.split(at_once), kind.split(at_once))])


def match_some(boxes, kind, anchors, threshold, low, keep_best):
    """`match` for as many pictures as may share one [B,M,A] tensor."""
    real = kind >= 0  # [B,M]
    sign = real.float() - (kind == IGNORE).float()  # 1 real, -1 to ignore, 0 padding
    iou = pairwise_iou(boxes, anchors).mul_(sign[..., None])  # [B,M,A]; one tensor serves both kinds of box
    overlap, box_of = iou.max(dim=1)  # [B,A]
    matched = box_of.masked_fill(overlap < threshold, IGNORE)
    matched = matched.masked_fill((overlap < low) | (overlap <= 0), BACKGROUND)
    deepest = iou.amin(dim=1)  # in a box to ignore
    on_ignored = (deepest < 0) & (deepest <= -threshold)
    matched = matched.masked_fill((matched == BACKGROUND) & on_ignored, IGNORE)
    if not keep_best:
        return matched
    best_anchor = iou.argmax(dim=2)  # [B,M]
    order = torch.arange(boxes.shape[1], device=boxes.device).expand_as(kind).masked_fill(~real, BACKGROUND)
    forced = torch.full_like(matched, BACKGROUND).scatter_reduce(1, best_anchor, order, "amax")
    return torch.where(forced >= 0, forced, matched)
