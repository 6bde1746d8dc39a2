"""Transforms of (image, target) samples and, for classification, of images.

They are those of torchvision.transforms.v2 and a few of our own, which say what v2's do differently or how much slower
they are. Crop and resize come before color changes, because the latter are cheaper on fewer pixels. All random
numbers are torch's, seeded per sample by the data sets. Everything can be pickled, for spawned workers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import PER_OBJECT
from ops.boxes import pairwise_iou

IMAGENET_MEAN = (124, 116, 104)  # R, G, B, rounded to pixel values
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, of R, G, B
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # hue is an angle in I and Q
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
TRIALS, MIN_SCALE = 40, 0.3  # of an IoU crop, as in v2.RandomIoUCrop
COLOR_CHANGES = ("brightness", "contrast", "saturation", "hue")
CHANNEL_ORDERS = tuple(map(list, itertools.permutations(range(3))))  # the first leaves R, G, B as they are

Region = tuple[int, int, int, int]  # top, left, height, width in pixels of an image; may extend beyond it
Sample = tuple[tv_tensors.Image, dict]


def ssd_train(
    size: tuple[int, int],
    fill: Sequence[float],
    zoom_out: float = 0.5,
    max_zoom_out: float = 4.0,
    iou_crop: float = 1.0,
    color: float = 0.5,
) -> v2.Compose:
    """SSD's training augmentation: `ZoomOutIoUCrop`, horizontal flip, `PhotometricDistort` with probability `color`."""
    crop = ZoomOutIoUCrop(size, zoom_out, max_zoom_out, iou_crop, fill=tuple(round(value) for value in fill))
    return v2.Compose([crop, v2.RandomHorizontalFlip(), PhotometricDistort(color)])


def ssd_eval(size: tuple[int, int]) -> v2.Compose:
    """Resize to (h, w). Boxes are clamped: rounding can put a scaled corner just outside."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.ClampBoundingBoxes()])


def multiscale_train(min_sides: Sequence[int], max_side: int, flip: float = 0.5, color: float = 0.0) -> v2.Compose:
    """RetinaNet's training augmentation: `ResizeShortestEdge`; horizontal flip and color changes by probability."""
    steps = [ResizeShortestEdge(min_sides, max_side), v2.RandomHorizontalFlip(flip)]
    return v2.Compose(steps + [PhotometricDistort(color)] * bool(color))


def multiscale_eval(min_side: int, max_side: int) -> "ResizeShortestEdge":
    """The shortest side to `min_side` pixels, the longest to at most `max_side`."""
    return ResizeShortestEdge((min_side,), max_side)


def classification_train(
    size: int, crop_scale: tuple[float, float] = (0.53, 1.0), jitter: float = 0.03, erase: float = 0.0
) -> v2.Compose:
    """Training augmentation of a classifier: image -> image of `size` x `size` pixels.

    crop_scale   minimum and maximum area of the crop as a share of the image
    jitter       see `ColorJitter`
    erase        probability of replacing a rectangle by ImageNet's mean color
    """
    steps = [v2.RandomResizedCrop(size, scale=tuple(crop_scale), antialias=True), v2.RandomHorizontalFlip()]
    steps += [ColorJitter(jitter)] * bool(jitter)
    steps += [v2.RandomErasing(erase, value=IMAGENET_MEAN)] * bool(erase)
    return v2.Compose(steps)


def classification_eval(resize: int = 224, size: int = 224) -> v2.Compose:
    """The shortest side to `resize` pixels, then the central `size` x `size`."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


def filter_objects(target: dict, keep: torch.Tensor) -> dict:
    """`target` with only the objects that `keep`, bool [M], selects, in every per-object field."""
    selected = {name: tv_tensors.wrap(target[name][keep], like=target[name]) for name in PER_OBJECT if name in target}
    return target | selected


class ZoomOutIoUCrop:
    """SSD's crop (Liu et al. 2016, section 2.2): zoom out, crop by IoU, then resize to the size of the network.

    size           (h, w) of the result
    zoom_out       probability of zooming out: placing the image on a larger canvas
    max_zoom_out   maximum canvas, in sides of the image
    iou_crop       probability of trying an IoU crop
    fill           color of the canvas (R, G, B), 0 to 255

    Objects are dropped if their center is outside the crop or they come out less than a pixel wide or high.

    The distribution is that of v2.RandomZoomOut and v2.RandomIoUCrop in a tenth of their time (1.1 ms against 14.6 ms
    for 375 x 500 pixels): they fill a canvas of up to 16 times the image and then shrink it, and try crops one by one.
    """

    def __init__(
        self,
        size: tuple[int, int],
        zoom_out: float = 0.5,
        max_zoom_out: float = 4.0,
        iou_crop: float = 1.0,
        fill: tuple[int, int, int] = (127, 127, 127),
    ):
        self.size, self.zoom_out, self.max_zoom_out, self.iou_crop = tuple(size), zoom_out, max_zoom_out, iou_crop
        self.fill = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        height, width = image.shape[-2:]
        boxes = target["boxes"].as_subclass(torch.Tensor)
        region = (0, 0, height, width)
        if torch.rand(()) < self.zoom_out:
            region = self.canvas(height, width)
        if len(boxes) and torch.rand(()) < self.iou_crop:
            region = iou_crop(boxes, region)
        top, left, height, width = region
        scale = boxes.new_tensor([self.size[1] / width, self.size[0] / height]).repeat(2)
        moved = (boxes - boxes.new_tensor([left, top]).repeat(2)) * scale
        moved = clip_boxes_to_image(moved, self.size)
        keep = (moved[:, 2:] - moved[:, :2] >= 1).all(1) & centers_inside(boxes, region)
        moved = tv_tensors.BoundingBoxes(moved, format="XYXY", canvas_size=self.size)
        target = resample_masks(filter_objects(target | {"boxes": moved}, keep), region, self.size)
        return self.resample(image, region), target

    def canvas(self, height: int, width: int) -> Region:
        """A canvas of 1 to `max_zoom_out` times the sides of the image, with the image anywhere on it."""
        ratio, down, right = torch.rand(3).tolist()
        ratio = 1 + ratio * (self.max_zoom_out - 1)
        canvas_height, canvas_width = int(height * ratio), int(width * ratio)
        return -int(down * (canvas_height - height)), -int(right * (canvas_width - width)), canvas_height, canvas_width

    def resample(self, image: tv_tensors.Image, region: Region) -> tv_tensors.Image:
        """The region resized to `size`: only the part inside the image is resampled, the rest is filled."""
        top, left, height, width = region
        inside_top, inside_left = max(0, top), max(0, left)
        inside_bottom = min(image.shape[-2], top + height)
        inside_right = min(image.shape[-1], left + width)
        rows = [round((y - top) * self.size[0] / height) for y in (inside_top, inside_bottom)]
        columns = [round((x - left) * self.size[1] / width) for x in (inside_left, inside_right)]
        inside = image.as_subclass(torch.Tensor)[:, inside_top:inside_bottom, inside_left:inside_right]
        shape = (max(1, rows[1] - rows[0]), max(1, columns[1] - columns[0]))
        inside = F.resize_image(inside, list(shape), antialias=True)
        if shape == self.size:
            return tv_tensors.Image(inside)
        result = self.fill.expand(3, *self.size).clone()
        row, column = min(rows[0], self.size[0] - shape[0]), min(columns[0], self.size[1] - shape[1])
        result[:, row : row + shape[0], column : column + shape[1]] = inside
        return tv_tensors.Image(result)


def iou_crop(boxes: torch.Tensor, region: Region) -> Region:
    """A random crop of `region` with at least one of `boxes`, float32 [M,4] xyxy with M > 0.

    As in v2.RandomIoUCrop, a minimum IoU is drawn from 0, 0.1, 0.3, 0.5, 0.7, 0.9 and "no crop". Of TRIALS random
    crops with sides of MIN_SCALE to 1 of the region's, drawn together, the first is returned that has an aspect ratio
    of 0.5 to 2 and that IoU with an object whose center it contains. If none has, a minimum IoU is drawn again.
    """
    top, left, height, width = region
    while True:
        min_iou = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)[int(torch.randint(7, ()))]
        if min_iou is None:
            return region
        draws = torch.rand(4, TRIALS, 1)
        scales = MIN_SCALE + (1 - MIN_SCALE) * draws[:2]
        crop_height, crop_width = (scales[0] * height).floor(), (scales[1] * width).floor()  # [TRIALS,1]
        crop_top = top + (draws[2] * (height - crop_height)).floor()
        crop_left = left + (draws[3] * (width - crop_width)).floor()
        crops = torch.cat([crop_left, crop_top, crop_left + crop_width, crop_top + crop_height], dim=1)  # [TRIALS,4]
        inside = centers_inside(boxes, (crop_top, crop_left, crop_height, crop_width))  # [TRIALS,M]
        max_iou = pairwise_iou(crops, boxes).masked_fill(~inside, -1).amax(1)
        aspect = (crop_width / crop_height)[:, 0]
        valid = (max_iou >= min_iou) & (aspect > 0.5) & (aspect < 2)
        if valid.any():
            x1, y1, x2, y2 = crops[int(valid.int().argmax())].int().tolist()
            return y1, x1, y2 - y1, x2 - x1


def centers_inside(boxes: torch.Tensor, region: Sequence) -> torch.Tensor:
    """bool [M]: is the center of each of `boxes` [M,4] xyxy in the region; [N,M] for N regions, given as four [N,1]."""
    top, left, height, width = region
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (x > left) & (x < left + width) & (y > top) & (y < top + height)


class ResizeShortestEdge:
    """Resize to a shortest side drawn from `min_sides`, or to a longest side of `max_side` where that is smaller.

    As detectron2's transform of that name: both sides are rounded to whole pixels, which v2.RandomShortestSize rounds
    down. Objects less than `min_box_size` pixels wide or high are dropped, because a box without area has no finite
    regression target.
    """

    def __init__(self, min_sides: Sequence[int], max_side: int, min_box_size: float = 0.01):
        self.min_sides, self.max_side, self.min_box_size = tuple(min_sides), max_side, min_box_size

    def resized(self, size: tuple[int, int], min_side: int | None = None) -> tuple[int, int]:
        """(h, w) of an image of `size` (h, w) after resizing to `min_side`, by default the first of `min_sides`."""
        min_side = self.min_sides[0] if min_side is None else min_side
        scale = min(min_side / min(size), self.max_side / max(size))
        return max(1, round(scale * size[0])), max(1, round(scale * size[1]))

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        height, width = image.shape[-2:]
        size = self.resized((height, width), self.min_sides[int(torch.randint(len(self.min_sides), ()))])
        boxes = target["boxes"].as_subclass(torch.Tensor)
        scaled = boxes * (boxes.new_tensor(size[::-1]) / boxes.new_tensor([width, height])).repeat(2)
        scaled = clip_boxes_to_image(scaled, size)
        keep = (scaled[:, 2:] - scaled[:, :2] >= self.min_box_size).all(1)
        scaled = tv_tensors.BoundingBoxes(scaled, format="XYXY", canvas_size=size)
        target = resample_masks(filter_objects(target | {"boxes": scaled}, keep), (0, 0, height, width), size)
        image = F.resize_image(image.as_subclass(torch.Tensor), list(size), antialias=True)
        return tv_tensors.Image(image), target


def resample_masks(target: dict, region: Region, size: tuple[int, int]) -> dict:
    """`target` with its masks, if it has any, cropped to `region` and resized to `size` (h, w); 0 beyond the image.

    A pixel takes the value at its center (nearest-exact), which keeps the edges of a mask within half a pixel of those
    of its box; v2 takes the value at its corner (nearest). 20 masks resized from 480 x 640 to 800 x 1067 pixels take
    10 ms with numpy, 20 ms with torch's interpolate.
    """
    if "masks" not in target:
        return target
    masks = target["masks"].numpy()
    rows, columns = (
        start + ((np.arange(count) + 0.5) * (length / count)).astype(np.int64)
        for start, length, count in zip(region[:2], region[2:], size)
    )
    resized = masks.take(rows, axis=1, mode="clip").take(columns, axis=2, mode="clip")
    resized[:, (rows < 0) | (rows >= masks.shape[1])] = 0
    resized[:, :, (columns < 0) | (columns >= masks.shape[2])] = 0
    return target | {"masks": tv_tensors.Mask(torch.from_numpy(resized))}


class PhotometricDistort:
    """SSD's color changes, as v2.RandomPhotometricDistort draws them, by one `adjust_color`: 0.7 ms against 4.5 ms for
    300 x 300 pixels.

    probability   of each of: brightness times 0.875 to 1.125, contrast and saturation times 0.5 to 1.5, hue shifted by
                  up to 0.05, a random order of R, G, B
    """

    def __init__(self, probability: float = 0.5):
        self.probability = probability

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        draws = torch.rand(11, dtype=torch.float64).tolist()
        applied = [draw < self.probability for draw in draws[:5]]
        if not any(applied):
            return image, target
        brightness, contrast, saturation, hue, order, contrast_first = draws[5:]
        factors = (0.875 + 0.25 * brightness, 0.5 + contrast, 0.5 + saturation, 0.05 * (2 * hue - 1))
        factors = dict(itertools.compress(zip(COLOR_CHANGES, factors), applied))
        channels = CHANNEL_ORDERS[int(6 * order) if applied[4] else 0]
        return adjust_color(image, factors, contrast_first < 0.5, channels), target


class ColorJitter:
    """v2.ColorJitter of an image by one `adjust_color`: 0.5 ms against 4.6 ms for 224 x 224 pixels.

    amount   0 to 1: brightness, contrast and saturation are multiplied by up to 1 - amount to 1 + amount, hue is
             shifted by up to `amount`
    """

    def __init__(self, amount: float):
        self.amount = amount

    def __call__(self, image: tv_tensors.Image) -> tv_tensors.Image:
        *draws, contrast_first = torch.rand(5, dtype=torch.float64).tolist()
        brightness, contrast, saturation, hue = (self.amount * (2 * draw - 1) for draw in draws)
        factors = (1 + brightness, 1 + contrast, 1 + saturation, hue)
        return adjust_color(image, dict(zip(COLOR_CHANGES, factors)), contrast_first < 0.5)


def adjust_color(
    image: tv_tensors.Image,
    factors: Mapping[str, float],
    contrast_first: bool,
    channels: Sequence[int] = CHANNEL_ORDERS[0],
) -> tv_tensors.Image:
    """`image`, uint8 [3,H,W], with other colors.

    factors          of brightness, contrast and saturation (1: no change), shift of hue (0: no change, 1: full circle)
    contrast_first   contrast before saturation and hue; else after them
    channels         the order of R, G, B in the result

    Each change is an affine map of RGB, so together they are one matrix. Unlike v2, values are clipped once, at the
    end, and hue is rotated in YIQ instead of HSV.
    """
    pixels = image.as_subclass(torch.Tensor).flatten(1).float()  # [3,HW]
    matrix, offset = color_matrix(factors, contrast_first, pixels.mean(1).double().numpy())
    matrix, offset = torch.from_numpy(matrix[channels]).float(), torch.from_numpy(offset[channels]).float()
    adjusted = torch.addmm((offset + 0.5)[:, None], matrix, pixels).clamp_(0, 255)  # 0.5: uint8 truncates
    return tv_tensors.Image(adjusted.to(torch.uint8).view(image.shape))


def color_matrix(factors: Mapping[str, float], contrast_first: bool, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(matrix [3,3], offset [3]) of `adjust_color` on values of 0 to 255; `mean` [3] is that of the image's R, G, B."""
    order = COLOR_CHANGES if contrast_first else ("brightness", "saturation", "hue", "contrast")
    matrix, offset = np.eye(3), np.zeros(3)
    for name in (name for name in order if name in factors):
        factor = factors[name]
        change, shift = factor * np.eye(3), 0.0  # brightness, contrast
        if name == "contrast":
            shift = (1 - factor) * (LUMA @ (matrix @ mean + offset))  # about the mean luma
        elif name == "saturation":
            change = change + (1 - factor) * LUMA  # in every row: toward the luma of the pixel
        elif name == "hue":
            cos, sin = math.cos(2 * math.pi * factor), math.sin(2 * math.pi * factor)
            change = YIQ_TO_RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ RGB_TO_YIQ
        matrix, offset = change @ matrix, change @ offset + shift
    return matrix, offset
