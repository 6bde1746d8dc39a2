"""Camera geometry: points, boxes and angles of the camera frame (x right, y down, z forward, metres) and their pixels.

`calib` is a camera's projection matrix [...,3,4]: depth * (u, v, 1) = calib (x, y, z, 1), as in KITTI and nuScenes.
Angles are radians in (-pi, pi]. The yaw of a box turns it about the y axis: at 0 it looks along x, at -pi/2 along z.
"""

import math

import torch

# Signs of a box's corners along its length, height and width, in the order of nuscenes-devkit: first the four in front,
# each face from upper left over upper right, seen from behind the box.
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

    Where the depth is 0 or below, the point is not in front of the camera and its pixels mean nothing.
    """
    image = points @ calib[..., :3].mT + calib[..., None, :, 3]  # [...,N,3]
    return image[..., :2] / image[..., 2:], image[..., 2]


def unproject(pixels, depth, calib):
    """The inverse of `project`: pixels [...,N,2], depth [...,N], calib [...,3,4] -> points [...,N,3]."""
    image = torch.cat([pixels * depth[..., None], depth[..., None]], dim=-1) - calib[..., None, :, 3]
    return torch.linalg.solve(calib[..., :3], image.mT).mT


def corners(center, dims, yaw):
    """Geometric centres [...,3], sizes h, w, l [...,3] and yaws [...] of boxes -> their corners [...,8,3]."""
    height, width, length = dims.unbind(-1)
    sizes = torch.stack([length, height, width], dim=-1) / 2
    local = sizes[..., None, :] * sizes.new_tensor(CORNERS)  # [...,8,3]: along length, down, along width
    along, down, across = local.unbind(-1)
    sine, cosine = yaw.sin()[..., None], yaw.cos()[..., None]
    turned = torch.stack([cosine * along + sine * across, down, cosine * across - sine * along], dim=-1)
    return center[..., None, :] + turned


def wrap(angle):
    """The same angle in (-pi, pi]; one that lies there already stays as it is, to the bit."""
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


def seen(boxes, calib, affine):
    """Boxes as a camera sees them: a dict with center, dims, yaw of [M] boxes -> (corners [M,8,3] in the camera frame,
    their pixels [M,8,2] after `affine`, their depths [M,8])."""
    solid = corners(boxes["center"], boxes["dims"], boxes["yaw"])
    pixels, depth = project(solid.flatten(0, 1), calib)
    return solid, apply_affine(pixels, affine).view(-1, 8, 2), depth.view(-1, 8)


def depth_of(raw):
    """Metres from what a network's depth heads say, any shape, in float32: 1 / sigmoid - 1, as published."""
    return 1 / (raw.float().sigmoid() + 1e-6) - 1
