"""The command line of the benchmarks. See the docstring of the package, or python -m benchmarks --help."""

import argparse
import gc
import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import benchmarks
import synthetic
from benchmarks import loading, nuscenes_tables, programs
from benchmarks.programs import Speed
from training import cli, distributed

DEFAULTS = {  # script -> layout of its drawn data set, arch, size, batch size
    "backbone": ("imagefolder", "resnet18", 224, 8),
    "ssd": ("coco", "vgg16-ssd", 300, 2),
    "retinanet": ("coco", "retinanet_resnet18", 256, 2),
    "maskrcnn": ("coco", "maskrcnn_resnet50", 256, 2),
    "centerfusion": ("nuscenes", "centerfusion_resnet18", 224, 2),
}
VARIANTS = {"ema": "--ema 0.999", "accumulate": "--accumulate 2", "compile": "--compile"}
QUICK = (  # the command lines that `python -m benchmarks` runs
    "tables --copies 200 --rounds 1",  # before the networks: a new process starts with the peak memory of its parent
    "loader --rounds 2",
    "backbone --size 128 --steps 5 --rounds 2",
    "ssd --steps 4 --rounds 2",
    "retinanet --size 192 --steps 5 --rounds 2 --variants ema accumulate",
    "maskrcnn --size 128 --steps 4 --rounds 2 --precision fp32",
    "centerfusion --size 128 --steps 5 --rounds 2",
)
GPU = (  # those of `python -m benchmarks gpu`; batch sizes are meant for 16 GB
    "backbone --arch resnet50 --size 224 --batch-size 64",
    "ssd --arch mb1-ssd --size 300 --batch-size 32",
    "ssd --arch vgg16-ssd --size 300 --batch-size 16",
    "retinanet --arch retinanet_resnet50 --size 608 --batch-size 4",
    "maskrcnn --arch maskrcnn_resnet50 --size 800 --batch-size 2",
    "centerfusion --arch centerfusion_dla34 --size 448 --batch-size 8",
)
GPU_FLAGS = "--device cuda --no-deterministic --workers auto --steps 120 --log-every 20 --rounds 2"
OF_A_PROGRAM = ("speed", "waiting", "memory")
HEADER = ("setting", "program", *OF_A_PROGRAM, "compared with", *OF_A_PROGRAM, "ratio", "range", "no waiting")


def parse_args(argv):
    formatter = {"formatter_class": cli.HelpFormatter}
    parser = argparse.ArgumentParser("python -m benchmarks", description=benchmarks.__doc__, **formatter)
    names = ("tables", "loader", *DEFAULTS)
    listed = f"{', '.join(names)}, gpu; its flags: BENCHMARK --help"
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK", help=listed)
    for name in names:
        arg = commands.add_parser(name, **formatter).add_argument
        arg("--rounds", type=cli.positive, default=3, help="how often each program runs")
        if name == "tables":
            arg("--copies", type=cli.positive, default=8000, help="size of the tables; 8000: that of v1.0-trainval")
            continue
        arg("--folder", type=Path, help="keep the drawn data sets here; else they are temporary")
        workers = "data loading processes; auto: one per CPU core"
        arg("--workers", type=worker_count, default=int(name == "loader"), metavar="auto|N", help=workers)
        if name == "loader":
            continue
        layout, arch, size, batch_size = DEFAULTS[name]
        arg("--data", type=Path, help=f"data set in the layout {layout}; else one is drawn")
        arg("--arch", default=arch, help="network architecture")
        arg("--size", type=cli.positive, default=size, help="shortest side of the images, in pixels")
        arg("--batch-size", type=cli.positive, default=batch_size, help="images per step")
        arg("--steps", type=cli.number(int, 2), default=9, help="steps per run; the first --log-every are a warm-up")
        arg("--log-every", type=cli.positive, default=1, help="steps that are timed together; on a GPU 10 or more")
        arg("--device", default="auto", help="auto, cpu, cuda, or one GPU such as cuda:1")
        precision = {"choices": ("fp32", "bf16", "fp16"), "default": ["fp32", "bf16"]}
        arg("--precision", nargs="+", help="of the forward pass, in turn", **precision)
        kernels = "let the script use what torchvision's loop uses: TF32 and faster kernels on a GPU"
        arg("--no-deterministic", dest="deterministic", action="store_false", help=kernels)
        arg("--variants", nargs="+", choices=VARIANTS, default=[], help="also compare the script with these flags")
    args = parser.parse_args(argv)
    if args.benchmark in DEFAULTS and args.steps < 2 * args.log_every:
        parser.error(f"--steps {args.steps}: must be at least twice --log-every")
    return args


def worker_count(text):
    """A `type=` for --workers."""
    return distributed.cores() if text == "auto" else cli.count(text)


def parse_all(argv):
    """The flags of every benchmark that a command line runs."""
    lines = [argv]
    if not argv:
        lines = [line.split() for line in QUICK]
    elif argv[0] == "gpu":
        lines = [f"{line} {GPU_FLAGS}".split() + argv[1:] for line in GPU]
    return [parse_args(line) for line in lines]


def interleave(runs, rounds):
    """Call the functions of `runs` (by name) in turn, `rounds` times: {name: its results}."""
    results = {name: [] for name in runs}
    for _, name in tqdm(list(itertools.product(range(rounds), runs)), unit="run", disable=None):
        gc.collect()  # what the run before left on a GPU is not in the peak of this one
        torch.cuda.empty_cache()
        results[name].append(runs[name]())
    return results


def row(setting, program, speeds, reference, reference_speeds):
    """A row of the table, as text, from the Speeds of a program and of its reference in each round."""
    cells = [setting]
    for name, each in ((program, speeds), (reference, reference_speeds)):
        cells += [name, f"{median(s.per_second for s in each):.4g}", f"{median(s.data_wait for s in each):.0%}"]
        peak = max(s.memory for s in each)
        cells.append(f"{peak:.0f} MB" if peak else "")
    ratios = [a.per_second / b.per_second for a, b in zip(speeds, reference_speeds)]
    no_waiting = [a.without_wait / b.without_wait for a, b in zip(speeds, reference_speeds)]
    return [*cells, f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{median(no_waiting):.2f}"]


def table(rows):
    """Rows of text as a Markdown table with aligned columns; those that are empty in all rows are left out."""
    rows = list(zip(*(column for column in zip(*rows) if any(column[1:]))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def draw(layout, folder, images=60):
    """A drawn data set with images as large as VOC's or nuScenes'."""
    size = (1600, 900) if layout == "nuscenes" else (500, 375)
    return synthetic.draw(layout, folder / f"{layout}_{images}", images, size=size)


def compare_scripts(args, folder):
    """A training script with torchvision, with its network alone, and with itself with the flags of --variants."""
    images = max(60, 4 * args.batch_size)
    data = args.data or draw(DEFAULTS[args.benchmark][0], args.folder or folder, images)
    runs = {}
    for precision in args.precision:
        common = args, precision, data, folder / "run"
        runs[precision, "script"] = partial(programs.script, *common)
        if programs.in_torchvision(args):
            runs[precision, "torchvision"] = partial(programs.torchvision_loop, *common)
        if args.benchmark != "maskrcnn":
            runs[precision, "network alone"] = partial(programs.network_alone, *common)
        for flags in map(VARIANTS.get, args.variants):
            runs[precision, flags] = partial(programs.script, *common, flags)
    setting = "{}, {} x {} x {}".format(args.arch, args.batch_size, *programs.image_size(args))
    results, rows = interleave(runs, args.rounds), []
    for (precision, name), speeds in results.items():
        if name != "script":
            rows.append(row(f"{setting}, {precision}", "script", results[precision, "script"], name, speeds))
    return rows


def compare_loaders(args, folder):
    """The loaders of the scripts with Pillow."""
    runs = {}
    for script, layout in loading.LAYOUTS.items():
        batches = loading.script_loader(script, draw(layout, args.folder or folder), args.workers)
        for name, each in (("loader", batches), ("decoding", loading.decoder(batches))):
            runs[script, name] = partial(loading.speed, each)
    results = interleave(runs, args.rounds)
    setting = f"per worker, {args.workers} of them" if args.workers else "without workers"
    return [
        row(f"{script} loader, {setting}", "script", results[script, "loader"], "Pillow", results[script, "decoding"])
        for script in loading.LAYOUTS
    ]


def compare_tables(args, folder):
    """Opening nuScenes' tables from the cached arrays with parsing the JSON files."""
    nuscenes_tables.draw(folder, args.copies)
    samples, speeds, peaks = args.copies * nuscenes_tables.SAMPLES, [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            opened = [nuscenes_tables.open_in_new_process(folder, cache) for _ in range(2)]  # the first fills the cache
        speeds.append([Speed(samples / each["seconds"]) for each in opened])
        peaks.append([each["memory"] / 1e9 for each in opened])
    (parsed, cached), (parsed_peak, cached_peak) = zip(*speeds), map(max, zip(*peaks))
    names = f"from the cache, {cached_peak:.1f} GB", f"parsed, {parsed_peak:.1f} GB"
    return [row(f"nuScenes tables, {samples} samples", names[0], cached, names[1], parsed)]


def main(argv=None):
    """Run a benchmark, that of `gpu`, or without arguments the quick set. Prints the table, and returns its rows."""
    argv = sys.argv[1:] if argv is None else argv
    compare = {"loader": compare_loaders, "tables": compare_tables}
    rows = [HEADER]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for args in parse_all(argv):
                rows += compare.get(args.benchmark, compare_scripts)(args, Path(folder))
        finally:  # after an error, such as a full GPU, the rows before it
            if len(rows) > 1:
                print(table(rows))
    return rows


if __name__ == "__main__":
    cli.run(main)
