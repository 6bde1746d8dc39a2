"""Networks by name. A network maps a batch of images to raw outputs; it never sees targets.

Every network has `name`, `num_classes` and `arguments`, from which `build(name, num_classes, **arguments)` makes it
again, and `image_mean` and `image_std`, three numbers each on the 0..255 scale, RGB (CenterFusion: BGR).
"""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from models import backbones, centerfusion, maskrcnn, pretrained, retinanet, ssd
from models.pretrained import metadata
from utils import checkpoint_fields, torch_files
from utils.errors import WeightsError

# name -> function of num_classes and the network's own arguments
ARCHITECTURES = {**ssd.NETWORKS, **retinanet.NETWORKS, **centerfusion.NETWORKS, **maskrcnn.NETWORKS}
ARCHITECTURES |= backbones.NETWORKS
# limits of ops.nms -> flags that set them
NMS_FLAGS = {"score_threshold": "score_threshold", "iou_threshold": "nms_iou", "max_detections": "detections_per_image"}


def build(name: str, num_classes: int, **arguments) -> nn.Module:
    """A network with random weights for `num_classes` classes, background not counted.

    arguments by network; raises WeightsError on an unknown name or argument:
    SSD           box_sizes, a (min, max) in pixels at 300 x 300 for each map (None: as published); mb1-ssd: priors,
                  "scaled" or "jetson", their sizes at other resolutions
    MobileNet v2  width_mult, also of the SSD on it
    RetinaNet     see `retinanet.RetinaNet`
    CenterFusion  radar, threshold, max_distance, see `centerfusion.CenterFusion`
    Mask R-CNN    proposals, and of maskrcnn_resnet18 width and hidden, see `maskrcnn.MaskRCNN`
    """
    if name not in ARCHITECTURES:
        raise WeightsError(f"unknown network {name!r}; known are {', '.join(ARCHITECTURES)}")
    known = list(inspect.signature(ARCHITECTURES[name]).parameters)[1:]
    for argument in arguments:
        if argument not in known:
            raise WeightsError(f"{name} has no argument {argument!r}; it has {', '.join(known) or 'none'}")
    return ARCHITECTURES[name](num_classes, **arguments)


def describe(net: nn.Module, **sizes) -> dict:
    """What a checkpoint stores about `net`, as plain values, so that `load` can build it.

    sizes: `image_size` (h, w), or `min_side` and `max_side`, of the images in evaluation. WeightsError for one that
    `load` would refuse
    """
    for name, size in sizes.items():
        if not checkpoint_fields.FIELDS[name].fits(size):
            raise WeightsError(f"{name} {size} of this run: must be {checkpoint_fields.FIELDS[name].text}")
    names = ("num_classes", "arguments", "classes", "image_mean", "image_std")
    return {"architecture": net.name, **{name: getattr(net, name) for name in names}, **sizes}


def summary(net: nn.Module) -> str:
    """Name and size of a network, for the console."""
    return f"{net.name}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters"


def load(path: str | Path, labels: str | Path = "", size: Sequence[int] | None = None, priors: str = "") -> nn.Module:
    """The network in a checkpoint of ours or a published file, in evaluation mode, on the CPU.

    labels   file of class names, one per line, instead of those in the file or in a labels.txt beside bare weights
    size     `image_size` instead of that in the file. It does not change `min_side` and `max_side`
    priors   "scaled" or "jetson", see `build`: of bare mb1-ssd weights, needed where `size` is not 300 x 300

    Averaged weights are used if there are any. The network gets `classes` (names in label order, None if unknown),
    either `image_size` (height, width) or, with None as `image_size`, `min_side` and `max_side`, and `nms_limits`, the
    score_threshold, iou_threshold and max_detections of the run, as far as the file has them. Raises WeightsError, and
    DataError for a labels file.
    """
    saved = torch_files.read(path)
    bare = "architecture" not in saved
    net = pretrained.load(saved, source=path) if bare else _from_checkpoint(saved, path)
    flags = {} if bare else saved.get("flags") or {}
    net.nms_limits = {name: flags[flag] for name, flag in NMS_FLAGS.items() if flag in flags}
    metadata.apply(net, path, bare, labels, size, priors)
    return net


def _from_checkpoint(saved, path):
    if saved["format_version"] > torch_files.FORMAT_VERSION:
        raise WeightsError(f"{path}: format version {saved['format_version']} is newer than this program; update it")
    if saved.get("ema"):
        print(f"{path}: using the averaged weights")
    _, state, _ = pretrained.open_weights(saved, path)
    new = functools.partial(build, saved["architecture"], saved["num_classes"], **saved["arguments"])
    net = pretrained.build_strictly(new, state, path)
    net.classes = list(saved["classes"])
    net.image_size = None
    if "min_side" in saved:
        net.min_side, net.max_side = saved["min_side"], saved["max_side"]
    else:
        size = saved.get("image_size", 300)  # early checkpoints have one number, or none
        net.image_size = (size, size) if isinstance(size, int) else tuple(size)
    return net.eval()
