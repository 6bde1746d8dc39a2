"""What an evaluator keeps of each image: structured numpy arrays, one row per object, gathered from all processes."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike


class ImageBuffer:
    """The rows of each image in groups, such as ground truth and detections.

    dtypes   of the groups: structured types, whose field `image` is filled in by `gathered`, or object
    """

    def __init__(self, *dtypes: DTypeLike):
        self.dtypes, self._images = dtypes, {}

    def add(self, image_id: int, *groups: np.ndarray) -> None:
        """Keep the rows of an image, one array per group. An image that was added before is not added again."""
        self._images.setdefault(int(image_id), groups)

    def gathered(self, gather: Callable | None = None) -> tuple[np.ndarray, ...]:
        """The images of all processes, each once: their ids, int64 [I] in ascending order, then the rows of each group
        in this order, with `image` from 0 to I - 1. gather: see Evaluator.compute."""
        images = {}
        for share in gather(self._images) if gather else [self._images]:
            images = share | images
        ids, groups = sorted(images), []
        for number, dtype in enumerate(self.dtypes):
            parts = [images[image_id][number] for image_id in ids]
            rows = np.concatenate([np.zeros(0, dtype), *parts])
            if rows.dtype.names:
                rows["image"] = np.repeat(np.arange(len(ids)), np.array([len(part) for part in parts], dtype=np.int64))
            groups.append(rows)
        return np.array(ids, dtype=np.int64), *groups


def structured(dtype: DTypeLike, **columns: ArrayLike | torch.Tensor) -> np.ndarray:
    """One array of rows from some of its fields; the others are 0. ValueError where the fields differ in length."""
    columns = {name: to_numpy(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"fields differ in length: {lengths}")
    rows = np.zeros(max(lengths.values()), dtype)
    for name, column in columns.items():
        rows[name] = column.reshape(rows[name].shape)
    return rows


def to_numpy(values: ArrayLike | torch.Tensor) -> np.ndarray:
    """An array of a tensor on any device, in any precision."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def check_batch(targets: Sequence[Mapping], detections: Sequence[Mapping], num_classes: int) -> None:
    """ValueError where there are not as many detections as targets, or a label is none of 0 to num_classes - 1."""
    if len(targets) != len(detections):
        raise ValueError(f"{len(targets)} targets, but {len(detections)} detections")
    for labels in (to_numpy(item["labels"]) for item in (*targets, *detections)):
        if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, but {num_classes} classes from 0")
