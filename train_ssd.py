"""Train SSD (MobileNet v1 and v2, VGG16, SqueezeNet) on Pascal VOC, Open Images, COCO or csv data.

    python train_ssd.py --dataset voc --data data/drone --model-dir runs/drone
    python train_ssd.py --config configs/ssd_mb1_small.toml --data data/cells --model-dir runs/cells
    python train_ssd.py --dataset voc --data data/drone --model-dir runs/drone --resume auto
    python train_ssd.py --resume runs/drone --eval-only
    torchrun --nproc-per-node 4 train_ssd.py --dataset open_images --data data/fruit --model-dir runs/fruit

The defaults are those of dusty-nv/pytorch-ssd. The run folder gets last.pt, previous.pt and best.pt, metrics.jsonl,
labels.txt and TensorBoard files. Published mAP on VOC07 test, not reproduced by us: mb1-ssd 67.5, mb2-ssd-lite 68.6,
vgg16-ssd 77.26 (qfgaohao).
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools

import torch

import models
from data import checks, classes, detection, loader, transforms
from evaluation import ground_truth_score
from evaluation.voc import MEASURES, VOCEvaluator
from losses import assignment, multibox
from models import pretrained, ssd
from ops import nms
from ops.boxes import to_file_pixels
from ops.images import normalize
from training import cli, distributed, memory, optim
from training.ema import Ema
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils.errors import UsageError
from visualize import draw2d, pr_curves

USAGE = "python train_ssd.py --dataset voc --data FOLDER --model-dir RUN [flags]"
LOSSES = ("loss", "regression_loss", "classification_loss")


def parse_args(argv):
    parser = cli.ArgumentParser("train_ssd.py", __doc__, USAGE)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset", "--dataset-type", choices=tuple(detection.LAYOUTS), default="open_images", help="layout of --data")
    arg("--data", "--datasets", dest="data", nargs="+", default=["data"], help="one or more folders, joined")
    arg("--zoom-out", type=cli.probability, default=0.5, help="augmentation: probability of zooming out")
    zoom = "augmentation: maximum side of the zoomed-out image, as a multiple of the original"
    arg("--max-zoom-out", "--largest-canvas", type=cli.number(float, 1), default=4.0, help=zoom)
    crop = "augmentation: probability of a random crop that keeps objects"
    arg("--iou-crop", type=cli.probability, default=1.0, help=crop)
    jitter = "augmentation: probability of each color change"
    arg("--color-jitter", "--colour", type=cli.probability, default=0.5, help=jitter)

    arg = parser.add_argument_group("network").add_argument
    arg("--arch", "--net", choices=tuple(ssd.NETWORKS), default="mb1-ssd", help="network architecture")
    arg("--resolution", type=cli.pixels, default=300, help="height and width of the input in pixels")
    arg("--width-mult", "--mb2-width-mult", type=cli.non_negative, default=1.0, help="mb2-ssd-lite: width multiplier")
    sizes = "minimum size of the priors of each of the six maps, in pixels at 300 x 300, and the maximum of the last"
    arg("--box-sizes", type=cli.non_negative, nargs=7, metavar="PIXELS", help=sizes)
    priors = "mb1-ssd: priors at other resolutions than 300: those of jetson-inference, or those of 300 scaled; "
    priors += "default: jetson (scaled with --box-sizes); a resumed run keeps its own"
    arg("--priors", choices=ssd.PRIORS, help=priors)
    arg("--match-iou", type=cli.probability, default=0.5, help="minimum IoU of a positive prior")
    start = "weights to start from: a file of an SSD or of its backbone; auto: the published ones, downloaded"
    arg("--weights", "--pretrained-ssd", default="auto", metavar="auto|none|FILE", help=start)
    backbone = "start with these weights of the backbone alone; auto: ImageNet weights"
    arg("--backbone-weights", "--base-net", default="none", metavar="auto|none|FILE", help=backbone)
    arg("--freeze-backbone", "--freeze-base-net", action="store_true", help="train the extra layers and heads only")
    arg("--freeze-net", action="store_true", help="train the heads only")
    backbone = "learning rate of the backbone"
    arg("--backbone-lr", "--base-net-lr", type=cli.non_negative, default=0.001, metavar="LR", help=backbone)
    extra = "learning rate of the extra layers (default: --lr)"
    arg("--extra-layers-lr", type=cli.non_negative, metavar="LR", help=extra)
    arg("--use-cuda", type=cli.boolean, default=True, metavar="BOOL", help="false: the same as --device cpu")
    arg("--validation-mean-ap", action="store_true", help="measure mAP in validation too, and select best.pt by it")
    cli.add_score_arguments(parser, score_threshold=0.01, nms_iou=0.45, detections_per_image=200)
    cli.add_detection_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    parser.set_defaults(model_dir="runs/ssd", scheduler="cosine", t_max=100.0, milestones="80,100", lr_batch_size=4)
    args = parser.parse(argv)
    if not args.use_cuda:
        args.device = "cpu"
    return args


@torch.no_grad()
def evaluate(net, val_loader, evaluator=None, num_samples=0, *, run, assign, criterion, detect):
    """Losses over the validation set and, with a new VOCEvaluator, AP: (metrics, evaluators, samples).

    Every process evaluates its share of the images, all get the same metrics. Batch norm statistics do not change.
    samples: the first `num_samples` images with objects, (image, target, detections) each, to be drawn.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)  # regression loss, classification loss, positives
    samples = []
    run.set_eval_mode(net)
    for images, targets in val_loader:
        size = tuple(images.shape[-2:])
        with run.autocast():
            outputs = net(normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std))
        matched = assign(net.anchors(size), targets.to(run.device), net.box_weights)
        losses = criterion(outputs, matched, 1)
        sums += torch.stack([*losses.values(), assignment.count_positives(matched)])
        if evaluator or len(samples) < num_samples:
            detections = detect(outputs, net.anchors(size), net.box_weights, size)
            samples = (samples + [s for s in zip(images, targets, detections) if len(s[1]["labels"])])[:num_samples]
        if evaluator:
            sides = [{"shape": size, "size": target["size"]} for target in targets]
            evaluator.update(to_file_pixels(targets, sides), to_file_pixels(detections, sides))
    sums = run.mean(sums)
    regression, classification = (sums[:2] / sums[2].clamp(min=1 / run.world_size)).tolist()
    metrics = dict(zip(LOSSES, (regression + classification, regression, classification)))
    return metrics | (evaluator.compute(run.gather) if evaluator else {}), [evaluator] * bool(evaluator), samples


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init(args)
    measured = [*LOSSES, *MEASURES * args.validation_mean_ap]
    monitor = cli.choose_monitor(args.monitor, "mAP" if args.validation_mean_ap else "loss", measured)
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
    new_evaluator = functools.partial(VOCEvaluator, val_set.classes, **scoring)
    run.print(ground_truth_score(new_evaluator(), val_set))

    # network
    if args.width_mult != 1 and args.arch != "mb2-ssd-lite":
        raise UsageError(f"--width-mult: {args.arch} has one width; leave it out, or give --arch mb2-ssd-lite")
    arguments = {"width_mult": args.width_mult} if args.arch == "mb2-ssd-lite" else {}
    if args.box_sizes:
        arguments["box_sizes"] = list(zip(args.box_sizes, args.box_sizes[1:]))
    arguments |= ssd.choose_priors(args.arch, args.priors, args.resolution, args.box_sizes, run_folder.checkpoint)
    net = models.build(args.arch, len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (args.resolution, args.resolution)
    if not run_folder.checkpoint:
        pretrained.init_weights(net, **cli.start_options(args), download=run.is_main, print=run.print)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.ssd_train(
        size, net.image_mean, args.zoom_out, args.max_zoom_out, args.iou_crop, args.color_jitter
    )
    val_set.transform = transforms.ssd_eval(size)
    frozen = [net.base_net] * (args.freeze_backbone or args.freeze_net)
    frozen += [net.extras, net.source_layer_add_ons] * args.freeze_net
    optim.set_train_mode(net, frozen, args.freeze_bn)

    # loss and detections
    class_weights = classes.class_weights(args.class_weights, net.classes, run.device, background=True)
    assign = functools.partial(assignment.assign, threshold=args.match_iou)
    criterion = functools.partial(multibox.loss, class_weights=class_weights)
    detect = functools.partial(nms.ssd_detections, **cli.detection_limits(args))

    # optimizer, schedule, resume
    rates = {"base_net": args.backbone_lr, "extras": args.extra_layers_lr, "heads": args.lr}
    optimizer = optim.build(args, net.parameter_groups(), rates)
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before Ema: all processes then have the same weights
    ema = Ema(net, args.ema)
    plan = Plan(args, len(train_set), run.print)
    progress = run_folder.restore(net, optimizer, ema, plan, models.describe(net, image_size=size))
    run.print(f"{models.summary(net)}, {size[0]} x {size[1]} pixels, {distributed.describe(run)}")

    # loaders
    process = loader.Process(run.rank, run.world_size, args.workers, run.pin_memory)
    val_loader = loader.eval_loader(val_set, args.batch_size, process)
    validate = functools.partial(evaluate, net, run=run, assign=assign, criterion=criterion, detect=detect)
    if args.eval_only:
        metrics, evaluators, _ = validate(val_loader, new_evaluator())
        return run_folder.report(metrics, evaluators)
    balance = train_set.balance_weights() if args.balance_data else None
    steps = len(train_set), args.batch_size, plan.total_steps, args.seed, progress.step
    sampler = loader.StepSampler(*steps, process, balance)
    train_loader = loader.train_loader(train_set, sampler, process)
    if args.preflight:
        largest = [dataset.most_objects(args.batch_size // run.world_size) for dataset in (train_set, val_set)]
        train_loader, val_loader = loader.one_batch_each((train_set, val_set), largest)
    run_folder.write_lines("labels.txt", ["BACKGROUND", *net.classes])

    # train
    with run_folder.logger(plan, train_set) as logger, StopSignals(run) as stop, memory.advice(run, args, size):
        batches, due = logger.steps(train_loader), plan.start(progress)
        while True:
            if due.validate:  # after the step before, which may be that of an interrupted run
                with ema.applied(), logger.paused():
                    evaluator = new_evaluator() if args.validation_mean_ap else None
                    metrics, evaluators, samples = validate(val_loader, evaluator, num_samples=4)
                    progress.record(metrics[monitor], cli.higher_is_better(monitor))
                optim.set_train_mode(net, frozen, args.freeze_bn)
                images = draw2d.truth_and_predictions(samples, net.classes)
                logger.log_validation(progress.step, metrics, evaluators, images)
                run_folder.save()
            if due.stop or plan.is_stale(progress):
                break
            images, targets = next(batches)
            plan.set_lr(optimizer, progress.step)
            image_ids = [target["image_id"] for target in targets]
            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
            matched = assign(net.anchors(size), targets.to(run.device), net.box_weights)
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
                plan.record_loss(due, logger.log_losses(progress.step, optimizer))
            if due.save:
                run_folder.save()  # before the validation, so that a kill during it loses no step
    return run_folder.finish(stop, logger.metrics, logger.evaluators)


if __name__ == "__main__":
    cli.run(main)
