"""Networks by name: a network maps a batch of images to raw outputs and knows no target.

Every network has `name`, `num_classes`, `arguments` (`build(name, num_classes, **arguments)` makes it again),
`image_mean` and `image_std` (three numbers each, on the 0..255 scale, in RGB or, where `channels` is "bgr", in BGR).
"""

import inspect

from models import backbones, centerfusion, maskrcnn, published, retinanet, ssd
from models.errors import WeightsError

__all__ = ["ARCHITECTURES", "WeightsError", "build", "describe", "load", "published"]

# name -> function of num_classes and the network's own arguments
ARCHITECTURES = {**ssd.NETWORKS, "retinanet": retinanet.RetinaNet, **centerfusion.NETWORKS, **maskrcnn.NETWORKS}
ARCHITECTURES |= backbones.NETWORKS
FORMAT_VERSION = 1


def build(name, num_classes, **arguments):
    """A network with fresh weights for `num_classes` classes, background not counted.

    arguments: of the SSDs `box_sizes` (a (min, max) in pixels at 300 x 300 for each map, scaled with the image; None:
    as published); of MobileNet v2's `width_mult`; of retinanet those of `retinanet.RetinaNet`; of the
    centerfusions `radar`, `threshold`, `max_distance` (see `centerfusion.CenterFusion`); of the maskrcnns `proposals`,
    of the small one also `width` and `hidden` (see `maskrcnn.MaskRCNN`). Raises WeightsError on an unknown name or
    argument.
    """
    if name not in ARCHITECTURES:
        raise WeightsError(f"unknown network {name!r}; known are {', '.join(ARCHITECTURES)}")
    known = list(inspect.signature(ARCHITECTURES[name]).parameters)[1:]
    for argument in arguments:
        if argument not in known:
            raise WeightsError(f"{name} takes no {argument!r}; it takes {', '.join(known) or 'no argument'}")
    return ARCHITECTURES[name](num_classes, **arguments)


def describe(net):
    """What a checkpoint says of `net`, for `build` and for whoever feeds it pictures: a dict of plain values."""
    names = ("num_classes", "arguments", "classes", "image_mean", "image_std")
    return {"architecture": net.name, **{name: getattr(net, name) for name in names}}


def load(path):
    """The network of a checkpoint of ours, or of a published file, in evaluation mode on the CPU; no flag needed.

    Averaged weights are used where the checkpoint has them. The network gets `classes` (names in label order; None for
    a published file of unknown names) and `image_size` (height, width); a network that takes pictures of any shape gets
    `min_side` and `max_side` instead, and None as `image_size`. Raises WeightsError.
    """
    saved = published.read(path)
    if "architecture" not in saved:
        return published.load(saved, source=path)
    missing = [key for key in ("format_version", "arguments", "num_classes", "classes", "model") if key not in saved]
    if missing:
        raise WeightsError(f"{path}: not a whole checkpoint, it lacks {', '.join(missing)}; use another copy")
    if saved["format_version"] > FORMAT_VERSION:
        raise WeightsError(f"{path}: format version {saved['format_version']} is newer than this program; update it")
    net = build(saved["architecture"], saved["num_classes"], **saved["arguments"])
    if saved.get("ema"):
        print(f"{path}: using the averaged weights")
    published.load_strictly(net, published.trained_weights(saved), path)
    net.classes = list(saved["classes"])
    size = saved.get("image_size", None if "min_side" in saved else 300)
    net.image_size = (size, size) if isinstance(size, int) else size and tuple(size)
    if "min_side" in saved:
        net.min_side, net.max_side = saved["min_side"], saved["max_side"]
    return net.eval()
