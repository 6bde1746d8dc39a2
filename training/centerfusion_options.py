"""Options of mrnabati/CenterFusion that train_centerfusion.py has under another name, has no use for, or refuses.

With them its users' command lines run here, the name of the script apart. --help does not list them.
"""

import argparse

from training import cli

# They change nothing here: drawing, tracking, tasks other than 3D detection, or what this script does anyway.
SWITCHES_WITHOUT_EFFECT = """
    shuffle-train not-rand-crop not-max-crop no-pause not-cuda-benchmark not-set-cuda-env save-video resize-video
    transpose-video show-track-color not-show-bbox not-show-number qualitative tango-color show-velocity
    eval-render-curves reset-hm reuse-hm nms not-prefetch-test non-block-test save-results same-aug-pre zero-pre-hm
    public-det no-pre-img zero-tracking hungarian"""
VALUES_WITHOUT_EFFECT = """
    debug print-iter vis-thresh debugger-theme save-imgs save-img-suffix skip-first save-framerate video-h video-w
    num-resnet-layers backbone neck msra-outchannel master-batch-size ltrb-weight ltrb-amodal-weight vis-gt-bev
    kitti-split ignore-loaded-cats hm-disturb lost-disturb fp-disturb pre-thresh track-thresh new-thresh max-frame-dist
    max-age tracking-weight reg-loss hp-weight hm-hp-weight dep-res-weight max-pc r-a r-b img-format eval-n-plots
    hm-transparency"""
LEAVE_OUT = "leave it out"
# option -> (values that change nothing here, remedy for the others)
FIXED = {
    "dataset": (("nuscenes",), "this script reads nuScenes alone"),
    "test-dataset": (("", "nuscenes"), "this script reads nuScenes alone"),
    "dataset-version": (("",), "--version and --val-split name what is read"),
    "demo": (("",), "use python predict.py CHECKPOINT INPUTS"),
    "num-iters": (("-1",), "--steps N is the length of a run"),
    "test-scales": (("1",), "only one scale is supported; --flip-test averages over the mirror image"),
    "out-thresh": (("-1", "0"), "the official score needs all boxes; predict.py has --threshold"),
    "iou-thresh": (("0",), "the published score is without this suppression; leave it out"),
    "fix-short": (("-1",), "--input-size H W is the input size"),
    "load-results": (("",), "use nuscenes-devkit's evaluate.py to score a file"),
    "num-classes": (("-1", "10"), "nuScenes has 10 classes"),
}
FIXED |= dict.fromkeys(("custom-dataset-img-path", "custom-dataset-ann-path"), (("",), LEAVE_OUT))
FIXED |= {
    name: (values.split(","), f"only {values.split(',')[-1]} is supported; {LEAVE_OUT}")
    for name, values in {
        **{"dla-node": "dcn", "head-conv": "-1,256", "num-head-conv": "1", "head-kernel": "3", "down-ratio": "4"},
        **{"prior-bias": "-4.6", "dense-reg": "1", "K": "100", "depth-scale": "1", "test-focal-length": "-1"},
        **{"aug-rot": "0", "rotate": "0", "hm-weight": "1", "off-weight": "1", "wh-weight": "0.1", "dep-weight": "1"},
        **{"amodel-offset-weight": "1", "dim-weight": "1", "rot-weight": "1", "nuscenes-att-weight": "1"},
        "velocity-weight": "1",
    }.items()
}
REFUSED = {
    "keep-res": "--input-size H W is the input size, multiples of 32 such as 896 1600",
    "model-output-list": "use python export.py CHECKPOINT",
    "warm-start-weights": "heads of another shape start from random values; leave it out",
    **dict.fromkeys(("ltrb", "ltrb-amodal", "tracking", "pre-hm"), f"not supported; {LEAVE_OUT}"),
    "use-loaded-results": "use nuscenes-devkit's evaluate.py to score a file",
}
PUBLISHED_PILLARS = [1.5, 0.2, 0.2]


class _WithoutEffect(argparse.Action):
    """Adds the option to the list `no_effect`."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = namespace.no_effect if isinstance(namespace.no_effect, list) else []
        namespace.no_effect = sorted({*earlier, option_string})


class _Fixed(_WithoutEffect):
    """The same for values that change nothing here; others are an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        accepted, remedy = FIXED[option_string.removeprefix("--")]
        if not any(_equal(values, value) for value in accepted):
            parser.error(f"{option_string} {values}: {remedy}")
        super().__call__(parser, namespace, values, option_string)


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: {REFUSED[option_string.removeprefix('--')]}")


class _Size(argparse.Action):
    """--input-res, --input-h and --input-w set both sides, the height or the width of --input-size; -1: neither."""

    def __call__(self, parser, namespace, values, option_string=None):
        size = namespace.input_size if isinstance(namespace.input_size, list) else [values, values]
        if values != -1:
            height = size[0] if option_string == "--input-w" else values
            width = size[1] if option_string == "--input-h" else values
            namespace.input_size = [height, width]


def architecture(text: str) -> str:
    """A `type=` for --arch: ours without the prefix, or theirs, dla_34."""
    return cli.prefixed("centerfusion_")({"dla_34": "dla34"}.get(text, text))


def pillar_dims(text: str) -> list[float]:
    """A `type=` for --pillar-dims: three numbers above 0."""
    dims = cli.numbers(text)
    if len(dims) != 3 or not all(dims):
        raise argparse.ArgumentTypeError(f"{text}: must be three numbers above 0, as 1.5,0.2,0.2")
    return dims


def add_arguments(parser: cli.ArgumentParser) -> None:
    """Declare the options; the script's own flags are declared already."""
    arg, hidden = parser.add_argument, {"default": None, "help": argparse.SUPPRESS}  # they have the defaults of ours
    arg("task", nargs="?", choices=("ddd",), default="ddd", help="3D detection, the only task")
    folder = {"dest": "model_dir", "type": cli.prefixed("runs/"), "default": None, "metavar": "NAME"}
    arg("--exp-id", **folder, help="the same as --model-dir runs/NAME")
    arg("--eval", dest="eval_only", action="store_true", **hidden)
    arg("--no-color-aug", dest="color_jitter", action="store_const", const=0.0, **hidden)
    arg("--save-all", dest="save_every_epochs", action="store_const", const=1, **hidden)
    arg("--trainval", dest="val_split", action="store_const", const="test", **hidden)
    for name in ("--input-res", "--input-h", "--input-w"):
        arg(name, dest="input_size", action=_Size, type=int, **hidden)
    for name in SWITCHES_WITHOUT_EFFECT.split():
        arg(f"--{name}", dest="no_effect", action=_WithoutEffect, nargs=0, **hidden)
    for name in VALUES_WITHOUT_EFFECT.split():
        arg(f"--{name}", dest="no_effect", action=_WithoutEffect, **hidden)
    for name in FIXED:
        arg(f"--{name}", dest="no_effect", action=_Fixed, **hidden)
    for name in REFUSED:
        arg(f"--{name}", dest="no_effect", action=_Refused, nargs=0, **hidden)
    parser.set_defaults(no_effect=[])


def notes(args: argparse.Namespace) -> list[str]:
    """Lines for the console: the options without effect, and what --pillar-dims does here and did not do there."""
    lines = [f"no effect here: {', '.join(args.no_effect)}"] if args.no_effect else []
    if args.pointcloud and args.pillar_dims != PUBLISHED_PILLARS:
        dims = ",".join(f"{value:g}" for value in args.pillar_dims)
        lines.append(
            f"--pillar-dims {dims} is used; mrnabati/CenterFusion always uses 1.5,0.2,0.2, its published weights too"
        )
    return lines


def _equal(text, value):
    """Whether two words are the same, as numbers where they are numbers."""
    try:
        return float(text) == float(value)
    except ValueError:
        return text == value
