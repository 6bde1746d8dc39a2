"""Cross entropy for image classification. B batch, K classes."""

from torch.nn import functional as F


def cross_entropy(logits, labels, count, smoothing=0.0, class_weights=None):
    """{"cross_entropy": []}: the sum over the batch divided by `count`.

    logits         [B,K]
    labels         int64 [B], or float [B,K] for mixed images (mixup, cutmix)
    count          images in the whole batch, averaged over processes; `logits` may be a micro-batch of it
    smoothing      0 to 1: the part of the label that is spread over all classes (Szegedy et al. 2016)
    class_weights  float [K], or None
    """
    total = F.cross_entropy(logits.float(), labels, class_weights, reduction="sum", label_smoothing=smoothing)
    return {"cross_entropy": total / count}
