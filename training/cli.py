"""Command lines and recipes: default < recipe (TOML, --config) < command line.

With --eval-only the flags of the run that is evaluated come between the recipe and the command line.

A recipe sets flags of its script under any of their names, with hyphens or underscores. A mistyped flag or key is an
error that names the nearest known one; nothing is abbreviated, guessed or derived.
"""

import argparse
import difflib
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from training import connection, memory, saved_flags
from utils.errors import UsageError, UserError, printable
from utils.files import open_regular

LONG_FLAGS = {"classes", "class_weights"}  # lists of class names
MAX_NAME, MAX_PATH = 255, 4095  # characters of the name and of the path of a file


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of a description, names the value of a flag once, as Python 3.13 does (`-a, --b VALUE`), and
    ends each line of help with its default, if that is informative."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", action.dest.upper())

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_help_string(self, action):
        default = action.default
        if default in (None, "", [], argparse.SUPPRESS) or "default:" in action.help:
            return action.help
        if isinstance(action, argparse.BooleanOptionalAction) and isinstance(default, bool):
            default = action.option_strings[not default]  # --x or --no-x
        elif action.nargs == 0:
            return action.help
        return f"{action.help} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with recipes; hyphens and underscores in the names of flags mean the same."""

    def __init__(self, prog: str, description: str, usage: str | None = None):
        super().__init__(prog, usage, description, formatter_class=HelpFormatter, allow_abbrev=False)
        self._recipe = ""  # the file whose keys are being parsed, named in errors

    def error(self, message):
        super().error(printable(f"{self._recipe}: {message}" if self._recipe else message))

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse `argv` (default: the command line) over the recipe that it names over the defaults.

        With --eval-only, flags that are not in `argv` are those of the run that --resume or --weights names, see
        `saved_flags`, and the default of --model-dir is the folder of its checkpoint.

        Mistakes end in `error` (exit code 2), which names the flag, or the recipe and its key.
        """
        argv = self._declared_spellings(sys.argv[1:] if argv is None else argv)
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        finder.add_argument("--config", default="")
        self._recipe = finder.parse_known_args(argv)[0].config
        namespace = self.parse_args(self._recipe_words(self._read_toml(self._recipe))) if self._recipe else None
        self._recipe = ""
        args = self.parse_args(argv, namespace)
        self._check_names(args)
        if "eval_only" not in args:
            return args
        if args.eval_only:
            self._take_flags_of_run(args, argv)
        elif args.split:
            self.error(f"--split {args.split}: is for --eval-only; add it")
        return args

    def _check_names(self, args):
        """An error for a value that is too long for the name of a file. Only lists and URLs are longer."""
        for action in self._actions:
            values = getattr(args, action.dest, None)
            if action.dest in LONG_FLAGS:
                continue
            for value in values if isinstance(values, list) else [values]:
                if not isinstance(value, str) or "://" in value:
                    continue
                if len(value) > MAX_PATH or max(map(len, re.split(r"[/\\]", value))) > MAX_NAME:
                    name = action.option_strings[0] if action.option_strings else action.dest
                    self.error(f"argument {name}: {value[:40]}... is longer than the name of a file can be")

    def _take_flags_of_run(self, args, argv):
        """Change `args` to the flags of the run that --eval-only evaluates, except those in `argv`."""
        unset = object()
        probe = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        given = {name for name, value in vars(probe).items() if value is not unset}
        file, saved = saved_flags.find(args) or (None, {})
        saved, actions = saved_flags.choose(saved, given), {action.dest: action for action in self._actions}
        for name, value in saved.items():
            if name not in actions:
                continue  # of an earlier version
            if actions[name].choices and value not in (None, *actions[name].choices):
                self.error(f"{file}: its --{name} is {value}, which this script does not have; use the run's script")
            setting = [action for action in self._actions if action.dest == name]
            if reason := saved_flags.misfit(value, getattr(args, name), setting):
                self.error(f"{file}: its --{name} cannot be read: {reason}; use another copy")
            setattr(args, name, value)
        if file and "model_dir" not in given:
            args.model_dir = str(file.parent)

    def _flags(self):
        """{name without dashes and underscores: (option as declared, its action)} of all long flags."""
        return {
            _canonical(option): (option, action)
            for action in self._actions  # argparse offers no public list
            for option in action.option_strings
            if option.startswith("--")
        }

    def _declared_spellings(self, argv):
        """`argv` with its long flags in the spelling they were declared with; an unknown flag is an error."""
        flags, words = self._flags(), []
        for place, word in enumerate(map(str, argv)):
            if word == "--":
                return words + [str(rest) for rest in argv[place:]]
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                if _canonical(flag) not in flags:
                    options = [option for option, action in flags.values() if action.help != argparse.SUPPRESS]
                    self.error(f"unknown flag {flag}{_nearest(flag.replace('_', '-'), options)}")
                word = flags[_canonical(flag)][0] + equals + value
            words.append(word)
        return words

    def _recipe_words(self, recipe):
        """The command line with the same meaning as the recipe, a dict of keys and values."""
        flags, words, keys = self._flags(), [], {}
        del flags["config"], flags["help"]
        for key, value in recipe.items():
            name = _canonical(key)
            if name not in flags:
                self.error(f"unknown key {key}{_nearest(name, flags)}")
            option, action = flags[name]
            if action.dest in keys:
                self.error(f"{keys[action.dest]} and {key} are the same flag; keep one of them")
            keys[action.dest] = key
            if isinstance(value, dict):
                self.error(f"{key}: is a table; a recipe is a flat list of flags")
            elif action.nargs == 0:
                words += self._switch(key, option, action, value)
            elif isinstance(value, list):
                items = [_word(item) for item in value]
                words += [f"{option}={','.join(items)}"] if action.nargs is None else [option, *items]
            else:
                words.append(f"{option}={_word(value)}")
            if any("\0" in word for word in words):
                self.error(f"{key}: has a null byte, which no name or number contains")
        return words

    def _switch(self, key, option, action, value):
        """The words for a flag without a value, which a recipe turns on or off."""
        if not isinstance(value, bool):
            self.error(f"{key}: expected true or false, not {value!r}")
        if value:
            return [option]
        if isinstance(action, argparse.BooleanOptionalAction):
            return [other for other in action.option_strings if other != option]  # --x and --no-x
        return []

    def _read_toml(self, path):
        try:
            with open_regular(path) as file:
                return tomllib.load(file)
        except OSError as error:
            nearby = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.toml"))[:8])
            self.error(f"{error.strerror}" + (f"; recipes nearby: {nearby}" if nearby else ""))
        except (ValueError, RecursionError) as error:  # bad TOML, not UTF-8, or nested too deeply
            self.error(f"not a TOML file: {error}")


def run(main: Callable[[], object]) -> None:
    """Call `main()`; a UserError becomes `error: ...` on stderr and exit code 2. So do the loss of another process and
    of a data loading worker."""
    try:
        with connection.explain_loss(), memory.explain_killed_worker():
            main()
    except UserError as error:
        if error.is_printed:
            print(f"error: {error}", file=sys.stderr)
        connection.end(2)
    except KeyboardInterrupt:  # in a program without utils.interrupts
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def number(kind: type, min_: float, below: float | None = None, max_: float | None = None) -> Callable[[str], float]:
    """A `type=` for argparse: a finite int or float, at least `min_`, and if given, below `below` or at most `max_`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole ' if kind is int else 'a '}number") from None
        if not value >= min_:  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is below {min_}")
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f"{text} is not below {below}")
        if max_ is not None and value > max_:
            raise argparse.ArgumentTypeError(f"{text} is above {max_}")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        return value

    convert.metavar = "N" if kind is int else "X"  # in the help
    return convert


MAX_COUNT = 10**9  # of steps, epochs and images
count, positive = number(int, 0, max_=MAX_COUNT), number(int, 1, max_=MAX_COUNT)
MIN_SIDE, MAX_SIDE = 16, 8192  # pixels of a network's input
pixels = number(int, MIN_SIDE, max_=MAX_SIDE)
seed = number(int, 0, max_=2**63 - 1)
non_negative, probability = number(float, 0), number(float, 0, max_=1)


def score(text: str) -> float:
    """A `type=` for scores from 0 to 1, which other programs give in percent."""
    try:
        value = float(text.rstrip(" %"))
    except ValueError:
        value = math.nan
    if 1 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is above 1: scores are 0 to 1, and {value:g} % is {value / 100:g}")
    return probability(text)


def refuse(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """UsageError "--flag: reason" if one of the flags `names` is given, which would have no effect. Those that are not
    must be None or False."""
    given = [
        f"--{name.replace('_', '-')}" for name in names if not any(getattr(args, name) is off for off in (None, False))
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: {reason}")


def auto_count(text: str) -> int | None:
    """A `type=` for numbers that the program can choose: None for auto."""
    return None if text == "auto" else count(text)


def auto_workers(text: str) -> int | None:
    """A `type=` for --workers: 0 to 1024 processes, None for auto."""
    return None if text == "auto" else number(int, 0, max_=1024)(text)


def auto_stages(text: str) -> int | None:
    """A `type=` for --freeze-stages: 0 to 5, None for auto."""
    return None if text == "auto" else number(int, 0, max_=5)(text)


def numbers(text: str) -> list[float]:
    """A `type=` for flags like `--milestones 80,100`."""
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= MAX_COUNT for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 0 to {MAX_COUNT}, such as 80,100")
    return values


def boolean(text: str) -> bool:
    """A `type=` for flags that spell their value out, like `--use-cuda false`."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def prefixed(prefix: str) -> Callable[[str], str]:
    """A `type=` for names that may be given without their prefix: 50 or retinanet_resnet50."""
    return lambda text: text if text.startswith(prefix) else prefix + text


def add_run_arguments(parser: ArgumentParser) -> None:
    """Declare the flags that every training script has. The script sets its own defaults with set_defaults."""
    arg = parser.add_argument_group("run").add_argument
    arg("--config", default="", metavar="TOML", help="recipe: a file that sets flags; the command line overrides it")
    folder = "run folder: checkpoints, logs and TensorBoard files"
    arg("--model-dir", "--checkpoint-folder", default="runs/new", metavar="RUN", help=folder)
    resume = "continue a run at its very next step; without a value: auto, the newest checkpoint in --model-dir"
    arg("--resume", nargs="?", const="auto", default="", metavar="auto|RUN|FILE", help=resume)
    arg("--overwrite", action="store_true", help="delete the run in --model-dir and start a new one")
    evaluate = "evaluate --resume or --weights with the flags of their run, write RUN/evaluation, then exit"
    arg("--eval-only", action="store_true", help=evaluate)
    split = "with --eval-only: name of the split in --data to evaluate (csv: a csv file); default: that of validation"
    arg("--split", default="", metavar="NAME", help=split)
    preflight = "run one step and one evaluation on the largest batches, print the peak memory, exit"
    arg("--preflight", action="store_true", help=preflight)
    arg("--seed", type=seed, default=0, help="random seed of initial weights, data order and augmentation")
    arg("--log-every", "--debug-steps", type=positive, default=10, metavar="N", help="log every N steps")
    levels = "warning: no line per step; debug: also print all flags"
    arg("--log-level", choices=("debug", "info", "warning"), default="info", help=levels)

    arg = parser.add_argument_group("devices").add_argument
    add_device_arguments(arg)
    arg("--gpus", default="", metavar="0,1", help="several GPUs in one process (DataParallel); see also torchrun")
    arg("--compile", action="store_true", help="compile the network with torch.compile; not for Mask R-CNN")
    arg("--sync-bn", action="store_true", help="synchronize batch norm over all processes (torchrun, GPUs)")
    workers = "data loading processes of each training process; auto: by the number of CPU cores"
    arg("--workers", "--num-workers", type=auto_workers, default="auto", metavar="auto|N", help=workers)
    exact = "kernels that give the same bits in every run, so that a resume is exact; a GPU may be slower with them. "
    exact += "Default: on, but off for Mask R-CNN and CenterFusion's DLA-34 on a GPU, which have kernels that cannot"
    arg("--deterministic", action=argparse.BooleanOptionalAction, help=exact)

    arg = parser.add_argument_group("training").add_argument
    arg("--epochs", "--num-epochs", type=positive, default=30, help="passes over the training set")
    arg("--steps", type=count, default=0, metavar="N", help="length of the run in steps instead of epochs; 0: off")
    max_steps = "stop after N steps, the learning rate schedule unchanged; 0: no limit"
    arg("--max-steps", type=count, default=0, metavar="N", help=max_steps)
    arg("--batch-size", type=positive, default=4, help="images per step, over all GPUs and processes")
    accumulate = "compute each batch in N micro-batches, to save memory"
    arg("--accumulate", type=positive, default=1, metavar="N", help=accumulate)
    arg("--optimizer", "--optim", choices=("sgd", "adam", "adamw"), default="sgd", help="optimizer")
    arg("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of sgd")
    arg("--weight-decay", type=non_negative, default=5e-4, help="weight decay")
    norms = "weight decay of batch norm and biases; default: --weight-decay"
    arg("--norm-weight-decay", type=non_negative, metavar="DECAY", help=norms)
    arg("--clip-norm", type=non_negative, default=0.0, metavar="NORM", help="maximum gradient norm; 0: no clipping")
    ema = "decay of an exponential moving average of the weights, which is then evaluated; 0: off"
    arg("--ema", type=number(float, 0, 1), default=0.0, metavar="DECAY", help=ema)
    frozen = "freeze batch norm, statistics and affine parameters"
    arg("--freeze-bn", action=argparse.BooleanOptionalAction, default=False, help=frozen)
    statistics = "freeze the statistics of batch norm alone; the default of train_retinanet.py"
    arg("--freeze-bn-stats", dest="freeze_bn", action="store_const", const="stats", default=None, help=statistics)

    arg = parser.add_argument_group("learning rate").add_argument
    arg("--lr", "--learning-rate", type=non_negative, default=0.01, help="base learning rate")
    schedules = "learning rate schedule; plateau: times --gamma when an epoch's loss has not fallen for 3 epochs"
    arg("--scheduler", choices=("constant", "cosine", "multi-step", "plateau"), default="multi-step", help=schedules)
    cosine = "cosine: epochs until zero; 0: --epochs"
    arg("--t-max", type=number(float, 0, max_=MAX_COUNT), default=0, metavar="EPOCHS", help=cosine)
    milestones = "multi-step: epochs after which the learning rate is multiplied by --gamma"
    arg("--milestones", "--lr-step", type=numbers, default="8,11", metavar="E,E", help=milestones)
    in_steps = "the same in steps, such as 150000,300000; replaces --milestones"
    arg("--milestone-steps", type=numbers, metavar="N,N", help=in_steps)
    arg("--gamma", type=non_negative, default=0.1, help="factor of multi-step and plateau")
    warmup = "linear warm-up over N steps; auto: over the first epoch, at most 1001 steps"
    arg("--warmup-steps", type=auto_count, default=0, metavar="auto|N", help=warmup)
    factor = "factor of the learning rate at the first step of the warm-up; default: 1 / N"
    arg("--warmup-factor", type=probability, metavar="X", help=factor)
    intended = "batch size that the learning rates are for; 0: unknown"
    arg("--lr-batch-size", type=count, default=0, metavar="N", help=intended)
    arg("--scale-lr", action="store_true", help="scale the learning rates from --lr-batch-size to --batch-size")

    arg = parser.add_argument_group("validation, checkpoints, early stopping").add_argument
    validate = "validate every N epochs"
    arg("--validation-epochs", "--val-intervals", type=positive, default=1, metavar="N", help=validate)
    arg("--validation-steps", type=count, default=0, metavar="N", help="validate every N steps instead; 0: off")
    monitor = "metric that selects best.pt and is used by --patience, such as loss"
    arg("--monitor", default="", metavar="METRIC", help=monitor)
    patience = "stop after N validations without improvement; 0: off"
    arg("--patience", type=count, default=0, metavar="N", help=patience)
    arg("--save-every-steps", type=count, default=0, metavar="N", help="keep a checkpoint every N steps; 0: off")
    arg("--save-every-epochs", type=count, default=0, metavar="N", help="keep a checkpoint every N epochs; 0: off")
    epochs = "also keep the checkpoints of these epochs, such as 20,40"
    arg("--save-epochs", "--save-point", type=numbers, default="", metavar="E,E", help=epochs)
    arg("--keep", type=count, default=0, metavar="N", help="keep only the newest N of each kind of these; 0: all")


def add_device_arguments(arg: Callable) -> None:
    """Declare --device and --precision with `arg`, the add_argument of a parser or group."""
    arg("--device", default="auto", help="auto, cpu, cuda, or one GPU such as cuda:1")
    precision = "precision of the forward pass; auto: bf16 where the GPU or CPU computes in it natively, else fp32"
    arg("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=precision)


def add_weights_arguments(parser: ArgumentParser, size: str) -> None:
    """Declare --labels, --size and --priors, which say what bare weights do not store; size: help of --size."""
    arg = parser.add_argument_group("published files and bare weights").add_argument
    names = "class names, one per line; default: those in the checkpoint, or in a labels.txt beside bare weights"
    arg("--labels", default="", metavar="FILE", help=names)
    arg("--size", type=pixels, nargs="+", action=SizeAction, metavar=("H", "W"), help=size)
    priors = "priors of bare mb1-ssd weights at other sizes than 300: those of jetson-inference, or those of 300 scaled"
    arg("--priors", choices=("scaled", "jetson"), default="", help=priors)


class SizeAction(argparse.Action):
    """For a flag of one or two numbers: [height, width], equal if one is given."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} {' '.join(map(str, values))}: give one number, or two")
        setattr(namespace, self.dest, (values * 2)[:2])


def add_data_arguments(parser: ArgumentParser) -> None:
    """Declare the flags about errors in the data and about rare classes that every training script has."""
    arg = parser.add_argument_group("errors in the data, rare classes").add_argument
    report = "read the whole data set, list all errors, write data_errors.json, exit (code 2 if there are any)"
    arg("--check-data", action="store_true", help=report)
    skip = "what to do with images that cannot be read; skip reads every image once before training"
    arg("--bad-images", choices=("error", "skip"), default="error", help=skip)
    arg("--balance-data", action="store_true", help="show images of rare classes more often")
    weights = "weights of classes in the classification loss; the others have 1"
    arg("--class-weights", default="", metavar="NAME=W,...", help=weights)


def fault_policies(args: argparse.Namespace) -> tuple[str, str, int]:
    """bad_boxes, bad_images and workers of data.checks.apply."""
    return args.bad_boxes, args.bad_images, args.workers


def add_detection_arguments(parser: ArgumentParser, masks: bool = False) -> None:
    """Declare the flags about annotation files that every 2D detector has.

    masks: only those of layouts that can have masks, so none of csv and VOC
    """
    arg = parser.add_argument_group("annotation files").add_argument
    invalid = "what to do with invalid boxes: without area, or outside the image"
    arg("--bad-boxes", choices=("drop", "error"), default="drop", help=invalid)
    coco_set = "COCO: name of the training set, whose files are annotations/instances_SET.json and SET/"
    arg("--coco-train", default="train2017", metavar="SET", help=coco_set)
    arg("--coco-val", default="val2017", metavar="SET", help="COCO: the same for validation")
    order = "keep the class order of the checkpoint if the data has the same names in another order"
    arg("--remap-by-name", action="store_true", help=order)
    if masks:
        return
    rows = "csv: a file of rows path,x1,y1,x2,y2,class (path,,,,, for no box) instead of train.csv in --data"
    arg("--csv-train", default="", metavar="FILE", help=rows)
    arg("--csv-val", default="", metavar="FILE", help="csv: the same for validation; required with --csv-train")
    arg("--csv-classes", default="", metavar="FILE", help="csv: rows name,id; default: the names in the rows")
    first = "VOC: coordinate of the first pixel in the xml files: 1 in Pascal VOC, 0 in those of some tools"
    arg("--voc-offset", type=int, choices=(0, 1), default=1, help=first)


def add_score_arguments(
    parser: ArgumentParser, score_threshold: float, nms_iou: float, detections_per_image: int
) -> None:
    """Declare which detections of a 2D detector are evaluated, with the defaults, and how they are scored."""
    arg = parser.add_argument_group("detections and their score, in validation and --eval-only").add_argument
    arg("--score-threshold", type=probability, default=score_threshold, help="minimum score of a detection")
    arg("--nms-iou", type=probability, default=nms_iou, help="IoU threshold of non-maximum suppression")
    maximum = "maximum number of detections per image; COCO's AP, where measured, counts at most 100 of each class"
    names = ("--detections-per-image", "--max-detections", "--most-detections")
    arg(*names, type=positive, default=detections_per_image, metavar="N", help=maximum)
    true = "minimum IoU of a true positive in mAP, AP/CLASS, the curves and confusion.csv; COCO's AP has its own"
    arg("--iou-threshold", type=number(float, 0.01, max_=1), default=0.5, help=true)
    points = "compute mAP and AP/CLASS at the 11 points of VOC2007, not as the area under the curve"
    arg("--use-2007-metric", type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help=points)


def detection_limits(args: argparse.Namespace) -> dict:
    """The limits of ops.nms.ssd_detections and retinanet_detections."""
    limits = {"score_threshold": args.score_threshold, "iou_threshold": args.nms_iou}
    return limits | {"max_detections": args.detections_per_image}


def score_options(args: argparse.Namespace, image_path: Callable[[int], str]) -> dict:
    """The options of evaluation.voc.VOCEvaluator; image_path(image_id) is the file of a validation image."""
    options = {"iou": args.iou_threshold, "use_2007": args.use_2007_metric}
    if args.dataset == "voc":
        options |= {"image_path": image_path, "offset": args.voc_offset}
    return options


def start_options(args: argparse.Namespace) -> dict:
    """The options of models.pretrained.init_weights: which weights a run starts from."""
    weights = {"weights": args.weights, "backbone_weights": getattr(args, "backbone_weights", "none")}
    return {**weights, "strict": args.eval_only, "freeze_bn": args.freeze_bn}


def layout_options(args: argparse.Namespace) -> dict:
    """The options of data.detection.load, from the flags that `add_detection_arguments` declared."""
    options = {"coco_sets": (args.coco_train, args.coco_val), "remap_by_name": args.remap_by_name}
    options |= {"val_only": args.eval_only, "split": args.split}
    if "voc_offset" in args:
        options["csv_files"] = (args.csv_train, args.csv_val, args.csv_classes)
        options["voc_offset"] = args.voc_offset
    return options


def add_nuscenes_arguments(parser: ArgumentParser) -> None:
    """Declare the flags about the parts of a nuScenes folder that are used, and about errors in it."""
    arg = parser.add_argument_group("data").add_argument
    folders = "folder with v1.0-*/, samples/ and sweeps/"
    arg("--data", "--dataset-root", default="data/nuscenes", help=folders)
    version = "folder of the tables; default: v1.0-mini for mini_*, v1.0-test for test, v1.0-trainval for other splits"
    arg("--version", default="", help=version)
    train = "train (needs nuscenes-devkit), trainval, mini_train, or a text file of scene names"
    arg("--train-split", default="train", metavar="SPLIT", help=train)
    val = "val (needs nuscenes-devkit), mini_val, or a text file of scene names; with --eval-only also test"
    arg("--val-split", default="mini_val", metavar="SPLIT", help=val)
    arg("--cache-dir", default="", metavar="DIR", help="folder of the parsed tables; default: beside the tables")
    arg("--skip-missing", action="store_true", help="leave out images and radar sweeps whose files are missing")
    invalid = "what to do with boxes of an impossible size, place or rotation"
    arg("--bad-boxes", choices=("drop", "error"), default="drop", help=invalid)


def nuscenes_options(args: argparse.Namespace) -> dict:
    """The options of data.nuscenes.load, from the flags that `add_nuscenes_arguments` declared."""
    splits = {"train_split": args.train_split, "val_split": args.val_split}
    if args.eval_only:
        splits = {"train_split": "", "val_split": args.split or args.val_split}
    options = {"version": args.version, **splits, "skip_missing": args.skip_missing}
    return {**options, "cache": args.cache_dir or None, "check": args.check_data}


def add_resize_arguments(parser: ArgumentParser, min_side: int, max_side: int) -> None:
    """Declare the size and augmentation of images that keep their aspect ratio, with the defaults in pixels."""
    arg = parser.add_argument_group("image size, augmentation").add_argument
    sides = "shortest side in pixels; of several, training draws one per image and validation takes the last"
    arg("--min-side", type=pixels, nargs="+", default=[min_side], metavar="PIXELS", help=sides)
    limit = {"type": number(int, MIN_SIDE, max_=100_000), "default": max_side, "metavar": "PIXELS"}
    arg("--max-side", help="maximum of the longest side", **limit)
    arg("--flip", type=probability, default=0.5, help="probability of a horizontal flip")
    jitter = "probability of each color change"
    arg("--color-jitter", "--colour", type=probability, default=0.0, help=jitter)


def choose_monitor(name: str, default: str, metrics: Sequence[str]) -> str:
    """--monitor, or the default if it is not given. UsageError if no evaluation measures such a metric.

    mAP50 is AP at an IoU of 0.5, which `metrics` may call AP50 (COCO) or mAP (VOC).
    """
    if name == "mAP50":
        name = "AP50" if "AP50" in metrics else "mAP" if "mAP_11point" in metrics else name
    if name and name not in metrics:
        raise UsageError(f"--monitor {name}: not measured by this run; use one of {', '.join(metrics)}")
    return name or default


def higher_is_better(metric: str) -> bool:
    """True for AP, AR, accuracy and NDS; False for losses and for nuScenes' errors."""
    return bool(re.match(r"(mask )?(m?AP|AR|NDS|top)", metric))


def _canonical(name):
    return name.lstrip("-").replace("_", "-")


def _word(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; see --help"
