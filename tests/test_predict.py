"""predict.py with a checkpoint of each kind of network, on synthetic data, and its error messages."""

import itertools
import json
import os
import re
import signal
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

import inference
import models
import predict
from data import video_input
from data.nuscenes import NuScenesDataset, RadarOptions, load_available
from models import onnx, pretrained
from ops.geometry import project
from tests.script_helpers import Script, launch
from training import checkpoint, cli, distributed
from utils.errors import DataError, UsageError, WeightsError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ssd(drawn, tmp_path_factory):
    """last.pt of an SSD after a step, with averaged weights."""
    out = tmp_path_factory.mktemp("ssd")
    Script("ssd", drawn("ssd")).main(out, "--max-steps", 1, "--ema", 0.9)
    return out / "last.pt"


@pytest.fixture(scope="module")
def images(drawn):
    """The folder of images of the VOC data set."""
    return drawn("ssd") / "JPEGImages"


@pytest.fixture(scope="module")
def centerfusion(drawn, tmp_path_factory):
    """last.pt of a CenterFusion with radar after a step."""
    out = tmp_path_factory.mktemp("centerfusion")
    Script("centerfusion", drawn("centerfusion")).main(out, "--max-steps", 1)
    return out / "last.pt"


def run(checkpoint, *words):
    """The contents of the JSON file with the predictions."""
    return read(predict.main([str(checkpoint), *map(str, words), "--device", "cpu", "--precision", "fp32"]))


def read(path):
    return json.loads(path.read_text())


def write_checkpoint(path, net, **sizes):
    net.classes = [f"class {label}" for label in range(net.num_classes)]
    checkpoint.write(path, {**models.describe(net, **sizes), "model": net})
    return path


def test_detections_have_cocos_results_format(ssd, images, tmp_path, capsys):
    rows = run(ssd, images, "--out", tmp_path, "--threshold", 0.05)
    printed = capsys.readouterr().out
    assert "averaged weights" in printed and "24 images, " in printed and "per second in the network" in printed
    assert f"{len(rows)} boxes with a score of at least 0.05; annotated images, sheet.jpg" in printed
    assert rows == read(tmp_path / "detections.json") and len(rows)
    assert {path.stem for path in tmp_path.glob("*.jpg")} == {path.stem for path in images.iterdir()} | {"sheet"}
    infos = {info["id"]: info for info in read(tmp_path / "images.json")["images"]}
    assert set(infos) == {int(path.stem) for path in images.iterdir()}
    for row in rows:
        info, (x, y, width, height) = infos[row["image_id"]], row["bbox"]
        assert 0 <= x <= x + width <= info["width"] + 0.01 and 0 <= y <= y + height <= info["height"] + 0.01
        assert row["file_name"] == info["file_name"] and 0.05 <= row["score"] <= 1
    truth = COCO(str(tmp_path / "images.json"))
    assert len(truth.loadRes(str(tmp_path / "detections.json")).anns) == len(rows)
    assert {truth.cats[row["category_id"]]["name"] for row in rows} == {row["category_name"] for row in rows}


def test_checkpoint_and_images_are_enough(ssd, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict.main([str(ssd), *map(str, sorted(images.iterdir())[:2])])
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 3


def test_bare_weights_with_their_labels_size_and_priors(ssd, images, tmp_path, capsys):
    """They give what the run folder gives, whose best.pt they come from."""
    words = [*sorted(images.iterdir())[:4], "--out", tmp_path / "out", "--threshold", 0.05, "--overwrite"]
    bare, labels = tmp_path / "bare.pth", (ssd.parent / "labels.txt").read_text()
    torch.save(pretrained.trained_weights(torch.load(ssd)), bare)
    (tmp_path / "labels.txt").write_text(labels)
    expected = run(ssd.parent, *words)
    assert f"{ssd.parent}: using best.pt" in capsys.readouterr().out
    assert run(bare, *words, "--size", 96, "--priors", "jetson") == expected
    assert run(bare, *words, "--size", 96, "--priors", "scaled") != expected
    with pytest.raises(WeightsError, match=r"bare.pth: bare weights do not store their priors, so --size 96 96 needs"):
        run(bare, *words, "--size", 96)


def test_only_the_given_classes_are_predicted(ssd, images, tmp_path):
    paths = sorted(images.iterdir())[:6]
    every_class = run(ssd, *paths, "--out", tmp_path, "--threshold", 0.05)
    name = min(row["category_name"] for row in every_class)
    one_class = run(ssd, *paths, "--out", tmp_path, "--overwrite", "--threshold", 0.05, "--classes", name)
    assert one_class == [row for row in every_class if row["category_name"] == name]


def test_a_damaged_image_is_reported_and_the_others_are_predicted(ssd, images, tmp_path):
    whole = min(images.iterdir())
    for name in ("good.jpg", "again.jpg"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    (tmp_path / "broken.jpg").write_bytes(whole.read_bytes()[:300])
    process = launch("predict.py", ssd, tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("broken.jpg") == 1 and "error: 1 file could not be read" in errors and "Traceback" not in errors
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"good.jpg", "again.jpg", "sheet.jpg"}
    assert {info["id"] for info in read(tmp_path / "out" / "images.json")["images"]} == {1, 2}


def test_frames_of_an_animation(ssd, tmp_path):
    frames = [Image.new("RGB", (120, 90), (10 * i, 100, 200 - 10 * i)) for i in range(5)]
    frames[0].save(tmp_path / "7.gif", save_all=True, append_images=frames[1:], duration=40)
    run(ssd, tmp_path / "7.gif", "--every", 2, "--out", tmp_path / "out")
    infos = read(tmp_path / "out" / "images.json")["images"]
    assert [(info["id"], info["frame"]) for info in infos] == [(1, 0), (2, 2), (3, 4)]
    assert (tmp_path / "out" / "7_000004.jpg").is_file()


def write_video(path, images, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB").resize((320, 240)))))
        container.mux(stream.encode(None))


def frames_of(path):
    """(frames per second, the frames [T,H,W,3]) of a video."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        return video.average_rate, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video)])


def test_a_video_in_a_video_out(ssd, images, tmp_path):
    whole = [Image.open(path) for path in sorted(images.iterdir())[:5]]
    write_video(tmp_path / "clip.mp4", [image for image in whole for _ in range(3)], 30)
    words = [tmp_path / "clip.mp4", "--every", 3, "--out", tmp_path / "out", "--batch-size", 2, "--threshold", 0.05]
    rows = run(ssd, *words, "--save-frames")
    rate, drawn = frames_of(tmp_path / "out" / "clip.mp4")
    assert rate == 10 and drawn.shape == (5, 480, 640, 3)
    infos = read(tmp_path / "out" / "images.json")["images"]
    assert [(info["id"], info["frame"]) for info in infos] == [(1, 0), (2, 3), (3, 6), (4, 9), (5, 12)]
    assert rows and {row["image_id"] for row in rows} <= {1, 2, 3, 4, 5}
    saved = [Image.open(tmp_path / "out" / f"clip_{number:06d}.jpg") for number in (0, 3, 6, 9, 12)]
    differences = [[np.abs(np.asarray(image).astype(int) - frame).mean() for frame in drawn] for image in saved]
    assert np.argmin(differences, axis=1).tolist() == [0, 1, 2, 3, 4]
    run(ssd, *words, "--overwrite")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".jpg"} == {"sheet.jpg"}


def test_ctrl_c_ends_a_stream_with_its_files_finished(ssd, tmp_path, monkeypatch):
    """A camera without an end, in which a SIGINT arrives between the frames 4 and 5."""

    def endless(source, every):
        for number in itertools.count():
            if number == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield video_input.Frame(torch.zeros(3, 48, 64, dtype=torch.uint8), number, number / 10, Fraction(10))

    monkeypatch.setattr(video_input, "read_frames", endless)
    assert run(ssd, "0", "--out", tmp_path, "--batch-size", 2, "--threshold", 1) == []
    assert len(read(tmp_path / "images.json")["images"]) == 5
    rate, drawn = frames_of(tmp_path / "camera_0.mp4")
    assert rate == 10 and len(drawn) == 5 and (tmp_path / "sheet.jpg").is_file()


def test_ctrl_c_in_a_folder_keeps_what_is_done(ssd, images, tmp_path, monkeypatch):
    detect = predict.detect

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return detect(*arguments)

    monkeypatch.setattr(predict, "detect", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(ssd, images, "--out", tmp_path, "--batch-size", 2)
    assert len(read(tmp_path / "images.json")["images"]) == 2 and read(tmp_path / "detections.json") is not None


def test_ctrl_c_in_nuscenes_keeps_the_key_frames_that_are_done(drawn, centerfusion, tmp_path, monkeypatch):
    detect_3d = predict.detect_3d

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return detect_3d(*arguments, **options)

    monkeypatch.setattr(predict, "detect_3d", interrupted)
    out, words = tmp_path / "out", ["--samples", 2, "--cache-dir", tmp_path]
    with pytest.raises(SystemExit, match="130"):
        run(centerfusion, drawn("centerfusion"), "--out", out, *words)
    assert len(read(out / "submission.json")["results"]) == 1
    assert len(list(out.glob("*.jpg"))) == 2  # one key frame and the sheet


def test_ids_of_coco_annotations(ssd, drawn, tmp_path, capsys):
    """Ids of images and categories are the file's, so that pycocotools scores the detections against it."""
    data = drawn("retinanet")
    truth = read(data / "annotations" / "instances_val2017.json")
    for number, image in enumerate(truth["images"]):
        image["id"] = 500 + number
    truth["annotations"] = []
    dropped = truth["categories"].pop(0)["name"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    words = [data / "val2017", "--annotations", tmp_path / "truth.json", "--threshold", 0.05]
    rows = run(ssd, *words, "--out", tmp_path / "out")
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    categories = {category["id"]: category["name"] for category in truth["categories"]}
    assert rows and all(row["file_name"].endswith(names[row["image_id"]]) for row in rows)
    assert all(categories[row["category_id"]] == row["category_name"] for row in rows)
    assert f"1 classes are not in {tmp_path / 'truth.json'} and left out: {dropped}\n" in capsys.readouterr().out
    assert {info["id"] for info in read(tmp_path / "out" / "images.json")["images"]} == set(names)
    coco = COCO(str(tmp_path / "truth.json"))
    assert len(coco.loadRes(str(tmp_path / "out" / "detections.json")).anns) == len(rows)


def test_retinanet_boxes_are_in_pixels_of_the_files(drawn, tmp_path):
    data = drawn("retinanet")
    Script("retinanet", data).main(tmp_path / "run", "--max-steps", 1)
    words = [tmp_path / "run/last.pt", data / "val2017", "--out", tmp_path / "out", "--threshold", 0.005]
    rows = run(*words)
    assert run(*words, "--overwrite", "--size", 96, 48) == rows  # as in training
    assert run(*words, "--overwrite", "--size", 96, 128) != rows
    boxes = torch.tensor([row["bbox"] for row in rows])
    assert len(boxes) and boxes.min() >= 0
    assert (boxes[:, 0] + boxes[:, 2]).max() > 200  # the files are 320 pixels wide


@pytest.mark.parametrize("arch", ["mb1-ssd", "retinanet_resnet18", "maskrcnn_resnet18"])
def test_limits_of_the_detections_are_those_of_the_run(arch, images, tmp_path):
    """Those of its validation, but for the score; an ONNX file has them too."""
    arguments = {"width": 32, "hidden": 32} if arch.startswith("mask") else {}
    net, limits = (
        models.build(arch, 2, **arguments),
        {"nms_iou": 0.3, "detections_per_image": 7, "score_threshold": 0.2},
    )
    sizes = {"image_size": (96, 96)} if arch == "mb1-ssd" else {"min_side": 64, "max_side": 96}
    net.classes = ["a", "b"]
    contents = {**models.describe(net, **sizes), "model": net, "flags": limits}
    checkpoint.write(tmp_path / "last.pt", contents)
    rows = run(tmp_path / "last.pt", sorted(images.iterdir())[0], "--out", tmp_path / "out", "--threshold", 0)
    assert len(rows) == 7
    loaded = models.load(tmp_path / "last.pt")
    assert loaded.nms_limits == {"score_threshold": 0.2, "iou_threshold": 0.3, "max_detections": 7}
    if not arch.startswith("mask"):
        rules = onnx.graph(loaded, (64, 64), with_nms=True).rules
        assert rules.items() >= loaded.nms_limits.items() and rules["candidates"] > 100


def test_a_classifier_predicts_five_classes(drawn, tmp_path):
    data, out = drawn("backbone"), tmp_path / "out"
    Script("backbone", data).main(tmp_path / "run", "--max-steps", 1)
    classes = models.load(tmp_path / "run/backbone.pt").classes
    for name in ("last.pt", "backbone.pt"):
        rows = run(tmp_path / "run" / name, data / "val", "--out", out, "--overwrite")
        assert rows == read(out / "classifications.json") and len(rows) == len(list((data / "val").rglob("*.jpg")))
        infos = {info["id"]: info["file_name"] for info in read(out / "images.json")["images"]}
        for row in rows:
            scores = [prediction["score"] for prediction in row["predictions"]]
            assert len(scores) == 5 and scores == sorted(scores, reverse=True) and 0.99 < sum(scores) < 1.01
            assert all(classes[prediction["label"]] == prediction["name"] for prediction in row["predictions"])
            assert infos[row["image_id"]] == row["file_name"]
    assert not (out / "detections.json").exists()
    with pytest.raises(UsageError, match="--size 32 64: a classifier's input is a square; give one number"):
        run(tmp_path / "run", data / "val", "--size", 32, 64)


def test_masks_are_run_lengths_of_the_size_of_the_file(tmp_path):
    torch.manual_seed(0)
    net = models.build("maskrcnn_resnet18", 2, width=16, hidden=16, proposals=20)
    path = write_checkpoint(tmp_path / "masks.pt", net, min_side=64, max_side=96)
    Image.effect_noise((150, 100), 80).save(tmp_path / "noise.png")
    rows = run(path, tmp_path / "noise.png", "--out", tmp_path / "out", "--threshold", 0.1)
    assert rows
    for row in rows:
        mask = coco_masks.decode(row["segmentation"])
        assert mask.shape == (100, 150)
        left, top, width, height = row["bbox"]
        mask[max(0, int(top) - 3) : int(top + height) + 4, max(0, int(left) - 3) : int(left + width) + 4] = 0
        assert mask.sum() == 0  # outside the box
    assert (tmp_path / "out" / "noise.jpg").is_file()


def test_key_frames_with_radar(drawn, centerfusion, tmp_path, capsys):
    data, path = drawn("centerfusion"), centerfusion
    out = tmp_path / "out"
    words = ["--out", out, "--samples", 1, "--cache-dir", tmp_path, "--threshold", 0]
    submission = run(path, data, *words)
    assert submission == read(out / "submission.json")
    assert submission["meta"]["use_radar"] and submission["meta"]["use_camera"]
    samples = {sample["token"] for sample in read(data / "v1.0-mini" / "sample.json")}
    assert len(submission["results"]) == 1 and set(submission["results"]) < samples
    (boxes,) = submission["results"].values()
    assert 0 < len(boxes) <= 500
    more = ["--overwrite", "--classes", "car,truck", "--split", "mini_train", "--batch-size", 4]
    selected = run(path, data, *words, *more)
    names = {box["detection_name"] for boxes in selected["results"].values() for box in boxes}
    assert names and names <= {"car", "truck"}
    assert "6 images" in capsys.readouterr().out
    with Image.open(next(out.glob("scene-*.jpg"))) as image:
        assert image.size == (3 * 806 + 906, 906)


def test_key_frames_without_radar(drawn, tmp_path):
    torch.manual_seed(0)
    path = write_checkpoint(
        tmp_path / "last.pt", models.build("centerfusion_resnet18", 10, radar=False), image_size=(64, 128)
    )
    data, out = drawn("centerfusion"), tmp_path / "out"
    submission = run(path, data, "--out", out, "--samples", 1, "--cache-dir", tmp_path, "--threshold", 0)
    assert not submission["meta"]["use_radar"] and any(submission["results"].values())
    assert len(list(out.glob("scene-*.jpg"))) == 1


def test_a_key_frame_with_a_damaged_image(drawn, centerfusion, tmp_path, monkeypatch, capsys):
    """The other five cameras are predicted and submitted."""
    load = NuScenesDataset.load

    def load_or_fail(dataset, index):
        image, target = load(dataset, index)
        if target["camera"] == "CAM_BACK":
            raise DataError("CAM_BACK.jpg", "", "is damaged", kind="image")
        return image, target

    monkeypatch.setattr(NuScenesDataset, "load", load_or_fail)
    with pytest.raises(UsageError, match="1 file could not be read"):
        run(centerfusion, drawn("centerfusion"), "--out", tmp_path, "--samples", 1)
    printed = capsys.readouterr()
    assert "CAM_BACK.jpg: is damaged" in printed.err and "5 images" in printed.out
    assert len(read(tmp_path / "submission.json")["results"]) == 1


@pytest.mark.realdata
def test_a_real_key_frame(shared, centerfusion, tmp_path):
    data, out = shared / "data/nuscenes_one_sample", tmp_path / "out"
    submission = run(centerfusion, data, "--out", out, "--cache-dir", tmp_path)
    assert len(submission["results"]) == 1 and len(list(out.glob("scene-*.jpg"))) == 1


def test_plain_images_of_a_camera_are_predicted_as_nuscenes_is(drawn, tmp_path, capsys):
    """With the camera's matrix, a network without radar finds the same 3D boxes."""
    torch.manual_seed(0)
    net = models.build("centerfusion_resnet18", 10, radar=False)
    path, data = write_checkpoint(tmp_path / "last.pt", net, image_size=(64, 128)), drawn("centerfusion")
    dataset = load_available(data, "", "", RadarOptions(0, 60.0, 0.0), tmp_path)
    image, target = dataset.load(0)
    words = ["--calib", tmp_path / "calib.json", "--out", tmp_path / "out", "--threshold", 0]
    (tmp_path / "calib.json").write_text(json.dumps(target["calib"].tolist()))
    rows = run(path, dataset.image_path(0), *words)
    device, net = distributed.init_device("cpu", "", "fp32"), models.load(path)
    (expected,) = predict.detect_3d(net, [(image, target)], device, 0, torch.arange(10))
    for name, field in (("center", "center"), ("size", "dims"), ("yaw", "yaw"), ("score", "scores")):
        assert torch.allclose(torch.tensor([row[name] for row in rows]), expected[field], atol=1e-3), name
    (info,) = read(tmp_path / "out" / "images.json")["images"]
    assert torch.equal(torch.tensor(info["calib"]), target["calib"]) and len(rows) == 100
    x, y, width, height = torch.tensor([row["bbox"] for row in rows]).T  # in pixels of the file
    cells = torch.stack([x + width / 2, y + height / 2], dim=1)
    centers, _ = project(expected["center"], target["calib"])
    assert (cells - centers).abs().max() < 2 * 800 / 128 * inference.STRIDE  # two cells: the offsets are not trained
    assert "a camera alone, without radar\n" in capsys.readouterr().out


def test_a_network_with_radar_predicts_images_without_any(drawn, centerfusion, tmp_path, capsys):
    image, matrix = min((drawn("centerfusion") / "samples" / "CAM_FRONT").iterdir()), tmp_path / "calib.txt"
    rows = run(centerfusion, image, "--out", tmp_path / "out", "--threshold", 0)
    printed = capsys.readouterr().out
    assert "trained with radar" in printed and "0.75 image widths is assumed" in printed
    assert len(rows) == 100 and (tmp_path / "out" / f"{image.stem}.jpg").is_file()
    matrix.write_text("1000 0 5000\n0 1000 50\n0 0 1\n")
    with pytest.raises(UsageError, match=r"--calib: its center \(5000, 50\) is outside the image of 800 x 450 pixels"):
        run(centerfusion, image, "--out", tmp_path / "other", "--calib", matrix)


def test_nuscenes_is_predicted_alone_and_has_no_flags_of_images(drawn, centerfusion, tmp_path):
    data = drawn("centerfusion")
    for words, message in (
        ([data, data], "give nuScenes' folder alone"),
        ([data, "--calib", "camera.txt"], "--calib: is for images and videos, and this is nuScenes' folder"),
        (
            [data / "samples" / "CAM_FRONT", "--samples", 2],
            "--samples: is for CenterFusion on nuScenes' folder, and no",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            run(centerfusion, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["IMAGES", "--classes", "disc,hedgehog"], "--classes: no class hedgehog; there are disc, .*star"),
        (["IMAGES", "--samples", "0"], "--samples: is for CenterFusion on nuScenes' folder, and this is a mb1-ssd"),
        (["IMAGES", "--calib", "FILE"], "--calib: is for CenterFusion, and this is a mb1-ssd"),
        (
            ["IMAGES", "--every", "2", "--save-frames"],
            "--every, --save-frames: is for videos and cameras, and there is",
        ),
        (["IMAGES", "--annotations", "FILE"], "FILE: is not a COCO annotation file"),
        (["99"], "99: no camera 99 can be read"),
        (["0", "IMAGES"], "0: a camera or URL may have no end; give it alone"),
        (["rtsp://127.0.0.1:9/x"], "rtsp://127.0.0.1:9/x: cannot be read: Connection refused"),
        (["IMAGES", "nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["EMPTY"], "EMPTY: no image .* in this folder"),
        (["IMAGES", "--out", "FILE"], "--out FILE: is a file; name a folder"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(ssd, images, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = {"IMAGES": images, "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file"}
    for name, path in names.items():
        message = message.replace(name, re.escape(str(path)))
    with pytest.raises((UsageError, DataError), match=message) as raised:
        run(ssd, *[names.get(word, word) for word in words], *([] if "--out" in words else ["--out", tmp_path / "out"]))
    assert "\n" not in str(raised.value)


def test_a_long_list_of_classes_is_shortened():
    names = [f"n{label}" for label in range(1000)]
    with pytest.raises(UsageError, match=r"no class dog; there are n0, .*n19, \.\.\.$"):
        predict.select_labels("n3,dog", names)
    assert predict.select_labels("n3, n1", names).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("contents", "message"),
    [(None, "no such file"), (b"", "is empty"), (b"no weights", "is not a PyTorch file")],
)
def test_an_unreadable_checkpoint_is_an_error_of_one_line(images, tmp_path, contents, message):
    path = tmp_path / "best.pt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}: {message}; ") as raised:
        run(path, images)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 10**6}, "image_size is 1000000, must be"),
        ({7: 1, "model": {7: torch.zeros(1)}}, "model is a dict"),
    ],
)
def test_a_hostile_checkpoint_is_an_error_of_one_line(ssd, images, tmp_path, capsys, changed, message):
    saved = {name: value for name, value in torch.load(ssd, weights_only=True).items() if name != "checksum"}
    torch.save({**saved, **changed}, tmp_path / "best.pt")
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: run(tmp_path / "best.pt", images))
    assert re.fullmatch(f"error: {re.escape(str(tmp_path / 'best.pt'))}: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "40"], "40 is above 1: scores are 0 to 1, and 40 % is 0.4"),
        (["--threshold", "-1"], "-1 is below 0"),
        (["--every", "0"], "0 is below 1"),
        (["--precision", "int8"], "invalid choice"),
    ],
)
def test_impossible_values_of_flags(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(["best.pt", "a.jpg", *words])
    assert f"error: argument {words[0]}: {message}" in capsys.readouterr().err
