"""Scenes drawn at run time: five textured shapes on cluttered grounds, with exact boxes and masks.

Every class comes in every colour, and grounds and clutter share the colours and textures, so colour alone tells
nothing; a class is its form and its own texture, so a small network learns it in minutes. Every twelfth picture is
empty; a few objects are mostly hidden, cut by the border, or a crowd (many small ones in one box). Scene `index` is
a function of (seed, index, size), however many are drawn: the same arguments give the same picture with the same
versions of Pillow and numpy. `data.drawn` writes scenes to disk in the layouts of real sets. A portrait is a scene of
one object, small and for classification: what tells the classes apart there does so here too.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle", "star", "ring")
PALETTE = np.array(
    [
        (214, 69, 65), (230, 126, 34), (241, 196, 64), (112, 173, 71), (38, 140, 108),
        (52, 152, 199), (58, 83, 155), (142, 84, 163), (222, 120, 160), (121, 85, 72),
        (236, 232, 220), (60, 64, 72),
    ],
    dtype=np.float32,
)  # fmt: skip
TEXTURES = ("dots", "checker", "stripes", "plain", "noise")  # of the classes, in their order; grounds have any
EMPTY_EVERY = 12  # one picture in twelve (8 %) holds nothing
CROWDED, COVERED = 0.05, 0.15  # shares of the pictures with a crowd, and with a thing put over another
SMALLEST, LARGEST = 0.22, 0.60  # side of an object's box, in shorter sides of the picture
PORTRAIT = (0.55, 0.88)  # the same where a picture has one object
DIFFICULT = 0.60  # share hidden from which an object is difficult
UNSEEN = 0.95  # share hidden from which an object is no longer annotated
OVERSAMPLE = 4  # shapes are drawn this much larger, then reduced: smooth edges
VERSION = 3  # raise it when the same arguments give other pictures


@dataclass
class Scene:
    """One picture and all that is known about it; M objects in drawing order (a later one covers an earlier one).

    boxes: int64 [M,4], x1 y1 x2 y2 in pixels, x2 and y2 exclusive: tight around the object's mask.
    masks: bool [M,H,W], the object's pixels inside the picture as if nothing covered it.
    hidden: float64 [M], share of the mask that later objects cover, 0 to 1.
    """

    image: np.ndarray  # uint8 [H,W,3], RGB
    labels: np.ndarray  # int64 [M], index into CLASSES
    boxes: np.ndarray
    masks: np.ndarray
    hidden: np.ndarray
    truncated: np.ndarray  # bool [M], cut by the border
    crowd: np.ndarray  # bool [M], many small shapes of one class in one box

    @property
    def difficult(self):
        """bool [M]: mostly hidden."""
        return self.hidden >= DIFFICULT


@dataclass
class Thing:
    """An object planned: centre, width and height of its box in pixels (floats, may reach over the border)."""

    label: int
    x: float
    y: float
    w: float
    h: float
    crowd: bool = False

    @property
    def box(self):
        return self.x - self.w / 2, self.y - self.h / 2, self.x + self.w / 2, self.y + self.h / 2


# ---- the plan: what stands where ----


def overlap(a, b):
    """Area common to two xyxy boxes, as a share of the smaller one."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def random_thing(rng, label, width, height, sides=(SMALLEST, LARGEST)):
    """A thing anywhere: one in six may stick out over the border by a third of its size at most."""
    smallest, largest = sides
    side = min(width, height) * smallest * (largest / smallest) ** rng.random()
    stretch = 1.25 ** rng.uniform(-0.5, 0.5)
    w, h = side * stretch, side / stretch
    out = rng.uniform(0, 1 / 3) if rng.random() < 1 / 6 else 0.0
    inset_x, inset_y = w * (0.5 - out), h * (0.5 - out)
    return Thing(label, rng.uniform(inset_x, width - inset_x), rng.uniform(inset_y, height - inset_y), w, h)


def plan(rng, index, width, height):
    """List of things in drawing order. The first class goes round with the index: small sets have all classes."""
    if index % EMPTY_EVERY == EMPTY_EVERY // 2:
        return []
    things = [crowd(rng, width, height)] if rng.random() < CROWDED else []
    for number in range(int(rng.choice([1, 2, 3, 4, 5], p=[0.2, 0.3, 0.25, 0.15, 0.1]))):
        label = index % len(CLASSES) if number == 0 else int(rng.integers(len(CLASSES)))
        for _ in range(20):
            thing = random_thing(rng, label, width, height)
            if all(overlap(thing.box, other.box) <= 0.3 for other in things):
                things.append(thing)
                break
    small = [thing for thing in things if max(thing.w, thing.h) < 0.4 * min(width, height) and not thing.crowd]
    if small and rng.random() < COVERED:
        things.append(cover(rng, small[int(rng.integers(len(small)))]))
    return things


def crowd(rng, width, height):
    """A box of many small things of one class."""
    w, h = (min(width, height) * rng.uniform(0.35, 0.5, size=2)).tolist()
    x, y = rng.uniform(w / 2, width - w / 2), rng.uniform(h / 2, height - h / 2)
    return Thing(int(rng.integers(len(CLASSES))), x, y, w, h, crowd=True)


def cover(rng, victim):
    """A thing that hides most of the victim; no ring, which would show it."""
    label = int(rng.integers(CLASSES.index("ring")))
    grow = rng.uniform(1.0, 1.3)
    shift_x, shift_y = rng.uniform(-0.3, 0.3, size=2)
    return Thing(label, victim.x + shift_x * victim.w, victim.y + shift_y * victim.h, victim.w * grow, victim.h * grow)


# ---- shapes and textures ----


def outlines(rng, label, crowd=False):
    """List of (points [N,2], filled) to be drawn in order; together they fill the unit square [0,1] x [0,1] exactly."""
    if crowd:
        cells = []
        for row, column in np.ndindex(3, 3):
            corner = np.array([column, row]) + rng.uniform(0.0, 0.14, size=2)
            cells += [((points * 0.86 + corner) / 3, filled) for points, filled in outlines(rng, label)]
        return fit(cells)
    name = CLASSES[label]
    turn = math.radians(rng.uniform(-25, 25))
    if name in ("disc", "ring"):
        pieces = [(regular(72, turn), True)]
        if name == "ring":
            pieces.append((regular(72, turn) * rng.uniform(0.5, 0.62), False))
    elif name == "star":
        points = regular(10, turn)
        points[1::2] *= rng.uniform(0.42, 0.5)
        pieces = [(points, True)]
    else:
        corners = 4 if name == "square" else 3
        pieces = [(regular(corners, turn + (math.pi / 4 if name == "square" else 0)), True)]
    return fit(pieces)


def regular(corners, turn):
    """Points [corners,2] of a regular polygon on the unit circle, the first one on top when turn (radians) is 0."""
    angle = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2 + turn
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def fit(pieces):
    """Stretches the pieces so that together they touch all four sides of the unit square."""
    points = np.concatenate([points for points, _ in pieces])
    low, size = points.min(axis=0), np.ptp(points, axis=0)
    return [((points - low) / size, filled) for points, filled in pieces]


def rasterise(rng, thing):
    """(left, top, coverage [h,w], rim [h,w]) of a thing; float32 0 to 1, on whole pixels, uncut by the picture."""
    x1, y1, x2, y2 = thing.box
    left, top = math.floor(x1), math.floor(y1)
    size = (math.ceil(x2) - left, math.ceil(y2) - top)
    shape = Image.new("L", (size[0] * OVERSAMPLE, size[1] * OVERSAMPLE))
    edge = Image.new("L", shape.size)
    fill, trace = ImageDraw.Draw(shape), ImageDraw.Draw(edge)
    line = max(OVERSAMPLE, round(OVERSAMPLE * 0.03 * (thing.w + thing.h) / (3 if thing.crowd else 1)))
    for points, filled in outlines(rng, thing.label, thing.crowd):
        points = (points * (thing.w, thing.h) + (x1 - left, y1 - top)) * OVERSAMPLE - 0.5
        corners = [tuple(point) for point in points.tolist()]
        fill.polygon(corners, fill=255 if filled else 0)
        trace.line([*corners, *corners[:2]], fill=255, width=line, joint="curve")
    return left, top, *(np.asarray(part.reduce(OVERSAMPLE), np.float32) / 255 for part in (shape, edge))


def texture(rng, kind, width, height, period):
    """float32 [height,width], 0 to 1: a pattern with the given period in pixels, turned at random."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "noise":
        cells = rng.random((max(2, round(2.5 * height / period)), max(2, round(2.5 * width / period))), np.float32)
        return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR))
    angle = rng.uniform(0, math.pi)
    x = np.arange(width, dtype=np.float32)[None] * np.float32(2 * math.pi / period)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(2 * math.pi / period)
    u = np.sin(x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)))
    if kind == "stripes":
        wave = u
    else:
        v = np.sin(y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle)))
        wave = u * v if kind == "checker" else u + v - np.float32(0.6)
    return np.clip(wave * np.float32(period / 5) + np.float32(0.5), 0, 1)  # a soft step, about a pixel wide


# ---- painting ----


def ground(rng, width, height):
    """Cluttered ground, float32 [height,width,3]: gradient, blotches, a pattern, then lines, arcs and specks."""
    first, second = PALETTE[rng.choice(len(PALETTE), 2, replace=False)]
    grey = rng.uniform(60, 200)
    first, second = 0.6 * first + 0.4 * grey, 0.6 * second + 0.4 * grey
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None] * np.float32(math.cos(angle))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None] * np.float32(math.sin(angle))
    canvas = first + (second - first) * (x + y + np.float32(0.5))
    blotches = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    blotches = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    canvas += (blotches - 128) * np.float32(rng.uniform(0.1, 0.3))
    kind = TEXTURES[int(rng.integers(len(TEXTURES)))]
    canvas += texture(rng, kind, width, height, rng.uniform(8, 30))[..., None] * np.float32(rng.uniform(-30, 30))
    return clutter(rng, np.clip(canvas, 0, 255).astype(np.uint8))


def clutter(rng, canvas):
    """Lines, arcs and specks in the objects' colours over a uint8 [H,W,3] picture; drawn at twice the size."""
    height, width = canvas.shape[:2]
    image = Image.fromarray(canvas).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    side = 2 * min(width, height)
    for _ in range(int(rng.integers(6, 22))):
        colour = tuple(PALETTE[rng.integers(len(PALETTE))].astype(int).tolist())
        x, y = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height)
        angle, length = rng.uniform(0, 2 * math.pi), side * rng.uniform(0.08, 0.7)
        kind = rng.integers(3)
        if kind == 0:
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line([(x, y), end], fill=colour, width=int(rng.integers(2, 9)))
        elif kind == 1:
            start, box = math.degrees(angle), (x - length / 2, y - length / 2, x + length / 2, y + length / 2)
            pen.arc(box, start, start + rng.uniform(30, 110), fill=colour, width=int(rng.integers(2, 7)))
        else:
            spots = rng.normal((x, y), side * 0.06, size=(int(rng.integers(3, 9)), 2))
            for spot_x, spot_y in spots.tolist():
                radius = rng.uniform(1.5, 0.018 * side)
                pen.ellipse((spot_x - radius, spot_y - radius, spot_x + radius, spot_y + radius), fill=colour)
    return np.asarray(image.reduce(2), np.float32)


def colours(rng, under):
    """(base, second) float32 [3] each: the base stands out from the mean colour under it, the second is its tone."""
    order = rng.permutation(len(PALETTE))
    distance = np.linalg.norm(PALETTE[order] - under, axis=1)
    base = PALETTE[order[int(np.argmax(distance > 85))]]  # the first one far enough
    tone = rng.uniform(0.35, 0.6)
    second = base * (1 - tone) if base.mean() > 120 else base + (255 - base) * tone
    return base, second


def paint(rng, canvas, thing):
    """Paints a thing over the canvas, float32 [H,W,3], in place; returns (mask bool [H,W], cut by the border)."""
    height, width = canvas.shape[:2]
    left, top, coverage, rim = rasterise(rng, thing)
    solid = coverage >= 0.5
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + solid.shape[1], width), min(top + solid.shape[0], height)
    part = np.s_[y1 - top : y2 - top, x1 - left : x2 - left]
    view = canvas[y1:y2, x1:x2]
    base, second = colours(rng, view[::4, ::4].mean(axis=(0, 1)))
    kind = TEXTURES[thing.label]
    period = rng.uniform(6, 9) if thing.crowd else max(6.0, (thing.w + thing.h) / 2 * rng.uniform(0.15, 0.28))
    pattern = texture(rng, kind, coverage.shape[1], coverage.shape[0], period)[part][..., None]
    skin = base + (second - base) * pattern
    skin *= np.linspace(1.12, 0.88, len(skin), dtype=np.float32)[:, None, None]  # light from above
    edge = 0.45 * base if base.mean() > 90 else base + 0.6 * (255 - base)
    skin += (edge - skin) * rim[part][..., None]
    view += (skin - view) * coverage[part][..., None]
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = solid[part]
    return mask, bool(mask.sum() < solid.sum())


def tight_box(mask):
    """x1 y1 x2 y2 (x2 and y2 exclusive) around the True pixels of a bool [H,W]."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def draw_scene(seed, index, size=None):
    """Scene number `index` of a seed. size: (width, height), or None for about 320 x 240, varied a little."""
    rng = np.random.default_rng((seed, index))
    width, height = size or (int(rng.integers(288, 353)), int(rng.integers(216, 265)))
    return painted_scene(rng, plan(rng, index, width, height), width, height)


def draw_portrait(seed, index, size=None):
    """Scene number `index` of a seed with one object, of class index % K. size: (width, height), or None for 80 to 128
    each."""
    rng = np.random.default_rng((seed, index, 1))  # 1: of other ground and colours than the scene of that number
    width, height = size or rng.integers(80, 129, size=2).tolist()
    return painted_scene(rng, [random_thing(rng, index % len(CLASSES), width, height, PORTRAIT)], width, height)


def painted_scene(rng, things, width, height):
    """The things, in their order, over a new ground."""
    canvas = ground(rng, width, height)
    painted = [paint(rng, canvas, thing) for thing in things]
    canvas += rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 6))
    hidden, above = [], np.zeros((height, width), bool)
    for mask, _ in reversed(painted):
        hidden.insert(0, float((mask & above).sum() / mask.sum()))
        above |= mask
    seen = [i for i, share in enumerate(hidden) if share < UNSEEN]
    masks = np.array([painted[i][0] for i in seen], bool).reshape(-1, height, width)
    return Scene(
        image=np.clip(canvas + 0.5, 0, 255).astype(np.uint8),
        labels=np.array([things[i].label for i in seen], np.int64),
        boxes=np.array([tight_box(mask) for mask in masks], np.int64).reshape(-1, 4),
        masks=masks,
        hidden=np.array([hidden[i] for i in seen], np.float64),
        truncated=np.array([painted[i][1] for i in seen], bool),
        crowd=np.array([things[i].crowd for i in seen], bool),
    )
