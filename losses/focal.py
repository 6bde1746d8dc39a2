"""RetinaNet's losses (Lin et al. 2017): focal loss on logits and smooth L1 on coded boxes, for a whole batch.

    losses = focal.loss(network(images), goals, positives)

`goals` and `positives` come from losses/assignment.py. B batch, A anchors, K classes.

At 16 pictures of 800 x 1333 the logits are 240 million numbers, so the loss never holds a target of their shape: it
takes every logit as background, then puts right the one logit of each positive anchor that is not. Loss and gradient
come out of the same few passes, a piece at a time that stays in cache.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGITS_AT_ONCE = 1 << 21  # 8 MB of float32: in cache, and few enough pieces for a GPU


def loss(outputs, goals, positives, alpha=0.25, gamma=2.0, beta=1 / 9, box_weight=1.0, class_weights=None):
    """{"regression_loss": [], "classification_loss": []}, both sums over the batch divided by `positives`.

    outputs        {"logits": [B,A,K], one independent class each, "offsets": [B,A,4]}
    goals          of losses.assignment.assign
    positives      float [] above 0: positive anchors of the batch, averaged over processes
    alpha, gamma   of the focal loss: weight alpha for an anchor's own class and 1 - alpha for what it is not, and the
                   power that makes easy answers count little
    beta           where smooth L1 turns from square to straight
    box_weight     factor on the regression loss; its source has the mean over the coordinates, which is 0.25
    class_weights  float [K] for the term of a positive anchor's own class, or None

    The classification loss sums over the classes of every anchor but those with label -1, the regression loss over the
    four coordinates of positive anchors. In float32 whatever the outputs are; finite and connected to every output
    also where no picture holds a box.
    """
    labels = goals["labels"]
    difference = F.smooth_l1_loss(outputs["offsets"].float(), goals["offsets"], reduction="none", beta=beta).sum(-1)
    regression = (difference * (labels > 0)).sum()  # of [B,A]
    classification = FocalSum.apply(outputs["logits"], labels, alpha, gamma, class_weights)
    return {"regression_loss": box_weight * regression / positives, "classification_loss": classification / positives}


class FocalSum(torch.autograd.Function):
    """logits [B,A,K], labels [B,A] -> the focal loss summed, float32 []; see `loss` for the arguments.

    The gradient is made along with the loss, while the pieces are at hand, and kept for `backward`.
    """

    @staticmethod
    def forward(ctx, logits, labels, alpha, gamma, class_weights):
        rows, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1, 1)  # [BA,K], [BA,1]
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype  # float16 has no place for p ** 3
        gradient = torch.empty_like(rows, dtype=kept) if ctx.needs_input_grad[0] else None
        total = background(rows, labels, 1 - alpha, gamma, gradient)
        positive, own_class = labels > 0, (labels - 1).clamp(min=0)
        value, slope = focal(-rows.gather(1, own_class).float(), gamma)  # [BA,1]
        weight = alpha if class_weights is None else alpha * class_weights[own_class]
        total = total + torch.where(positive, weight * value, 0).sum()
        if gradient is not None:
            there = gradient.gather(1, own_class)
            gradient.scatter_(1, own_class, torch.where(positive, (-weight * slope).to(kept), there))
            ctx.save_for_backward(gradient.view_as(logits))
            ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None, None


def background(rows, labels, weight, gamma, gradient):
    """Sum of `weight` * focal(rows [N,K]) over what is background; its gradient is written into `gradient` [N,K].

    labels int64 [N,1]: the own class of a positive row and every class of a row to leave out count as 0.
    """
    at_once = max(1, LOGITS_AT_ONCE // rows.shape[1])
    sums = []
    for i, (some, label) in enumerate(zip(rows.split(at_once), labels.split(at_once))):
        own_class = (label - 1).clamp(min=0)
        # a logit of -inf costs nothing and pulls nowhere
        own = some.gather(1, own_class).float().masked_fill(label != 0, -torch.inf)
        value, slope = focal(some.float().masked_fill(label < 0, -torch.inf).scatter_(1, own_class, own), gamma)
        sums.append(value.sum())
        if gradient is not None:
            torch.mul(slope, weight, out=gradient[i * at_once : i * at_once + len(some)])
    return weight * torch.stack(sums).sum()


def focal(logits, gamma):
    """What a background answer costs before its weight, p ** gamma * -log(1 - p) with p = sigmoid(logits), and its
    derivative. Of the opposite answer these are the cost and minus the derivative at -logits."""
    p = logits.sigmoid()
    power = p * p if gamma == 2 else p**gamma
    value = F.softplus(logits).mul_(power)
    slope = torch.addcmul(value, value, p, value=-1)  # (1 - p) value, to which belong the power's share and then p's
    return value, slope.mul_(gamma).addcmul_(power, p)
