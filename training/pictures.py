"""Boxes drawn on pictures."""

import colorsys

import torch
from PIL import ImageDraw
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

CAPTION = 18  # pixels of a line of text


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


def sheet(images, labels, found, classes, side=160, columns=8):
    """Classified pictures in rows, the class found under each, and the true one too where it is another: uint8 [3,H,W].

    images uint8 [3,h,w]; labels, found: int from 0.
    """
    cells = []
    for image, label, answer in zip(images, labels, found):
        text = classes[answer] if answer == label else f"{classes[answer]} (is {classes[label]})"
        cell = F.resize_image(image.cpu(), [side, side], antialias=True)
        cell = torch.cat([cell, cell.new_full((3, CAPTION, side), 255)], 1)
        colour = (0, 110, 0) if answer == label else (180, 0, 0)
        drawn = F.to_pil_image(cell)
        ImageDraw.Draw(drawn).text((4, side + 2), text, fill=colour, font_size=CAPTION - 6)
        cells.append(F.pil_to_tensor(drawn))
    return make_grid(torch.stack(cells), nrow=columns, padding=4, pad_value=255)
