"""A street with moving objects, the cameras and radars of the vehicle that drives along it, and the radar returns.

Frames are nuScenes' own, in meters: global and ego vehicle (x forward, y left, z up), radar (as the vehicle's, turned
about z), camera (x right, y down, z forward). Times are in seconds, angles in radians unless stated. The road is an
arc: a place on it is (s, d), meters along its center line and meters to the left of it.

Everything moves at constant speed, and an object's speed and appearance are drawn independently, so only radar can
measure how fast it is. Scene `index` is a function of (seed, index, number of key frames).
"""

import math
from dataclasses import dataclass

import numpy as np

from utils.nuscenes import CLASSES

BUILDING, TREE = -1, -2  # labels of objects that are drawn and not annotated
SIZES = {  # label -> typical width, length, height
    0: (1.9, 4.6, 1.6), 1: (2.5, 7.5, 3.2), 2: (2.9, 11.5, 3.5), 3: (2.6, 10.5, 3.8), 4: (2.8, 6.3, 3.1),
    5: (0.65, 0.7, 1.75), 6: (0.8, 2.1, 1.7), 7: (0.6, 1.75, 1.7), 8: (0.42, 0.42, 1.05), 9: (2.4, 0.55, 1.0),
    BUILDING: (12.0, 14.0, 8.0), TREE: (2.6, 2.6, 5.5),
}  # fmt: skip
FREQUENCIES = np.array([9, 3, 2, 2, 2.5, 7, 3, 3, 4, 4]) / 39.5  # of the classes among the objects
CATEGORIES = (  # nuScenes' categories of each class; an object gets one at random
    ("vehicle.car",), ("vehicle.truck",), ("vehicle.bus.rigid", "vehicle.bus.bendy"), ("vehicle.trailer",),
    ("vehicle.construction",), ("human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.police_officer"),
    ("vehicle.motorcycle",), ("vehicle.bicycle",), ("movable_object.trafficcone",), ("movable_object.barrier",),
)  # fmt: skip
REFLECTIVITY = {  # label -> probability that a point on it returns the radar's signal
    0: 0.5, 1: 0.6, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.35, 6: 0.4, 7: 0.35, 8: 0.15, 9: 0.3, BUILDING: 0.3, TREE: 0.2,
}  # fmt: skip
KEY_FRAME_PERIOD = 0.5  # seconds
SWEEP_PERIOD = 1 / 13  # seconds, of a radar
LEAD_TIME = 0.5  # seconds of sweeps before the first key frame
LANE, ROAD, SHOULDER, SIDEWALK = 3.5, 7.0, 9.6, 14.0  # width of a lane; |d| where road, shoulder and sidewalk end
CROSSING_SPACING, CROSSING_HALF = 80.0, 4.5  # meters of s between crossing roads, and half the width of one
NEARBY = 55.0  # meters: every object comes this close to the vehicle, in s, at some moment
DENSITY = 34  # objects near the vehicle at a time
RADAR_RANGE, RADAR_HALF_ANGLE = 100.0, math.radians(60)
MOVING, STATIONARY, ONCOMING, STATIONARY_CANDIDATE, CROSSING_MOVING = 0, 1, 2, 3, 6  # nuScenes' dyn_prop
VERSION = 2  # to be raised when the same arguments give other images or returns
RADAR_POINT = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("dyn_prop", "i1"), ("id", "<i2"), ("rcs", "<f4"), ("vx", "<f4")]
    + [("vy", "<f4"), ("vx_comp", "<f4"), ("vy_comp", "<f4"), ("is_quality_valid", "i1"), ("ambig_state", "i1")]
    + [(name, "i1") for name in ("x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms")]
)  # 43 bytes


def rotation_2d(angle):
    """float64 [...,2,2]: rotations to the left by angles [...]."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


# ---- sensors ----


@dataclass(frozen=True)
class Camera:
    position: tuple  # in the vehicle's frame
    yaw: float  # degrees to the left of forward
    pitch: float  # degrees downward
    focal: float  # pixels of an image of 1600 x 900, as the principal point
    principal_point: tuple
    delay: int  # microseconds from the key frame's time to the image

    @property
    def rotation(self):
        """float64 [3,3], camera -> vehicle: its columns are the camera's right, down and forward."""
        yaw, pitch = math.radians(self.yaw), math.radians(self.pitch)
        right = np.array([math.sin(yaw), -math.cos(yaw), 0])
        forward = np.array([math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), -math.sin(pitch)])
        return np.stack([right, np.cross(forward, right), forward], axis=1)

    def intrinsic(self, width, height):
        """float64 [3,3] for images of that size."""
        x, y = width / 1600, height / 900
        center_x, center_y = self.principal_point
        return np.array([[self.focal * x, 0, center_x * x], [0, self.focal * y, center_y * y], [0, 0, 1]])


@dataclass(frozen=True)
class Radar:
    position: tuple  # in the vehicle's frame
    yaw: float  # degrees to the left of forward
    delay: float  # seconds from the key frame's time to the nearest sweep


CAMERAS = {
    "CAM_FRONT": Camera((1.70, 0.016, 1.51), 0.0, 0.4, 1266.0, (816.0, 491.0), 4000),
    "CAM_FRONT_RIGHT": Camera((1.55, -0.493, 1.50), -55.2, 0.2, 1261.0, (808.0, 495.0), 7500),
    "CAM_FRONT_LEFT": Camera((1.52, 0.495, 1.51), 55.1, 0.3, 1273.0, (827.0, 480.0), -3500),
    "CAM_BACK": Camera((0.03, 0.003, 1.58), 180.3, 0.5, 809.0, (829.0, 482.0), -9000),
    "CAM_BACK_LEFT": Camera((1.04, 0.485, 1.59), 108.6, 0.1, 1257.0, (792.0, 493.0), -7000),
    "CAM_BACK_RIGHT": Camera((1.01, -0.481, 1.56), -110.4, 0.2, 1260.0, (807.0, 501.0), 9500),
}
RADARS = {
    "RADAR_FRONT": Radar((3.41, 0.0, 0.50), 0.1, 0.013),
    "RADAR_FRONT_LEFT": Radar((2.42, 0.80, 0.78), 90.2, -0.021),
    "RADAR_FRONT_RIGHT": Radar((2.42, -0.80, 0.77), -89.6, 0.006),
    "RADAR_BACK_LEFT": Radar((-0.56, 0.63, 0.53), 175.1, -0.009),
    "RADAR_BACK_RIGHT": Radar((-0.56, -0.62, 0.53), -174.8, 0.018),
}


# ---- a scene ----


@dataclass
class Scene:
    """A street with M objects, annotated or not."""

    origin: np.ndarray  # float64 [2], global place of (s, d) = (0, 0)
    heading: float  # of the road at the origin
    curvature: float  # of the road, 1 / radius in 1 / m, never 0
    ego_path: tuple  # s and d of the vehicle at time 0, and ds/dt
    key_frames: int
    sun: float  # direction of the light
    haze: float  # 0 to 1
    texture_seed: int
    labels: np.ndarray  # int64 [M], index into CLASSES, or BUILDING or TREE
    categories: list
    attributes: list
    sizes: np.ndarray  # float64 [M,3] width, length, height
    starts: np.ndarray  # float64 [M,2], (s, d) at time 0
    rates: np.ndarray  # float64 [M,2], change of (s, d) per second
    yaws: np.ndarray  # float64 [M], relative to the direction of the road
    reflectors: np.ndarray  # float64 [M,8,2], points that radars see, on the outline of the unit square

    def to_global(self, place):
        """(s, d) [...,2] -> global x, y [...,2] and the direction of the road there [...]."""
        s, d = place[..., 0], place[..., 1]
        angle, radius = self.curvature * s, 1 / self.curvature
        along = np.stack([(radius - d) * np.sin(angle), radius - (radius - d) * np.cos(angle)], -1)
        return self.origin + along @ rotation_2d(self.heading).T, self.heading + angle

    def ego(self, time):
        """(x, y [2], yaw, speed, yaw rate in radians per second) of the vehicle."""
        s, d, rate = self.ego_path
        xy, yaw = self.to_global(np.array([s + rate * time, d]))
        return xy, float(yaw), rate * (1 - self.curvature * d), rate * self.curvature

    def objects(self, time):
        """(centers [M,3], yaws [M], velocities [M,2]) in the global frame."""
        place = self.starts + self.rates * time
        xy, direction = self.to_global(place)
        along = self.rates[:, 0] * (1 - self.curvature * place[:, 1])
        velocity = np.einsum("nij,nj->ni", rotation_2d(direction), np.stack([along, self.rates[:, 1]], axis=1))
        return np.concatenate([xy, self.sizes[:, 2:] / 2], axis=1), direction + self.yaws, velocity


@dataclass(frozen=True)
class StreetObject:
    """A row of the arrays of a Scene."""

    start: tuple
    rate: tuple
    yaw: float
    size: tuple
    label: int = BUILDING
    category: str = ""
    attribute: str = ""


def build_scene(seed, index, key_frames):
    """The Scene `index` of a seed, long enough for so many key frames. It has objects of every class."""
    rng = np.random.default_rng((seed, index, 9))
    duration = (key_frames - 1) * KEY_FRAME_PERIOD
    max_speed = 11 if index % 5 else 2
    ego_path = (float(rng.uniform(0, CROSSING_SPACING)), -LANE / 2, float(rng.uniform(0, max_speed)))
    curvature = float(rng.uniform(5e-4, 4e-3) * rng.choice([-1, 1]))
    objects = [StreetObject(ego_path[:2], (ego_path[2], 0), 0, (2.2, 5.5, 1.8))]  # the vehicle itself, removed below
    times = np.arange(-LEAD_TIME, duration + 0.01, 0.25)
    count = round(DENSITY * (1 + ego_path[2] * duration / (2 * NEARBY)))

    def add(make, *arguments):
        """Add a random object that never touches those added before; give up after 30 attempts."""
        for _ in range(30):
            new = make(rng, *arguments, ego_path, duration)
            discs = covering_discs(new, times)
            if all(are_apart(discs, covering_discs(other, times)) for other in objects):
                objects.append(new)
                return

    for number in range(count):
        add(random_object, number if number < len(CLASSES) else int(rng.choice(len(CLASSES), p=FREQUENCIES)))
    for number in range(count // 2):
        add(random_scenery, (BUILDING, TREE)[number % 2])
    del objects[0]
    return Scene(
        ego_path=ego_path,
        curvature=curvature,
        key_frames=key_frames,
        sun=float(rng.uniform(0, 2 * math.pi)),
        haze=float(rng.uniform(0, 1)),
        texture_seed=int(rng.integers(2**31)),
        origin=rng.uniform(300, 1800, size=2),
        heading=float(rng.uniform(-math.pi, math.pi)),
        labels=np.array([each.label for each in objects]),
        categories=[each.category for each in objects],
        attributes=[each.attribute for each in objects],
        sizes=np.array([each.size for each in objects], np.float64),
        starts=np.array([each.start for each in objects], np.float64),
        rates=np.array([each.rate for each in objects], np.float64),
        yaws=np.array([each.yaw for each in objects], np.float64),
        reflectors=np.stack([random_reflectors(rng) for _ in objects]),
    )


def random_reflectors(rng):
    """float64 [8,2], -0.5 to 0.5: two points on each of the front, left, back and right sides of the unit square."""
    along = rng.uniform(-0.42, 0.42, size=8)
    points = np.stack([np.full(8, 0.5), along], axis=1)
    return np.einsum("nij,nj->ni", rotation_2d(np.arange(8) % 4 * (math.pi / 2)), points)


def covering_discs(obj, times):
    """((s, d) [T,5,2] at `times` [T] of five discs that cover an object's ground area, their radius)."""
    width, length, _ = obj.size
    yaw = obj.yaw + (math.pi / 2 if width > length else 0)
    width, length = min(width, length), max(width, length)
    axis = np.array([math.cos(yaw), math.sin(yaw)]) * (length - width) / 2
    center = np.array(obj.start) + np.array(obj.rate) * times[:, None]
    return center[:, None] + axis * np.linspace(-1, 1, 5)[:, None], 0.62 * width


def are_apart(a, b):
    """True where two moving sets of discs (places [T,5,2], radius) always keep a gap of 0.4 m."""
    (a, radius_a), (b, radius_b) = a, b
    if (np.abs(a[:, 2] - b[:, 2]).max(axis=1).min()) > 30:
        return True
    distances = np.linalg.norm(a[:, :, None] - b[:, None], axis=-1)
    return bool(distances.min() > radius_a + radius_b + 0.4)


def random_object(rng, label, ego_path, duration):
    """An object that is within NEARBY meters of the vehicle along the road at some moment of the scene."""
    moment, offset = rng.uniform(0, duration), rng.uniform(-NEARBY, NEARBY)
    s = ego_path[0] + ego_path[2] * moment + offset
    size = np.array(SIZES[label]) * rng.uniform(0.9, 1.1, size=3)
    category = str(rng.choice(CATEGORIES[label]))
    if label < 5:
        d, (along, across), yaw, attribute = random_vehicle(rng)
    elif label == 5:
        d, (along, across), yaw, attribute = random_pedestrian(rng)
        size *= 0.75 if category.endswith("child") else 1
        size *= (1.0, 1.0, 0.72) if attribute.endswith("sitting_lying_down") else 1
    elif label in (6, 7):
        d, (along, across), yaw, attribute = random_cycle(rng)
        size *= (1, 1, 0.7) if attribute.endswith("without_rider") else 1
    else:
        d, (along, across), yaw, attribute = rng.uniform(-13, 13), (0.0, 0.0), rng.uniform(-math.pi, math.pi), ""
    if abs(across) > 2:  # a vehicle on a crossing road: move it to the right-hand lane of the nearest one
        s = round(s / CROSSING_SPACING) * CROSSING_SPACING + math.copysign(CROSSING_HALF / 2, across)
    start = (s - along * moment, d - across * moment)
    return StreetObject(start, (along, across), yaw, tuple(size), label, category, attribute)


def random_vehicle(rng):
    """(d, (ds/dt, dd/dt), yaw, attribute): driving in a lane or on a crossing road, stopped, or parked."""
    side = float(rng.choice([-1, 1]))  # 1: the left half of the road, against the ego vehicle's direction
    lane, yaw = side * float(rng.choice([0.5, 1.5])) * LANE, math.pi if side > 0 else 0.0
    choice, speed = rng.random(), float(rng.uniform(1, 14))
    if choice < 0.42:
        return lane, (-side * speed, 0.0), yaw, "vehicle.moving"
    if choice < 0.58:
        return float(rng.uniform(-30, 30)), (0.0, side * speed), side * math.pi / 2, "vehicle.moving"
    if choice < 0.70:
        return lane, (0.0, 0.0), yaw, "vehicle.stopped"
    if choice < 0.85:
        return side * 8.4, (0.0, 0.0), yaw + float(rng.normal(0, 0.08)), "vehicle.parked"
    return side * float(rng.uniform(15, 28)), (0.0, 0.0), float(rng.uniform(-math.pi, math.pi)), "vehicle.parked"


def random_pedestrian(rng):
    """The same of a pedestrian who walks, stands or sits, anywhere and in any direction."""
    yaw, speed = float(rng.uniform(-math.pi, math.pi)), float(rng.uniform(0.6, 2.0))
    d, choice = float(rng.uniform(-SIDEWALK, SIDEWALK)), rng.random()
    if choice < 0.5:
        return d, (speed * math.cos(yaw), speed * math.sin(yaw)), yaw, "pedestrian.moving"
    return d, (0.0, 0.0), yaw, "pedestrian.standing" if choice < 0.8 else "pedestrian.sitting_lying_down"


def random_cycle(rng):
    """The same of a motorcycle or bicycle: ridden or halted at the edge of the road, or parked on the sidewalk."""
    side, choice = float(rng.choice([-1, 1])), rng.random()
    if choice < 0.7:
        speed = float(rng.uniform(2, 9)) if choice < 0.55 else 0.0
        yaw = math.pi if side > 0 else 0.0
        return side * float(rng.uniform(3, 9)), (-side * speed, 0.0), yaw, "cycle.with_rider"
    return side * float(rng.uniform(8, 14)), (0.0, 0.0), float(rng.uniform(-math.pi, math.pi)), "cycle.without_rider"


def random_scenery(rng, label, ego_path, duration):
    """A building or a tree beside the road, not on a crossing road."""
    s = ego_path[0] + rng.uniform(-NEARBY - 30, NEARBY + 30) + ego_path[2] * rng.uniform(0, duration)
    side, size = rng.choice([-1, 1]), np.array(SIZES[label]) * rng.uniform(0.7, 1.4, size=3)
    distance = rng.uniform(34, 48) if label == BUILDING else rng.uniform(15, 30)
    margin = CROSSING_HALF + size[1] / 2 + 1
    offset = np.clip(s % CROSSING_SPACING, margin, CROSSING_SPACING - margin)
    s = np.floor(s / CROSSING_SPACING) * CROSSING_SPACING + offset
    yaw = 0.0 if label == BUILDING else 0.5
    return StreetObject((float(s), float(side * distance)), (0.0, 0.0), yaw, tuple(size), label)


# ---- radar ----


def radar_returns(scene, name, time, rng):
    """One sweep of radar `name`: (points [P] of RADAR_POINT, object [P] that each comes from, -1 for none); P >= 1.

    A radar measures distance, direction and the speed along the ray. So (vx, vy) is the velocity relative to the radar
    along the ray, and (vx_comp, vy_comp) the object's own over ground along the ray. The height is not measured: z is
    0. As with real radars some returns are wrong, and invalid_state or ambig_state says so.
    """
    radar = RADARS[name]
    xy, yaw, speed, yaw_rate = scene.ego(time)
    lever = rotation_2d(yaw) @ np.array(radar.position[:2])
    motion = speed * np.array([math.cos(yaw), math.sin(yaw)]) + yaw_rate * np.array([-lever[1], lever[0]])
    to_radar = rotation_2d(yaw + math.radians(radar.yaw)).T  # global -> radar
    centers, yaws, velocities = scene.objects(time)

    def in_radar_frame(unit_points):
        points = unit_points * scene.sizes[:, None, 1::-1]  # length, width
        points = np.einsum("nij,nkj->nki", rotation_2d(yaws), points) + centers[:, None, :2]
        return (points - xy - lever) @ to_radar.T

    reflectors = in_radar_frame(scene.reflectors)  # [M,8,2]
    normal = np.arange(8) % 4 * (math.pi / 2) + yaws[:, None] - yaw - math.radians(radar.yaw)
    visible = (reflectors * np.stack([np.cos(normal), np.sin(normal)], axis=-1)).sum(axis=-1) < 0
    probability = np.array([REFLECTIVITY[label] for label in scene.labels.tolist()])[:, None]
    probability = probability * np.clip(1.3 - np.linalg.norm(reflectors, axis=-1) / 80, 0.3, 1)
    source, which = np.nonzero(visible & (rng.random(visible.shape) < probability))
    points, velocity = reflectors[source, which], velocities[source] @ to_radar.T
    square = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) / 2
    corners = in_radar_frame(np.broadcast_to(square, (len(centers), 4, 2)))
    clear = ~is_occluded(points, source, corners, scene.sizes[:, 2])
    points, velocity, source = points[clear], velocity[clear], source[clear]

    clutter = int(rng.integers(6, 16))  # returns from the ground, walls and wires
    angle, distance = rng.uniform(-1, 1, clutter) * RADAR_HALF_ANGLE, rng.uniform(3, RADAR_RANGE, clutter)
    points = np.concatenate([np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1), points])
    velocity = np.concatenate([np.zeros((clutter, 2)), velocity])
    source = np.concatenate([np.full(clutter, -1), source])

    distance, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
    in_range = (distance > 0.8) & (distance < RADAR_RANGE) & (np.abs(angle) <= RADAR_HALF_ANGLE)
    return measure(rng, points[in_range], velocity[in_range], to_radar @ motion), source[in_range]


def is_occluded(points, source, corners, heights):
    """bool [P]: whether points [P,2] are behind a tall object other than their own, `source` [P].

    corners [M,4,2] and heights [M] of all objects; points and corners in the radar's frame.
    """
    angles, distances = np.arctan2(corners[..., 1], corners[..., 0]), np.linalg.norm(corners, axis=-1).max(axis=1)
    tall = np.flatnonzero((heights > 2) & (corners[..., 0] > 0).all(axis=1))
    angle = np.arctan2(points[:, 1], points[:, 0])[:, None]
    behind = (angle > angles[tall].min(axis=1)) & (angle < angles[tall].max(axis=1))
    behind &= np.linalg.norm(points, axis=1)[:, None] > distances[tall]
    return (behind & (source[:, None] != tall)).any(axis=1)


def measure(rng, points, velocity, motion):
    """RADAR_POINT [P]: true places and velocities over ground [P,2] as a radar with velocity `motion` [2] measures
    them, with noise. All in the radar's frame."""
    count = len(points)
    distance, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
    true_ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    along = (velocity * true_ray).sum(axis=1) + rng.normal(0, 0.08, count)
    relative = along - true_ray @ motion
    across = np.abs(velocity[:, 0] * true_ray[:, 1] - velocity[:, 1] * true_ray[:, 0])
    distance, angle = distance + rng.normal(0, 0.12, count), angle + rng.normal(0, 0.003, count)
    ray = np.stack([np.cos(angle), np.sin(angle)])  # [2,P]
    moving = np.where(across > 2 * np.abs(along), CROSSING_MOVING, np.where(along < 0, ONCOMING, MOVING))
    still = np.where(rng.random(count) < 0.8, STATIONARY, STATIONARY_CANDIDATE)
    wrong = rng.random(count) < 0.08
    wrong[0] = False
    along = np.where(wrong, rng.uniform(-15, 15, count), along)
    relative = np.where(wrong, rng.uniform(-15, 15, count), relative)
    returns = np.zeros(count, RADAR_POINT)
    for x, y, values in (("x", "y", distance), ("vx", "vy", relative), ("vx_comp", "vy_comp", along)):
        returns[x], returns[y] = values * ray
    returns["dyn_prop"] = np.where(np.linalg.norm(velocity, axis=1) < 0.2, still, moving)
    returns["id"], returns["rcs"] = np.arange(count), rng.uniform(-5, 30, count).round(1)
    returns["is_quality_valid"], returns["pdh0"], returns["x_rms"], returns["y_rms"] = 1, 1, 19, 19
    returns["vx_rms"], returns["vy_rms"] = 16, 3
    by_state = rng.random(count) < 0.5
    returns["invalid_state"] = np.where(wrong & by_state, rng.integers(1, 8, count), 0)
    returns["ambig_state"] = np.where(wrong & ~by_state, rng.integers(0, 3, count), 3)
    return returns
