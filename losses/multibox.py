"""SSD's MultiBox loss (Liu et al. 2016, section 2.2), for a whole batch on its device.

    losses = multibox.loss(network(images), goals, positives)

`goals` and `positives` come from losses/assignment.py. B batch, P priors, K classes.
"""

import torch
from torch.nn import functional as F


def loss(outputs, goals, positives, negatives_each=3, class_weights=None):
    """{"regression_loss": [], "classification_loss": []}, both sums over the batch divided by `positives`.

    outputs         {"logits": [B,P,K+1] background first, "offsets": [B,P,4]}
    goals           of losses.assignment.assign
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
