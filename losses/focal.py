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

LOGITS_AT_ONCE = 1 << 19  # 2 MB of float32: in cache, and few enough pieces for a GPU


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
        total = background(rows, torch.where(labels < 0, 0.0, 1 - alpha), gamma, gradient)
        positive, own_class = labels > 0, (labels - 1).clamp(min=0)
        own = rows.gather(1, own_class).float()  # [BA,1]
        said = focal(own, gamma)[0]  # as if it were background, which is what was summed
        value, slope = focal(-own, gamma)
        weight = alpha if class_weights is None else alpha * class_weights[own_class]
        total = total + torch.where(positive, weight * value - (1 - alpha) * said, 0).sum()
        if gradient is not None:
            # flat: scatter_ would copy the whole gradient
            place = (torch.arange(len(rows), device=rows.device) * rows.shape[1])[:, None] + own_class  # [BA,1]
            there = gradient.gather(1, own_class)
            gradient.view(-1)[place] = torch.where(positive, (-weight * slope).to(kept), there)
            ctx.save_for_backward(gradient.view_as(logits))
            ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None, None


def background(rows, weights, gamma, gradient):
    """Sum of weights [N,1] * focal(rows [N,K]); its gradient is written into `gradient` [N,K]."""
    at_once = max(1, LOGITS_AT_ONCE // rows.shape[1])
    sums = []
    for i, (some, weight) in enumerate(zip(rows.split(at_once), weights.split(at_once))):
        p, power, entropy = parts(some.float(), gamma)
        power.mul_(weight)
        sums.append(torch.dot(power.view(-1), entropy.view(-1)))
        if gradient is not None:
            torch.mul(power, slope_of(p, entropy, gamma), out=gradient[i * at_once : i * at_once + len(some)])
    return torch.stack(sums).sum()


def parts(logits, gamma):
    """(p, p ** gamma, -log(1 - p)) of p = sigmoid(logits): the last two make what a background answer costs."""
    p = logits.sigmoid()
    return p, p * p if gamma == 2 else p**gamma, F.softplus(logits)


def slope_of(p, entropy, gamma):
    """The derivative of p ** gamma * entropy by the logit, over p ** gamma."""
    return torch.add(p, torch.addcmul(entropy, entropy, p, value=-1), alpha=gamma)


def focal(logits, gamma):
    """What a background answer costs before its weight, p ** gamma * -log(1 - p) with p = sigmoid(logits), and its
    derivative. Of the opposite answer these are the cost and minus the derivative at -logits."""
    p, power, entropy = parts(logits, gamma)
    return power * entropy, power * slope_of(p, entropy, gamma)
