"""Boxes, masks and predicted classes drawn on images, and contact sheets."""

import colorsys
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from PIL import Image, ImageDraw
from torch.nn.functional import max_pool2d
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from visualize import fonts

MIN_SIDE = 640  # pixels of the longer side of an annotated image: in smaller ones texts would cover the objects
CAPTION_HEIGHT, CAPTION_SIZE = 18, 12  # pixels of the line under a thumbnail, and of its font
GRAY, DARK_GREEN, RED = (60, 60, 60), (0, 110, 0), (180, 0, 0)
Color = tuple[int, int, int]


def class_color(label: int) -> Color:
    """(R, G, B) 0..255 of class `label`: neighbors in the list differ clearly, with any number of classes."""
    hue = label * 0.618034 % 1  # steps of the golden ratio never come close to an earlier hue
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0))


def truth_and_predictions(
    samples: Iterable[tuple], classes: Sequence[str], threshold: float = 0.3, side: int = 480
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, image uint8 [3,side,W]): ground truth on the left, on the right detections with a score above
    `threshold`.

    samples   (image uint8 [3,H,W], target, detections) each, boxes in pixels of the image; both may have masks, bool or
              0 and 1 [M,H,W]. Of a padded image only the part of the target's "shape" is drawn, in the aspect ratio of
              the file
    side      height of the drawn image in pixels
    """
    for number, (image, target, detections) in enumerate(samples):
        height, width = target.get("shape", image.shape[-2:])
        size = [side, round(side * target["size"][1] / target["size"][0])]
        scale = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
        image = F.resize_image(image[:, :height, :width].as_subclass(torch.Tensor).cpu(), size, antialias=True)
        detections = {name: value.cpu() for name, value in detections.items()}
        selected = detections["scores"] > threshold
        halves = []
        for objects in (target, {name: value[selected] for name, value in detections.items()}):
            masks = objects.get("masks")
            if masks is not None:
                masks = masks[:, :height, :width].as_subclass(torch.Tensor).cpu().to(torch.uint8)
                masks = F.resize_mask(masks, size).bool()
            boxes = objects["boxes"].as_subclass(torch.Tensor).cpu() * scale
            halves.append(draw_boxes(image, boxes, objects["labels"].cpu(), classes, objects.get("scores"), masks))
        gap = image.new_full((3, side, 8), 255)
        yield f"truth left, predictions right/{number}", torch.cat([halves[0], gap, halves[1]], dim=2)


def draw_boxes(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    scores: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    min_side: int = 0,
) -> torch.Tensor:
    """`image` uint8 [3,H,W] with boxes [M,4] xyxy pixels, each with its class name and, if given, its score and mask.

    masks      bool [M,H,W], drawn translucent with a solid edge
    min_side   of the longer side in pixels, to which smaller images are enlarged

    Boxes have one color per class; with masks each object has its own. A box whose text would cover that of a higher
    score has no text.
    """
    image, zoom = enlarged(image, min_side)
    if not len(boxes):
        return image
    boxes = boxes * zoom
    if masks is not None and zoom > 1:
        masks = F.resize_mask(masks.to(torch.uint8), list(image.shape[-2:])).bool()
    order = torch.arange(len(boxes)) if scores is None else scores.argsort(descending=True)
    boxes, labels = boxes[order], labels[order].tolist()
    texts = [classes[label] for label in labels]
    colors = [class_color(number) for number in (labels if masks is None else order.tolist())]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores[order].tolist())]
    width = max(2, round(max(image.shape[-2:]) / 300))
    if masks is not None:
        image = draw_masks(image, boxes, masks[order], colors, width)
    drawn = F.to_pil_image(image)
    pen, boxes = ImageDraw.Draw(drawn), boxes.tolist()
    for box, color in zip(boxes[::-1], colors[::-1]):  # the highest score is drawn last, over the others
        pen.rectangle(box, outline=color, width=width)
    draw_labels(pen, drawn.size, boxes, texts, colors)
    return F.pil_to_tensor(drawn)


def enlarged(image: torch.Tensor, min_side: int = MIN_SIDE) -> tuple[torch.Tensor, float]:
    """(image, zoom) of uint8 [3,H,W]: enlarged if its longer side is less than `min_side` pixels, else itself and 1."""
    zoom = max(1.0, min_side / max(image.shape[-2:]))
    if zoom > 1:
        image = F.resize_image(image, [round(side * zoom) for side in image.shape[-2:]], antialias=True)
    return image, zoom


def draw_masks(
    image: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, colors: Sequence[Color], width: int
) -> torch.Tensor:
    """`image` with masks bool [M,H,W] inside boxes [M,4], the first on top, the edge of each `width` pixels thick.

    torchvision.utils.draw_segmentation_masks draws no edges, so that overlapping masks of one class look like one.
    """
    image, (image_height, image_width) = image.clone(), image.shape[-2:]
    for box, mask, color in reversed(list(zip(boxes.tolist(), masks, colors))):
        left, top = max(0, int(box[0]) - 1), max(0, int(box[1]) - 1)
        right, bottom = min(image_width, int(box[2]) + 2), min(image_height, int(box[3]) + 2)
        part, inside = image[:, top:bottom, left:right], mask[top:bottom, left:right]
        if not inside.numel():
            continue
        color = image.new_tensor(color)[:, None]
        near_edge = max_pool2d((~inside).float()[None], 2 * width + 1, stride=1, padding=width)[0] > 0
        part[:, inside] = part[:, inside] // 2 + color // 2
        part[:, inside & near_edge] = color
    return image


def draw_labels(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[Color],
) -> None:
    """Write each text on its color at its box: above, below or inside it, wherever it covers no earlier text; texts
    without such a place are left out.

    size (w, h) of the image in pixels; boxes: lists of left, top, right, bottom
    """
    font_size, taken = max(11, round(max(size) / 60)), []
    for (x1, y1, x2, y2), text, color in zip(boxes, texts, colors):
        text, font = fonts.fitting(text, font_size)
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left + 4, bottom - top + 4
        rows, columns = (y1 - height, y2 + 1, y1, y2 - height, (y1 + y2 - height) / 2), (x1, x2 - width)
        for y, x in itertools.product(rows, columns):
            x, y = min(max(0, x), size[0] - width), min(max(0, y), size[1] - height)
            if not any(_overlap((x, y, x + width, y + height), other) for other in taken):
                taken.append((x, y, x + width, y + height))
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
                pen.text((x + 2 - left, y + 2 - top), text, fill=_readable_on(color), font=font)
                break


def _readable_on(color):
    """Black, or white on a dark color."""
    red, green, blue = color
    return (255, 255, 255) if 0.3 * red + 0.59 * green + 0.11 * blue < 90 else (0, 0, 0)


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_classes(
    image: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor, classes: Sequence[str], min_width: int = 320
) -> torch.Tensor:
    """A classified image with its predictions written under it, each on a bar as long as its score (0 to 1).

    image uint8 [3,H,W], enlarged if it is less than `min_width` pixels wide -> uint8 [3,H',W'].
    """
    zoom = max(1.0, min_width / image.shape[-1])
    image = F.resize_image(image, [max(1, round(side * zoom)) for side in image.shape[-2:]], antialias=True)
    width, height = image.shape[-1], round(max(CAPTION_HEIGHT, image.shape[-1] / 22))
    strip = Image.new("RGB", (width, height * len(labels)), (255, 255, 255))
    pen, font_size = ImageDraw.Draw(strip), height * 0.7
    for row, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
        pen.rectangle((0, row * height + 1, score * (width - 1), (row + 1) * height - 2), fill=class_color(label))
        middle, text = row * height + height / 2, shortened(classes[label], width - 5 * font_size, font_size)
        text, font = fonts.fitting(text, font_size)
        pen.text((4, middle), text, fill=(0, 0, 0), font=font, anchor="lm")
        pen.text((width - 4, middle), f"{score:.3f}", fill=(0, 0, 0), font_size=font_size, anchor="rm")
    return torch.cat([image, F.pil_to_tensor(strip)], dim=1) if len(labels) else image


def prediction_sheet(
    samples: Iterable[tuple], classes: Sequence[str], side: int = 160, columns: int = 8
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, uint8 [3,H,W]): classified images in rows, under each the predicted class in green or, with the
    true class, in red; nothing without samples.

    samples   (image uint8 [3,h,w], label, predicted label) each
    """
    cells = []
    for image, label, predicted in samples:
        text = classes[predicted] if predicted == label else f"{classes[predicted]} (true: {classes[label]})"
        cells.append(thumbnail(image, text, side, DARK_GREEN if predicted == label else RED))
    if cells:
        yield "predictions, truth where wrong", contact_sheet(cells, columns)


def shortened(text: str, width: float, font_size: float) -> str:
    """`text`, or dots and its end if it is more than `width` pixels long."""
    (_, font), end = fonts.fitting(text, font_size), text
    while len(end) > 1 and font.getlength(end if end == text else f"...{end}") > width:
        end = end[1:]
    return text if end == text else f"...{end}"


def thumbnail(image: torch.Tensor, caption: str, side: int = 160, color: Color = GRAY) -> torch.Tensor:
    """An image uint8 [3,h,w] of any shape in a square, `caption` under it: uint8 [3,side + CAPTION_HEIGHT,side]."""
    zoom = side / max(image.shape[-2:])
    height, width = (max(1, round(edge * zoom)) for edge in image.shape[-2:])
    cell = Image.new("RGB", (side, side + CAPTION_HEIGHT), (255, 255, 255))
    small = F.to_pil_image(F.resize_image(image.cpu(), [height, width], antialias=True))
    cell.paste(small, ((side - width) // 2, side - height))
    text, font = fonts.fitting(shortened(caption, side - 8, CAPTION_SIZE), CAPTION_SIZE)
    ImageDraw.Draw(cell).text((4, side + 2), text, fill=color, font=font)
    return F.pil_to_tensor(cell)


def contact_sheet(cells: Sequence[torch.Tensor], columns: int = 6) -> torch.Tensor:
    """Thumbnails of one size in rows, in order: uint8 [3,H,W]. What is white above all of them is cut off."""
    cells = torch.stack(list(cells))
    top = int((cells < 255).any(dim=3).any(dim=1).any(dim=0).int().argmax())
    return make_grid(cells[:, :, top:], nrow=columns, padding=4, pad_value=255)
