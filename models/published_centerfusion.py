"""CenterFusion from published files, and what a new run starts from."""

from models.centerfusion import NETWORKS
from models.errors import WeightsError
from models.published_backbones import FAMILIES as BACKBONES
from models.published_backbones import bare_names, load_backbone
from models.weights import family_of, load_strictly, open_weights

# A family is known by names that no other has; of the ResNets the first that fits.
FAMILIES = {
    "centerfusion_dla34": ("dla_up.ida_0.proj_1.conv.weight", "base.level5.root.conv.weight"),
    "centerfusion_resnet34": ("dla_up.ida_0.proj_1.0.weight", "base.layer3.5.conv2.weight"),
    "centerfusion_resnet18": ("dla_up.ida_0.proj_1.0.weight", "base.layer4.1.conv2.weight"),
}
CLASSES = [
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
]
IMAGE_SIZE = (448, 800)
BODY = ("base", "dla_up", "ida_up")
FIRST_LAYERS = {"dla34": "base_layer.0", "resnet18": "conv1", "resnet34": "conv1"}


def from_state(family, state, label):
    """The network of `family` with the weights in `state`, loaded strictly; class count and radar from their names.

    `classes` are nuScenes' ten where there are ten, else None; `image_size` as published.
    """
    if "hm.2.bias" not in state:
        raise WeightsError(f"{label}: no whole {family}, it lacks hm; use another copy")
    count = len(state["hm.2.bias"])
    net = NETWORKS[family](count, radar="dep_sec.0.weight" in state)
    load_strictly(net, state, label)
    net.classes, net.image_size = list(CLASSES) if count == len(CLASSES) else None, IMAGE_SIZE
    return net


def fine_tune(net, path_or_state_dict):
    """Weights of a CenterFusion or CenterNet, published or ours, into `net`; returns one line that says what was taken.

    Body and upsampling must fit to the last tensor. A head is taken whole or stays fresh: fresh is one that the file
    lacks or has in another shape, as the camera's network does those that see radar, and `hm` where the classes have
    other names. Raises WeightsError.
    """
    saved, state, label = open_weights(path_or_state_dict)
    classifier = [key for key in state if key.startswith("base.fc.")]  # CenterNet's files of 2019 have ImageNet's
    state = {key: value for key, value in state.items() if key not in classifier}
    family = family_of(state, FAMILIES, label)
    if family != net.name:
        raise WeightsError(f"{label}: holds a {family}, not a {net.name}; give a file of that")
    own, fresh = net.state_dict(), []
    given, wanted = saved.get("classes"), getattr(net, "classes", None)
    other_classes = bool(given and wanted and list(given) != list(wanted))
    for name in (*net.first_stage, *net.second_stage):
        needed = {key: own[key].shape for key in own if key.startswith(f"{name}.")}
        held = {key: state[key].shape for key in state if key.startswith(f"{name}.")}
        if held != needed or (name == "hm" and other_classes):
            fresh.append(name)
    heads = {name for name in (*net.first_stage, *net.second_stage) if name not in fresh}
    unused = sorted({key.split(".")[0] for key in state} - {*BODY, *heads, *fresh})
    unused = ["base.fc"] * bool(classifier) + unused
    taken = {key: value for key, value in state.items() if key.split(".")[0] in {*BODY, *heads}}
    load_strictly(net, {**taken, **{key: own[key] for key in own if key.split(".")[0] in fresh}}, label)
    count = sum(key.split(".")[0] not in fresh for key in own)
    line = f"{count} of {len(own)} tensors loaded"
    line += f"; these heads start fresh: {', '.join(fresh)}" * bool(fresh)
    return line + f"; not used: {', '.join(unused)}" * bool(unused)


def begin_centerfusion(net, load_model, say=print):
    """The weights a new run starts from; says what was taken. Raises WeightsError.

    load_model: file of a CenterFusion or CenterNet (see `fine_tune`), or of a backbone alone, DLA-34 or ResNet, which
    was trained on red first: its first layer is turned to blue first; or "".
    """
    if not load_model:
        say("WARNING: no weights to start from: TRAINING FROM SCRATCH; name a file with --load_model")
        return
    _, state, label = open_weights(load_model)
    if any(all(mark in state for mark in marks) for marks in FAMILIES.values()):
        say(f"{label}: {fine_tune(net, load_model)}")
        return
    backbone = net.name.removeprefix("centerfusion_")
    family_of(bare_names(state), {**FAMILIES, **BACKBONES}, label)
    taken = load_backbone(net.base, backbone, load_model, net.name)
    first = net.base.get_submodule(FIRST_LAYERS[backbone])
    first.weight.data.copy_(first.weight.data.flip(1))
    say(f"{label}: {taken} of the backbone taken, its first layer turned to blue first")
