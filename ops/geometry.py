"""Camera geometry: points, boxes and angles in the camera frame (x right, y down, z forward, meters) and their pixels.

`calib` is a camera's projection matrix [...,3,4]: depth * (u, v, 1) = calib (x, y, z, 1), as in KITTI and nuScenes.
Angles are radians in (-pi, pi]. The yaw of a box is its rotation about the y axis: at 0 it faces along x, at -pi/2
along z.
"""

import math

import torch

# Signs of a box's corners along its length, height and width, in nuscenes-devkit's order: the four at the front first,
# then the four at the rear, each clockwise from the upper left as seen from behind the box.
CORNERS = (
    (1, -1, 1),
    (1, -1, -1),
    (1, 1, -1),
    (1, 1, 1),
    (-1, -1, 1),
    (-1, -1, -1),
    (-1, 1, -1),
    (-1, 1, 1),
)


def project(points, calib):
    """Points [...,N,3], calib [...,3,4] -> (pixels [...,N,2], depth [...,N]).

    A point at depth 0 or below is not in front of the camera, and its pixels are meaningless.
    """
    image = points @ calib[..., :3].mT + calib[..., None, :, 3]  # [...,N,3]
    return image[..., :2] / image[..., 2:], image[..., 2]


def unproject(pixels, depth, calib):
    """The inverse of `project`: pixels [...,N,2], depth [...,N], calib [...,3,4] -> points [...,N,3]."""
    image = torch.cat([pixels * depth[..., None], depth[..., None]], dim=-1) - calib[..., None, :, 3]
    return torch.linalg.solve(calib[..., :3], image.mT).mT


def corners(center, dims, yaw):
    """Geometric centers [...,3], sizes h, w, l [...,3] and yaws [...] of boxes -> their corners [...,8,3]."""
    height, width, length = dims.unbind(-1)
    half_sizes = torch.stack([length, height, width], dim=-1) / 2
    offsets = half_sizes[..., None, :] * half_sizes.new_tensor(CORNERS)  # [...,8,3]: along length, down, along width
    along, down, across = offsets.unbind(-1)
    sine, cosine = yaw.sin()[..., None], yaw.cos()[..., None]
    rotated = torch.stack([cosine * along + sine * across, down, cosine * across - sine * along], dim=-1)
    return center[..., None, :] + rotated


def wrap(angle):
    """The same angle in (-pi, pi]; an angle already in that range is returned unchanged, bit for bit."""
    return angle - 2 * math.pi * torch.ceil((angle - math.pi) / (2 * math.pi))


def alpha_to_yaw(alpha, x_pixel, calib):
    """Observation angles [...,N] of boxes seen at columns x_pixel [...,N] by calib [...,3,4] -> yaws [...,N]."""
    return wrap(alpha + torch.atan2(x_pixel - calib[..., 0, 2, None], calib[..., 0, 0, None]))


def yaw_to_alpha(yaw, center):
    """Yaws [...] of boxes at `center` [...,3] -> the angles [...] at which the camera observes them."""
    return wrap(yaw - torch.atan2(center[..., 0], center[..., 2]))


def apply_affine(points, affine):
    """Points [...,N,2], affine [...,2,3] -> points [...,N,2]."""
    return points @ affine[..., :2].mT + affine[..., None, :, 2]


def invert_affine(affine):
    """The inverse of affine maps [...,2,3]."""
    linear = torch.linalg.inv(affine[..., :2])
    return torch.cat([linear, -linear @ affine[..., 2:]], dim=-1)


def project_boxes(boxes, calib, affine):
    """Project a dict with center, dims and yaw of [M] boxes by calib [3,4], then by affine [2,3].

    Returns (corners [M,8,3] in the camera frame, their pixels [M,8,2], their depths [M,8]).
    """
    points = corners(boxes["center"], boxes["dims"], boxes["yaw"])
    pixels, depth = project(points, calib)
    return points, apply_affine(pixels, affine), depth


def decode_depth(raw):
    """CenterNet's raw depth output, any shape -> meters in float32: 1 / sigmoid(raw) - 1."""
    return 1 / (raw.float().sigmoid() + 1e-6) - 1
