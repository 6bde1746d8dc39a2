"""A small street world drawn at run time: what stands and moves where, the six cameras and five radars of the car that
drives through it, and what its radars measure.

`data.world_pictures` paints what the cameras see, `data.world_files` writes all in nuScenes' layout. Frames: the global
one and the car's (x forward, y left, z up), a radar's as the car's turned about z, and a camera's (x right, y down,
z forward); metres, seconds, radians. The road is an arc: a place on it is (s, d), metres along its middle and metres
to the left of it. Everything keeps its speed, which is drawn apart from its look: a single picture does not tell how
fast a thing on the road moves, the radars do. Scene `index` is a function of (seed, index, keyframes); what a mirror
shows of it is `data.world_mirror`'s.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.tables import CLASSES

BUILDING, TREE = -1, -2  # labels of what is drawn and not annotated
SIZES = {  # label -> width, length, height of a usual one
    0: (1.9, 4.6, 1.6), 1: (2.5, 7.5, 3.2), 2: (2.9, 11.5, 3.5), 3: (2.6, 10.5, 3.8), 4: (2.8, 6.3, 3.1),
    5: (0.65, 0.7, 1.75), 6: (0.8, 2.1, 1.7), 7: (0.6, 1.75, 1.7), 8: (0.42, 0.42, 1.05), 9: (2.4, 0.55, 1.0),
    BUILDING: (12.0, 14.0, 8.0), TREE: (2.6, 2.6, 5.5),
}  # fmt: skip
SHARES = np.array([9, 3, 2, 2, 2.5, 7, 3, 3, 4, 4]) / 39.5  # of the classes among the things
CATEGORIES = (  # nuScenes' names of each class, one of them at random
    ("vehicle.car",), ("vehicle.truck",), ("vehicle.bus.rigid", "vehicle.bus.bendy"), ("vehicle.trailer",),
    ("vehicle.construction",), ("human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.police_officer"),
    ("vehicle.motorcycle",), ("vehicle.bicycle",), ("movable_object.trafficcone",), ("movable_object.barrier",),
)  # fmt: skip
REFLECTS = {0: 0.5, 1: 0.6, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.35, 6: 0.4, 7: 0.35, 8: 0.15, 9: 0.3, BUILDING: 0.3, TREE: 0.2}
KEYFRAME = 0.5  # seconds between keyframes
SWEEP = 1 / 13  # seconds between the sweeps of a radar
BEFORE = 0.5  # seconds of sweeps before the first keyframe
LANE, ROAD, SHOULDER, SIDEWALK = 3.5, 7.0, 9.6, 14.0  # width of a lane; where road, shoulder and sidewalk end, as |d|
CROSSING, CROSSING_HALF = 80.0, 4.5  # metres of s from one crossing road to the next, and half its width
NEAR = 55.0  # metres of s between a thing and the car at one moment at least
DENSITY = 34  # things near the car at one moment
RADAR_REACH, RADAR_HALF_ANGLE = 100.0, math.radians(60)
STATIONARY, MOVING, ONCOMING, CROSSING_MOVING, CANDIDATE = 1, 0, 2, 6, 3  # nuScenes' dyn_prop
VERSION = 2  # raise it when the same arguments give another world or other pictures
RADAR_POINT = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("dyn_prop", "i1"), ("id", "<i2"), ("rcs", "<f4"), ("vx", "<f4")]
    + [("vy", "<f4"), ("vx_comp", "<f4"), ("vy_comp", "<f4"), ("is_quality_valid", "i1"), ("ambig_state", "i1")]
    + [(name, "i1") for name in ("x_rms", "y_rms", "invalid_state", "pdh0", "vx_rms", "vy_rms")]
)  # 43 bytes a point


# ---- the car's sensors ----


@dataclass(frozen=True)
class Camera:
    """Where a camera sits in the car, where it looks, and its lens in pixels of a 1600 x 900 picture."""

    place: tuple
    turn: float  # degrees to the left of forward
    nod: float  # degrees downwards
    focal: float
    middle: tuple
    delay: int  # microseconds after the keyframe's time

    @property
    def rotation(self):
        """float64 [3,3], camera -> car: its columns are right, down and forward of the camera in the car's frame."""
        turn, nod = math.radians(self.turn), math.radians(self.nod)
        right = np.array([math.sin(turn), -math.cos(turn), 0])
        forward = np.array([math.cos(turn) * math.cos(nod), math.sin(turn) * math.cos(nod), -math.sin(nod)])
        return np.stack([right, np.cross(forward, right), forward], axis=1)

    def intrinsic(self, width, height):
        """float64 [3,3] of a picture of that size."""
        x, y = width / 1600, height / 900
        return np.array([[self.focal * x, 0, self.middle[0] * x], [0, self.focal * y, self.middle[1] * y], [0, 0, 1]])


@dataclass(frozen=True)
class Radar:
    place: tuple
    turn: float  # degrees to the left of forward
    delay: float  # seconds from the keyframe's time to its nearest sweep


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


def turned(angle):
    """float64 [...,2,2] that turns by angles [...] to the left."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


# ---- the world of one scene ----


@dataclass
class World:
    """One scene; M things, annotated or not.

    origin [2], heading: global place of (s, d) = (0, 0), and the road's direction there. bend: 1 / radius in 1 / metre,
    never 0. ego: s, d of the car at time 0 and its ds/dt. size [M,3]: width, length, height. start, rate [M,2]: (s, d)
    at time 0 and its change a second. turn [M]: where a thing faces, from the road's direction. scatter [M,8,2], on the
    outline of the unit square: where a radar's echo comes from. cameras, radars: of the car, by channel. hand: 1, or -1
    where all is seen in a mirror: looks and chance, which have a left and a right too, change their sides.
    """

    origin: np.ndarray
    heading: float
    bend: float
    ego: tuple
    keyframes: int
    light: dict
    label: np.ndarray
    category: list
    attribute: list
    size: np.ndarray
    start: np.ndarray
    rate: np.ndarray
    turn: np.ndarray
    scatter: np.ndarray
    cameras: dict
    radars: dict
    hand: int

    def at(self, place):
        """(s, d) [...,2] -> global x, y [...,2] and the road's direction [...] there."""
        s, d = place[..., 0], place[..., 1]
        angle = self.bend * s
        along = np.stack([(1 / self.bend - d) * np.sin(angle), 1 / self.bend - (1 / self.bend - d) * np.cos(angle)], -1)
        return self.origin + along @ turned(self.heading).T, self.heading + angle

    def car(self, time):
        """(x, y [2], yaw, speed, turn rate in radians a second) of the car that carries the sensors."""
        s, d, rate = self.ego
        xy, yaw = self.at(np.array([s + rate * time, d]))
        return xy, float(yaw), rate * (1 - self.bend * d), rate * self.bend

    def things(self, time):
        """(centre [M,3], yaw [M], velocity [M,2]) in the global frame."""
        place = self.start + self.rate * time
        xy, direction = self.at(place)
        along = self.rate[:, 0] * (1 - self.bend * place[:, 1])
        velocity = np.einsum("nij,nj->ni", turned(direction), np.stack([along, self.rate[:, 1]], axis=1))
        return np.concatenate([xy, self.size[:, 2:] / 2], axis=1), direction + self.turn, velocity


def build(seed, index, keyframes):
    """The World of scene `index`, long enough for so many keyframes. It has things of every class."""
    rng = np.random.default_rng((seed, index, 9))
    duration = (keyframes - 1) * KEYFRAME
    ego = (float(rng.uniform(0, CROSSING)), -LANE / 2, float(rng.uniform(0, 11) if index % 5 else rng.uniform(0, 2)))
    bend = float(rng.uniform(5e-4, 4e-3) * rng.choice([-1, 1]))
    rows = [row(ego[0], ego[1], ego[2], 0, 0, (2.2, 5.5, 1.8))]  # the car itself: nothing may drive through it
    times = np.arange(-BEFORE, duration + 0.01, 0.25)
    count = round(DENSITY * (1 + ego[2] * duration / (2 * NEAR)))
    for number in range(count):
        label = number if number < len(CLASSES) else int(rng.choice(len(CLASSES), p=SHARES))
        put(rng, rows, lambda label=label: random_thing(rng, label, ego, duration), times)
    for number in range(count // 2):
        put(rng, rows, lambda kind=(BUILDING, TREE)[number % 2]: scenery(rng, kind, ego, duration), times)
    rows = rows[1:]
    light = {"sun": float(rng.uniform(0, 2 * math.pi)), "haze": float(rng.uniform(0, 1)), "look": rng.integers(2**31)}
    return World(
        rng.uniform(300, 1800, size=2), float(rng.uniform(-math.pi, math.pi)), bend, ego, keyframes, light,
        np.array([r["label"] for r in rows]), [r["category"] for r in rows], [r["attribute"] for r in rows],
        *(np.array([r[key] for r in rows], np.float64) for key in ("size", "start", "rate", "turn")),
        np.stack([outline(rng) for _ in rows]), CAMERAS, RADARS, 1,
    )  # fmt: skip


def row(s, d, along, across, turn, size, label=BUILDING, category="", attribute=""):
    facts = {"start": (s, d), "rate": (along, across), "turn": turn, "size": size}
    return facts | {"label": label, "category": category, "attribute": attribute}


def outline(rng):
    """float64 [8,2], -0.5 to 0.5: two points on each of the sides front, left, back, right of the unit square."""
    along = rng.uniform(-0.42, 0.42, size=8)
    points = np.stack([np.full(8, 0.5), along], axis=1)
    return np.einsum("nij,nj->ni", turned(np.arange(8) % 4 * (math.pi / 2)), points)


def put(rng, rows, make, times):
    """Adds make() to rows, tried 30 times, where it never touches what is there already."""
    for _ in range(30):
        new = make()
        mine, radius = discs(new, times)
        if all(free(mine, radius, *discs(other, times)) for other in rows):
            rows.append(new)
            return


def discs(thing, times):
    """(s, d) [T,5,2] of five discs that cover a thing's ground, and their radius."""
    width, length, _ = thing["size"]
    turn = thing["turn"] + (math.pi / 2 if width > length else 0)
    width, length = min(width, length), max(width, length)
    axis = np.array([math.cos(turn), math.sin(turn)]) * (length - width) / 2
    centre = np.array(thing["start"]) + np.array(thing["rate"]) * times[:, None]
    return centre[:, None] + axis * np.linspace(-1, 1, 5)[:, None], 0.62 * width


def free(a, radius_a, b, radius_b):
    """True where two moving sets of discs [T,5,2] keep a gap of 0.4 m."""
    if (np.abs(a[:, 2] - b[:, 2]).max(axis=1).min()) > 30:
        return True
    gaps = np.linalg.norm(a[:, :, None] - b[:, None], axis=-1)
    return bool(gaps.min() > radius_a + radius_b + 0.4)


def random_thing(rng, label, ego, duration):
    """A thing that is within NEAR metres of the car along the road at some moment of the scene."""
    moment, offset = rng.uniform(0, duration), rng.uniform(-NEAR, NEAR)
    place = ego[0] + ego[2] * moment + offset
    size = np.array(SIZES[label]) * rng.uniform(0.9, 1.1, size=3)
    category = str(rng.choice(CATEGORIES[label]))
    if label < 5:
        d, along, across, turn, attribute = drive(rng)
    elif label == 5:
        d, along, across, turn, attribute = walk(rng)
        size *= 0.75 if category.endswith("child") else 1
        size *= (1.0, 1.0, 0.72) if attribute.endswith("sitting_lying_down") else 1
    elif label in (6, 7):
        d, along, across, turn, attribute = ride(rng)
        size *= (1, 1, 0.7) if attribute.endswith("without_rider") else 1
    else:
        d, along, across, turn, attribute = rng.uniform(-13, 13), 0.0, 0.0, rng.uniform(-math.pi, math.pi), ""
    if abs(across) > 2:  # on a crossing road, on its right side
        lane = math.copysign(CROSSING_HALF / 2, across)
        place = round(place / CROSSING) * CROSSING + lane
    start = place - along * moment, d - across * moment
    return row(*start, along, across, turn, tuple(size), label, category, attribute)


def drive(rng):
    """(d, ds/dt, dd/dt, turn, attribute) of a vehicle: in a lane, on a crossing road, parked, or stopped in a lane."""
    way = float(rng.choice([-1, 1]))  # 1: against the car's direction, on the left half of the road
    lane, back = way * float(rng.choice([0.5, 1.5])) * LANE, math.pi if way > 0 else 0.0
    choice, speed = rng.random(), float(rng.uniform(1, 14))
    if choice < 0.42:
        return lane, -way * speed, 0.0, back, "vehicle.moving"
    if choice < 0.58:
        return float(rng.uniform(-30, 30)), 0.0, way * speed, way * math.pi / 2, "vehicle.moving"
    if choice < 0.70:
        return lane, 0.0, 0.0, back, "vehicle.stopped"
    if choice < 0.85:
        return way * 8.4, 0.0, 0.0, back + float(rng.normal(0, 0.08)), "vehicle.parked"
    return way * float(rng.uniform(15, 28)), 0.0, 0.0, float(rng.uniform(-math.pi, math.pi)), "vehicle.parked"


def walk(rng):
    """The same of a pedestrian, who walks, stands or sits anywhere and faces anywhere."""
    turn, speed = float(rng.uniform(-math.pi, math.pi)), float(rng.uniform(0.6, 2.0))
    d, choice = float(rng.uniform(-SIDEWALK, SIDEWALK)), rng.random()
    if choice < 0.5:
        return d, speed * math.cos(turn), speed * math.sin(turn), turn, "pedestrian.moving"
    return d, 0.0, 0.0, turn, "pedestrian.standing" if choice < 0.8 else "pedestrian.sitting_lying_down"


def ride(rng):
    """The same of a motorcycle or bicycle: ridden at the road's edge, halting there, or left on the sidewalk."""
    way, choice = float(rng.choice([-1, 1])), rng.random()
    back = math.pi if way > 0 else 0.0
    if choice < 0.7:
        speed = float(rng.uniform(2, 9)) if choice < 0.55 else 0.0
        return way * float(rng.uniform(3, 9)), -way * speed, 0.0, back, "cycle.with_rider"
    return way * float(rng.uniform(8, 14)), 0.0, 0.0, float(rng.uniform(-math.pi, math.pi)), "cycle.without_rider"


def scenery(rng, kind, ego, duration):
    """A building or a tree beside the road, clear of the crossing roads."""
    place = ego[0] + rng.uniform(-NEAR - 30, NEAR + 30) + ego[2] * rng.uniform(0, duration)
    side, size = rng.choice([-1, 1]), np.array(SIZES[kind]) * rng.uniform(0.7, 1.4, size=3)
    far = rng.uniform(34, 48) if kind == BUILDING else rng.uniform(15, 30)
    clear = CROSSING_HALF + size[1] / 2 + 1
    place = np.floor(place / CROSSING) * CROSSING + np.clip(place % CROSSING, clear, CROSSING - clear)
    return row(float(place), float(side * far), 0.0, 0.0, 0.0 if kind == BUILDING else 0.5, tuple(size), kind)


# ---- what a radar measures ----


def radar_returns(world, name, time, rng):
    """One sweep of radar `name`: (points [P] of RADAR_POINT, thing [P] that each comes from, -1 for none); P >= 1.

    A radar measures range, direction and the speed along the ray. So vx, vy is the velocity relative to the radar along
    the ray, and vx_comp, vy_comp the thing's own over ground along the ray; both point to or from the radar. The height
    is not measured: z is 0. Some returns are wrong and say so (invalid_state, ambig_state), as real ones.
    """
    radar = world.radars[name]
    xy, yaw, speed, rate = world.car(time)
    lever = turned(yaw) @ np.array(radar.place[:2])
    motion = speed * np.array([math.cos(yaw), math.sin(yaw)]) + rate * np.array([-lever[1], lever[0]])
    to_radar = turned(yaw + math.radians(radar.turn)).T  # global -> radar
    centre, facing, velocity = world.things(time)
    shape = world.size[:, None, 1::-1]  # length, width
    corners = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) / 2

    def seen_from_radar(unit):
        points = np.einsum("nij,nkj->nki", turned(facing), unit * shape) + centre[:, None, :2]
        return (points - xy - lever) @ to_radar.T

    echo = seen_from_radar(world.scatter)
    side = np.arange(8) % 4 * (world.hand * math.pi / 2) + facing[:, None] - yaw - math.radians(radar.turn)
    lit = (echo * np.stack([np.cos(side), np.sin(side)], axis=-1)).sum(axis=-1) < 0
    chance = np.array([REFLECTS[label] for label in world.label.tolist()])[:, None]
    lit &= rng.random(lit.shape) < chance * np.clip(1.3 - np.linalg.norm(echo, axis=-1) / 80, 0.3, 1)
    thing, which = np.nonzero(lit)
    points, own = echo[thing, which], velocity[thing] @ to_radar.T
    clear = ~shadowed(points, thing, seen_from_radar(np.broadcast_to(corners, (len(centre), 4, 2))), world.size[:, 2])
    points, own, thing = points[clear], own[clear], thing[clear]
    ground = int(rng.integers(6, 16))  # returns from the ground, walls and wires
    angle, reach = rng.uniform(-1, 1, ground) * world.hand * RADAR_HALF_ANGLE, rng.uniform(3, RADAR_REACH, ground)
    points = np.concatenate([np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1), points])
    own, thing = np.concatenate([np.zeros((ground, 2)), own]), np.concatenate([np.full(ground, -1), thing])
    reach, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
    kept = (reach > 0.8) & (reach < RADAR_REACH) & (np.abs(angle) <= RADAR_HALF_ANGLE)
    return measured(rng, points[kept], own[kept], to_radar @ motion, world.hand), thing[kept]


def shadowed(points, thing, corners, height):
    """bool [P]: behind a tall thing other than its own. corners [M,4,2] and points [P,2] in the radar's frame."""
    angle, reach = np.arctan2(corners[..., 1], corners[..., 0]), np.linalg.norm(corners, axis=-1).max(axis=1)
    tall = np.flatnonzero((height > 2) & (corners[..., 0] > 0).all(axis=1))
    mine = np.arctan2(points[:, 1], points[:, 0])[:, None]
    behind = (mine > angle[tall].min(axis=1)) & (mine < angle[tall].max(axis=1))
    behind &= np.linalg.norm(points, axis=1)[:, None] > reach[tall]
    return (behind & (thing[:, None] != tall)).any(axis=1)


def measured(rng, points, own, motion, hand):
    """RADAR_POINT [P] of true places and velocities over ground [P,2]; motion [2]: the radar's; all in its frame; hand:
    the World's."""
    count = len(points)
    reach, angle = np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])
    true_ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    along = (own * true_ray).sum(axis=1) + rng.normal(0, 0.08, count)
    relative = along - true_ray @ motion
    across = np.abs(own[:, 0] * true_ray[:, 1] - own[:, 1] * true_ray[:, 0])
    reach, angle = reach + rng.normal(0, 0.12, count), angle + hand * rng.normal(0, 0.003, count)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    still = np.linalg.norm(own, axis=1) < 0.2
    moving = np.where(across > 2 * np.abs(along), CROSSING_MOVING, np.where(along < 0, ONCOMING, MOVING))
    kind = np.where(still, np.where(rng.random(count) < 0.8, STATIONARY, CANDIDATE), moving)
    wrong = rng.random(count) < 0.08
    wrong[0] = False
    along, relative = (np.where(wrong, rng.uniform(-15, 15, count), speed) for speed in (along, relative))
    returns = np.zeros(count, RADAR_POINT)
    for column, values in (("", reach), ("v", relative), ("v_comp", along)):
        first, _, rest = column.partition("_")
        for axis, part in zip("xy", ray.T, strict=True):
            returns[first + axis + ("_" + rest if rest else "")] = values * part
    returns["dyn_prop"], returns["id"], returns["rcs"] = kind, np.arange(count), rng.uniform(-5, 30, count).round(1)
    returns["is_quality_valid"], returns["pdh0"], returns["x_rms"], returns["y_rms"] = 1, 1, 19, 19
    returns["vx_rms"], returns["vy_rms"] = 16, 3
    by_state = rng.random(count) < 0.5
    returns["invalid_state"] = np.where(wrong & by_state, rng.integers(1, 8, count), 0)
    returns["ambig_state"] = np.where(wrong & ~by_state, rng.integers(0, 3, count), 3)
    return returns
