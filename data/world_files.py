"""The drawn world of `data.world` as files in nuScenes' official layout v1.0-mini.

    OUT/v1.0-mini/*.json           the 13 tables
    OUT/samples/CAM_*/*.jpg        six pictures a keyframe, two keyframes a second
    OUT/samples/LIDAR_TOP/*.pcd.bin, OUT/samples/RADAR_*/*.pcd, OUT/sweeps/RADAR_*/*.pcd (13 a second)
    OUT/maps/*.png                 an empty map, which nuscenes-devkit wants

The scenes bear the names of the real mini set, so that its splits mini_train and mini_val apply. Each sensor has its
own time and its own pose of the car, as in the real set; a thing's boxes are of the keyframe's time. A thing is
annotated in the keyframes in which a camera sees some of it within `ANNOTATED` metres.
"""

import hashlib
import json
import math

import numpy as np
from PIL import Image

from data.world import BEFORE, CAMERAS, KEYFRAME, RADARS, SWEEP, build, radar_returns, turned
from data.world_mirror import mirror
from data.world_pictures import Painter

TRAIN = ("scene-0061", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-1077", "scene-1094", "scene-1100")
VAL = ("scene-0103", "scene-0916")
ORDER = (TRAIN[0], VAL[0], *TRAIN[1:6], VAL[1], *TRAIN[6:])  # a set of few scenes has the first of these
HELD_OUT = 5  # of the scenes beyond those every so many is for validation
USUAL_LENGTH = 4  # keyframes a scene
FEWEST_KEYFRAMES = 4  # two scenes of two: a velocity needs two
USUAL_SIZE = (800, 450)
ANNOTATED = 70.0
START, BETWEEN = 1532402927000000, 600_000_000  # microseconds: the first scene, and from one scene to the next
LIDAR = ((0.94, 0.0, 1.84), -90.0)  # place in the car; degrees to the left of forward
ATTRIBUTES = (
    "cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing",
    "pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation",
    "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
PCD_HEADER = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z dyn_prop id rcs vx vy vx_comp vy_comp is_quality_valid ambig_state x_rms y_rms invalid_state pdh0 vx_rms vy_rms
SIZE 4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1
TYPE F F F I I F F F F F I I I I I I I I
COUNT 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
WIDTH {count}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {count}
DATA binary
"""  # noqa: E501 (one line of the format)
PCD_ROOM = 4096  # bytes of a real file besides its points: header, then zeros after the points


def write_nuscenes(out, images, seed, size=None, mirrored=False):
    """Draws a set of `images` pictures, a multiple of 6 and 24 or more, into the folder `out` (a Path).

    mirrored: draw the same world as a mirror shows it; see `data.world_mirror`. Samples and things keep their tokens.
    """
    for name in (*CAMERAS, *RADARS, "LIDAR_TOP"):
        (out / "samples" / name).mkdir(parents=True, exist_ok=True)
    for name in RADARS:
        (out / "sweeps" / name).mkdir(parents=True, exist_ok=True)
    (out / "maps").mkdir(exist_ok=True)
    Image.new("L", (64, 64)).save(out / "maps/empty.png")
    tables, lengths = Tables(seed), scene_lengths(images // len(CAMERAS))
    for index, keyframes in enumerate(lengths):
        world = build(seed, index, keyframes)
        SceneWriter(out, tables, index, mirror(world) if mirrored else world, size or USUAL_SIZE).write()
    tables.add("map", "map", category="semantic_prior", filename="maps/empty.png", log_tokens=list(tables.rows["log"]))
    tables.save(out / "v1.0-mini")
    names = [scene_name(index) for index in range(len(lengths))]
    held_out = {*VAL, *names[len(ORDER) :: HELD_OUT]}
    splits = {"train": [name for name in names if name not in held_out]}
    splits["val"] = [name for name in names if name in held_out]
    for split, scenes in splits.items():
        (out / "v1.0-mini" / f"{split}.txt").write_text("\n".join(scenes) + "\n")


def scene_name(index):
    """Those of mini_train and mini_val come first; nuScenes has no scene of the other names."""
    return ORDER[index] if index < len(ORDER) else f"scene-{2000 + index}"


def scene_lengths(keyframes):
    """Keyframes of each scene, two scenes or more: about USUAL_LENGTH each."""
    scenes = max(2, keyframes // USUAL_LENGTH)
    return [keyframes // scenes + (index < keyframes % scenes) for index in range(scenes)]


def quaternion(matrix):
    """[w, x, y, z], unit, w >= 0, of a rotation matrix [3,3]."""
    m = np.asarray(matrix)
    # the eigenvector of this matrix with the greatest eigenvalue; exact for any rotation
    k = np.array([
        [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
        [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
        [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1]],
    ])  # fmt: skip
    q = np.linalg.eigh(k)[1][:, -1]
    return (q if q[0] >= 0 else -q).tolist()


def about_z(yaw):
    """[w, x, y, z] of a turn to the left."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def save_pcd(path, points):
    """RADAR_POINT [P], P >= 1, as a real radar file: header, 43 bytes a point, zeros up to 4,096 + 43 P bytes."""
    content = PCD_HEADER.format(count=len(points)).encode() + points.tobytes()
    path.write_bytes(content.ljust(PCD_ROOM + points.nbytes, b"\0"))


class Tables:
    """The 13 tables in the making: rows[table][token] is a row. Tokens follow from the seed, the table and a key."""

    def __init__(self, seed):
        self.seed = seed
        self.rows = {name: {} for name in TABLES}
        for name in ATTRIBUTES:
            self.add("attribute", name, name=name, description="")
        for name in CATEGORIES:
            self.add("category", name, name=name, description="")
        for number, level in enumerate(LEVELS, start=1):
            self.rows["visibility"][str(number)] = {"token": str(number), "level": level, "description": ""}
        for names, kind in ((CAMERAS, "camera"), (RADARS, "radar"), (("LIDAR_TOP",), "lidar")):
            for name in names:
                self.add("sensor", name, channel=name, modality=kind)

    def token(self, table, key):
        return hashlib.blake2b(f"{self.seed}/{table}/{key}".encode(), digest_size=16).hexdigest()

    def add(self, table, key, **values):
        """Adds a row and returns its token."""
        token = self.token(table, key)
        self.rows[table][token] = {"token": token, **values}
        return token

    def link(self, table, tokens):
        """Makes rows, in order of time, each other's prev and next."""
        for before, after in zip(["", *tokens], [*tokens, ""], strict=True):
            if before:
                self.rows[table][before]["next"] = after
            if after:
                self.rows[table][after]["prev"] = before

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.rows.items():
            (folder / f"{name}.json").write_text(json.dumps(list(rows.values()), indent=0) + "\n")


class SceneWriter:
    """Writes the files of one scene and adds its rows to the tables. Times are seconds from the first keyframe."""

    def __init__(self, out, tables, index, world, size):
        self.out, self.tables, self.world, self.size, self.name = out, tables, world, size, scene_name(index)
        self.start = START + index * BETWEEN
        self.rng = np.random.default_rng((tables.seed, index, 10))
        self.painter = Painter(world, size)
        self.file = f"drawn-{self.name}"
        self.calibrated = {name: self.calibrate(name) for name in (*CAMERAS, *RADARS, "LIDAR_TOP")}
        self.data = {name: [] for name in self.calibrated}  # tokens of sample_data in order of time
        self.boxes = {}  # thing -> tokens of its annotations in order of time

    def write(self):
        log = self.tables.add("log", self.name, logfile=self.file, vehicle="drawn", date_captured="2018-07-24",
                              location="singapore-onenorth")  # fmt: skip
        scene = self.tables.token("scene", self.name)
        samples = []
        for number in range(self.world.keyframes):
            key = f"{self.name}/{number}"
            stamp = self.stamp(number * KEYFRAME)
            samples.append(self.tables.add("sample", key, timestamp=stamp, prev="", next="", scene_token=scene))
        self.tables.link("sample", samples)
        self.tables.add("scene", self.name, log_token=log, nbr_samples=len(samples), first_sample_token=samples[0],
                        last_sample_token=samples[-1], name=self.name, description="drawn")  # fmt: skip
        returns = self.radars(samples)
        for number, sample in enumerate(samples):
            seen, own = self.cameras(number, sample)
            points = self.lidar(number, sample, seen, own)
            self.annotate(number, sample, seen, own, points, returns[number])
        for tokens in self.data.values():
            self.tables.link("sample_data", tokens)
        for thing, tokens in self.boxes.items():
            self.tables.link("sample_annotation", tokens)
            category = self.tables.token("category", self.world.category[thing])
            self.tables.add("instance", f"{self.name}/{thing}", category_token=category, nbr_annotations=len(tokens),
                            first_annotation_token=tokens[0], last_annotation_token=tokens[-1])  # fmt: skip

    def stamp(self, time):
        return self.start + round(time * 1e6)

    def calibrate(self, name):
        """Token of the sensor's row in calibrated_sensor."""
        intrinsic = []
        if name in CAMERAS:
            camera = self.world.cameras[name]
            place, rotation = camera.place, quaternion(camera.rotation)
            intrinsic = camera.intrinsic(*self.size).tolist()
        else:
            radar = self.world.radars.get(name)
            place, turn = (radar.place, radar.turn) if radar else LIDAR
            rotation = about_z(math.radians(turn))
        sensor = self.tables.token("sensor", name)
        return self.tables.add("calibrated_sensor", f"{self.name}/{name}", sensor_token=sensor,
                               translation=list(place), rotation=rotation, camera_intrinsic=intrinsic)  # fmt: skip

    def record(self, name, time, sample, key_frame, ending):
        """Adds one sample_data row and the car's pose at its time; returns the path of its file."""
        stamp = self.stamp(time)
        xy, yaw, *_ = self.world.car(time)
        key = f"{name}/{stamp}"
        pose = self.tables.token("sample_data", key)  # as in the real tables a pose has the token of its data
        self.tables.rows["ego_pose"][pose] = {
            "token": pose, "timestamp": stamp, "rotation": about_z(yaw), "translation": [*xy.tolist(), 0.0],
        }  # fmt: skip
        path = f"{'samples' if key_frame else 'sweeps'}/{name}/{self.file}__{name}__{stamp}.{ending}"
        width, height = self.size if name in CAMERAS else (0, 0)
        self.data[name].append(self.tables.add(
            "sample_data", key, sample_token=sample, ego_pose_token=pose, calibrated_sensor_token=self.calibrated[name],
            timestamp=stamp, fileformat="jpg" if name in CAMERAS else "pcd", is_key_frame=key_frame, height=height,
            width=width, filename=path, prev="", next="",
        ))  # fmt: skip
        return self.out / path

    def radars(self, samples):
        """All sweeps of the five radars; returns for each keyframe the number of good returns of each thing [M]."""
        counts = np.zeros((len(samples), len(self.world.label)), np.int64)
        last = (len(samples) - 1) * KEYFRAME
        for name, radar in self.world.radars.items():
            # the radar's own beat; the sweep nearest to a keyframe is the keyframe's
            times = np.arange(radar.delay - SWEEP * int(BEFORE / SWEEP), last + SWEEP / 2, SWEEP)
            nearest = [int(np.abs(times - number * KEYFRAME).argmin()) for number in range(len(samples))]
            for k, time in enumerate(times.tolist()):
                number = int(np.searchsorted(nearest, k))  # of the keyframe that it belongs to: the next one
                if number == len(samples):
                    break
                points, thing = radar_returns(self.world, name, time, self.rng)
                save_pcd(self.record(name, time, samples[number], k == nearest[number], "pcd"), points)
                if k == nearest[number]:
                    good = (points["invalid_state"] == 0) & (points["ambig_state"] == 3) & (thing >= 0)
                    counts[number] += np.bincount(thing[good], minlength=counts.shape[1])
        return counts

    def cameras(self, number, sample):
        """The six pictures of a keyframe; of each thing (pixels seen [M], pixels it would have alone [M]) in all."""
        seen, own = 0, 0
        for name, camera in self.world.cameras.items():
            time = number * KEYFRAME + camera.delay * 1e-6
            image, here, alone = self.painter.paint(name, time)
            image.save(self.record(name, time, sample, True, "jpg"), quality=90)
            seen, own = seen + here, own + alone
        return seen, own

    def lidar(self, number, sample, seen, own):
        """A thin lidar sweep, points on the seen sides of things; returns how many of each thing [M]."""
        time = number * KEYFRAME
        xy, yaw, *_ = self.world.car(time)
        centre, facing, _ = self.world.things(time)
        place, turn = LIDAR
        eye = np.array([*(xy + turned(yaw) @ np.array(place[:2])), place[2]])
        reach = np.linalg.norm(centre - eye, axis=1)
        area = self.world.size[:, 2] * self.world.size[:, :2].max(axis=1)
        counts = np.ceil(np.minimum(1500 * area / reach**2, 60) * seen / np.maximum(own, 1)).astype(np.int64)
        thing = np.repeat(np.arange(len(counts)), counts)
        spot = self.world.scatter[thing, self.rng.integers(8, size=len(thing))] * self.world.size[thing, 1::-1]
        spot = np.einsum("nij,nj->ni", turned(facing[thing]), spot) + centre[thing, :2]
        height = self.rng.random(len(thing)) * self.world.size[thing, 2]
        points = np.concatenate([spot, height[:, None]], axis=1) - eye
        points[:, :2] = points[:, :2] @ turned(yaw + math.radians(turn))
        rows = np.concatenate([points, np.zeros((len(points), 2))], axis=1).astype("<f4")  # x y z intensity ring
        self.record("LIDAR_TOP", time, sample, True, "pcd.bin").write_bytes(rows.tobytes())
        return counts

    def annotate(self, number, sample, seen, own, lidar_points, radar_points):
        """Rows of sample_annotation for the things that the cameras see in a keyframe."""
        time = number * KEYFRAME
        centre, facing, _ = self.world.things(time)
        near = np.linalg.norm(centre[:, :2] - self.world.car(time)[0], axis=1) < ANNOTATED
        for thing in np.flatnonzero(near & (seen > 0) & (self.world.label >= 0)).tolist():
            share, attribute = seen[thing] / own[thing], self.world.attribute[thing]
            token = self.tables.add(
                "sample_annotation", f"{self.name}/{thing}/{number}", sample_token=sample,
                instance_token=self.tables.token("instance", f"{self.name}/{thing}"),
                visibility_token=str(1 + int(np.digitize(share, (0.4, 0.6, 0.8)))),
                attribute_tokens=[self.tables.token("attribute", attribute)] if attribute else [],
                translation=centre[thing].tolist(), size=self.world.size[thing].tolist(),
                rotation=about_z(float(facing[thing])), prev="", next="",
                num_lidar_pts=int(lidar_points[thing]), num_radar_pts=int(radar_points[thing]),
            )  # fmt: skip
            self.boxes.setdefault(thing, []).append(token)
