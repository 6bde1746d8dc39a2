"""Train RetinaNet (ResNet 18 to 152, feature pyramid, focal loss) on COCO, csv, Pascal VOC or Open Images data.

    python train_retinanet.py --dataset coco --data data/coco --arch retinanet_resnet50
    python train_retinanet.py --dataset csv --csv-train train.csv --csv-val val.csv --csv-classes classes.csv
    python train_retinanet.py --config configs/retinanet_r50_coco.toml --data data/coco --model-dir runs/coco
    python train_retinanet.py --resume runs/coco --eval-only
    torchrun --nproc-per-node 8 train_retinanet.py --config configs/retinanet_r50_coco.toml --data data/coco

The defaults are those of yhenon/pytorch-retinanet; docs/migrating.md lists what differs. The run folder gets last.pt,
previous.pt and best.pt, metrics.jsonl, detections.json and TensorBoard files. Published COCO box AP of ResNet-50, not
reproduced by us: 36.4 (torchvision, 26 epochs), 33.5 (yhenon).
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools

import torch

import models
from data import checks, classes, detection, loader, transforms
from evaluation import ground_truth_score
from evaluation.detection import MEASURES, DetectionEvaluator
from losses import assignment, focal
from models import pretrained
from ops import nms
from ops.boxes import to_file_pixels
from ops.images import normalize
from training import cli, distributed, memory, optim
from training.ema import Ema
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from visualize import draw2d, pr_curves

USAGE = "python train_retinanet.py --dataset coco --data FOLDER --model-dir RUN [flags]"
LOSSES = ("loss", "regression_loss", "classification_loss")
ARCHITECTURES = tuple(f"retinanet_resnet{depth}" for depth in (18, 34, 50, 101, 152))


def parse_args(argv):
    parser = cli.ArgumentParser("train_retinanet.py", __doc__, USAGE)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset", "--dataset-type", choices=tuple(detection.LAYOUTS), default="coco", help="layout of --data")
    arg("--data", "--coco-path", dest="data", nargs="+", default=["data"], help="one or more folders, joined")
    cli.add_resize_arguments(parser, min_side=608, max_side=1024)

    arg = parser.add_argument_group("network").add_argument
    depth = {"dest": "arch", "type": cli.prefixed("retinanet_resnet")}
    arg("--arch", choices=ARCHITECTURES, default="retinanet_resnet50", help="network architecture", **depth)
    arg("--depth", choices=ARCHITECTURES, metavar="{18,34,50,101,152}", help="depth of the ResNet in --arch", **depth)
    program = "anchors and box coding as in this program; weights of torchvision need torchvision"
    arg("--anchors", choices=("yhenon", "torchvision"), default="yhenon", help=program)
    scale = "side of a level's smallest anchors, in strides of the level; 2 helps with small objects"
    arg("--anchor-scale", type=cli.number(float, 0.1), default=4.0, help=scale)
    start = "weights to start from: a file of a RetinaNet or of its ResNet; auto: torchvision's COCO weights"
    arg("--weights", "--pretrained", default="none", metavar="auto|none|FILE", help=start)
    backbone = "start with these weights of the ResNet alone; auto: ImageNet weights"
    arg("--backbone-weights", default="auto", metavar="auto|none|FILE", help=backbone)
    arg("--freeze-stages", type=int, choices=range(6), default=0, help="freeze the first N of the ResNet's five stages")
    arg("--backbone-lr", type=cli.non_negative, metavar="LR", help="learning rate of the backbone (default: --lr)")

    arg = parser.add_argument_group("loss").add_argument
    arg("--match-iou", type=cli.probability, default=0.5, help="minimum IoU of a positive anchor")
    arg("--background-iou", type=cli.probability, default=0.4, help="IoU below which an anchor is background")
    arg("--match-best", action="store_true", help="also match every box with its best anchor, as torchvision does")
    weight = "weight of the box loss, which is summed over four offsets; 0.25 is their mean"
    arg("--box-loss-weight", type=cli.non_negative, default=0.25, help=weight)
    cli.add_score_arguments(parser, score_threshold=0.05, nms_iou=0.5, detections_per_image=100)
    cli.add_detection_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    published = {"batch_size": 2, "lr_batch_size": 2, "epochs": 100, "scheduler": "plateau"}
    published |= {"optimizer": "adam", "lr": 1e-5, "weight_decay": 0.0, "clip_norm": 0.1}
    parser.set_defaults(model_dir="runs/retinanet", freeze_bn=None, **published)
    return parser.parse(argv)


@torch.no_grad()
def evaluate(net, val_loader, evaluator, num_samples=0, *, run, assign, criterion, detect):
    """Losses over the validation set and the metrics of a new evaluator: (metrics, evaluators, samples).

    Every process evaluates its share of the images, all get the same metrics. Batch norm statistics do not change.
    samples: the first `num_samples` images with objects, (image, target, detections) each, to be drawn.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)  # regression loss, classification loss, positives
    samples = []
    run.set_eval_mode(net)
    for images, targets in val_loader:
        size, shapes = tuple(images.shape[-2:]), [target["shape"] for target in targets]
        images_on_device = images.to(run.device, non_blocking=True)
        with run.autocast():
            outputs = net(normalize(images_on_device, net.image_mean, net.image_std, shapes))
        matched = assign(net.anchors(size), targets.to(run.device), net.box_weights)
        losses = criterion(outputs, matched, 1)
        sums += torch.stack([*losses.values(), assignment.count_positives(matched)])
        detections = detect(outputs, net.anchors(size), net.box_weights, shapes, net.level_sizes(size))
        samples = (samples + [s for s in zip(images, targets, detections) if len(s[1]["labels"])])[:num_samples]
        # COCO tells small objects from large ones by pixels of the file
        evaluator.update(to_file_pixels(targets, targets), to_file_pixels(detections, targets))
    sums = run.mean(sums)
    regression, classification = (sums[:2] / sums[2].clamp(min=1 / run.world_size)).tolist()
    metrics = dict(zip(LOSSES, (regression + classification, regression, classification)))
    return metrics | evaluator.compute(run.gather), [evaluator], samples


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init(args)
    monitor = cli.choose_monitor(args.monitor, "AP", [*LOSSES, *MEASURES])
    run_folder = RunFolder(args, run, monitor)

    # data
    with run.raise_in_all():
        train_set, val_set, errors = detection.load(
            args.dataset, args.data, classes=run_folder.classes, seed=args.seed, **cli.layout_options(args)
        )
    if args.check_data:
        run.close()
        return checks.check_data(train_set, val_set, errors, args.workers, run_folder.path) if run.is_main else {}
    train_set, val_set = checks.apply(train_set, val_set, errors, *cli.fault_policies(args), run.print)
    scoring = cli.score_options(args, val_set.image_path) | {"draw": pr_curves.draw}
    new_evaluator = functools.partial(DetectionEvaluator, val_set.classes, val_set.coco_truth(), **scoring)
    run.print(ground_truth_score(new_evaluator(), val_set))

    # network
    net = models.build(args.arch, len(train_set.classes), anchors=args.anchors, anchor_scale=args.anchor_scale)
    net.classes, size = train_set.classes, (max(args.min_side), args.max_side)
    run_folder.choose("freeze_bn", "stats")  # as in yhenon/pytorch-retinanet
    if not run_folder.checkpoint:
        pretrained.init_weights(net, **cli.start_options(args), download=run.is_main, print=run.print)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.multiscale_train(args.min_side, args.max_side, args.flip, args.color_jitter)
    val_set.transform = transforms.multiscale_eval(args.min_side[-1], args.max_side)
    frozen = net.stages()[: args.freeze_stages]
    optim.set_train_mode(net, frozen, args.freeze_bn)

    # loss and detections
    class_weights = classes.class_weights(args.class_weights, net.classes, run.device)
    matching = {"threshold": args.match_iou, "low": args.background_iou, "keep_best": args.match_best}
    assign = functools.partial(assignment.assign, **matching)
    criterion = functools.partial(focal.loss, box_weight=args.box_loss_weight, class_weights=class_weights)
    detect = functools.partial(nms.retinanet_detections, **cli.detection_limits(args))

    # optimizer, schedule, resume
    optimizer = optim.build(args, net.parameter_groups(), {"backbone": args.backbone_lr, "heads": args.lr})
    # before Ema: all processes then have the same weights
    wrapped = run.wrap(net, args.sync_bn, args.compile, dynamic=True)
    ema = Ema(net, args.ema)
    plan = Plan(args, len(train_set), run.print)
    progress = run_folder.restore(
        net, optimizer, ema, plan, models.describe(net, min_side=args.min_side[-1], max_side=args.max_side)
    )
    run.print(f"{models.summary(net)}, {size[0]} to {size[1]} pixels, {distributed.describe(run)}")

    # loaders
    process = loader.Process(run.rank, run.world_size, args.workers, run.pin_memory)
    val_loader = loader.eval_loader(val_set, args.batch_size, process, loader.PadCollate(32))
    validate = functools.partial(evaluate, net, run=run, assign=assign, criterion=criterion, detect=detect)
    if args.eval_only:
        metrics, evaluators, _ = validate(val_loader, new_evaluator())
        return run_folder.report(metrics, evaluators)
    balance = train_set.balance_weights() if args.balance_data else None
    steps = len(train_set), args.batch_size, plan.total_steps, args.seed, progress.step
    sampler = loader.StepSampler(*steps, process, balance, train_set.aspects())
    train_loader = loader.train_loader(train_set, sampler, process, loader.PadCollate(32))
    if args.preflight:
        train_set.transform = val_set.transform = transforms.multiscale_eval(*size)
        count = args.batch_size // run.world_size
        largest = [loader.largest_images(dataset, count, *size) for dataset in (train_set, val_set)]
        train_loader, val_loader = loader.one_batch_each((train_set, val_set), largest, [loader.PadCollate(32)] * 2)

    # train
    with run_folder.logger(plan, train_set) as logger, StopSignals(run) as stop, memory.advice(run, args, size):
        batches, due = logger.steps(train_loader), plan.start(progress)
        while True:
            if due.validate:  # after the step before, which may be that of an interrupted run
                with ema.applied(), logger.paused():
                    metrics, evaluators, samples = validate(val_loader, new_evaluator(), num_samples=4)
                    progress.record(metrics[monitor], cli.higher_is_better(monitor))
                optim.set_train_mode(net, frozen, args.freeze_bn)
                images = draw2d.truth_and_predictions(samples, net.classes)
                logger.log_validation(progress.step, metrics, evaluators, images)
                run_folder.save()
            if due.stop or plan.is_stale(progress):
                break
            images, targets = next(batches)
            plan.set_lr(optimizer, progress.step)
            image_ids, shapes = ([target[name] for target in targets] for name in ("image_id", "shape"))
            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
            matched = assign(net.anchors(images.shape[-2:]), targets.to(run.device), net.box_weights)
            num_positives = run.mean(assignment.count_positives(matched)).clamp(min=1 / run.world_size)
            parts = assignment.micro_batches(args.accumulate, images, matched)
            for part, part_matched in run.sync_last(wrapped, parts):
                with run.autocast():
                    outputs = wrapped(part)
                losses = criterion(outputs, part_matched, num_positives)
                run.scaler.scale(sum(losses.values())).backward()
                logger.add(progress.step + 1, losses, image_ids)
            optim.step(optimizer, run.scaler, net, args.clip_norm)
            ema.update()

            due = plan.advance(progress, stop.requested())
            if due.log:
                plan.record_loss(due, logger.log_losses(progress.step, optimizer, running=500))
            if due.save:
                run_folder.save()  # before the validation, so that a kill during it loses no step
    return run_folder.finish(stop, logger.metrics, logger.evaluators)


if __name__ == "__main__":
    cli.run(main)
