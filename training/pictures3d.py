"""3D boxes, radar and velocities drawn: on the camera's picture, and from above."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from training.pictures import class_colour

EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
GREY, GREEN, ORANGE, BLUE = (200, 200, 200), (0, 140, 0), (230, 110, 0), (40, 90, 220)
SECONDS = 1.0  # that a velocity arrow shows


def on_camera(image, corners, depth, labels, points, distances, reach=60.0):
    """`image` uint8 [3,H,W] with boxes as wireframes, their front crossed, and radar returns as dots -> the same shape.

    corners    [M,8,2] pixels, the four of the front first, those of a face in their order around it
    depth      [M,8] metres: an edge with an end behind the camera is left out
    labels     [M], which choose the colour
    points     [P,2] pixels of returns, distances [P] metres: red is near, blue is `reach`
    """
    drawn = F.to_pil_image(image.as_subclass(torch.Tensor).cpu())
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(image.shape[-2:]) / 500))
    radius = 2 * width
    for (x, y), distance in zip(points.tolist(), distances.tolist()):
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(0.66 * min(1.0, distance / reach), 1, 1))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(0, 0, 0))
    for box, ahead, label in zip(corners.tolist(), (depth > 0.1).tolist(), labels.tolist()):
        for a, b in [*EDGES, (0, 2), (1, 3)]:
            if ahead[a] and ahead[b]:
                pen.line([*box[a], *box[b]], fill=class_colour(label), width=width)
    return F.pil_to_tensor(drawn)


def from_above(truth, found, points, reach=60.0, side=480):
    """What a camera sees from above, the camera at the middle of the lower edge: uint8 [3,side,side].

    truth, found   {"corners": [M,8,3] metres in the camera's frame, "center": [M,3], "velocity": [M,3] m/s}: green and
                   orange, the front thick, an arrow as far as the object goes in a second
    points         radar [P,5] x, y, z, vx, vz: blue, with its arrow
    reach          metres ahead; the picture is as wide as it is deep
    """
    drawn = Image.new("RGB", (side, side), (255, 255, 255))
    pen, scale = ImageDraw.Draw(drawn), side / reach

    def place(x, z):
        return side / 2 + x * scale, side - z * scale

    for distance in range(10, int(reach) + 1, 10):
        radius = distance * scale
        pen.arc((side / 2 - radius, side - radius, side / 2 + radius, side + radius), 180, 360, fill=GREY)
    for x, _, z, vx, vz in points.tolist():
        u, v = place(x, z)
        pen.ellipse((u - 2, v - 2, u + 2, v + 2), fill=BLUE)
        pen.line([(u, v), place(x + SECONDS * vx, z + SECONDS * vz)], fill=BLUE)
    for boxes, colour in ((truth, GREEN), (found, ORANGE)):
        arrows = np.nan_to_num(boxes["velocity"].cpu().numpy())
        for box, (x, _, z), (vx, _, vz) in zip(boxes["corners"].tolist(), boxes["center"].tolist(), arrows.tolist()):
            ground = [place(box[i][0], box[i][2]) for i in (2, 3, 7, 6)]  # the lower corners, the front's first
            pen.line([*ground, ground[0]], fill=colour, width=1)
            pen.line(ground[:2], fill=colour, width=3)
            pen.line([place(x, z), place(x + SECONDS * vx, z + SECONDS * vz)], fill=colour, width=2)
    return F.pil_to_tensor(drawn)
