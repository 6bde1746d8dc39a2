"""The flags about the detections of a 2D detector and their score."""

import importlib
import inspect

import pytest

import models
from ops import nms
from training import cli

SCRIPTS = ("train_ssd", "train_retinanet", "train_maskrcnn")


def parse(name, *words):
    return importlib.import_module(name).parse_args([str(word) for word in words])


def test_the_defaults_are_those_of_predictions():
    functions = {"train_ssd": nms.ssd_detections, "train_retinanet": nms.retinanet_detections}
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters
        limits = cli.detection_limits(parse(name))
        assert limits == {key: parameters[key].default for key in limits}
    heads = models.build("maskrcnn_resnet18", 1).roi_heads
    limits = cli.detection_limits(parse("train_maskrcnn"))
    assert list(limits.values()) == [heads.score_thresh, heads.nms_thresh, heads.detections_per_img]


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_2d_detectors_have_them(name):
    words = "--score_threshold 0.3 --nms-iou 0.6 --max-detections 300 --iou_threshold 0.7 --use_2007_metric True"
    args = parse(name, *words.split())
    assert cli.detection_limits(args) == {"score_threshold": 0.3, "iou_threshold": 0.6, "max_detections": 300}
    assert cli.score_options(args, str) == {"iou": 0.7, "use_2007": True}
    assert parse(name, "--use-2007-metric").use_2007_metric and not parse(name).use_2007_metric
    with pytest.raises(SystemExit):
        parse(name, "--iou-threshold", 0)


def test_voc_data_gets_results_files():
    options = cli.score_options(parse("train_ssd", "--dataset", "voc", "--voc-offset", 0), str)
    assert options["image_path"] is str and options["offset"] == 0
