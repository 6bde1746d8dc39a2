"""Backbones from files: torchvision's, qfgaohao's, ucbdrive's, and those that train_backbone.py writes."""

import re
from pathlib import Path

import torch
import torchvision

from models.errors import WeightsError
from models.layers import IMAGENET_MEAN, IMAGENET_STD
from models.weights import family_of, fetch_file, load_strictly, open_weights, read, with_counters

# A family is known by names that no other has, those of `bare_names`; of the ResNets the first that fits.
FAMILIES = {
    "resnet152": ("layer2.7.conv3.weight", "layer3.35.conv3.weight"),
    "resnet101": ("layer3.22.conv3.weight",),
    "resnet50": ("layer3.5.conv3.weight",),
    "resnet34": ("layer3.5.conv2.weight",),
    "resnet18": ("layer1.1.conv2.weight", "layer4.1.conv2.weight"),
    "mobilenet_v1": ("0.0.weight", "13.3.weight"),
    "mobilenet_v2": ("0.0.weight", "2.conv.3.weight"),
    "squeezenet1_1": ("0.weight", "6.squeeze.weight"),
    "vgg16": ("0.weight", "26.weight"),
    "vgg16_bn": ("0.weight", "1.running_mean", "40.weight"),
    "dla34": ("base_layer.0.weight", "level2.tree1.conv1.weight"),
}
PREFIXES = ("base_net.", "features.", "model.", "backbone.body.", "base.")  # of a backbone within a larger network
NAMED = 20  # classes named in one message
WIDTHS = (
    "; train_backbone.py rounds a width's channels to 8, as torchvision, this network cuts them off, as its source: "
    "give --width-mult there and --mb2-width-mult here the same whole number, such as 1.0"
)


def load_base_net(net, path_or_state_dict):
    """Put the base net of a file into `net.base_net`; returns "162 of 162 tensors".

    Takes qfgaohao's base nets, torchvision's ImageNet state dicts, whole SSD state dicts, and checkpoints of ours.
    VGG's fc6 and fc7 are decimated from the classifier where there is one and stay fresh otherwise. Where the file
    expects images normalised in another way, its first layer is adapted. Raises WeightsError on another family.
    """
    saved, state, label = open_weights(path_or_state_dict)
    from_imagenet = any(name.startswith("features.") for name in state)
    state = bare_names(state)
    own = net.base_net.state_dict()
    needed = family_of(own, FAMILIES, net.name)
    check_family(family_of(state, FAMILIES, label), needed, label, net.name)
    state = with_counters(state, own)
    fresh = {n for n in own if needed == "vgg16" and n.startswith(("31.", "33.")) and n not in state}
    needs = {name: value for name, value in own.items() if name not in fresh}
    check_shapes(state, needs, label, net.name, WIDTHS if needed == "mobilenet_v2" else "")
    state = {name: state[name] for name in own if name not in fresh}
    if from_imagenet or "image_mean" in saved:
        mean, std = saved.get("image_mean", IMAGENET_MEAN), saved.get("image_std", IMAGENET_STD)
        adapt_input(state, mean, std, net.image_mean, net.image_std)
    net.base_net.load_state_dict(state, strict=False)
    note = "; fc6 and fc7 stay fresh" if fresh else ""
    return f"{len(state)} of {len(own)} tensors{note}"


def check_family(given, needed, label, user):
    if given != needed:
        raise WeightsError(f"{label}: holds a {given}, but {user} stands on {needed}; give a {needed} file")


def check_shapes(state, needed, label, user, remedy=""):
    """Every tensor of the dict `needed` is in `state` with the same shape; else WeightsError naming the first, with the
    `remedy`."""
    for name, value in needed.items():
        if name not in state or state[name].shape != value.shape:
            shape = list(state[name].shape) if name in state else "missing"
            raise WeightsError(f"{label}: {name} is {shape}, {user} needs {list(value.shape)}{remedy}")


def load_backbone(body, needed, path_or_state_dict, user):
    """Put the weights of a file into a detector's `body`; returns "318 of 318 tensors".

    Takes torchvision's state dicts, whole detectors that stand on the same network, and checkpoints of ours.

    needed   family, a key of FAMILIES
    user     the detector, for messages
    """
    _, state, label = open_weights(path_or_state_dict)
    state = bare_names(state)
    check_family(family_of(state, FAMILIES, label), needed, label, user)
    own = body.state_dict()
    state = with_counters(state, own)
    check_shapes(state, own, label, user)
    body.load_state_dict({name: state[name] for name in own})
    return f"{len(own)} of {len(own)} tensors"


def load_classifier(net, path_or_state_dict, exact=False):
    """Put the weights of a file into a whole classifier; returns one line that says what was taken.

    Where the names of the classes are known (`net.classes`) and the file has them all, its last layer is taken by name;
    else the last layer of other names or of another class count stays fresh. All other tensors must fit.

    exact   WeightsError where the file has other classes, or the same in another order
    """
    saved, state, label = open_weights(path_or_state_dict)
    check_family(family_of(bare_names(state), FAMILIES, label), net.name, label, "this run")
    own = net.state_dict()
    head = list(own)[-2:]  # weight and bias of the last layer
    given = len(state.get(head[1], own[head[1]]))
    classes, wanted = saved.get("classes"), getattr(net, "classes", None)
    renamed = bool(classes and wanted and classes != wanted and given == len(classes))
    if exact and (renamed or given != net.num_classes):
        raise WeightsError(f"{label}: {_other_classes(classes, wanted, given, net.num_classes)}")
    if renamed and set(wanted) <= set(classes):
        rows = [classes.index(name) for name in wanted]
        load_strictly(net, {name: value[rows] if name in head else value for name, value in state.items()}, label)
        return f"{len(own)} of {len(own)} tensors loaded, {len(wanted)} of its {given} classes by name"
    if given == net.num_classes and not renamed:
        load_strictly(net, state, label)
        return f"{len(own)} of {len(own)} tensors loaded"
    load_strictly(net, {**state, **{name: own[name] for name in head}}, label)
    names = " of other names" * (given == net.num_classes)
    counts = f"checkpoint {given} classes{names}, data {net.num_classes}"
    return f"{counts}: head re-initialised, {len(own) - len(head)} of {len(own)} tensors loaded"


def _other_classes(classes, wanted, given, count):
    """Why the classes of a file are not those of the data, both orders shown."""
    if not (classes and wanted):
        return f"holds {given} classes, the data {count}; give the data that it was trained on"
    lists = [", ".join(names[:NAMED]) + " ..." * (len(names) > NAMED) for names in (classes, wanted)]
    remedy = "give the data that it was trained on, or go on with its run by --resume"
    return f"its {given} classes are ({lists[0]}), the data's {count} ({lists[1]}); {remedy}"


def imagenet(name):
    """torchvision's ImageNet state dict of `name`, downloaded to torch.hub's folder where it is not there yet.

    The first published version of each: it is what torchvision's own detectors start from. Raises WeightsError.
    """
    if name not in torchvision.models.list_models():
        raise WeightsError(f"torchvision has no weights of {name}")
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        return read(fetch_file(url, path))
    except WeightsError as error:
        raise WeightsError(f"{error}; put it at {path}") from error


def begin_backbone(net, pretrained, weights, fetch=True, say=print, exact=False):
    """The weights that a classifier's training starts from; says what was taken. Raises WeightsError.

    pretrained   true: torchvision's ImageNet weights (see `imagenet`)
    weights      file, or "": see `load_classifier`
    fetch        false in all processes but the main one, whose weights the others get later
    exact        WeightsError where the weights are of other classes, see `load_classifier`
    """
    if pretrained and weights:
        raise WeightsError(f"--pretrained and --weights {weights}: give one of them")
    if weights:
        say(f"{weights}: {load_classifier(net, weights, exact)}")
    elif pretrained and fetch:
        try:
            say(f"ImageNet weights: {load_classifier(net, imagenet(net.name), exact)}")
        except WeightsError as error:
            raise WeightsError(f"--pretrained: {error}, or name a file with --weights") from error


def bare_names(state):
    """A state dict under the names that its backbone has alone, MobileNet v2's as qfgaohao has them."""
    for prefix in PREFIXES:
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
