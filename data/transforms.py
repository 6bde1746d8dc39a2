"""Paired transforms: what torchvision.transforms.v2 lacks, and the recipes made of it; for classes, of v2 alone.

Geometry comes before colour: colour on the 300 x 300 that the network sees costs a quarter of colour on the photo. All
randomness is torch's, which the data set seeds for each sample. Everything here can be pickled, for spawned workers.
"""

import itertools
import math

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import PER_OBJECT
from ops.boxes import pairwise_iou


def keep_objects(target, keep):
    """`target` with the objects that `keep` (bool [M]) names, every per-object field alike."""
    return {name: value[keep] if name in PER_OBJECT else value for name, value in target.items()}


def move_masks(target, region, shape):
    """`target` with its masks, if it has any, as they look where `region` (top, left, height, width) of the picture is
    shown as `shape` (h, w). A pixel is what the middle of it shows, and 0 beyond the picture: so edges stay within half
    a pixel of where the edges of boxes go, which v2's nearest neighbour does not give.
    """
    if "masks" not in target:
        return target
    masks = target["masks"].as_subclass(torch.Tensor)
    for side, start, length, count in zip((1, 2), region[:2], region[2:], shape):
        seen = start + ((torch.arange(count, dtype=torch.float64) + 0.5) * (length / count)).floor().long()
        outside = (seen < 0) | (seen >= masks.shape[side])
        masks = masks.index_select(side, seen.clamp(0, masks.shape[side] - 1))
        if outside.any():
            masks.index_fill_(side, outside.nonzero()[:, 0], 0)
    return target | {"masks": tv_tensors.Mask(masks)}


class ZoomOrCrop:
    """SSD's geometry (Liu et al. 2016, section 2.2): zoom out, then an IoU crop, then one resize to the network's size.

    size            (h, w) of the result
    zoom_out        probability of zooming out
    largest_canvas  of zooming out, in sides of the picture
    iou_crop        probability of trying an IoU crop at all
    fill            colour of the canvas around the picture (R, G, B), 0..255

    The same distribution as v2.RandomZoomOut and v2.RandomIoUCrop one after the other, at a sixth of their time: they
    build the canvas, up to 16 times the photo, only to shrink it again, and try one crop at a time. Objects whose
    centre falls outside or that come out thinner than a pixel are left out.
    """

    def __init__(self, size, zoom_out=0.5, largest_canvas=4.0, iou_crop=1.0, fill=(127, 127, 127)):
        self.size, self.zoom_out, self.iou_crop = tuple(size), zoom_out, iou_crop
        self.largest_canvas = largest_canvas
        self.fill = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)

    def __call__(self, image, target):
        height, width = image.shape[-2:]
        boxes = target["boxes"].as_subclass(torch.Tensor)
        region = (0, 0, height, width)  # top, left, height, width of what is kept, in pixels of the picture
        if torch.rand(()) < self.zoom_out:
            region = self.canvas(height, width)
        if len(boxes) and torch.rand(()) < self.iou_crop:
            region = iou_crop(boxes, region)
        moved = self.move(boxes, region)
        thick = (moved[:, 2:] - moved[:, :2] >= 1).all(1)
        target = keep_objects(target | {"boxes": moved}, thick & centers_inside(boxes, region))
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=self.size)
        return self.resample(image, region), move_masks(target, region, self.size)

    def canvas(self, height, width):
        """A canvas of 1 to `largest_canvas` times the picture's sides, the picture anywhere on it."""
        ratio, down, right = torch.rand(3).tolist()
        ratio = 1 + ratio * (self.largest_canvas - 1)
        canvas_height, canvas_width = int(height * ratio), int(width * ratio)
        return -int(down * (canvas_height - height)), -int(right * (canvas_width - width)), canvas_height, canvas_width

    def move(self, boxes, region):
        """Boxes [M,4] of the picture as boxes of the result, clipped to it."""
        top, left, height, width = region
        scale = boxes.new_tensor([self.size[1] / width, self.size[0] / height]).repeat(2)
        moved = (boxes - boxes.new_tensor([left, top]).repeat(2)) * scale
        return moved.clamp(min=0).minimum(moved.new_tensor([self.size[1], self.size[0]]).repeat(2))

    def resample(self, image, region):
        """The region of the picture as uint8 [3,h,w]; what lies outside the picture is `fill`."""
        top, left, height, width = region
        inside_top, inside_left = max(0, top), max(0, left)
        inside_bottom = min(image.shape[-2], top + height)
        inside_right = min(image.shape[-1], left + width)
        rows = [round((y - top) * self.size[0] / height) for y in (inside_top, inside_bottom)]
        columns = [round((x - left) * self.size[1] / width) for x in (inside_left, inside_right)]
        inside = image.as_subclass(torch.Tensor)[:, inside_top:inside_bottom, inside_left:inside_right]
        shown = (max(1, rows[1] - rows[0]), max(1, columns[1] - columns[0]))
        inside = F.resize_image(inside, list(shown), antialias=True)
        if shown == self.size:
            return tv_tensors.Image(inside)
        result = self.fill.expand(3, *self.size).clone()
        rows[0], columns[0] = min(rows[0], self.size[0] - shown[0]), min(columns[0], self.size[1] - shown[1])
        result[:, rows[0] : rows[0] + shown[0], columns[0] : columns[0] + shown[1]] = inside
        return tv_tensors.Image(result)


def centers_inside(boxes, region):
    """bool [...,M]: is the centre of boxes [M,4] in the region (top, left, height, width), numbers or [...,1]?"""
    top, left, height, width = region
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (x > left) & (x < left + width) & (y > top) & (y < top + height)


def iou_crop(boxes, region, trials=40, smallest=0.3):
    """A crop of `region` that keeps an object, as SSD and v2.RandomIoUCrop draw it.

    boxes [M,4] xyxy, M > 0; region and result (top, left, height, width). A least IoU is drawn from 0 0.1 0.3 0.5 0.7
    0.9 or "no crop". Of `trials` crops with sides of `smallest` to 1 of the region's, all drawn at once, the first is
    taken that has an aspect ratio of 0.5 to 2, holds the centre of an object and reaches that IoU with one such object;
    if none does, another IoU is drawn.
    """
    top, left, height, width = region
    while True:
        least = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)[int(torch.randint(7, ()))]
        if least is None:
            return region
        draws = torch.rand(4, trials, 1)
        sides = smallest + (1 - smallest) * draws[:2]
        crop_height, crop_width = (sides[0] * height).floor(), (sides[1] * width).floor()  # [trials,1]
        crop_top = top + (draws[2] * (height - crop_height)).floor()
        crop_left = left + (draws[3] * (width - crop_width)).floor()
        inside = centers_inside(boxes, (crop_top, crop_left, crop_height, crop_width))  # [trials,M]
        crops = torch.cat([crop_left, crop_top, crop_left + crop_width, crop_top + crop_height], dim=1)
        overlap = pairwise_iou(crops, boxes).masked_fill(~inside, -1).amax(1)
        aspect = (crop_width / crop_height)[:, 0]
        good = (overlap >= least) & (aspect > 0.5) & (aspect < 2)
        if good.any():
            x1, y1, x2, y2 = (int(v) for v in crops[int(good.int().argmax())])
            return y1, x1, y2 - y1, x2 - x1


GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601 luma of R, G, B
YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # luma and the plane that hue turns in
FROM_YIQ = np.linalg.inv(YIQ)
ORDERS = np.array(list(itertools.permutations(range(3))))  # of R, G, B


class PhotometricDistort:
    """SSD's colour changes (as v2.RandomPhotometricDistort draws them) in one pass over the picture.

    probability   of each of: brightness 0.875 to 1.125, contrast and saturation 0.5 to 1.5, hue turned by up to 1/20 of
                  the circle, another order of R, G, B
    """

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, image, target):
        drawn = torch.rand(11, dtype=torch.float64).numpy()
        happens, amount = drawn[:5] < self.probability, drawn[5:10]
        if not happens.any():
            return image, target
        factors = [0.875 + 0.25 * amount[0], 0.5 + amount[1], 0.5 + amount[2], 0.05 * (2 * amount[3] - 1)]
        factors = [factor if happened else None for factor, happened in zip(factors, happens)]
        order = ORDERS[int(6 * amount[4])] if happens[4] else ORDERS[0]
        return change_colour(image, factors, drawn[10] < 0.5, order), target


class ColourJitter:
    """v2.ColorJitter in one pass, of a picture without target: brightness, contrast and saturation times 1 - amount to
    1 + amount (0 to 1), hue turned by up to `amount` of the circle; contrast before or after saturation and hue.
    """

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, image):
        *drawn, first = torch.rand(5, dtype=torch.float64).tolist()
        brightness, contrast, saturation, turn = (self.amount * (2 * draw - 1) for draw in drawn)
        return change_colour(image, (1 + brightness, 1 + contrast, 1 + saturation, turn), first < 0.5)


def change_colour(image, factors, contrast_first, order=ORDERS[0]):
    """`image` (uint8 [3,H,W]) with other colours; factors and the rest as in `colour_map`.

    Each change is an affine map of RGB, so all of them are one 3 x 4 matrix, at a seventh of the time of one pass each.
    What differs from v2's: values are clipped once, at the end, and hue turns in YIQ instead of HSV.
    """
    pixels = image.as_subclass(torch.Tensor).flatten(1).float()  # [3,HW]
    matrix, offset = colour_map(factors, contrast_first, pixels.mean(1).double().numpy())
    matrix, offset = torch.from_numpy(matrix[order]).float(), torch.from_numpy(offset[order]).float() + 0.5  # to round
    changed = torch.addmm(offset[:, None], matrix, pixels).clamp_(0, 255)
    return tv_tensors.Image(changed.to(torch.uint8).view(image.shape))


def colour_map(factors, contrast_first, mean):
    """(matrix [3,3], offset [3]) of RGB on 0..255; `mean` is the picture's mean R, G, B.

    factors: brightness, contrast, saturation (1 changes nothing) and hue's turn as part of the circle; None is left out
    """
    brightness, contrast, saturation, turn = factors
    matrix, offset = np.eye(3), np.zeros(3)
    if brightness is not None:
        matrix = matrix * brightness

    def add_contrast(matrix, offset):
        grey = GREY @ (matrix @ mean + offset)  # contrast stretches about the mean luma
        return contrast * matrix, contrast * offset + (1 - contrast) * grey

    if contrast is not None and contrast_first:
        matrix, offset = add_contrast(matrix, offset)
    if saturation is not None:
        change = saturation * np.eye(3) + (1 - saturation) * GREY  # every row: towards the pixel's luma
        matrix, offset = change @ matrix, change @ offset
    if turn is not None:
        cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        change = FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ YIQ
        matrix, offset = change @ matrix, change @ offset
    if contrast is not None and not contrast_first:
        matrix, offset = add_contrast(matrix, offset)
    return matrix, offset


class HorizontalFlip:
    """v2.RandomHorizontalFlip without its search of the target for what to flip, which costs more than the flip."""

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, image, target):
        if torch.rand(()) >= self.probability:
            return image, target
        flipped = {name: F.horizontal_flip(target[name]) for name in ("boxes", "masks") if name in target}
        return F.horizontal_flip(image), target | flipped


class Chain:
    """Transforms of (image, target) one after the other."""

    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image, target):
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


def ssd_train(size, fill, zoom_out=0.5, largest_canvas=4.0, iou_crop=1.0, colour=0.5):
    """SSD's training augmentation to (h, w): probabilities, and the largest canvas to zoom out to, in picture sides."""
    return Chain(
        ZoomOrCrop(size, zoom_out, largest_canvas, iou_crop, fill=tuple(round(v) for v in fill)),
        HorizontalFlip(),
        PhotometricDistort(colour),
    )


def ssd_evaluate(size):
    """Resize to (h, w), nothing else. Boxes are clamped: a scaled corner may round to just outside."""
    return Chain(v2.Resize(size, antialias=True), v2.ClampBoundingBoxes())


class ResizeSides:
    """Resize so that the shortest side is one of `min_sides`, drawn, unless the longest would pass `max_side`: then so
    that the longest is that. Both sides are rounded to pixels, one at least, and boxes move by what came out.

    Objects that come out thinner than `thinnest` pixels are left out: next to no area makes a loss without bounds.
    """

    def __init__(self, min_sides, max_side, thinnest=0.01):
        self.min_sides, self.max_side, self.thinnest = tuple(min_sides), max_side, thinnest

    def __call__(self, image, target):
        height, width = image.shape[-2:]
        min_side = self.min_sides[int(torch.randint(len(self.min_sides), ()))]
        scale = min(min_side / min(height, width), self.max_side / max(height, width))
        shape = (max(1, round(scale * height)), max(1, round(scale * width)))
        boxes = target["boxes"].as_subclass(torch.Tensor)
        edges = boxes.new_tensor([shape[1], shape[0]]).repeat(2)
        boxes = (boxes * (edges / boxes.new_tensor([width, height]).repeat(2))).clamp(min=0).minimum(edges)
        thick = (boxes[:, 2:] - boxes[:, :2] >= self.thinnest).all(1)
        target = keep_objects(target | {"boxes": boxes}, thick)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=shape)
        target = move_masks(target, (0, 0, height, width), shape)
        pixels = image.as_subclass(torch.Tensor)
        return tv_tensors.Image(F.resize_image(pixels, list(shape), antialias=True)), target


def pyramid_train(min_sides, max_side, flip=0.5, colour=0.0):
    """RetinaNet's training augmentation: a shortest side drawn from `min_sides`, in pixels; flip and colour are
    probabilities."""
    steps = [ResizeSides(min_sides, max_side), HorizontalFlip(flip)]
    return Chain(*steps, *[PhotometricDistort(colour)] * bool(colour))


def pyramid_evaluate(min_side, max_side):
    """The shortest side to `min_side`, the longest to `max_side` at most, nothing else."""
    return ResizeSides((min_side,), max_side)


IMAGENET_MEAN = (124, 116, 104)  # R, G, B on 0..255, of whole numbers as pixels are


def classify_train(size, crop_scale=(0.53, 1.0), jitter=0.03, erase=0.0):
    """Training augmentation of a classifier, picture -> picture of `size` x `size` pixels; the source's by default.

    crop_scale   share of the picture's area that a crop may have
    jitter       brightness, contrast and saturation change by up to this factor, hue by this part of the circle
    erase        probability of putting the mean colour over a part of the picture
    """
    steps = [v2.RandomResizedCrop(size, scale=tuple(crop_scale), antialias=True), v2.RandomHorizontalFlip()]
    steps += [ColourJitter(jitter)] * bool(jitter)
    steps += [v2.RandomErasing(erase, value=IMAGENET_MEAN)] * bool(erase)
    return v2.Compose(steps)


def classify_evaluate(resize=224, size=224):
    """The shortest side to `resize` pixels, then the central `size` x `size`."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
