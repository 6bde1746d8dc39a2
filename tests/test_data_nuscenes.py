"""nuScenes read from its tables: against hand-made geometry, nuscenes-devkit, one real key frame and broken copies."""

import os
import pickle
import shutil
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from PIL import Image

from data import PER_OBJECT, check, check_target, nuscenes_radar, tables
from data.errors import DataError
from data.nuscenes_radar import SEEN_BY, rotation_matrix
from data.tables import CAMERAS, CLASSES, RADARS
from ops.geometry import apply_affine, corners, project
from tests.small_world import CATEGORIES, LOOKS, SIZE, World, times, turn
from tests.test_data_pcd import POINT, content


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture(scope="module")
def dataset(world):
    return nuscenes_radar.load(world.root, "v1.0-mini", "mini_train")


def check_3d(target):
    """Raise AssertionError where the 3D fields break their contract."""
    count = len(target["boxes"])
    shapes = {"center": (count, 3), "dims": (count, 3), "yaw": (count,), "alpha": (count,), "velocity": (count, 3)}
    shapes |= {"amodal": (count, 2), "calib": (3, 4), "affine": (2, 3), "radar": (len(target["radar"]), 5)}
    for name, shape in shapes.items():
        assert target[name].dtype == torch.float32 and target[name].shape == shape, name
    for name in ("attribute", "visibility"):
        assert target[name].dtype == torch.int64 and target[name].shape == (count,), name
    assert target["rotation"].dtype == target["translation"].dtype == torch.float64
    assert ((target["attribute"] >= -1) & (target["attribute"] < 8)).all()
    assert ((target["visibility"] >= 0) & (target["visibility"] <= 4)).all()
    pixels, depth = project(target["center"], target["calib"])
    assert (depth > 0).all() and (target["radar"][:, 2] > 0).all() and (target["radar"][:, 2] <= 60).all()
    torch.testing.assert_close(apply_affine(pixels, target["affine"]), target["amodal"], rtol=1e-4, atol=1e-2)


def test_every_picture_meets_the_contract(dataset):
    assert len(dataset) == 3 * 6 and dataset.classes == list(CLASSES)
    seen = set()
    for index in range(len(dataset)):
        image, target = dataset[index]
        check_target(image, target, 10)
        check_3d(target)
        assert image.shape == (3, *SIZE) and target["size"] == SIZE and target["image_id"] == index
        fields = [name for name in PER_OBJECT if name != "masks"]
        assert all(len(target[name]) == len(target["boxes"]) for name in fields)
        seen.add((target["sample_token"], target["camera"]))
    assert seen == {(f"scene-0061 {count}", camera) for count in range(3) for camera in CAMERAS}


def test_fields_come_from_the_object_they_belong_to(world, dataset):
    """Each object is found again by its global centre, and every field compared with the record."""
    records, checked = world.tables["sample_annotation"], 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        places = target["center"].double() @ target["rotation"].T + target["translation"]
        for row, place in enumerate(places):
            mine = [r for r in records if r["sample_token"] == target["sample_token"]]
            record = min(mine, key=lambda r: np.abs(np.array(r["translation"]) - place.numpy()).max())
            np.testing.assert_allclose(place.numpy(), record["translation"], atol=1e-4)
            category = CATEGORIES.index(record["instance_token"].split(" ")[1])
            assert CLASSES[target["labels"][row]] == tables.CLASS_OF[CATEGORIES[category]]
            assert target["visibility"][row] == 1 + category % 4
            assert target["attribute"][row] == (category % 8 if category % 3 else -1)
            assert bool(target["ignore"][row]) == (category % 3 == 0)
            width, length, height = record["size"]
            np.testing.assert_allclose(target["dims"][row].numpy(), [height, width, length], rtol=1e-6)
            steady = target["rotation"] @ target["velocity"][row].double()  # back in the global frame
            np.testing.assert_allclose(steady.numpy(), [4, 2 * (category - 6), 0.2], atol=1e-4)
            checked += 1
    assert checked > 20


def test_boxes_hold_the_corners_of_a_level_world(tmp_path):
    """With a level vehicle and camera, yaw alone says how an object stands."""
    level = World(tmp_path, scenes=("scene-0061",))
    for record in level.tables["ego_pose"]:
        record["rotation"] = turn(25).tolist()
    for record in level.tables["calibrated_sensor"]:
        channel = record["token"][2:]
        if channel in CAMERAS:
            axes = times(turn(-90, (0, 0, 1)), turn(-90, (1, 0, 0)))
            record["rotation"] = times(turn(LOOKS[channel]), axes).tolist()
    level.write()
    dataset, count = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train"), 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        pixels, _ = project(corners(target["center"], target["dims"], target["yaw"]), target["calib"])
        expected = torch.cat([pixels.amin(1), pixels.amax(1)], dim=1)
        edge = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=torch.float32)
        torch.testing.assert_close(
            torch.Tensor(target["boxes"]), expected.clamp(min=0).minimum(edge), rtol=0, atol=0.02
        )
        count += len(expected)
    assert count > 10


def test_an_object_before_the_front_camera(tmp_path):
    """By hand: ego at the origin, camera at (1.5, 0.1, 1.5) looking ahead, a car 20 m further, 2 m to the left."""
    world = World(tmp_path, scenes=("scene-0061",), frames=1)
    for record in world.tables["ego_pose"]:
        record |= {"rotation": [1, 0, 0, 0], "translation": [0, 0, 0]}
    axes = times(turn(-90, (0, 0, 1)), turn(-90, (1, 0, 0))).tolist()
    world.tables["calibrated_sensor"][0] |= {"rotation": axes, "translation": [1.5, 0.1, 1.5]}
    car = world.tables["sample_annotation"][0]
    car |= {"translation": [21.5, 2.1, 0.5], "size": [2, 4, 1], "rotation": turn(30).tolist()}
    world.tables["sample_annotation"] = [car]
    world.write()
    target = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train", cameras=1).annotation(0)
    torch.testing.assert_close(target["center"], torch.tensor([[-2.0, 1, 20]]))
    torch.testing.assert_close(target["yaw"], torch.tensor([np.radians(-90 - 30)], dtype=torch.float32))
    torch.testing.assert_close(target["alpha"], target["yaw"] + float(np.arctan2(2, 20)))
    torch.testing.assert_close(target["amodal"], torch.tensor([[81.5 - 12.6, 49 + 6.3]]))
    assert target["velocity"].isnan().all() and target["labels"].tolist() == [0]


def test_radar_points_stay_on_one_place_in_the_world(tmp_path):
    """A standing object, seen by every sweep from where the vehicle then is, falls on one point of the camera."""
    world = World(tmp_path, scenes=("scene-0061",))
    place, motion = np.array([425.0, 1115, 1.5]), np.array([3.0, -2, 0])
    for frame in world.tables["sample_data"]:
        channel = frame["filename"].split("/")[1]
        if channel not in RADARS:
            continue
        pose = next(p for p in world.tables["ego_pose"] if p["token"] == frame["ego_pose_token"])
        sensor = next(c for c in world.tables["calibrated_sensor"] if c["token"] == f"k {channel}")
        vehicle, own = (rotation_matrix(np.array(record["rotation"])) for record in (pose, sensor))
        point, local = np.array(POINT), vehicle.T @ (place - pose["translation"]) - sensor["translation"]
        point[:3], point[8:10] = own.T @ local, (own.T @ vehicle.T @ motion)[:2]
        (tmp_path / frame["filename"]).write_bytes(content([point]))
    dataset, count = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train", sweeps=6), 0
    for index in range(len(dataset)):
        _, target = dataset.load(index)
        expected = (place - target["translation"].numpy()) @ target["rotation"].numpy()
        speed = motion @ target["rotation"].numpy()
        for found in target["radar"].numpy():
            np.testing.assert_allclose(found[:3], expected, atol=1e-4)
            np.testing.assert_allclose(
                found[3:], speed[[0, 2]], atol=0.5
            )  # the part along the tilted z is not measured
            count += 1
    assert count > 20


@pytest.mark.parametrize(("sweeps", "files"), [(0, 0), (1, 1), (3, 3), (6, 6)])
def test_number_of_sweeps(world, sweeps, files):
    dataset = nuscenes_radar.load(world.root, "v1.0-mini", "mini_train", sweeps=sweeps)
    assert dataset.sweeps.shape == (6, 5, sweeps)
    newest = dataset.sweeps[2]  # the third key frame has eight files before it
    assert (newest >= 0).sum() == 5 * files
    for back in range(sweeps):
        names = [dataset.tables.frame_paths[frame] for frame in newest[:, back]]
        assert all(name.endswith(f"_{8 - back}.pcd") and radar in name for name, radar in zip(names, RADARS))


def test_each_camera_reads_its_own_radars(dataset, monkeypatch):
    read = []
    monkeypatch.setattr(dataset, "sweep", lambda frame, *_: read.append(dataset.path(frame)) or np.zeros((0, 5)))
    for index in range(6):
        read.clear()
        assert dataset.radar(index).shape == (0, 5)
        camera = dataset.annotation(index)["camera"]
        assert {path.split("/")[-2] for path in read} == set(SEEN_BY[camera]) and len(read) == 3 * len(SEEN_BY[camera])


def test_depth_limit_and_lift(world):
    whole = nuscenes_radar.load(world.root, "v1.0-mini", "mini_train", max_distance=60.0)
    near = nuscenes_radar.load(world.root, "v1.0-mini", "mini_train", max_distance=20.0, z_offset=0.5)
    points = whole.radar(0)
    expected = points[points[:, 2] <= 20] - torch.tensor([0, 0.5, 0, 0, 0])
    assert 0 < len(expected) < len(points)
    torch.testing.assert_close(near.radar(0), expected)


# ---- the devkit


def test_boxes_are_the_devkits(world, dataset):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.geometry_utils import BoxVisibility

    nusc, count = devkit.NuScenes("v1.0-mini", str(world.root), verbose=False), 0
    for index in range(len(dataset)):
        target = dataset.annotation(index)
        token = nusc.get("sample", target["sample_token"])["data"][target["camera"]]
        _, boxes, intrinsic = nusc.get_sample_data(token, box_vis_level=BoxVisibility.ANY)
        boxes = [box for box in boxes if box.name in tables.CLASS_OF]
        assert len(boxes) == len(target["center"])
        np.testing.assert_allclose(target["calib"][:, :3], intrinsic, rtol=1e-6)
        for row, box in enumerate(boxes):
            np.testing.assert_allclose(target["center"][row], box.center, atol=1e-4)
            heading = box.rotation_matrix[:, 0]
            assert abs(float(target["yaw"][row]) + np.arctan2(heading[2], heading[0])) < 1e-4
            pixels = intrinsic @ box.corners()
            pixels = (pixels[:2] / pixels[2]).clip(0, np.array(SIZE[::-1])[:, None])
            np.testing.assert_allclose(target["boxes"][row], [*pixels.min(1), *pixels.max(1)], atol=1e-3)
            velocity = target["rotation"].numpy().T @ nusc.box_velocity(box.token)
            np.testing.assert_allclose(target["velocity"][row], velocity, atol=1e-4)
            count += 1
    assert count > 20


def test_radar_is_the_devkits(world, dataset):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.data_classes import RadarPointCloud

    nusc, count = devkit.NuScenes("v1.0-mini", str(world.root), verbose=False), 0
    for index in range(len(dataset)):
        _, target = dataset.load(index)
        sample, parts = nusc.get("sample", target["sample_token"]), []
        for name in SEEN_BY[target["camera"]]:
            cloud, lags = RadarPointCloud.from_file_multisweep(nusc, sample, name, target["camera"], nsweeps=3)
            frame, speeds = nusc.get("sample_data", sample["data"][name]), []
            for lag in dict.fromkeys(lags[0]):
                pose = nusc.get("ego_pose", frame["ego_pose_token"])
                sensor = nusc.get("calibrated_sensor", frame["calibrated_sensor_token"])
                turned = rotation_matrix(np.array(pose["rotation"])) @ rotation_matrix(np.array(sensor["rotation"]))
                own = cloud.points[8:10, lags[0] == lag]
                speeds.append(target["rotation"].numpy().T @ turned @ np.concatenate([own, np.zeros_like(own[:1])]))
                frame = nusc.get("sample_data", frame["prev"]) if frame["prev"] else None
            parts.append(np.concatenate([cloud.points[:3], np.concatenate(speeds, axis=1)[[0, 2]]]).T)
        expected = np.concatenate(parts)
        expected = expected[(expected[:, 2] > 0) & (expected[:, 2] <= 60)]
        np.testing.assert_allclose(target["radar"], expected, atol=1e-4)
        count += len(expected)
    assert count > 200


# ---- one real key frame


def test_the_real_key_frame(shared, tmp_path):
    root = shared / "data" / "nuscenes_one_sample"
    dataset = nuscenes_radar.load(root, "v1.0-mini", "mini_train", cache=tmp_path)
    assert len(dataset) == 6 and "nothing of RADAR_FRONT_LEFT, RADAR_FRONT_RIGHT" in dataset.summary()
    shown, radar = 0, 0
    for index in range(6):
        image, target = dataset[index]
        check_target(image, target, 10)
        check_3d(target)
        assert image.shape == (3, 900, 1600) and target["velocity"].isnan().all()
        assert (target["attribute"] == -1).all() and (target["visibility"] == 0).all()
        shown, radar = shown + len(target["boxes"]), radar + (len(target["radar"]) > 0)
        center = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
        whole = ((target["boxes"][:, :2] > 0) & (target["boxes"][:, 2:] < torch.tensor([1600.0, 900]))).all(1)
        assert (
            (center - target["amodal"])[whole].abs() < 0.2 * (target["boxes"][:, 2:] - target["boxes"][:, :2])[whole]
        ).all()
    assert shown > 68 and radar == 3  # some stand in two pictures
    front = dataset.load(0)[1]
    distance = torch.cdist(front["radar"][:, [0, 2]], front["center"][:, [0, 2]]).amin(1)
    assert (distance < 3).sum() > 3  # returns of what was annotated


# ---- splits and parts


def test_splits(world, tmp_path):
    validation = nuscenes_radar.load(world.root, "v1.0-mini", "mini_val", cameras=("CAM_BACK",))
    assert {validation.annotation(i)["sample_token"][:10] for i in range(len(validation))} == {"scene-0103"}
    assert len(validation) == 3 and validation.annotation(0)["camera"] == "CAM_BACK"
    mine = tmp_path / "mine.txt"
    mine.write_text("scene-0103\n\nscene-0061\n")
    assert len(nuscenes_radar.load(world.root, "v1.0-mini", str(mine), cameras=2)) == 12
    mine.write_text("scene-9999\n")
    with pytest.raises(DataError, match=r"no scene of the split .*; it has scene-0061, scene-0103"):
        nuscenes_radar.load(world.root, "v1.0-mini", str(mine))


def test_splits_of_the_devkit(monkeypatch, tmp_path):
    for found in (None, ModuleSpec("nuscenes", None, is_package=True)):  # the latter: a folder of that name
        monkeypatch.setattr(nuscenes_radar.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(DataError, match=r"split val: .*install nuscenes-devkit, or write .*val\.txt"):
            nuscenes_radar.scenes_of("val", tmp_path)
    (tmp_path / "val.txt").write_text("scene-0003\n")
    assert nuscenes_radar.scenes_of("val", tmp_path) == ["scene-0003"]
    monkeypatch.undo()
    pytest.importorskip("nuscenes")
    assert len(nuscenes_radar.scenes_of("train", tmp_path / "none")) == 700
    for name, scenes in nuscenes_radar.SPLITS.items():
        from nuscenes.utils import splits

        assert sorted(scenes) == sorted(getattr(splits, name))
    with pytest.raises(DataError, match="no such split"):
        nuscenes_radar.scenes_of("night", tmp_path)


def test_missing_files_are_listed_once_and_skipped(tmp_path):
    World(tmp_path, scenes=("scene-0061",))
    whole = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train")
    gone = [whole.frames[1], whole.sweeps[2, 0, 1]]
    for frame in gone:
        os.remove(whole.path(frame))
    shutil.rmtree(tmp_path / "samples" / "RADAR_BACK_LEFT")
    with pytest.raises(DataError, match=r"lacks 1 pictures and 4 radar sweeps: .* and 2 more; --skip-missing"):
        nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train")
    said = []
    less = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train", skip_missing=True, say=said.append)
    assert len(said) == 1 and "(skipped)" in said[0]
    assert len(less) == 17 and whole.frames[1] not in less.frames
    assert (less.sweeps >= 0).sum() == (whole.sweeps >= 0).sum() - 4
    for index in range(len(less)):
        check_3d(less[index][1])
    shutil.rmtree(tmp_path / "samples")
    with pytest.raises(DataError, match="no picture left"):
        nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train", skip_missing=True, say=said.append)


def test_a_radar_that_the_tables_lack(tmp_path):
    world = World(tmp_path, scenes=("scene-0061",))
    world.tables["sample_data"] = [r for r in world.tables["sample_data"] if "RADAR_BACK" not in r["filename"]]
    world.write()
    dataset = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train")
    assert "nothing of RADAR_BACK_LEFT, RADAR_BACK_RIGHT" in dataset.summary()
    sizes = {dataset.annotation(i)["camera"]: len(dataset.radar(i)) for i in range(6)}
    assert sizes["CAM_BACK"] == 0 and sizes["CAM_FRONT"] > 0


def test_a_picture_of_another_size_is_named(tmp_path):
    World(tmp_path, scenes=("scene-0061",), frames=1)
    dataset = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train")
    Image.new("RGB", (80, 45)).save(dataset.path(dataset.frames[0]))
    with pytest.raises(DataError, match="the tables say 160 x 90, the file 80 x 45"):
        dataset[0]


def test_every_bad_file_of_a_picture_is_listed(tmp_path):
    World(tmp_path, scenes=("scene-0061",))
    dataset = nuscenes_radar.load(tmp_path, "v1.0-mini", "mini_train")
    bad = [dataset.path(frame) for frame in (dataset.frames[6], *dataset.sweeps[1, 0, :2])]  # CAM_FRONT's, of one radar
    for path in bad:
        with open(path, "wb") as file:
            file.write(b"broken")
    found = check.unreadable(dataset, 0, progress=False)
    assert [fault.path for fault in found[6]] == bad
    assert {fault.path for faults in found.values() for fault in faults} == set(bad)
    assert dataset.paths[6] == bad[0]


def test_pictures_that_show_nothing_are_counted(dataset, monkeypatch):
    monkeypatch.setattr(nuscenes_radar, "CHUNK", 5)
    shown = [len(dataset.annotation(index)["boxes"]) for index in range(len(dataset))]
    assert dataset.shown().tolist() == shown and len(set(shown)) > 1
    tokens = dataset.tables.annotation_center
    monkeypatch.setattr(dataset.tables, "annotation_center", tokens + [0, 0, 1e4])
    assert "images 18, background 18 (100 %), key" in dataset.summary()


def test_boxes_that_nothing_has_are_faults(tmp_path):
    world = World(tmp_path)
    world.tables["sample_annotation"][0]["size"] = [0, 1, 1]
    world.write()
    train, val = (nuscenes_radar.load(tmp_path, "v1.0-mini", split) for split in ("mini_train", "mini_val"))
    (fault,) = train.faults()
    assert str(fault) == f"{tmp_path}/v1.0-mini/sample_annotation.json: record 1: no box: its size 0, 1, 1"
    assert fault.kind == "box" and val.faults() == [] and "impossible boxes 1" in train.summary()


def test_without_and_counts(dataset):
    less = dataset.without([0, 3])
    assert len(less) == 16 and len(dataset) == 18 and dataset.frames[0] not in less.frames
    assert less.annotation(0)["camera"] == CAMERAS[1]
    counts = dataset.class_counts()
    assert counts.shape == (10,) and counts[CLASSES.index("car")] == 0  # hit by no point
    # per category, in three key frames or the last two; every third category is hit by no point
    expected = sum(3 - count % 2 for count in range(len(CATEGORIES) - 1) if count % 3)
    assert (
        counts.sum() == expected
        and f"images 18, background 0 (0 %), key frames 3, radar sweeps {(dataset.sweeps[:3] >= 0).sum()}"
        in dataset.summary()
    )


def test_workers_can_be_spawned(dataset):
    twin = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(twin.radar(0), dataset.radar(0))
    arrays = [value for value in vars(dataset.tables).values() if isinstance(value, np.ndarray)]
    assert len(arrays) > 20 and all(value.dtype != object for value in arrays)
