"""Masks within boxes, put into whole pictures."""

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image


def pasted(detections, sizes, threshold=0.5):
    """Copies of `detections` whose masks, probabilities within the box [N,m,m], are bool [N,h,w] of whole pictures.

    boxes float32 [N,4] xyxy are in pixels of these pictures; sizes: (h, w) of each; a pixel is the object's above
    `threshold`. On the CPU, and one mask at a time in float: a hundred of a photo of twelve megapixels take 5 GB.
    """
    whole = []
    for found, size in zip(detections, sizes, strict=True):
        masks = torch.zeros(len(found["boxes"]), *size, dtype=torch.bool)
        boxes, parts = found["boxes"].cpu(), found["masks"].float().cpu()
        for mask, part, box in zip(masks, parts, boxes):
            mask.copy_(paste_masks_in_image(part[None, None], box[None], tuple(size))[0, 0] > threshold)
        whole.append({**found, "masks": masks})
    return whole
