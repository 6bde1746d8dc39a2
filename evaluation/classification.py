"""Accuracy of a classifier, per class too, and its confusion matrix. B images of a batch, K classes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn import functional as F

from evaluation import Evaluator
from utils import files

TOP = 5


class TopKAccuracy(Evaluator):
    """The share of images whose class has the highest logit, `top1`, or one of the five highest, `top5`.

    Of equal logits the lower label comes first; a logit of NaN is never correct. With five classes or fewer top5 is
    1.0, without images both are 0.0. Each image must be in the share of one process only.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self._batches = []  # int32 [3,B] each, on their device: label, prediction, rank of the label

    def update(self, labels: torch.Tensor, logits: torch.Tensor) -> None:
        """Add the images of a batch: labels int64 [B], logits [B,K], on any device."""
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)}, but logits {list(logits.shape)}")
        labels = labels.to(logits.device)[:, None]
        own = logits.gather(1, labels)  # [B,1]
        lower = torch.arange(logits.shape[1], device=logits.device) < labels  # [B,K]
        rank = (~(logits <= own) | ((logits == own) & lower)).sum(1)  # classes before the label, those of NaN too
        rank = rank.masked_fill(own.isnan()[:, 0], TOP)
        self._batches.append(torch.stack([labels[:, 0], logits.argmax(1), rank]).int())

    def compute(self, gather: Callable | None = None) -> dict[str, float]:
        """{"top1", "top5"}, 0 to 1."""
        mine = torch.cat(self._batches, 1).cpu().numpy() if self._batches else np.zeros((3, 0), np.int32)
        self._computed = np.concatenate(gather(mine) if gather else [mine], axis=1)
        rank, count = self._computed[2], max(1, self._computed.shape[1])
        return {"top1": float((rank < 1).sum() / count), "top5": float((rank < TOP).sum() / count)}

    def confusion(self) -> np.ndarray:
        """int64 [K,K]: row the true class, column the predicted one."""
        label, prediction, _ = self.computed()
        table = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(table, (label, prediction), 1)
        return table

    def per_class(self) -> list[tuple[str, int, float, float]]:
        """(class, images, top1, top5) of each true class; the shares are 0.0 where it has no images."""
        label, _, rank = self.computed()
        images, *hits = (np.bincount(label[rank < k], minlength=len(self.classes)) for k in (np.inf, 1, TOP))
        shares = (count / np.maximum(images, 1) for count in hits)
        return list(zip(self.classes, images, *shares, strict=True))

    def table(self) -> str:
        """Images, top1 and top5 of each class that has images, and of all, one per line."""
        rank = self.computed()[2]
        rows = [row for row in self.per_class() if row[1]]
        rows.append(("all", len(rank), *((rank < k).sum() / max(1, len(rank)) for k in (1, TOP))))
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:{width}}  {images:8}  {top1:.3f}  {top5:.3f}" for name, images, top1, top5 in rows]
        return "\n".join([f"{'':{width}}    images   top1   top5", *lines])

    def write(self, folder: Path) -> list[str]:
        """Write per_class.csv, shares without images empty, and confusion.csv; returns the names."""
        rows = [["class", "images", "top1", "top5"]]
        for name, images, *shares in self.per_class():
            rows.append([name, images, *(f"{share:.6f}" if images else "" for share in shares)])
        table = [[name, *counts] for name, counts in zip(self.classes, self.confusion().tolist(), strict=True)]
        files.write_csv(Path(folder) / "per_class.csv", rows)
        files.write_csv(Path(folder) / "confusion.csv", [["truth / answer", *self.classes], *table])
        return ["per_class.csv", "confusion.csv"]


def score_labels(evaluator: TopKAccuracy, labels: ArrayLike, batch_size: int = 256) -> dict[str, float]:
    """Metrics of the labels [N] of a data set scored as predictions: 1.0, or evaluator and data do not fit each other.

    evaluator: a new one.
    """
    for batch in torch.as_tensor(labels, dtype=torch.int64).split(batch_size):
        evaluator.update(batch, F.one_hot(batch, len(evaluator.classes)).float())
    return evaluator.compute()
