"""What a step of train_retinanet.py costs beyond its network, and against torchvision's own RetinaNet.

    python -m benchmarks.retinanet
    python -m benchmarks.retinanet --depth 18 --batch-size 8 --device cuda

Step ratio: a full step as in train_retinanet.py (copy, normalise, match, forward, focal and box loss, backward, clip,
update) over a bare forward, backward and update of the same network with a sum for a loss, on the same batches,
interleaved. Goal: 1.05.
Against torchvision: the same full step over a training step of torchvision's RetinaNet-50 as its users write it
(pictures as a list of float tensors in 0..1, frozen batch norm, its own loss) on the same pictures and boxes, with its
anchors and matching, the same parameters learning, the same update rule and clipping. Goals: 0.90 in fp32, 0.60 in the
best setting.
"""

import argparse

import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import misc
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import models
from benchmarks.timing import quickest
from losses import assignment, focal
from models import published
from ops.images import normalize
from training import devices
from training.modes import train_mode

CLASSES = 80
BOXES = 8  # a picture


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=50, choices=(18, 34, 50, 101, 152), help="only 50 has a rival")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--side", type=int, default=512, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=10, help="the quickest step of each kind counts")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def draw_batches(batch_size, side, count=2):
    """[(images uint8 [B,3,S,S], targets)] with random boxes of 16 pixels to half a side."""
    random = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        images = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=random)
        targets = []
        for _ in range(batch_size):
            sizes = 16 + torch.rand(BOXES, 2, generator=random) * (side / 2 - 16)
            corners = torch.rand(BOXES, 2, generator=random) * (side - sizes)
            labels = torch.randint(CLASSES, (BOXES,), generator=random)
            boxes = torch.cat([corners, corners + sizes], 1)
            target = {"boxes": boxes, "labels": labels, "ignore": torch.zeros(BOXES, dtype=torch.bool)}
            targets.append(target | {"shape": (side, side)})
        batches.append((images, targets))
    return batches


def update(optimizer, parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_steps(net, batches, run):
    """(full, bare): one training step each, of the same network."""
    net.to(run.device, memory_format=torch.channels_last)
    train_mode(net, freeze_bn=True)
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-5, momentum=0.9)
    pixels = [normalize(images.to(run.device), net.image_mean, net.image_std) for images, _ in batches]

    def full(i):
        images, targets = batches[i % len(batches)]
        shapes = [target["shape"] for target in targets]
        images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
        goals = assignment.assign(net.anchors(images.shape[-2:]), targets, net.box_weights, 0.5, 0.4)
        positives = assignment.count(goals).clamp(min=1)
        with run.autocast():
            outputs = net(images)
        sum(focal.loss(outputs, goals, positives).values()).backward()
        update(optimizer, learning)

    def bare(i):
        with run.autocast():
            outputs = net(pixels[i % len(batches)])
        (outputs["logits"].sum() + outputs["offsets"].sum()).backward()
        update(optimizer, learning)

    return full, bare


def their_network(side):
    """torchvision's RetinaNet-50, fresh, as its training scripts make it."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=misc.FrozenBatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(backbone, CLASSES, min_size=side, max_size=side)


def their_step(net, batches, run):
    """torchvision's training step: fp32, its memory format, every parameter but the batch norms' learning."""
    net.to(run.device).train()
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-5, momentum=0.9)

    def full(i):
        images, targets = batches[i % len(batches)]
        images = [image.to(run.device).float() / 255 for image in images]
        targets = [{name: target[name].to(run.device) for name in ("boxes", "labels")} for target in targets]
        sum(net(images, targets).values()).backward()
        update(optimizer, learning)

    return full


def main(argv=None):
    args = parse_args(argv)
    batches = draw_batches(args.batch_size, args.side)
    print(f"RetinaNet-{args.depth}, batch {args.batch_size}, {args.side} x {args.side}, {CLASSES} classes")
    for precision in ("fp32", "bf16"):
        run = devices.setup(args.device, precision=precision)
        if args.depth == 50:  # the same weights in both: what a step costs a CPU depends on the numbers in it
            theirs = their_network(args.side)
            works = *our_steps(published.load(theirs.state_dict()), batches, run), their_step(theirs, batches, run)
        else:
            net = models.build("retinanet", CLASSES, depth=args.depth, anchors="torchvision")
            works = our_steps(net, batches, run)
        full, bare, *rival = quickest(run, works, args.rounds, budget=120)
        print(f"{precision}  full step {1000 * full:.0f} ms, bare {1000 * bare:.0f} ms, ratio {full / bare:.3f}")
        if rival:
            print(
                f"{precision}  torchvision's step in fp32 {1000 * rival[0]:.0f} ms, ratio {full / rival[0]:.3f}",
                flush=True,
            )
    print(devices.describe(run))


if __name__ == "__main__":
    main()
