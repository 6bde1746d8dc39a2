"""Cross entropy for image classification. B batch, K classes."""

from torch.nn import functional as F


def loss(logits, labels, count, smoothing=0.0, class_weights=None):
    """{"cross_entropy": []}: the sum over the batch divided by `count`.

    logits     [B,K]
    labels     int64 [B], or float [B,K] where pictures are mixed (mixup, cutmix)
    count      pictures of the whole batch, averaged over processes; a piece of a batch still gives that of the whole
    smoothing  0 to 1: the share of the label that is spread over all classes (Szegedy et al. 2016)
    class_weights  float [K], or None
    """
    total = F.cross_entropy(logits.float(), labels, class_weights, reduction="sum", label_smoothing=smoothing)
    return {"cross_entropy": total / count}
