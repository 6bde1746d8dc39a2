"""Accuracy of a classifier over a whole set, with the tables that come from the same answers. B batch, K classes."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from evaluation.rows import write_csv

TOP = 5


class TopK:
    """The share of pictures whose class is the surest one, `top1`, or among the five surest, `top5`.

    Of equal logits the class with the lower label is the surer one; a logit that is no number is never right. With five
    classes or fewer top5 is 1.0, no picture at all gives 0.0. Every picture is to be in one process's share only.
    """

    def __init__(self):
        self._parts = []  # int32 [3,B] each: label, answer, rank
        self._all = None

    def update(self, labels, logits):
        """Adds pictures: labels int64 [B], logits [B,K], on any device."""
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)}, but logits {list(logits.shape)}")
        labels = labels.to(logits.device)
        own = logits.gather(1, labels[:, None])  # [B,1]
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]  # [B,K]
        rank = (~(logits <= own) | ((logits == own) & before)).sum(1)  # surer classes; what is no number is
        rank = rank.masked_fill(own.isnan()[:, 0], TOP)
        self._parts.append(torch.stack([labels, logits.argmax(1), rank]).int().cpu().numpy())

    def compute(self, gather=None):
        """{"top1", "top5"}, 0 to 1, of all pictures so far, of all processes. Every process gets the same answer."""
        mine = np.concatenate([np.zeros((3, 0), np.int32), *self._parts], axis=1)
        self._all = np.concatenate(gather(mine) if gather else [mine], axis=1)
        rank, count = self._all[2], max(1, self._all.shape[1])
        return {"top1": float((rank < 1).sum() / count), "top5": float((rank < TOP).sum() / count)}

    def confusion(self, num_classes):
        """int64 [K,K]: row the true class, column the answer."""
        label, answer, _ = self._computed()
        cells = label.astype(np.int64) * num_classes + answer
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)

    def per_class(self, num_classes):
        """(pictures int64 [K], top1 [K], top5 [K]) of each true class; NaN where it has no picture."""
        label, _, rank = self._computed()
        pictures = np.bincount(label, minlength=num_classes)
        right = [np.bincount(label[rank < k], minlength=num_classes) for k in (1, TOP)]
        none = np.full(num_classes, np.nan)
        return pictures, *(np.divide(hits, pictures, out=none.copy(), where=pictures > 0) for hits in right)

    def table(self, classes):
        """Pictures, top1 and top5 of each class that has pictures, and of all, as lines of text for a console."""
        rows = [row for row in zip(classes, *self.per_class(len(classes)), strict=True) if row[1]]
        rows.append(("all", self._all.shape[1], *((self._all[2] < k).mean() if rows else 0.0 for k in (1, TOP))))
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:{width}}  {pictures:8}  {top1:.3f}  {top5:.3f}" for name, pictures, top1, top5 in rows]
        return "\n".join([f"{'':{width}}  pictures   top1   top5", *lines])

    def write_tables(self, folder, classes):
        """Writes per_class.csv and confusion.csv into the folder; cells without a value are empty."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [["class", "pictures", "top1", "top5"]]
        for name, pictures, *shares in zip(classes, *self.per_class(len(classes)), strict=True):
            rows.append([name, pictures, *(f"{share:.6f}" if pictures else "" for share in shares)])
        table = self.confusion(len(classes)).tolist()
        write_csv(folder / "per_class.csv", rows)
        head = ["truth / answer", *classes]
        write_csv(folder / "confusion.csv", [head, *([name, *row] for name, row in zip(classes, table, strict=True))])

    def _computed(self):
        if self._all is None:
            raise RuntimeError("call compute() first")
        return self._all


def score_labels(evaluator, labels, num_classes, at_once=256):
    """Metrics of the labels [N] of a set scored as answers: 1.0, or evaluator and data do not fit each other.

    evaluator: a fresh TopK.
    """
    for some in torch.as_tensor(labels, dtype=torch.int64).split(at_once):
        evaluator.update(some, F.one_hot(some, num_classes).float())
    return evaluator.compute()
