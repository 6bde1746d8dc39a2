"""Images of 2D shapes on cluttered backgrounds, with exact boxes and masks.

Each of the five classes is a shape with a texture of its own. All classes, backgrounds and clutter share the same
colors, so color alone does not identify a class, and a small network still learns it in minutes. Every twelfth image is
empty; a few objects are mostly hidden, cut off by the image border, or a crowd (many small shapes in one box).

Scene `index` is a function of (seed, index, size): the same arguments give the same image with the same versions of
Pillow and numpy.
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
TEXTURES = ("dots", "checker", "stripes", "plain", "noise")  # one per class, in the same order; backgrounds have any
EMPTY_EVERY = 12  # one image in twelve (8 %) has no object
CROWD_PROBABILITY = 0.05  # that an image has a crowd
COVER_PROBABILITY = 0.15  # that an image has an object placed over another
SIDES = (0.22, 0.60)  # range of an object's side, relative to the shorter side of the image
SINGLE_SIDES = (0.55, 0.88)  # the same in images of a single object
DIFFICULT_HIDDEN = 0.60  # hidden share from which an object is difficult
MAX_HIDDEN = 0.95  # hidden share from which an object is not annotated
OVERSAMPLE = 4  # shapes are drawn at four times the size and reduced, for smooth edges
VERSION = 3  # to be raised when the same arguments give other images


@dataclass
class Scene:
    """An image and its M objects in drawing order: a later object covers earlier ones."""

    image: np.ndarray  # uint8 [H,W,3], RGB
    labels: np.ndarray  # int64 [M], index into CLASSES
    boxes: np.ndarray  # int64 [M,4], x1 y1 x2 y2 in pixels, x2 and y2 exclusive: tight around the mask
    masks: np.ndarray  # bool [M,H,W], the object's pixels in the image, covered ones included
    hidden: np.ndarray  # float64 [M], share of the mask that later objects cover
    truncated: np.ndarray  # bool [M], cut off by the image border
    crowd: np.ndarray  # bool [M], many small shapes of one class in one box

    @property
    def difficult(self):
        """bool [M]: mostly hidden."""
        return self.hidden >= DIFFICULT_HIDDEN


@dataclass
class Shape:
    """A shape to be drawn: center, width and height of its box in pixels, which may extend beyond the image."""

    label: int
    x: float
    y: float
    w: float
    h: float
    crowd: bool = False

    @property
    def box(self):
        return self.x - self.w / 2, self.y - self.h / 2, self.x + self.w / 2, self.y + self.h / 2


def draw_shapes(seed, index, size=None):
    """Scene `index` of a seed. size: (width, height), or None for about 320 x 240, which varies."""
    rng = np.random.default_rng((seed, index))
    width, height = size or (int(rng.integers(288, 353)), int(rng.integers(216, 265)))
    return draw_scene(rng, place_shapes(rng, index, width, height), width, height)


def draw_single_shape(seed, index, size=None):
    """Scene `index` of a seed with one object, of class index % K. size: (width, height); None: 80 to 128 each."""
    rng = np.random.default_rng((seed, index, 1))  # 1: other random numbers than in `draw_shapes`
    width, height = size or rng.integers(80, 129, size=2).tolist()
    return draw_scene(rng, [random_shape(rng, index % len(CLASSES), width, height, SINGLE_SIDES)], width, height)


def draw_scene(rng, shapes, width, height):
    """The Scene with the shapes, in their order, on a random background."""
    canvas = background(rng, width, height)
    drawn = [draw_shape(rng, canvas, shape) for shape in shapes]
    canvas += rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 6))
    hidden, covered = [], np.zeros((height, width), bool)
    for mask, _ in reversed(drawn):
        hidden.insert(0, float((mask & covered).sum() / mask.sum()))
        covered |= mask
    visible = [i for i, share in enumerate(hidden) if share < MAX_HIDDEN]
    masks = np.array([drawn[i][0] for i in visible], bool).reshape(-1, height, width)
    return Scene(
        image=np.clip(canvas + 0.5, 0, 255).astype(np.uint8),
        labels=np.array([shapes[i].label for i in visible], np.int64),
        boxes=np.array([tight_box(mask) for mask in masks], np.int64).reshape(-1, 4),
        masks=masks,
        hidden=np.array([hidden[i] for i in visible], np.float64),
        truncated=np.array([drawn[i][1] for i in visible], bool),
        crowd=np.array([shapes[i].crowd for i in visible], bool),
    )


def tight_box(mask):
    """x1 y1 x2 y2 (x2 and y2 exclusive) around the True pixels of a bool [H,W]."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# ---- where the shapes are ----


def place_shapes(rng, index, width, height):
    """Shapes in drawing order. The class of the first one follows the index, so that small sets have all classes."""
    if index % EMPTY_EVERY == EMPTY_EVERY // 2:
        return []
    shapes = [random_crowd(rng, width, height)] if rng.random() < CROWD_PROBABILITY else []
    for number in range(int(rng.choice([1, 2, 3, 4, 5], p=[0.2, 0.3, 0.25, 0.15, 0.1]))):
        label = index % len(CLASSES) if number == 0 else int(rng.integers(len(CLASSES)))
        for _ in range(20):
            shape = random_shape(rng, label, width, height)
            if all(overlap(shape.box, other.box) <= 0.3 for other in shapes):
                shapes.append(shape)
                break
    small = [shape for shape in shapes if max(shape.w, shape.h) < 0.4 * min(width, height) and not shape.crowd]
    if small and rng.random() < COVER_PROBABILITY:
        shapes.append(covering_shape(rng, small[int(rng.integers(len(small)))]))
    return shapes


def random_shape(rng, label, width, height, sides=SIDES):
    """A shape anywhere; one in six may extend beyond the image border by up to a third of its size."""
    smallest, largest = sides
    side = min(width, height) * smallest * (largest / smallest) ** rng.random()
    stretch = 1.25 ** rng.uniform(-0.5, 0.5)
    w, h = side * stretch, side / stretch
    outside = rng.uniform(0, 1 / 3) if rng.random() < 1 / 6 else 0.0
    inset_x, inset_y = w * (0.5 - outside), h * (0.5 - outside)
    return Shape(label, rng.uniform(inset_x, width - inset_x), rng.uniform(inset_y, height - inset_y), w, h)


def random_crowd(rng, width, height):
    """A box of many small shapes of one class."""
    w, h = (min(width, height) * rng.uniform(0.35, 0.5, size=2)).tolist()
    x, y = rng.uniform(w / 2, width - w / 2), rng.uniform(h / 2, height - h / 2)
    return Shape(int(rng.integers(len(CLASSES))), x, y, w, h, crowd=True)


def covering_shape(rng, covered):
    """A shape that hides most of `covered`. It is never a ring, whose hole would show it."""
    label = int(rng.integers(CLASSES.index("ring")))
    scale = rng.uniform(1.0, 1.3)
    dx, dy = rng.uniform(-0.3, 0.3, size=2)
    return Shape(label, covered.x + dx * covered.w, covered.y + dy * covered.h, covered.w * scale, covered.h * scale)


def overlap(a, b):
    """Intersection of two xyxy boxes over the area of the smaller one."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


# ---- drawing a shape ----


def draw_shape(rng, canvas, shape):
    """Draw a shape on the canvas, float32 [H,W,3], in place; returns (mask bool [H,W], whether the border cuts it)."""
    height, width = canvas.shape[:2]
    left, top, coverage, outline = rasterize(rng, shape)
    solid = coverage >= 0.5
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + solid.shape[1], width), min(top + solid.shape[0], height)
    inside = np.s_[y1 - top : y2 - top, x1 - left : x2 - left]
    view = canvas[y1:y2, x1:x2]
    base, second = random_colors(rng, view[::4, ::4].mean(axis=(0, 1)))
    period = rng.uniform(6, 9) if shape.crowd else max(6.0, (shape.w + shape.h) / 2 * rng.uniform(0.15, 0.28))
    pattern = texture(rng, TEXTURES[shape.label], coverage.shape[1], coverage.shape[0], period)[inside][..., None]
    surface = base + (second - base) * pattern
    surface *= np.linspace(1.12, 0.88, len(surface), dtype=np.float32)[:, None, None]  # light from above
    outline_color = 0.45 * base if base.mean() > 90 else base + 0.6 * (255 - base)
    surface += (outline_color - surface) * outline[inside][..., None]
    view += (surface - view) * coverage[inside][..., None]
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = solid[inside]
    return mask, bool(mask.sum() < solid.sum())


def rasterize(rng, shape):
    """(left, top, coverage [h,w], outline [h,w]) of a shape: float32 from 0 to 1, on whole pixels, not clipped."""
    x1, y1, x2, y2 = shape.box
    left, top = math.floor(x1), math.floor(y1)
    size = ((math.ceil(x2) - left) * OVERSAMPLE, (math.ceil(y2) - top) * OVERSAMPLE)
    area, outline = Image.new("L", size), Image.new("L", size)
    fill, trace = ImageDraw.Draw(area), ImageDraw.Draw(outline)
    line_width = max(OVERSAMPLE, round(OVERSAMPLE * 0.03 * (shape.w + shape.h) / (3 if shape.crowd else 1)))
    for points, filled in polygons(rng, shape.label, shape.crowd):
        points = (points * (shape.w, shape.h) + (x1 - left, y1 - top)) * OVERSAMPLE - 0.5
        corners = [tuple(point) for point in points.tolist()]
        fill.polygon(corners, fill=255 if filled else 0)
        trace.line([*corners, *corners[:2]], fill=255, width=line_width, joint="curve")
    return left, top, *(np.asarray(part.reduce(OVERSAMPLE), np.float32) / 255 for part in (area, outline))


def polygons(rng, label, crowd=False):
    """[(points [N,2], filled)] to be drawn in order; together they touch all sides of the unit square."""
    if crowd:
        cells = []
        for row, column in np.ndindex(3, 3):
            corner = np.array([column, row]) + rng.uniform(0.0, 0.14, size=2)
            cells += [((points * 0.86 + corner) / 3, filled) for points, filled in polygons(rng, label)]
        return fit_unit_square(cells)
    name = CLASSES[label]
    angle = math.radians(rng.uniform(-25, 25))
    if name == "star":
        points = regular_polygon(10, angle)
        points[1::2] *= rng.uniform(0.42, 0.5)
        return fit_unit_square([(points, True)])
    if name == "square":
        return fit_unit_square([(regular_polygon(4, angle + math.pi / 4), True)])
    if name == "triangle":
        return fit_unit_square([(regular_polygon(3, angle), True)])
    circle = regular_polygon(72, angle)
    hole = [(circle * rng.uniform(0.5, 0.62), False)] if name == "ring" else []
    return fit_unit_square([(circle, True), *hole])


def regular_polygon(corners, angle):
    """Points [corners,2] on the unit circle; at angle 0 (radians) the first one is at the top."""
    angles = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2 + angle
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def fit_unit_square(parts):
    """Stretch polygons so that together they touch all four sides of the unit square."""
    points = np.concatenate([points for points, _ in parts])
    low, size = points.min(axis=0), np.ptp(points, axis=0)
    return [((points - low) / size, filled) for points, filled in parts]


def texture(rng, kind, width, height, period):
    """float32 [height,width], 0 to 1: a pattern with the given period in pixels, in a random direction."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "noise":
        cells = rng.random((max(2, round(2.5 * height / period)), max(2, round(2.5 * width / period))), np.float32)
        return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR))
    angle = rng.uniform(0, math.pi)
    x = np.arange(width, dtype=np.float32)[None] * np.float32(2 * math.pi / period)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(2 * math.pi / period)
    wave = np.sin(x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)))
    if kind != "stripes":
        second = np.sin(y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle)))
        wave = wave * second if kind == "checker" else wave + second - np.float32(0.6)
    return np.clip(wave * np.float32(period / 5) + np.float32(0.5), 0, 1)  # a soft step, about a pixel wide


def random_colors(rng, behind):
    """(base, second) colors, float32 [3]: the base differs from the color `behind`, the second is a tone of it."""
    order = rng.permutation(len(PALETTE))
    distance = np.linalg.norm(PALETTE[order] - behind, axis=1)
    base = PALETTE[order[int(np.argmax(distance > 85))]]  # the first one that differs enough
    tone = rng.uniform(0.35, 0.6)
    second = base * (1 - tone) if base.mean() > 120 else base + (255 - base) * tone
    return base, second


# ---- background ----


def background(rng, width, height):
    """float32 [height,width,3]: a gradient with blotches and a pattern under lines, arcs and dots."""
    first, second = PALETTE[rng.choice(len(PALETTE), 2, replace=False)]
    gray = rng.uniform(60, 200)
    first, second = 0.6 * first + 0.4 * gray, 0.6 * second + 0.4 * gray
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None] * np.float32(math.cos(angle))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None] * np.float32(math.sin(angle))
    canvas = first + (second - first) * (x + y + np.float32(0.5))
    blotches = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    blotches = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    canvas += (blotches - 128) * np.float32(rng.uniform(0.1, 0.3))
    kind = TEXTURES[int(rng.integers(len(TEXTURES)))]
    canvas += texture(rng, kind, width, height, rng.uniform(8, 30))[..., None] * np.float32(rng.uniform(-30, 30))
    return draw_clutter(rng, np.clip(canvas, 0, 255).astype(np.uint8))


def draw_clutter(rng, canvas):
    """Lines, arcs and dots in the colors of objects over uint8 [H,W,3] -> float32; drawn at twice the size."""
    height, width = canvas.shape[:2]
    image = Image.fromarray(canvas).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    side = 2 * min(width, height)
    for _ in range(int(rng.integers(6, 22))):
        color = tuple(PALETTE[rng.integers(len(PALETTE))].astype(int).tolist())
        x, y = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height)
        angle, length = rng.uniform(0, 2 * math.pi), side * rng.uniform(0.08, 0.7)
        kind = rng.integers(3)
        if kind == 0:
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            pen.line([(x, y), end], fill=color, width=int(rng.integers(2, 9)))
        elif kind == 1:
            start, box = math.degrees(angle), (x - length / 2, y - length / 2, x + length / 2, y + length / 2)
            pen.arc(box, start, start + rng.uniform(30, 110), fill=color, width=int(rng.integers(2, 7)))
        else:
            dots = rng.normal((x, y), side * 0.06, size=(int(rng.integers(3, 9)), 2))
            for dot_x, dot_y in dots.tolist():
                radius = rng.uniform(1.5, 0.018 * side)
                pen.ellipse((dot_x - radius, dot_y - radius, dot_x + radius, dot_y + radius), fill=color)
    return np.asarray(image.reduce(2), np.float32)
