"""Boxes, masks and classes drawn on pictures, and many pictures on one sheet."""

import colorsys

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import max_pool2d
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

CAPTION = 18  # pixels of a line of text
GREY, DARK_GREEN, RED = (60, 60, 60), (0, 110, 0), (180, 0, 0)


def class_colour(label):
    """(R, G, B) 0..255 of class `label`: neighbours in the list differ clearly, however many classes there are."""
    hue = label * 0.618034 % 1  # steps of the golden ratio never come close to an earlier hue
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0))


def draw(image, boxes, labels, classes, scores=None, masks=None):
    """`image` uint8 [3,H,W] with boxes [M,4] xyxy pixels, each with its class and, if given, its score and its mask.

    masks   bool [M,H,W], shown translucent with a firm edge

    Boxes have one colour a class. Where there is no room left for a box's text beside the others, it has none.
    """
    if not len(boxes):
        return image
    order = torch.arange(len(boxes)) if scores is None else scores.argsort(descending=True)
    boxes, texts = boxes[order], [classes[label] for label in labels[order].tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores[order].tolist())]
    colours = [class_colour(label) for label in labels[order].tolist()]
    width = max(2, round(max(image.shape[-2:]) / 300))
    if masks is not None:
        image = with_masks(image, boxes, masks[order], colours, width)
    drawn = F.to_pil_image(image)
    pen, boxes = ImageDraw.Draw(drawn), boxes.tolist()
    for box, colour in zip(boxes[::-1], colours[::-1]):  # the surest is drawn last, over the others
        pen.rectangle(box, outline=colour, width=width)
    write_tags(pen, drawn.size, boxes, texts, colours)
    return F.pil_to_tensor(drawn)


def with_masks(image, boxes, masks, colours, width):
    """`image` with masks bool [M,H,W] inside boxes [M,4], the first on top, the edge of each `width` pixels thick."""
    image, (height, across) = image.clone(), image.shape[-2:]
    for box, mask, colour in reversed(list(zip(boxes.tolist(), masks, colours))):
        left, top = max(0, int(box[0]) - 1), max(0, int(box[1]) - 1)  # the rest of the picture is not looked at
        right, bottom = min(across, int(box[2]) + 2), min(height, int(box[3]) + 2)
        part, inside = image[:, top:bottom, left:right], mask[top:bottom, left:right]
        if not inside.numel():
            continue
        colour = image.new_tensor(colour)[:, None]
        near = max_pool2d((~inside).float()[None], 2 * width + 1, stride=1, padding=width)[0] > 0
        part[:, inside] = (part[:, inside] // 2) + colour // 2
        part[:, inside & near] = colour
    return image


def write_tags(pen, size, boxes, texts, colours):
    """Write each text on its colour at its box, the first ones first: above it, else below or within it, where no
    earlier text stands; nowhere, where all that is taken.

    size (w, h) of the picture in pixels; boxes: lists of left, top, right, bottom
    """
    font = ImageFont.load_default(max(11, round(max(size) / 60)))
    taken = []
    for (x1, y1, x2, y2), text, colour in zip(boxes, texts, colours):
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left + 4, bottom - top + 4
        rows, columns = (y1 - height, y2 + 1, y1, y2 - height, (y1 + y2 - height) / 2), (x1, x2 - width)
        for x, y in ((x, y) for y in rows for x in columns):
            x, y = (min(max(0, place), edge) for place, edge in zip((x, y), (size[0] - width, size[1] - height)))
            if all(x >= c or x + width <= a or y >= d or y + height <= b for a, b, c, d in taken):
                taken.append((x, y, x + width, y + height))
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
                pen.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)
                break


def beside_truth(image, target, detection, classes, threshold=0.3, side=480):
    """Ground truth on the left, detections with a score above `threshold` on the right: uint8 [3,side,2 W + 8].

    image   uint8 [3,H,W]; target and detection have boxes in its pixels, and may have masks bool or 0 and 1 [M,H,W].
    Shown in the shape of the file, `side` high.
    """
    shown = [side, round(side * target["size"][1] / target["size"][0])]
    scale = torch.tensor([shown[1] / image.shape[-1], shown[0] / image.shape[-2]]).repeat(2)
    image = F.resize_image(image.as_subclass(torch.Tensor).cpu(), shown, antialias=True)
    sure = detection["scores"] > threshold
    found = {name: detection[name][sure] for name in ("boxes", "labels", "scores", "masks") if name in detection}
    halves = []
    for one in (target, found):
        masks = one.get("masks")
        if masks is not None:
            masks = F.resize_mask(masks.as_subclass(torch.Tensor).cpu().to(torch.uint8), shown).bool()
        boxes = one["boxes"].as_subclass(torch.Tensor).cpu() * scale
        scores = one["scores"].cpu() if "scores" in one else None
        halves.append(draw(image, boxes, one["labels"].cpu(), classes, scores, masks))
    return torch.cat([halves[0], image.new_full((3, side, 8), 255), halves[1]], dim=2)


def with_answers(image, texts, colours, scores, least=320):
    """A classified picture with its answers written under it, each on a bar as long as its score (0 to 1).

    image uint8 [3,H,W], enlarged where it is less than `least` pixels wide -> uint8 [3,H',W'].
    """
    zoom = max(1.0, least / image.shape[-1])
    image = F.resize_image(image, [max(1, round(side * zoom)) for side in image.shape[-2:]], antialias=True)
    width, height = image.shape[-1], round(max(CAPTION, image.shape[-1] / 22))
    strip = Image.new("RGB", (width, height * len(texts)), (255, 255, 255))
    pen = ImageDraw.Draw(strip)
    for row, (text, colour, score) in enumerate(zip(texts, colours, scores)):
        pen.rectangle((0, row * height + 1, score * (width - 1), (row + 1) * height - 2), fill=colour)
        words = shortened(text, width - 80, height * 0.7)
        pen.text((4, row * height + height / 2), words, fill=(0, 0, 0), font_size=height * 0.7, anchor="lm")
        number = {"fill": (0, 0, 0), "font_size": height * 0.7, "anchor": "rm"}
        pen.text((width - 4, row * height + height / 2), f"{score:.3f}", **number)
    return torch.cat([image, F.pil_to_tensor(strip)], dim=1) if texts else image


def shortened(text, width, font_size):
    """`text`, or its end after dots where all of it would be more than `width` pixels long."""
    font, end = ImageFont.load_default(font_size), text
    while len(end) > 1 and font.getlength(end if end == text else f"...{end}") > width:
        end = end[1:]
    return text if end == text else f"...{end}"


def thumbnail(image, caption, side=160, colour=GREY):
    """A picture uint8 [3,h,w] of any shape in `side` x `side` pixels, `caption` under it: [3,side + CAPTION,side]."""
    zoom = side / max(image.shape[-2:])
    shown = [max(1, round(edge * zoom)) for edge in image.shape[-2:]]
    cell = Image.new("RGB", (side, side + CAPTION), (255, 255, 255))
    picture = F.to_pil_image(F.resize_image(image.cpu(), shown, antialias=True))
    cell.paste(picture, ((side - shown[1]) // 2, (side - shown[0]) // 2))
    text = shortened(caption, side - 8, CAPTION - 6)
    ImageDraw.Draw(cell).text((4, side + 2), text, fill=colour, font_size=CAPTION - 6)
    return F.pil_to_tensor(cell)


def contact_sheet(cells, columns=6):
    """Thumbnails of one size in rows, in order: uint8 [3,H,W]."""
    return make_grid(torch.stack(cells), nrow=columns, padding=4, pad_value=255)


def sheet(images, labels, found, classes, side=160, columns=8):
    """Classified pictures in rows, the class found under each, and the true one too where it is another: uint8 [3,H,W].

    images uint8 [3,h,w]; labels, found: int from 0.
    """
    cells = []
    for image, label, answer in zip(images, labels, found):
        text = classes[answer] if answer == label else f"{classes[answer]} (is {classes[label]})"
        cells.append(thumbnail(image, text, side, DARK_GREEN if answer == label else RED))
    return contact_sheet(cells, columns)
