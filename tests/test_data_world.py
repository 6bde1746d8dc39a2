"""The drawn street world and its nuScenes files: pictures, radars and boxes that agree with each other."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from data import drawn, nuscenes_radar, world, world_files, world_pictures
from data.errors import DataError

SIZE = (320, 180)
IMAGES = 36  # two scenes of three keyframes
GOOD = 0.6  # metres: five sigma of a radar's range; its angle adds 0.015 of the distance


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn.draw_nuscenes(tmp_path_factory.mktemp("drawn") / "nuscenes", images=IMAGES + 5, seed=2, size=SIZE)


@pytest.fixture(scope="module")
def tables(root):
    return {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-mini").glob("*.json")}


def by_token(rows):
    return {row["token"]: row for row in rows}


def matrix(quaternion):
    w, x, y, z = quaternion
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def one_thing(label, s=20.0, d=-1.75, turn=0.0, rate=(0.0, 0.0), attribute="", speed=0.0):
    """A World with a single thing on an almost straight road; the car is at s 0 and looks along it."""
    full = world.build(0, 0, 4)
    return dataclasses.replace(
        full, bend=1e-5, ego=(0.0, -1.75, speed), label=np.array([label]), category=[""], attribute=[attribute],
        size=np.array([world.SIZES[label]]), start=np.array([[s, d]]), rate=np.array([rate]), turn=np.array([turn]),
        scatter=full.scatter[:1],
    )  # fmt: skip


def pixels(image):
    return np.asarray(image, np.float64)


def test_layout(root, tables):
    assert set(tables) == set(world_files.TABLES) and len(tables) == 13
    assert [scene["name"] for scene in tables["scene"]] == ["scene-0061", "scene-0103"]
    assert len(tables["sample"]) * 6 == IMAGES == len(list(root.rglob("*.jpg")))
    assert {row["modality"] for row in tables["sensor"]} == {"camera", "radar", "lidar"} and len(tables["sensor"]) == 12
    assert len({row["token"] for rows in tables.values() for row in rows if rows is not tables["ego_pose"]}) == sum(
        len(rows) for name, rows in tables.items() if name != "ego_pose"
    )
    poses, samples = by_token(tables["ego_pose"]), by_token(tables["sample"])
    for row in tables["sample_data"]:
        assert (root / row["filename"]).is_file() and row["filename"].startswith(
            ("sweeps", "samples")[row["is_key_frame"]]
        )
        assert poses[row["ego_pose_token"]]["timestamp"] == row["timestamp"]
        if row["is_key_frame"]:
            assert abs(row["timestamp"] - samples[row["sample_token"]]["timestamp"]) < 40_000
        if row["fileformat"] == "jpg":
            with Image.open(root / row["filename"]) as image:
                assert image.size == (row["width"], row["height"]) == SIZE
    files = {path for path in root.rglob("*") if path.suffix in (".jpg", ".pcd", ".bin")}
    assert files == {root / row["filename"] for row in tables["sample_data"]}


def test_rows_are_linked_in_time(tables):
    for name in ("sample", "sample_data", "sample_annotation"):
        rows = by_token(tables[name])
        for token, row in rows.items():
            assert not row["next"] or rows[row["next"]]["prev"] == token
            assert not row["prev"] or rows[row["prev"]]["next"] == token
    data, calibrated = by_token(tables["sample_data"]), by_token(tables["calibrated_sensor"])
    radar = by_token(tables["sensor"])
    firsts = [row for row in tables["sample_data"] if not row["prev"]]
    assert len(firsts) == 12 * 2  # one chain a sensor and scene
    for row in firsts:
        steps, sensor = [], row["calibrated_sensor_token"]
        while row["next"]:
            steps.append(data[row["next"]]["timestamp"] - row["timestamp"])
            row = data[row["next"]]
            assert row["calibrated_sensor_token"] == sensor
        kind = radar[calibrated[sensor]["sensor_token"]]["modality"]
        wanted = {"radar": 1e6 / 13}.get(kind, 5e5)
        np.testing.assert_allclose(steps, wanted, atol=1)
    assert sum(row["nbr_annotations"] for row in tables["instance"]) == len(tables["sample_annotation"]) > 60


def test_same_arguments_same_bytes(root, tmp_path):
    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).digest()

    assert digest(drawn.draw_nuscenes(tmp_path / "a", images=IMAGES, seed=2, size=SIZE)) == digest(root)
    before = (root / drawn.MARK).stat().st_mtime_ns
    assert drawn.draw_nuscenes(root, images=IMAGES, seed=2, size=SIZE) == root
    assert (root / drawn.MARK).stat().st_mtime_ns == before
    with pytest.raises(DataError, match="seed 2, not 3"):
        drawn.draw_nuscenes(root, images=IMAGES, seed=3, size=SIZE)


def test_too_small(tmp_path, capsys):
    with pytest.raises(DataError, match=r"18 images: too few .* draw 24 or more"):
        drawn.draw_nuscenes(tmp_path / "a", images=23)
    drawn.main(["nuscenes", str(tmp_path / "b"), "--images", "25", "--size", "96x64"])
    assert "24 pictures, classes car truck bus trailer construction_vehicle pedestrian" in capsys.readouterr().out


@pytest.mark.parametrize(("keyframes", "lengths"), [(4, [2, 2]), (9, [5, 4]), (40, [4] * 10), (83, [5] * 3 + [4] * 17)])
def test_scene_lengths(keyframes, lengths):
    assert world_files.scene_lengths(keyframes) == lengths


def test_quaternions():
    for camera in world.CAMERAS.values():
        q = world_files.quaternion(camera.rotation)
        np.testing.assert_allclose(matrix(q), camera.rotation, atol=1e-9)
        assert np.linalg.det(camera.rotation) == pytest.approx(1)
    np.testing.assert_allclose(world.CAMERAS["CAM_FRONT"].rotation[:, 0], [0, -1, 0], atol=1e-9)  # right of forward
    np.testing.assert_allclose(matrix(world_files.about_z(0.3))[:2, :2], world.turned(0.3), atol=1e-12)


def test_radar_files(root, tables):
    paths = sorted(root.rglob("*.pcd"))
    assert len(paths) > 100
    for path in paths[::9]:
        content = path.read_bytes()
        header, _, body = content.partition(b"DATA binary\n")
        lines = dict(line.split(" ", 1) for line in header.decode().splitlines()[1:])
        count = int(lines["POINTS"])
        assert lines["FIELDS"].split() == list(world.RADAR_POINT.names) and int(lines["WIDTH"]) == count > 0
        assert [int(size) for size in lines["SIZE"].split()] == [
            world.RADAR_POINT[name].itemsize for name in world.RADAR_POINT.names
        ]
        assert len(content) == 4096 + 43 * count
        points = np.frombuffer(body, world.RADAR_POINT, count)
        assert np.isfinite(points["x"]).all() and (np.hypot(points["x"], points["y"]) < 101).all()


@pytest.mark.parametrize("name", list(world.CAMERAS))
def test_a_thing_is_painted_where_its_box_projects(name):
    camera = world.CAMERAS[name]
    reach, way = 14.0, np.radians(camera.turn + 6)
    scene = one_thing(0, s=reach * np.cos(way), d=-1.75 + reach * np.sin(way), turn=0.7)
    away = dataclasses.replace(scene, start=scene.start + [500, 0])
    with_it, without = (pixels(world_pictures.Painter(w, (800, 450)).paint(name, 0.0)[0]) for w in (scene, away))
    changed = np.abs(with_it - without).max(axis=2) > 8
    (xy, yaw, *_), (centre, facing, _) = scene.car(0.0), scene.things(0.0)
    width, length, height = scene.size[0]
    corners = np.stack(np.meshgrid([-length / 2, length / 2], [-width / 2, width / 2], [-height / 2, height / 2]), -1)
    corners = corners.reshape(-1, 3) @ matrix(world_files.about_z(facing[0])).T + centre[0]
    in_car = (corners - [*xy, 0]) @ matrix(world_files.about_z(yaw))
    seen = (in_car - camera.place) @ camera.rotation @ camera.intrinsic(800, 450).T
    x, y = (seen[:, :2] / seen[:, 2:]).T
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    slack = 0.1 * np.ptp(x)  # the roof is narrower than the box, the shadow wider
    np.testing.assert_allclose([columns[0], columns[-1]], [x.min(), x.max()], atol=slack)
    np.testing.assert_allclose(rows[-1], y.max(), atol=slack)
    np.testing.assert_allclose(rows[0], y.min(), atol=0.15 * np.ptp(y))


def test_every_class_looks_its_own_way_and_has_a_front():
    looks = []
    for label in range(len(world.CLASSES)):
        scenes = [one_thing(label, s=9.0, turn=turn, attribute="cycle.with_rider") for turn in (0.0, np.pi)]
        back, front = (pixels(world_pictures.Painter(w, SIZE).paint("CAM_FRONT", 0.0)[0]) for w in scenes)
        if label != world.CLASSES.index("traffic_cone"):
            assert (np.abs(back - front).max(axis=2) > 40).sum() > 8, world.CLASSES[label]
        looks.append(front)
    for a in range(len(looks)):
        for b in range(a):
            assert (np.abs(looks[a] - looks[b]).max(axis=2) > 40).sum() > 60, (a, b)


def test_the_picture_does_not_show_the_speed_and_the_radar_does():
    slow, fast = one_thing(0, rate=(2.0, 0.0)), one_thing(0, rate=(12.0, 0.0))
    a, b = (pixels(world_pictures.Painter(w, SIZE).paint("CAM_FRONT", 0.0)[0]) for w in (slow, fast))
    np.testing.assert_array_equal(a, b)
    for scene, speed in ((slow, 2.0), (fast, 12.0)):
        found = [own_returns(scene, "RADAR_FRONT", 0.0, seed) for seed in range(10)]
        speeds = np.concatenate([points["vx_comp"] for points in found])
        assert len(speeds) > 3 and abs(np.median(speeds) - speed) < 0.15


def own_returns(scene, name, time, seed, thing=0):
    """The good returns of one thing."""
    points, source = world.radar_returns(scene, name, time, np.random.default_rng(seed))
    return points[(source == thing) & (points["invalid_state"] == 0) & (points["ambig_state"] == 3)]


def sensor_pose(scene, radar, time):
    """Global place [2] and direction of a radar."""
    xy, yaw, *_ = scene.car(time)
    return xy + world.turned(yaw) @ np.array(radar.place[:2]), yaw + np.radians(radar.turn)


@pytest.mark.parametrize("name", list(world.RADARS))
def test_radar_returns_obey_physics(name):
    radar, time, checked = world.RADARS[name], 1.3, 0
    for scene in (world.build(5, index, 10) for index in (1, 2, 3)):
        for thing in range(len(scene.label)):
            points = np.concatenate([own_returns(scene, name, time, seed, thing) for seed in range(3)])
            check_returns(scene, radar, time, thing, points)
            checked += len(points)
    assert checked > 50


def check_returns(scene, radar, time, thing, points, step=1e-4):
    """Place, speed over ground and relative speed of returns of one thing, against the world around that moment."""
    centre, facing, velocity = (state[thing] for state in scene.things(time))
    (place, direction), still = sensor_pose(scene, radar, time), np.linalg.norm(velocity) < 0.2
    later, earlier = (sensor_pose(scene, radar, moment)[0] for moment in (time + step, time - step))
    measured = np.stack([points["x"], points["y"]], axis=1) @ world.turned(direction).T + place
    reach = np.linalg.norm(measured - place, axis=1, keepdims=True)
    local = (measured - centre[:2]) @ world.turned(facing)
    outside = np.maximum(np.abs(local) - scene.size[thing, 1::-1] / 2, 0)
    assert (np.linalg.norm(outside, axis=1) < GOOD + 0.015 * reach[:, 0]).all()
    ray = (measured - place) / reach
    own, relative = (
        np.stack([points["vx" + kind], points["vy" + kind]], axis=1) @ world.turned(direction).T
        for kind in ("_comp", "")
    )
    for vector in (own, relative):  # along the ray: a radar measures nothing else
        np.testing.assert_allclose(vector[:, 0] * ray[:, 1], vector[:, 1] * ray[:, 0], atol=1e-4)
    np.testing.assert_allclose((own * ray).sum(axis=1), ray @ velocity, atol=0.6)
    # the relative speed is the change of the distance between radar and thing, a moment before and after
    after, before = measured + velocity * step - later, measured - velocity * step - earlier
    change = (np.linalg.norm(after, axis=1) - np.linalg.norm(before, axis=1)) / (2 * step)
    np.testing.assert_allclose((relative * ray).sum(axis=1), change, atol=0.6)
    assert np.isin(points["dyn_prop"], (1, 3) if still else (0, 2, 6)).all()


def test_a_radar_in_a_curve_moves_sideways():
    scene = dataclasses.replace(one_thing(0, s=11.0, d=8.0), bend=0.02, ego=(0.0, -1.75, 10.0))
    step, (target, *_) = 1e-4, scene.things(0.0)
    points = np.concatenate([own_returns(scene, "RADAR_FRONT", 0.0, seed) for seed in range(60)])
    place, direction = sensor_pose(scene, world.RADARS["RADAR_FRONT"], 0.0)
    later, _ = sensor_pose(scene, world.RADARS["RADAR_FRONT"], step)
    measured = np.stack([points["x"], points["y"]], axis=1) @ world.turned(direction).T + place
    change = (np.linalg.norm(measured - later, axis=1) - np.linalg.norm(measured - place, axis=1)) / step
    relative = (points["vx"] * points["x"] + points["vy"] * points["y"]) / np.hypot(points["x"], points["y"])
    assert len(points) > 30 and np.linalg.norm(target[0, :2] - place) < 14
    assert abs(np.median(relative - change)) < 0.05


def test_things_move_as_their_velocity_says():
    scene = world.build(1, 2, 8)
    before, now, after = (scene.things(time)[0] for time in (0.999, 1.0, 1.001))
    velocity = scene.things(1.0)[2]
    np.testing.assert_allclose((after - before)[:, :2] / 0.002, velocity, atol=1e-3)
    moving = np.array([attribute.endswith(".moving") for attribute in scene.attribute])
    assert (np.linalg.norm(velocity[moving], axis=1) > 0.4).all() and moving.sum() > 5
    still = [attribute.rpartition(".")[2] in ("parked", "stopped", "standing", "") for attribute in scene.attribute]
    np.testing.assert_array_equal(velocity[still], 0)
    car, *_ = zip(*(scene.car(time) for time in (0.999, 1.001)), strict=True)
    assert np.linalg.norm(car[1] - car[0]) / 0.002 == pytest.approx(scene.car(1.0)[2], rel=1e-4)
    gaps = np.linalg.norm(now[:, None, :2] - now[:, :2], axis=-1) + 1e3 * np.eye(len(now))
    assert (gaps > (scene.size[:, :2].min(axis=1) / 2)[:, None]).all()


def test_annotations_agree_with_the_world(tables):
    instances, samples = by_token(tables["instance"]), by_token(tables["sample"])
    scene, rows = world.build(2, 0, 3), by_token(tables["sample_annotation"])
    first = tables["scene"][0]
    start, velocity_of = samples[first["first_sample_token"]]["timestamp"], scene.things(0.5)[2]
    compared = 0
    for row in rows.values():
        sample = samples[row["sample_token"]]
        if sample["scene_token"] != first["token"]:
            continue
        centre, facing, _ = scene.things((sample["timestamp"] - start) / 1e6)
        thing = int(np.linalg.norm(centre - row["translation"], axis=1).argmin())
        np.testing.assert_allclose(row["translation"], centre[thing], atol=1e-6)
        np.testing.assert_allclose(row["size"], scene.size[thing])
        np.testing.assert_allclose(matrix(row["rotation"])[:2, :2], world.turned(facing[thing]), atol=1e-9)
        names = by_token(tables["category"])[instances[row["instance_token"]]["category_token"]]["name"]
        assert names == scene.category[thing] and row["visibility_token"] in "1234" and row["num_lidar_pts"] > 0
        if row["next"] and row["prev"]:
            change = np.subtract(rows[row["next"]]["translation"], rows[row["prev"]]["translation"])[:2]
            np.testing.assert_allclose(change, velocity_of[thing], atol=0.05)
            compared += 1
    assert compared > 5
    assert sum(row["num_radar_pts"] > 0 for row in rows.values()) > 0.5 * len(rows)


def test_what_hides_what():
    bus, walker = one_thing(2, s=30.0, turn=np.pi / 2), one_thing(5, s=24.0)

    def both(distance):
        joined = {key: np.concatenate([getattr(bus, key), getattr(walker, key)]) for key in
                  ("label", "size", "start", "rate", "turn", "scatter")}  # fmt: skip
        joined["start"] = np.array([[30.0, -1.75], [distance, -1.75]])
        scene = dataclasses.replace(bus, attribute=["", ""], category=["", ""], **joined)
        return world_pictures.Painter(scene, SIZE).paint("CAM_FRONT", 0.0)[1:]

    seen, own = both(24.0)
    assert seen[1] == own[1] > 0 and 0 < seen[0] < own[0]
    seen, own = both(36.0)
    assert seen[1] == 0 < own[1] and seen[0] == own[0]


def test_painting_order_takes_long_things_by_their_sides():
    long = np.array([(30, 2), (-30, 2), (-30, 1), (30, 1)])  # its middle is nearer to the eye than the small one's
    small = np.array([(20.5, 0.8), (19.5, 0.8), (19.5, 0.2), (20.5, 0.2)])
    assert world_pictures.far_to_near(np.array([small, long]), np.array([0.0, 0.0])) == [1, 0]
    assert world_pictures.far_to_near(np.array([small, long]), np.array([0.0, 9.0])) == [0, 1]
    assert world_pictures.far_to_near(np.empty((0, 4, 2)), np.zeros(2)) == []


def test_devkit_scores_the_boxes_as_perfect(root, tables, tmp_path):
    pytest.importorskip("nuscenes")
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.utils.data_classes import RadarPointCloud

    nuscenes = NuScenes("v1.0-mini", str(root), verbose=False)
    attribute_of = {row["token"]: row["name"] for row in nuscenes.attribute}
    sample = nuscenes.sample[0]
    cloud, times = RadarPointCloud.from_file_multisweep(nuscenes, sample, "RADAR_FRONT", "CAM_FRONT", nsweeps=6)
    assert cloud.points.shape[1] > 50 and len(np.unique(times)) == 6
    for split, name in (("mini_train", "scene-0061"), ("mini_val", "scene-0103")):
        results = {}
        for row in nuscenes.sample:
            if nuscenes.get("scene", row["scene_token"])["name"] == name:
                results[row["token"]] = [
                    detection(nuscenes, token, attribute_of, category_to_detection_name) for token in row["anns"]
                ]
        meta = {"use_camera": True, "use_lidar": False, "use_radar": True, "use_map": False, "use_external": False}
        (tmp_path / "submission.json").write_text(json.dumps({"meta": meta, "results": results}))
        scorer = DetectionEval(
            nuscenes, config_factory("detection_cvpr_2019"), str(tmp_path / "submission.json"), split,
            str(tmp_path / split), verbose=False,
        )  # fmt: skip
        metrics = scorer.evaluate()[0].serialize()
        there = {box.detection_name for boxes in scorer.gt_boxes.boxes.values() for box in boxes}
        assert len(there) >= 6
        np.testing.assert_allclose([np.mean(list(metrics["label_aps"][name].values())) for name in there], 1, atol=1e-6)


def detection(nuscenes, token, attribute_of, name_of):
    """An annotation as a detection of the submission format."""
    row = nuscenes.get("sample_annotation", token)
    copied = {key: row[key] for key in ("sample_token", "translation", "size", "rotation")}
    attribute = attribute_of[row["attribute_tokens"][0]] if row["attribute_tokens"] else ""
    velocity = np.nan_to_num(nuscenes.box_velocity(token)[:2]).tolist()
    facts = {"detection_name": name_of(row["category_name"]), "detection_score": 0.9, "attribute_name": attribute}
    return copied | facts | {"velocity": velocity}


def test_every_scene_is_in_one_split(tmp_path):
    root = drawn.draw_nuscenes(tmp_path, images=12 * 4 * 6, seed=1, size=(96, 64))
    train, val = (set((root / "v1.0-mini" / f"{split}.txt").read_text().split()) for split in ("train", "val"))
    scenes = {row["name"] for row in json.loads((root / "v1.0-mini" / "scene.json").read_text())}
    assert train | val == scenes and not train & val and len(scenes) == 12 and val > {"scene-0103", "scene-0916"}
    assert len(nuscenes_radar.load(root, "v1.0-mini", "val", sweeps=0)) == 3 * 4 * 6
