"""Train SSD (MobileNet v1 and v2, VGG16, SqueezeNet) on Pascal VOC, Open Images, COCO or csv data.

    python train_ssd.py --dataset-type voc --data data/drone --model-dir runs/drone
    python train_ssd.py --config configs/ssd_mb1_small.toml --data data/cells --model-dir runs/cells
    python train_ssd.py --dataset-type voc --data data/drone --model-dir runs/drone --resume auto
    python train_ssd.py --dataset-type voc --data data/drone --model-dir runs/drone --resume auto --eval-only
    torchrun --nproc-per-node 4 train_ssd.py --dataset-type open_images --data data/fruit --model-dir runs/fruit

The run folder gets last.pt, previous.pt and best.pt, metrics.jsonl, labels.txt and what TensorBoard reads.
Published mAP on VOC07 test, not reproduced by us: mb1-ssd 67.5, mb2-ssd-lite 68.6, vgg16-ssd 77.26 (qfgaohao).
"""

import argparse
import functools
import json
from pathlib import Path

import torch

import models
from data import DataError, check, classes, detection, loader, transforms
from evaluation import score_truth
from evaluation.voc import VOCEvaluator
from losses import assignment, multibox
from models import WeightsError, published, ssd
from ops.images import normalize
from ops.suppress import from_multibox
from training import checkpoints, devices, flags, log, optimizers, pictures, rehearsal, schedule
from training.modes import train_mode

USAGE = "python train_ssd.py --dataset-type voc --data FOLDER --model-dir RUN [flags]"
# metrics of evaluate -> names in TensorBoard, as the source has them
TAGS = {"loss": "Loss", "regression_loss": "Regression Loss", "classification_loss": "Classification Loss"}


def parse_args(argv):
    parser = argparse.ArgumentParser("train_ssd.py", USAGE, __doc__, formatter_class=flags.HelpFormatter)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset-type", choices=tuple(detection.LAYOUTS), default="open_images", help="layout of the data")
    arg("--datasets", "--data", dest="data", nargs="+", default=["data"], help="one or more folders, joined")
    arg("--zoom-out", type=flags.chance, default=0.5, help="augmentation: chance of zooming out")
    arg("--largest-canvas", type=flags.number(float, 1), default=4.0, help="augmentation: picture sides to zoom out to")
    arg("--iou-crop", type=flags.chance, default=1.0, help="augmentation: chance of trying an IoU crop")
    arg("--colour", type=flags.chance, default=0.5, help="augmentation: chance of each colour change")

    arg = parser.add_argument_group("network").add_argument
    arg("--net", choices=tuple(ssd.NETWORKS), default="mb1-ssd", help="architecture")
    arg("--resolution", type=flags.number(int, 1), default=300, help="pixels a side of the network's input")
    arg("--mb2-width-mult", type=float, default=1.0, help="of mb2-ssd-lite; a backbone fits whole numbers alone")
    sizes = "prior sizes: least of each of the six maps in pixels at 300, and the last's greatest; else the published"
    arg("--box-sizes", type=flags.unsigned, nargs=7, metavar="PIXELS", help=sizes)
    arg("--match-iou", type=flags.chance, default=0.5, help="least IoU of a prior that answers for a box")
    start = "start from a whole SSD, ours or published; auto: the published file in models/, downloaded if it can be"
    arg("--pretrained-ssd", default="auto", metavar="auto|none|FILE", help=start)
    arg("--base-net", default="", metavar="FILE", help="start from a backbone's weights instead")
    arg("--freeze-base-net", action="store_true", help="train the extra layers and heads alone")
    arg("--freeze-net", action="store_true", help="train the heads alone")

    arg = parser.add_argument_group("learning rate").add_argument
    arg("--learning-rate", "--lr", dest="lr", type=flags.unsigned, default=0.01, help="of the heads")
    arg("--base-net-lr", type=flags.unsigned, default=0.001, help="of the base net")
    arg("--extra-layers-lr", type=flags.unsigned, help="of the extra layers; as --lr if not given")
    arg("--scheduler", choices=("cosine", "multi-step"), default="cosine", help="learning rate over time")
    arg("--use-cuda", type=flags.str2bool, default=True, metavar="BOOL", help="false is --device cpu")
    arg("--validation-mean-ap", action="store_true", help="validate by mAP too, not by the loss alone")
    flags.add_detection_arguments(parser)
    flags.add_data_arguments(parser)
    flags.add_run_arguments(parser)
    parser.set_defaults(model_dir="models/", t_max=100.0, milestones="80,100", lr_batch_size=4)
    return flags.parse(parser, argv)


@torch.no_grad()
def evaluate(net, batches, run, mean_ap, assign, criterion, keep=0):
    """Losses over a validation set and, if `mean_ap`, AP -> (metrics, evaluator, [(image, target, found)] to look at).

    Batch norm statistics stay untouched. Every process takes its share of the pictures, all get the same metrics.
    assign, criterion: assignment.assign and multibox.loss with the run's settings. keep: the first so many pictures
    with objects come back.
    """
    evaluator, kept = VOCEvaluator(net.classes), []
    sums = torch.zeros(3, dtype=torch.float64)  # regression loss, classification loss, positives
    net.eval()
    for images, targets in batches:
        size = tuple(images.shape[-2:])
        with run.autocast():
            outputs = net(normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std))
        goals = assign(net.anchors(size), targets, net.box_weights)
        losses = criterion(outputs, goals, positives=1)
        sums += torch.stack([*losses.values(), assignment.count(goals)]).double().cpu()
        if mean_ap:
            found = from_multibox(outputs, net.anchors(size), net.box_weights, size)
            evaluator.update(targets, found)
            samples = [sample for sample in zip(images, targets, found) if len(sample[1]["labels"])]
            kept += samples[: keep - len(kept)]
    sums = run.mean(sums)
    regression, classification = (sums[:2] / sums[2].clamp(min=1 / run.world)).tolist()
    metrics = dict(zip(TAGS, (regression + classification, regression, classification)))
    return metrics | (evaluator.compute(run.gather) if mean_ap else {}), evaluator, kept


def log_evaluation(logger, step, metrics, evaluator, kept):
    """Validation under the source's names, PR curves, and pictures for TensorBoard."""
    values = {TAGS[name] + "/val": metrics[name] for name in TAGS}
    if "mAP" in metrics:
        values["Mean Average Precision/val"] = metrics["mAP"]
        values["Mean Average Precision/val 11-point"] = metrics["mAP_11point"]
        for name, (precision, recall, _) in evaluator.curves().items():
            values[f"Class Average Precision/{name}"] = metrics[f"AP/{name}"]
            logger.pr_curve(f"PR curve/{name}", precision, recall, step)
    logger.log(step, values)
    for number, sample in enumerate(kept):
        beside = pictures.beside_truth(*sample, evaluator.classes)
        logger.images(f"Truth left, predictions right/{number}", beside, step)


def preflight(net, wrapped, optimizer, train_set, args, run, assign, criterion):
    """The batch with the most boxes forward, backward and through evaluation, then the peaks of memory."""
    images, targets = loader.collate([train_set[i] for i in train_set.fullest(args.batch_size // run.world)])
    rehearsal.allocate(optimizer)
    goals = assign(net.anchors(images.shape[-2:]), targets, net.box_weights)
    pixels = normalize(images.to(run.device), net.image_mean, net.image_std)
    for part, part_goals in assignment.pieces(args.accumulate, pixels, goals):
        with run.autocast():
            outputs = wrapped(part)
        sum(criterion(outputs, part_goals, positives=1).values()).backward()
    evaluate(net, [(images, targets)], run, True, assign, criterion)
    boxes = sum(len(target["labels"]) for target in targets)
    run.say(f"preflight: {len(images)} pictures at {args.resolution} pixels, {boxes} boxes")
    run.say(devices.memory_peaks(run, args.workers, images.nbytes))


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device if args.use_cuda else "cpu", args.gpus, args.precision, args.seed)
    out, batch = Path(args.model_dir), args.batch_size
    devices.check_batch(run, batch, args.accumulate)
    measured = [*TAGS] + ["mAP", "mAP_11point"] * args.validation_mean_ap
    monitor = flags.choose_monitor(args.monitor, "mAP" if args.validation_mean_ap else "loss", measured)
    named = args.pretrained_ssd not in ("auto", "none") and not args.base_net
    flags.need_weights(args.eval_only, args.resume or named, "--pretrained-ssd")

    # data
    resume = (args.resume, args.overwrite, args.eval_only or args.preflight, "--pretrained-ssd")
    saved = None if args.check_data else checkpoints.open_run(out, *resume)
    names, trained = flags.names_in_data(args), saved and saved["classes"]
    *sets, faults = detection.load(args.dataset_type, args.data, trained=trained, seed=args.seed, **names)
    if args.check_data:
        return check.check_data(*sets, faults, args.workers, out / "data_faults.json", run.say)
    train_set, val_set = detection.settle(*sets, faults, args.bad_boxes, args.bad_images, args.workers, run.say)
    truth = score_truth(VOCEvaluator(val_set.classes), val_set)
    run.say(f"ground truth scored as predictions: mAP {truth['mAP']:.3f}")

    # network
    arguments = {"width_mult": args.mb2_width_mult} if args.net == "mb2-ssd-lite" else {}
    if args.box_sizes:
        arguments["box_sizes"] = list(zip(args.box_sizes, args.box_sizes[1:]))
    net = models.build(args.net, len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (args.resolution, args.resolution)
    if not saved:
        published.begin(net, args.pretrained_ssd, args.base_net, "models", run.is_main, run.say)
    net.to(run.device, memory_format=torch.channels_last)
    augmentation = (args.zoom_out, args.largest_canvas, args.iou_crop, args.colour)
    train_set.transform = transforms.ssd_train(size, net.image_mean, *augmentation)
    val_set.transform = transforms.ssd_evaluate(size)
    pin = run.device.type == "cuda"
    val_batches = loader.evaluation_loader(val_set, batch, args.workers, run.rank, run.world, pin)

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes)
    class_weights = class_weights and torch.tensor(class_weights, device=run.device)
    assign = functools.partial(assignment.assign, threshold=args.match_iou)
    criterion = functools.partial(multibox.loss, class_weights=class_weights)

    # optimiser
    frozen = [net.base_net] * (args.freeze_base_net or args.freeze_net)
    frozen += [net.extras, net.source_layer_add_ons] * args.freeze_net
    train_mode(net, frozen, args.freeze_bn)
    rates = {"base_net": args.base_net_lr, "extras": args.extra_layers_lr or args.lr, "heads": args.lr}
    decay = (args.weight_decay, args.norm_weight_decay)
    optimizer = optimizers.build(args.optimizer, net.parameter_groups(), rates, *decay, args.momentum)
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before the averages: it gives all processes the same weights
    ema = checkpoints.Ema(net, args.ema)

    # schedule, in steps
    steps = functools.partial(loader.steps_in, count=len(train_set), batch_size=batch)
    total = min(steps(args.epochs), args.max_steps or steps(args.epochs))
    milestones = [steps(epoch) for epoch in args.milestones]
    shape = {"total": steps(args.t_max or args.epochs), "milestones": milestones, "gamma": args.gamma}
    lr_factor = functools.partial(schedule.lr_factor, args.scheduler, warmup_steps=args.warmup_steps, **shape)
    scale = optimizers.batch_scale(batch, args.lr_batch_size, args.scale_lr, run.say)

    # resume
    progress = checkpoints.Progress()
    state = {"model": net, "optimizer": optimizer, "scaler": run.scaler, "ema": ema}
    if saved:
        checkpoints.restore(saved, state, progress, args.eval_only)
        for line in checkpoints.changed(saved["flags"], vars(args)):
            run.say(f"  changed: {line}")
    about = {**models.describe(net), "image_size": size, "flags": vars(args)}
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    run.say(f"{net.name}, {args.resolution} pixels, {parameters:.1f} M parameters, {devices.describe(run)}")
    if args.preflight:
        with devices.memory_advice(run, size, batch, args.accumulate):
            return preflight(net, wrapped, optimizer, train_set, args, run, assign, criterion)
    if args.eval_only:
        with ema.applied(net):
            metrics, evaluator, _ = evaluate(net, val_batches, run, True, assign, criterion)
        if run.is_main:
            evaluator.write_tables(out)
        run.say(json.dumps(metrics, indent=1) + f"\n{out}/per_class.csv and confusion.csv written")
        run.close()
        return metrics

    # train
    for warning in devices.check_machine(args.workers, 3 * args.resolution**2 * batch // run.world):
        run.say(f"WARNING: {warning}")
    balance = train_set.balance_weights() if args.balance_data else None
    sampler = loader.StepSampler(len(train_set), batch, total, args.seed, progress.step, run.rank, run.world, balance)
    batches = loader.train_loader(train_set, sampler, args.workers, pin)
    logger = log.Logger(out, total, progress.step, run.is_main, args.debug_steps, vars(args), args.log_level)
    meter, metrics, logged = log.Meter(limit=20 if run.scaler.is_enabled() else 0), {}, progress.step
    if run.is_main:
        (out / "labels.txt").write_text("\n".join(["BACKGROUND", *net.classes]) + "\n")
    with checkpoints.StopSignals() as stop, logger, devices.memory_advice(run, size, batch, args.accumulate):
        for images, targets in logger.steps(batches):
            step = progress.step + 1
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale * lr_factor(step - 1)

            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std)
            goals = assign(net.anchors(size), targets, net.box_weights)
            positives = run.mean(assignment.count(goals)).clamp(min=1 / run.world)  # at least one in all
            for part, part_goals in assignment.pieces(args.accumulate, images, goals):
                with run.autocast():
                    outputs = wrapped(part)
                losses = criterion(outputs, part_goals, positives)
                run.scaler.scale(sum(losses.values())).backward()
                meter.add(losses, [target["image_id"] for target in targets], step)
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
                losses = log.read_losses(meter, run, optimizer, out, train_set.paths)
                values = {TAGS[name] + "/train": value for name, value in losses.items()}
                values["lr"] = optimizer.param_groups[-1]["lr"]
                logger.log(step, values, images=(step - logged) * batch)
                logged = step
            best = False
            if not stopping and ((epoch and epoch % args.validation_epochs == 0) or step == total):
                checkpoints.save(out, {**state, **about, "progress": progress})  # a kill in here loses no step
                with ema.applied(net), logger.paused():
                    run.share_statistics(net)
                    settings = (args.validation_mean_ap, assign, criterion)
                    metrics, *seen = evaluate(net, val_batches, run, *settings, keep=4)
                train_mode(net, frozen, args.freeze_bn)
                log_evaluation(logger, step, metrics, *seen)
                best = progress.improved(metrics[monitor], lower_is_better=monitor.endswith("loss"))
            if saving:
                copies = schedule.copies(epoch, step, args.save_every_epochs, args.save_every_steps)
                checkpoints.save(out, {**state, **about, "progress": progress}, best=best, keep=args.keep, **copies)
            if stopping or (args.patience and progress.stale >= args.patience):
                break
    run.close()
    if stop.requested:
        run.say(f"stopped and saved at step {progress.step}; go on with --resume auto")
        raise SystemExit(stop.exit_code)
    if "mAP" in metrics:
        run.say(seen[0].table())
    if progress.best is not None:
        run.say(f"best {monitor} {progress.best:.4g} at step {progress.best_step}")
    run.say(f"checkpoints, curves and pictures: tensorboard --logdir {out}")
    return metrics


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, log.NonFinite)
