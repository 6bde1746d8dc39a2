"""SSD's MultiBox loss (Liu et al. 2016, section 2.2), for a whole batch on its device. B batch, P priors, K classes.

losses = multibox.loss(network(images), matched, num_positives)  # the last two from losses/assignment.py
"""

import torch
from torch.nn import functional as F


def loss(outputs, matched, num_positives, neg_to_pos_ratio=3, class_weights=None):
    """{"regression_loss": [], "classification_loss": []}, both sums over the batch divided by `num_positives`.

    outputs           {"logits": [B,P,K+1] background first, "offsets": [B,P,4]}
    matched           of losses.assignment.assign
    num_positives     float [] above 0: positive priors in the batch, averaged over processes
    neg_to_pos_ratio  background priors with a loss per positive prior of the same image: those with the highest loss.
                      An image without positives counts as one with a single positive
    class_weights     float [K+1] for the classification loss, or None

    Smooth L1 on positives, cross entropy on positives and mined negatives. Finite and connected to every output even
    if no image has a box.
    """
    logits, labels = outputs["logits"].float(), matched["labels"]
    positive = labels > 0  # [B,P]
    distance = F.smooth_l1_loss(outputs["offsets"].float(), matched["offsets"], reduction="none").sum(-1)  # [B,P]
    regression = (distance * positive).sum()
    used = positive | hard_negatives(logits.detach(), labels, neg_to_pos_ratio)
    entropy = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), weight=class_weights, reduction="none")
    classification = (entropy * used).sum()
    return {"regression_loss": regression / num_positives, "classification_loss": classification / num_positives}


@torch.no_grad()
def hard_negatives(logits, labels, neg_to_pos_ratio):
    """bool [B,P]: the background priors with the highest loss, `neg_to_pos_ratio` per positive prior of the image."""
    background_loss = torch.logsumexp(logits, -1) - logits[..., 0]  # [B,P]
    background_loss = background_loss.masked_fill(labels != 0, -1)  # a loss is never below 0
    count = (labels > 0).sum(1, keepdim=True).clamp(min=1) * neg_to_pos_ratio  # [B,1]
    rank = background_loss.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < count) & (labels == 0)
