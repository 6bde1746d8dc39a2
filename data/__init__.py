"""Data sets, transforms and loaders. Every data set meets the contract below, and every transform keeps it.

`dataset[i]` is `(image, target)`:

    image        uint8 [3,H,W], RGB (tv_tensors.Image)
    target       a dict
      boxes      float32 [M,4], xyxy in pixels of this image, x2 > x1 and y2 > y1 (tv_tensors.BoundingBoxes)
      labels     int64 [M], 0 to K - 1; background is not a class
      ignore     bool [M], COCO's crowds, VOC's difficult objects and Open Images' groups: never positives in training,
                 neither true nor false positives in evaluation
      masks      uint8 [M,H,W], 0 or 1 (tv_tensors.Mask), in data sets with masks
      image_id   int, the index i
      size       (height, width) of the image file

The left edge of an image has x = 0, the right edge x = W. An image without objects has boxes [0,4] and is trained on.
nuScenes adds 3D fields and radar points, see data.nuscenes.dataset. Of a classification data set `dataset[i]` is
`(image, label, i)`.

`dataset[epoch, i]` is image i as it is augmented in that epoch. Its random numbers are seeded from (seed, epoch, i), so
the numbers of workers and processes change nothing, and a resumed run sees what an uninterrupted one would have seen.

Every data set also has len(), `classes` (K names in label order), `transform`, `seed`, image_path(i), load(i) (a sample
before the transform), without(indices), class_counts(), balance_weights() and summary(). Targets do not depend on the
network: `losses` matches them to anchors or draws heat maps of them.
"""

import torch

from utils.errors import DataError

__all__ = ["PER_OBJECT", "DataError", "check_target"]

# the fields of a target with one row per object, which are filtered together; from center on those of nuScenes
PER_OBJECT = ("boxes", "labels", "ignore", "masks", "center", "dims", "yaw", "alpha", "velocity", "attribute")
PER_OBJECT += ("visibility", "amodal")


def check_target(image: torch.Tensor, target: dict, num_classes: int) -> None:
    """Raise AssertionError if `(image, target)` breaks the contract. The tests call it on every data set."""
    boxes, labels, ignore, count = target["boxes"], target["labels"], target["ignore"], len(target["boxes"])
    height, width = image.shape[-2:]
    assert image.dtype == torch.uint8 and image.shape == (3, height, width), (image.dtype, image.shape)
    assert boxes.dtype == torch.float32 and boxes.shape == (count, 4), (boxes.dtype, boxes.shape)
    assert labels.dtype == torch.int64 and labels.shape == (count,), (labels.dtype, labels.shape)
    assert ignore.dtype == torch.bool and ignore.shape == (count,), (ignore.dtype, ignore.shape)
    assert isinstance(target["image_id"], int) and len(target["size"]) == 2, target
    assert bool(((labels >= 0) & (labels < num_classes)).all()), labels
    assert bool((boxes[:, 2:] > boxes[:, :2]).all()) and bool((boxes >= 0).all()), boxes
    assert bool((boxes <= boxes.new_tensor([width, height, width, height])).all()), (boxes, image.shape)
    if "masks" in target:
        masks = target["masks"]
        assert masks.dtype == torch.uint8 and masks.shape == (count, height, width), (masks.dtype, masks.shape)
        assert bool((masks <= 1).all()), masks.max()
