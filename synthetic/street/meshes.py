"""What the objects of synthetic.street.simulation look like: boxes with patterns, as flat colored quads."""

import numpy as np

from synthetic.street.simulation import BUILDING, TREE

GLASS, DARK, TIRE, LAMP, TAIL = (150, 200, 225), (45, 45, 50), (25, 25, 25), (255, 246, 190), (225, 25, 30)
BODY = None  # the object's own color, one of BODY_COLORS
BODY_COLORS = {
    0: ((186, 30, 38), (35, 70, 160), (200, 203, 208), (60, 62, 68), (235, 235, 230)),
    1: ((20, 120, 90), (25, 135, 70), (10, 105, 110)),
    2: ((245, 200, 40), (250, 215, 80), (235, 185, 20)),
    3: ((150, 165, 190), (170, 180, 200), (130, 150, 180)),
    4: ((240, 140, 20), (230, 120, 10), (250, 160, 40)),
    5: ((40, 60, 120), (120, 40, 110), (30, 90, 100), (90, 70, 50)),
    6: ((120, 20, 25), (20, 20, 26), (60, 20, 90)),
    7: ((60, 190, 60), (90, 210, 80), (40, 170, 90)),
    8: ((255, 95, 20), (245, 80, 10)),
    9: ((240, 240, 240), (225, 225, 225)),
    BUILDING: ((150, 130, 115), (170, 150, 130), (120, 115, 118), (160, 110, 90)),
    TREE: ((45, 105, 45), (60, 120, 50), (70, 100, 40)),
}
SKIN, HAIR, HELMET = (225, 175, 140), (60, 40, 25), (250, 250, 250)
WALLS = ("sides", "front", "back")

# A pattern is a rectangle on a face of a box: (face, u1, v1, u2, v2, color), with u and v from 0 to 1.


def wheels(*centers):
    """Patterns: tires at the bottom of both sides, centered at these fractions of the length."""
    return [("sides", u - 0.07, 0.0, u + 0.07, 0.3, TIRE) for u in centers]


def lights(bottom=0.35):
    """Patterns: two headlamps on the front, then two tail lamps on the back."""
    top = bottom + 0.16
    corners = [(u, bottom, u + 0.2, top) for u in (0.06, 0.74)]
    return [("front", *pair, LAMP) for pair in corners] + [("back", *pair, TAIL) for pair in corners]


def bars(count, color, bottom, top, face="sides", width=0.6):
    """Patterns: a row of upright bars; `width` is the fraction of the face that they fill."""
    half = width / 2 / count
    return [(face, u - half, bottom, u + half, top, color) for u in ((i + 0.5) / count for i in range(count))]


# label -> boxes (minimum corner, maximum corner, color, size of the top relative to the bottom, patterns, layer).
# Corners are relative to the object: length and width from -0.5 to 0.5, height from 0 to 1. Higher layers are drawn
# later; within a layer the farther box is drawn first.
BOXES = {
    0: [
        ((-0.5, -0.5, 0.1), (0.5, 0.5, 0.58), BODY, 0.97, [*wheels(0.2, 0.8), *lights(0.45)], 0),
        ((-0.38, -0.46, 0.58), (0.22, 0.46, 1.0), BODY, 0.76,
         [("front", 0.08, 0.1, 0.92, 0.9, GLASS), ("back", 0.1, 0.15, 0.9, 0.85, DARK),
          *bars(2, GLASS, 0.15, 0.85, width=0.8)], 1),
    ],
    1: [
        ((0.26, -0.48, 0.1), (0.5, 0.48, 0.8), BODY, 0.95,
         [("front", 0.08, 0.5, 0.92, 0.9, GLASS), ("sides", 0.3, 0.5, 0.9, 0.85, GLASS), *wheels(0.5),
          *lights(0.12)[:2]], 0),
        ((-0.5, -0.5, 0.14), (0.24, 0.5, 1.0), (232, 232, 226), 1,
         [("sides", 0.0, 0.4, 1.0, 0.55, BODY), *wheels(0.12, 0.3), *lights(0.02)[2:],
          ("back", 0.48, 0.2, 0.52, 0.95, DARK), ("back", 0.1, 0.2, 0.9, 0.28, BODY)], 0),
    ],
    2: [
        ((-0.5, -0.5, 0.06), (0.5, 0.5, 1.0), BODY, 0.98,
         [*bars(7, (60, 80, 95), 0.48, 0.85, width=0.82), ("front", 0.06, 0.35, 0.94, 0.88, GLASS),
          ("front", 0.2, 0.9, 0.8, 0.98, DARK), ("back", 0.2, 0.55, 0.8, 0.8, DARK),
          ("sides", 0, 0.3, 1, 0.36, (200, 40, 30)),
          ("sides", 0.15, 0.0, 0.22, 0.2, TIRE), ("sides", 0.78, 0.0, 0.85, 0.2, TIRE), *lights(0.1)], 0),
    ],
    3: [
        ((-0.5, -0.5, 0.22), (0.5, 0.5, 1.0), BODY, 1,
         [*bars(10, (95, 105, 130), 0.06, 0.96, width=0.4), ("back", 0.06, 0.08, 0.48, 0.92, (215, 220, 228)),
          ("back", 0.52, 0.08, 0.94, 0.92, (215, 220, 228)), ("front", 0.3, 0.1, 0.7, 0.9, DARK), *lights(0.0)[2:]], 1),
        ((-0.46, -0.45, 0.0), (-0.2, 0.45, 0.22), TIRE, 1, [], 0),
        ((0.2, -0.2, 0.0), (0.3, 0.2, 0.22), DARK, 1, [], 0),
    ],
    4: [
        ((-0.5, -0.5, 0.0), (0.3, 0.5, 0.3), (50, 50, 50), 0.95, bars(5, (90, 90, 90), 0.2, 0.8), 0),
        ((-0.5, -0.42, 0.3), (-0.1, 0.42, 0.66), BODY, 1,
         [*bars(4, DARK, 0.1, 0.9, "back", 0.5), ("sides", 0.1, 0.3, 0.9, 0.5, DARK)], 1),
        ((-0.1, -0.42, 0.3), (0.22, 0.15, 0.95), BODY, 0.85,
         [("front", 0.1, 0.4, 0.9, 0.9, GLASS), ("sides", 0.15, 0.4, 0.85, 0.9, GLASS),
          ("back", 0.15, 0.6, 0.85, 0.9, DARK)], 1),
        ((0.1, 0.18, 0.35), (0.42, 0.4, 1.0), (250, 190, 30), 0.6, [], 1),
        ((0.36, -0.1, 0.02), (0.5, 0.5, 0.36), (250, 190, 30), 0.8, bars(4, DARK, 0.0, 0.4, "front"), 1),
    ],
    5: [
        ((-0.2, -0.4, 0.0), (0.2, -0.06, 0.48), (40, 42, 60), 1, [], 0),
        ((-0.2, 0.06, 0.0), (0.2, 0.4, 0.48), (60, 62, 80), 1, [], 0),
        ((-0.35, -0.5, 0.46), (0.35, 0.5, 0.84), BODY, 0.85,
         [("front", 0.35, 0.2, 0.65, 1.0, (235, 235, 225)), ("back", 0.15, 0.25, 0.85, 0.9, (190, 150, 30))], 1),
        ((-0.25, -0.2, 0.84), (0.25, 0.2, 1.0), SKIN, 0.9,
         [("back", 0, 0, 1, 1, HAIR), ("top", 0, 0, 1, 1, HAIR), ("sides", 0, 0, 0.5, 1, HAIR)], 2),
    ],
    6: [
        ((-0.5, -0.12, 0.0), (-0.2, 0.12, 0.36), TIRE, 0.8, [("back", 0.1, 0.6, 0.9, 1.0, TAIL)], 0),
        ((0.2, -0.12, 0.0), (0.5, 0.12, 0.36), TIRE, 0.8, [], 0),
        ((-0.38, -0.25, 0.2), (0.3, 0.25, 0.55), BODY, 0.8, [("sides", 0.35, 0.0, 0.7, 0.5, (170, 170, 175))], 1),
        ((0.2, -0.5, 0.5), (0.32, 0.5, 0.7), BODY, 0.8, [("front", 0.3, 0.0, 0.7, 1.0, LAMP)], 2),
    ],
    7: [
        ((-0.5, -0.07, 0.0), (-0.12, 0.07, 0.4), (70, 72, 74), 0.8,
         [("sides", 0.2, 0.2, 0.8, 0.8, (170, 175, 170)), ("back", 0, 0.7, 1, 1, TAIL)], 0),
        ((0.12, -0.07, 0.0), (0.5, 0.07, 0.4), (70, 72, 74), 0.8, [("sides", 0.2, 0.2, 0.8, 0.8, (170, 175, 170))], 0),
        ((-0.22, -0.06, 0.3), (0.26, 0.06, 0.48), BODY, 1, [], 1),
        ((0.2, -0.5, 0.5), (0.27, 0.5, 0.6), BODY, 1, [("front", 0.4, 0, 0.6, 1, LAMP)], 2),
    ],
    8: [
        ((-0.5, -0.5, 0.0), (0.5, 0.5, 0.06), (40, 40, 40), 1, [], 0),
        ((-0.38, -0.38, 0.06), (0.38, 0.38, 1.0), BODY, 0.16,
         [(face, 0.0, low, 1.0, low + 0.16, (250, 250, 250)) for face in WALLS for low in (0.3, 0.62)], 1),
    ],
    9: [
        ((-0.5, -0.5, 0.0), (0.5, 0.5, 0.35), BODY, 0.5, [], 0),
        ((-0.22, -0.5, 0.35), (0.22, 0.5, 1.0), BODY, 0.9,
         [*bars(5, (205, 30, 35), 0.1, 0.9, "front", 0.5), *bars(5, (205, 30, 35), 0.1, 0.45, "back", 0.5)], 1),
    ],
    BUILDING: [
        ((-0.5, -0.5, 0.0), (0.5, 0.5, 1.0), BODY, 1,
         [window for face in WALLS for low in (0.15, 0.45, 0.75)
          for window in bars(5, (80, 88, 98), low, low + 0.16, face, 0.5)], 0),
    ],
    TREE: [
        ((-0.07, -0.07, 0.0), (0.07, 0.07, 0.4), (90, 65, 40), 1, [], 0),
        ((-0.5, -0.5, 0.35), (0.5, 0.5, 0.75), BODY, 0.8, [], 1),
        ((-0.4, -0.4, 0.7), (0.4, 0.4, 1.0), BODY, 0.4, [], 2),
    ],
}  # fmt: skip
RIDER = [  # drawn with the boxes of a motorcycle or bicycle
    ((-0.2, -0.35, 0.45), (0.08, 0.35, 0.84), (40, 90, 170), 0.8,
     [("back", 0.15, 0.2, 0.85, 0.9, (230, 200, 40)), ("front", 0.3, 0, 0.7, 1, (235, 235, 225))], 3),
    ((-0.1, -0.2, 0.84), (0.08, 0.2, 1.0), HELMET, 0.8, [("front", 0.1, 0.1, 0.9, 0.6, DARK)], 4),
]  # fmt: skip
FACES = {  # face -> its axis, 1 if at the maximum of that axis, and the axes of u and v
    "front": (0, 1, 1, 2), "back": (0, 0, 1, 2), "left": (1, 1, 0, 2), "right": (1, 0, 0, 2), "top": (2, 1, 0, 1),
}  # fmt: skip


def face_quad(low, high, taper, face, u1=0.0, v1=0.0, u2=1.0, v2=1.0):
    """float64 [4,3]: corners of a rectangle on a face of the box `low` to `high`, whose top is `taper` times its
    bottom."""
    axis, is_max, u_axis, v_axis = FACES[face]
    position = np.empty((4, 3))  # 0 to 1 along each axis of the box
    position[:, axis] = is_max
    position[:, u_axis], position[:, v_axis] = (u1, u2, u2, u1), (v1, v1, v2, v2)
    position[:, :2] = (position[:, :2] - 0.5) * (1 - (1 - taper) * position[:, 2:]) + 0.5
    return np.array(low) + position * (np.array(high) - low)


def build_mesh(label, attribute, size, rng):
    """The Q quads of an object and its N boxes, in the object's own frame, as a dict of arrays.

    corners [Q,4,3] in meters, color [Q,3], box [Q] (index of the quad's box), is_face [Q] (a whole face, no pattern);
    center [N,3], layer [N]
    """
    body = BODY_COLORS[label][int(rng.integers(len(BODY_COLORS[label])))]
    boxes, quads = [*BOXES[label], *(RIDER if attribute == "cycle.with_rider" else [])], []
    # without its rider a cycle is lower, and its own boxes fill the height
    stretch = 1 / 0.7 if attribute == "cycle.without_rider" else 1.0
    scale = np.array([size[1], size[0], size[2] * stretch])
    for number, (low, high, color, taper, patterns, _) in enumerate(boxes):
        for face in FACES:
            quads.append((face_quad(low, high, taper, face), color, number, True))
            names = (face, "sides") if face in ("left", "right") else (face,)
            for name, *corners, pattern_color in patterns:
                if name in names:
                    quads.append((face_quad(low, high, taper, face, *corners), pattern_color, number, False))
    corners, colors, box, is_face = zip(*quads)
    return {
        "corners": np.stack(corners) * scale,
        "color": np.array([body if color is BODY else color for color in colors], np.float64),
        "box": np.array(box),
        "is_face": np.array(is_face),
        "center": np.array([(np.array(low) + high) / 2 for low, high, *_ in boxes]) * scale,
        "layer": np.array([box[5] for box in boxes]),
    }
