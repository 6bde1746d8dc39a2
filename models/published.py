"""Weights from elsewhere: published SSD checkpoints, ImageNet base nets, and checkpoints with another class count.

A file is read with `weights_only=True`, always. What does not fit is a WeightsError of one line.
"""

import pickle
import re
import socket
from pathlib import Path

import torch

from models import ssd
from models.errors import WeightsError

URLS = {
    "mb1-ssd": "https://storage.googleapis.com/models-hao/mobilenet-v1-ssd-mp-0_675.pth",
    "mb2-ssd-lite": "https://storage.googleapis.com/models-hao/mb2-ssd-lite-mp-0_686.pth",
    "vgg16-ssd": "https://storage.googleapis.com/models-hao/vgg16-ssd-mp-0_7726.pth",
}
CONNECT_SECONDS = 10

# A family is known by names that no other has.
SSD_FAMILIES = {
    "vgg16-ssd": ("source_layer_add_ons.0.weight", "classification_headers.0.weight"),
    "sq-ssd-lite": ("base_net.3.squeeze.weight", "classification_headers.0.0.weight"),
    "mb2-ssd-lite": ("base_net.2.conv.0.weight", "classification_headers.0.3.weight"),
    "mb1-ssd-lite": ("base_net.1.3.weight", "classification_headers.0.2.weight"),
    "mb1-ssd": ("base_net.1.3.weight", "classification_headers.0.weight"),
}
BASE_FAMILIES = {
    "mobilenet_v1": ("0.0.weight", "13.3.weight"),
    "mobilenet_v2": ("0.0.weight", "2.conv.3.weight"),
    "squeezenet1_1": ("0.weight", "6.squeeze.weight"),
    "vgg16": ("0.weight", "26.weight"),
}
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# fmt: off
VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


def read(path):
    """The dict in file `path`, tensors on the CPU; raises WeightsError if there is none or it cannot be trusted."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise WeightsError(f"{path}: damaged, or no weights file; fetch it again") from error
        raise WeightsError(
            f"{path}: holds a whole pickled object, and loading it would run code; save its state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or no weights file; fetch it again") from error
    if not isinstance(saved, dict):
        raise WeightsError(f"{path}: holds a {type(saved).__name__}, not a dict of tensors")
    return saved


def trained_weights(saved):
    """The state dict in what `read` gave: averaged weights of ours before plain ones; names without `module.`."""
    if saved.get("ema"):
        saved = saved["ema"]
    for key in ("model", "state_dict"):
        if isinstance(saved.get(key), dict):
            saved = saved[key]
            break
    return {name.removeprefix("module."): value for name, value in saved.items() if torch.is_tensor(value)}


def open_weights(path_or_state_dict, source=None):
    """(dict as read, state dict, name for messages)."""
    saved = path_or_state_dict if isinstance(path_or_state_dict, dict) else read(path_or_state_dict)
    label = source or ("state dict" if saved is path_or_state_dict else path_or_state_dict)
    return saved, trained_weights(saved), str(label)


def family_of(state, families, label):
    """Name of the family whose marks are all in `state`; raises WeightsError with the first keys otherwise."""
    for name, marks in families.items():
        if all(mark in state for mark in marks):
            return name
    first = ", ".join(list(state)[:3]) or "no tensors"
    raise WeightsError(f"{label}: unknown weights (first keys: {first}); known families: {', '.join(families)}")


def with_counters(state, own):
    """`state` and, from `own`, the step counters of batch norm that files before torch 0.4.1 lack."""
    missing = [name for name in own if name.endswith("num_batches_tracked") and name not in state]
    return {**state, **{name: own[name] for name in missing}}


def load_strictly(net, state, label):
    """Every tensor of the file goes into the network and the other way round; else WeightsError naming the first."""
    own = net.state_dict()
    state = with_counters(state, own)
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise WeightsError(f"{label}: {len(wrong)} tensors do not fit {net.name}, the first: {wrong[0]}")
    net.load_state_dict(state)


def outputs_of(state):
    """Number of classes in an SSD state dict, background counted; None where its last heads are missing."""
    logits, offsets = (state.get(f"{kind}_headers.5.bias") for kind in ("classification", "regression"))
    return None if logits is None or offsets is None else 4 * len(logits) // len(offsets)


def load(path_or_state_dict, source=None):
    """The SSD network of a published file or state dict, loaded strictly, in evaluation mode.

    The family is known by its keys, class count and width by the shapes; names may begin with `module.`. `classes` is
    VOC's list where there are 20, else None; `image_size` (300, 300). source: name for messages. Raises WeightsError.
    """
    _, state, label = open_weights(path_or_state_dict, source)
    name = family_of(state, SSD_FAMILIES, label)
    if outputs_of(state) is None:
        raise WeightsError(f"{label}: {name} without its last heads; the file is not whole")
    arguments = {}
    if name == "mb2-ssd-lite" and "base_net.17.conv.7.weight" in state:
        arguments["width_mult"] = len(state["base_net.17.conv.7.weight"]) / 320  # the widest layer tells it best
    net = ssd.NETWORKS[name](outputs_of(state) - 1, **arguments)
    load_strictly(net, state, label)
    net.classes = list(VOC) if net.num_classes == len(VOC) else None
    net.image_size = (300, 300)
    return net.eval()


def load_base_net(net, path_or_state_dict):
    """Put the base net of a file into `net.base_net`; returns "162 of 162 tensors".

    Takes qfgaohao's base nets, torchvision's ImageNet state dicts, whole SSD state dicts, and checkpoints of ours.
    VGG's fc6 and fc7 are decimated from the classifier where there is one and stay fresh otherwise. Where the file
    expects images normalised in another way, its first layer is adapted. Raises WeightsError on another family.
    """
    saved, state, label = open_weights(path_or_state_dict)
    from_imagenet = any(name.startswith("features.") for name in state)
    state = base_names(state)
    own = net.base_net.state_dict()
    needed, given = family_of(own, BASE_FAMILIES, net.name), family_of(state, BASE_FAMILIES, label)
    if given != needed:
        raise WeightsError(f"{label}: holds a {given}, but {net.name} stands on {needed}; give a {needed} file")
    state = with_counters(state, own)
    fresh = {n for n in own if needed == "vgg16" and n.startswith(("31.", "33.")) and n not in state}
    for name, value in own.items():
        if name not in fresh and (name not in state or state[name].shape != value.shape):
            shape = list(state[name].shape) if name in state else "missing"
            raise WeightsError(f"{label}: {name} is {shape}, {net.name} needs {list(value.shape)}")
    state = {name: state[name] for name in own if name not in fresh}
    if from_imagenet or "image_mean" in saved:
        mean, std = saved.get("image_mean", IMAGENET_MEAN), saved.get("image_std", IMAGENET_STD)
        adapt_input(state, mean, std, net.image_mean, net.image_std)
    net.base_net.load_state_dict(state, strict=False)
    note = "; fc6 and fc7 stay fresh" if fresh else ""
    return f"{len(state)} of {len(own)} tensors{note}"


def base_names(state):
    """Names and shapes of any known file as `net.base_net` has them."""
    for prefix in ("base_net.", "features.", "model."):
        if any(name.startswith(prefix) for name in state):
            inner = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            classifier = {n: v for n, v in state.items() if n.startswith("classifier.")}
            state = {**inner, **vgg_decimated(classifier)}
            break
    if any(re.fullmatch(r"\d+\.conv\.\d\.\d\.\w+", name) for name in state):
        state = {torchvision_v2_name(name): value for name, value in state.items()}
    return state


def torchvision_v2_name(name):
    """torchvision nests conv, BN, ReLU in threes inside a MobileNet v2 block; qfgaohao's names are flat."""
    parts = name.split(".")
    if "conv" not in parts:
        return name
    block, _, index, *rest = parts
    nested = 1 if block == "1" else 2  # the first block does not widen
    if int(index) < nested:
        return ".".join([block, "conv", str(3 * int(index) + int(rest[0])), *rest[1:]])
    return ".".join([block, "conv", str(2 * nested + int(index)), *rest])


def vgg_decimated(classifier):
    """fc6 and fc7 of SSD out of VGG16's classifier (Liu et al. 2016): every 4th unit, every 3rd row and column."""
    if "classifier.0.weight" not in classifier or classifier["classifier.0.weight"].shape != (4096, 25088):
        return {}
    fc6 = classifier["classifier.0.weight"].reshape(4096, 512, 7, 7)
    return {
        "31.weight": fc6[::4, :, ::3, ::3],
        "31.bias": classifier["classifier.0.bias"][::4],
        "33.weight": classifier["classifier.3.weight"][::4, ::4, None, None],
        "33.bias": classifier["classifier.3.bias"][::4],
    }


def adapt_input(state, old_mean, old_std, new_mean, new_std):
    """Change the first layer in `state` so that images normalised in the new way give what old ones gave.

    VGG needs it most: pixels of +-128 in a net made for +-2 would make every later activation 60 times too large.
    x_old = x_new * new_std / old_std + (new_mean - old_mean) / old_std; the constant goes into the bias, or out of the
    batch norm's mean. Exact but for the padded border.
    """
    first, norm = ("0.0", "0.1") if "0.0.weight" in state else ("0", None)
    weight = state[f"{first}.weight"]
    old_mean, old_std, new_mean, new_std = (weight.new_tensor(v) for v in (old_mean, old_std, new_mean, new_std))
    constant = (weight.sum((2, 3)) * (new_mean - old_mean) / old_std).sum(1)  # [C]
    state[f"{first}.weight"] = weight * (new_std / old_std)[:, None, None]
    if norm:
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - constant
    else:
        state[f"{first}.bias"] = state[f"{first}.bias"] + constant


def load_matching(net, state):
    """Load the tensors of `state` that `net` has by name and shape, for fine-tuning; the others stay as they are.

    Returns (number taken, number the network has, names not taken). Below half is a WeightsError.
    """
    own = net.state_dict()
    state = with_counters(trained_weights(state), own)
    taken = {name: state[name] for name, value in own.items() if name in state and state[name].shape == value.shape}
    skipped = [name for name in own if name not in taken]
    if 2 * len(taken) < len(own):
        raise WeightsError(
            f"only {len(taken)} of {len(own)} tensors fit {net.name}, the first that does not: {skipped[0]}; "
            "is it a checkpoint of another network?"
        )
    net.load_state_dict(taken, strict=False)
    return len(taken), len(own), skipped


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
    if path.is_file():
        return path
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub has no argument for it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)  # a temporary file beside it, then moved
    except OSError as error:  # URLError is one
        print(f"cannot fetch {url} ({error}); put it at {path} or name a file with --pretrained-ssd")
        return None
    finally:
        socket.setdefaulttimeout(before)
    return path


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
