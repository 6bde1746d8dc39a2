"""Camera images of a street scene: sky, hills and road, then the objects from far to near.

Everything but the background is drawn at twice the size and reduced, for smooth edges.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from synthetic.street.meshes import build_mesh
from synthetic.street.simulation import CAMERAS, CROSSING_HALF, CROSSING_SPACING, ROAD, SHOULDER, SIDEWALK, rotation_2d

FAR = 110.0  # meters: objects beyond are not drawn
NEAR = 0.25  # meters in front of the camera where quads are clipped
OVERSAMPLE = 2
GROUND_COLORS = ((92, 92, 96), (118, 114, 110), (172, 164, 150))  # road, shoulder, sidewalk


class View:
    """A camera at one moment, from global coordinates to its pixels."""

    def __init__(self, scene, camera, size, time):
        xy, yaw, *_ = scene.ego(time)
        rotation = np.eye(3)
        rotation[:2, :2] = rotation_2d(yaw)
        self.position = rotation @ np.array(camera.position) + [*xy, 0]
        self.rotation = (rotation @ camera.rotation).T  # global -> camera
        self.intrinsic = camera.intrinsic(*size)

    def polygons(self, quads):
        """Corners [Q,4,3] -> a polygon [[x, y]] in pixels for each, None if it is behind the camera."""
        corners = (quads - self.position) @ self.rotation.T
        polygons = []
        for quad, depth in zip(corners, corners[..., 2].min(axis=1), strict=True):
            if depth < NEAR:
                quad = clip_near(quad)
            if len(quad) < 3:
                polygons.append(None)
                continue
            pixels = quad @ self.intrinsic.T
            # clipped far outside the image because Pillow calculates with 32 bits
            polygons.append(np.clip(pixels[:, :2] / pixels[:, 2:], -2e4, 2e4).tolist())
        return polygons


def clip_near(polygon):
    """The part of a polygon [N,3] in the camera's frame with z >= NEAR; [K,3], K 0 if there is none."""
    corners = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a[2] >= NEAR:
            corners.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            corners.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(corners).reshape(-1, 3)


class Renderer:
    """Images of a Scene. size: (width, height)."""

    def __init__(self, scene, size):
        self.scene, self.size = scene, size
        rng = np.random.default_rng(scene.texture_seed)
        objects = zip(scene.labels.tolist(), scene.attributes, scene.sizes, strict=True)
        self.meshes = [build_mesh(label, attribute, dims, rng) for label, attribute, dims in objects]
        self.noise = rng.random((256, 256), np.float32) - 0.5
        cells = Image.fromarray(np.tile(rng.random((32, 32), np.float32), (3, 3)))
        clouds = np.asarray(cells.resize((768, 768), Image.Resampling.BICUBIC))
        self.clouds = clouds[256:512, 256:512] - 0.5  # the middle tile: its opposite borders match
        self.haze_color = np.array([205, 215, 225]) * (1 - scene.haze) + np.array([225, 205, 180]) * scene.haze
        grass = np.array([95, 130, 60]) * (1 - scene.haze) + np.array([165, 145, 95]) * scene.haze
        ground = np.stack([*np.array(GROUND_COLORS, np.float64), grass])
        self.ground = (ground * rng.uniform(0.85, 1.15, size=(4, 1))).astype(np.float32)
        elevation = math.radians(42)
        horizontal = math.cos(elevation)
        self.sun = np.array([math.cos(scene.sun) * horizontal, math.sin(scene.sun) * horizontal, math.sin(elevation)])
        self.rays = {name: self.pixel_rays(camera) for name, camera in CAMERAS.items()}

    def pixel_rays(self, camera):
        """What each pixel of a camera sees without objects, in the vehicle's frame: a dict of float32 arrays.

        is_ground bool [H,W]; of the pixels above the horizon azimuth and slope of the ray; of those below it the
        distance to the ground and (s, d) there, s from the vehicle
        """
        width, height = self.size
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(camera.intrinsic(width, height)).T
        rays = rays @ camera.rotation.T
        slope = rays[..., 2] / np.linalg.norm(rays[..., :2], axis=-1)
        azimuth = np.arctan2(rays[..., 1], rays[..., 0])
        is_ground = slope < -0.008
        down = rays[is_ground]
        length = -camera.position[2] / down[:, 2:]
        radius, sign = 1 / self.scene.curvature, math.copysign(1, self.scene.curvature)
        from_center = np.array(camera.position[:2]) + length * down[:, :2] - [0, radius - self.scene.ego_path[1]]
        values = {
            "azimuth": azimuth[~is_ground],
            "slope": slope[~is_ground],
            "s": np.arctan2(sign * from_center[:, 0], -sign * from_center[:, 1]) / self.scene.curvature,
            "d": radius - sign * np.linalg.norm(from_center, axis=1),
            "distance": np.linalg.norm(length * down, axis=1),
        }
        return {"is_ground": is_ground} | {name: value.astype(np.float32) for name, value in values.items()}

    def render(self, name, time):
        """(image, visible [M], own [M]) of camera `name`: an RGB Pillow image, and for each object the number of its
        visible pixels, and of the pixels that it would have alone in the image."""
        view = View(self.scene, CAMERAS[name], self.size, time)
        centers, yaws, _ = self.scene.objects(time)
        width, height = self.size
        image = Image.fromarray(self.background(name, time))
        image = image.resize((width * OVERSAMPLE, height * OVERSAMPLE), Image.Resampling.NEAREST)
        indices, footprints = self.objects_in_view(centers, yaws, view)
        draw_shadows(ImageDraw.Draw(image, "RGBA"), view, footprints)
        owners = Image.new("I", self.size)  # index + 1 of the object that each pixel shows
        pen, owner_pen = ImageDraw.Draw(image), ImageDraw.Draw(owners)
        own = np.zeros(len(centers), np.int64)
        for i in indices[far_to_near(footprints, view.position[:2])].tolist():
            mask = Image.new("1", self.size)
            mask_pen = ImageDraw.Draw(mask)
            for polygon in self.draw_object(pen, view, i, centers[i], yaws[i]):
                owner_pen.polygon(polygon, fill=i + 1)
                mask_pen.polygon(polygon, fill=1)
            own[i] = np.count_nonzero(np.asarray(mask))
        visible = np.bincount(np.asarray(owners).ravel(), minlength=len(centers) + 1)[1:]
        return image.reduce(OVERSAMPLE), visible, own

    def background(self, name, time):
        """Sky, hills and ground, uint8 [H,W,3]."""
        rays, (width, height) = self.rays[name], self.size
        _, yaw, *_ = self.scene.ego(time)
        image = np.empty((height, width, 3), np.float32)
        start, _, rate = self.scene.ego_path
        image[rays["is_ground"]] = self.ground_colors(rays, np.float32(start + rate * time))
        azimuth, slope = rays["azimuth"] + np.float32(yaw), rays["slope"]
        haze = self.haze_color.astype(np.float32)
        cloud = self.clouds[(slope * 200).astype(np.int64) & 255, (azimuth * (128 / math.pi)).astype(np.int64) & 255]
        blue = np.clip(slope * 3, 0, 1)[:, None]
        sky = haze + (np.float32([105, 155, 215]) - haze) * blue + (cloud * 90 * np.clip(slope * 4, 0, 1))[:, None]
        hills = 0.02 + 0.012 * np.sin(azimuth * 5) + 0.008 * np.sin(azimuth * 17 + 1) + 0.004 * np.sin(azimuth * 61)
        image[~rays["is_ground"]] = np.where((slope < hills)[:, None], haze * np.float32(0.72), sky)
        return np.clip(image, 0, 255).astype(np.uint8)

    def ground_colors(self, rays, ego_s):
        """float32 [P,3] of the pixels below the horizon: road, crossing roads, markings, sidewalk slabs, grass."""
        s, d, distance = rays["s"] + ego_s, rays["d"], rays["distance"]
        away = np.abs(d)
        to_crossing = np.abs((s + CROSSING_SPACING / 2) % CROSSING_SPACING - CROSSING_SPACING / 2)
        is_crossing = to_crossing < CROSSING_HALF
        zone = (away > ROAD).astype(np.int8) + (away > SHOULDER) + (away > SIDEWALK)
        zone[is_crossing] = 0
        color = self.ground[zone]
        detail = np.clip(25 / distance, 0, 1)
        rough = self.noise[(s * 16).astype(np.int64) & 255, (d * 16).astype(np.int64) & 255] * (34 * detail)
        rough += self.noise[(s * 0.9).astype(np.int64) & 255, (d * 0.9).astype(np.int64) & 255] * 14
        slab_edge = (zone == 2) & ((s % 2 < 0.08) | (away % 2 < 0.08))
        rough[slab_edge] -= 26 * detail[slab_edge]
        color += rough[:, None]
        white = (np.abs(away - ROAD + 0.2) < 0.08) | ((np.abs(away - ROAD / 2) < 0.07) & (s % 9 < 3.5))
        yellow = (away > 0.08) & (away < 0.2)
        for line, paint in ((white & ~is_crossing, (235, 235, 235)), (yellow & ~is_crossing, (225, 185, 60))):
            color[line] += (np.float32(paint) - color[line]) * (0.9 * detail[line])[:, None]
        return color + (self.haze_color.astype(np.float32) - color) * (1 - np.exp(-distance / 160))[:, None]

    def objects_in_view(self, centers, yaws, view):
        """(indices [N] of the objects that may be in the image, corners of their ground areas [N,4,2])."""
        corners = np.array([(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)]) * self.scene.sizes[:, None, 1::-1]
        footprints = np.einsum("nij,nkj->nki", rotation_2d(yaws), corners) + centers[:, None, :2]
        radius = np.linalg.norm(self.scene.sizes, axis=1) / 2
        x, _, z = ((centers - view.position) @ view.rotation.T).T
        in_view = (z > -radius) & (z < FAR) & (np.abs(x) < 1.15 * np.maximum(z, 0) + 2.5 * radius)
        indices = np.flatnonzero(in_view)
        return indices, footprints[indices]

    def draw_object(self, pen, view, index, center, yaw):
        """Draw the visible quads of an object; returns the polygons of its faces in pixels of the image."""
        mesh = self.meshes[index]
        rotation = np.eye(3)
        rotation[:2, :2] = rotation_2d(yaw)
        ground = np.array([center[0], center[1], 0])
        corners, box_centers = mesh["corners"] @ rotation.T + ground, mesh["center"] @ rotation.T + ground
        quad_centers = corners.mean(axis=1)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
        outward = np.sign((normal * (quad_centers - box_centers[mesh["box"]])).sum(axis=1))
        normal *= outward[:, None] / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        quads = np.flatnonzero(((view.position - quad_centers) * normal).sum(axis=1) > 0)  # that face the camera
        distance = np.linalg.norm(box_centers - view.position, axis=1)
        rank = np.lexsort((-distance, mesh["layer"])).argsort()  # of the boxes, in drawing order
        quads = quads[np.argsort(rank[mesh["box"][quads]], kind="stable")]
        color = mesh["color"] * (0.62 + 0.45 * np.maximum(normal @ self.sun, 0))[:, None]
        color += (self.haze_color - color) * (1 - math.exp(-float(np.linalg.norm(center - view.position)) / 220))
        color = np.clip(color, 0, 255).astype(int)
        faces = []
        for q, polygon in zip(quads.tolist(), view.polygons(corners[quads]), strict=True):
            if polygon is not None:
                pen.polygon(enlarge(polygon), fill=tuple(color[q].tolist()))
                if mesh["is_face"][q]:
                    faces.append([tuple(point) for point in polygon])
        return faces


def draw_shadows(pen, view, footprints):
    """A dark area on the ground around each object."""
    center = footprints.mean(axis=1, keepdims=True)
    around = (footprints - center) * 1.08 + center
    quads = np.concatenate([around, np.zeros((*around.shape[:2], 1))], axis=-1)
    for polygon in view.polygons(quads):
        if polygon is not None:
            pen.polygon(enlarge(polygon), fill=(15, 15, 25, 110))


def enlarge(polygon):
    """A polygon in pixels of the final image -> in pixels of the larger image that is drawn."""
    return [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in polygon]


def far_to_near(footprints, eye):
    """Drawing order [M] of objects by the corners of their ground areas [M,4,2] (counterclockwise) and the camera's
    place [2]. Where a line along one side of an object separates it from another object, the one on the camera's side
    may hide the other, and is drawn later."""
    edge = np.roll(footprints, -1, axis=1) - footprints
    outward = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)
    beyond = np.einsum("aei,bci->aebc", outward, footprints)
    beyond = beyond - (outward * footprints).sum(axis=-1)[:, :, None, None]
    beyond = beyond.min(axis=-1) >= -1e-9  # [a,e,b]: b is outside side e of a
    eye_beyond = ((eye - footprints) * outward).sum(axis=-1)[:, :, None] > 0
    # [a,b]: a side of a separates the two, and the camera is on the side of a, or of b
    eye_with_a, eye_with_b = (beyond & ~eye_beyond).any(axis=1), (beyond & eye_beyond).any(axis=1)
    may_hide = ~(eye_with_b | eye_with_a.T)  # [a,b]: a may hide b
    before = may_hide.T & ~may_hide  # [a,b]: a is drawn before b
    distance = np.linalg.norm(footprints.mean(axis=1) - eye, axis=1)
    remaining, order = list(np.argsort(-distance, kind="stable")), []
    while remaining:
        blocked = before[np.ix_(remaining, remaining)].any(axis=0)
        order.append(remaining.pop(int(np.argmin(blocked))))  # the farthest that is not blocked, else the farthest
    return order
