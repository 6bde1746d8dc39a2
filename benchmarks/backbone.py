"""What a step of train_backbone.py costs beyond its network, and what a loader worker costs beyond decoding.

    python -m benchmarks.backbone
    python -m benchmarks.backbone --archs resnet18 resnet50 mobilenet_v2 --batch-size 64 --device cuda

Step ratio: a full step as in train_backbone.py (copy, normalise, forward, loss, accuracy, backward, update) over a bare
forward, backward and update of the same network with a sum for a loss, on the same batches, interleaved. Goal: 1.05.
Loader: pictures a second of one worker (decode, augment, collate) over bare decoding by Pillow, one thread each.
"""

import argparse
import tempfile
import time

import torch
from PIL import Image

import models
from benchmarks.timing import quickest
from data import drawn, folders, loader, transforms
from losses import classification
from ops.images import normalize
from train_backbone import accuracy
from training import devices


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet50"], help="networks of train_backbone.py")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15, help="the quickest step of each kind counts")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def steps(arch, batches, run):
    """(full, bare): one training step each, of the same network."""
    net = models.build(arch, 1000).to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    pixels = [normalize(images.to(run.device), net.image_mean, net.image_std) for images, _ in batches]

    def full(i):
        images, labels = batches[i % len(batches)]
        images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
        labels = labels.to(run.device, non_blocking=True)
        with run.autocast():
            logits = net(images)
        classification.loss(logits, labels, len(labels))["cross_entropy"].backward()
        accuracy(logits, labels, len(labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare(i):
        with run.autocast():
            logits = net(pixels[i % len(batches)])
        logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return full, bare


def loader_ratio(dataset, size, repeats=3):
    """(pictures a second of the loader, of bare decoding), one thread, best of interleaved repeats."""
    dataset.transform = transforms.classify_train(size)
    paths = [dataset.path(i) for i in range(len(dataset))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker

    def load():
        loader.collate_labels([dataset[0, i] for i in range(len(dataset))])

    def decode():
        for path in paths:
            Image.open(path).convert("RGB").load()

    best = {load: 0.0, decode: 0.0}
    for _ in range(repeats):
        for work in (decode, load):
            begun = time.perf_counter()
            work()
            best[work] = max(best[work], len(paths) / (time.perf_counter() - begun))
    torch.set_num_threads(threads)
    return best[load], best[decode]


def main(argv=None):
    args = parse_args(argv)
    random = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.resolution, args.resolution)
    batches = [
        (
            torch.randint(256, shape, dtype=torch.uint8, generator=random),
            torch.randint(1000, shape[:1], generator=random),
        )
        for _ in range(2)
    ]
    print(f"batch {args.batch_size}, {args.resolution} x {args.resolution}")
    for precision in ("fp32", "bf16"):
        run = devices.setup(args.device, precision=precision)
        for arch in args.archs:
            full, bare = quickest(run, steps(arch, batches, run), args.rounds)
            figures = f"full step {1000 * full:.0f} ms, bare {1000 * bare:.0f} ms, ratio {full / bare:.3f}"
            print(f"{arch:12} {precision}  {figures}", flush=True)
    print(devices.describe(run))
    with tempfile.TemporaryDirectory() as folder:
        root = drawn.draw_imagefolder(f"{folder}/set", images=100, seed=0, size=(500, 375))
        load, decode = loader_ratio(folders.load(root)[0], args.resolution)
    rates = f"{load:.0f} pictures of 500 x 375 a second, bare decoding {decode:.0f}"
    print(f"loader worker {rates}, ratio {load / decode:.3f}")


if __name__ == "__main__":
    main()
