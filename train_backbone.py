"""Train an image classifier: ResNet, MobileNet v1 and v2, VGG16, SqueezeNet or DLA-34, on one folder per class.

    python train_backbone.py --arch resnet18 --data data/imagenet --model-dir runs/resnet18
    python train_backbone.py --config configs/backbone_small.toml --data data/flowers --model-dir runs/flowers
    python train_backbone.py --arch resnet18 --train data/a --val data/b --model-dir runs/resnet18 --resume auto
    python train_backbone.py --resume runs/resnet18 --eval-only
    torchrun --nproc-per-node 8 train_backbone.py --config configs/resnet50_imagenet.toml --data data/imagenet

The run folder gets last.pt, previous.pt and best.pt, metrics.jsonl, TensorBoard files, and backbone.pt: the best
weights alone, from which the detectors start (--backbone-weights).
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools

import torch
from torchvision.transforms import v2

import models
from data import checks, classes, classification, loader, transforms
from evaluation.classification import TopKAccuracy, score_labels
from losses.classification import cross_entropy
from models import backbones, pretrained
from ops.images import normalize
from training import cli, distributed, memory, optim
from training.ema import Ema
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils.errors import UsageError
from visualize import draw2d

USAGE = "python train_backbone.py --arch resnet18 --data FOLDER --model-dir RUN [flags]"
METRICS = ("loss", "top1", "top5")


def parse_args(argv):
    parser = cli.ArgumentParser("train_backbone.py", __doc__, USAGE)
    arg = parser.add_argument_group("data").add_argument
    arg("--data", default="data", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    arg("--train", default="", metavar="DIR", help="folder of the training classes, if it is not DATA/train")
    arg("--val", default="", metavar="DIR", help="folder of the validation classes, if it is not DATA/val")
    arg("--resolution", type=cli.pixels, default=224, help="height and width of training images in pixels")
    crop = "augmentation: area of the random crop as a share of the image"
    arg("--crop-scale", type=cli.probability, nargs=2, default=[0.53, 1.0], metavar=("MIN", "MAX"), help=crop)
    jitter = "augmentation: maximum change of brightness, contrast, saturation and hue"
    arg("--color-jitter-strength", "--jitter", dest="jitter", type=cli.probability, default=0.03, help=jitter)
    arg("--erase", type=cli.probability, default=0.0, help="augmentation: probability of random erasing")
    arg("--mixup", type=cli.non_negative, default=0.0, metavar="ALPHA", help="augmentation: mixup; 0: off")
    cutmix = "augmentation: cutmix; 0: off; with mixup, one of the two at random"
    arg("--cutmix", type=cli.non_negative, default=0.0, metavar="ALPHA", help=cutmix)
    arg("--val-resolution", type=cli.count, default=0, help="resolution of validation; 0: --resolution")
    resize = "shortest side in validation before the center crop; 0: --val-resolution"
    arg("--val-resize", type=cli.count, default=0, metavar="PIXELS", help=resize)

    arg = parser.add_argument_group("network, loss").add_argument
    arg("--arch", "--net", choices=tuple(backbones.NETWORKS), default="resnet18", help="network architecture")
    width = "mobilenet_v2: width multiplier; for train_ssd.py a whole number"
    arg("--width-mult", type=cli.non_negative, default=1.0, help=width)
    start = "weights to start from: a file of this network; imagenet: torchvision's, downloaded"
    arg("--weights", default="none", metavar="imagenet|none|FILE", help=start)
    imagenet = "the same as --weights imagenet"
    arg("--pretrained", dest="weights", action="store_const", const="imagenet", help=imagenet)
    arg("--label-smoothing", type=cli.number(float, 0, 1), default=0.0, help="share of a label spread over all classes")
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    published = {"batch_size": 128, "lr_batch_size": 128, "lr": 0.1, "epochs": 90, "milestones": "30,60,80"}
    parser.set_defaults(model_dir="runs/backbone", weight_decay=1e-4, **published)
    return parser.parse(argv)


@torch.no_grad()
def evaluate(net, val_loader, sample_ids=(), *, run):
    """Mean loss, top-1 and top-5 accuracy of the validation set: (metrics, evaluators, samples).

    Every process evaluates its share of the images, all get the same metrics. Batch norm statistics do not change.
    samples: the images with `sample_ids`, (image, label, predicted label) each, to be drawn.
    """
    evaluator, samples = TopKAccuracy(net.classes), []
    loss, count = torch.zeros((), dtype=torch.float64, device=run.device), 0
    run.set_eval_mode(net)
    for images, labels, image_ids in val_loader:
        with run.autocast():
            logits = net(normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std))
        labels_on_device = labels.to(run.device, non_blocking=True)
        loss += cross_entropy(logits, labels_on_device, 1)["cross_entropy"]
        count += len(labels)
        evaluator.update(labels_on_device, logits)
        for row in (row for row, image_id in enumerate(image_ids) if image_id in sample_ids):
            samples.append((images[row], int(labels[row]), int(logits[row].argmax())))
    loss = run.mean(loss) / run.mean(count)
    return {"loss": float(loss), **evaluator.compute(run.gather)}, [evaluator], samples


@torch.no_grad()
def accuracy(logits, labels, count):
    """Images whose label (of a mixed one, the larger part) is the top prediction, or among the top five: / count."""
    labels = labels if labels.ndim == 1 else labels.argmax(1)
    correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B,5], best first
    return {"top1": correct[:, 0].sum() / count, "top5": correct.sum() / count}


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init(args)
    monitor = cli.choose_monitor(args.monitor, "top1", METRICS)
    run_folder = RunFolder(args, run, monitor)
    val_size = args.val_resolution or args.resolution
    if 0 < args.val_resize < val_size:
        raise UsageError(f"--val-resize {args.val_resize}: give 0, or at least the {val_size} pixels of the crop")
    if args.width_mult != 1 and args.arch != "mobilenet_v2":
        raise UsageError(f"--width-mult: {args.arch} has one width; leave it out, or give --arch mobilenet_v2")

    # data
    folders = {"train": args.train, "val": args.val, "val_only": args.eval_only, "split": args.split}
    with run.main_first():  # it lists the files, the others read its list
        train_set, val_set, errors = classification.load(
            args.data, classes=run_folder.classes, cache=run_folder.path, seed=args.seed, print=run.print, **folders
        )
    if args.check_data:
        run.close()
        return checks.check_data(train_set, val_set, errors, args.workers, run_folder.path) if run.is_main else {}
    train_set, val_set = checks.apply(train_set, val_set, errors, "error", args.bad_images, args.workers, run.print)
    truth = score_labels(TopKAccuracy(val_set.classes), val_set.labels)
    run.print(f"ground truth scored as predictions: top-1 {truth['top1']:.3f}")

    # network
    arguments = {"width_mult": args.width_mult} if args.arch == "mobilenet_v2" else {}
    net = models.build(args.arch, len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (args.resolution, args.resolution)
    if not run_folder.checkpoint:
        pretrained.init_weights(net, **cli.start_options(args), download=run.is_main, print=run.print)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.classification_train(args.resolution, args.crop_scale, args.jitter, args.erase)
    val_set.transform = transforms.classification_eval(args.val_resize or val_size, val_size)
    mixers = [v2.MixUp(alpha=args.mixup, num_classes=net.num_classes)] if args.mixup else []
    mixers += [v2.CutMix(alpha=args.cutmix, num_classes=net.num_classes)] if args.cutmix else []
    mix = v2.RandomChoice(mixers) if mixers else v2.Identity()
    optim.set_train_mode(net, freeze_bn=args.freeze_bn)

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes, run.device)
    criterion = functools.partial(cross_entropy, smoothing=args.label_smoothing, class_weights=class_weights)

    # optimizer, schedule, resume
    optimizer = optim.build(args, {"backbone": list(net.parameters())}, {"backbone": args.lr})
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before Ema: all processes then have the same weights
    ema = Ema(net, args.ema)
    plan = Plan(args, len(train_set), run.print)
    progress = run_folder.restore(net, optimizer, ema, plan, models.describe(net, image_size=(val_size, val_size)))
    run.print(f"{models.summary(net)}, {size[0]} x {size[1]} pixels, {distributed.describe(run)}")

    # loaders
    process = loader.Process(run.rank, run.world_size, args.workers, run.pin_memory)
    val_loader = loader.eval_loader(val_set, args.batch_size, process, loader.collate_labels)
    validate = functools.partial(evaluate, net, run=run)
    if args.eval_only:
        metrics, evaluators, _ = validate(val_loader)
        return run_folder.report(metrics, evaluators)
    balance = train_set.balance_weights() if args.balance_data else None
    steps = len(train_set), args.batch_size, plan.total_steps, args.seed, progress.step
    sampler = loader.StepSampler(*steps, process, balance)
    train_loader = loader.train_loader(train_set, sampler, process, loader.collate_labels)
    if args.preflight:
        count = args.batch_size // run.world_size
        first = [[i % len(dataset) for i in range(count)] for dataset in (train_set, val_set)]
        train_loader, val_loader = loader.one_batch_each((train_set, val_set), first, [loader.collate_labels] * 2)
    sample_ids = set(range(0, len(val_set), -(-len(val_set) // 16)))  # 16 images to draw, from all classes

    # train
    with run_folder.logger(plan, train_set) as logger, StopSignals(run) as stop, memory.advice(run, args, size):
        batches, due = logger.steps(train_loader), plan.start(progress)
        while True:
            if due.validate:  # after the step before, which may be that of an interrupted run
                with ema.applied(), logger.paused():
                    metrics, evaluators, samples = validate(val_loader, sample_ids)
                    if progress.record(metrics[monitor], cli.higher_is_better(monitor)):
                        run_folder.save_weights(net)
                optim.set_train_mode(net, freeze_bn=args.freeze_bn)
                images = draw2d.prediction_sheet(samples, net.classes)
                logger.log_validation(progress.step, metrics, evaluators, images)
                run_folder.save()
            if due.stop or plan.is_stale(progress):
                break
            images, labels, image_ids = next(batches)
            run.seed_step(progress.step + 1)  # dropout, mixup
            plan.set_lr(optimizer, progress.step)
            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
            images, labels = mix(images, labels.to(run.device, non_blocking=True))
            count = args.batch_size / run.world_size
            parts = zip(images.chunk(args.accumulate), labels.chunk(args.accumulate))
            for part, part_labels in run.sync_last(wrapped, parts):
                with run.autocast():
                    logits = wrapped(part)
                losses = criterion(logits, part_labels, count)
                run.scaler.scale(sum(losses.values())).backward()
                logger.add(progress.step + 1, losses, image_ids, accuracy(logits, part_labels, count))
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
