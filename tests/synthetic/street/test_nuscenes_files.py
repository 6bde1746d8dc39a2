"""Street scenes in nuScenes' layout: tables, images and radar files that agree with each other and with the scenes."""

import json

import numpy as np
import pytest
from PIL import Image

import synthetic
from data import nuscenes
from data.nuscenes.dataset import rotation_matrix
from synthetic.street import nuscenes_files, simulation
from tests.synthetic.street.helpers import SIZE, build_scene
from tests.synthetic.test_synthetic import digest
from utils.errors import DataError

IMAGES = 36  # two scenes of three key frames


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synthetic.draw_nuscenes(tmp_path_factory.mktemp("drawn") / "nuscenes", images=IMAGES + 5, seed=2, size=SIZE)


@pytest.fixture(scope="module")
def tables(root):
    return {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-mini").glob("*.json")}


def by_token(rows):
    return {row["token"]: row for row in rows}


def test_layout(root, tables):
    assert set(tables) == set(nuscenes_files.TABLES) and len(tables) == 13
    assert [scene["name"] for scene in tables["scene"]] == ["scene-0061", "scene-0103"]
    assert len(tables["sample"]) * 6 == IMAGES == len(list(root.rglob("*.jpg")))
    assert {row["modality"] for row in tables["sensor"]} == {"camera", "radar", "lidar"} and len(tables["sensor"]) == 12
    tokens = [row["token"] for name, rows in tables.items() if name != "ego_pose" for row in rows]
    assert len(set(tokens)) == len(tokens)
    poses, samples = by_token(tables["ego_pose"]), by_token(tables["sample"])
    for row in tables["sample_data"]:
        folder = "samples" if row["is_key_frame"] else "sweeps"
        assert (root / row["filename"]).is_file() and row["filename"].startswith(folder)
        assert poses[row["ego_pose_token"]]["timestamp"] == row["timestamp"]
        if row["is_key_frame"]:
            assert abs(row["timestamp"] - samples[row["sample_token"]]["timestamp"]) < 40_000
        if row["fileformat"] == "jpg":
            with Image.open(root / row["filename"]) as image:
                assert image.size == (row["width"], row["height"]) == SIZE
    files = {path for path in root.rglob("*") if path.suffix in (".jpg", ".pcd", ".bin")}
    assert files == {root / row["filename"] for row in tables["sample_data"]}


def test_rows_are_linked_in_order_of_time(tables):
    for name in ("sample", "sample_data", "sample_annotation"):
        rows = by_token(tables[name])
        for token, row in rows.items():
            assert not row["next"] or rows[row["next"]]["prev"] == token
            assert not row["prev"] or rows[row["prev"]]["next"] == token
    rows, calibrated = by_token(tables["sample_data"]), by_token(tables["calibrated_sensor"])
    sensors = by_token(tables["sensor"])
    first_rows = [row for row in tables["sample_data"] if not row["prev"]]
    assert len(first_rows) == 12 * 2  # one chain per sensor and scene
    for row in first_rows:
        periods, sensor = [], row["calibrated_sensor_token"]
        while row["next"]:
            periods.append(rows[row["next"]]["timestamp"] - row["timestamp"])
            row = rows[row["next"]]
            assert row["calibrated_sensor_token"] == sensor
        modality = sensors[calibrated[sensor]["sensor_token"]]["modality"]
        np.testing.assert_allclose(periods, 1e6 / 13 if modality == "radar" else 5e5, atol=1)
    assert sum(row["nbr_annotations"] for row in tables["instance"]) == len(tables["sample_annotation"]) > 60


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    assert digest(synthetic.draw_nuscenes(tmp_path / "a", images=IMAGES, seed=2, size=SIZE)) == digest(root)
    before = (root / synthetic.MARK).stat().st_mtime_ns
    assert synthetic.draw_nuscenes(root, images=IMAGES, seed=2, size=SIZE) == root
    assert (root / synthetic.MARK).stat().st_mtime_ns == before
    with pytest.raises(DataError, match="seed 2, not 3"):
        synthetic.draw_nuscenes(root, images=IMAGES, seed=3, size=SIZE)


@pytest.mark.parametrize(("count", "lengths"), [(4, [2, 2]), (9, [5, 4]), (40, [4] * 10), (83, [5] * 3 + [4] * 17)])
def test_scene_lengths(count, lengths):
    assert nuscenes_files.scene_lengths(count) == lengths


@pytest.mark.slow
def test_every_scene_is_in_one_split(tmp_path, monkeypatch):
    def render_nothing(self, name, time):
        zeros = np.zeros(len(self.scene.labels), np.int64)
        return Image.new("RGB", self.size), zeros, zeros

    monkeypatch.setattr(nuscenes_files, "SCENE_LENGTH", 2)
    monkeypatch.setattr(nuscenes_files.Renderer, "render", render_nothing)
    root = synthetic.draw_nuscenes(tmp_path, images=12 * 2 * 6, seed=1, size=(64, 64))
    train, val = (set((root / "v1.0-mini" / f"{split}.txt").read_text().split()) for split in ("train", "val"))
    scenes = {row["name"] for row in json.loads((root / "v1.0-mini" / "scene.json").read_text())}
    assert train | val == scenes and not train & val and len(scenes) == 12 and val > {"scene-0103", "scene-0916"}
    assert len(nuscenes.load_split(root, "v1.0-mini", "val", nuscenes.RadarOptions(0))) == 3 * 2 * 6


def test_quaternions():
    for camera in simulation.CAMERAS.values():
        q = np.array(nuscenes_files.quaternion(camera.rotation))
        np.testing.assert_allclose(rotation_matrix(q), camera.rotation, atol=1e-9)
        assert np.linalg.det(camera.rotation) == pytest.approx(1)
    right = simulation.CAMERAS["CAM_FRONT"].rotation[:, 0]
    np.testing.assert_allclose(right, [0, -1, 0], atol=1e-9)
    q = np.array(nuscenes_files.yaw_quaternion(0.3))
    np.testing.assert_allclose(rotation_matrix(q)[:2, :2], simulation.rotation_2d(0.3), atol=1e-12)


def test_radar_files(root):
    paths, dtype = sorted(root.rglob("*.pcd")), simulation.RADAR_POINT
    assert len(paths) > 100 and dtype.itemsize == 43
    for path in paths[::9]:
        content = path.read_bytes()
        header, _, body = content.partition(b"DATA binary\n")
        lines = dict(line.split(" ", 1) for line in header.decode().splitlines()[1:])
        count = int(lines["POINTS"])
        assert lines["FIELDS"].split() == list(dtype.names) and int(lines["WIDTH"]) == count > 0
        assert lines["SIZE"] == "4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1"
        assert lines["TYPE"] == "F F F I I F F F F F I I I I I I I I"
        assert len(content) == 4096 + 43 * count
        points = np.frombuffer(body, dtype, count)
        assert np.isfinite(points["x"]).all() and (np.hypot(points["x"], points["y"]) < 101).all()


def test_annotations_agree_with_the_scene(tables):
    instances, samples = by_token(tables["instance"]), by_token(tables["sample"])
    categories, rows = by_token(tables["category"]), by_token(tables["sample_annotation"])
    scene, first = build_scene(2, 0, 3), tables["scene"][0]
    start, velocities = samples[first["first_sample_token"]]["timestamp"], scene.objects(0.5)[2]
    compared = 0
    for row in rows.values():
        sample = samples[row["sample_token"]]
        if sample["scene_token"] != first["token"]:
            continue
        centers, yaws, _ = scene.objects((sample["timestamp"] - start) / 1e6)
        index = int(np.linalg.norm(centers - row["translation"], axis=1).argmin())
        np.testing.assert_allclose(row["translation"], centers[index], atol=1e-6)
        np.testing.assert_allclose(row["size"], scene.sizes[index])
        rotation = rotation_matrix(np.array(row["rotation"]))
        np.testing.assert_allclose(rotation[:2, :2], simulation.rotation_2d(yaws[index]), atol=1e-9)
        assert categories[instances[row["instance_token"]]["category_token"]]["name"] == scene.categories[index]
        assert row["visibility_token"] in "1234" and row["num_lidar_pts"] > 0
        if row["next"] and row["prev"]:
            change = np.subtract(rows[row["next"]]["translation"], rows[row["prev"]]["translation"])[:2]
            np.testing.assert_allclose(change, velocities[index], atol=0.05)
            compared += 1
    assert compared > 5
    assert sum(row["num_radar_pts"] > 0 for row in rows.values()) > 0.5 * len(rows)


def test_devkit_scores_the_annotations_as_perfect(root, tmp_path):
    pytest.importorskip("nuscenes")
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.utils.data_classes import RadarPointCloud

    devkit, config = NuScenes("v1.0-mini", str(root), verbose=False), config_factory("detection_cvpr_2019")
    cloud, times = RadarPointCloud.from_file_multisweep(devkit, devkit.sample[0], "RADAR_FRONT", "CAM_FRONT", nsweeps=6)
    assert cloud.points.shape[1] > 50 and len(np.unique(times)) == 6
    for split, name in (("mini_train", "scene-0061"), ("mini_val", "scene-0103")):
        samples = [row for row in devkit.sample if devkit.get("scene", row["scene_token"])["name"] == name]
        results = {row["token"]: [as_detection(devkit, token) for token in row["anns"]] for row in samples}
        meta = {"use_camera": True, "use_lidar": False, "use_radar": True, "use_map": False, "use_external": False}
        submission = tmp_path / f"{split}.json"
        submission.write_text(json.dumps({"meta": meta, "results": results}))
        scorer = DetectionEval(devkit, config, str(submission), split, str(tmp_path / split), verbose=False)
        metrics = scorer.evaluate()[0].serialize()
        names = {box.detection_name for boxes in scorer.gt_boxes.boxes.values() for box in boxes}
        assert len(names) >= 6
        np.testing.assert_allclose([np.mean(list(metrics["label_aps"][name].values())) for name in names], 1, atol=1e-6)


def as_detection(devkit, token):
    """An annotation as a detection of the submission format."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    row = devkit.get("sample_annotation", token)
    attributes = [devkit.get("attribute", attribute)["name"] for attribute in row["attribute_tokens"]]
    return {
        **{name: row[name] for name in ("sample_token", "translation", "size", "rotation")},
        "detection_name": category_to_detection_name(row["category_name"]),
        "detection_score": 0.9,
        "attribute_name": attributes[0] if attributes else "",
        "velocity": np.nan_to_num(devkit.box_velocity(token)[:2]).tolist(),
    }
