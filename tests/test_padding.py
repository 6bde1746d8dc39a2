"""Images of several shapes: detections and losses do not depend on what else is in the batch."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

import models
import predict
from data import loader, transforms
from data.detection.dataset import Annotations, BoxDataset
from data.loader import PadCollate, Process
from losses import assignment, focal, maskrcnn
from ops import nms, rle
from ops.boxes import to_file_pixels
from ops.images import normalize
from tests import export_helpers, model_helpers
from training import distributed

pytestmark = pytest.mark.slow

SIZES = [(60, 90), (90, 60), (128, 128), (61, 95), (48, 96), (64, 90), (96, 64), (60, 91), (62, 62)]
NETWORKS = {
    "yhenon": functools.partial(models.build, "retinanet", 2, depth=18, anchors="yhenon"),
    "torchvision": functools.partial(models.build, "retinanet", 2, depth=18, anchors="torchvision"),
    "maskrcnn": functools.partial(models.build, "maskrcnn_resnet18", 2, width=32, hidden=32, proposals=40),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images of the SIZES, one object in each."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    annotations = Annotations(masks=True)
    annotations.classes = ["cat", "dog"]
    for number, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
        image, mask = annotations.add_image(folder / f"{number}.png", (height, width)), np.zeros((1, height, width))
        mask[:, 10:40, 5:50] = 1
        annotations.add_object(image, (5, 10, 50, 40), annotations.classes[number % 2], mask=rle.encode(mask)[0])
    return BoxDataset(annotations, transform=transforms.multiscale_eval(64, 96))


def make_network(name):
    torch.manual_seed(0)
    if name == "maskrcnn":
        net = model_helpers.randomize_norms(NETWORKS[name](), affine=True).eval()
    else:
        net = export_helpers.randomize(NETWORKS[name](), (96, 96))
    net.min_side, net.max_side, net.image_size = 64, 96, None
    return net


@torch.no_grad()
def evaluate(net, batches):
    """({image id: detections in pixels of the file}, sum of the losses over the images)."""
    detections, loss = {}, 0
    for images, targets in batches:
        shapes, size = [target["shape"] for target in targets], tuple(images.shape[-2:])
        pixels = normalize(images, net.image_mean, net.image_std, shapes)
        if net.name == "retinanet":
            outputs, anchors = net(pixels), net.anchors(size)
            levels = net.level_sizes(size)
            found = nms.retinanet_detections(outputs, anchors, net.box_weights, shapes, levels)
            losses = focal.loss(outputs, assignment.assign(anchors, targets.tensors, net.box_weights), 1)
        else:
            sampled = maskrcnn.SampledTargets(targets, (0, 0))
            features, proposals, outputs = net.propose(pixels, shapes)
            found = net.detect(features, proposals, shapes)
            losses = maskrcnn.loss_sums(
                outputs | net.roi_outputs(features, shapes, *sampled.sample(proposals)), sampled
            )
        loss += float(sum(losses.values()))
        detections |= {t["image_id"]: each for t, each in zip(targets, to_file_pixels(found, targets), strict=True)}
    return [detections[image_id] for image_id in sorted(detections)], loss


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["labels"].tolist() == theirs["labels"].tolist() and len(ours["labels"]) > 5
        for name, tolerance in (("scores", 1e-5), ("boxes", 1e-3), *[("masks", 1e-4)] * ("masks" in ours)):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_detections_and_losses_are_those_of_each_image_alone(name, dataset):
    """For any batch size, in two processes, and in predict.py."""
    net, collate = make_network(name), PadCollate(32)
    detections, loss = evaluate(net, loader.eval_loader(dataset, 1, collate=collate))
    for batch_size in (3, 8):
        others, other_loss = evaluate(net, loader.eval_loader(dataset, batch_size, collate=collate))
        assert_same(others, detections)
        assert other_loss == pytest.approx(loss, rel=1e-5)
    shares = [loader.eval_loader(dataset, 4, Process(rank, 2), collate) for rank in (0, 1)]
    others, other_loss = evaluate(net, [batch for share in shares for batch in share])
    assert_same(others, detections)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    images, run = [dataset.load(i)[0] for i in range(len(dataset))], distributed.init_device("cpu", precision="fp32")
    assert_same(predict.detect(net, images, run, 0.05, torch.arange(2)), detections)
    mixed, _ = evaluate(net, [collate([dataset[i] for i in range(len(dataset))])])  # what the others must not do
    with pytest.raises(AssertionError):
        assert_same(mixed, detections)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_has_one_padded_shape_and_each_image_comes_once(world_size, workers, dataset):
    collate, image_ids = PadCollate(32), []
    for rank in range(world_size):
        orders = []
        for size in (1, 2, 8):
            batches = loader.eval_loader(dataset, size * world_size, Process(rank, world_size, workers), collate)
            orders.append([])
            for images, targets in batches:
                assert len(images) <= size
                assert {collate.padded_shape(target["shape"]) for target in targets} == {tuple(images.shape[-2:])}
                orders[-1] += [target["image_id"] for target in targets]
            assert len(batches) < len(orders[-1]) or size == 1
        assert orders[0] == orders[1] == orders[2]
        image_ids += orders[0]
    assert sorted(image_ids) == list(range(len(dataset)))
