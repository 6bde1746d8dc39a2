"""Flags and recipes: default < recipe (TOML, --config) < command line.

A recipe may set every flag of its script under any of the flag's names, with hyphens or underscores. What is mistyped
ends in an error that names the nearest known flag; nothing is guessed, abbreviated or derived.
"""

import argparse
import difflib
import math
import sys
import tomllib
from pathlib import Path


class UsageError(Exception):
    """A person's mistake: one line with the file or flag, the reason and the remedy."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of a description and ends each line of help with its default, where it has a telling one."""

    def _get_help_string(self, action):
        if action.default in (None, "", False, argparse.SUPPRESS) or action.nargs == 0 or "%(default)" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def number(kind, low, high=None, most=None):
    """A `type=` for argparse: a finite int or float of at least `low`, and below `high` or at most `most`, if given."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole ' if kind is int else 'a '}number") from None
        if not value >= low:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        if high is not None and value >= high:
            raise argparse.ArgumentTypeError(f"{text} is not below {high}")
        if value > (math.inf if most is None else most) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite" if most is None else f"{text} is above {most}")
        return value

    convert.numeric = True
    return convert


chance = number(float, 0, most=1)
unsigned = number(float, 0)


def numbers(text):
    """A `type=` for flags like `--milestones 80,100` -> list of floats."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 80,100") from None


def str2bool(text):
    """A `type=` for flags that spell their truth out, like `--use-cuda false`."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def add_run_arguments(parser):
    """Declare the flags that every script has, in labelled groups. The script sets their defaults with set_defaults."""
    count = number(int, 0)

    run = parser.add_argument_group("run").add_argument
    run("--config", default="", metavar="TOML", help="recipe: sets flags, below the command line")
    run("--checkpoint-folder", "--model-dir", dest="model_dir", default="runs/new", metavar="RUN", help="run folder")
    where = "continue at the very next step; without a value: auto"
    run("--resume", nargs="?", const="auto", default="", metavar="auto|RUN|FILE", help=where)
    run("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    run("--eval-only", action="store_true", help="evaluate and exit")
    run("--preflight", action="store_true", help="try the largest batch, print memory peaks, exit")
    run("--seed", type=count, default=0, help="of weights, order and augmentation")
    often = "validate every so many epochs"
    run("--validation-epochs", "--val-intervals", type=number(int, 1), default=1, help=often)
    run("--debug-steps", type=number(int, 1), default=10, help="log every so many steps")
    levels = "warning: no line a step; debug: all flags too"
    run("--log-level", choices=("debug", "info", "warning"), default="info", help=levels)

    device = parser.add_argument_group("devices").add_argument
    device("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    device("--gpus", default="", metavar="0,1", help="GPUs of one process (DataParallel); else use torchrun")
    device("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the network")
    device("--compile", action="store_true", help="torch.compile the network")
    device("--sync-bn", action="store_true", help="batch norm over all processes (GPUs)")
    device("--num-workers", "--workers", dest="workers", type=count, default=2, help="loader processes")

    train = parser.add_argument_group("optimisation").add_argument
    train("--num-epochs", "--epochs", dest="epochs", type=number(int, 1), default=30, help="times through the data")
    train("--batch-size", type=number(int, 1), default=4, help="pictures a step, over all processes")
    train("--accumulate", type=number(int, 1), default=1, help="pieces a batch is computed in")
    train("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="update rule")
    train("--lr-batch-size", type=count, default=0, help="batch size that the rates were chosen for, see --scale-lr")
    train("--scale-lr", action="store_true", help="scale the learning rates from that batch size to this one")
    train("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd")
    train("--weight-decay", type=unsigned, default=5e-4, help="of weights")
    norms = "of batch norm and biases; as --weight-decay if not given"
    train("--norm-weight-decay", type=unsigned, help=norms)
    train("--t-max", type=unsigned, default=0, help="cosine: epochs until the rate is 0; 0: --epochs")
    falls = "multi-step: epochs after which the rate falls"
    train("--milestones", "--lr-step", dest="milestones", type=numbers, default="8,11", help=falls)
    train("--gamma", type=unsigned, default=0.1, help="factor on the rate where it falls")
    train("--warmup-steps", type=count, default=0, help="steps of linear warm-up")
    train("--ema", type=number(float, 0, 1), default=0.0, help="decay of averaged weights; 0: off")
    train("--clip-norm", type=unsigned, default=0.0, help="greatest gradient norm; 0: off")
    frozen = "keep batch norm statistics and affine as they are"
    train("--freeze-bn", action=argparse.BooleanOptionalAction, default=False, help=frozen)

    stop = parser.add_argument_group("stopping and saving").add_argument
    stop("--max-steps", type=count, default=0, help="stop after so many steps; 0: no cap")
    stop("--patience", type=count, default=0, help="evaluations without improvement to stop at; 0: off")
    stop("--monitor", default="", metavar="NAME", help="metric that chooses best.pt and feeds --patience")
    stop("--save-every-steps", type=count, default=0, help="also keep a numbered copy; 0: off")
    stop("--save-every-epochs", type=count, default=0, help="also keep a numbered copy; 0: off")
    stop("--keep", type=count, default=0, help="numbered copies of each kind to keep, the newest; 0: all")


def add_data_arguments(parser):
    """Declare the flags about faults and rare classes that every script has."""
    faults = parser.add_argument_group("faults in the data, rare classes").add_argument
    faults("--check-data", action="store_true", help="list every fault, write data_faults.json, exit 2 or 0")
    skip = "pictures that cannot be read; skip reads every picture once before training"
    faults("--bad-images", choices=("error", "skip"), default="error", help=skip)
    faults("--balance-data", action="store_true", help="show pictures of rare classes more often")
    weights = "weight of classes in the classification loss"
    faults("--class-weights", default="", metavar="NAME=W,...", help=weights)


def add_detection_arguments(parser, masks=False):
    """Declare the flags about data that every detector on pictures and boxes has; masks: no csv and VOC, which have
    none."""
    boxes = parser.add_argument_group("boxes and their files").add_argument
    boxes("--bad-boxes", choices=("drop", "error"), default="drop", help="boxes without area")
    boxes("--coco-train", default="train2017", metavar="SET", help="annotations/instances_SET.json and the folder SET")
    boxes("--coco-val", default="val2017", metavar="SET", help="the same for validation")
    keep = "keep a checkpoint's order of classes where the data have another"
    boxes("--remap-by-name", action="store_true", help=keep)
    if masks:
        return
    rows = "rows path,x1,y1,x2,y2,class, path,,,,, for no box; else train.csv, val.csv, classes.csv in --data"
    boxes("--csv-train", default="", metavar="FILE", help=rows)
    boxes("--csv-val", default="", metavar="FILE", help="the same to validate on, needed with --csv-train")
    boxes("--csv-classes", default="", metavar="FILE", help="rows name,id; without it, the names found")
    boxes("--voc-offset", type=int, choices=(0, 1), default=1, help="number of the first pixel in VOC's xml")


def names_in_data(args):
    """What data.detection.load is to know of the flags that `add_detection_arguments` declared -> dict."""
    names = {"coco_sets": (args.coco_train, args.coco_val), "remap_by_name": args.remap_by_name}
    if "voc_offset" in args:
        names["csv_files"] = (args.csv_train, args.csv_val, args.csv_classes)
        names["voc_offset"] = args.voc_offset
    return names


def choose_monitor(name, default, metrics):
    """--monitor, or the default where it is not given; UsageError where no evaluation yields such a metric.

    mAP50 is AP at an IoU of 0.5 under whichever name `metrics` have it: COCO's AP50, else VOC's mAP.
    """
    if name == "mAP50":
        name = "AP50" if "AP50" in metrics else "mAP" if "mAP_11point" in metrics else name
    if name and name not in metrics:
        raise UsageError(f"--monitor {name}: not measured by this run; use one of {', '.join(metrics)}")
    return name or default


def need_weights(evaluate_only, weights, flag):
    """UsageError where --eval-only would score an untrained network: `weights`, --resume's or `flag`'s, are none."""
    if evaluate_only and not weights:
        raise UsageError(f"--eval-only: no weights; give --resume auto or {flag} FILE")


def parse(parser, argv=None):
    """Parse `argv` (default: the command line) over the recipe it names, over the defaults -> Namespace.

    Mistakes end in parser.error (exit 2), which names the flag, or the recipe and its key, and the nearest known name.
    """
    parser.allow_abbrev = False  # `--epoch` must not pass for `--epochs` today and mean another flag tomorrow
    argv = _registered_spellings(parser, sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default="")
    recipe = finder.parse_known_args(argv)[0].config
    if recipe:
        _apply_recipe(parser, recipe)
    return parser.parse_args(argv)


def run(main, *mistakes):
    """Call `main()`; a UsageError or one of `mistakes` becomes `error: ...` on stderr and exit code 2."""
    try:
        main()
    except (UsageError, *mistakes) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _canonical(name):
    return name.lstrip("-").replace("_", "-")


def _known(parser):
    """Canonical name -> (option string as registered, action), of all long flags."""
    return {
        _canonical(option): (option, action)
        for action in parser._actions  # argparse offers no public list
        for option in action.option_strings
        if option.startswith("--")
    }


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; see --help"


def _registered_spellings(parser, argv):
    """Rewrite the long flags in `argv` to the spelling they were declared with; unknown ones are errors."""
    known = _known(parser)
    rewritten = []
    for place, word in enumerate(map(str, argv)):
        if word == "--":
            return rewritten + [str(rest) for rest in argv[place:]]
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if _canonical(flag) not in known:
                options = [option for option, _ in known.values()]
                parser.error(f"unknown flag {flag}{_nearest(flag.replace('_', '-'), options)}")
            word = known[_canonical(flag)][0] + equals + value
        rewritten.append(word)
    return rewritten


def _apply_recipe(parser, path):
    """Make the values of the TOML file at `path` the parser's defaults."""
    known = {name: action for name, (_, action) in _known(parser).items() if name not in ("help", "config")}
    seen = {}
    for key, value in _read_toml(parser, path).items():
        name = _canonical(key)
        if name not in known:
            parser.error(f"{path}: unknown key {key}{_nearest(name, known)}")
        action = known[name]
        if action.dest in seen:
            parser.error(f"{path}: {seen[action.dest]} and {key} are one flag; keep one of them")
        seen[action.dest] = key
        try:
            parser.set_defaults(**{action.dest: _recipe_value(action, name, value)})
        except (ValueError, TypeError, argparse.ArgumentTypeError) as fault:
            parser.error(f"{path}: {key}: {fault}")
        action.required = False


def _read_toml(parser, path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as fault:
        near = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.toml"))[:8])
        parser.error(f"--config {path}: {fault.strerror}" + (f"; recipes there: {near}" if near else ""))
    except ValueError as fault:  # bad TOML or not UTF-8
        parser.error(f"{path}: not a TOML file: {fault}")


def _recipe_value(action, name, value):
    """The value that the command line would have given, with the flag's own type, choices and count."""
    if isinstance(value, dict):
        raise ValueError("is a table; a recipe is a flat list of flags")
    if action.nargs == 0:  # store_true and its kin
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, not {value!r}")
        paired = isinstance(action, argparse.BooleanOptionalAction)
        if not paired and not isinstance(action.const, bool):
            raise ValueError("is for the command line, not for a recipe")
        return value != (name.startswith("no-") if paired else not action.const)
    if action.nargs in ("*", "+") or isinstance(action.nargs, int):
        items = value if isinstance(value, list) else [value]
        wanted = {"*": 0, "+": 1}.get(action.nargs, action.nargs)
        if len(items) < wanted or (isinstance(action.nargs, int) and len(items) > wanted):
            raise ValueError(f"expected {wanted} values, not {len(items)}")
        return [_recipe_scalar(action, item) for item in items]
    listed = action.type in (None, numbers) and isinstance(value, list)
    if listed and value and all(type(item) in (int, float) for item in value):
        value = ",".join(map(str, value))  # `milestones = [80, 100]` for `--milestones 80,100`
    return _recipe_scalar(action, value)


def _recipe_scalar(action, value):
    convert = action.type or str
    numeric = convert in (int, float) or hasattr(convert, "numeric")
    if isinstance(value, bool) and convert is not str2bool:
        raise ValueError(f"expected {'a number' if numeric else 'text'}, not {str(value).lower()}")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected one value, not {value!r}")
    if numeric and isinstance(value, str):
        raise ValueError(f"expected a number, not the text {value!r}")
    try:
        converted = convert(str(value))
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise ValueError(f"{value!r} is not {kinds.get(convert, 'valid')}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{converted!r} is none of {', '.join(map(str, action.choices))}")
    return converted
