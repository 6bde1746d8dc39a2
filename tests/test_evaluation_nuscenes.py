"""From heads to boxes to the submission file to the official score, on a small world with its tables written here."""

import importlib.util
import json
import math
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from evaluation import nuscenes
from evaluation.nuscenes import ATTRIBUTES, CLASSES, NuScenesEvaluator
from losses import centerfusion
from ops.geometry import apply_affine, project, wrap, yaw_to_alpha

CALIB = torch.tensor([[1260.0, 0, 800, 0], [0, 1260, 450, 0], [0, 0, 1, 0]])
AFFINE = torch.tensor([[0.5, 0, 3], [0, 0.5, -2]])
CAMERAS = [f"CAM_{side}" for side in ("FRONT", "FRONT_LEFT", "BACK_LEFT", "BACK", "BACK_RIGHT", "FRONT_RIGHT")]
CATEGORIES = ["vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.trailer", "vehicle.construction"]
CATEGORIES += ["human.pedestrian.adult", "vehicle.motorcycle", "vehicle.bicycle", "movable_object.trafficcone"]
CATEGORIES += ["movable_object.barrier", "static_object.bicycle_rack"]
IN_CAMERA = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # right, down, forward of a camera in a level vehicle


def turned(yaw):
    """A turn about the vertical axis, [3,3]."""
    return np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])


def upright(yaw):
    return [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]


class World:
    """A scene of the split mini_val: `count` samples half a second apart, three objects of every class, moving along
    their heading; the vehicle drives. One bicycle stands in a rack, where the score counts none."""

    def __init__(self, count=4, seed=0):
        random = np.random.default_rng(seed)
        self.samples = [f"sample{i}" for i in range(count)]
        self.objects = []
        for label in range(len(CLASSES)):
            first, end = nuscenes.GROUPS[label]
            for k in range(3):
                away, angle = 8 + 6 * k + label / 3, math.radians(60 * random.integers(6) + 24 * random.random() - 12)
                speed = 0.0 if first == end else random.uniform(-1, 1)
                place = [500 + away * math.cos(angle), 900 + away * math.sin(angle), random.uniform(0, 3)]
                one = {"label": label, "start": np.array(place), "size": random.uniform(0.5, 3, 3), "speed": speed}
                one |= {"yaw": random.uniform(-3, 3)}
                self.objects.append(one | {"attribute": -1 if first == end else int(random.integers(first, end))})

    def rack(self):
        bicycle = next(one for one in self.objects if one["label"] == CLASSES.index("bicycle"))
        return bicycle | {"label": len(CLASSES), "attribute": -1, "size": bicycle["size"] + 1}

    def ego(self, time):
        return np.array([500 + 0.5 * time, 900.0, 0.0])

    def place(self, one, time):
        return one["start"] + one["speed"] * time * turned(one["yaw"])[:, 0]

    def targets(self):
        """A target of every camera of every sample: objects within 30 degrees of its axis."""
        found = []
        for i, token in enumerate(self.samples):
            for k, camera in enumerate(CAMERAS):
                turn = turned(math.radians(60 * k)) @ IN_CAMERA
                origin = self.ego(i / 2) + np.array([0, 0, 1.5])
                found.append(self.seen(i / 2, turn, origin) | {"sample_token": token, "camera": camera})
                found[-1] |= {"image_id": len(found) - 1, "rotation": turn, "translation": origin}
        return found

    def seen(self, time, turn, origin):
        rows = []
        for one in self.objects:
            center = (self.place(one, time) - origin) @ turn
            if abs(math.atan2(center[0], center[2])) <= math.radians(30):
                heading = turned(one["yaw"])[:, 0] @ turn
                width, length, height = one["size"]
                yaw = math.atan2(-heading[2], heading[0])
                velocity, dims = one["speed"] * heading, (height, width, length)
                rows.append((center, dims, yaw, velocity, one["label"], one["attribute"]))
        names = ("center", "dims", "yaw", "velocity", "labels", "attribute")
        columns = dict(zip(names, zip(*rows))) if rows else dict.fromkeys(names, ())
        target = {name: torch.tensor(np.array(columns[name]), dtype=torch.float32) for name in names}
        target |= {name: target[name].view(-1, 3) for name in ("center", "dims", "velocity")}
        target |= {name: target[name].long() for name in ("labels", "attribute")}
        pixels = apply_affine(project(target["center"], CALIB)[0], AFFINE)
        target |= {"amodal": pixels, "boxes": torch.cat([pixels - 10, pixels + 10], 1)}
        target |= {"calib": CALIB, "affine": AFFINE}
        target["alpha"] = yaw_to_alpha(target["yaw"], target["center"])
        return target | {"ignore": torch.zeros(len(target["labels"]), dtype=torch.bool)}

    def write(self, root, version="v1.0-mini"):
        """The 13 tables, as far as the devkit's score looks at them; no file that they name exists."""
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
        for k, one in enumerate([*self.objects, self.rack()]):
            tables["instance"].append({"token": f"instance{k}", "category_token": f"category{one['label']}"})
            for i, token in enumerate(self.samples):
                row = {"token": f"box{k}_{i}", "sample_token": token, "instance_token": f"instance{k}"}
                row |= {"translation": self.place(one, i / 2).tolist(), "size": one["size"].tolist()}
                row |= {"rotation": upright(one["yaw"]), "num_lidar_pts": 5, "num_radar_pts": 0}
                row["attribute_tokens"] = [] if one["attribute"] < 0 else [f"attribute{one['attribute']}"]
                row |= {"prev": f"box{k}_{i - 1}" if i else "", "next": f"box{k}_{i + 1}" if i < last else ""}
                tables["sample_annotation"].append(row)
        (root / version).mkdir(parents=True)
        for name, rows in tables.items():
            (root / version / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def world():
    return World()


def heads_that_say(targets, size=(113, 203)):
    """Heads whose decoding is `targets`: goals written at the peaks of their objects."""
    goals = centerfusion.assign(targets, "cpu", size=size)
    channels = {"reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2, "velocity": 3, "nuscenes_att": 8}
    heads = {name: torch.zeros(len(targets), count, *size) for name, count in channels.items()}
    heads["hm"] = goals["hm"].logit(1e-6)
    for picture in range(len(targets)):
        mask = goals["mask"][picture]
        cells = goals["index"][picture][mask]
        assert len(cells.unique()) == len(cells)
        for name in ("reg", "wh", "dim", "amodel_offset", "velocity"):
            heads[name].flatten(2)[picture][:, cells] = goals[name][picture][mask].T
        heads["nuscenes_att"].flatten(2)[picture][:, cells] = goals["attribute"][picture][mask].T
        heads["dep"].flatten(2)[picture][:, cells] = -goals["dep"][picture][mask].log().T
        residuals, bins = goals["residuals"][picture][mask], goals["bins"][picture][mask]
        rot = torch.stack([1.0 - bins, bins, residuals.sin(), residuals.cos()], dim=-1).flatten(1)
        heads["rot"].flatten(2)[picture][:, cells] = rot.T
    return heads


def test_decode_reads_what_was_written(world):
    targets = world.targets()[:6]
    heads = heads_that_say(targets)
    found = nuscenes.decode(heads, targets, count=50)
    assert len(found) == 6 and all(one["scores"].shape == (50,) for one in found)
    seen = 0
    for target, detection in zip(targets, found):
        sure = {name: value[detection["scores"] > 0.99] for name, value in detection.items()}
        apart = torch.cdist(target["center"], sure["center"])
        assert len(target["labels"]) == len(sure["labels"])
        if not len(target["labels"]):
            continue
        place = apart.argmin(1)
        sure = {name: value[place] for name, value in sure.items()}
        for name in ("center", "dims", "velocity", "boxes", "labels", "attribute"):
            torch.testing.assert_close(sure[name], target[name], rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(wrap(sure["yaw"] - target["yaw"]), torch.zeros(len(place)), rtol=0, atol=1e-4)
        seen += len(place)
    assert seen > 20


def test_the_second_stage_has_the_last_word(world):
    targets = world.targets()[:2]
    heads = heads_that_say(targets)
    plain = nuscenes.decode(heads, targets, count=5)
    heads |= {"dep_sec": torch.zeros_like(heads["dep"]), "rot_sec": heads["rot"].roll(4, dims=1)}
    fused = nuscenes.decode(heads, targets, count=5)
    for first, second in zip(plain, fused):
        torch.testing.assert_close(second["center"][:, 2], torch.ones(5), rtol=1e-5, atol=1e-5)  # 1 / sigmoid(0) - 1
        turned_by = wrap(second["yaw"] - first["yaw"])[first["scores"] > 0.99].abs()
        assert len(turned_by) > 2
        torch.testing.assert_close(turned_by, torch.full_like(turned_by, math.pi))
    bare = nuscenes.decode(heads, targets, count=5, without=("velocity", "nuscenes_att"))[0]
    assert (bare["velocity"] == 0).all() and (bare["attribute"] == -1).all()


def test_velocity_is_turned_along_the_heading():
    yaw = torch.tensor([0.0, 0.0, -math.pi / 2, math.pi])
    velocity = torch.tensor([[3.0, 9, 4], [-3, 0, 4], [0, 0, 2], [1, 0, 0]])
    expected = torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 0, 2], [1, 0, 0]])
    torch.testing.assert_close(nuscenes.along(velocity, yaw), expected, rtol=0, atol=1e-6)


def test_attributes_come_from_the_group_of_the_class():
    logits = torch.arange(8.0).repeat(1, 10, 1)
    best = nuscenes.best_attribute(logits, torch.arange(10)[None])[0]
    assert best.tolist() == [7, 7, 7, 7, 7, 4, 1, 1, -1, -1]
    assert nuscenes.best_attribute(-logits, torch.arange(10)[None])[0].tolist() == [5, 5, 5, 5, 5, 2, 0, 0, -1, -1]


def test_boxes_in_the_global_frame(world):
    target = next(one for one in world.targets() if len(one["labels"]) > 2)
    time = world.samples.index(target["sample_token"]) / 2
    boxes = nuscenes.to_global(nuscenes.truth(target), target)
    for i in range(len(boxes["label"])):
        same = [one for one in world.objects if np.abs(world.place(one, time) - boxes["translation"][i]).max() < 1e-3]
        assert len(same) == 1 and same[0]["label"] == boxes["label"][i]
        assert boxes["size"][i] == pytest.approx(same[0]["size"], abs=1e-5)
        assert math.cos(boxes["yaw"][i] - same[0]["yaw"]) == pytest.approx(1, abs=1e-6)
        assert boxes["velocity"][i] == pytest.approx(same[0]["speed"] * turned(same[0]["yaw"])[:2, 0], abs=1e-5)


def many(count, image_id=0, sample="a", camera="CAM_FRONT", where=0.0):
    """A target and a detection with `count` cars at one place, scores rising."""
    target = {"image_id": image_id, "sample_token": sample, "camera": camera}
    target |= {"rotation": np.eye(3), "translation": np.zeros(3)}
    found = {"center": torch.full((count, 3), where), "dims": torch.ones(count, 3), "yaw": torch.zeros(count)}
    found |= {"velocity": torch.zeros(count, 3), "labels": torch.zeros(count, dtype=torch.int64)}
    return target, found | {"scores": torch.arange(count) / 1000, "attribute": found["labels"] + 6}


def written(samples, tmp_path, monkeypatch, **settings):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    evaluator = NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val", say=lambda line: None, **settings)
    evaluator.update(*zip(*samples))
    assert evaluator.compute() == {}
    evaluator.write(tmp_path / "deep" / "results.json")
    return json.loads((tmp_path / "deep" / "results.json").read_text())


def test_the_submission_file(tmp_path, monkeypatch):
    samples = [many(400), many(400, 1, camera="CAM_BACK"), many(0, 2, "b"), many(3, 1, "c")]  # the last: id 1 again
    results = written(samples, tmp_path, monkeypatch, modalities=("camera",))
    names = ("camera", "lidar", "radar", "map", "external")
    assert results["meta"] == {f"use_{name}": name == "camera" for name in names}
    assert {token: len(boxes) for token, boxes in results["results"].items()} == {"a": 500, "b": 0}
    scores = [box["detection_score"] for box in results["results"]["a"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(0.399) and scores[-1] > 0.149
    best = results["results"]["a"][0] | {"detection_score": 0.5}
    assert best == {
        "sample_token": "a",
        "translation": [0.0, 0.0, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "vehicle.parked",
    }


@pytest.mark.parametrize(("merge", "kept"), [(0.0, 6), (0.5, 6), (2.0, 3)])
def test_one_object_in_two_cameras(tmp_path, monkeypatch, merge, kept):
    """Boxes of one camera stay, however close."""
    samples = [many(3), many(3, 1, camera="CAM_FRONT_LEFT", where=1.0)]
    samples[1][1]["scores"] += 0.01
    boxes = written(samples, tmp_path, monkeypatch, merge=merge)["results"]["a"]
    assert len(boxes) == kept
    assert [box["translation"][0] for box in boxes[:3]] == [1.0] * 3


@pytest.mark.parametrize("found", [None, ModuleSpec("nuscenes", None, is_package=True)])  # a folder of that name
def test_without_the_devkit_one_line(monkeypatch, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    lines = []
    evaluator = NuScenesEvaluator("nowhere", "v1.0-mini", "mini_val", say=lines.append)
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.write("never.json")
    assert evaluator.compute() == {}
    assert len(lines) == 1 and "nuscenes-devkit is not installed" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize(
    ("samples", "cameras", "split", "line"),
    [
        (2, 6, "mini_val", "partial: 2 of 81 samples of mini_val are scored"),
        (81, 6, "mini_val", "81 of 81 samples of mini_val are scored"),
        (3, 6, "mine", "3 of 3 samples of mine are scored"),
        (81, 2, "mini_val", "partial: 81 of 81 samples of mini_val are scored, 81 of them with fewer than six cameras"),
    ],
)
def test_what_was_scored_is_said(samples, cameras, split, line):
    pictures = {"sample": np.repeat([f"s{i}" for i in range(samples)], cameras)}
    assert nuscenes.coverage(pictures, split) == line


def scored(world, root, targets, detections=None, **settings):
    lines = []
    evaluator = NuScenesEvaluator(root, "v1.0-mini", "mini_val", say=lines.append, **settings)
    evaluator.update(targets, detections or [nuscenes.truth(target) for target in targets])
    return evaluator.compute(), evaluator, lines


def noisy(target, random):
    """The truth moved, turned, renamed and rescored a little, each object twice."""
    found = nuscenes.truth(target)
    found = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in found.items()}
    count = len(found["labels"])
    for name, spread in (("center", 0.4), ("yaw", 0.3), ("velocity", 0.3), ("dims", 0.1)):
        found[name] = found[name] + spread * torch.randn(found[name].shape, generator=random)
    return found | {"scores": torch.rand(count, generator=random), "dims": found["dims"].clamp(min=0.1)}


@pytest.fixture(scope="module")
def tables(world, tmp_path_factory):
    pytest.importorskip("nuscenes")
    root = tmp_path_factory.mktemp("tables")
    world.write(root)
    return root


def test_the_truth_scores_one(world, tables, tmp_path):
    metrics, evaluator, lines = scored(world, tables, world.targets())
    assert lines == ["partial: 4 of 81 samples of mini_val are scored"]
    assert set(nuscenes.MEASURES) <= set(metrics) and all(type(value) is float for value in metrics.values())
    assert metrics["mAP"] == pytest.approx(1) and metrics["NDS"] > 0.999 and metrics["AP/barrier"] == pytest.approx(1)
    assert all(metrics[name] < 1e-3 for name in nuscenes.ERRORS)
    evaluator.write(tmp_path / "submission.json")
    table = (tmp_path / "per_class.csv").read_text().splitlines()
    assert table[:2] == ["class,AP", "car,1.000000"] and len(table) == 1 + len(CLASSES)


def test_what_is_said_of_the_truth(world, tables):
    evaluators = [NuScenesEvaluator(tables, "v1.0-mini", "mini_val", say=lambda line: None) for _ in range(2)]
    assert nuscenes.score_truth(evaluators[0], world.targets()).startswith("ground truth scored as predictions: NDS 1.")
    assert nuscenes.score_truth(evaluators[1], world.targets()[::2]).startswith("WARNING: ground truth scored as")


def test_tables_that_lack_and_boxes_that_nothing_has(world, tmp_path):
    pytest.importorskip("nuscenes")
    world.write(tmp_path)
    for name in ("map", "log", "visibility"):
        (tmp_path / "v1.0-mini" / f"{name}.json").unlink()
    file = tmp_path / "v1.0-mini" / "sample_annotation.json"
    rows = json.loads(file.read_text())
    rows[0]["size"], rows[5]["translation"] = [0, 1, 1], [math.nan] * 3
    file.write_text(json.dumps(rows))
    assert 0.9 < scored(world, tmp_path, world.targets())[0]["mAP"] < 1  # two boxes too many, and no AssertionError


def test_the_score_is_that_of_the_official_file_route(world, tables, tmp_path):
    """The devkit's own constructor, which reads the file and takes the whole split."""
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    random = torch.Generator().manual_seed(2)
    targets = world.targets()
    metrics, evaluator, _ = scored(world, tables, targets, [noisy(target, random) for target in targets])
    evaluator.write(tmp_path / "results.json")
    (tables / "maps").mkdir(exist_ok=True)
    (tables / "maps" / "gone.png").touch()
    config, theirs = config_factory("detection_cvpr_2019"), NuScenes("v1.0-mini", str(tables), verbose=False)
    official = DetectionEval(theirs, config, str(tmp_path / "results.json"), "mini_val", str(tmp_path / "out"), False)
    expected = official.evaluate()[0].serialize()
    assert metrics["NDS"] == expected["nd_score"] and metrics["mAP"] == expected["mean_ap"]
    assert all(metrics[name] == expected["tp_errors"][error] for name, error in nuscenes.ERRORS.items())
    assert 0.1 < metrics["mAP"] < 0.99 and all(0.01 < metrics[name] < 1 for name in ("mATE", "mASE", "mAOE"))


def test_part_of_the_samples_and_two_processes(world, tables):
    targets = world.targets()[:18]  # three of four samples
    whole, _, lines = scored(world, tables, targets)
    assert whole["mAP"] == pytest.approx(1) and lines == ["partial: 3 of 81 samples of mini_val are scored"]
    evaluators = [NuScenesEvaluator(tables, "v1.0-mini", "mini_val", say=lines.append) for _ in range(2)]
    shares = [targets[::2], [targets[0], *targets[1::2]]]  # one picture in both
    for evaluator, share in zip(evaluators, shares):
        evaluator.update(share, [nuscenes.truth(target) for target in share])
    said = []

    def gather_first(value):  # what `gather` gives: first the rows of both, then their answers
        said.append(value)
        if len(said) == 1:
            kinds = enumerate((nuscenes.PICTURES, nuscenes.BOXES))
            theirs = [nuscenes.stacked([part[i] for part in evaluators[1]._parts], kind) for i, kind in kinds]
            return [value, theirs]
        return [value, None]

    assert evaluators[0].compute(gather_first) == whole
    answers = iter([None, [whole, None]])
    assert evaluators[1].compute(lambda value: next(answers) or [value], is_main=False) == whole


def test_nothing_found_scores_zero(world, tables):
    targets = world.targets()
    nothing = [{name: value[:0] for name, value in nuscenes.truth(target).items()} for target in targets]
    metrics, _, _ = scored(world, tables, targets, nothing)
    assert metrics["mAP"] == 0 and metrics["NDS"] == 0 and metrics["mAVE"] == 1


def test_only_what_the_score_needs_is_kept(world, tables):
    opened = nuscenes.open_tables(str(tables), "v1.0-mini", frozenset(world.samples[:1]))
    assert len(opened.sample_data) == len(opened.ego_pose) == 4 and len(opened.sample) == 4
    assert len(opened.sample_annotation) == 4 * (3 * len(CLASSES) + 1)
