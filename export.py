"""Export a trained network to ONNX, or as bare weights in a published layout.

    python export.py runs/drone/best.pt --out drone.onnx                       # scores and boxes of all anchors
    python export.py runs/drone/best.pt --out drone.onnx --nms --dynamic-batch # boxes, labels, scores after NMS
    python export.py runs/drone/best.pt --out models/drone/ssd.onnx --layout jetson
    python export.py runs/drone/best.pt --state-dict drone.pth                 # what dusty-nv's programs load

The input of the ONNX file is RGB pixels 0..255, float32 [B,3,H,W]. The caller resizes the images, the graph normalizes
them; with --layout jetson the caller does, as jetson-inference does. Boxes are decoded in the graph. A classifier
outputs scores [B,K], a CenterFusion its raw heads.

A RetinaNet with --nms has a second input `sizes`, float32 [B,2]: the height and width of each image, which is at the
top left of the input, with any values right of and below it. Its boxes are those of predict.py, whatever the size.
Without --nms the whole input is the image.

The metadata of the file contains classes, size (h, w), mean, std, input, architecture and version, with `sizes` also
min_side and max_side, to which predict.py resizes, or what fits into a smaller --size. Before the file is written,
onnxruntime runs it on images: if its outputs differ from this program's by more than --tolerance, it is not written and
the exit code is 2.

Needs requirements-export.txt; --state-dict does not.
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

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
from data.images import SUFFIXES, read_image
from data.loader import PadCollate
from models import backbones, onnx, pretrained
from models.centerfusion import CenterFusion
from models.onnx import is_bgr
from models.pretrained import backbones as pretrained_backbones
from models.pretrained import retinanet
from models.retinanet import RetinaNet
from models.ssd import SSD
from ops.boxes import clip, decode
from ops.images import normalize
from synthetic.shapes import drawing
from training import cli
from utils import files, torch_files
from utils.errors import DataError, UsageError, WeightsError
from utils.labels import first_names

# Arguments of networks that a bare state dict does not store.
NOT_STORED = ("anchors", "anchor_scale", "box_sizes", "priors", "radar", "threshold", "max_distance")
MAX_IMAGES = 8  # of --check-images
SIZES = ((1, 1), (0.61, 1), (1, 0.47), (0.53, 0.72))  # (h, w) of images in a padded input, to be checked, as fractions
CALIB = ((1266.4, 0.0, 816.3, 0.0), (0.0, 1266.4, 491.5, 0.0), (0.0, 0.0, 1.0, 0.0))  # a camera of nuScenes


def parse_args(argv):
    parser = cli.ArgumentParser("export.py", __doc__)
    arg = parser.add_argument
    checkpoint = "a run folder (its best.pt, else last.pt), a checkpoint, or a published file; averaged weights if any"
    arg("checkpoint", help=checkpoint)
    out = "ONNX file; default: the checkpoint's name with .onnx, unless --state-dict is given"
    arg("--out", default="", metavar="FILE", help=out)
    names = "write bare weights under the names of dusty-nv's, torchvision's, yhenon's or mrnabati's files"
    arg("--state-dict", "--weights", dest="state_dict", default="", metavar="FILE", help=names)
    arg = parser.add_argument_group("ONNX").add_argument
    layout = "names and form of inputs and outputs: see above, or as jetson-inference loads them"
    arg("--layout", choices=onnx.LAYOUTS, default="sightline", help=layout)
    arg("--batch", type=cli.positive, default=1, help="batch size of the input, fixed")
    arg("--dynamic-batch", action="store_true", help="any batch size")
    arg("--nms", action="store_true", help="put NMS into the graph: its outputs are boxes, labels, scores")
    arg(
        "--threshold",
        type=cli.probability,
        help="minimum score with --nms; default: that of the run's validation (0.01, RetinaNet 0.05)",
    )
    opset = "ONNX opset version; default: 18, or 19 where the network needs it"
    arg("--opset", type=cli.number(int, 17, max_=30), help=opset)
    tolerance = "maximum difference from this program; relative for outputs above 1, such as boxes in pixels"
    arg("--tolerance", type=cli.non_negative, default=3e-4, help=tolerance)
    images = f"images for the check: the first {MAX_IMAGES} in this folder; default: generated images"
    arg("--check-images", default="", metavar="FOLDER", help=images)
    size = "size of the ONNX file's input in pixels: height and width, or one number for both; default: that of the "
    size += "checkpoint or of the published weights, for a RetinaNet its --min-side and --max-side"
    cli.add_weights_arguments(parser, size)
    args = parser.parse(argv)
    if args.dynamic_batch and args.batch != 1:
        parser.error("--batch and --dynamic-batch: give one of them")
    if args.layout == "jetson" and (args.dynamic_batch or args.batch != 1):
        parser.error("--layout jetson: jetson-inference runs one image at a time; remove --batch or --dynamic-batch")
    if args.threshold is not None and not args.nms:
        parser.error("--threshold is the score threshold of NMS; add --nms or remove it")
    return args


def input_size(net, wanted):
    """(height, width) of the input. UsageError if the network cannot process such images."""
    size = tuple(wanted or net.image_size or (-(-side // 32) * 32 for side in (net.min_side, net.max_side)))
    if isinstance(net, (RetinaNet, CenterFusion)) and any(side % 32 for side in size):
        raise UsageError(f"--size {size[0]} {size[1]}: {net.name} needs multiples of 32")
    return size


def check_images(folder, size):
    """uint8 [3,H,W] of `size`: the first images of `folder`, or generated ones if it is empty. Raises DataError."""
    if not folder:
        drawn = (torch.from_numpy(drawing.draw_shapes(0, index).image).permute(2, 0, 1) for index in range(4))
        return [F.resize(image, list(size), antialias=True) for image in drawn]
    paths = sorted(file for file in Path(folder).glob("*") if file.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(folder, "", f"no such folder, or no image in it ({' '.join(SUFFIXES)})")
    return [F.resize(read_image(path), list(size), antialias=True) for path in paths[:MAX_IMAGES]]


def make_batches(images, batch):
    """Batches uint8 [B,3,H,W] of `images`, and of a black and a white one; batch None: batches of one and of three."""
    blank = [torch.zeros_like(images[0]), torch.full_like(images[0], 255)]
    if batch is None:
        return [*split(images[:1], 1), *split(blank[:1], 1), *split([images[-1], *blank], 3), *split(images, 3)]
    return split(images, batch) + split(blank, batch)


def split(images, count):
    """Batches of `count`; the last one is filled up by repeating its images."""
    starts = range(0, len(images), count)
    return [torch.stack(list(islice(cycle(images[start:]), count))) for start in starts]


def make_radar(images):
    """A random radar map, with a return in every tenth cell, and a calib for each image."""
    count, height, width = len(images), images.shape[2] // 4, images.shape[3] // 4
    random = torch.Generator().manual_seed(0)
    values = torch.rand(count, 3, height, width, generator=random) * torch.tensor([60.0, 20.0, 20.0]).view(3, 1, 1)
    has_return = torch.rand(count, 1, height, width, generator=random) < 0.1
    return values * has_return, torch.tensor(CALIB).expand(count, -1, -1).contiguous()


def make_sizes(images, first):
    """float32 [B,2], (h, w) of the part of each image that is to be seen: those of SIZES from number `first` on."""
    fractions = torch.tensor(SIZES)[torch.arange(first, first + len(images)) % len(SIZES)]
    return (fractions * torch.tensor(images.shape[-2:])).ceil()


def make_inputs(net, graph, images, first=0):
    """The inputs of the graph for uint8 images [B,3,H,W], and those of the network: two tuples of tensors.

    first: the number of images in earlier batches
    """
    radar = make_radar(images) if "radar_map" in graph.inputs else ()
    sizes = (make_sizes(images, first),) if "sizes" in graph.inputs else ()
    pixels = normalize(images.flip(1) if is_bgr(net) else images, net.image_mean, net.image_std)
    normalized = graph.inputs[0] == "input_0"
    return (pixels.contiguous() if normalized else images.float().contiguous(), *radar, *sizes), (pixels, *radar)


@torch.no_grad()
def to_onnx(graph, example, dynamic, opset, metadata):
    """The ONNX file of `graph`, as bytes, and the same with the candidates of NMS as further outputs.

    example: inputs of the graph. Without NMS both results are the same object. Raises UsageError.
    """
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        program = torch.onnx.export(
            graph,
            example,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=tuple({0: batch} for _ in example) if dynamic else None,
            opset_version=opset,
            custom_translation_table=onnx.translations(),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = program.model
    if model.opset_imports[""] != opset:
        raise UsageError(f"--opset {opset}: the exporter only offers {model.opset_imports['']} here; remove --opset")
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # source lines and paths of this program, as large as the graph itself
    complete = program.model_proto.SerializeToString()
    names = [name for name in graph.outputs if name not in onnx.CANDIDATES]
    if len(names) == len(graph.outputs):
        return complete, complete
    del model.graph.outputs[len(names) :]
    return program.model_proto.SerializeToString(), complete


def open_session(content):
    """A function run(list of CPU tensors) -> {output: tensor} for an ONNX file given as bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    input_names = [given.name for given in session.get_inputs()]
    output_names = [output.name for output in session.get_outputs()]

    def run(tensors):
        values = session.run(None, {name: tensor.numpy() for name, tensor in zip(input_names, tensors, strict=True)})
        return {name: torch.from_numpy(value) for name, value in zip(output_names, values)}

    return run


@torch.no_grad()
def differences(net, graph, content, complete, batches):
    """{output: (maximum difference of onnxruntime from this program, maximum value)} on uint8 batches [B,3,H,W].

    Results of NMS are compared with those of our NMS on the candidates of onnxruntime, because rounding can change the
    order of boxes with nearly equal scores; the candidates are compared with ours.
    """
    run, largest, count = open_session(content), {}, 0
    run_complete = run if complete is content else open_session(complete)
    for images in batches:
        graph_inputs, net_inputs = make_inputs(net, graph, images, count)
        outputs, count = run(graph_inputs), count + len(images)
        if "sizes" in graph.inputs:
            expected = candidates_alone(net, images, graph_inputs[1])
        else:
            expected = dict(zip(graph.outputs, graph.postprocess(net(*net_inputs))))
        if complete is not content:
            candidates = {name: run_complete(graph_inputs)[name] for name in onnx.CANDIDATES}
            outputs |= candidates
            expected |= dict(zip(graph.outputs, graph.nms(*candidates.values())))
        for name, value in outputs.items():
            pair = torch.stack([(value.double() - expected[name]).abs().max(), expected[name].double().abs().max()])
            largest[name] = torch.maximum(largest.get(name, pair), pair)  # keeps nan
    return {name: tuple(pair.tolist()) for name, pair in largest.items()}


def candidates_alone(net, images, sizes):
    """The CANDIDATES of a RetinaNet that sees each of the images uint8 [B,3,H,W] alone, cut to its size, in the rows of
    the whole input: zeros in the others."""
    whole = tuple(images.shape[-2:])
    boxes = torch.zeros(len(images), sum(net.level_sizes(whole)), 4)
    scores = torch.zeros(*boxes.shape[:2], net.num_classes)
    for row, (height, width) in enumerate(sizes.int().tolist()):
        own = PadCollate(32).padded_shape((height, width))  # as predict.py pads it
        image = images[row : row + 1, :, : own[0], : own[1]].contiguous()
        outputs = net(normalize(image, net.image_mean, net.image_std, [(height, width)]))
        anchors = rows_of_part(net, own, whole)
        decoded = decode(outputs["offsets"], net.anchors(own), net.box_weights)
        boxes[row, anchors] = clip(decoded, [(height, width)])[0]
        scores[row, anchors] = outputs["logits"][0].sigmoid()
    return dict(zip(onnx.CANDIDATES, (boxes, scores)))


def rows_of_part(net, part, whole):
    """int64 [a], which anchors of an image of `whole` (H, W) are those of its top left `part` (h, w)."""
    index, first = [], 0
    for (rows, columns), cells, count in zip(net.map_sizes(part), net.map_sizes(whole), net.level_sizes(whole)):
        numbers = torch.arange(first, first + count).view(*cells, -1)
        index.append(numbers[:rows, :columns].flatten())
        first += count
    return torch.cat(index)


def is_close(name, difference, value, tolerance):
    """Whether an output is within the tolerance, which is relative to values above 1. Labels must be equal."""
    return difference == 0 if name == "labels" else difference <= tolerance * max(1, value)


def class_names(net):
    return net.classes or [f"class {label}" for label in range(net.num_classes)]


def metadata(net, graph, size):
    """Metadata of the ONNX file: text by name."""
    project = tomllib.loads((Path(__file__).resolve().parent / "pyproject.toml").read_text())["project"]
    normalized = graph.inputs[0] == "input_0"
    sizes = {}
    if "sizes" in graph.inputs:
        sizes = {"sizes": "height, width of each image, at the top left of the input"}
        sizes |= {
            "min_side": json.dumps(min(net.min_side, *size)),
            "max_side": json.dumps(min(net.max_side, max(size))),
        }
    return {
        "classes": json.dumps(class_names(net)),
        "size": json.dumps(list(size)),
        "mean": json.dumps(list(net.image_mean)),
        "std": json.dumps(list(net.image_std)),
        "input": "RGB, (pixel - mean) / std" if normalized else "RGB, 0..255, normalized in the graph",
        "mean_order": "bgr" if is_bgr(net) else "rgb",
        **sizes,
        "architecture": net.name,
        "version": f"{project['name']} {project['version']}",
    }


def jetson_labels(net, file):
    """The lines of jetson-inference's labels.txt. UsageError if `file` has others, as they may be another network's."""
    names = ["BACKGROUND"] * isinstance(net, SSD) + class_names(net)
    if file.exists() and [line.strip() for line in files.read_lines(file) if line.strip()] != names:
        raise UsageError(
            f"{file}: would be overwritten with other names ({first_names(names)}); move it, write --out into "
            "another folder, or name the classes with --labels"
        )
    return "".join(f"{name}\n" for name in names)


def write_onnx(net, path, args):
    """Check and write the ONNX file of `net`; returns the maximum difference of each output."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if not importlib.util.find_spec(package):
            raise UsageError(f"{package} is not installed: pip install -r requirements-export.txt")
    labels = jetson_labels(net, path.with_name("labels.txt")) if args.layout == "jetson" else ""
    size = input_size(net, args.size)
    graph = onnx.graph(net, size, args.layout, args.nms, args.threshold)
    batches = make_batches(check_images(args.check_images, size), None if args.dynamic_batch else args.batch)
    example, _ = make_inputs(net, graph, batches[-1])
    opset = args.opset or graph.opset
    content, complete = to_onnx(graph, example, args.dynamic_batch, opset, metadata(net, graph, size))
    largest = differences(net, graph, content, complete, batches)
    line = ", ".join(f"{name} {difference:.1e} of {value:.3g}" for name, (difference, value) in largest.items())
    print(f"maximum difference between onnxruntime and this program on {sum(map(len, batches))} images: {line}")
    if not all(is_close(name, *pair, args.tolerance) for name, pair in largest.items()):
        raise UsageError(f"{path}: not written: the difference is above --tolerance {args.tolerance:g}")
    if labels:
        files.write_text(path.with_name("labels.txt"), labels)
    files.write(path, lambda file: file.write(content))
    batch = "any batch size" if args.dynamic_batch else f"batch size {args.batch}"
    print(f"{path}: {net.name}, {size[0]} x {size[1]} pixels, {batch}, {len(content) / 1e6:.1f} MB, opset {opset}")
    outputs = [name for name in graph.outputs if name not in onnx.CANDIDATES]
    print(f"  inputs: {', '.join(graph.inputs)}; outputs: {', '.join(outputs)}")
    return {name: difference for name, (difference, _) in largest.items()}


def read_back(net, state, path):
    """The network that other programs make of a published state dict. WeightsError if it is another one."""
    if net.name in backbones.NETWORKS:
        restored = models.build(net.name, net.num_classes, **net.arguments).eval()
        pretrained_backbones.fine_tune(restored, state)
        return restored
    restored = pretrained.load(state, path)
    taken = restored.arguments
    if "priors" in taken:  # jetson-inference's programs take their own where they differ
        taken["priors"] = net.arguments["priors"] if tuple(net.image_size) == (300, 300) else "jetson"
    for name in NOT_STORED:
        ours, theirs = net.arguments.get(name), taken.get(name)
        if ours != theirs:
            raise WeightsError(
                f"{path}: bare weights cannot store {name} {ours}: programs that read them take {theirs}; use --out"
            )
    return restored


def write_state_dict(net, path):
    """Check and write the bare state dict of `net` with published names; returns {"weights": 0.0}, the difference."""
    buffer = io.BytesIO()
    torch.save(retinanet.published_state(net) if net.name == "retinanet" else net.state_dict(), buffer)
    buffer.seek(0)
    restored = read_back(net, torch.load(buffer, weights_only=True), path).state_dict()
    changes = [(value.double() - restored[name].double()).abs().max() for name, value in net.state_dict().items()]
    difference = torch.stack(changes).max().item()
    if difference != 0:  # also if it is nan
        raise WeightsError(f"{path}: not written: the weights differ by {difference:.1e} after reading them back")
    files.write(path, lambda file: file.write(buffer.getvalue()))
    print(f"{path}: bare weights of {net.name}, {len(buffer.getvalue()) / 1e6:.1f} MB, checked by reading them back")
    print("  such a file stores neither class names nor the image size")
    if net.arguments.get("priors") == "jetson":
        print(f"  nor its priors: give it --size {' '.join(map(str, net.image_size))} --priors jetson here")
    return {"weights": difference}


def main(argv=None):
    args = parse_args(argv)
    args.checkpoint = torch_files.find_checkpoint(args.checkpoint)
    net = models.load(args.checkpoint, args.labels, args.size, args.priors)
    largest = write_state_dict(net, Path(args.state_dict)) if args.state_dict else {}
    if args.out or not args.state_dict:
        largest |= write_onnx(net, Path(args.out or Path(args.checkpoint).with_suffix(".onnx")), args)
    return largest


if __name__ == "__main__":
    cli.run(main)
