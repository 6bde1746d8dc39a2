"""3D boxes, radar and velocities drawn on camera images and seen from above (bird's-eye view)."""

import colorsys
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from ops.geometry import apply_affine, corners, project, project_boxes
from visualize.draw2d import class_color, draw_labels, enlarged

# ends of the edges of a box, in the order of ops.geometry.corners: the front, the back, between them
EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
FRONT_CROSS = [(0, 2), (1, 3)]
LIGHT_GRAY, GRAY, WHITE = (200, 200, 200), (110, 110, 110), (255, 255, 255)
GREEN, ORANGE, BLUE = (0, 140, 0), (230, 110, 0), (40, 90, 220)  # ground truth, prediction, radar
ARROW_SECONDS = 1.0  # of movement that a velocity arrow shows
MAX_DISTANCE, PILLAR_HEIGHT = 60.0, 1.5  # meters: range of a bird's-eye view; height of a radar point in an overview
LEGEND = [("ground truth", GREEN), ("prediction", ORANGE), ("radar", BLUE)]
LEGEND += [(f"arrows: movement in {ARROW_SECONDS:.0f} s", GRAY)]
LEGEND += [(f"radar on the images: red is near, blue {MAX_DISTANCE:.0f} m away", GRAY)]
GAP = 6  # pixels between the images of an overview
CAMERA_GRID = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
CAMERA_SIZE = (450, 800)  # (h, w) of a camera's image in an overview


def truth_and_predictions(samples: Iterable[tuple], threshold: float = 0.3) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, image uint8 [3,H,W]): the camera image with radar points and ground truth above the same with the
    predictions of a score above `threshold`; then both in a bird's-eye view.

    samples   (image uint8 [3,H,W], target, detections) each, see data.nuscenes and ops.decode3d
    """
    for number, (image, target, detections) in enumerate(samples):
        selected = detections["scores"] > threshold
        points, distances = project(target["radar"][:, :3], target["calib"])
        points, views, both = apply_affine(points, target["affine"]), [], []
        for boxes in (target, {name: value[selected] for name, value in detections.items()}):
            solid, pixels, depth = project_boxes(boxes, target["calib"], target["affine"])
            views.append(draw_camera(image, pixels, depth, boxes["labels"], points, distances))
            both.append({**boxes, "corners": solid})
        yield f"truth above, predictions below/{number}", torch.cat(views, dim=1)
        yield f"bird's-eye view, truth green/{number}", draw_birds_eye(*both, target["radar"])


def draw_key_frame(
    samples: Sequence[tuple], truths: Sequence[Mapping], detections: Sequence[Mapping], names: Sequence[str]
) -> torch.Tensor:
    """The camera images of a key frame with predicted boxes and radar, and all of it in a bird's-eye view: uint8
    [3,H,W].

    samples              (image, target) of each camera, in pixels of the files. The first is up in the bird's-eye view
    truths, detections   of each camera, see ops.decode3d
    names                of the classes
    """
    views, truth_boxes, predicted_boxes, radar, first = {}, [], [], [], samples[0][1]
    for (image, target), truth, predicted in zip(samples, truths, detections, strict=True):
        views[target["camera"]] = _draw_view(image, target, predicted, names)
        rotation = (first["rotation"].mT @ target["rotation"]).float()  # from this camera's frame to the first one's
        translation = (first["rotation"].mT @ (target["translation"] - first["translation"])).float()
        truth_boxes.append(_move_boxes(truth, rotation, translation))
        predicted_boxes.append(_move_boxes(predicted, rotation, translation))
        points, velocity = target["radar"][:, :3] @ rotation.T + translation, target["radar"][:, 3:]
        radar.append(torch.cat([points, velocity @ rotation.T[::2, ::2]], dim=1))
    truth, predicted = (
        {name: torch.cat([boxes[name] for boxes in parts]) for name in parts[0]}
        for parts in (truth_boxes, predicted_boxes)
    )
    side = 2 * CAMERA_SIZE[0]
    return overview(views, draw_birds_eye(truth, predicted, torch.cat(radar), side=side, center=first["camera"]))


def draw_image(
    image: torch.Tensor, detections: Mapping[str, torch.Tensor], calib: torch.Tensor, names: Sequence[str]
) -> torch.Tensor:
    """`image` uint8 [3,H,W] with 3D boxes and their class, score and distance; enlarged if it is small.

    detections   see ops.decode3d; calib [3,4] of the image; names of the classes
    """
    image, zoom = enlarged(image)
    _, corners, depth = project_boxes(detections, calib, torch.eye(2, 3) * zoom)
    points = torch.zeros(0, 2)  # no radar
    texts = _texts(detections, names)
    return draw_camera(image, corners, depth, detections["labels"], points, points[:, 0], texts=texts)


def _texts(detections, names):
    """Class, score and distance of each box."""
    columns = detections["labels"].tolist(), detections["scores"].tolist(), detections["center"][:, 2].tolist()
    return [f"{names[label]} {score:.2f}, {distance:.0f} m" for label, score, distance in zip(*columns)]


def _draw_view(image, target, detections, names):
    """A camera's image in CAMERA_SIZE with predicted boxes, their texts, and radar points as pillars."""
    height, width = CAMERA_SIZE
    affine = torch.tensor([[width / image.shape[-1], 0, 0], [0, height / image.shape[-2], 0]])
    _, corners, depth = project_boxes(detections, target["calib"], affine)
    feet = target["radar"][:, :3]
    feet_pixels, distances = project(feet, target["calib"])
    top_pixels, _ = project(feet - feet.new_tensor([0, PILLAR_HEIGHT, 0]), target["calib"])
    labels, texts = detections["labels"], _texts(detections, names)
    image = F.resize_image(image, list(CAMERA_SIZE), antialias=True)
    feet_pixels, top_pixels = apply_affine(feet_pixels, affine), apply_affine(top_pixels, affine)
    return draw_camera(image, corners, depth, labels, feet_pixels, distances, top_pixels, texts)


def _move_boxes(boxes, rotation, translation):
    """What draw_birds_eye needs of boxes, in the frame of another camera."""
    solid = corners(boxes["center"], boxes["dims"], boxes["yaw"])
    return {
        "corners": solid @ rotation.T + translation,
        "center": boxes["center"] @ rotation.T + translation,
        "velocity": boxes["velocity"] @ rotation.T,
    }


def draw_camera(
    image: torch.Tensor,
    corners: torch.Tensor,
    depth: torch.Tensor,
    labels: torch.Tensor,
    points: torch.Tensor,
    distances: torch.Tensor,
    tops: torch.Tensor | None = None,
    texts: Sequence[str] | None = None,
) -> torch.Tensor:
    """`image` uint8 [3,H,W] with boxes as wireframes, their front crossed, and radar points as dots; same shape.

    corners    [M,8,2] pixels of the corners of ops.geometry.corners
    depth      [M,8] meters: an edge with an end behind the camera is not drawn
    labels     [M] classes, for the colors
    points     [P,2] pixels of radar points, distances [P] meters: red is near, blue is MAX_DISTANCE
    tops       [P,2] pixels of the upper ends of pillars on the points; None: dots only
    texts      one per box, in order of importance; None: no text
    """
    drawn = F.to_pil_image(image.as_subclass(torch.Tensor).cpu())
    pen, width = ImageDraw.Draw(drawn), max(1, round(max(image.shape[-2:]) / 500))
    radius, tops = 2 * width, points if tops is None else tops
    for (x, y), top, distance in zip(points.tolist(), tops.tolist(), distances.tolist()):
        hue = 0.66 * min(1.0, distance / MAX_DISTANCE)
        color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1, 1))
        pen.line([x, y, *top], fill=color, width=width)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=(0, 0, 0))
    in_front = depth > 0.1
    for box, visible, label in reversed(list(zip(corners.tolist(), in_front.tolist(), labels.tolist()))):
        for a, b in EDGES + FRONT_CROSS:
            if visible[a] and visible[b]:
                pen.line([*box[a], *box[b]], fill=class_color(label), width=width)
    if texts is not None:
        draw_labels(pen, drawn.size, *_labels(corners, in_front, labels, texts, min_height=drawn.height / 18))
    return F.pil_to_tensor(drawn)


def _labels(corners, in_front, labels, texts, min_height):
    """(boxes, texts, colors) of the boxes at least `min_height` pixels high: the many far ones have no text."""
    boxes, shown, colors = [], [], []
    for pixels, visible, label, text in zip(corners, in_front, labels.tolist(), texts):
        pixels = pixels[visible]
        if len(pixels) and pixels[:, 1].max() - pixels[:, 1].min() >= min_height:
            boxes.append([*pixels.amin(0).tolist(), *pixels.amax(0).tolist()])
            shown.append(text)
            colors.append(class_color(label))
    return boxes, shown, colors


def draw_birds_eye(
    truth: Mapping[str, torch.Tensor],
    predicted: Mapping[str, torch.Tensor],
    points: torch.Tensor,
    max_distance: float = MAX_DISTANCE,
    side: int = 480,
    center: str = "",
) -> torch.Tensor:
    """The surroundings of a camera from above, the camera at the middle of the lower edge: uint8 [3,side,side].

    truth, predicted   {"corners": [M,8,3] meters in the camera's frame, "center": [M,3], "velocity": [M,3] m/s}
    points             radar [P,5] x, y, z, vx, vz in meters and m/s
    max_distance       meters ahead, and to both sides together. There is a circle every 10 m
    center             name of the camera, if it is to be at the center, with `max_distance` to each side
    """
    drawn = Image.new("RGB", (side, side), WHITE)
    pen, scale = ImageDraw.Draw(drawn), side / max_distance / (2 if center else 1)
    middle, width = side / 2 if center else side, max(1, round(side / 480))
    text = {"font_size": max(10, side / 55), "stroke_width": 2 * width, "stroke_fill": WHITE}

    def place(x, z):
        return side / 2 + x * scale, middle - z * scale

    for distance in range(10, int(max_distance) + 1, 10):
        (left, top), (right, bottom) = place(-distance, distance), place(distance, -distance)
        pen.arc((left, top, right, bottom), 0 if center else 180, 360, fill=LIGHT_GRAY)
        position = place(distance * math.sin(0.6), distance * math.cos(0.6))
        pen.text(position, f"{distance} m", fill=GRAY, anchor="mm", **text)
    u, v = place(0, 0)
    pen.polygon([(u - 4, v + 5), (u + 4, v + 5), (u, v - 7)], fill=GRAY)
    for x, _, z, vx, vz in points.tolist():
        u, v = place(x, z)
        pen.ellipse((u - 2, v - 2, u + 2, v + 2), fill=BLUE)
        _draw_arrow(pen, (u, v), place(x + ARROW_SECONDS * vx, z + ARROW_SECONDS * vz), BLUE, 1)
    for boxes, color in ((truth, GREEN), (predicted, ORANGE)):
        velocity = boxes["velocity"].nan_to_num().tolist()
        for box, (x, _, z), (vx, _, vz) in zip(boxes["corners"].tolist(), boxes["center"].tolist(), velocity):
            ground = [place(box[i][0], box[i][2]) for i in (2, 3, 7, 6)]  # the lower corners, those of the front first
            pen.line([*ground, ground[0]], fill=color, width=width)
            pen.line(ground[:2], fill=color, width=width + 2)
            _draw_arrow(pen, place(x, z), place(x + ARROW_SECONDS * vx, z + ARROW_SECONDS * vz), color, width + 1)
    lines = LEGEND + [(f"up: direction of {center}", GRAY)] * bool(center)
    for number, (line, color) in enumerate(lines):
        pen.text((4, 4 + number * side / 40), line, fill=color, **text)
    return F.pil_to_tensor(drawn)


def _draw_arrow(pen, start, end, color, width):
    """A line from start to end, both (x, y) pixels, with a head if it is long enough for one."""
    pen.line([start, end], fill=color, width=width)
    x, y = end[0] - start[0], end[1] - start[1]
    length = math.hypot(x, y)
    if length >= 6:
        x, y = x / length, y / length
        for across in (-1, 1):
            side = (end[0] - 4 * x + 3 * across * y, end[1] - 4 * y - 3 * across * x)
            pen.line([end, side], fill=color, width=width)


def overview(views: Mapping[str, torch.Tensor], above: torch.Tensor) -> torch.Tensor:
    """The cameras of a key frame arranged as they are on the vehicle, with a bird's-eye view at their right.

    views   name of a camera, such as CAM_FRONT -> uint8 [3,h,w], drawn in CAMERA_SIZE; missing ones stay white
    above   the bird's-eye view, uint8 [3,side,side]

    Returns uint8 [3,2 h + GAP,3 (w + GAP) + 2 h + GAP].
    """
    height, width = CAMERA_SIZE
    side = 2 * height + GAP
    drawn = Image.new("RGB", (3 * (width + GAP) + side, side), WHITE)
    pen = ImageDraw.Draw(drawn)
    for number, camera in enumerate(CAMERA_GRID):
        left, top = number % 3 * (width + GAP), number // 3 * (height + GAP)
        if camera in views:
            drawn.paste(F.to_pil_image(F.resize_image(views[camera], list(CAMERA_SIZE), antialias=True)), (left, top))
        corner = pen.textbbox((left + 6, top + 6), camera, font_size=height / 25)
        pen.rectangle((left, top, corner[2] + 6, corner[3] + 6), fill=WHITE)
        pen.text((left + 6, top + 6), camera, fill=GRAY, font_size=height / 25)
    drawn.paste(F.to_pil_image(F.resize_image(above, [side, side], antialias=True)), (3 * (width + GAP), 0))
    return F.pil_to_tensor(drawn)
