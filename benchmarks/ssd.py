"""What SSD training costs beyond its network, and what a loader worker costs beyond decoding.

    python -m benchmarks.ssd                        drawn photos, 8 pictures a batch
    python -m benchmarks.ssd --data data/drone      a VOC folder of yours

Step ratio: a full step as in train_ssd.py (copy, normalise, match, forward, loss, backward, update) over a bare
forward, backward and update of the same network with a sum for a loss, on the same batches, interleaved. Goal: 1.05.
Loader ratio: pictures a second of one worker (decode, augment, collate) over bare JPEG decoding of the same files by
Pillow, one thread each. Goal: 0.35 at least.
"""

import argparse
import tempfile
import time

import torch
from PIL import Image

import models
from benchmarks.timing import quickest
from data import drawn, loader, transforms, voc
from losses import assignment, multibox
from ops.images import normalize
from training import devices


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="VOC folder; default: drawn pictures of 500 x 375, VOC's usual size")
    parser.add_argument("--nets", nargs="+", default=["mb1-ssd", "vgg16-ssd"], choices=sorted(models.ARCHITECTURES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps; the quickest of each kind counts")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def step_ratio(name, dataset, batch_size, rounds, run):
    """(seconds of a full step, seconds of a bare step): the quickest of interleaved rounds, 5 or a minute's worth.

    The quickest, for whatever else the machine does only ever adds time.
    """
    net = models.build(name, len(dataset.classes)).to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    dataset.transform = transforms.ssd_train((300, 300), net.image_mean)
    batches = [loader.collate([dataset[i * batch_size + k] for k in range(batch_size)]) for i in range(2)]
    pixels = [normalize(images.to(run.device), net.image_mean, net.image_std) for images, _ in batches]
    anchors = net.anchors((300, 300))

    def full(i):
        images, targets = batches[i % 2]
        inputs = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
        goals = assignment.assign(anchors, targets, net.box_weights)
        positives = assignment.count(goals).clamp(min=1)
        with run.autocast():
            outputs = net(inputs)
        sum(multibox.loss(outputs, goals, positives).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare(i):
        with run.autocast():
            outputs = net(pixels[i % 2])
        (outputs["logits"].sum() + outputs["offsets"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return quickest(run, (full, bare), rounds)


def loader_ratio(dataset, mean, repeats=3):
    """(pictures a second of the loader, of bare decoding), one thread, best of interleaved repeats."""
    dataset.transform = transforms.ssd_train((300, 300), mean)
    paths = [dataset.paths[i] for i in range(len(dataset))]
    sampler = loader.StepSampler(len(dataset), 8, len(dataset) // 8, seed=0)

    def load():
        for keys in sampler:
            loader.collate([dataset[key] for key in keys])

    def decode():
        for path in paths[: len(sampler) * 8]:
            Image.open(path).convert("RGB").load()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    best = {load: 0.0, decode: 0.0}
    for _ in range(repeats):
        for work in (decode, load):
            begun = time.perf_counter()
            work()
            best[work] = max(best[work], len(sampler) * 8 / (time.perf_counter() - begun))
    torch.set_num_threads(threads)
    return best[load], best[decode]


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or drawn.draw_voc(f"{folder}/voc", images=80, seed=0, size=(500, 375))
        dataset = voc.load([root], "train", faults=[])
        print(f"{len(dataset)} pictures from {args.data or 'data.drawn'}, batch {args.batch_size}, 300 x 300")
        for precision in ("fp32", "bf16"):
            run = devices.setup(args.device, precision=precision)
            for name in args.nets:
                full, bare = step_ratio(name, dataset, args.batch_size, args.rounds, run)
                figures = f"full step {1000 * full:.0f} ms, bare {1000 * bare:.0f} ms, ratio {full / bare:.3f}"
                print(f"{name:10} {precision}  {figures}", flush=True)
        print(devices.describe(run))
        load, decode = loader_ratio(dataset, (127, 127, 127))
        print(f"loader worker {load:.0f} pictures a second, bare decoding {decode:.0f}, ratio {load / decode:.3f}")


if __name__ == "__main__":
    main()
