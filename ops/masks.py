"""Masks predicted within boxes, pasted into whole images."""

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image


def paste_masks(detections, sizes, threshold=0.5):
    """Copies of `detections` whose masks [N,m,m], probabilities within the box, became bool [N,h,w] of whole images.

    detections  dicts with masks and boxes [N,4] xyxy in pixels of these images
    sizes       (h, w) of each image
    threshold   a pixel belongs to the object if its probability is above this

    Computed on the CPU, one mask at a time: as floats, a hundred masks of a 12-megapixel photo take 5 GB.
    """
    pasted = []
    for detection, size in zip(detections, sizes, strict=True):
        masks = torch.zeros(len(detection["boxes"]), *size, dtype=torch.bool)
        boxes, probabilities = detection["boxes"].cpu(), detection["masks"].float().cpu()
        for mask, probability, box in zip(masks, probabilities, boxes):
            mask.copy_(paste_masks_in_image(probability[None, None], box[None], tuple(size))[0, 0] > threshold)
        pasted.append({**detection, "masks": masks})
    return pasted
