"""Give a trained network to other programs: an ONNX file, or bare weights in a published layout.

    python export.py runs/drone/best.pt --out drone.onnx                       # scores and boxes of all anchors
    python export.py runs/drone/best.pt --out drone.onnx --nms --dynamic-batch # boxes, labels, scores that are left
    python export.py runs/drone/best.pt --out models/drone/ssd.onnx --layout jetson
    python export.py runs/drone/best.pt --weights drone.pth                    # what dusty-nv's programs load

ONNX: RGB pixels 0..255 come in as float32 [B,3,H,W], resized by the caller (a RetinaNet's picture may be padded right
and below with the mean colour), and are normalised in the graph; --layout jetson takes them normalised, as
jetson-inference feeds them. Boxes are decoded in the graph. A classifier gives scores [B,K], a CenterFusion its raw
heads. The file says in its metadata: classes, size (h, w), mean, std, input, architecture, version. onnxruntime runs it
on real and on empty pictures before it is kept: where it differs from this program by more than --tolerance, there is
no file and the exit code is 2.

Needs requirements-export.txt; --weights does not.
"""

import argparse
import importlib.util
import io
import json
import tomllib
import warnings
from itertools import cycle, islice
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

import models
from data import DataError, scenes
from data.images import SUFFIXES, read_image
from models import WeightsError, backbones, deploy, published, published_backbones, published_retinanet
from models.deploy import blue_first
from ops.images import normalize
from training import files, flags
from training.flags import UsageError

WEIGHTS_TOLERANCE = 1e-6
MEANINGS = ("anchors", "anchor_scale", "box_sizes", "radar", "threshold", "max_distance")  # arguments, not of any shape
MOST_PICTURES = 8  # of --check-images
CALIB = ((1266.4, 0.0, 816.3, 0.0), (0.0, 1266.4, 491.5, 0.0), (0.0, 0.0, 1.0, 0.0))  # a camera of nuScenes


class NotKept(Exception):
    """What was written does not say what the network says."""


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, formatter_class=flags.HelpFormatter)
    arg, least = parser.add_argument, flags.number
    arg("checkpoint", help="best.pt or last.pt of a run, or a published detector's file; averaged weights are taken")
    arg("--out", default="", metavar="FILE", help="ONNX file; CHECKPOINT.onnx if neither this nor --weights is given")
    arg("--weights", default="", metavar="FILE", help="a bare state dict: dusty-nv's, torchvision's or yhenon's names")
    onnx = parser.add_argument_group("ONNX").add_argument
    onnx("--layout", choices=deploy.LAYOUTS, default="sightline", help="jetson: input_0, scores, boxes, labels.txt")
    onnx("--batch", type=least(int, 1), default=1, help="pictures that the graph takes, no more and no fewer")
    onnx("--dynamic-batch", action="store_true", help="any number of pictures")
    size = "of the input in pixels; that of the checkpoint (its shortest and longest side, to 32) if not given"
    onnx("--size", type=least(int, 1), nargs=2, metavar=("H", "W"), help=size)
    onnx("--nms", action="store_true", help="suppression in the graph too: boxes, labels, scores")
    onnx("--threshold", type=least(float, 0), help="least score with --nms; that of evaluation if not given")
    onnx("--opset", type=least(int, 17), help="version of ONNX's operations; 18 if not given (19 where one needs it)")
    tolerance = "greatest difference; of outputs above 1, like boxes in pixels, in parts of their largest value"
    onnx("--tolerance", type=least(float, 0), default=3e-4, help=tolerance)
    onnx("--check-images", default="", metavar="FOLDER", help=f"its first {MOST_PICTURES} pictures; else drawn ones")
    args = flags.parse(parser, argv)
    if args.dynamic_batch and args.batch != 1:
        parser.error("--batch and --dynamic-batch: give one of them")
    if args.layout == "jetson" and (args.dynamic_batch or args.batch != 1):
        parser.error("--layout jetson: jetson-inference takes one picture at a time; leave --batch and its kin out")
    if args.threshold is not None and not args.nms:
        parser.error("--threshold is of suppression; add --nms or leave it out")
    return args


def input_size(net, wanted):
    """(height, width) of the pictures that the graph takes; UsageError where the network cannot take them."""
    size = tuple(wanted or net.image_size or (-(-side // 32) * 32 for side in (net.min_side, net.max_side)))
    if not hasattr(net, "stages") or all(side % 32 == 0 for side in size):
        return size
    raise UsageError(f"--size {size[0]} {size[1]}: {net.name} takes multiples of 32")


def real_pictures(folder, size):
    """uint8 [3,H,W] of `size` each, from a folder or drawn. Raises DataError."""
    if not folder:
        drawn = (torch.from_numpy(scenes.draw_scene(0, index).image).permute(2, 0, 1) for index in range(4))
        return [F.resize(image, list(size), antialias=True) for image in drawn]
    found = sorted(file for file in Path(folder).glob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(folder, "", f"no such folder, or no picture in it ({' '.join(SUFFIXES)})")
    return [F.resize(read_image(file), list(size), antialias=True) for file in found[:MOST_PICTURES]]


def batches_of(pictures, batch):
    """Batches uint8 [B,3,H,W] of real pictures, and of a black and a white one; batch None: of one and of three."""
    empty = [torch.zeros_like(pictures[0]), torch.full_like(pictures[0], 255)]
    if batch is None:
        return [*cut(pictures[:1], 1), *cut(empty[:1], 1), *cut([pictures[-1], *empty], 3), *cut(pictures, 3)]
    return cut(pictures, batch) + cut(empty, batch)


def cut(pictures, count):
    """Batches of `count`, the last one filled up from its own beginning."""
    starts = range(0, len(pictures), count)
    return [torch.stack(list(islice(cycle(pictures[start:]), count))) for start in starts]


def radar_of(images):
    """A radar map with a return in every tenth cell, and a calib, for each picture: what a graph with radar is fed."""
    count, height, width = len(images), images.shape[2] // 4, images.shape[3] // 4
    random = torch.Generator().manual_seed(0)
    values = torch.rand(count, 3, height, width, generator=random) * torch.tensor([60.0, 20.0, 20.0]).view(3, 1, 1)
    held = torch.rand(count, 1, height, width, generator=random) < 0.1
    return values * held, torch.tensor(CALIB).expand(count, -1, -1).contiguous()


def feeds(net, graph, images):
    """What the graph takes for uint8 images [B,3,H,W], and what the network takes: two tuples of tensors."""
    more = radar_of(images) if len(graph.inputs) > 1 else ()
    pixels = normalize(images.flip(1) if blue_first(net) else images, net.image_mean, net.image_std)
    normalised = graph.inputs[0] == "input_0"
    return (pixels.contiguous() if normalised else images.float().contiguous(), *more), (pixels, *more)


@torch.no_grad()
def to_onnx(graph, example, dynamic, opset, metadata):
    """(the file's bytes, the same graph's with all of its outputs) of `graph`. Raises UsageError.

    example: its inputs. With suppression the file leaves out what suppression got; else the two are one.
    """
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            graph,
            example,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=tuple({0: batch} for _ in example) if dynamic else None,
            opset_version=opset,
            custom_translation_table=deploy.translations(),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = program.model
    if model.opset_imports[""] != opset:
        raise UsageError(f"--opset {opset}: the exporter cannot go there from {model.opset_imports['']}; leave it out")
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # lines and paths of this program, as long as the graph itself
    whole = program.model_proto.SerializeToString()
    kept = [name for name in graph.outputs if name not in deploy.CANDIDATES]
    if len(kept) == len(graph.outputs):
        return whole, whole
    del model.graph.outputs[len(kept) :]
    return program.model_proto.SerializeToString(), whole


def open_session(content):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def answer(tensors):
        """Outputs by name."""
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
        return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), found)}

    return answer


@torch.no_grad()
def differences(net, graph, content, whole, batches):
    """What onnxruntime and we say on uint8 batches [B,3,H,W] -> {output: (largest difference, largest value of ours)}.

    Scores and boxes before suppression are compared with ours. What suppression leaves is compared with what our
    suppression leaves of the same scores and boxes: two that are equal but for rounding may else change places.
    """
    answer, largest = open_session(content), {}
    everything = answer if whole is content else open_session(whole)
    for images in batches:
        given, own = feeds(net, graph, images)
        found, expected = answer(given), dict(zip(graph.outputs, graph.answers(net(*own))))
        if whole is not content:
            candidates = everything(given)
            found |= {name: candidates[name] for name in deploy.CANDIDATES}
            expected |= dict(zip(graph.outputs, graph.kept(*(candidates[name] for name in deploy.CANDIDATES))))
        for name, value in found.items():
            pair = torch.stack([(value.double() - expected[name]).abs().max(), expected[name].double().abs().max()])
            largest[name] = torch.maximum(largest.get(name, pair), pair)  # a nan stays
    return {name: tuple(pair.tolist()) for name, pair in largest.items()}


def fits(name, difference, value, tolerance):
    """Labels are to be equal. Boxes in pixels and other large numbers may differ in proportion: rounding does."""
    return difference == 0 if name == "labels" else difference <= tolerance * max(1, value)


def class_names(net):
    return net.classes or [f"class {label}" for label in range(net.num_classes)]


def describe(net, graph, size):
    """Metadata of the ONNX file: text by name."""
    project = tomllib.loads((Path(__file__).resolve().parent / "pyproject.toml").read_text())["project"]
    normalised = graph.inputs[0] == "input_0"
    return {
        "classes": json.dumps(class_names(net)),
        "size": json.dumps(list(size)),
        "mean": json.dumps(list(net.image_mean)),
        "std": json.dumps(list(net.image_std)),
        "input": "RGB, (pixel - mean) / std" if normalised else "RGB, 0..255, normalised in the graph",
        "mean_order": "bgr" if blue_first(net) else "rgb",
        "architecture": net.name,
        "version": f"{project['name']} {project['version']}",
    }


def write_onnx(net, path, args):
    """Write and check the ONNX file of `net` -> largest differences by output."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not importlib.util.find_spec(package):
            raise UsageError(f"no {package} here: pip install -r requirements-export.txt")
    size = input_size(net, args.size)
    graph = deploy.graph(net, size, args.layout, args.nms, args.threshold)
    batches = batches_of(real_pictures(args.check_images, size), None if args.dynamic_batch else args.batch)
    example = feeds(net, graph, batches[-1])[0]
    opset = args.opset or graph.opset
    content, whole = to_onnx(graph, example, args.dynamic_batch, opset, describe(net, graph, size))
    largest = differences(net, graph, content, whole, batches)
    line = ", ".join(f"{name} {difference:.1e} of {value:.3g}" for name, (difference, value) in largest.items())
    print(f"onnxruntime and this program differ on {sum(map(len, batches))} pictures by at most: {line}")
    if not all(fits(name, *pair, args.tolerance) for name, pair in largest.items()):
        raise NotKept(f"{path}: not kept: the difference is above --tolerance {args.tolerance:g}")
    if args.layout == "jetson":
        names = ["BACKGROUND"] * hasattr(net, "box_weights") + class_names(net)
        save(path.with_name("labels.txt"), "\n".join(names) + "\n")
    save(path, content)
    many = "any number" if args.dynamic_batch else args.batch
    print(f"{path}: {net.name}, {many} of {size[0]} x {size[1]}, {len(content) / 1e6:.1f} MB, opset {opset}")
    print(f"  in: {', '.join(graph.inputs)}; out: {', '.join(n for n in graph.outputs if n not in deploy.CANDIDATES)}")
    return {name: difference for name, (difference, _) in largest.items()}


def read_back(net, state, path):
    """The network of a published state dict, as its readers understand it; WeightsError where that is another one."""
    if net.name in backbones.NETWORKS:
        again = models.build(net.name, net.num_classes, **net.arguments).eval()
        published_backbones.load_classifier(again, state)
        return again
    again = published.load(state, path)
    for name in MEANINGS:
        ours, theirs = net.arguments.get(name), again.arguments.get(name)
        if ours != theirs:
            raise WeightsError(
                f"{path}: bare weights cannot say {name} {ours}: who reads them takes {theirs}; use --out"
            )
    return again


@torch.no_grad()
def disagreement(net, again):
    """Largest difference between the outputs of two networks of one kind; of masks, between their weights."""
    if getattr(net, "task", "") == "masks":
        pairs = [(value, again.state_dict()[name]) for name, value in net.state_dict().items()]
        return max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    size, largest = net.image_size or (256, 320), 0.0
    for images in batches_of(real_pictures("", size), 2):
        more = radar_of(images) if getattr(net, "second_stage", ()) else ()
        pixels = normalize(images, net.image_mean, net.image_std)
        ours, theirs = net(pixels, *more), again(pixels, *more)
        if torch.is_tensor(ours):
            ours, theirs = {"logits": ours}, {"logits": theirs}
        largest = max([largest, *((ours[name] - theirs[name]).abs().max().item() for name in ours)])
    return largest


def write_weights(net, path):
    """Write the bare state dict of `net` in its published layout, once it reads back -> {"weights": difference}."""
    buffer = io.BytesIO()
    torch.save(published_retinanet.published_state(net) if net.name == "retinanet" else net.state_dict(), buffer)
    buffer.seek(0)
    largest = disagreement(net, read_back(net, torch.load(buffer, weights_only=True), path))
    if not largest <= WEIGHTS_TOLERANCE:
        raise NotKept(f"{path}: not kept: read back, its outputs differ by {largest:.1e}")
    save(path, buffer.getvalue())
    print(f"{path}: bare weights of {net.name}, {len(buffer.getvalue()) / 1e6:.1f} MB; read back: {largest:g} off")
    print("  such a file tells neither names of classes nor size of pictures")
    return {"weights": largest}


def save(path, content):
    """Write a file whole, bytes or text, its folder too where there is none; UsageError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, lambda file: file.write(content if isinstance(content, bytes) else content.encode()))
    except OSError as fault:
        raise UsageError(f"{path}: not written: {fault.strerror or fault}; choose another place") from fault


def main(argv=None):
    args = parse_args(argv)
    net = models.load(args.checkpoint)
    largest = write_weights(net, Path(args.weights)) if args.weights else {}
    if args.out or not args.weights:
        largest |= write_onnx(net, Path(args.out or Path(args.checkpoint).with_suffix(".onnx")), args)
    return largest


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, NotKept)
