"""Train Mask R-CNN: boxes and masks of single objects, on PennFudanPed or COCO, fine-tuned from published weights.

    python train_maskrcnn.py --data data/PennFudanPed --model-dir runs/people
    python train_maskrcnn.py --dataset coco --data data/coco --arch maskrcnn_resnet50_v2 --model-dir runs/coco
    python train_maskrcnn.py --resume runs/people --eval-only
    torchrun --nproc-per-node 8 train_maskrcnn.py --dataset coco --data data/coco --batch-size 16 --lr 0.02

The defaults are those of torchvision's fine-tuning tutorial. The run folder gets last.pt, previous.pt and best.pt,
metrics.jsonl, detections.json, detections_masks.json and TensorBoard files; from PennFudanPed also held_out.txt, the
images of the validation set. Published COCO box and mask AP of maskrcnn_resnet50, not reproduced by us: 37.9 and 34.6.
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools

import torch

import models
from data import checks, classes, detection, loader, transforms
from data.detection import penn_fudan
from evaluation import ground_truth_score
from evaluation.detection import MASK_MEASURES, MEASURES, DetectionEvaluator
from losses import maskrcnn
from models import pretrained
from ops.boxes import to_file_pixels
from ops.images import normalize
from ops.masks import paste_masks
from training import cli, distributed, memory, optim
from training.ema import Ema
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils.errors import UsageError
from visualize import draw2d, pr_curves

USAGE = "python train_maskrcnn.py --data FOLDER --model-dir RUN [flags]"
HELD_OUT = "held_out.txt"


def parse_args(argv):
    parser = cli.ArgumentParser("train_maskrcnn.py", __doc__, USAGE)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset", "--dataset-type", choices=("pennfudan", "coco"), default="pennfudan", help="layout of --data")
    arg("--data", "--coco-path", dest="data", nargs="+", default=["data/PennFudanPed"], help="one or more folders")
    share = "pennfudan: share of the images in the validation set; 0.294 are 50 of its 170"
    arg("--val-share", type=cli.number(float, 0, 1), default=0.294, help=share)
    arg("--split-seed", type=cli.count, default=0, help="pennfudan: random seed of that split")
    arg("--subset", type=cli.count, default=0, metavar="N", help="train on N images, drawn with --seed; 0: all")
    cli.add_resize_arguments(parser, min_side=800, max_side=1333)

    arg = parser.add_argument_group("network").add_argument
    networks = {"choices": tuple(models.maskrcnn.NETWORKS), "type": cli.prefixed("maskrcnn_")}
    arg("--arch", default="maskrcnn_resnet50", help="network architecture", **networks)
    proposals = "region proposals per image in validation, twice as many in training; 0: the network's default"
    arg("--proposals", type=cli.count, default=0, metavar="N", help=proposals)
    rois = "regions of interest per image that the heads are trained on; 128 is faster"
    arg("--rois-per-image", "--regions", type=cli.positive, default=512, metavar="N", help=rois)
    start = "weights to start from: a file of a Mask R-CNN or of its ResNet; auto: torchvision's COCO, else ImageNet"
    arg("--weights", "--pretrained", default="auto", metavar="auto|coco|imagenet|none|FILE", help=start)
    backbone = "start with these weights of the ResNet alone; auto: ImageNet weights"
    arg("--backbone-weights", default="none", metavar="auto|none|FILE", help=backbone)
    stages = "freeze the first N of the ResNet's five stages; auto: 2 if it starts from downloaded weights, else 0"
    arg("--freeze-stages", type=cli.auto_stages, default="auto", metavar="auto|N", help=stages)
    arg("--backbone-lr", type=cli.non_negative, metavar="LR", help="learning rate of the backbone (default: --lr)")
    cli.add_score_arguments(parser, score_threshold=0.05, nms_iou=0.5, detections_per_image=100)
    cli.add_detection_arguments(parser, masks=True)
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    tutorial = {"batch_size": 2, "lr_batch_size": 2, "lr": 0.005, "epochs": 10, "milestones": "3,6,9"}
    tutorial |= {"warmup_steps": "auto", "warmup_factor": 0.001, "freeze_bn": True}
    parser.set_defaults(model_dir="runs/maskrcnn", **tutorial)
    return parser.parse(argv)


def load_data(args, run_folder):
    """(train, val, errors); a resumed run keeps the validation images of PennFudanPed in its held_out.txt."""
    common = {"classes": run_folder.classes, "seed": args.seed}
    if args.dataset == "coco":
        return detection.load("coco", args.data, masks=True, **common, **cli.layout_options(args))
    split = {"val_share": args.val_share, "split_seed": args.split_seed, "held_out": run_folder.read_lines(HELD_OUT)}
    split |= {"val_only": args.eval_only, "split": args.split}
    train_set, val_set, errors = detection.load_penn_fudan(args.data, **common, **split)
    run_folder.write_lines(HELD_OUT, penn_fudan.names(val_set))
    return train_set, val_set, errors


@torch.no_grad()
def evaluate(net, val_loader, val_set, evaluator, num_samples=0, *, run, seed):
    """Losses over the validation set and the metrics of a new evaluator: (metrics, evaluators, samples).

    Every process evaluates its share of the images, all get the same metrics. Batch norm statistics do not change.
    samples: the first `num_samples` images with objects, (image, target, detections) each, to be drawn.
    """
    run.set_eval_mode(net)
    sums = dict.fromkeys(maskrcnn.NORMALIZERS, torch.zeros((), dtype=torch.float64, device=run.device))
    counts, samples = torch.zeros(len(maskrcnn.COUNTS), dtype=torch.float64, device=run.device), []
    for images, targets in val_loader:
        shapes, sizes = ([tuple(target[name]) for target in targets] for name in ("shape", "size"))
        pixels = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
        sampled = maskrcnn.SampledTargets(targets, seed)
        with run.autocast():
            features, proposals, outputs = net.propose(pixels, shapes)
            detections, drawn = net.detect(features, proposals, shapes, sampled.draw_rois(proposals))
            outputs |= net.roi_outputs(features, shapes, *sampled.cut_rois(drawn))
        for name, value in maskrcnn.loss_sums(outputs, sampled).items():
            sums[name] = sums[name] + value.double()
        counts += maskrcnn.count(outputs, sampled)
        truth = [val_set.annotation(target["image_id"]) for target in targets]  # masks as they are in the files
        evaluator.update(truth, paste_masks(to_file_pixels(detections, targets), sizes))
        if len(samples) < num_samples:
            shown = zip(images, targets, paste_masks(detections, [images.shape[-2:]] * len(images)))
            samples = (samples + [s for s in shown if len(s[1]["labels"])])[:num_samples]
    counts = run.mean(counts).clamp(min=1 / run.world_size)
    losses = {name: float(run.mean(sums[name]) / counts[maskrcnn.NORMALIZERS[name]]) for name in sums}
    return {"loss": sum(losses.values()), **losses, **evaluator.compute(run.gather)}, [evaluator], samples


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init(args)
    if len(run.gpus) > 1:
        raise UsageError("--gpus: Mask R-CNN uses one GPU per process; use torchrun --nproc-per-node instead")
    if args.compile:
        raise UsageError("--compile: Mask R-CNN, whose RoIs vary in number, would be compiled every step; leave it out")
    monitor = cli.choose_monitor(args.monitor, "mask AP", ["loss", *maskrcnn.NORMALIZERS, *MEASURES, *MASK_MEASURES])
    run_folder = RunFolder(args, run, monitor)

    # data
    with run.raise_in_all():
        train_set, val_set, errors = load_data(args, run_folder)
    if args.check_data:
        run.close()
        return checks.check_data(train_set, val_set, errors, args.workers, run_folder.path) if run.is_main else {}
    train_set, val_set = checks.apply(train_set, val_set, errors, *cli.fault_policies(args), run.print)
    if args.subset:
        train_set = train_set.subset(args.subset, args.seed)
    scoring = cli.score_options(args, val_set.image_path) | {"draw": pr_curves.draw, "masks": True}
    new_evaluator = functools.partial(DetectionEvaluator, val_set.classes, val_set.coco_truth(), **scoring)
    run.print(ground_truth_score(new_evaluator(), val_set))

    # network
    net = models.build(args.arch, len(train_set.classes), **{"proposals": args.proposals} if args.proposals else {})
    net.limit_detections(**cli.detection_limits(args))
    net.classes, size = train_set.classes, (max(args.min_side), args.max_side)
    start = {**cli.start_options(args), "download": run.is_main, "print": run.print}
    published = run_folder.checkpoint is None and pretrained.init_weights(net, **start)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.multiscale_train(args.min_side, args.max_side, args.flip, args.color_jitter)
    val_set.transform = transforms.multiscale_eval(args.min_side[-1], args.max_side)
    frozen = net.stages()[: run_folder.choose("freeze_stages", 2 * published)]
    optim.set_train_mode(net, frozen, args.freeze_bn)

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes, run.device, background=True)
    criterion = functools.partial(maskrcnn.loss, class_weights=class_weights)
    sample = functools.partial(maskrcnn.SampledTargets, rois_per_image=args.rois_per_image)

    # optimizer, schedule, resume
    optimizer = optim.build(args, net.parameter_groups(), {"backbone": args.backbone_lr, "heads": args.lr})
    run_folder.choose("warmup_steps", None)  # of runs from before there was "auto"
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before Ema: all processes then have the same weights
    ema = Ema(net, args.ema)
    plan = Plan(args, len(train_set), run.print)
    sides = {"min_side": args.min_side[-1], "max_side": args.max_side}
    progress = run_folder.restore(net, optimizer, ema, plan, models.describe(net, **sides))
    run.print(f"{models.summary(net)}, {size[0]} to {size[1]} pixels, {distributed.describe(run)}")

    # loaders
    process = loader.Process(run.rank, run.world_size, args.workers, run.pin_memory)
    val_loader = loader.eval_loader(val_set, args.batch_size, process, loader.PadCollate(32))
    validate = functools.partial(evaluate, net, run=run, seed=(args.seed, 0))
    if args.eval_only:
        metrics, evaluators, _ = validate(val_loader, val_set, new_evaluator())
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
                    metrics, evaluators, samples = validate(val_loader, val_set, new_evaluator(), num_samples=4)
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
            size = -(-len(images) // args.accumulate)
            parts = [slice(start, start + size) for start in range(0, len(images), size)]
            for part in run.sync_last(wrapped, parts):  # each with its own normalizers
                sampled = sample(targets[part], (args.seed, progress.step + 1))
                with run.autocast():
                    outputs = wrapped(images[part], shapes[part], sampled.sample)
                counts = run.mean(maskrcnn.count(outputs, sampled)).clamp(min=1 / run.world_size)  # over all processes
                losses = criterion(outputs, sampled, counts)
                losses = {name: value * len(shapes[part]) / len(images) for name, value in losses.items()}
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
