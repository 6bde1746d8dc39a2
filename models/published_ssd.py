"""SSD from published files: families, the published detectors, and what a new run starts from."""

from pathlib import Path

from models import ssd
from models.errors import WeightsError
from models.published_backbones import load_base_net
from models.weights import fetch_file, load_matching, load_strictly, open_weights

URLS = {
    "mb1-ssd": "https://storage.googleapis.com/models-hao/mobilenet-v1-ssd-mp-0_675.pth",
    "mb2-ssd-lite": "https://storage.googleapis.com/models-hao/mb2-ssd-lite-mp-0_686.pth",
    "vgg16-ssd": "https://storage.googleapis.com/models-hao/vgg16-ssd-mp-0_7726.pth",
}
# A family is known by names that no other has.
FAMILIES = {
    "vgg16-ssd": ("source_layer_add_ons.0.weight", "classification_headers.0.weight"),
    "sq-ssd-lite": ("base_net.3.squeeze.weight", "classification_headers.0.0.weight"),
    "mb2-ssd-lite": ("base_net.2.conv.0.weight", "classification_headers.0.3.weight"),
    "mb1-ssd-lite": ("base_net.1.3.weight", "classification_headers.0.2.weight"),
    "mb1-ssd": ("base_net.1.3.weight", "classification_headers.0.weight"),
}
# fmt: off
VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


def outputs_of(state):
    """Number of classes in an SSD state dict, background counted; None where its last heads are missing."""
    logits, offsets = (state.get(f"{kind}_headers.5.bias") for kind in ("classification", "regression"))
    return None if logits is None or offsets is None else 4 * len(logits) // len(offsets)


def from_state(name, state, label):
    """The SSD of family `name` with the weights in `state`, class count and width taken from their shapes.

    `classes` is VOC's list where there are 20, else None; `image_size` (300, 300). Raises WeightsError.
    """
    if outputs_of(state) is None:
        raise WeightsError(f"{label}: {name} without its last heads; the file is not whole")
    arguments = {}
    if name == "mb2-ssd-lite" and "base_net.17.conv.7.weight" in state:
        arguments["width_mult"] = len(state["base_net.17.conv.7.weight"]) / 320  # the widest layer tells it best
    net = ssd.NETWORKS[name](outputs_of(state) - 1, **arguments)
    load_strictly(net, state, label)
    net.classes = list(VOC) if net.num_classes == len(VOC) else None
    net.image_size = (300, 300)
    return net


def fine_tune(net, path_or_state_dict):
    """`load_matching` from a file or dict, published or ours; returns one line that says what was taken."""
    _, state, label = open_weights(path_or_state_dict)
    try:
        taken, total, skipped = load_matching(net, state)
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from error
    line = f"{taken} of {total} tensors loaded"
    if not skipped:
        return line
    if outputs_of(state) not in (None, net.num_classes + 1):
        counts = f"checkpoint {outputs_of(state)} classes, data {net.num_classes + 1} (with background)"
        return f"{counts}: head re-initialised, {line}"
    return f"{line}, the rest is fresh: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"


def download(name, folder):
    """Fetch the published file of network `name` into `folder`; its path, or None where there is none or no way to it.

    A file already there is taken. What went wrong is printed with the URL, the path and the flag.
    """
    if name not in URLS:
        print(f"no published weights for {name}; name a file with --pretrained-ssd")
        return None
    url = URLS[name]
    path = Path(folder) / url.rsplit("/", 1)[1]
    try:
        return fetch_file(url, path)
    except WeightsError as error:
        print(f"{error}; put it at {path} or name a file with --pretrained-ssd")
        return None


def begin(net, pretrained, base_net, folder, fetch=True, say=print):
    """The weights a new run starts from; says what was taken. Raises WeightsError.

    base_net    file of a backbone, or "": see `load_base_net`
    pretrained  "none", file of a whole SSD (see `fine_tune`), or "auto": the published one of this network in `folder`,
                downloaded if it can be; without it the network stays fresh, and that is said loudly
    fetch       false in all processes but the main one, whose weights the others get later
    """
    if base_net:
        say(f"{base_net}: {load_base_net(net, base_net)} of the base net taken")
        return
    if pretrained == "auto":
        pretrained = fetch and download(net.name, folder)
        if not pretrained:
            say("WARNING: no published weights to start from: TRAINING FROM SCRATCH (--pretrained-ssd none to mean it)")
    if pretrained and pretrained != "none":
        say(f"{pretrained}: {fine_tune(net, pretrained)}")
