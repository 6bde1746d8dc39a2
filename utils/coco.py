"""The annotations of a COCO file, which the data set reads and the evaluator scores against."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CocoTruth:
    """The objects of a COCO file with its own numbers, as the official score needs them.

    image_ids      int64 [N], the file's id of each image of the data set
    category_ids   int64 [K], the file's id of each class, -1 for a class that is not in the file
    annotations    columns by COCO's names, a row per object: image_id, category_id, iscrowd int64 [M]; bbox float64
                   [M,4] x, y, width, height in pixels; area float64 [M]; with masks also height, width and counts, the
                   bytes of run lengths (see ops.rle)
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    annotations: dict[str, np.ndarray]
