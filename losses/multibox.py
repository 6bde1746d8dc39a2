"""SSD's MultiBox loss (Liu et al. 2016, section 2.2), for a whole batch on its device.

Two steps, so that the count of positives, the normaliser, is known before the first forward pass: it is averaged over
processes, and shared by the pieces of an accumulated batch.

    goals = multibox.assign(anchors, targets, box_weights)
    positives = run.mean(multibox.count(goals)).clamp(min=1 / run.world)
    losses = multibox.loss(network(images), goals, positives)

B batch, P priors, K classes.
"""

import torch
from torch.nn import functional as F

from ops.boxes import encode
from ops.matching import IGNORE, match, pad_boxes


@torch.no_grad()
def assign(anchors, targets, box_weights, threshold=0.5):
    """What each prior should say.

    anchors      float32 [P,4] xyxy pixels
    targets      B dicts of the data contract, boxes in pixels of the same picture
    box_weights  of the coder, see ops/boxes.py

    Returns {"labels": int64 [B,P], 0 background, k + 1 for class k, -1 for priors on boxes to ignore;
    "offsets": float32 [B,P,4], meaningful where labels > 0}. Matching is ops.matching.match.
    """
    boxes, kind = pad_boxes(targets, anchors.device)  # [B,M,4], [B,M]
    matched = match(boxes, kind, anchors, threshold)  # [B,P]
    box_of = matched.clamp(min=0)
    labels = torch.where(matched >= 0, kind.gather(1, box_of) + 1, 0).masked_fill(matched == IGNORE, -1)
    goal = boxes.gather(1, box_of[..., None].expand(-1, -1, 4))  # [B,P,4]
    goal = torch.where((labels > 0)[..., None], goal, anchors)  # a box of no size has no logarithm
    return {"labels": labels, "offsets": encode(goal, anchors, box_weights)}


def count(goals):
    """Positive priors in the batch, float32 []."""
    return (goals["labels"] > 0).sum().float()


def pieces(number, images, goals):
    """`images` [B,...] and `goals` cut into `number` parts of the batch, for --accumulate."""
    parts = zip(images.chunk(number), *(value.chunk(number) for value in goals.values()))
    return [(part[0], dict(zip(goals, part[1:]))) for part in parts]


def loss(outputs, goals, positives, negatives_each=3, class_weights=None):
    """{"regression_loss": [], "classification_loss": []}, both sums over the batch divided by `positives`.

    outputs         {"logits": [B,P,K+1] background first, "offsets": [B,P,4]}
    goals           of `assign`
    positives       float [] above 0: positive priors of the batch, averaged over processes
    negatives_each  background priors that count, for each positive of the same picture: those with the highest loss. A
                    picture without positives counts as one with a single positive, so that it is learned from
    class_weights   float [K+1] for the classification term, or None

    Smooth L1 on positives, cross entropy on positives and mined negatives. Finite and connected to every output also
    where no picture holds a box.
    """
    logits, labels = outputs["logits"].float(), goals["labels"]
    positive = labels > 0  # [B,P]
    difference = F.smooth_l1_loss(outputs["offsets"].float(), goals["offsets"], reduction="none").sum(-1)  # [B,P]
    regression = (difference * positive).sum()
    used = positive | hardest(logits.detach(), labels, negatives_each)
    entropy = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), weight=class_weights, reduction="none")
    classification = (entropy * used).sum()
    return {"regression_loss": regression / positives, "classification_loss": classification / positives}


@torch.no_grad()
def hardest(logits, labels, negatives_each):
    """bool [B,P]: the background priors with the highest loss, `negatives_each` for each positive of the picture."""
    background_loss = torch.logsumexp(logits, -1) - logits[..., 0]  # [B,P]
    background_loss = background_loss.masked_fill(labels != 0, -1)  # a loss is never below 0
    wanted = (labels > 0).sum(1, keepdim=True).clamp(min=1) * negatives_each  # [B,1]
    order = background_loss.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return (rank < wanted) & (labels == 0)
