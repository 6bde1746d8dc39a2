"""Data sets, paired transforms, loaders, the data check and the drawn demo data.

The contract that every data set meets and every transform keeps. `dataset[i]` is `(image, target)`:

image    uint8 [3,H,W], RGB
target   a dict
  boxes     float32 [M,4] xyxy in pixels of this image, x2 > x1 and y2 > y1 (tv_tensors.BoundingBoxes)
  labels    int64 [M] from 0; background is no class
  ignore    bool [M]: crowd, difficult, group; never a positive, never a false positive
  image_id  int, the position in the data set
  size      (h, w) of the file
  masks     uint8 [M,H,W], 0 or 1, where the task has them (tv_tensors.Mask); H, W of this image

A picture without boxes has boxes [0,4] and is trained on. The data set owns `classes`, the names in label order.
`dataset[epoch, i]` is the same picture as another epoch augments it: what is random is seeded from (seed, epoch, i), so
workers, processes and resumes change nothing. `annotation_file`, `source_ids` and `category_ids` lead back to COCO's
file and ids, and are None for pictures from anywhere else. No data set knows an anchor or a heatmap.
"""

import torch

from data.errors import DataError

__all__ = ["PER_OBJECT", "DataError", "check_target"]

# Fields of a target with one row an object, filtered together; from center on nuScenes' own.
PER_OBJECT = ("boxes", "labels", "ignore", "masks", "center", "dims", "yaw", "alpha", "velocity", "attribute")
PER_OBJECT += ("visibility", "amodal")


def check_target(image, target, num_classes):
    """Raise AssertionError where `(image, target)` breaks the contract above. Tests run it over every data set."""
    boxes, labels, count = target["boxes"], target["labels"], len(target["boxes"])
    height, width = image.shape[-2:]
    assert image.dtype == torch.uint8 and image.shape == (3, height, width), (image.dtype, image.shape)
    assert boxes.dtype == torch.float32 and boxes.shape == (count, 4), (boxes.dtype, boxes.shape)
    assert labels.dtype == torch.int64 and labels.shape == (count,), (labels.dtype, labels.shape)
    assert target["ignore"].dtype == torch.bool and target["ignore"].shape == (count,), target["ignore"]
    assert isinstance(target["image_id"], int) and len(target["size"]) == 2, target
    assert bool(((labels >= 0) & (labels < num_classes)).all()), labels
    assert bool((boxes[:, 2:] > boxes[:, :2]).all()), boxes
    if "masks" in target:
        masks = target["masks"]
        assert masks.dtype == torch.uint8 and masks.shape == (count, height, width), (masks.dtype, masks.shape)
        assert bool((masks <= 1).all()), masks.max()
    assert bool((boxes >= 0).all()) and bool((boxes <= boxes.new_tensor([width, height, width, height])).all()), boxes
