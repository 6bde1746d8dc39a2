"""Box coding.

Boxes are xyxy in pixels, anchors too. A box is coded against its anchor as Faster R-CNN does (Ren et al. 2015, eq. 2):
the shift of the centre in anchor sizes and the log of the ratio of sizes, each times a weight. SSD's variances 0.1 and
0.2 are the weights (10, 10, 5, 5).
"""

import math

import torch

LOG_RATIO_LIMIT = math.log(1000 / 16)  # torchvision's: exp of a wild network output stays finite


def to_centers(boxes):
    """xyxy [...,4] -> cx, cy, w, h [...,4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def to_corners(boxes):
    """cx, cy, w, h [...,4] -> xyxy [...,4]."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def encode(boxes, anchors, weights):
    """Offsets [...,4] that turn `anchors` [...,4] into `boxes` [...,4]; sizes of both must be above 0."""
    boxes, anchors = to_centers(boxes), to_centers(anchors)
    shift = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    ratio = torch.log(boxes[..., 2:] / anchors[..., 2:])
    return torch.cat([shift, ratio], dim=-1) * boxes.new_tensor(weights)


def decode(offsets, anchors, weights):
    """The inverse of `encode`: offsets [...,4], anchors [...,4] -> boxes xyxy [...,4] in float32."""
    offsets = offsets.float() / offsets.new_tensor(weights, dtype=torch.float32)
    anchors = to_centers(anchors)
    center = anchors[..., :2] + offsets[..., :2] * anchors[..., 2:]
    size = anchors[..., 2:] * offsets[..., 2:].clamp(max=LOG_RATIO_LIMIT).exp()
    return to_corners(torch.cat([center, size], dim=-1))


@torch.no_grad()
def pairwise_iou(boxes, anchors):
    """IoU of boxes [...,M,4] and anchors [A,4] -> [...,M,A]; a box of no area has IoU 0 with everything.

    torchvision.ops.box_iou takes one picture's boxes; matching a batch at once needs the leading dimension. No gradient
    flows: the large tensors are worked on in place, which takes a third of the time.
    """
    x1, y1, x2, y2 = boxes[..., None, :].unbind(-1)  # [...,M,1]
    left, top, right, bottom = anchors.unbind(-1)  # [A]
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)  # [...,M,A]
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
    shared = width.mul_(height)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    anchor_areas = (anchors[:, 2:] - anchors[:, :2]).prod(-1)
    union = torch.add(areas[..., None], anchor_areas, out=height).sub_(shared).clamp_(min=1e-9)
    return shared.div_(union)


def in_file_pixels(items, targets):
    """Copies of `items`, targets or detections, with boxes in pixels of the file instead of the batch's picture.

    targets: of the same pictures; `shape` (h, w) of the picture in the batch, `size` (h, w) of its file.
    """
    scaled = []
    for item, target in zip(items, targets, strict=True):
        (height, width), (file_height, file_width) = target["shape"], target["size"]
        down, across = file_height / height, file_width / width
        boxes = torch.as_tensor(item["boxes"])
        scaled.append({**item, "boxes": boxes * boxes.new_tensor([across, down, across, down])})
    return scaled
