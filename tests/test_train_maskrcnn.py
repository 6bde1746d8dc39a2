"""What train_maskrcnn.py alone does; tests/test_scripts.py has what all scripts do."""

import contextlib
import io
import json

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import models
from evaluation import coco
from evaluation.detection import MASK_MEASURES, MEASURES
from tests.script_helpers import Script, last
from utils.errors import DataError

pytestmark = pytest.mark.slow

LOSSES = {"objectness", "rpn_box", "classification", "box", "mask"}


@pytest.fixture
def script(drawn):
    return Script("maskrcnn", drawn("maskrcnn"))


def test_boxes_masks_and_losses_are_measured(script, tmp_path, capsys):
    more = ["--max-steps", 3, "--no-freeze-bn", "--save-every-epochs", 1, "--subset", 4]
    more += ["--score-threshold", 0, "--max-detections", 2]
    metrics = script.main(tmp_path, *more)
    assert "ground truth scored as predictions: AP 1.000, mask AP 1.000, mAP 1.000 (area" in capsys.readouterr().out
    assert set(metrics) == {"loss", *LOSSES, *MEASURES, *MASK_MEASURES, "AP/person", "AP_11point/person"}
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in LOSSES))
    assert (tmp_path / "epoch_001.pt").is_file()
    images = [row["image_id"] for row in json.loads((tmp_path / "detections.json").read_text())]
    assert max(images.count(image) for image in images) == 2
    header = (tmp_path / "per_class.csv").read_text().splitlines()[0]
    assert header.endswith("COCO_AP,COCO_AP50,COCO_mask_AP,COCO_mask_AP50") and (tmp_path / "confusion.csv").is_file()
    net = models.load(tmp_path / "last.pt")
    assert (net.name, net.classes, net.min_side, net.max_side) == ("maskrcnn_resnet18", ["person"], 64, 96)


def test_the_validation_images_of_a_run_do_not_change(script, tmp_path):
    """Another seed or share of the split does not move images of a run that is resumed."""
    script.main(tmp_path, "--max-steps", 1, "--val-share", 0.3)
    names = (tmp_path / "held_out.txt").read_text().split()
    assert len(names) == 4 and set(names) < {file.name for file in (script.data / "PNGImages").iterdir()}
    more = ["--max-steps", 1, "--split-seed", 5, "--val-share", 0.5]
    script.main(tmp_path, *more, "--resume", "auto", "--eval-only")
    assert (tmp_path / "held_out.txt").read_text().split() == names
    script.main(tmp_path / "further", *more, "--resume", tmp_path / "last.pt", "--epochs", 9)
    assert (tmp_path / "further" / "held_out.txt").read_text().split() == names
    script.main(tmp_path / "other", *more)
    others = (tmp_path / "other" / "held_out.txt").read_text().split()
    assert len(others) == 7 and not set(names) <= set(others)


def test_published_weights_freeze_two_stages_as_in_torchvision(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.module.pretrained, "init_weights", lambda *_, **__: True)
    for steps, more in ((1, ["--warmup-steps", 3]), (2, [])):  # the resumed run does not load them, and keeps its flags
        script.main(tmp_path, "--max-steps", steps, "--resume", "auto", "--save-every-steps", 1, *more)
        flags = last(tmp_path)["flags"]
        assert (flags["freeze_stages"], flags["warmup_steps"]) == (2, 3)
    first, second = (torch.load(tmp_path / f"step_00000{step}.pt", weights_only=True)["model"] for step in (1, 2))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and not [
        name for name in changed if name.startswith(("backbone.body.conv1", "backbone.body.layer1"))
    ]


def test_a_backbone_trained_here_starts_it(script, drawn, tmp_path, capsys):
    Script("backbone", drawn("backbone")).main(tmp_path / "backbone", "--max-steps", 1)
    file = tmp_path / "backbone" / "backbone.pt"
    more = ["--weights", file, "--freeze-stages", 5, "--max-steps", 1, "--backbone-lr", 1e-4, "--accumulate", 2]
    script.main(tmp_path / "run", *more)
    assert "of the backbone loaded" in capsys.readouterr().out
    ours, theirs = last(tmp_path / "run")["model"], torch.load(file, weights_only=True)["model"]
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(ours[f"backbone.body.{name}"], theirs[name], rtol=0, atol=0)


def test_the_numbers_on_coco_are_those_of_pycocotools_on_the_written_files(script, drawn, tmp_path):
    """Without a score threshold, so that a hardly trained network detects something on every machine."""
    data = drawn("retinanet")
    more = ["--dataset", "coco", "--no-freeze-bn", "--batch-size", 4, "--lr", 0.02, "--warmup-steps", 0]
    more += ["--score-threshold", 0]
    metrics = script.main(tmp_path / "run", *more, "--max-steps", 25, "--validation-epochs", 99, data=data)
    truth = COCO(str(data / "annotations" / "instances_val2017.json"))
    cases = (("bbox", coco.MEASURES, "detections.json"), ("segm", MASK_MEASURES, "detections_masks.json"))
    for kind, names, file in cases:
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "run" / file)), kind)
        with contextlib.redirect_stdout(io.StringIO()):
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
        assert scored.stats[8] > 0  # AR_100: something was detected
        assert [metrics[name] for name in names] == pytest.approx(scored.stats.tolist(), abs=1e-12)


def test_a_mask_of_another_size_than_its_image_is_an_error(script, tmp_path):
    folder = tmp_path / "data"
    for name in ("PNGImages", "PedMasks"):
        (folder / name).mkdir(parents=True)
    for name, size in (("a", (30, 30)), ("b", (40, 30)), ("c", (40, 30))):
        Image.new("RGB", (40, 30)).save(folder / "PNGImages" / f"{name}.png")
        Image.new("L", size, 1).save(folder / "PedMasks" / f"{name}_mask.png")
    with pytest.raises(DataError, match=r"a_mask\.png.*30 x 30"):
        script.main(tmp_path / "run", "--check-data", data=folder)


def test_a_missing_folder(script, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        script.main(tmp_path / "run", data=tmp_path / "nowhere")


def test_preflight_does_not_split_the_data_anew(script, tmp_path):
    script.main(tmp_path, "--max-steps", 1)
    before = (tmp_path / "held_out.txt").read_bytes()
    script.main(tmp_path, "--preflight", "--overwrite", "--split-seed", 5)
    assert (tmp_path / "held_out.txt").read_bytes() == before
