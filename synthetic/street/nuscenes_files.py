"""Street scenes as files in nuScenes' official layout v1.0-mini.

    OUT/v1.0-mini/*.json           the 13 tables
    OUT/samples/CAM_*/*.jpg        six images per key frame, two key frames per second
    OUT/samples/LIDAR_TOP/*.pcd.bin, OUT/samples/RADAR_*/*.pcd, OUT/sweeps/RADAR_*/*.pcd (13 per second)
    OUT/maps/*.png                 an empty map, which nuscenes-devkit requires

The first scenes have the names of the real mini set, so that its splits mini_train and mini_val work. As in the real
set each sensor has its own time and its own pose of the vehicle. An object is annotated in the key frames in which a
camera sees it within MAX_DISTANCE, as it is at the key frame's time.
"""

import hashlib
import json
import math

import numpy as np
from PIL import Image

from synthetic.street import simulation
from synthetic.street.renderer import Renderer
from synthetic.street.simulation import CAMERAS, KEY_FRAME_PERIOD, RADAR_POINT, RADARS, SWEEP_PERIOD, rotation_2d
from utils.nuscenes import ATTRIBUTES, MINI_TRAIN, MINI_VAL

# names of the first scenes: both splits have scenes however few there are
NAMES = (MINI_TRAIN[0], MINI_VAL[0], *MINI_TRAIN[1:6], MINI_VAL[1], *MINI_TRAIN[6:])
VAL_EVERY = 5  # of the scenes after those one in five is for validation
SCENE_LENGTH = 4  # key frames of a scene, about
MIN_KEY_FRAMES = 4  # two scenes of two: a velocity needs two
DEFAULT_SIZE = (800, 450)
MAX_DISTANCE = 70.0  # meters
START_TIME, SCENE_INTERVAL = 1532402927000000, 600_000_000  # microseconds: first scene, and from one to the next
LIDAR_POSITION, LIDAR_YAW = (0.94, 0.0, 1.84), -90.0  # in the vehicle's frame; degrees to the left of forward
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
VISIBILITY_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")  # percent of the object
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation",
    "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
PCD_HEADER = f"""# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS {" ".join(RADAR_POINT.names)}
SIZE {" ".join(str(RADAR_POINT[name].itemsize) for name in RADAR_POINT.names)}
TYPE {" ".join(RADAR_POINT[name].kind.upper() for name in RADAR_POINT.names)}
COUNT {" ".join("1" for _ in RADAR_POINT.names)}
WIDTH {{count}}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {{count}}
DATA binary
"""
PCD_EXTRA = 4096  # bytes of a file besides its points: the header, and zeros after the points


def write_nuscenes(out, images, seed, size=None):
    """Draw `images` images, a multiple of 6 and at least 24, into the folder `out` (a Path)."""
    for name in (*CAMERAS, *RADARS, "LIDAR_TOP"):
        (out / "samples" / name).mkdir(parents=True, exist_ok=True)
    for name in RADARS:
        (out / "sweeps" / name).mkdir(parents=True, exist_ok=True)
    (out / "maps").mkdir(exist_ok=True)
    Image.new("L", (64, 64)).save(out / "maps/empty.png")
    tables, lengths = TableWriter(seed), scene_lengths(images // len(CAMERAS))
    for index, key_frames in enumerate(lengths):
        scene = simulation.build_scene(seed, index, key_frames)
        SceneWriter(out, tables, index, scene, size or DEFAULT_SIZE).write()
    tables.add("map", "map", category="semantic_prior", filename="maps/empty.png", log_tokens=list(tables.rows["log"]))
    tables.save(out / "v1.0-mini")
    names = [scene_name(index) for index in range(len(lengths))]
    val = {*MINI_VAL, *names[len(NAMES) :: VAL_EVERY]}
    splits = {"train": [name for name in names if name not in val], "val": [name for name in names if name in val]}
    for split, scenes in splits.items():
        (out / "v1.0-mini" / f"{split}.txt").write_text("\n".join(scenes) + "\n")


def scene_name(index):
    return NAMES[index] if index < len(NAMES) else f"scene-{2000 + index}"  # nuScenes has no scene of these numbers


def scene_lengths(key_frames):
    """The number of key frames of each scene: at least two scenes, about SCENE_LENGTH each."""
    scenes = max(2, key_frames // SCENE_LENGTH)
    return [key_frames // scenes + (index < key_frames % scenes) for index in range(scenes)]


def quaternion(rotation):
    """[w, x, y, z], unit, w >= 0, of a rotation matrix [3,3] (Bar-Itzhack 2000)."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    q = np.linalg.eigh([
        [xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, yy - xx - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, zz - xx - yy],
    ])[1][:, -1]  # fmt: skip
    return (q if q[0] >= 0 else -q).tolist()


def yaw_quaternion(yaw):
    """[w, x, y, z] of a rotation to the left."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


def save_pcd(path, points):
    """RADAR_POINT [P], P >= 1, as a radar file: header, 43 bytes per point, zeros up to 4,096 + 43 P bytes."""
    content = PCD_HEADER.format(count=len(points)).encode() + points.tobytes()
    path.write_bytes(content.ljust(PCD_EXTRA + points.nbytes, b"\0"))


class TableWriter:
    """The 13 tables: rows[table][token] is a row. Tokens depend on the seed, the table and a key."""

    def __init__(self, seed):
        self.seed = seed
        self.rows = {name: {} for name in TABLES}
        for name in ATTRIBUTES:
            self.add("attribute", name, name=name, description="")
        for name in CATEGORIES:
            self.add("category", name, name=name, description="")
        for number, level in enumerate(VISIBILITY_LEVELS, start=1):
            self.rows["visibility"][str(number)] = {"token": str(number), "level": level, "description": ""}
        for name in (*CAMERAS, *RADARS, "LIDAR_TOP"):
            modality = "camera" if name in CAMERAS else "radar" if name in RADARS else "lidar"
            self.add("sensor", name, channel=name, modality=modality)

    def token(self, table, key):
        return hashlib.blake2b(f"{self.seed}/{table}/{key}".encode(), digest_size=16).hexdigest()

    def add(self, table, key, **values):
        """Add a row and return its token."""
        token = self.token(table, key)
        self.rows[table][token] = {"token": token, **values}
        return token

    def link(self, table, tokens):
        """Set prev and next of rows given in order of time."""
        for token, before, after in zip(tokens, ["", *tokens], [*tokens[1:], ""]):
            self.rows[table][token] |= {"prev": before, "next": after}

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.rows.items():
            (folder / f"{name}.json").write_text(json.dumps(list(rows.values()), indent=0) + "\n")


class SceneWriter:
    """Writes the files of one scene and adds its rows to the tables. Times are seconds from the first key frame."""

    def __init__(self, out, tables, index, scene, size):
        self.out, self.tables, self.scene, self.size, self.name = out, tables, scene, size, scene_name(index)
        self.start_time = START_TIME + index * SCENE_INTERVAL
        self.rng = np.random.default_rng((tables.seed, index, 10))
        self.renderer = Renderer(scene, size)
        self.prefix = f"drawn-{self.name}"
        self.calibrations = {name: self.add_calibration(name) for name in (*CAMERAS, *RADARS, "LIDAR_TOP")}
        self.sample_data = {name: [] for name in self.calibrations}  # tokens in order of time
        self.annotations = {}  # object -> tokens of its annotations in order of time

    def write(self):
        place = {"date_captured": "2018-07-24", "location": "singapore-onenorth"}
        log = self.tables.add("log", self.name, logfile=self.prefix, vehicle="drawn", **place)
        scene, samples = self.tables.token("scene", self.name), []
        for number in range(self.scene.key_frames):
            values = {"timestamp": self.timestamp(number * KEY_FRAME_PERIOD), "prev": "", "next": ""}
            samples.append(self.tables.add("sample", f"{self.name}/{number}", **values, scene_token=scene))
        self.tables.link("sample", samples)
        self.tables.add(
            "scene", self.name, log_token=log, nbr_samples=len(samples), first_sample_token=samples[0],
            last_sample_token=samples[-1], name=self.name, description="drawn",
        )  # fmt: skip
        radar_points = self.write_radars(samples)
        for number, sample in enumerate(samples):
            time = number * KEY_FRAME_PERIOD
            visible, own = self.write_images(time, sample)
            lidar_points = self.write_lidar(time, sample, visible, own)
            self.annotate(number, sample, visible, own, lidar_points, radar_points[number])
        for tokens in self.sample_data.values():
            self.tables.link("sample_data", tokens)
        for index, tokens in self.annotations.items():
            self.tables.link("sample_annotation", tokens)
            category = self.tables.token("category", self.scene.categories[index])
            self.tables.add(
                "instance", f"{self.name}/{index}", category_token=category, nbr_annotations=len(tokens),
                first_annotation_token=tokens[0], last_annotation_token=tokens[-1],
            )  # fmt: skip

    def timestamp(self, time):
        return self.start_time + round(time * 1e6)

    def add_calibration(self, name):
        """Add the sensor's row to calibrated_sensor; returns its token."""
        intrinsic = []
        if name in CAMERAS:
            position, rotation = CAMERAS[name].position, quaternion(CAMERAS[name].rotation)
            intrinsic = CAMERAS[name].intrinsic(*self.size).tolist()
        elif name in RADARS:
            position, rotation = RADARS[name].position, yaw_quaternion(math.radians(RADARS[name].yaw))
        else:
            position, rotation = LIDAR_POSITION, yaw_quaternion(math.radians(LIDAR_YAW))
        return self.tables.add(
            "calibrated_sensor", f"{self.name}/{name}", sensor_token=self.tables.token("sensor", name),
            translation=list(position), rotation=rotation, camera_intrinsic=intrinsic,
        )  # fmt: skip

    def add_sample_data(self, name, time, sample, is_key_frame, suffix):
        """Add a row to sample_data and the vehicle's pose at its time; returns the path of its file."""
        timestamp = self.timestamp(time)
        xy, yaw, *_ = self.scene.ego(time)
        key = f"{name}/{timestamp}"
        pose = self.tables.token("sample_data", key)  # as in the real tables a pose has the token of its sample_data
        row = {"token": pose, "timestamp": timestamp, "rotation": yaw_quaternion(yaw)}
        self.tables.rows["ego_pose"][pose] = row | {"translation": [*xy.tolist(), 0.0]}
        folder = "samples" if is_key_frame else "sweeps"
        path = f"{folder}/{name}/{self.prefix}__{name}__{timestamp}.{suffix}"
        width, height = self.size if name in CAMERAS else (0, 0)
        token = self.tables.add(
            "sample_data", key, sample_token=sample, ego_pose_token=pose,
            calibrated_sensor_token=self.calibrations[name], timestamp=timestamp,
            fileformat="jpg" if name in CAMERAS else "pcd", is_key_frame=is_key_frame,
            height=height, width=width, filename=path, prev="", next="",
        )  # fmt: skip
        self.sample_data[name].append(token)
        return self.out / path

    def write_radars(self, samples):
        """Write all sweeps; returns int64 [samples,M], the number of valid returns of each object in key frames."""
        counts = np.zeros((len(samples), len(self.scene.labels)), np.int64)
        last = (len(samples) - 1) * KEY_FRAME_PERIOD
        for name, radar in RADARS.items():
            first = radar.delay - SWEEP_PERIOD * int(simulation.LEAD_TIME / SWEEP_PERIOD)
            times = np.arange(first, last + SWEEP_PERIOD / 2, SWEEP_PERIOD)
            # the sweep nearest to a key frame is the key frame's; those since the one before belong to its sample
            nearest = [int(np.abs(times - number * KEY_FRAME_PERIOD).argmin()) for number in range(len(samples))]
            for sweep, time in enumerate(times[: nearest[-1] + 1].tolist()):
                number = int(np.searchsorted(nearest, sweep))
                is_key_frame = sweep == nearest[number]
                points, source = simulation.radar_returns(self.scene, name, time, self.rng)
                save_pcd(self.add_sample_data(name, time, samples[number], is_key_frame, "pcd"), points)
                if is_key_frame:
                    valid = (points["invalid_state"] == 0) & (points["ambig_state"] == 3) & (source >= 0)
                    counts[number] += np.bincount(source[valid], minlength=counts.shape[1])
        return counts

    def write_images(self, time, sample):
        """Write the six images of a key frame; returns the sums over them of visible and own pixels, see Renderer."""
        visible, own = 0, 0
        for name, camera in CAMERAS.items():
            image_time = time + camera.delay * 1e-6
            image, here_visible, here_own = self.renderer.render(name, image_time)
            image.save(self.add_sample_data(name, image_time, sample, True, "jpg"), quality=90)
            visible, own = visible + here_visible, own + here_own
        return visible, own

    def write_lidar(self, time, sample, visible, own):
        """Write a sparse lidar sweep, points on the visible objects; returns the number on each object [M]."""
        xy, yaw, *_ = self.scene.ego(time)
        centers, yaws, _ = self.scene.objects(time)
        sizes = self.scene.sizes
        lidar = np.array([*(xy + rotation_2d(yaw) @ np.array(LIDAR_POSITION[:2])), LIDAR_POSITION[2]])
        distance = np.linalg.norm(centers - lidar, axis=1)
        area = sizes[:, 2] * sizes[:, :2].max(axis=1)
        counts = np.ceil(np.minimum(1500 * area / distance**2, 60) * visible / np.maximum(own, 1)).astype(np.int64)
        source = np.repeat(np.arange(len(counts)), counts)
        spot = self.scene.reflectors[source, self.rng.integers(8, size=len(source))] * sizes[source, 1::-1]
        spot = np.einsum("nij,nj->ni", rotation_2d(yaws[source]), spot) + centers[source, :2]
        height = self.rng.random(len(source)) * sizes[source, 2]
        points = np.concatenate([spot, height[:, None]], axis=1) - lidar
        points[:, :2] = points[:, :2] @ rotation_2d(yaw + math.radians(LIDAR_YAW))
        rows = np.concatenate([points, np.zeros((len(points), 2))], axis=1).astype("<f4")  # x y z intensity ring
        self.add_sample_data("LIDAR_TOP", time, sample, True, "pcd.bin").write_bytes(rows.tobytes())
        return counts

    def annotate(self, number, sample, visible, own, lidar_points, radar_points):
        """Add the rows of sample_annotation of key frame `number`; all arrays [M]."""
        time = number * KEY_FRAME_PERIOD
        centers, yaws, _ = self.scene.objects(time)
        near = np.linalg.norm(centers[:, :2] - self.scene.ego(time)[0], axis=1) < MAX_DISTANCE
        for index in np.flatnonzero(near & (visible > 0) & (self.scene.labels >= 0)).tolist():
            attribute = self.scene.attributes[index]
            level = 1 + int(np.digitize(visible[index] / own[index], (0.4, 0.6, 0.8)))
            token = self.tables.add(
                "sample_annotation", f"{self.name}/{index}/{number}", sample_token=sample,
                instance_token=self.tables.token("instance", f"{self.name}/{index}"), visibility_token=str(level),
                attribute_tokens=[self.tables.token("attribute", attribute)] if attribute else [],
                translation=centers[index].tolist(), size=self.scene.sizes[index].tolist(),
                rotation=yaw_quaternion(float(yaws[index])), prev="", next="",
                num_lidar_pts=int(lidar_points[index]), num_radar_pts=int(radar_points[index]),
            )  # fmt: skip
            self.annotations.setdefault(index, []).append(token)
