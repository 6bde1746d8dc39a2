"""Train RetinaNet (ResNet 18 to 152, feature pyramid, focal loss) on COCO, csv, Pascal VOC or Open Images data.

    python train_retinanet.py --dataset coco --coco_path data/coco --depth 50
    python train_retinanet.py --dataset csv --csv_train train.csv --csv_classes classes.csv --csv_val val.csv --depth 18
    python train_retinanet.py --config configs/retinanet_r50_coco.toml --coco_path data/coco --model-dir runs/coco
    python train_retinanet.py --dataset coco --coco_path data/coco --model-dir runs/coco --resume auto --eval-only
    torchrun --nproc-per-node 8 train_retinanet.py --config configs/retinanet_r50_coco.toml --coco_path data/coco

The defaults are those of yhenon/pytorch-retinanet. The run folder gets what train_ssd.py's gets, and detections.json.
Published COCO box AP of ResNet-50, not reproduced by us: 36.4 (torchvision, 26 epochs), 33.5 (yhenon).
"""

import argparse
import functools
import json
from collections import deque
from pathlib import Path

import torch

import models
from data import DataError, check, classes, detection, loader, transforms
from evaluation import score_truth
from evaluation.coco import MEASURES, COCOEvaluator
from evaluation.voc import VOCEvaluator
from losses import assignment, focal
from models import WeightsError, published
from ops import suppress
from ops.boxes import in_file_pixels
from ops.images import normalize
from training import checkpoints, devices, flags, log, optimizers, pictures, rehearsal, schedule
from training.modes import train_mode

USAGE = "python train_retinanet.py --dataset coco --coco_path FOLDER --model-dir RUN [flags]"
# metrics of evaluate -> names in TensorBoard
TAGS = {"loss": "Loss", "regression_loss": "Regression Loss", "classification_loss": "Classification Loss"}


def parse_args(argv):
    parser = argparse.ArgumentParser("train_retinanet.py", USAGE, __doc__, formatter_class=flags.HelpFormatter)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset", "--dataset-type", choices=tuple(detection.LAYOUTS), default="coco", help="layout of the data")
    arg("--data", "--coco-path", dest="data", nargs="+", default=["data"], help="one or more folders, joined")
    sides = "shortest side in pixels; of several, training draws one for each picture and validation takes the last"
    arg("--min-side", type=flags.number(int, 1), nargs="+", default=[608], help=sides)
    arg("--max-side", type=flags.number(int, 1), default=1024, help="bound on the longest side")
    arg("--flip", type=flags.chance, default=0.5, help="augmentation: chance of a mirror image")
    arg("--colour", type=flags.chance, default=0.0, help="augmentation: chance of each colour change")

    arg = parser.add_argument_group("network").add_argument
    arg("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50, help="of the ResNet")
    arg("--anchors", choices=("yhenon", "torchvision"), default="yhenon", help="and box coding, of that program")
    arg("--anchor-scale", type=flags.number(float, 0.1), default=4.0, help="least side in strides; 2 for small objects")
    arg("--pretrained", default="", metavar="FILE", help="start from a whole RetinaNet, ours or published")
    start = "start from a ResNet: backbone.pt of train_backbone.py, or torchvision's file; auto: its ImageNet weights"
    arg("--backbone-weights", default="auto", metavar="auto|none|FILE", help=start)
    arg("--freeze-stages", type=int, choices=range(6), default=0, help="stages of the ResNet to keep as they are")

    arg = parser.add_argument_group("loss and detections").add_argument
    arg("--match-iou", type=flags.chance, default=0.5, help="least IoU of an anchor that answers for a box")
    arg("--background-iou", type=flags.chance, default=0.4, help="IoU below which an anchor is background")
    arg("--match-best", action="store_true", help="every box keeps its best anchor (torchvision does so)")
    arg("--box-loss-weight", type=flags.unsigned, default=0.25, help="on the sum over four offsets; 0.25: their mean")
    arg("--score-threshold", type=flags.chance, default=0.05, help="least score of a detection")
    arg("--nms-iou", type=flags.chance, default=0.5, help="IoU from which the lower score is suppressed")
    arg("--most-detections", type=flags.number(int, 1), default=100, help="detections a picture")

    arg = parser.add_argument_group("learning rate").add_argument
    arg("--learning-rate", "--lr", dest="lr", type=flags.unsigned, default=1e-5, help="of all but the backbone")
    arg("--backbone-lr", type=flags.unsigned, help="of the backbone; as --lr if not given")
    shapes = "learning rate over time; plateau: x gamma where the loss of an epoch did not fall for 3"
    arg("--scheduler", choices=("plateau", *schedule.NAMES), default="plateau", help=shapes)
    flags.add_detection_arguments(parser)
    flags.add_data_arguments(parser)
    flags.add_run_arguments(parser)
    source = {"batch_size": 2, "workers": 3, "epochs": 100, "optimizer": "adam", "weight_decay": 0.0, "clip_norm": 0.1}
    parser.set_defaults(model_dir="runs/retinanet", freeze_bn=True, lr_batch_size=2, **source)
    return flags.parse(parser, argv)


@torch.no_grad()
def evaluate(net, batches, run, coco, assign, criterion, detect, keep=0):
    """Losses and both kinds of AP -> (metrics, COCOEvaluator, VOCEvaluator, [(image, target, found)] to look at).

    coco: a fresh evaluator. Batch norm statistics stay untouched. Every process takes its share of the pictures, all
    get the same metrics. keep: the first so many pictures with objects come back.
    """
    voc, kept = VOCEvaluator(net.classes), []
    sums = torch.zeros(3, dtype=torch.float64)  # regression loss, classification loss, positives
    net.eval()
    for images, targets in batches:
        size, shapes = tuple(images.shape[-2:]), [target["shape"] for target in targets]
        pixels = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
        with run.autocast():
            outputs = net(pixels)
        goals = assign(net.anchors(size), targets, net.box_weights)
        losses = criterion(outputs, goals, positives=1)
        sums += torch.stack([*losses.values(), assignment.count(goals)]).double().cpu()
        found = detect(outputs, net.anchors(size), net.box_weights, shapes, net.level_sizes(size))
        samples = [sample for sample in zip(images, targets, found) if len(sample[1]["labels"])]
        kept += samples[: keep - len(kept)]
        # COCO tells small from large in pixels of the file
        targets, found = in_file_pixels(targets, targets), in_file_pixels(found, targets)
        coco.update(targets, found)
        voc.update(targets, found)
    sums = run.mean(sums)
    regression, classification = (sums[:2] / sums[2].clamp(min=1 / run.world)).tolist()
    metrics = dict(zip(TAGS, (regression + classification, regression, classification)))
    return metrics | coco.compute(run.gather) | voc.compute(run.gather), coco, voc, kept


def log_evaluation(logger, step, metrics, coco, voc, kept):
    """Validation losses, AP, PR curves and pictures for TensorBoard; detections.json."""
    values = {TAGS[name] + "/val": metrics[name] for name in TAGS}
    values["Mean Average Precision/val"] = metrics["mAP"]
    values |= {f"COCO/{name}": metrics[name] for name in MEASURES}
    for name, (precision, recall, _) in voc.curves().items():
        values[f"Class Average Precision/{name}"] = metrics[f"AP/{name}"]
        logger.pr_curve(f"PR curve/{name}", precision, recall, step)
    logger.log(step, values)
    for number, (image, target, found) in enumerate(kept):
        height, width = target["shape"]
        beside = pictures.beside_truth(image[:, :height, :width], target, found, voc.classes)
        logger.images(f"Truth left, predictions right/{number}", beside, step)
    if logger.enabled:
        coco.write(logger.folder / "detections.json")


def preflight(net, wrapped, optimizer, train_set, size, collate, args, run, assign, criterion, detect):
    """The largest padded batch forward, backward and through evaluation, then the peaks of memory."""
    train_set.transform = transforms.pyramid_evaluate(*size)
    images, targets = collate([train_set[i] for i in rehearsal.largest(train_set, args.batch_size // run.world, *size)])
    rehearsal.allocate(optimizer)
    goals = assign(net.anchors(images.shape[-2:]), targets, net.box_weights)
    pixels = normalize(images.to(run.device), net.image_mean, net.image_std, [target["shape"] for target in targets])
    for part, part_goals in assignment.pieces(args.accumulate, pixels, goals):
        with run.autocast():
            outputs = wrapped(part)
        sum(criterion(outputs, part_goals, positives=1).values()).backward()
    evaluate(net, [(images, targets)], run, COCOEvaluator(net.classes), assign, criterion, detect)
    run.say(f"preflight: {len(images)} pictures, padded to {images.shape[-2]} x {images.shape[-1]}")
    run.say(devices.memory_peaks(run, args.workers, images.nbytes))


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, args.gpus, args.precision, args.seed)
    out, batch = Path(args.model_dir), args.batch_size
    devices.check_batch(run, batch, args.accumulate)
    monitor = flags.choose_monitor(args.monitor, "AP", [*TAGS, *MEASURES, "mAP", "mAP_11point"])
    flags.need_weights(args.eval_only, args.resume or args.pretrained, "--pretrained")

    # data
    resume = (args.resume, args.overwrite, args.eval_only or args.preflight, "--pretrained")
    saved = None if args.check_data else checkpoints.open_run(out, *resume)
    names, trained = flags.names_in_data(args), saved and saved["classes"]
    *sets, faults = detection.load(args.dataset, args.data, trained=trained, seed=args.seed, **names)
    if args.check_data:
        return check.check_data(*sets, faults, args.workers, out / "data_faults.json", run.say)
    train_set, val_set = detection.settle(*sets, faults, args.bad_boxes, args.bad_images, args.workers, run.say)
    told = (val_set.annotation_file, val_set.source_ids, val_set.category_ids)
    new_evaluator = functools.partial(COCOEvaluator, val_set.classes, *told)
    run.say(f"ground truth scored as predictions: AP {score_truth(new_evaluator(), val_set)['AP']:.3f}")

    # network
    arguments = {"depth": args.depth, "anchors": args.anchors, "anchor_scale": args.anchor_scale}
    net = models.build("retinanet", len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (max(args.min_side), args.max_side)
    if not saved:
        published.begin_retinanet(net, args.pretrained, args.backbone_weights, run.is_main, run.say)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.pyramid_train(args.min_side, args.max_side, args.flip, args.colour)
    val_set.transform = transforms.pyramid_evaluate(args.min_side[-1], args.max_side)
    pin, collate = run.device.type == "cuda", loader.PadCollate(32)
    val_batches = loader.evaluation_loader(val_set, batch, args.workers, run.rank, run.world, pin, collate)

    # loss and detections
    matching = {"threshold": args.match_iou, "low": args.background_iou, "keep_best": args.match_best}
    assign = functools.partial(assignment.assign, **matching)
    class_weights = classes.class_weights(args.class_weights, net.classes)
    class_weights = class_weights and torch.tensor(class_weights[1:], device=run.device)  # no background here
    criterion = functools.partial(focal.loss, box_weight=args.box_loss_weight, class_weights=class_weights)
    limits = {"score_threshold": args.score_threshold, "iou_threshold": args.nms_iou, "most": args.most_detections}
    detect = functools.partial(suppress.from_pyramid, **limits)

    # optimiser
    frozen = net.stages()[: args.freeze_stages]
    train_mode(net, frozen, args.freeze_bn)
    rates = ({"backbone": args.backbone_lr or args.lr, "heads": args.lr}, args.weight_decay, args.norm_weight_decay)
    optimizer = optimizers.build(args.optimizer, net.parameter_groups(), *rates, args.momentum)
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before the averages: it gives all processes the same weights
    ema = checkpoints.Ema(net, args.ema)

    # schedule, in steps
    steps = functools.partial(loader.steps_in, count=len(train_set), batch_size=batch)
    total = min(steps(args.epochs), args.max_steps or steps(args.epochs))
    milestones = [steps(epoch) for epoch in args.milestones]
    shape = {"total": steps(args.t_max or args.epochs), "milestones": milestones, "gamma": args.gamma}
    name = "constant" if args.scheduler == "plateau" else args.scheduler
    lr_factor = functools.partial(schedule.lr_factor, name, warmup_steps=args.warmup_steps, **shape)
    plateau = schedule.Plateau(3 if args.scheduler == "plateau" else 0, args.gamma)
    scale = optimizers.batch_scale(batch, args.lr_batch_size, args.scale_lr, run.say)

    # resume
    progress = checkpoints.Progress()
    state = {"model": net, "optimizer": optimizer, "scaler": run.scaler, "ema": ema, "plateau": plateau}
    if saved:
        checkpoints.restore(saved, state, progress, args.eval_only)
        for line in checkpoints.changed(saved["flags"], vars(args)):
            run.say(f"  changed: {line}")
    about = {**models.describe(net), "min_side": args.min_side[-1], "max_side": args.max_side, "flags": vars(args)}
    run.say(devices.describe(run))
    if args.preflight:
        with devices.memory_advice(run, size, batch, args.accumulate):
            return preflight(net, wrapped, optimizer, train_set, size, collate, args, run, assign, criterion, detect)
    if args.eval_only:
        with ema.applied(net):
            metrics, coco, voc, _ = evaluate(net, val_batches, run, new_evaluator(), assign, criterion, detect)
        if run.is_main:
            voc.write_tables(out)
            coco.write(out / "detections.json")
        run.say(json.dumps(metrics, indent=1) + f"\n{out}: per_class.csv, confusion.csv and detections.json written")
        run.close()
        return metrics

    # train
    for warning in devices.check_machine(args.workers, 3 * size[0] * size[1] * batch // run.world):
        run.say(f"WARNING: {warning}")
    share = (run.rank, run.world, train_set.balance_weights() if args.balance_data else None, train_set.aspects())
    sampler = loader.StepSampler(len(train_set), batch, total, args.seed, progress.step, *share)
    batches = loader.train_loader(train_set, sampler, args.workers, pin, collate)
    logger = log.Logger(out, total, progress.step, run.is_main, args.debug_steps, vars(args), args.log_level)
    meter, metrics, logged = log.Meter(limit=20 if run.scaler.is_enabled() else 0), {}, progress.step
    recent = deque(maxlen=max(1, 500 // args.debug_steps))  # losses of 500 steps, as in the source
    with checkpoints.StopSignals() as stop, logger, devices.memory_advice(run, size, batch, args.accumulate):
        for images, targets in logger.steps(batches):
            step = progress.step + 1
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale * lr_factor(step - 1) * plateau.factor

            shapes = [target["shape"] for target in targets]
            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
            goals = assign(net.anchors(images.shape[-2:]), targets, net.box_weights)
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
                plateau.add(losses["loss"], step - logged, ends_epoch=epoch)
                recent.append(losses["loss"])
                values = {TAGS[name] + "/train": value for name, value in losses.items()}
                values["Running Loss/train"] = sum(recent) / len(recent)
                values["lr"] = optimizer.param_groups[-1]["lr"]
                logger.log(step, values, images=(step - logged) * batch)
                logged = step
            best = False
            if not stopping and ((epoch and epoch % args.validation_epochs == 0) or step == total):
                checkpoints.save(out, {**state, **about, "progress": progress})  # a kill in here loses no step
                with ema.applied(net), logger.paused():
                    run.share_statistics(net)
                    metrics, *seen = evaluate(net, val_batches, run, new_evaluator(), assign, criterion, detect, keep=4)
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
    if metrics:
        run.say(seen[1].table() + f"\nCOCO: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}")
    if progress.best is not None:
        run.say(f"best {monitor} {progress.best:.4g} at step {progress.best_step}")
    run.say(f"checkpoints, curves and pictures: tensorboard --logdir {out}")
    return metrics


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, log.NonFinite)
