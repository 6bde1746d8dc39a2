"""predict.py as a person runs it: the checkpoint of every script, on drawn data small enough for seconds."""

import functools
import json

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

import models
import predict
import train_backbone
import train_centerfusion
import train_retinanet
import train_ssd
from data import drawn
from tests.scripts import launch
from training import checkpoints
from training.flags import UsageError

ONCE = ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--log-level", "warning", "--max-steps", "1"]


@pytest.fixture(scope="module")
def ssd(drawn_voc, tmp_path_factory):
    """last.pt of an SSD that has seen a step, with averaged weights."""
    out = tmp_path_factory.mktemp("ssd")
    words = ["--dataset-type", "voc", "--pretrained-ssd", "none", "--resolution", "96", "--batch-size", "4"]
    train_ssd.main([*ONCE, *words, "--ema", "0.9", "--data", str(drawn_voc), "--model-dir", str(out)])
    return out / "last.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return drawn.draw_nuscenes(tmp_path_factory.mktemp("drawn") / "nuscenes", images=24, seed=1)


@pytest.fixture(scope="module")
def fusion(world, tmp_path_factory):
    """A function of the radar flags: last.pt of a CenterFusion that has seen a step."""

    @functools.cache
    def train(*radar):
        out = tmp_path_factory.mktemp("fusion")
        words = ["--version", "v1.0-mini", "--train_split", "mini_train", "--val_split", "mini_val", "--velocity"]
        words += ["--arch", "resnet18", "--input-size", "64", "128", "--batch-size", "2", "--nuscenes_att"]
        train_centerfusion.main([*ONCE, *words, *radar, "--data", str(world), "--model-dir", str(out)])
        return out / "last.pt"

    return train


def run(checkpoint, *words, **more):
    return predict.main([str(checkpoint), *map(str, words), "--device", "cpu", "--precision", "fp32"])


def read(path):
    return json.loads(path.read_text())


def test_boxes_come_out_in_coco_s_form(ssd, drawn_voc, tmp_path, capsys):
    folder = drawn_voc / "JPEGImages"
    rows = run(ssd, folder, "--out", tmp_path, "--threshold", 0.05)
    said = capsys.readouterr().out
    assert "averaged weights" in said and "24 pictures" in said and "a second in the network" in said
    assert rows == read(tmp_path / "detections.json") and len(rows)
    assert {path.stem for path in tmp_path.glob("*.jpg")} == {path.stem for path in folder.iterdir()} | {"sheet"}
    images = {image["id"]: image for image in read(tmp_path / "images.json")["images"]}
    assert set(images) == {int(path.stem) for path in folder.iterdir()}
    for row in rows:
        image, (x, y, w, h) = images[row["image_id"]], row["bbox"]
        assert 0 <= x <= x + w <= image["width"] + 0.01 and 0 <= y <= y + h <= image["height"] + 0.01
        assert row["file_name"] == image["file_name"] and 0.05 <= row["score"] <= 1
    truth = COCO(str(tmp_path / "images.json"))
    found = truth.loadRes(str(tmp_path / "detections.json"))
    assert len(found.anns) == len(rows)
    assert {truth.cats[row["category_id"]]["name"] for row in rows} == {row["category_name"] for row in rows}


def test_no_flag_but_checkpoint_and_pictures(ssd, drawn_voc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = sorted((drawn_voc / "JPEGImages").iterdir())[:2]
    predict.main([str(ssd), *map(str, pictures)])
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 3


def test_only_the_classes_asked_for(ssd, drawn_voc, tmp_path):
    everything = run(ssd, drawn_voc / "JPEGImages", "--out", tmp_path, "--threshold", 0.05)
    names = sorted({row["category_name"] for row in everything})
    some = run(ssd, drawn_voc / "JPEGImages", "--out", tmp_path, "--threshold", 0.05, "--classes", names[0])
    assert some == [row for row in everything if row["category_name"] == names[0]]
    with pytest.raises(UsageError, match=f"no class hedgehog; there are .*{names[0]}"):
        run(ssd, drawn_voc / "JPEGImages", "--out", tmp_path, "--classes", f"{names[0]},hedgehog")


def test_a_damaged_picture_is_told_and_the_others_are_done(ssd, drawn_voc, tmp_path):
    whole = sorted((drawn_voc / "JPEGImages").iterdir())[0]
    for name in ("good.jpg", "again.jpg"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    (tmp_path / "broken.jpg").write_bytes(whole.read_bytes()[:300])
    process = launch("predict.py", ssd, tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("broken.jpg") == 1 and "1 could not be read" in errors and "Traceback" not in errors
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"good.jpg", "again.jpg", "sheet.jpg"}
    assert {image["id"] for image in read(tmp_path / "out" / "images.json")["images"]} == {1, 2}


def test_frames_of_an_animation(ssd, tmp_path):
    images = [Image.new("RGB", (120, 90), (10 * i, 100, 200 - 10 * i)) for i in range(5)]
    images[0].save(tmp_path / "7.gif", save_all=True, append_images=images[1:], duration=40)
    run(ssd, tmp_path / "7.gif", "--every", 2, "--out", tmp_path / "out")
    told = read(tmp_path / "out" / "images.json")["images"]
    assert [(image["id"], image["frame"]) for image in told] == [(1, 0), (2, 2), (3, 4)]
    assert (tmp_path / "out" / "7_000004.jpg").is_file()


def test_retinanet(tmp_path):
    data = drawn.draw_coco(tmp_path / "coco", images=24, seed=1)
    words = ["--depth", "18", "--backbone-weights", "none", "--min-side", "64", "--max-side", "96", "--batch-size", "4"]
    train_retinanet.main([*ONCE, *words, "--coco_path", str(data), "--model-dir", str(tmp_path / "run")])
    rows = run(tmp_path / "run/last.pt", data / "val2017", "--out", tmp_path / "out", "--threshold", 0.005)
    boxes = torch.tensor([row["bbox"] for row in rows])
    assert len(boxes) and boxes.min() >= 0
    assert (boxes[:, 0] + boxes[:, 2]).max() > 200  # pixels of the files, which are 320 wide


def test_a_classifier_answers_five_times(tmp_path):
    data = drawn.draw_imagefolder(tmp_path / "shapes", images=30, seed=1)
    words = ["--resolution", "32", "--batch-size", "4", "--lr", "0.01", "--data", str(data)]
    train_backbone.main([*ONCE, *words, "--model-dir", str(tmp_path / "run")])
    classes = models.load(tmp_path / "run/backbone.pt").classes
    pictures = len(list((data / "val").rglob("*.jpg")))
    for checkpoint in ("last.pt", "backbone.pt"):
        rows = run(tmp_path / "run" / checkpoint, data / "val", "--out", tmp_path / "out")
        assert rows == read(tmp_path / "out" / "answers.json") and len(rows) == pictures
        for row in rows:
            scores = [answer["score"] for answer in row["answers"]]
            assert len(scores) == 5 and scores == sorted(scores, reverse=True) and 0.99 < sum(scores) < 1.01
            assert all(classes[answer["label"]] == answer["name"] for answer in row["answers"])
    assert not (tmp_path / "out" / "detections.json").exists()


def test_masks_are_run_lengths_of_the_file_s_size(tmp_path):
    torch.manual_seed(0)
    net = models.build("maskrcnn_resnet18", 2, width=16, hidden=16, proposals=20)
    net.classes = ["cat", "dog"]
    about = {**models.describe(net), "min_side": 64, "max_side": 96}
    checkpoints.export(tmp_path / "masks.pt", {**about, "model": net})
    Image.effect_noise((150, 100), 80).save(tmp_path / "noise.png")
    rows = run(tmp_path / "masks.pt", tmp_path / "noise.png", "--out", tmp_path / "out", "--threshold", 0.1)
    assert rows
    for row in rows:
        mask = coco_masks.decode(row["segmentation"])
        left, top, width, height = row["bbox"]
        assert mask.shape == (100, 150)
        outside = mask.copy()
        outside[max(0, int(top) - 3) : int(top + height) + 4, max(0, int(left) - 3) : int(left + width) + 4] = 0
        assert outside.sum() == 0
    assert (tmp_path / "out" / "noise.jpg").is_file()


def test_key_frames_with_radar(world, fusion, tmp_path, capsys):
    checkpoint = fusion("--pointcloud")
    words = ["--out", tmp_path, "--samples", 1, "--cache-dir", tmp_path, "--threshold", 0]
    submission = run(checkpoint, world, *words)
    assert submission == read(tmp_path / "submission.json")
    assert submission["meta"]["use_radar"] and submission["meta"]["use_camera"]
    samples = {sample["token"] for sample in read(world / "v1.0-mini" / "sample.json")}
    assert len(submission["results"]) == 1 and set(submission["results"]) < samples
    boxes = next(iter(submission["results"].values()))
    assert 0 < len(boxes) <= 500
    named = run(checkpoint, world, *words, "--classes", "car,truck", "--split", "mini_train", "--batch-size", 4)
    found = {box["detection_name"] for boxes in named["results"].values() for box in boxes}
    assert found and found <= {"car", "truck"}
    assert "6 pictures" in capsys.readouterr().out
    with Image.open(next(tmp_path.glob("scene-*.jpg"))) as picture:
        assert picture.size == (3 * 806 + 906, 906)


def test_key_frames_of_the_camera_alone(world, fusion, tmp_path):
    submission = run(fusion(), world, "--out", tmp_path, "--samples", 1, "--cache-dir", tmp_path)
    assert not submission["meta"]["use_radar"]


def test_a_real_key_frame(shared, fusion, tmp_path):
    data, out = shared / "data/nuscenes_one_sample", tmp_path / "out"
    submission = run(fusion("--pointcloud"), data, "--out", out, "--cache-dir", tmp_path)
    assert len(submission["results"]) == 1 and len(list(out.glob("scene-*.jpg"))) == 1


def test_fusion_needs_nuscenes_and_others_need_pictures(world, fusion, ssd, tmp_path):
    with pytest.raises(UsageError, match=r"give its one folder, with v1\.0-mini"):
        run(fusion("--pointcloud"), world / "samples" / "CAM_FRONT", "--out", tmp_path)
    with pytest.raises(UsageError, match="--version and --split are for networks of CenterFusion"):
        run(ssd, world, "--split", "mini_val", "--out", tmp_path)
