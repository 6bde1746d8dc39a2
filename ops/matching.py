"""Which anchor answers for which box, for a whole batch at once."""

import torch

from ops.boxes import pairwise_iou

BACKGROUND, IGNORE = -1, -2


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
def match(boxes, kind, anchors, threshold):
    """SSD's matching (Liu et al. 2016): boxes [B,M,4], kind [B,M] (see `pad_boxes`), anchors [A,4] -> int64 [B,A].

    The result is the index of the box that an anchor answers for, BACKGROUND, or IGNORE. An anchor is positive at
    IoU >= threshold with its best box, and every box keeps its best anchor however small the IoU; where two boxes want
    the same anchor the later one has it, as in the source. An anchor that is not positive and lies at IoU >= threshold
    on a box to ignore is IGNORE.
    """
    iou = pairwise_iou(boxes, anchors)  # [B,M,A]
    real = kind >= 0  # [B,M]
    overlap, box_of = iou.masked_fill(~real[..., None], -1).max(dim=1)  # [B,A]
    matched = box_of.masked_fill(overlap < threshold, BACKGROUND)
    on_ignored = iou.masked_fill((kind != IGNORE)[..., None], -1).amax(dim=1) >= threshold
    matched = matched.masked_fill((matched == BACKGROUND) & on_ignored, IGNORE)
    best_anchor = iou.argmax(dim=2)  # [B,M]
    order = torch.arange(boxes.shape[1], device=boxes.device).expand_as(kind).masked_fill(~real, BACKGROUND)
    forced = torch.full_like(matched, BACKGROUND).scatter_reduce(1, best_anchor, order, "amax")
    return torch.where(forced >= 0, forced, matched)
