"""Transforms of camera images with 3D boxes and radar, see data.nuscenes.dataset.

Pixel coordinates are continuous: the first pixel covers 0 to 1, so a flip maps x to width - x, as in data.transforms.
"""

import math

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.transforms import PhotometricDistort, Region, Sample, filter_objects
from ops.geometry import wrap

Size = tuple[int, int]


class ShiftAndScale:
    """One crop and resize to the network's size that keeps the aspect ratio of the pixels.

    size    (h, w) of the result: the width of the image becomes w, and rows beyond h are cut off at top and bottom
            alike, before shift and scale apply
    shift   standard deviation of the shift along x and along y, relative to the longer side of the image; at most twice
            that
    scale   standard deviation of the zoom around 1; at most that

    Outside the image it is black. Objects less than a pixel wide or high are left out. `boxes`, `amodal` and `affine`
    change; the 3D fields stay, because the camera does.
    """

    def __init__(self, size: Size, shift: float = 0.0, scale: float = 0.0):
        self.size, self.shift, self.scale = tuple(size), shift, scale

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        region = self.random_region(*image.shape[-2:])
        top, left, height, width = region
        zoom = torch.tensor([self.size[1] / width, self.size[0] / height])
        corner = torch.tensor([left, top], dtype=torch.float32)
        boxes = (target["boxes"].as_subclass(torch.Tensor) - corner.repeat(2)) * zoom.repeat(2)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([self.size[1], self.size[0]]).repeat(2))
        affine = target["affine"].double() * zoom.double()[:, None]
        affine[:, 2] -= (corner * zoom).double()
        changed = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.size),
            "amodal": (target["amodal"] - corner) * zoom,
            "affine": affine.float(),
        }
        target = filter_objects(target | changed, (boxes[:, 2:] - boxes[:, :2] >= 1).all(1))
        return self.resample(image.as_subclass(torch.Tensor), region), target

    def random_region(self, height: int, width: int) -> Region:
        """(top, left, height, width) of the part to show, in whole pixels of an image of `height` x `width`."""
        dx, dy, zoom = 0.0, 0.0, 1.0
        if self.shift:
            limit = 2 * self.shift
            dx, dy = ((self.shift * torch.randn(2)).clamp(-limit, limit) * max(height, width)).tolist()
        if self.scale:
            zoom += float((self.scale * torch.randn(())).clamp(-self.scale, self.scale))
        region_width = max(1, round(width * zoom))
        region_height = max(1, round(self.size[0] * region_width / self.size[1]))
        top = math.floor((height - region_height) / 2 + dy)
        left = math.floor((width - region_width) / 2 + dx)
        return top, left, region_height, region_width

    def resample(self, image: torch.Tensor, region: Region) -> tv_tensors.Image:
        """The region of `image` uint8 [3,H,W], resized to [3,h,w]."""
        top, left, height, width = region
        y1, y2 = max(0, top), max(0, min(image.shape[-2], top + height))
        x1, x2 = max(0, left), max(0, min(image.shape[-1], left + width))
        shown = image[:, y1:y2, x1:x2]
        if shown.shape[-2:] != (height, width):
            canvas = image.new_zeros(height, width, 3).permute(2, 0, 1)  # channels last
            if shown.numel():
                canvas[:, y1 - top : y2 - top, x1 - left : x2 - left] = shown
            shown = canvas
        return tv_tensors.Image(F.resize_image(shown, list(self.size), antialias=True))


class HorizontalFlip:
    """Mirror image, boxes, 3D fields, radar and camera with a probability."""

    def __init__(self, probability: float = 0.5):
        self.probability = probability

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        if torch.rand(()) >= self.probability:
            return image, target
        return F.horizontal_flip(image), flip_target(target, image.shape[-1])


def flip_target(target: dict, width: int) -> dict:
    """The target of the mirrored image, `width` pixels wide. Applied twice it is the identity.

    The x axis of the camera's frame is reversed: `rotation` becomes a reflection, which still maps to the true places
    in the global frame.
    """
    mirror = torch.tensor([-1.0, 1, 1])
    file_width = target["size"][1]
    calib = target["calib"] * torch.tensor([-1.0, 1, 1, 1])  # from mirrored points to pixels of the original file
    calib = torch.stack([file_width * calib[2] - calib[0], calib[1], calib[2]])
    affine = target["affine"].clone()
    affine[0, 2] = width - affine[0, 2] - affine[0, 0] * file_width
    amodal = target["amodal"].clone()
    amodal[:, 0] = width - amodal[:, 0]
    return target | {
        "boxes": F.horizontal_flip(target["boxes"]),
        "amodal": amodal,
        "center": target["center"] * mirror,
        "velocity": target["velocity"] * mirror,
        "yaw": wrap(math.pi - target["yaw"]),
        "alpha": wrap(math.pi - target["alpha"]),
        "radar": target["radar"] * torch.tensor([-1.0, 1, 1, -1, 1]),
        "calib": calib,
        "affine": affine,
        "rotation": target["rotation"] * mirror.double(),
    }


def centerfusion_train(
    size: Size = (448, 800), flip: float = 0.5, shift: float = 0.1, scale: float = 0.0, color: float = 0.5
) -> v2.Compose:
    """Training augmentation; `flip` and `color` are probabilities, for `shift` and `scale` see `ShiftAndScale`."""
    steps = [ShiftAndScale(size, shift, scale), HorizontalFlip(flip)]
    return v2.Compose(steps + [PhotometricDistort(color)] * bool(color))


def centerfusion_eval(size: Size = (448, 800)) -> ShiftAndScale:
    """The whole image resized to the network's width."""
    return ShiftAndScale(size)
