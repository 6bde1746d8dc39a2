"""Networks for tests of exported graphs, and comparison of their detections."""

import torch

import export
from data.loader import PadCollate
from ops import nms
from ops.images import normalize
from tests import model_helpers


def generated_images(size, count=3):
    """uint8 [count,3,H,W] of `size`."""
    return torch.stack(export.check_images("", size)[:count])


def randomize(net, size):
    """`net` in evaluation mode, with outputs that differ between images and positions, as a trained network's do.

    A new SSD has such outputs. Others need batch norm statistics of images, and RetinaNet last layers other than zeros.
    """
    if net.name.endswith(("ssd", "ssd-lite")):
        return net.eval()
    images = normalize(generated_images(size, 4), net.image_mean, net.image_std)
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
        for layer, name, std in zip(last, ("logits", "offsets"), (1, 0.1)):
            layer.weight.mul_(std / outputs[name].std())
    return net


def save_checkpoint(net, path, size, **more):
    """Write what a training run writes of `net`; returns the path as text."""
    sides = {"min_side": size[0], "max_side": size[1]} if net.name == "retinanet" else {"image_size": list(size)}
    torch.save(model_helpers.checkpoint(net, **sides, **more), path)
    return str(path)


def run_onnx(path, images, normalize_for=None, sizes=()):
    """Outputs by name of the ONNX file for uint8 images [B,3,H,W], normalized first if a network is given.

    sizes: (h, w) of each image within, for a graph that wants them
    """
    net = normalize_for
    pixels = normalize(images, net.image_mean, net.image_std) if net else images.float()
    return export.open_session(path.read_bytes())([pixels.contiguous(), *[torch.tensor(sizes).float()] * bool(sizes)])


@torch.no_grad()
def detect(net, images):
    """Detections of this program in uint8 images [B,3,H,W]."""
    size = tuple(images.shape[-2:])
    outputs, anchors = net(normalize(images, net.image_mean, net.image_std)), net.anchors(size)
    if net.name != "retinanet":
        return nms.ssd_detections(outputs, anchors, net.box_weights, size)
    return nms.retinanet_detections(outputs, anchors, net.box_weights, [size] * len(images), net.level_sizes(size))


@torch.no_grad()
def detect_alone(net, image, size):
    """Detections of a RetinaNet in the top left `size` (h, w) of an image uint8 [3,H,W], padded to multiples of 32."""
    padded = PadCollate(32).padded_shape(size)
    pixels = image[None, :, : padded[0], : padded[1]].contiguous()
    outputs, anchors = net(normalize(pixels, net.image_mean, net.image_std, [size])), net.anchors(padded)
    return nms.retinanet_detections(outputs, anchors, net.box_weights, [size], net.level_sizes(padded))[0]


def detect_in_candidates(net, outputs, size):
    """Detections in the scores and boxes of an ONNX file without NMS."""
    if net.name != "retinanet":
        return nms.multiclass_nms(outputs["scores"], outputs["boxes"], size)
    detections = []
    for scores, boxes in zip(outputs["scores"], outputs["boxes"]):
        raw = {"logits": scores.logit()[None], "offsets": torch.zeros_like(boxes)[None]}  # the boxes are the anchors
        detections += nms.retinanet_detections(raw, boxes, (1, 1, 1, 1), [size], net.level_sizes(size))
    return detections


def without_unused_rows(outputs):
    """Detections of each image in boxes [B,N,4], labels [B,N] and scores [B,N], whose unused rows have label -1."""
    used = outputs["labels"] >= 0
    return [{name: values[i][used[i]] for name, values in outputs.items()} for i in range(len(used))]


def assert_same_detections(detections, expected):
    """Each box has one of the same label within 1e-3 pixels on the other side; scores are in the same order."""
    for theirs, ours in zip(detections, expected, strict=True):
        assert len(theirs["labels"]) == len(ours["labels"]) > 0
        distance = (theirs["boxes"][:, None] - ours["boxes"]).abs().amax(-1)
        distance[theirs["labels"][:, None] != ours["labels"]] = torch.inf
        assert distance.amin(0).max() < 1e-3
        assert distance.amin(1).max() < 1e-3
        torch.testing.assert_close(theirs["scores"], ours["scores"], rtol=0, atol=1e-4)
