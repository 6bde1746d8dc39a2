"""From detections to the submission file to the official score, on a small scene with its tables written here."""

import importlib.util
import json
import math
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from evaluation import nuscenes, nuscenes_devkit
from evaluation.nuscenes import MEASURES, NuScenesEvaluator, Score
from utils.nuscenes import ATTRIBUTE_GROUPS, ATTRIBUTES, CLASSES, GROUP_OF_CLASS

CAMERAS = [f"CAM_{side}" for side in ("FRONT", "FRONT_LEFT", "BACK_LEFT", "BACK", "BACK_RIGHT", "FRONT_RIGHT")]
CATEGORIES = ["vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.trailer", "vehicle.construction"]
CATEGORIES += ["human.pedestrian.adult", "vehicle.motorcycle", "vehicle.bicycle", "movable_object.trafficcone"]
CATEGORIES += ["movable_object.barrier", "static_object.bicycle_rack"]
CAMERA_AXES = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # right, down, forward of the front camera


def rotation_about_z(yaw):
    """[3,3], about the vertical axis."""
    return np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])


def quaternion(yaw):
    """The same rotation as w, x, y, z."""
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


class Scene:
    """A scene of the split mini_val: `count` samples half a second apart, three objects of each class, which move along
    their heading; the vehicle drives. One bicycle is in a rack, where the official score does not count it."""

    def __init__(self, count=4, seed=0):
        random = np.random.default_rng(seed)
        self.samples = [f"sample{i}" for i in range(count)]
        self.objects = []
        for label, group in enumerate(GROUP_OF_CLASS):
            attributes = [index for index, other in enumerate(ATTRIBUTE_GROUPS) if other == group]
            for k in range(3):
                distance = 8 + 6 * k + label / 3
                angle = math.radians(60 * random.integers(6) + 24 * random.random() - 12)
                speed = random.uniform(-1, 1) if attributes else 0.0
                start = [500 + distance * math.cos(angle), 900 + distance * math.sin(angle), random.uniform(0, 3)]
                item = {"label": label, "start": np.array(start), "size": random.uniform(0.5, 3, 3), "speed": speed}
                item["yaw"] = random.uniform(-3, 3)
                item["attribute"] = int(random.choice(attributes)) if attributes else -1
                self.objects.append(item)

    def rack(self):
        bicycle = next(item for item in self.objects if item["label"] == CLASSES.index("bicycle"))
        return bicycle | {"label": len(CLASSES), "attribute": -1, "size": bicycle["size"] + 1}

    def ego(self, time):
        return np.array([500 + 0.5 * time, 900.0, 0.0])

    def center(self, item, time):
        return item["start"] + item["speed"] * time * rotation_about_z(item["yaw"])[:, 0]

    def targets(self):
        """The target of each camera of each sample: objects within 30 degrees of its axis."""
        targets = []
        for i, token in enumerate(self.samples):
            for k, camera in enumerate(CAMERAS):
                rotation = rotation_about_z(math.radians(60 * k)) @ CAMERA_AXES
                translation = self.ego(i / 2) + np.array([0, 0, 1.5])
                target = self.objects_seen(i / 2, rotation, translation)
                target |= {"image_id": len(targets), "sample_token": token, "camera": camera}
                targets.append(target | {"rotation": rotation, "translation": translation})
        return targets

    def objects_seen(self, time, rotation, translation):
        rows = []
        for item in self.objects:
            center = (self.center(item, time) - translation) @ rotation
            if abs(math.atan2(center[0], center[2])) <= math.radians(30):
                heading = rotation_about_z(item["yaw"])[:, 0] @ rotation
                width, length, height = item["size"]
                yaw, velocity = math.atan2(-heading[2], heading[0]), item["speed"] * heading
                rows.append((center, (height, width, length), yaw, velocity, item["label"], item["attribute"]))
        names = ("center", "dims", "yaw", "velocity", "labels", "attribute")
        columns = dict(zip(names, zip(*rows))) if rows else dict.fromkeys(names, ())
        target = {name: torch.tensor(np.array(columns[name]), dtype=torch.float32) for name in names}
        target |= {name: target[name].view(-1, 3) for name in ("center", "dims", "velocity")}
        target |= {name: target[name].long() for name in ("labels", "attribute")}
        count = len(target["labels"])
        return target | {"boxes": torch.zeros(count, 4), "ignore": torch.zeros(count, dtype=torch.bool)}

    def write(self, root, version="v1.0-mini"):
        """The 13 tables, with what the devkit reads for the score; the files that they name do not exist."""
        tables = {
            "category": [{"token": f"category{i}", "name": name} for i, name in enumerate(CATEGORIES)],
            "attribute": [{"token": f"attribute{i}", "name": name} for i, name in enumerate(ATTRIBUTES)],
            "visibility": [{"token": "4", "level": "v80-100"}],
            "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
            "log": [{"token": "log"}],
            "map": [{"token": "map", "log_tokens": ["log"], "filename": "maps/gone.png"}],
            "scene": [{"token": "scene", "name": "scene-0103", "log_token": "log"}],
        }
        tables["calibrated_sensor"] = [{"token": "lidar_at", "sensor_token": "lidar"}]
        last = len(self.samples) - 1
        tables["sample"] = [
            {"token": token, "timestamp": 500_000 * i, "scene_token": "scene"} for i, token in enumerate(self.samples)
        ]
        tables["sample_data"], tables["ego_pose"] = [], []
        for i in range(2 * len(self.samples)):  # every other one is a sweep
            row = {"token": f"data{i}", "ego_pose_token": f"pose{i}", "calibrated_sensor_token": "lidar_at"}
            tables["sample_data"].append(row | {"sample_token": self.samples[i // 2], "is_key_frame": i % 2 == 0})
            tables["ego_pose"].append({"token": f"pose{i}", "translation": self.ego(i / 4).tolist()})
        tables["instance"], tables["sample_annotation"] = [], []
        for k, item in enumerate([*self.objects, self.rack()]):
            tables["instance"].append({"token": f"instance{k}", "category_token": f"category{item['label']}"})
            for i, token in enumerate(self.samples):
                row = {"token": f"box{k}_{i}", "sample_token": token, "instance_token": f"instance{k}"}
                row |= {"translation": self.center(item, i / 2).tolist(), "size": item["size"].tolist()}
                row |= {"rotation": quaternion(item["yaw"]), "num_lidar_pts": 5, "num_radar_pts": 0}
                row["attribute_tokens"] = [] if item["attribute"] < 0 else [f"attribute{item['attribute']}"]
                row |= {"prev": f"box{k}_{i - 1}" if i else "", "next": f"box{k}_{i + 1}" if i < last else ""}
                tables["sample_annotation"].append(row)
        (root / version).mkdir(parents=True)
        for name, rows in tables.items():
            (root / version / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def scene():
    return Scene()


def test_boxes_in_the_global_frame(scene):
    target = next(target for target in scene.targets() if len(target["labels"]) > 2)
    time = scene.samples.index(target["sample_token"]) / 2
    for box in nuscenes.to_global(nuscenes.true_detections(target), target):
        (item,) = (i for i in scene.objects if np.abs(scene.center(i, time) - box["translation"]).max() < 1e-3)
        assert item["label"] == box["label"] and item["attribute"] == box["attribute"]
        assert box["size"] == pytest.approx(item["size"], abs=1e-5)
        assert math.cos(box["yaw"] - item["yaw"]) == pytest.approx(1, abs=1e-6)
        assert box["velocity"] == pytest.approx(item["speed"] * rotation_about_z(item["yaw"])[:2, 0], abs=1e-5)


def test_the_rotation_of_a_result_turns_x_to_the_yaw():
    """A quaternion w, x, y, z of unit length."""
    boxes = np.zeros(3, nuscenes.BOX)
    boxes["yaw"], boxes["size"] = (0, 0.5, -2.5), 1
    for box, result in zip(boxes, nuscenes.as_results("t", boxes)):
        w, x, y, z = result["rotation"]
        assert (x, y, w * w + z * z) == (0, 0, pytest.approx(1))
        turned = (w * w - z * z, 2 * w * z)  # of (1, 0)
        assert turned == pytest.approx((math.cos(box["yaw"]), math.sin(box["yaw"])), abs=1e-6)


def test_true_detections_leave_out_what_is_ignored():
    target = {"ignore": torch.tensor([False, True]), "velocity": torch.tensor([[math.nan] * 3, [1.0, 2, 3]])}
    target |= {name: torch.arange(2) for name in ("labels", "center", "dims", "yaw", "attribute", "boxes")}
    detections = nuscenes.true_detections(target)
    assert detections["labels"].tolist() == [0] and detections["scores"].tolist() == [1.0]
    assert detections["velocity"].tolist() == [[0.0, 0, 0]]


def cars(count, image_id=0, sample="a", position=0.0):
    """A target and detections of `count` cars at one position with ascending scores."""
    target = {"image_id": image_id, "sample_token": sample, "rotation": np.eye(3), "translation": np.zeros(3)}
    detected = {"center": torch.full((count, 3), position), "dims": torch.ones(count, 3), "yaw": torch.zeros(count)}
    detected |= {"velocity": torch.zeros(count, 3), "labels": torch.zeros(count, dtype=torch.int64)}
    return target, detected | {"scores": torch.arange(count) / 1000, "attribute": detected["labels"] + 6}


def written(pairs, tmp_path, monkeypatch, **options):
    """The submission file of pairs of a target and its detections."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    evaluator = NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val", print=lambda line: None, **options)
    evaluator.update(*zip(*pairs))
    assert evaluator.compute() == {} and evaluator.table() == ""
    assert evaluator.write(tmp_path / "run") == ["submission.json"]
    return json.loads((tmp_path / "run/submission.json").read_text())


def test_the_submission_file(tmp_path, monkeypatch):
    pairs = [cars(400), cars(400, 1), cars(0, 2, "b"), cars(3, 1, "c")]  # the last has the image_id 1 again
    submission = written(pairs, tmp_path, monkeypatch, radar=False)
    names = ("camera", "lidar", "radar", "map", "external")
    assert submission["meta"] == {f"use_{name}": name == "camera" for name in names}
    assert {token: len(boxes) for token, boxes in submission["results"].items()} == {"a": 500, "b": 0}
    scores = [box["detection_score"] for box in submission["results"]["a"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(0.399) and scores[-1] > 0.149
    assert submission["results"]["a"][0] | {"detection_score": 0.5} == {
        "sample_token": "a",
        "translation": [0.0, 0.0, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "vehicle.parked",
    }
    assert nuscenes.to_submission(*zip(*pairs), radar=False) == submission


@pytest.mark.parametrize(("merge_distance", "count"), [(0.0, 6), (0.5, 6), (2.0, 3)])
def test_an_object_in_two_cameras_is_merged(tmp_path, monkeypatch, merge_distance, count):
    """The boxes of one camera all stay, however close."""
    pairs = [cars(3), cars(3, 1, position=1.0)]
    pairs[1][1]["scores"] += 0.01
    boxes = written(pairs, tmp_path, monkeypatch, merge_distance=merge_distance)["results"]["a"]
    assert len(boxes) == count
    assert [box["translation"][0] for box in boxes[:3]] == [1.0] * 3


@pytest.mark.parametrize("spec", [None, ModuleSpec("nuscenes", None, is_package=True)])  # the second: a folder
def test_without_the_devkit_a_line_is_printed(monkeypatch, tmp_path, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    lines = []
    evaluator = NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val", print=lines.append)
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.write(tmp_path)
    assert evaluator.compute() == {}
    assert len(lines) == 1 and "nuscenes-devkit is not installed" in lines[0] and "\n" not in lines[0]
    assert nuscenes.score_ground_truth(evaluator, Targets()) == ""


@pytest.mark.parametrize(
    ("samples", "cameras", "split", "line"),
    [
        (2, 6, "mini_val", "partial: 2 of 81 samples of mini_val are scored"),
        (81, 6, "mini_val", "81 of 81 samples of mini_val are scored"),
        (3, 6, "mine", "3 of 3 samples of mine are scored"),
        (81, 2, "mini_val", "partial: 81 of 81 samples of mini_val are scored, 81 of them with fewer than six cameras"),
    ],
)
def test_the_printed_line_tells_how_much_was_scored(samples, cameras, split, line):
    assert nuscenes.coverage(np.repeat([f"s{i}" for i in range(samples)], cameras), split) == line


def test_two_processes_equal_one(scene, monkeypatch):
    """Without the devkit: the main process makes the submission of both, and both get its metrics."""
    monkeypatch.setattr(nuscenes, "devkit_is_installed", lambda: True)
    monkeypatch.setattr(nuscenes_devkit, "open_tables", lambda *arguments: None)
    submissions = []
    score = Score({"NDS": 0.5})
    monkeypatch.setattr(nuscenes_devkit, "score", lambda submission, _: submissions.append(submission) or score)
    targets = scene.targets()
    scored("nowhere", targets)
    main, other = (NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val", print=str) for _ in range(2))
    for evaluator, share in ((main, targets[::2]), (other, [targets[0], *targets[1::2]])):  # one image in both
        evaluator.update(share, [nuscenes.true_detections(target) for target in share])
    gathered = []
    with pytest.raises(StopIteration):  # alone, the other process has no metrics
        other.compute(lambda value: gathered.append(value) or [value], is_main=False)
    answers = [gathered[0], None]
    assert main.compute(lambda value: [value, answers.pop(0)]) == {"NDS": 0.5}
    answers = [gathered[0], {"NDS": 0.5}]
    assert other.compute(lambda value: [value, answers.pop(0)], is_main=False) == {"NDS": 0.5}
    assert len(submissions) == 2 and submissions[0] == submissions[1]


class Targets(list):
    """Targets as a data set."""

    annotation = list.__getitem__


def scored(root, targets, detections=None, **options):
    lines = []
    evaluator = NuScenesEvaluator(root, "v1.0-mini", "mini_val", print=lines.append, **options)
    evaluator.update(targets, detections or [nuscenes.true_detections(target) for target in targets])
    return evaluator.compute(), evaluator, lines


def noisy(target, random):
    """The truth moved, turned, scaled and with random scores, each object twice."""
    detected = nuscenes.true_detections(target)
    detected = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in detected.items()}
    for name, spread in (("center", 0.4), ("yaw", 0.3), ("velocity", 0.3), ("dims", 0.1)):
        detected[name] = detected[name] + spread * torch.randn(detected[name].shape, generator=random)
    scores = torch.rand(len(detected["labels"]), generator=random)
    return detected | {"scores": scores, "dims": detected["dims"].clamp(min=0.1)}


@pytest.fixture(scope="module")
def root(scene, tmp_path_factory):
    """The data set folder of `scene`, for tests that need the devkit."""
    pytest.importorskip("nuscenes")
    root = tmp_path_factory.mktemp("tables")
    scene.write(root)
    return root


def test_ground_truth_scores_one(scene, root, tmp_path):
    metrics, evaluator, lines = scored(root, scene.targets())
    assert lines == ["partial: 4 of 81 samples of mini_val are scored"]
    assert set(MEASURES) <= set(metrics) and all(type(value) is float for value in metrics.values())
    assert metrics["mAP"] == pytest.approx(1) and metrics["NDS"] > 0.999 and metrics["AP/barrier"] == pytest.approx(1)
    assert all(metrics[name] < 1e-3 for name in nuscenes_devkit.ERRORS)
    assert evaluator.write(tmp_path) == ["submission.json", "per_class.csv", "confusion.csv", "pr_curves.csv"]
    table = (tmp_path / "per_class.csv").read_text().splitlines()
    assert table[:2] == ["class,AP", "car,1.000000"] and len(table) == 1 + len(CLASSES)
    table = np.genfromtxt(tmp_path / "confusion.csv", delimiter=",", skip_header=1)[:, 1:]
    assert (np.diag(table)[:-1] > 0).all() and table.sum() == np.trace(table)
    assert evaluator.average_precisions() == pytest.approx(dict.fromkeys(CLASSES, 1))


def test_the_line_about_the_ground_truth_is_a_warning_if_it_scores_low(scene, root):
    complete, half = (NuScenesEvaluator(root, "v1.0-mini", "mini_val", print=lambda line: None) for _ in range(2))
    line = nuscenes.score_ground_truth(complete, Targets(scene.targets()))
    assert line.startswith("ground truth scored as predictions: NDS 1.")
    half_of_it = Targets(scene.targets()[::2])
    assert nuscenes.score_ground_truth(half, half_of_it).startswith("WARNING: ground truth scored as")


def test_one_process_scores_the_ground_truth_and_the_others_wait_for_the_line(monkeypatch):
    monkeypatch.setattr(NuScenesEvaluator, "_score", lambda *_: pytest.fail("this process does not score"))
    answers = [[{}], [{"NDS": 1.0, "mAP": 1.0}, None]]
    evaluator = NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val")
    line = nuscenes.score_ground_truth(evaluator, Targets([{}]), lambda value: answers.pop(0), is_main=False)
    assert line == "ground truth scored as predictions: NDS 1.000, mAP 1.000"
    assert not answers


def test_missing_tables_and_invalid_boxes(scene, tmp_path):
    pytest.importorskip("nuscenes")
    scene.write(tmp_path)
    for name in ("map", "log", "visibility"):
        (tmp_path / "v1.0-mini" / f"{name}.json").unlink()
    file = tmp_path / "v1.0-mini" / "sample_annotation.json"
    rows = json.loads(file.read_text())
    rows[0]["size"], rows[5]["translation"] = [0, 1, 1], [math.nan] * 3
    file.write_text(json.dumps(rows))
    assert 0.9 < scored(tmp_path, scene.targets())[0]["mAP"] < 1  # two boxes too many, and no AssertionError


def test_the_score_equals_that_of_the_official_program(scene, root, tmp_path):
    """The devkit's own constructor, which reads the submission file and scores the whole split."""
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    random = torch.Generator().manual_seed(2)
    targets = scene.targets()
    metrics, evaluator, _ = scored(root, targets, [noisy(target, random) for target in targets])
    evaluator.write(tmp_path)
    (root / "maps").mkdir(exist_ok=True)
    (root / "maps" / "gone.png").touch()
    config, tables = config_factory("detection_cvpr_2019"), NuScenes("v1.0-mini", str(root), verbose=False)
    submission = str(tmp_path / "submission.json")
    official = DetectionEval(tables, config, submission, "mini_val", str(tmp_path / "out"), False)
    expected = official.evaluate()[0].serialize()
    assert metrics["NDS"] == expected["nd_score"] and metrics["mAP"] == expected["mean_ap"]
    assert all(metrics[name] == expected["tp_errors"][error] for name, error in nuscenes_devkit.ERRORS.items())
    at_2m = {name: values[2.0] for name, values in expected["label_aps"].items()}
    assert evaluator.average_precisions() == at_2m
    _, recall, scores = evaluator.curves()["car"]
    assert len(recall) == len(scores) > 10 and (np.diff(scores) <= 0).all() and scores[-1] > 0
    assert 0.1 < metrics["mAP"] < 0.99 and all(0.01 < metrics[name] < 1 for name in ("mATE", "mASE", "mAOE"))


def test_confusion_counts_pairs_within_two_meters(scene, root, tmp_path):
    """All cars are called trucks, moved by 1.9 meters, half of them with a low score; all barriers are moved by 2.1."""
    targets, pairs = scene.targets(), []
    for target in targets:
        detected = nuscenes.true_detections(target)
        cars, barriers = (detected["labels"] == CLASSES.index(name) for name in ("car", "barrier"))
        detected["center"] = detected["center"] + torch.tensor([1.0, 0, 0]) * (1.9 * cars + 2.1 * barriers)[:, None]
        detected["labels"] = torch.where(cars, CLASSES.index("truck"), detected["labels"])
        detected["scores"][cars] = 0.4 + 0.1 * (len(pairs) % 2)
        pairs.append((target, detected))
    _, evaluator, _ = scored(root, *map(list, zip(*pairs)))
    evaluator.write(tmp_path)
    (head, *rows) = [line.split(",") for line in (tmp_path / "confusion.csv").read_text().splitlines()]
    table = {row[0]: dict(zip(head[1:], map(int, row[1:]))) for row in rows}
    counts = {name: sum(int((t["labels"] == CLASSES.index(name)).sum()) for t in targets) for name in CLASSES}
    low = sum(int((pair[1]["scores"] < 0.5).sum()) for pair in pairs)
    assert low > 0 and head[1:] == [*CLASSES, "background"]
    assert table["car"] == dict.fromkeys(head[1:], 0) | {"truck": counts["car"] - low, "background": low}
    assert table["barrier"]["background"] == table["background"]["barrier"] == counts["barrier"]
    others = set(CLASSES) - {"bicycle"}  # one is in a rack
    assert all(sum(table[name].values()) == counts[name] for name in others)


def test_some_of_the_samples(scene, root):
    metrics, _, lines = scored(root, scene.targets()[:18])  # three of four samples
    assert metrics["mAP"] == pytest.approx(1) and lines == ["partial: 3 of 81 samples of mini_val are scored"]


def test_no_detections_score_zero(scene, root):
    targets = scene.targets()
    nothing = [{name: value[:0] for name, value in nuscenes.true_detections(target).items()} for target in targets]
    metrics, _, _ = scored(root, targets, nothing)
    assert metrics["mAP"] == 0 and metrics["NDS"] == 0 and metrics["mAVE"] == 1


def test_only_the_tables_of_the_scored_samples_are_kept(scene, root):
    tables = nuscenes_devkit.open_tables(str(root), "v1.0-mini", frozenset(scene.samples[:1]))
    assert len(tables.sample_data) == len(tables.ego_pose) == 4 and len(tables.sample) == 4
    assert len(tables.sample_annotation) == 4 * (3 * len(CLASSES) + 1)
