"""3D boxes, radar and velocities drawn: on the camera's picture, from above, and all cameras of a moment together."""

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from training.pictures import class_colour, write_tags

EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
GREY, DARK, GREEN, ORANGE, BLUE = (200, 200, 200), (110, 110, 110), (0, 140, 0), (230, 110, 0), (40, 90, 220)
SECONDS = 1.0  # that a velocity arrow shows
LEGEND = ("green: truth, orange: found", "blue: radar", f"arrows: the way of {SECONDS:.0f} s")
GAP = 6  # pixels between the pictures of an overview
AROUND = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def on_camera(image, corners, depth, labels, points, distances, reach=60.0, tops=None, texts=None):
    """`image` uint8 [3,H,W] with boxes as wireframes, their front crossed, and radar returns as dots -> the same shape.

    corners    [M,8,2] pixels, the four of the front first, those of a face in their order around it
    depth      [M,8] metres: an edge with an end behind the camera is left out
    labels     [M], which choose the colour
    points     [P,2] pixels of returns, distances [P] metres: red is near, blue is `reach`
    tops       [P,2] pixels of the upper ends of returns that are shown as pillars; None: dots alone
    texts      one a box, the most important first; None: no text
    """
    drawn = F.to_pil_image(image.as_subclass(torch.Tensor).cpu())
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(image.shape[-2:]) / 500))
    radius = 2 * width
    ends = points if tops is None else tops
    for (x, y), end, distance in zip(points.tolist(), ends.tolist(), distances.tolist()):
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(0.66 * min(1.0, distance / reach), 1, 1))
        if tops is not None:
            pen.line([x, y, *end], fill=colour, width=width)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(0, 0, 0))
    ahead = depth > 0.1
    for box, front, label in reversed(list(zip(corners.tolist(), ahead.tolist(), labels.tolist()))):
        for a, b in [*EDGES, (0, 2), (1, 3)]:
            if front[a] and front[b]:
                pen.line([*box[a], *box[b]], fill=class_colour(label), width=width)
    if texts is not None:
        write_tags(pen, drawn.size, *tags_of(corners, ahead, labels, texts, least=drawn.height / 18))
    return F.pil_to_tensor(drawn)


def tags_of(corners, ahead, labels, texts, least):
    """(boxes, texts, colours) of the boxes that are `least` pixels high: among many, far ones have no text."""
    boxes, words, colours = [], [], []
    for pixels, front, label, text in zip(corners, ahead, labels.tolist(), texts):
        pixels = pixels[front]
        if len(pixels) and pixels[:, 1].max() - pixels[:, 1].min() >= least:
            boxes.append([*pixels.amin(0).tolist(), *pixels.amax(0).tolist()])
            words.append(text)
            colours.append(class_colour(label))
    return boxes, words, colours


def from_above(truth, found, points, reach=60.0, side=480, around=""):
    """What a camera sees from above, the camera at the middle of the lower edge: uint8 [3,side,side].

    truth, found   {"corners": [M,8,3] metres in the camera's frame, "center": [M,3], "velocity": [M,3] m/s}: green and
                   orange, the front thick, an arrow as far as the object goes in a second
    points         radar [P,5] x, y, z, vx, vz: blue, with its arrow
    reach          metres ahead; the picture is as wide as it is deep. Rings stand every 10 m
    around         name of the camera, which then is in the middle and looks up, `reach` metres to every side
    """
    drawn = Image.new("RGB", (side, side), (255, 255, 255))
    pen, scale = ImageDraw.Draw(drawn), side / reach / (2 if around else 1)
    middle = side / 2 if around else side

    def place(x, z):
        return side / 2 + x * scale, middle - z * scale

    for distance in range(10, int(reach) + 1, 10):
        (left, top), (right, bottom) = place(-distance, distance), place(distance, -distance)
        pen.arc((left, top, right, bottom), 0 if around else 180, 360, fill=GREY)
        u, v = place(distance * math.sin(0.6), distance * math.cos(0.6))
        pen.text((u, v), f"{distance} m", fill=DARK, font_size=max(10, side / 55), anchor="mm")
    for line, text in enumerate((*LEGEND, *[f"up: where {around} looks"] * bool(around))):
        pen.text((4, 4 + line * side / 40), text, fill=DARK, font_size=max(10, side / 55))
    u, v = place(0, 0)
    pen.polygon([(u - 4, v + 5), (u + 4, v + 5), (u, v - 7)], fill=DARK)
    for x, _, z, vx, vz in points.tolist():
        u, v = place(x, z)
        pen.ellipse((u - 2, v - 2, u + 2, v + 2), fill=BLUE)
        arrow(pen, (u, v), place(x + SECONDS * vx, z + SECONDS * vz), BLUE, 1)
    for boxes, colour in ((truth, GREEN), (found, ORANGE)):
        arrows = np.nan_to_num(boxes["velocity"].cpu().numpy())
        for box, (x, _, z), (vx, _, vz) in zip(boxes["corners"].tolist(), boxes["center"].tolist(), arrows.tolist()):
            ground = [place(box[i][0], box[i][2]) for i in (2, 3, 7, 6)]  # the lower corners, the front's first
            pen.line([*ground, ground[0]], fill=colour, width=1)
            pen.line(ground[:2], fill=colour, width=3)
            arrow(pen, place(x, z), place(x + SECONDS * vx, z + SECONDS * vz), colour, 2)
    return F.pil_to_tensor(drawn)


def arrow(pen, start, end, colour, width):
    """A line from start to end, both (x, y) pixels, with a head where it is long enough for one."""
    pen.line([start, end], fill=colour, width=width)
    x, y = end[0] - start[0], end[1] - start[1]
    length = math.hypot(x, y)
    if length >= 6:
        x, y = x / length, y / length
        for across in (-1, 1):
            side = (end[0] - 4 * x + 3 * across * y, end[1] - 4 * y - 3 * across * x)
            pen.line([end, side], fill=colour, width=width)


def overview(views, above, size=(450, 800)):
    """The cameras of one moment as they look about the vehicle, and what they see from above at their right.

    views   channel of a camera, such as CAM_FRONT -> uint8 [3,h,w]; those that lack stay white
    above   uint8 [3,side,side]
    size    (h, w) that a camera gets -> uint8 [3,2 h + GAP,3 (w + GAP) + 2 h + GAP]
    """
    height, width = size
    high = 2 * height + GAP
    drawn = Image.new("RGB", (3 * (width + GAP) + high, high), (255, 255, 255))
    pen = ImageDraw.Draw(drawn)
    for number, camera in enumerate(AROUND):
        left, top = number % 3 * (width + GAP), number // 3 * (height + GAP)
        if camera in views:
            drawn.paste(F.to_pil_image(F.resize_image(views[camera], list(size), antialias=True)), (left, top))
        corner = pen.textbbox((left + 6, top + 6), camera, font_size=height / 25)
        pen.rectangle((left, top, corner[2] + 6, corner[3] + 6), fill=(255, 255, 255))
        pen.text((left + 6, top + 6), camera, fill=DARK, font_size=height / 25)
    drawn.paste(F.to_pil_image(F.resize_image(above, [high, high], antialias=True)), (3 * (width + GAP), 0))
    return F.pil_to_tensor(drawn)
