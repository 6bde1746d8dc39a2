"""What each anchor should say, for a whole batch on its device: the step before every detector's loss.

Apart from the loss so that the count of positives, the normaliser, is known before the first forward pass: it is
averaged over processes, and shared by the pieces of an accumulated batch.

    goals = assignment.assign(anchors, targets, box_weights)
    positives = run.mean(assignment.count(goals)).clamp(min=1 / run.world)
    for part, part_goals in assignment.pieces(number, images, goals):
        losses = multibox.loss(network(part), part_goals, positives)

B batch, A anchors (SSD calls them priors), M objects.
"""

import torch

from ops.boxes import encode
from ops.matching import IGNORE, match, pad_boxes


@torch.no_grad()
def assign(anchors, targets, box_weights, threshold=0.5, low=None, keep_best=True):
    """What each anchor should say.

    anchors      float32 [A,4] xyxy pixels
    targets      B dicts of the data contract, boxes in pixels of the same picture
    box_weights  of the coder, see ops/boxes.py
    threshold, low, keep_best  of ops.matching.match. The defaults are SSD's; RetinaNet's are 0.5, 0.4, False

    Returns {"labels": int64 [B,A], 0 background, k + 1 for class k, -1 for anchors that take no part;
    "offsets": float32 [B,A,4], meaningful where labels > 0}.
    """
    boxes, kind = pad_boxes(targets, anchors.device)  # [B,M,4], [B,M]
    matched = match(boxes, kind, anchors, threshold, low, keep_best)  # [B,A]
    box_of = matched.clamp(min=0)
    labels = torch.where(matched >= 0, kind.gather(1, box_of) + 1, 0).masked_fill(matched == IGNORE, -1)
    goal = boxes.gather(1, box_of[..., None].expand(-1, -1, 4))  # [B,A,4]
    goal = torch.where((labels > 0)[..., None], goal, anchors)  # a box of no size has no logarithm
    return {"labels": labels, "offsets": encode(goal, anchors, box_weights)}


def count(goals):
    """Positive anchors in the batch, float32 []."""
    return (goals["labels"] > 0).sum().float()


def pieces(number, images, goals):
    """`images` [B,...] and `goals` cut into `number` parts of the batch, for --accumulate."""
    parts = zip(images.chunk(number), *(value.chunk(number) for value in goals.values()))
    return [(part[0], dict(zip(goals, part[1:]))) for part in parts]
