"""The programs that are timed: a training script, its network alone, torchvision's network in a plain loop.

args        flags of benchmarks.__main__ for a training script
precision   fp32, bf16 or fp16
data        folder of the data set
folder      the run folder, which gets overwritten
"""

import contextlib
import importlib
import io
import json
import math
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import CocoDetection, ImageFolder, wrap_dataset_for_transforms_v2
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2

import models
from training import distributed, memory, optim
from training.logger import Logger
from training.plan import Plan

FROZEN_BN = ("retinanet", "maskrcnn")  # the scripts that are compared with frozen batch norm


class Speed(NamedTuple):
    """Images per second, the share of the time spent waiting for data, and the peak memory of the GPU in MB, 0 on a
    CPU."""

    per_second: float
    data_wait: float = 0.0
    memory: float = 0.0

    @property
    def without_wait(self) -> float:
        return self.per_second / (1 - self.data_wait)


def image_size(args):
    """(h, w) of the network's input in pixels: square, of the aspect of nuScenes, or 3 : 4 as in the drawn images."""
    aspect = {"backbone": 1, "ssd": 1, "centerfusion": 16 / 9}.get(args.benchmark, 4 / 3)
    return args.size, args.size if aspect == 1 else math.ceil(args.size * aspect / 32) * 32


def script(args, precision, data, folder, flags=""):
    """Speed of the training script, with `flags` added."""
    height, width = image_size(args)
    flags += {
        "backbone": f" --resolution {height} --color-jitter-strength 0",
        "ssd": f" --dataset coco --resolution {height}",
        "retinanet": f" --min-side {height} --max-side {width} --anchors torchvision --backbone-weights none"
        " --freeze-bn",
        "maskrcnn": f" --dataset coco --min-side {height} --max-side {width}",
        "centerfusion": f" --input-size {height} {width} --version v1.0-mini --train-split mini_train"
        " --pointcloud --velocity --nuscenes-att",
    }[args.benchmark]
    flags += f" --arch {args.arch} --weights none --batch-size {args.batch_size} --max-steps {args.steps}"
    flags += f" --device {args.device} --precision {precision} --workers {args.workers} --log-every {args.log_every}"
    flags += " --optimizer sgd --lr 1e-5 --clip-norm 0 --log-level warning --overwrite"
    flags += "" if args.deterministic else " --no-deterministic"
    train = importlib.import_module(f"train_{args.benchmark}")
    # No epoch ends in the time that is measured: it would be saved and validated, and data sets here are small.
    no_epochs = mock.patch.object(Plan, "epochs_completed", return_value=0)
    with contextlib.redirect_stdout(io.StringIO()), no_epochs:
        train.main([*flags.split(), "--data", str(data), "--model-dir", str(folder)])
    return read_speed(args, folder)


def network_alone(args, precision, data, folder):
    """Speed of the script's network on one batch. Not for Mask R-CNN: its forward pass in training needs targets."""
    run = distributed.init_device(args.device, precision=precision)
    use_kernels(args, args.deterministic)
    net = build_network(args, num_classes=10).to(run.device, memory_format=torch.channels_last)
    optim.set_train_mode(net, freeze_bn=args.benchmark in FROZEN_BN)
    images = torch.randn(args.batch_size, 3, *image_size(args), device=run.device)
    images = images.to(memory_format=torch.channels_last)
    radar = {"association": torch.zeros_like(images[:, :, ::4, ::4])} if args.benchmark == "centerfusion" else {}

    def sum_of_outputs(images):
        outputs = net(images, **radar)
        return sum(output.float().sum() for output in (outputs.values() if isinstance(outputs, dict) else [outputs]))

    return plain_loop(args, run, folder, net, [images] * args.steps, sum_of_outputs)


def use_kernels(args, deterministic):
    """What --deterministic and --no-deterministic of the script set."""
    distributed.set_deterministic(deterministic, fixed_size=args.benchmark not in FROZEN_BN)


def build_network(args, num_classes):
    """The script's network with random weights."""
    arguments = {"anchors": "torchvision"} if args.benchmark == "retinanet" else {}
    return models.build(args.arch, num_classes, **arguments)


def plain_loop(args, run, folder, net, batches, loss_of):
    """Speed of training `net` by SGD on loss_of(batch), one step per batch."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
    with Logger(folder, run, args.steps, flags={"log_level": "warning"}) as logger:
        for step, batch in enumerate(logger.steps(batches), start=1):
            with run.autocast():
                loss = loss_of(batch)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad()
            if step % args.log_every == 0:
                distributed.synchronize(run.device)
                logger.log(step, {}, images=args.log_every * args.batch_size)
    return read_speed(args, folder)


def read_speed(args, folder):
    """The medians and the peak of what the logger wrote, without the first time, a warm-up."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["step"] > args.log_every and "speed/data_wait" in line]
    speed, wait = (median(line[f"speed/{name}"] for line in lines) for name in ("images_per_second", "data_wait"))
    on_gpu = memory.peak_gpu() > 0  # else the logger writes the RAM that this process has ever used
    return Speed(speed, wait, max(line["speed/peak_memory_mb"] for line in lines) if on_gpu else 0.0)


def in_torchvision(args):
    """Whether torchvision has the script's network."""
    return {
        "backbone": args.arch in torchvision.models.list_models(torchvision.models),
        "ssd": args.arch == "vgg16-ssd" and args.size == 300,
        "retinanet": True,
        "maskrcnn": args.arch == "maskrcnn_resnet50",
        "centerfusion": False,
    }[args.benchmark]


def torchvision_loop(args, precision, data, folder):
    """Speed of torchvision's network."""
    run = distributed.init_device(args.device, precision=precision)
    use_kernels(args, deterministic=False)  # as by torch's own default
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset, num_classes = labeled_images(args, data) if args.benchmark == "backbone" else boxes(args, data)
    net = torchvision_network(args, num_classes).to(run.device).train()
    batches = DataLoader(
        dataset,
        args.batch_size,
        sampler=RandomSampler(dataset, num_samples=args.steps * args.batch_size),
        num_workers=args.workers,
        collate_fn=None if args.benchmark == "backbone" else lists,
        pin_memory=run.pin_memory,
    )

    def loss_of(batch):
        if args.benchmark == "backbone":
            images, labels = (tensor.to(run.device, non_blocking=True) for tensor in batch)
            return F.cross_entropy(net(images), labels)
        images = [image.to(run.device, non_blocking=True) for image in batch[0]]
        targets = [{name: value.to(run.device, non_blocking=True) for name, value in t.items()} for t in batch[1]]
        return sum(net(images, targets).values())

    return plain_loop(args, run, folder, net, batches, loss_of)


def labeled_images(args, data):
    """(data set for classification, number of classes)"""
    steps = [v2.RandomResizedCrop(args.size, scale=(0.53, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    dataset = ImageFolder(data / "train", v2.Compose(steps))
    return dataset, len(dataset.classes)


def boxes(args, data):
    """(data set for detection, number of classes including the background)"""
    steps = [v2.PILToTensor(), v2.RandomHorizontalFlip()]
    if args.benchmark == "ssd":
        fill = {torchvision.tv_tensors.Image: (123, 117, 104), "others": 0}
        steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill), v2.RandomIoUCrop()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()]
    annotations = data / "annotations" / "instances_train2017.json"
    dataset = CocoDetection(data / "train2017", annotations, transforms=v2.Compose(steps))
    dataset.ids = [image for image in dataset.ids if dataset.coco.getAnnIds(image)]  # it cannot train on the others
    keys = ("boxes", "labels", "masks") if args.benchmark == "maskrcnn" else ("boxes", "labels")
    return wrap_dataset_for_transforms_v2(dataset, target_keys=keys), max(dataset.coco.getCatIds()) + 1


def lists(samples):
    """[(image, target)] -> (images, targets)"""
    return tuple(zip(*samples))


def torchvision_network(args, num_classes):
    """torchvision's network with random weights and, of RetinaNet and Mask R-CNN, frozen batch norm."""
    if args.benchmark == "backbone":
        return torchvision.models.get_model(args.arch, num_classes=num_classes)
    if args.benchmark == "ssd":
        return detection.ssd300_vgg16(weights_backbone=None, num_classes=num_classes)
    resnet = {"backbone_name": args.arch.split("_")[1], "weights": None, "trainable_layers": 5}
    if args.benchmark == "retinanet":
        resnet |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(norm_layer=FrozenBatchNorm2d, **resnet)
    detector = detection.RetinaNet if args.benchmark == "retinanet" else detection.MaskRCNN
    min_side, max_side = image_size(args)
    return detector(backbone, num_classes, min_size=min_side, max_size=max_side)
