"""What the cameras of `data.world` see: sky, hills, a street with its markings, and boxes painted far to near.

`data.world_shapes` has the boxes. All is drawn at twice the size and reduced: smooth edges.
"""

import math
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data.world import CROSSING, CROSSING_HALF, ROAD, SHOULDER, SIDEWALK, turned
from data.world_shapes import mesh

REACH = 110.0  # metres: nothing is drawn beyond
NEAREST = 0.25  # metres in front of the camera where faces are cut
OVERSAMPLE = 2


def far_to_near(ground, eye):
    """Order [M] in which things are painted, from the corners of the ground they stand on [M,4,2] (in turn, to the
    left) and the camera's place [2]. A line along a side of one thing that has the other beyond it tells which of the
    two may hide the other."""
    edge = np.roll(ground, -1, axis=1) - ground
    outward = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)
    beyond = np.einsum("aei,bci->aebc", outward, ground) - (outward * ground).sum(axis=-1)[:, :, None, None]
    beyond = beyond.min(axis=-1) >= -1e-9  # [a,e,b]: b is outside side e of a
    eye_beyond = ((eye - ground) * outward).sum(axis=-1)[:, :, None] > 0
    # [a,b]: a side of a lies between the two, and the camera is on a's side of it, on b's
    with_a, with_b = (beyond & ~eye_beyond).any(axis=1), (beyond & eye_beyond).any(axis=1)
    hides = ~(with_b | with_a.T)  # [a,b]: a may hide b
    first = hides.T & ~hides  # [a,b]: a is painted before b
    waiting = list(np.argsort(-np.linalg.norm(ground.mean(axis=1) - eye, axis=1), kind="stable"))
    order = []
    while waiting:
        held = first[np.ix_(waiting, waiting)].any(axis=0)
        order.append(waiting.pop(int(np.argmin(held))))  # the farthest that waits for nothing, or just the farthest
    return order


class Painter:
    """Paints the pictures of one World, (width, height) each.

    Those of a mirrored world are painted as a mirror shows them and turned round at the end: Pillow fills a polygon up
    to another part of a pixel on its left than on its right.
    """

    def __init__(self, world, size):
        self.world, self.size = world, size
        self.rng = np.random.default_rng(int(world.light["look"]))
        facts = zip(world.label.tolist(), world.attribute, world.size, strict=True)
        self.meshes = [mesh(label, attribute, thing, self.rng, world.hand) for label, attribute, thing in facts]
        self.noise = self.rng.random((256, 256), np.float32) - 0.5
        cells = Image.fromarray(np.tile(self.rng.random((32, 32), np.float32), (3, 3)))
        clouds = np.asarray(cells.resize((768, 768), Image.Resampling.BICUBIC))
        self.clouds = clouds[256:512, 256:512] - 0.5  # meets itself at its borders
        haze = world.light["haze"]
        self.haze = np.array([205, 215, 225]) * (1 - haze) + np.array([225, 205, 180]) * haze
        grass = np.array([95, 130, 60]) * (1 - haze) + np.array([165, 145, 95]) * haze
        base = np.array([[92, 92, 96], [118, 114, 110], [172, 164, 150], [0, 0, 0]], np.float64)
        base[3] = grass
        self.zones = (base * self.rng.uniform(0.85, 1.15, size=(4, 1))).astype(np.float32)
        sun, high = world.light["sun"], math.radians(42)
        self.sun = np.array([math.cos(sun) * math.cos(high), math.sin(sun) * math.cos(high), math.sin(high)])
        self.grids = {name: self.grid(name) for name in world.cameras}

    def lens(self, name):
        """float64 [3,3], camera -> pixels that are painted."""
        width, height = self.size
        intrinsic = self.world.cameras[name].intrinsic(width, height)
        return intrinsic if self.world.hand > 0 else np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ intrinsic

    def grid(self, name):
        """What stays the same from picture to picture of a camera: of each pixel the direction (turn to the left of
        the car, rise) above the horizon, and below it the distance and the road's (s, d), s from the car."""
        camera, (width, height) = self.world.cameras[name], self.size
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(self.lens(name)).T
        rays = rays @ camera.rotation.T
        rise = rays[..., 2] / np.linalg.norm(rays[..., :2], axis=-1)
        below = rise < -0.008
        turn = np.arctan2(rays[..., 1], rays[..., 0])
        down = rays[below]
        reach = -camera.place[2] / down[:, 2:]
        bend, sign = self.world.bend, math.copysign(1, self.world.bend)
        spot = np.array(camera.place[:2]) + reach * down[:, :2] - [0, 1 / bend - self.world.ego[1]]
        s = np.arctan2(sign * spot[:, 0], -sign * spot[:, 1]) / bend
        d = 1 / bend - sign * np.linalg.norm(spot, axis=1)
        distance = np.linalg.norm(reach * down, axis=1)
        parts = {"below": below, "turn": turn[~below], "rise": rise[~below], "s": s, "d": d, "distance": distance}
        return {key: part if part.dtype == bool else part.astype(np.float32) for key, part in parts.items()}

    def background(self, name, time):
        """Sky, hills and street, uint8 [H,W,3]."""
        grid, (width, height) = self.grids[name], self.size
        _, yaw, *_ = self.world.car(time)
        picture = np.empty((height, width, 3), np.float32)
        picture[grid["below"]] = self.street(grid, np.float32(self.world.ego[0] + self.world.ego[2] * time))
        turn, rise = (grid["turn"] + np.float32(yaw)) * self.world.hand, grid["rise"]
        haze = self.haze.astype(np.float32)
        cloud = self.clouds[(rise * 200).astype(np.int64) & 255, (turn * (128 / math.pi)).astype(np.int64) & 255]
        share = np.clip(rise * 3, 0, 1)[:, None]
        sky = haze + (np.float32([105, 155, 215]) - haze) * share + (cloud * 90 * np.clip(rise * 4, 0, 1))[:, None]
        hills = 0.02 + 0.012 * np.sin(turn * 5) + 0.008 * np.sin(turn * 17 + 1) + 0.004 * np.sin(turn * 61)
        picture[~grid["below"]] = np.where((rise < hills)[:, None], haze * np.float32(0.72), sky)
        return np.clip(picture, 0, 255).astype(np.uint8)

    def street(self, grid, here):
        """The ground's colours, float32 [P,3], of the pixels below the horizon; here: s of the car."""
        s, d, distance = grid["s"] + here, grid["d"] * self.world.hand, grid["distance"]
        away = np.abs(d)
        along = np.abs((s + CROSSING / 2) % CROSSING - CROSSING / 2)  # metres from the middle of a crossing road
        crossing = along < CROSSING_HALF
        zone = (away > ROAD).astype(np.int8) + (away > SHOULDER) + (away > SIDEWALK)
        zone[crossing] = 0
        colour = self.zones[zone]
        clear = np.clip(25 / distance, 0, 1)
        rough = self.noise[(s * 16).astype(np.int64) & 255, (d * 16).astype(np.int64) & 255] * (34 * clear)
        rough += self.noise[(s * 0.9).astype(np.int64) & 255, (d * 0.9).astype(np.int64) & 255] * 14
        slab = (zone == 2) & ((s % 2 < 0.08) | (away % 2 < 0.08))
        rough[slab] -= 26 * clear[slab]
        colour += rough[:, None]
        white = (np.abs(away - ROAD + 0.2) < 0.08) | ((np.abs(away - ROAD / 2) < 0.07) & (s % 9 < 3.5))
        yellow = (away > 0.08) & (away < 0.2)
        for line, paint in ((white & ~crossing, (235, 235, 235)), (yellow & ~crossing, (225, 185, 60))):
            colour[line] += (np.float32(paint) - colour[line]) * (0.9 * clear[line])[:, None]
        return colour + (self.haze.astype(np.float32) - colour) * (1 - np.exp(-distance / 160))[:, None]

    def paint(self, name, time):
        """One picture: (image, seen [M], own [M]): an RGB Pillow image, and of each thing how many of its pixels are
        seen, and how many it would have in this picture alone."""
        camera, (width, height) = self.world.cameras[name], self.size
        xy, yaw, *_ = self.world.car(time)
        rotation = np.eye(3)
        rotation[:2, :2] = turned(yaw)
        eye = rotation @ np.array(camera.place) + [*xy, 0]
        to_camera = (rotation @ camera.rotation).T
        view = partial(project_quads, eye, to_camera, self.lens(name))
        centre, facing, _ = self.world.things(time)
        image = Image.fromarray(self.background(name, time)).resize(
            (width * OVERSAMPLE, height * OVERSAMPLE), Image.Resampling.NEAREST
        )
        which, ground = self.in_sight(centre, facing, eye, to_camera)
        self.shadows(ImageDraw.Draw(image, "RGBA"), view, which, ground)
        count = len(centre)
        seen, own = np.zeros(count, np.int64), np.zeros(count, np.int64)
        pen, owner = ImageDraw.Draw(image), Image.new("I", self.size)
        for i in (int(which[k]) for k in far_to_near(ground, eye[:2])):
            alone = Image.new("1", self.size)
            self.thing(i, centre[i], facing[i], eye, view, pen, (ImageDraw.Draw(owner), ImageDraw.Draw(alone)))
            own[i] = np.count_nonzero(np.asarray(alone))
        seen += np.bincount(np.asarray(owner).ravel(), minlength=count + 1)[1:]
        image = image.reduce(OVERSAMPLE)
        return image if self.world.hand > 0 else ImageOps.mirror(image), seen, own

    def in_sight(self, centre, facing, eye, to_camera):
        """(things that may be in the picture, corners of the ground that each stands on [N,4,2])."""
        corners = np.array([(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)]) * self.world.size[:, None, 1::-1]
        ground = np.einsum("nij,nkj->nki", turned(facing), corners) + centre[:, None, :2]
        radius = np.linalg.norm(self.world.size, axis=1) / 2
        place = (centre - eye) @ to_camera.T
        near = (place[:, 2] > -radius) & (place[:, 2] < REACH)
        near &= np.abs(place[:, 0]) < 1.15 * np.maximum(place[:, 2], 0) + 2.5 * radius
        which = np.flatnonzero(near)
        return which, ground[which]

    def shadows(self, pen, view, which, ground):
        """A dark patch on the ground around each thing."""
        if len(which) == 0:
            return
        around = (ground - ground.mean(axis=1, keepdims=True)) * 1.08 + ground.mean(axis=1, keepdims=True)
        for polygon in view(np.concatenate([around, np.zeros((*around.shape[:2], 1))], axis=-1)):
            if polygon is not None:
                pen.polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in polygon], fill=(15, 15, 25, 110))

    def thing(self, i, centre, facing, eye, view, pen, masks):
        """Paints thing i, its faces that look at the camera, and marks them in the two masks (all things, it alone)."""
        part = self.meshes[i]
        turn = np.eye(3)
        turn[:2, :2] = turned(facing)
        foot = np.array([centre[0], centre[1], 0])
        corners, middle = part["corners"] @ turn.T + foot, part["middle"] @ turn.T + foot
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
        centre_of = corners.mean(axis=1)
        outward = np.sign((normal * (centre_of - middle[part["box"]])).sum(axis=1))
        normal *= outward[:, None] / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        facing_eye = ((eye - centre_of) * normal).sum(axis=1) > 0
        distance = np.linalg.norm(middle - eye, axis=1)
        rank = np.empty(len(middle), np.int64)
        rank[np.lexsort((-distance, part["layer"]))] = np.arange(len(middle))
        order = np.flatnonzero(facing_eye)
        order = order[np.argsort(rank[part["box"][order]], kind="stable")]
        light = 0.62 + 0.45 * np.maximum(normal @ self.sun, 0)
        colour = part["colour"] * light[:, None]
        colour += (self.haze - colour) * (1 - math.exp(-float(np.linalg.norm(centre - eye)) / 220))
        colour = np.clip(colour, 0, 255).astype(int).tolist()
        for q, polygon in zip(order.tolist(), view(corners[order]), strict=True):
            if polygon is None:
                continue
            pen.polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in polygon], fill=tuple(colour[q]))
            if part["whole"][q]:
                for mask, value in zip(masks, (i + 1, 1), strict=True):
                    mask.polygon(polygon, fill=value)


def project_quads(eye, to_camera, intrinsic, quads):
    """Corners [Q,4,3] in the global frame -> for each the list of (x, y) pixels of its part before the camera, or None
    where all of it is behind."""
    place = (quads - eye) @ to_camera.T
    polygons = []
    for quad, depth in zip(place, place[..., 2].min(axis=1), strict=True):
        if depth < NEAREST:
            quad = cut(quad)
            if len(quad) < 3:
                polygons.append(None)
                continue
        pixels = quad @ intrinsic.T
        # far outside is far enough: Pillow's own arithmetic is 32 bits
        polygons.append([(x, y) for x, y in np.clip(pixels[:, :2] / pixels[:, 2:], -2e4, 2e4).tolist()])
    return polygons


def cut(polygon):
    """The part of a polygon [N,3] in the camera's frame with z >= NEAREST; [K,3], K 0 if there is none."""
    kept = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a[2] >= NEAREST:
            kept.append(a)
        if (a[2] >= NEAREST) != (b[2] >= NEAREST):
            kept.append(a + (b - a) * (NEAREST - a[2]) / (b[2] - a[2]))
    return np.array(kept).reshape(-1, 3)
