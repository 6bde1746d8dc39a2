"""Networks that tests export, and what they compare."""

import torch

import export
import models
from ops import suppress
from ops.images import normalize


def lively(net, size):
    """`net` with answers that tell pictures and places apart, as a trained one's do, in evaluation mode.

    A fresh SSD has them. Others need batch norm statistics of pictures, and a RetinaNet last layers other than zeros.
    """
    if hasattr(net, "box_weights") and net.name != "retinanet":
        return net.eval()
    images = normalize(torch.stack(export.real_pictures("", size)), net.image_mean, net.image_std)
    last = []
    if net.name == "retinanet":
        last = [net.head["classification_head"].cls_logits, net.head["regression_head"].bbox_reg]
    for layer in last:
        torch.nn.init.normal_(layer.weight)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(images)
        outputs = net.eval()(images)
        for layer, name, spread in zip(last, ("logits", "offsets"), (1, 0.1)):
            layer.weight.mul_(spread / outputs[name].std())
    return net


def checkpoint(net, path, size, **more):
    """What a training run writes of `net`, as far as models.load reads it."""
    net.classes = [f"thing {label}" for label in range(net.num_classes)]
    sides = {"min_side": size[0], "max_side": size[1]} if net.name == "retinanet" else {"image_size": list(size)}
    torch.save({"format_version": 1, **models.describe(net), **sides, "model": net.state_dict(), **more}, path)
    return str(path)


def run_file(path, images, normalised=None):
    """Outputs by name of the file for uint8 images [B,3,H,W]; normalised: the network whose normalisation it wants."""
    pixels = normalize(images, normalised.image_mean, normalised.image_std) if normalised else images.float()
    return export.open_session(path.read_bytes())([pixels.contiguous()])


@torch.no_grad()
def detections_of(net, images):
    """Ours, of uint8 images [B,3,H,W]."""
    size = tuple(images.shape[-2:])
    outputs, anchors = net(normalize(images, net.image_mean, net.image_std)), net.anchors(size)
    if net.name != "retinanet":
        return suppress.from_multibox(outputs, anchors, net.box_weights, size)
    return suppress.from_pyramid(outputs, anchors, net.box_weights, [size] * len(images), net.level_sizes(size))


def detections_in(net, found, size):
    """Detections in the scores and boxes of a file without suppression."""
    if net.name != "retinanet":
        return suppress.detections(found["scores"], found["boxes"], size)
    detections = []
    for scores, boxes in zip(found["scores"], found["boxes"]):
        outputs = {"logits": scores.logit()[None], "offsets": torch.zeros_like(boxes)[None]}  # the boxes are anchors
        detections += suppress.from_pyramid(outputs, boxes, (1, 1, 1, 1), [size], net.level_sizes(size))
    return detections


def assert_same_detections(found, expected):
    """Each has its like in the other: box within 1e-3 pixels, label exactly. Equal scores come in any order."""
    for theirs, ours in zip(found, expected, strict=True):
        assert len(theirs["labels"]) == len(ours["labels"]) > 0
        apart = (theirs["boxes"][:, None] - ours["boxes"]).abs().amax(-1)
        apart[theirs["labels"][:, None] != ours["labels"]] = torch.inf
        assert apart.amin(0).max() < 1e-3
        assert apart.amin(1).max() < 1e-3
        torch.testing.assert_close(theirs["scores"], ours["scores"], rtol=0, atol=1e-4)
