"""predict.py and export.py with the checkpoint of a run on a GPU."""

import json

import pytest
import torch

import export
import models
import predict
from tests.gpu.conftest import DEVICE
from tests.script_helpers import FLAGS

IMAGES = {"backbone": "val", "retinanet": "val2017", "ssd": "JPEGImages", "centerfusion": "", "maskrcnn": "PNGImages"}


def scored_boxes(result):
    """{(image, class): float64 [N,4], numbers that describe each box} of what predict.main returned."""
    boxes = {}
    if isinstance(result, dict):  # nuScenes' submission
        rows = [(token, row["detection_name"], row) for token, each in result["results"].items() for row in each]
        values = [[*row["translation"], row["detection_score"]] for *_, row in rows]
    else:
        rows = [(row["image_id"], row["category_id"], row) for row in result]
        values = [[*row["bbox"][:3], row["score"]] for row in result]
    for (image, label, _), value in zip(rows, values, strict=True):
        boxes.setdefault((image, label), []).append(value)
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in boxes.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_predictions_are_the_cpus(name, drawn, trained, tmp_path):
    """Nearly all: where two scores are almost the same, NMS and the maximum number of boxes may select another."""
    words = [trained(name, "bf16").out / "last.pt", drawn(name) / IMAGES[name], "--precision", "fp32", "--threshold", 0]
    words += ["--samples", 2] if name == "centerfusion" else []
    device, cpu = (
        json.loads(
            predict.main([str(word) for word in (*words, "--device", each, "--out", tmp_path / each)]).read_text()
        )
        for each in (DEVICE, "cpu")
    )
    assert len(list((tmp_path / DEVICE).glob("*.jpg"))) > 1
    if name == "backbone":
        for row, expected in zip(device, cpu, strict=True):
            scores, others = ({p["label"]: p["score"] for p in r["predictions"]} for r in (row, expected))
            assert scores == pytest.approx(others, abs=1e-3)
        return
    found, expected = scored_boxes(device), scored_boxes(cpu)
    count = sum(map(len, expected.values()))
    assert count > 0
    missing = torch.zeros(1, 4, dtype=torch.float64)
    near = [(torch.cdist(each, found.get(key, missing - 1e9)) < 0.05).any(1) for key, each in expected.items()]
    assert torch.cat(near).double().mean() > 0.95
    assert sum(map(len, found.values())) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("name", FLAGS)
def test_export(name, trained, tmp_path):
    """export.py compares the outputs of the ONNX file with the network's."""
    given = str(trained(name, "bf16").out / "last.pt")
    if name == "maskrcnn":  # not as ONNX
        assert export.main([given, "--state-dict", str(tmp_path / "net.pth")]) == {"weights": 0}
    else:
        more = ["--size", "64", "96"] if name == "retinanet" else []
        assert export.main([given, "--out", str(tmp_path / "net.onnx"), "--tolerance", "1e-2", *more])
        assert (tmp_path / "net.onnx").stat().st_size > 1e5
    assert all(not value.is_cuda for value in models.load(given).state_dict().values())
