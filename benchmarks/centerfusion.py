"""What the parts of train_centerfusion.py cost: frustums and heatmaps, a step, a loader worker, opening the tables.

    python -m benchmarks.centerfusion
    python -m benchmarks.centerfusion --arch dla34 --size 448 800 --batch-size 16 --device cuda
    python -m benchmarks.centerfusion --tables

Radar handed to boxes, and heatmap targets: 8 pictures of 448 x 800 with 100 boxes each, against loops over boxes that
are written below, one thread each, in seconds of CPU; both must give the same. Goal: 20 times faster. "In a row" is the
quickest of many calls one after the other; "after other work" of calls that find nothing of theirs in the caches.
Step ratio: a full step as in train_centerfusion.py (copy, pillars, normalise, targets, association, forward, losses,
backward, update) over a bare forward, backward and update of the same network with a sum for a loss and the radar ready
made, on the same batches, interleaved. Goal: 1.10.
Loader: pictures a second of one worker (decode, boxes, radar of three sweeps, augment, collate) over bare decoding of
the same pictures by Pillow, one thread each, in seconds of CPU.
Tables: see benchmarks/nuscenes_tables.py.
"""

import argparse
import math
import tempfile
import time

import numpy as np
import torch
from PIL import Image

import models
from benchmarks import nuscenes_tables
from benchmarks.timing import quickest
from data import drawn, loader, nuscenes_radar, nuscenes_transforms
from losses import centerfusion
from ops.geometry import apply_affine, corners, project, yaw_to_alpha
from ops.radar import inputs
from training import devices
from training.modes import train_mode

STRIDE = 4  # input pixels a cell
DIMS, FAR, REACH = (1.5, 0.2, 0.2), 60.0, "published"  # of pillars; metres of radar; the published frustum
CLASSES, BOXES, POINTS = 10, 100, 250  # a picture: three sweeps of the three radars before a camera
FILE = (900, 1600)  # (h, w) of nuScenes' pictures
SIZES = ((1.7, 1.95, 4.6), (2.8, 2.5, 6.9), (3.5, 2.9, 11.2), (3.9, 2.9, 12.3), (3.2, 2.7, 6.6), (1.8, 0.7, 0.7))
SIZES += ((1.5, 0.8, 2.1), (1.3, 0.6, 1.7), (1.1, 0.4, 0.4), (1.0, 2.5, 0.5))  # h, w, l in metres, of each class
SHARES = (0.42, 0.08, 0.01, 0.02, 0.01, 0.19, 0.01, 0.01, 0.08, 0.17)  # of the classes, about those of nuScenes


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", choices=("dla34", "resnet18", "resnet34"), help="of the step")
    parser.add_argument("--batch-size", type=int, default=2, help="of the step")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 416), metavar=("H", "W"), help="pixels of the step")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of steps; the quickest of each kind counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tables", action="store_true", help="also open tables of full size; takes 3 GB of disk")
    return parser.parse_args(argv)


# ---- drawn objects


def draw_batch(batch_size, size, seed):
    """(images uint8 [B,3,H,W], targets): BOXES objects of nuScenes' sizes a picture, radar on them and between."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8, generator=random)
    return images, [draw_target(size, random) for _ in range(batch_size)]


def draw_target(size, random):
    """A target of data.nuscenes_radar as it leaves the transforms."""
    calib = torch.tensor([[1266.4, 0, 816.3, 0], [0, 1266.4, 491.5, 0], [0, 0, 1, 0]])
    scale = size[1] / FILE[1]
    affine = torch.tensor([[scale, 0, 0], [0, scale, (size[0] - scale * FILE[0]) / 2]])

    def places(count):
        depth = 5 + 55 * torch.rand(count, generator=random).sqrt()  # evenly over the ground
        side = (torch.rand(count, generator=random) - 0.5) * 1.2 * depth
        return torch.stack([side, 0.5 + torch.rand(count, generator=random), depth], 1)

    labels = torch.tensor(SHARES).multinomial(BOXES, replacement=True, generator=random)
    center, dims = places(BOXES), torch.tensor(SIZES)[labels]
    yaw = math.pi * (2 * torch.rand(BOXES, generator=random) - 1)
    solid = corners(center, dims, yaw).flatten(0, 1)
    solid[:, 2].clamp_(min=1)
    pixels = apply_affine(project(solid, calib)[0], affine).view(BOXES, 8, 2)
    edge = torch.tensor([size[1], size[0]] * 2)
    boxes = torch.cat([pixels.amin(1), pixels.amax(1)], 1).clamp(min=0).minimum(edge - 1)
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
    hit = center[torch.randint(BOXES, (POINTS // 2,), generator=random)]
    hit = hit + torch.randn(hit.shape, generator=random) * torch.tensor([0.5, 0.1, 1])
    points = torch.cat([hit, places(POINTS - len(hit))])
    return {
        "boxes": boxes,
        "labels": labels,
        "ignore": torch.zeros(BOXES, dtype=torch.bool),
        "center": center,
        "dims": dims,
        "alpha": yaw_to_alpha(yaw, center),
        "velocity": torch.randn(BOXES, 3, generator=random),
        "attribute": torch.randint(8, (BOXES,), generator=random),
        "amodal": apply_affine(project(center, calib)[0], affine),
        "calib": calib,
        "affine": affine,
        "radar": torch.cat([points, torch.randn(POINTS, 2, generator=random)], 1),
    }


# ---- what the script does with a batch


def assigned(targets, size, device, radar_map=None, calib=None):
    maps = {"size": [side // STRIDE for side in size], "stride": STRIDE, "num_classes": CLASSES}
    return centerfusion.assign(targets, device, radar_map, calib, **maps, threshold=REACH, max_distance=FAR)


# ---- frustums and heatmaps against loops over boxes


def associate_loop(radar_map, goals, calib):
    """`centerfusion.association` one box after the other, corners turned for its depth: how such programs have it."""
    result = torch.zeros_like(radar_map)
    for picture in range(len(radar_map)):
        held, (fx, _, cx, _) = radar_map[picture], calib[picture, 0]
        for number in range(int(goals["mask"][picture].sum())):
            left, top, right, bottom = goals["boxes"][picture, number]
            depth, alpha = goals["dep"][picture, number, 0], goals["alpha"][picture, number]
            yaw = alpha + torch.atan2((left + right) / 2 - cx, fx)
            deep = corners(yaw.new_zeros(3), goals["dim"][picture, number], yaw)[:, 2]
            reach = deep.max() - deep.min() / 2  # the published slip
            rows = slice(int(top.floor()), int(bottom.ceil()) + 1)
            columns = slice(int(left.floor()), int(right.ceil()) + 1)
            near = held[:, rows, columns].flatten(1)  # [3,cells]
            near = near[:, (near[0] > (depth - reach).clamp(min=0)) & (near[0] < depth + reach)]
            if near.shape[1]:
                values = near[:, near[0].argmin()] / near.new_tensor([FAR, 1, 1])
                x, y = (left + right) / 2, (top + bottom) / 2
                half_width, half_height = (right - left) * 0.15, (bottom - top) * 0.15
                rows = slice(max(0, int(y - half_height)), int(y + half_height) + 1)
                columns = slice(max(0, int(x - half_width)), int(x + half_width) + 2)
                result[picture, :, rows, columns] = values[:, None, None]
    return result


def heatmaps_loop(goals, size):
    """The heatmaps of `assigned`, one Gaussian after the other, in numpy: how such programs have it."""
    batch, (height, width) = len(goals["mask"]), size
    hm = np.zeros((batch, CLASSES, height, width), dtype=np.float32)
    boxes, labels, index = (goals[name].numpy() for name in ("boxes", "label", "index"))
    for picture in range(batch):
        for number in range(int(goals["mask"][picture].sum())):
            left, top, right, bottom = boxes[picture, number]
            reach = int(radius(math.ceil(bottom - top), math.ceil(right - left)))
            y, x = divmod(int(index[picture, number]), width)
            across, down = np.ogrid[-reach : reach + 1, -reach : reach + 1]
            peak = np.exp(-(across * across + down * down) / (2 * ((2 * reach + 1) / 6) ** 2))
            first, last = (
                (max(0, x - reach), max(0, y - reach)),
                (min(width, x + reach + 1), min(height, y + reach + 1)),
            )
            there = hm[picture, labels[picture, number], first[1] : last[1], first[0] : last[0]]
            rows = slice(first[1] - y + reach, last[1] - y + reach)
            columns = slice(first[0] - x + reach, last[0] - x + reach)
            np.maximum(there, peak[rows, columns], out=there, casting="same_kind")
    return torch.from_numpy(hm)


def radius(height, width, overlap=0.7):
    """CornerNet's, in its first form."""
    total, area = height + width, height * width
    equations = (
        (1, total, area * (1 - overlap) / (1 + overlap)),
        (4, 2 * total, area * (1 - overlap)),
        (4 * overlap, -2 * overlap * total, -area * (1 - overlap)),
    )
    return max(0, min((b + math.sqrt(max(0, b * b - 4 * a * c))) / 2 for a, b, c in equations))


def cpu_seconds(work):
    """Of this process: what else the machine does adds little to them, be it much."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def against_loops(rounds=15, in_a_row=5):
    """Prints how many times faster than loops association and heatmaps are. One thread, on the CPU."""
    images, targets = draw_batch(8, (448, 800), seed=0)
    size = [side // STRIDE for side in images.shape[-2:]]
    _, radar_map, calib = inputs(images, targets, (0, 0, 0), (1, 1, 1), "cpu", stride=STRIDE, dims=DIMS)
    goals = assigned(targets, images.shape[-2:], "cpu")
    boxes, label, mask = (goals[name] for name in ("boxes", "label", "mask"))
    cell = torch.stack([goals["index"] % size[1], goals["index"] // size[1]], dim=-1).float()
    shape = (len(images), CLASSES, *size)

    def associated():
        return centerfusion.association(goals, radar_map, calib, REACH, FAR)

    def splatted():
        return centerfusion.heatmaps(boxes, cell, label, mask, ~mask, shape, "published", "cpu")

    def associated_by_loop():
        return associate_loop(radar_map, goals, calib)

    def splatted_by_loop():
        return heatmaps_loop(goals, size)

    torch.testing.assert_close(associated(), associated_by_loop())
    torch.testing.assert_close(splatted(), splatted_by_loop())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    works = associated, splatted, associated_by_loop, splatted_by_loop
    times = np.array([[[cpu_seconds(work) for _ in range(in_a_row)] for work in works] for _ in range(rounds)])
    torch.set_num_threads(threads)
    print("8 pictures of 100 boxes, the same from loops over boxes")
    for name, quickest_of in (("in a row", times.min((0, 2))), ("after other work", times[:, :, 0].min(0))):
        association, heatmaps, slow_association, slow_heatmaps = (1000 * quickest_of).tolist()
        print(f"{name}:")
        both = association + heatmaps, slow_association + slow_heatmaps
        pairs = (association, slow_association), (heatmaps, slow_heatmaps), both
        for part, (ours, loop) in zip(("association", "heatmaps", "both"), pairs):
            print(f"  {part:12} {ours:.1f} ms, loop {loop:.0f} ms, {loop / ours:.1f} times faster", flush=True)


# ---- a step, a loader worker


def steps(net, batches, run):
    """(full, bare): one training step each, of the same network."""
    net.to(run.device, memory_format=torch.channels_last)
    train_mode(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    how = (net.image_mean, net.image_std, run.device)
    ready = []
    for images, targets in batches:
        pixels, *radar = inputs(images, targets, *how, stride=STRIDE, dims=DIMS)
        ready.append((pixels, assigned(targets, images.shape[-2:], run.device, *radar)["radar"]))

    def full(i):
        images, targets = batches[i % len(batches)]
        pixels, *radar = inputs(images, targets, *how, stride=STRIDE, dims=DIMS)
        goals = assigned(targets, images.shape[-2:], run.device, *radar)
        counts = run.mean(centerfusion.count(goals)).clamp(min=1)
        with run.autocast():
            outputs = net(pixels, association=goals["radar"])
        sum(centerfusion.loss(outputs, goals, counts).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def bare(i):
        pixels, association = ready[i % len(batches)]
        with run.autocast():
            outputs = net(pixels, association=association)
        sum(output.sum() for output in outputs.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return full, bare


def loader_ratio(dataset, size, repeats=3):
    """(pictures a second of the loader, of bare decoding), one thread, best of interleaved repeats."""
    dataset.transform = nuscenes_transforms.train(size)
    paths = [dataset.path(frame) for frame in dataset.frames]

    def load():
        loader.collate([dataset[0, i] for i in range(len(dataset))])

    def decode():
        for path in paths:
            Image.open(path).convert("RGB").load()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    best = {load: 0.0, decode: 0.0}
    for _ in range(repeats):
        for work in (decode, load):
            best[work] = max(best[work], len(paths) / cpu_seconds(work))
    torch.set_num_threads(threads)
    return best[load], best[decode]


def main(argv=None):
    args = parse_args(argv)
    if args.tables:  # first: a process counts the peak of the one that started it as its own
        nuscenes_tables.measure()
    against_loops()
    batches = [draw_batch(args.batch_size, args.size, seed) for seed in (1, 2)]
    height, width = args.size
    print(f"centerfusion_{args.arch}, batch {args.batch_size}, {height} x {width}, {BOXES} boxes a picture")
    for precision in ("fp32", "bf16"):
        run = devices.setup(args.device, precision=precision)
        net = models.build(f"centerfusion_{args.arch}", CLASSES)
        full, bare = quickest(run, steps(net, batches, run), args.rounds, budget=120)
        figures = f"full step {1000 * full:.0f} ms, bare {1000 * bare:.0f} ms, ratio {full / bare:.3f}"
        print(f"{precision}  {figures}", flush=True)
    print(devices.describe(run))
    with tempfile.TemporaryDirectory() as folder:
        root = drawn.draw_nuscenes(f"{folder}/set", images=48, seed=0, size=FILE[::-1])
        dataset = nuscenes_radar.load(root, "v1.0-mini", "mini_train")
        load, decode = loader_ratio(dataset, (448, 800))
    rates = f"{load:.1f} pictures of {FILE[1]} x {FILE[0]} a second, bare decoding {decode:.1f}"
    print(f"loader worker {rates}, ratio {load / decode:.3f}")


if __name__ == "__main__":
    main()
