"""Train a backbone for classification: ResNet, MobileNet v1 and v2, VGG16, SqueezeNet, DLA-34, on folders a class.

    python train_backbone.py --arch resnet18 --data data/imagenet --model-dir runs/resnet18
    python train_backbone.py --config configs/backbone_small.toml --data data/flowers --model-dir runs/flowers
    python train_backbone.py --arch resnet18 --train data/a --val data/b --model-dir runs/resnet18 --resume auto
    python train_backbone.py --arch resnet18 --data data/imagenet --model-dir runs/resnet18 --resume auto --eval-only
    torchrun --nproc-per-node 8 train_backbone.py --config configs/resnet50_imagenet.toml --data data/imagenet

The run folder gets last.pt, previous.pt and best.pt, metrics.jsonl, what TensorBoard reads, and backbone.pt: the best
weights, which the detectors start from (--backbone-weights of train_retinanet.py, --base-net of train_ssd.py).
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from torchvision.transforms import v2

import models
from data import DataError, check, classes, folders, loader, transforms
from evaluation.classification import TopK, score_labels
from losses import classification
from models import WeightsError, backbones, published
from ops.images import normalize
from training import checkpoints, devices, flags, log, optimizers, pictures, rehearsal, schedule
from training.modes import train_mode

USAGE = "python train_backbone.py --arch resnet18 --data FOLDER --model-dir RUN [flags]"
TAGS = {"loss": "Loss", "top1": "Accuracy top-1", "top5": "Accuracy top-5"}  # metrics -> names in TensorBoard


def parse_args(argv):
    parser = argparse.ArgumentParser("train_backbone.py", USAGE, __doc__, formatter_class=flags.HelpFormatter)
    count, amount, share = flags.number(int, 0), flags.number(float, 0), flags.number(float, 0, most=1)
    arg = parser.add_argument_group("data").add_argument
    arg("--data", default="data", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    arg("--train", default="", metavar="DIR", help="folder of the training classes, if it is no train in --data")
    arg("--val", default="", metavar="DIR", help="folder of the validation classes, if it is no val in --data")
    arg("--resolution", type=flags.number(int, 1), default=224, help="pixels a side of the pictures trained on")
    arg("--crop-scale", type=share, nargs=2, default=[0.53, 1.0], help="augmentation: share of the picture to crop")
    arg("--jitter", type=share, default=0.03, help="augmentation: change of brightness, contrast, saturation, hue")
    arg("--erase", type=share, default=0.0, help="augmentation: chance of a rectangle of mean colour")
    arg("--mixup", type=amount, default=0.0, help="augmentation: alpha of mixup; 0: off")
    arg("--cutmix", type=amount, default=0.0, help="augmentation: alpha of cutmix; with both, either by chance")
    arg("--val-resolution", type=count, default=0, help="validation: pixels a side; 0: as --resolution")
    arg("--val-resize", type=count, default=0, help="validation: shortest side before the crop; 0: --val-resolution")

    arg = parser.add_argument_group("network").add_argument
    arg("--arch", "--net", choices=tuple(backbones.NETWORKS), default="resnet18", help="architecture")
    arg("--width-mult", type=amount, default=1.0, help="of mobilenet_v2; train_ssd.py takes whole numbers alone")
    arg("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    arg("--weights", default="", metavar="FILE", help="start from these: a backbone.pt, or torchvision's file")

    arg = parser.add_argument_group("learning rate and loss").add_argument
    arg("--learning-rate", "--lr", dest="lr", type=amount, default=0.1, help="at --batch-size")
    arg("--scheduler", choices=schedule.NAMES, default="multi-step", help="learning rate over time")
    arg("--steps", type=count, default=0, help="length of the run in steps; 0: --epochs")
    steps = "milestones in steps, such as 150000,300000; else --milestones, in epochs"
    arg("--milestone-steps", type=flags.numbers, help=steps)
    arg("--label-smoothing", type=flags.number(float, 0, 1), default=0.0, help="share of a label that all classes get")
    arg("--validation-steps", type=count, default=0, help="validate every so many steps; 0: by epochs")
    flags.add_data_arguments(parser)
    flags.add_run_arguments(parser)
    source = {"batch_size": 128, "lr_batch_size": 128, "epochs": 90, "milestones": "30,60,80", "weight_decay": 1e-4}
    parser.set_defaults(model_dir="runs/backbone", **source)
    return flags.parse(parser, argv)


@torch.no_grad()
def evaluate(net, batches, run, keep=()):
    """Mean loss, top-1 and top-5 over the whole set -> (metrics, TopK, [(image, label, found label)] to look at).

    Batch norm statistics stay untouched. Every process takes its share of the pictures, all get the same metrics.
    keep: ids of the pictures that come back, as far as they are in this process's share.
    """
    topk, kept = TopK(), []
    sums = torch.zeros(2, dtype=torch.float64)  # loss, pictures
    net.eval()
    for images, labels, image_ids in batches:
        pixels = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
        with run.autocast():
            logits = net(pixels)
        labels = labels.to(run.device)
        entropy = classification.loss(logits, labels, count=1)["cross_entropy"]
        sums += torch.tensor([entropy.item(), len(labels)], dtype=torch.float64)
        topk.update(labels, logits)
        answers = zip(image_ids, images, labels.tolist(), logits.argmax(1).tolist())
        kept += [answer for image_id, *answer in answers if image_id in keep]
    sums = run.mean(sums)
    return {"loss": float(sums[0] / sums[1]), **topk.compute(run.gather)}, topk, kept


@torch.no_grad()
def accuracy(logits, labels, count):
    """Pictures whose label (of a mixed one, the greater part) is the best, or among the five best, answers: / count."""
    labels = labels if labels.ndim == 1 else labels.argmax(1)
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B,5], best first
    return {"top1": right[:, 0].sum() / count, "top5": right.sum() / count}


def log_evaluation(logger, step, metrics, kept, names):
    """Loss and accuracy, and the pictures that were kept, each named by what was found in it."""
    logger.log(step, {TAGS[name] + "/val": value for name, value in metrics.items()})
    if kept:
        images, labels, found = zip(*kept)
        logger.images("Predictions (truth where wrong)", pictures.sheet(images, labels, found, names), step)


def preflight(net, wrapped, optimizer, train_set, args, run):
    """A batch forward, backward and through evaluation, then the peaks of memory."""
    batch = loader.collate_labels([train_set[i % len(train_set)] for i in range(args.batch_size // run.world)])
    rehearsal.allocate(optimizer)
    images, labels, _ = batch
    pixels = normalize(images.to(run.device), net.image_mean, net.image_std)
    for part, part_labels in zip(pixels.chunk(args.accumulate), labels.to(run.device).chunk(args.accumulate)):
        with run.autocast():
            logits = wrapped(part)
        classification.loss(logits, part_labels, args.batch_size)["cross_entropy"].backward()
    evaluate(net, [batch], run)
    run.say(f"preflight: {len(images)} pictures at {args.resolution} pixels")
    run.say(devices.memory_peaks(run, args.workers, images.nbytes))


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, args.gpus, args.precision, args.seed)
    out, batch = Path(args.model_dir), args.batch_size
    devices.check_batch(run, batch, args.accumulate)
    monitor = flags.choose_monitor(args.monitor, "top1", TAGS)
    flags.need_weights(args.eval_only, args.resume or args.pretrained or args.weights, "--weights")
    val_size = args.val_resolution or args.resolution
    if 0 < args.val_resize < val_size:
        raise flags.UsageError(f"--val-resize {args.val_resize}: give 0, or at least the {val_size} pixels cut out")
    if args.width_mult != 1 and args.arch != "mobilenet_v2":
        raise flags.UsageError(f"--width-mult: {args.arch} has one width; leave it out, or give --arch mobilenet_v2")

    # data
    resume = (args.resume, args.overwrite, args.eval_only or args.preflight, "--weights")
    saved = None if args.check_data else checkpoints.open_run(out, *resume)
    trained = saved and saved["classes"]
    if not run.is_main:
        run.barrier()  # the main process lists the files, the others read its list
    faults = []
    sets = folders.load(args.data, args.train, args.val, trained, out, args.seed, run.say, faults)
    if run.is_main:
        run.barrier()
    if args.check_data:
        return check.check_data(*sets, faults, args.workers, out / "data_faults.json", run.say)
    train_set, val_set = folders.settle(*sets, faults, args.bad_images, args.workers, run.say)
    truth = score_labels(TopK(), val_set.labels, len(val_set.classes))
    run.say(f"ground truth scored as predictions: top-1 {truth['top1']:.3f}")

    # network
    arguments = {"width_mult": args.width_mult} if args.arch == "mobilenet_v2" else {}
    net = models.build(args.arch, len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (args.resolution, args.resolution)
    if not saved:
        published.begin_backbone(net, args.pretrained, args.weights, run.is_main, run.say, args.eval_only)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.classify_train(args.resolution, args.crop_scale, args.jitter, args.erase)
    val_set.transform = transforms.classify_evaluate(args.val_resize or val_size, val_size)
    pin, collate = run.device.type == "cuda", loader.collate_labels
    val_batches = loader.evaluation_loader(val_set, batch, args.workers, run.rank, run.world, pin, collate)
    mixers = [v2.MixUp(alpha=args.mixup, num_classes=net.num_classes)] if args.mixup else []
    mixers += [v2.CutMix(alpha=args.cutmix, num_classes=net.num_classes)] if args.cutmix else []
    mix = v2.RandomChoice(mixers) if mixers else v2.Identity()

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes)
    class_weights = class_weights and torch.tensor(class_weights[1:], device=run.device)  # no background here
    settings = {"smoothing": args.label_smoothing, "class_weights": class_weights}
    criterion = functools.partial(classification.loss, **settings)

    # optimiser
    train_mode(net, freeze_bn=args.freeze_bn)
    decay = (args.weight_decay, args.norm_weight_decay)
    parts = {"backbone": list(net.parameters())}
    optimizer = optimizers.build(args.optimizer, parts, {"backbone": args.lr}, *decay, args.momentum)
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before the averages: it gives all processes the same weights
    ema = checkpoints.Ema(net, args.ema)

    # schedule, in steps
    steps = functools.partial(loader.steps_in, count=len(train_set), batch_size=batch)
    length = args.steps or steps(args.epochs)
    total = min(length, args.max_steps or length)
    milestones = args.milestone_steps or [steps(epoch) for epoch in args.milestones]
    shape = {"total": steps(args.t_max) if args.t_max else length, "milestones": milestones, "gamma": args.gamma}
    lr_factor = functools.partial(schedule.lr_factor, args.scheduler, warmup_steps=args.warmup_steps, **shape)
    scale = optimizers.batch_scale(batch, args.lr_batch_size, args.scale_lr, run.say)

    # resume
    progress = checkpoints.Progress()
    state = {"model": net, "optimizer": optimizer, "scaler": run.scaler, "ema": ema}
    if saved:
        checkpoints.restore(saved, state, progress, args.eval_only)
        for line in checkpoints.changed(saved["flags"], vars(args)):
            run.say(f"  changed: {line}")
    about = {**models.describe(net), "image_size": (val_size, val_size)}
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    run.say(f"{net.name}, {args.resolution} pixels, {parameters:.1f} M parameters, {devices.describe(run)}")
    if args.preflight:
        with devices.memory_advice(run, size, batch, args.accumulate):
            return preflight(net, wrapped, optimizer, train_set, args, run)
    if args.eval_only:
        with ema.applied(net):
            metrics, topk, _ = evaluate(net, val_batches, run)
        if run.is_main:
            topk.write_tables(out, net.classes)
        run.say(json.dumps(metrics, indent=1) + f"\n{out}/per_class.csv and confusion.csv written")
        run.close()
        return metrics

    # train
    for warning in devices.check_machine(args.workers, 3 * args.resolution**2 * batch // run.world):
        run.say(f"WARNING: {warning}")
    balance = train_set.balance_weights() if args.balance_data else None
    sampler = loader.StepSampler(len(train_set), batch, total, args.seed, progress.step, run.rank, run.world, balance)
    batches = loader.train_loader(train_set, sampler, args.workers, pin, collate)
    logger = log.Logger(out, total, progress.step, run.is_main, args.debug_steps, vars(args), args.log_level)
    meter, metrics, logged = log.Meter(limit=20 if run.scaler.is_enabled() else 0), {}, progress.step
    whole = {**state, **about, "progress": progress, "flags": vars(args)}
    right, shown = log.Meter(), set(range(0, len(val_set), -(-len(val_set) // 16)))  # 16 pictures, from all classes
    with checkpoints.StopSignals() as stop, logger, devices.memory_advice(run, size, batch, args.accumulate):
        for images, labels, image_ids in logger.steps(batches):
            step = progress.step + 1
            run.seed_step(step)  # dropout, mixup
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale * lr_factor(step - 1)

            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
            images, labels = mix(images, labels.to(run.device, non_blocking=True))
            count = batch / run.world
            for part, part_labels in zip(images.chunk(args.accumulate), labels.chunk(args.accumulate)):
                with run.autocast():
                    logits = wrapped(part)
                losses = criterion(logits, part_labels, count)
                run.scaler.scale(sum(losses.values())).backward()
                meter.add(losses, image_ids, step)
                right.add(accuracy(logits, part_labels, count), step=step)
            run.scaler.unscale_(optimizer)
            if args.clip_norm:
                torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_norm)
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(net)

            progress.step = step
            epoch = loader.epoch_ended(step, len(train_set), batch)  # 0 within an epoch
            progress.epoch = epoch or progress.epoch
            stopping = run.any(stop.requested)
            saving = epoch or stopping or schedule.due(step, args.save_every_steps, total) or step == total
            if saving or logger.due(step):
                values = {"loss": log.read_losses(meter, run, optimizer, out, train_set.paths)["loss"]}
                values |= {name: float(run.mean(value)) for name, value in right.read().items()}
                values = {TAGS[name] + "/train": value for name, value in values.items()}
                values["lr"] = optimizer.param_groups[-1]["lr"]
                logger.log(step, values, images=(step - logged) * batch)
                logged = step
            best = False
            due = epoch and epoch % args.validation_epochs == 0
            if args.validation_steps:
                due = schedule.due(step, args.validation_steps, total)
            if not stopping and (due or step == total):
                checkpoints.save(out, whole)  # a kill in here loses no step
                with ema.applied(net), logger.paused():
                    run.share_statistics(net)
                    metrics, topk, kept = evaluate(net, val_batches, run, keep=shown)
                    best = progress.improved(metrics[monitor], lower_is_better=monitor == "loss")
                    if best:
                        checkpoints.export(out / "backbone.pt", {**about, "model": net})
                train_mode(net, freeze_bn=args.freeze_bn)
                log_evaluation(logger, step, metrics, kept, net.classes)
            if saving or best:
                copies = schedule.copies(epoch, step, args.save_every_epochs, args.save_every_steps)
                checkpoints.save(out, whole, best=best, keep=args.keep, **copies)
            if stopping or (args.patience and progress.stale >= args.patience):
                break
    run.close()
    if stop.requested:
        run.say(f"stopped and saved at step {progress.step}; go on with --resume auto")
        raise SystemExit(stop.exit_code)
    if metrics:
        run.say(f"top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}\n{topk.table(net.classes)}")
    if progress.best is not None:
        weights = f", its weights in {out / 'backbone.pt'}" if (out / "backbone.pt").is_file() else ""
        run.say(f"best {monitor} {progress.best:.4g} at step {progress.best_step}{weights}")
    run.say(f"checkpoints, curves and pictures: tensorboard --logdir {out}")
    return metrics


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, log.NonFinite)
