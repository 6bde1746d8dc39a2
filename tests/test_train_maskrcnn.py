"""train_maskrcnn.py as a person runs it, on drawn data small enough for seconds."""

import contextlib
import io
import signal

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train_backbone
import train_maskrcnn
from data import DataError, drawn
from evaluation.coco import MASK_MEASURES, MEASURES
from tests.scripts import fingerprint, last_line, launch, tensors, wait_for
from training import checkpoints
from training.flags import UsageError

SMALL = [
    "--arch",
    "maskrcnn_resnet18",
    "--weights",
    "none",
    "--min-side",
    "64",
    "--max-side",
    "96",
    "--proposals",
    "30",
]
SMALL += ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--log-level", "warning"]
LOSSES = {"objectness", "rpn_box", "classification", "box", "mask"}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return drawn.draw_pennfudan(tmp_path_factory.mktemp("drawn") / "people", images=14, seed=1)


def words(data, out, *more):
    return [*SMALL, "--data", str(data), "--model-dir", str(out), *map(str, more)]


def train(data, out, *more):
    return train_maskrcnn.main(words(data, out, *more))


def test_trains_evaluates_and_leaves_a_whole_run(people, tmp_path, capsys):
    more = ["--max-steps", 3, "--debug-steps", 1, "--ema", 0.9, "--no-freeze-bn", "--save-every-epochs", 1]
    metrics = train(people, tmp_path, *more, "--subset", 4)
    assert "ground truth scored as predictions: box AP 1.000, mask AP 1.000" in capsys.readouterr().out
    assert set(metrics) == {"loss", *LOSSES, *MEASURES, *MASK_MEASURES}
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in LOSSES))
    for name in ("last.pt", "best.pt", "epoch_001.pt", "flags.json", "metrics.jsonl", "detections.json"):
        assert (tmp_path / name).is_file(), name
    events = EventAccumulator(str(tmp_path)).Reload().Tags()
    wanted = {f"{part}/{name}" for part in ("train", "val") for name in ("loss", *LOSSES)}
    assert wanted | {"val/mask AP50", "lr"} <= set(events["scalars"])
    assert any(tag.startswith("Truth left") for tag in events["images"])
    net = models.load(tmp_path / "best.pt")
    assert (net.name, net.classes, net.min_side, net.max_side) == ("maskrcnn_resnet18", ["person"], 64, 96)


def test_the_held_out_pictures_stay(people, tmp_path):
    """Another seed of the split, or share, does not move pictures of a run that has begun."""
    train(people, tmp_path, "--max-steps", 1, "--val-share", 0.3)
    held_out = (tmp_path / "held_out.txt").read_text().split()
    assert len(held_out) == 4 and set(held_out) < {file.name for file in (people / "PNGImages").iterdir()}
    more = ["--max-steps", 1, "--split-seed", 5, "--val-share", 0.5]
    train(people, tmp_path, *more, "--resume", "auto", "--eval-only")
    assert (tmp_path / "held_out.txt").read_text().split() == held_out
    train(people, tmp_path / "other", *more)
    other = (tmp_path / "other" / "held_out.txt").read_text().split()
    assert len(other) == 7 and not set(held_out) <= set(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_and_workers_change_nothing(people, tmp_path, workers):
    more = ["--workers", workers, "--save-every-steps", 2, "--ema", 0.9, "--max-steps", 4]
    train(people, tmp_path / "whole", *more)
    train(people, tmp_path / "cut", *more, "--resume", tmp_path / "whole" / "step_000002.pt")
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    assert checkpoints.fingerprint(whole) == checkpoints.fingerprint(cut)
    torch.testing.assert_close(whole["ema"], cut["ema"], rtol=0, atol=0)
    if workers:
        train(people, tmp_path / "alone", "--ema", 0.9, "--max-steps", 4)
        assert fingerprint(tmp_path / "alone") == fingerprint(tmp_path / "whole")


def test_sigterm_saves(people, tmp_path):
    more = ["--epochs", 1000, "--validation-epochs", 1000, "--debug-steps", 1]
    process = launch("train_maskrcnn.py", *words(people, tmp_path, *more))
    wait_for(tmp_path / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert checkpoints.read(tmp_path / "last.pt")["step"] == last_line(tmp_path)["step"]


def test_two_processes_equal_one(people, tmp_path):
    """One picture in three shows nobody, so that a process's share may hold no object."""
    data = tmp_path / "data"
    for folder in ("PNGImages", "PedMasks"):
        (data / folder).mkdir(parents=True)
        for number, file in enumerate(sorted((people / folder).iterdir())):
            image = Image.open(file)
            nothing = Image.new("L", image.size) if folder == "PedMasks" and number % 3 == 0 else image
            nothing.save(data / folder / file.name)
    more = ["--max-steps", 3, "--freeze-bn", "--lr", 1e-3]
    train(data, tmp_path / "one", *more)
    process = launch("train_maskrcnn.py", *words(data, tmp_path / "two", *more), processes=2)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    torch.testing.assert_close(tensors(tmp_path / "two"), tensors(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    one, two = last_line(tmp_path / "one"), last_line(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one:
        assert two[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-4), tag


def test_a_backbone_trained_here_starts_it(people, tmp_path, capsys):
    pictures = drawn.draw_imagefolder(tmp_path / "shapes", images=20, seed=2)
    small = ["--arch", "resnet18", "--resolution", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    train_backbone.main(
        [*small, "--data", str(pictures), "--max-steps", "1", "--model-dir", str(tmp_path / "backbone")]
    )
    weights = tmp_path / "backbone" / "backbone.pt"
    more = ["--weights", weights, "--freeze-stages", 5, "--max-steps", 1, "--backbone-lr", 1e-4, "--accumulate", 2]
    train(people, tmp_path / "run", *more)
    assert "of the backbone taken" in capsys.readouterr().out
    ours, theirs = tensors(tmp_path / "run"), torch.load(weights, weights_only=True)
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(ours[f"backbone.body.{name}"], theirs.get("model", theirs)[name], rtol=0, atol=0)


def test_coco_with_masks_and_its_numbers(tmp_path):
    """The file that --eval-only leaves, scored by hand, gives the metrics: boxes and masks."""
    data = drawn.draw_coco(tmp_path / "coco", images=24, seed=1)
    more = ["--dataset", "coco", "--no-freeze-bn", "--batch-size", 4, "--lr", 0.02]
    metrics = train(data, tmp_path / "run", *more, "--max-steps", 25, "--validation-epochs", 99)
    truth = COCO(str(data / "annotations" / "instances_val2017.json"))
    cases = (("bbox", MEASURES, "detections.json"), ("segm", MASK_MEASURES, "detections_masks.json"))
    for kind, names, file in cases:
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "run" / file)), kind)
        with contextlib.redirect_stdout(io.StringIO()):
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
        assert scored.stats[8] > 0  # AR_100: something was found
        assert [metrics[name] for name in names] == pytest.approx(scored.stats.tolist(), abs=1e-12)


def test_mistakes_are_told(people, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        train(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(UsageError, match="not measured"):
        train(people, tmp_path / "run", "--monitor", "NDS")
    folder = tmp_path / "bad"
    for name in ("PNGImages", "PedMasks"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "PNGImages" / "a.png")
    Image.new("L", (30, 30)).save(folder / "PedMasks" / "a_mask.png")
    Image.new("RGB", (40, 30)).save(folder / "PNGImages" / "b.png")
    Image.new("L", (40, 30), 1).save(folder / "PedMasks" / "b_mask.png")
    Image.new("RGB", (40, 30)).save(folder / "PNGImages" / "c.png")
    Image.new("L", (40, 30), 1).save(folder / "PedMasks" / "c_mask.png")
    with pytest.raises(DataError, match=r"a_mask\.png.*30 x 30"):
        train(folder, tmp_path / "run", "--check-data")


def test_preflight_tells_the_memory_and_trains_nothing(people, tmp_path, capsys):
    assert train(people, tmp_path, "--preflight", "--accumulate", 2) == {}
    assert "memory" in capsys.readouterr().out and not list(tmp_path.iterdir())
    train(people, tmp_path, "--max-steps", 1)
    before = (tmp_path / "held_out.txt").read_bytes()
    train(people, tmp_path, "--preflight", "--overwrite", "--split-seed", 5)
    assert (tmp_path / "held_out.txt").read_bytes() == before and (tmp_path / "last.pt").exists()
