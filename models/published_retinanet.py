"""RetinaNet from published files, yhenon's and torchvision's, and what a new run starts from."""

import re

from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from models.errors import WeightsError
from models.published_backbones import FAMILIES as BACKBONES
from models.published_backbones import bare_names, imagenet, load_backbone
from models.retinanet import SHAPES, RetinaNet
from models.weights import family_of, load_matching, load_strictly, open_weights

# A family is known by names that no other has.
FAMILIES = {
    "torchvision": ("head.classification_head.cls_logits.weight", "backbone.body.layer1.0.conv1.weight"),
    "yhenon": ("classificationModel.output.weight", "fpn.P5_1.weight", "layer1.0.conv1.weight"),
}
SIDES = {"torchvision": (800, 1333), "yhenon": (608, 1024)}  # shortest and longest side of their pictures
COCO_IDS = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # a class is its COCO id; 11 ids are unused
COCO = [name for name in COCO_IDS if name not in ("__background__", "N/A")]
NORM_EPS = 1e-5
LOGITS = "head.classification_head.cls_logits"
# Patterns of names in published files -> a function of the match that gives ours, which are torchvision's of today.
RENAMED = {
    # torchvision before 0.14, and the files of that time
    r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(\w+)": lambda m: f"{m[1]}.0.{m[2]}",
    r"(head\.\w+\.conv)\.(\d)\.(\w+)": lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}",
    # yhenon
    r"((?:conv1|bn1|layer\d)\..+)": lambda m: f"backbone.body.{m[1]}",
    r"fpn\.P([345])_1\.(\w+)": lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 3}.0.{m[2]}",
    r"fpn\.P([345])_2\.(\w+)": lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 3}.0.{m[2]}",
    r"fpn\.P([67])(?:_2)?\.(\w+)": lambda m: f"backbone.fpn.extra_blocks.p{m[1]}.{m[2]}",
    r"regressionModel\.conv(\d)\.(\w+)": lambda m: f"head.regression_head.conv.{int(m[1]) - 1}.0.{m[2]}",
    r"regressionModel\.output\.(\w+)": lambda m: f"head.regression_head.bbox_reg.{m[1]}",
    r"classificationModel\.conv(\d)\.(\w+)": lambda m: f"head.classification_head.conv.{int(m[1]) - 1}.0.{m[2]}",
    r"classificationModel\.output\.(\w+)": lambda m: f"{LOGITS}.{m[1]}",
}

# The same for yhenon's names out of ours.
YHENON = {
    r"backbone\.body\.(.+)": lambda m: m[1],
    r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(\w+)": lambda m: f"fpn.P{int(m[1]) + 3}_1.{m[2]}",
    r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(\w+)": lambda m: f"fpn.P{int(m[1]) + 3}_2.{m[2]}",
    r"backbone\.fpn\.extra_blocks\.p6\.(\w+)": lambda m: f"fpn.P6.{m[1]}",
    r"backbone\.fpn\.extra_blocks\.p7\.(\w+)": lambda m: f"fpn.P7_2.{m[1]}",
    r"head\.regression_head\.conv\.(\d)\.0\.(\w+)": lambda m: f"regressionModel.conv{int(m[1]) + 1}.{m[2]}",
    r"head\.regression_head\.bbox_reg\.(\w+)": lambda m: f"regressionModel.output.{m[1]}",
    r"head\.classification_head\.conv\.(\d)\.0\.(\w+)": lambda m: f"classificationModel.conv{int(m[1]) + 1}.{m[2]}",
    r"head\.classification_head\.cls_logits\.(\w+)": lambda m: f"classificationModel.output.{m[1]}",
}


def our_name(name):
    """The name in our networks of a tensor in a published file."""
    return renamed(name, RENAMED)


def renamed(name, table):
    for pattern, rename in table.items():
        match = re.fullmatch(pattern, name)
        if match:
            return rename(match)
    return name


def published_state(net):
    """The state dict of a RetinaNet under the names of the program that its anchors are of."""
    table = YHENON if net.arguments["anchors"] == "yhenon" else {}
    return {renamed(name, table): value for name, value in net.state_dict().items()}


def describe(state, family, label):
    """(state dict under our names, class count, class names or None, arguments) of a published file's state dict.

    torchvision's published detector lacks the step counters of batch norm: its norms were fixed ones with epsilon 0.
    Ours have 1e-5, so that they can learn too, and get variances smaller by that much: the sum is the same.
    """
    state = {our_name(name): value for name, value in state.items()}
    backbone = family_of(bare_names(state), BACKBONES, label)
    if not backbone.startswith("resnet") or f"{LOGITS}.bias" not in state:
        raise WeightsError(f"{label}: no whole RetinaNet on a ResNet; use another copy")
    if family == "torchvision" and not any(name.endswith("num_batches_tracked") for name in state):
        state = {name: value - NORM_EPS if name.endswith("running_var") else value for name, value in state.items()}
    arguments = {"depth": int(backbone.removeprefix("resnet")), "anchors": family}
    count = len(state[f"{LOGITS}.bias"]) // SHAPES
    classes = next((list(names) for names in (COCO_IDS, COCO) if len(names) == count), None)
    return state, count, classes, arguments


def from_state(family, state, label):
    """The RetinaNet of `family` with the weights in `state`; depth and class count are taken from their names, shapes.

    `classes` are COCO's names where there are 80 or 91, else None; `min_side` and `max_side` as published.
    """
    state, count, classes, arguments = describe(state, family, label)
    net = RetinaNet(count, **arguments)
    load_strictly(net, state, label)
    net.classes, net.image_size, (net.min_side, net.max_side) = classes, None, SIDES[family]
    return net


def open_detector(path_or_state_dict):
    """`describe` of a file, published or a checkpoint of ours, and its name; WeightsError for another network."""
    saved, state, label = open_weights(path_or_state_dict)
    if saved.get("architecture", RetinaNet.name) != RetinaNet.name:
        hint = "; give it as --backbone-weights" if saved["architecture"].startswith("resnet") else ""
        raise WeightsError(f"{label}: holds a {saved['architecture']}, not a {RetinaNet.name}{hint}")
    if "architecture" in saved:
        return (state, saved["num_classes"], saved["classes"], saved["arguments"]), label
    return describe(state, family_of(state, FAMILIES, label), label), label


def pick_classes(state, given, wanted):
    """`state` with the last layer's rows of the names `wanted`, in their order, out of those of the names `given`."""
    rows = [given.index(name) for name in wanted]

    def picked(value):
        return value.unflatten(0, (SHAPES, len(given)))[:, rows].flatten(0, 1)

    return {n: picked(v) if n.startswith(LOGITS) else v for n, v in state.items()}


def fine_tune(net, path_or_state_dict):
    """Weights of a whole RetinaNet, published or ours, into `net`; returns one line that says what was taken.

    Where the names of the classes are known (`net.classes`) and the file has them all, its last layer is taken by name;
    else a file of another class count leaves the last layer fresh. Anchors and depth must be the same.
    """
    (state, count, classes, arguments), label = open_detector(path_or_state_dict)
    for name in ("depth", "anchors", "anchor_scale"):
        given, own = arguments.get(name, net.arguments[name]), net.arguments[name]
        if given != own:
            flag = f"--{name.replace('_', '-')}"
            raise WeightsError(f"{label}: was made with {flag} {given}, this run has {own}; give {flag} {given}")
    wanted, note = getattr(net, "classes", None), ""
    if wanted and classes and wanted != classes and set(wanted) <= set(classes):
        state, note = pick_classes(state, classes, wanted), f", {len(wanted)} of its {count} classes by name"
    elif wanted and classes and count == len(wanted) and wanted != classes:  # the same shape, but other things
        state = {name: value for name, value in state.items() if not name.startswith(LOGITS)}
        note = ", its classes have other names"
    try:
        taken, total, skipped = load_matching(net, state)
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from error
    line = f"{taken} of {total} tensors loaded{note}"
    if all(name.startswith(LOGITS) for name in skipped):
        counts = f"checkpoint {count} classes, data {net.num_classes}: head re-initialised, "
        return counts * bool(skipped) + line
    return f"{line}, the rest is fresh: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"


def begin_retinanet(net, pretrained, backbone_weights, fetch=True, say=print):
    """The weights a new run starts from; says what was taken. Raises WeightsError.

    pretrained         file of a whole RetinaNet (see `fine_tune`), or ""
    backbone_weights   else: "none", file of a ResNet (see `load_backbone`), or "auto": torchvision's ImageNet weights,
                       downloaded if they can be; without them the network stays fresh, and that is said loudly
    fetch              false in all processes but the main one, whose weights the others get later
    """
    if pretrained:
        say(f"{pretrained}: {fine_tune(net, pretrained)}")
        return
    depth = net.arguments["depth"]
    name, source = f"resnet{depth}", backbone_weights
    if backbone_weights == "none":
        say("no weights to start from; batch norm must learn then: --no-freeze-bn")
    if backbone_weights == "auto":
        source, backbone_weights = f"ImageNet weights of {name}", "none"
        try:
            backbone_weights = imagenet(name) if fetch else "none"
        except WeightsError as error:
            say(f"{error} or name a file with --backbone-weights")
            say("WARNING: no weights to start from: TRAINING FROM SCRATCH; batch norm must learn then: --no-freeze-bn")
    if backbone_weights != "none":
        taken = load_backbone(net.backbone["body"], name, backbone_weights, f"retinanet-{depth}")
        say(f"{source}: {taken} of the backbone taken")
