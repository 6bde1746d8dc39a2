"""Paired transforms of a camera's picture with 3D boxes and radar (see data.nuscenes_radar), and the recipes of them.

Pixels are continuous: the first covers 0 to 1, so a flip takes x to width - x, as it does in data.transforms.
"""

import math

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from data.transforms import Chain, PhotometricDistort, keep_objects
from ops.geometry import wrap


class ShiftAndScale:
    """One crop and resize to the network's size that keeps the aspect of the file's pixels.

    size    (h, w) of the result: the picture's width becomes w, and what is too high is cut off evenly, before
    shift   standard deviation of the shift along x and along y, in longer sides of the picture; twice that at most
    scale   standard deviation of the zoom about 1; once that at most
    fill    R, G, B beside the picture

    Objects less than a pixel wide or high are left out. `amodal` and `affine` follow; what is in metres stays, because
    the camera (`calib`) does.
    """

    def __init__(self, size, shift=0.0, scale=0.0, fill=(0, 0, 0)):
        self.size, self.shift, self.scale = tuple(size), shift, scale
        self.fill = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)

    def __call__(self, image, target):
        region = self.region(*image.shape[-2:])
        top, left, height, width = region
        zoom = torch.tensor([self.size[1] / width, self.size[0] / height])
        corner = torch.tensor([left, top], dtype=torch.float32)
        boxes = (target["boxes"].as_subclass(torch.Tensor) - corner.repeat(2)) * zoom.repeat(2)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([self.size[1], self.size[0]]).repeat(2))
        affine = target["affine"].double() * zoom.double()[:, None]
        affine[:, 2] -= (corner * zoom).double()
        changed = {"boxes": boxes, "amodal": (target["amodal"] - corner) * zoom, "affine": affine.float()}
        target = keep_objects(target | changed, (boxes[:, 2:] - boxes[:, :2] >= 1).all(1))
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=self.size)
        return self.resample(image.as_subclass(torch.Tensor), region), target

    def region(self, height, width):
        """(top, left, height, width) of what is shown, in whole pixels of a picture of `height` x `width`."""
        across, down, zoom = 0.0, 0.0, 1.0
        if self.shift:
            limit = 2 * self.shift
            across, down = ((self.shift * torch.randn(2)).clamp(-limit, limit) * max(height, width)).tolist()
        if self.scale:
            zoom += float((self.scale * torch.randn(())).clamp(-self.scale, self.scale))
        shown_width = max(1, round(width * zoom))
        shown_height = max(1, round(self.size[0] * shown_width / self.size[1]))
        top = math.floor((height - shown_height) / 2 + down)
        left = math.floor((width - shown_width) / 2 + across)
        return top, left, shown_height, shown_width

    def resample(self, image, region):
        """The region of `image` uint8 [3,H,W] as tv_tensors.Image [3,h,w]; what lies outside the picture is `fill`."""
        top, left, height, width = region
        rows = max(0, top), max(0, min(image.shape[-2], top + height))
        columns = max(0, left), max(0, min(image.shape[-1], left + width))
        shown = image[:, rows[0] : rows[1], columns[0] : columns[1]]
        if shown.shape[-2:] != (height, width):
            whole = self.fill.permute(1, 2, 0).expand(height, width, 3).clone().permute(2, 0, 1)  # channels last
            first, start = rows[0] - top, columns[0] - left
            if shown.numel():
                whole[:, first : first + shown.shape[-2], start : start + shown.shape[-1]] = shown
            shown = whole
        return tv_tensors.Image(F.resize_image(shown, list(self.size), antialias=True))


class Flip:
    """The mirrored world, by chance: picture, boxes, angles, places, velocities, radar and the camera itself.

    The x axis of the camera's frame turns round, so `rotation` still leads to the true global place, as a reflection.
    """

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, image, target):
        if torch.rand(()) >= self.probability:
            return image, target
        return F.horizontal_flip(image), mirrored(target, image.shape[-1])


def mirrored(target, width):
    """The target of the mirrored picture, `width` pixels wide. Twice is the identity."""
    mirror = torch.tensor([-1.0, 1, 1])
    file_width = target["size"][1]
    calib = target["calib"] * torch.tensor([-1.0, 1, 1, 1])  # mirrored points -> pixels as they were
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


def train(size=(448, 800), flip=0.5, shift=0.1, scale=0.0, colour=0.5):
    """Training augmentation; `flip` and `colour` are probabilities, `shift` and `scale` as in `ShiftAndScale`."""
    steps = [ShiftAndScale(size, shift, scale), Flip(flip)]
    return Chain(*steps, *[PhotometricDistort(colour)] * bool(colour))


def evaluate(size=(448, 800)):
    """The whole picture at the network's width, nothing else."""
    return ShiftAndScale(size)
