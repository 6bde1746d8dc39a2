"""RoIAlign on the levels of a feature pyramid, each RoI on the level for its size."""

import torch
from torchvision.ops.poolers import LevelMapper

STRIDES = (4, 8, 16, 32)  # pixels between two cells of each level
level_of = LevelMapper(2, 5)  # the stride of level l is 2**l
SAMPLES = 2  # points per side of a bin; -1: one per cell of the map
FAR = -1e6  # pixels: outside every map


def pool_rois(features, rois, size):
    """torchvision's MultiScaleRoIAlign, which on a GPU waits for it once per level: [R,C,size,size].

    features  float32 [B,C,h,w] of each level, strides STRIDES
    rois      B tensors [n,4] xyxy pixels

    torchvision guesses the strides from the first batch, wrongly where that batch is small or mostly padding, and keeps
    them.
    """
    image = torch.cat([boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(rois)])
    boxes = torch.cat(list(rois))
    pool = pool_on_all_levels if boxes.is_cuda else pool_by_level
    return pool(features, torch.cat([image, boxes], dim=1), level_of([boxes]), size)


def pool_by_level(features, rois, level, size):
    """RoIs [R,5], the index of the image first, each pooled from its level."""
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for i, (maps, stride) in enumerate(zip(features, STRIDES, strict=True)):
        index = torch.where(level == i)[0]
        pooled[index] = align(maps, rois[index], stride, size)
    return pooled


def pool_on_all_levels(features, rois, level, size):
    """The same for a GPU: nothing is counted. Far from a map RoIAlign gives zeros and is quick there."""
    pooled = 0
    for i, (maps, stride) in enumerate(zip(features, STRIDES, strict=True)):
        boxes = rois[:, 1:].masked_fill((level != i)[:, None], FAR)
        pooled = pooled + align(maps, torch.cat([rois[:, :1], boxes], dim=1), stride, size)
    return pooled


def align(maps, rois, stride, size, samples=SAMPLES):
    """maps [B,C,h,w], rois [R,5], the index of the image first -> [R,C,size,size].

    The operator itself: under deterministic algorithms torchvision's function computes it in Python on a GPU, with
    a tensor as large as the map for every RoI. Only the order of the sums in its backward pass is not deterministic.
    """
    return torch.ops.torchvision.roi_align(maps, rois, 1 / stride, size, size, samples, False)
