"""Boxes drawn on pictures."""

import colorsys

import torch
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes


def class_colour(label):
    """(R, G, B) 0..255 of class `label`: neighbours in the list differ clearly, however many classes there are."""
    hue = label * 0.618034 % 1  # steps of the golden ratio never come close to an earlier hue
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0))


def draw(image, boxes, labels, classes, scores=None):
    """`image` uint8 [3,H,W] with boxes [M,4] xyxy pixels, each with its class and, if given, its score."""
    if not len(boxes):
        return image
    if scores is not None:
        order = scores.argsort()  # the surest is drawn last, over the others
        boxes, labels, scores = boxes[order], labels[order], scores[order]
    texts = [classes[label] for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist())]
    colours = [class_colour(label) for label in labels.tolist()]
    width = max(2, round(max(image.shape[-2:]) / 300))
    return draw_bounding_boxes(
        image, boxes, texts, colors=colours, width=width, label_colors=["black"] * len(texts), fill_labels=True
    )


def beside_truth(image, target, detection, classes, threshold=0.3, side=480):
    """Ground truth on the left, detections with a score above `threshold` on the right: uint8 [3,side,2 W + 8].

    image   uint8 [3,H,W]; target and detection have boxes in its pixels. Shown in the shape of the file, `side` high.
    """
    shown = [side, round(side * target["size"][1] / target["size"][0])]
    scale = torch.tensor([shown[1] / image.shape[-1], shown[0] / image.shape[-2]]).repeat(2)
    image = F.resize_image(image.as_subclass(torch.Tensor).cpu(), shown, antialias=True)
    sure = detection["scores"] > threshold
    boxes, labels, scores = (detection[name][sure].cpu() for name in ("boxes", "labels", "scores"))
    left = draw(image, target["boxes"].as_subclass(torch.Tensor) * scale, target["labels"], classes)
    right = draw(image, boxes * scale, labels, classes, scores)
    return torch.cat([left, image.new_full((3, side, 8), 255), right], dim=2)
