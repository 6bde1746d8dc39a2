"""Assigning targets to anchors, for a whole batch on its device: the step before the losses of SSD and RetinaNet.

It is separate from the loss because the number of positives, which the losses are divided by, has to be known before
the first forward pass: it is averaged over processes and shared by the micro-batches of a batch.

    matched = assignment.assign(anchors, objects, box_weights)
    num_positives = run.mean(assignment.count_positives(matched)).clamp(min=1 / run.world_size)
    for part, part_matched in assignment.micro_batches(accumulate, images, matched):
        losses = multibox.loss(network(part), part_matched, num_positives)

B batch, A anchors (SSD calls them priors), M objects.
"""

import torch

from ops.boxes import encode, take
from ops.matching import IGNORE, match


@torch.no_grad()
def assign(anchors, objects, box_weights, threshold=0.5, low=None, keep_best=True):
    """The class and the box offsets that each anchor is trained to predict.

    anchors      float32 [A,4] xyxy pixels
    objects      {"boxes": float32 [B,M,4] xyxy in pixels of the same image, "labels": int64 [B,M]} on the same device,
                 of ops.matching.pad_boxes
    box_weights  of ops.boxes.encode
    threshold, low, keep_best  of ops.matching.match. The defaults are SSD's; RetinaNet's are 0.5, 0.4, False

    Returns {"labels": int64 [B,A], 0 background, k + 1 for class k, -1 for anchors without a loss;
    "offsets": float32 [B,A,4], meaningful where labels > 0}.
    """
    boxes, box_labels = objects["boxes"], objects["labels"]
    matched = match(boxes, box_labels, anchors, threshold, low, keep_best)  # [B,A]
    index = matched.clamp(min=0)
    labels = torch.where(matched >= 0, box_labels.gather(1, index) + 1, 0).masked_fill(matched == IGNORE, -1)
    matched_boxes = take(boxes, index)  # [B,A,4]
    matched_boxes = torch.where((labels > 0)[..., None], matched_boxes, anchors)  # padding has no logarithm
    return {"labels": labels, "offsets": encode(matched_boxes, anchors, box_weights)}


def count_positives(matched):
    """Number of positive anchors in the batch, float32 []."""
    return (matched["labels"] > 0).sum().float()


def micro_batches(accumulate, images, matched):
    """`images` [B,...] and the dict `matched` of [B,...] in `accumulate` parts, as torch.chunk cuts them."""
    parts = zip(images.chunk(accumulate), *(value.chunk(accumulate) for value in matched.values()))
    return [(part, dict(zip(matched, values))) for part, *values in parts]
