"""Train Mask R-CNN: boxes and masks of single objects, on PennFudanPed or COCO, fine-tuned from published weights.

    python train_maskrcnn.py --data data/PennFudanPed --model-dir runs/people
    python train_maskrcnn.py --data data/PennFudanPed --arch maskrcnn_resnet18 --weights runs/backbone/backbone.pt
    python train_maskrcnn.py --dataset coco --data data/coco --arch maskrcnn_resnet50_v2 --model-dir runs/coco
    python train_maskrcnn.py --data data/PennFudanPed --model-dir runs/people --resume auto --eval-only
    torchrun --nproc-per-node 8 train_maskrcnn.py --dataset coco --data data/coco --batch-size 16 --lr 0.02

The defaults are those of torchvision's fine-tuning tutorial. The run folder gets what train_retinanet.py's gets; from
PennFudanPed also held_out.txt, the pictures that are validated on; --save-every-epochs 1 keeps each epoch's checkpoint.
Published COCO box and mask AP of maskrcnn_resnet50, not reproduced by us: 37.9 and 34.6.
"""

import argparse
import functools
import json
from pathlib import Path

import torch

import models
from data import DataError, check, classes, detection, loader, pennfudan, transforms
from evaluation import score_truth
from evaluation.coco import MASK_MEASURES, MEASURES, COCOEvaluator
from losses import maskrcnn
from models import WeightsError, published
from ops import masks
from ops.boxes import in_file_pixels
from ops.images import normalize
from training import checkpoints, devices, flags, log, optimizers, pictures, rehearsal, schedule
from training.modes import train_mode

USAGE = "python train_maskrcnn.py --data FOLDER --model-dir RUN [flags]"
HELD_OUT = "held_out.txt"


def parse_args(argv):
    parser = argparse.ArgumentParser("train_maskrcnn.py", USAGE, __doc__, formatter_class=flags.HelpFormatter)
    arg = parser.add_argument_group("data").add_argument
    arg("--dataset", "--dataset-type", choices=("pennfudan", "coco"), default="pennfudan", help="layout of the data")
    arg("--data", "--coco-path", dest="data", nargs="+", default=["data/PennFudanPed"], help="folders, joined")
    arg("--val-share", type=flags.number(float, 0, 1), default=0.2, help="pennfudan: part of the pictures held out")
    arg("--split-seed", type=flags.number(int, 0), default=0, help="pennfudan: of the choice of them")
    arg("--subset", type=flags.number(int, 0), default=0, help="train on so many pictures, drawn by --seed; 0: all")
    sides = "shortest side in pixels; of several, training draws one for each picture and validation takes the last"
    arg("--min-side", type=flags.number(int, 1), nargs="+", default=[800], help=sides)
    arg("--max-side", type=flags.number(int, 1), default=1333, help="bound on the longest side")
    arg("--flip", type=flags.chance, default=0.5, help="augmentation: chance of a mirror image")
    arg("--colour", type=flags.chance, default=0.0, help="augmentation: chance of each colour change")

    arg = parser.add_argument_group("network").add_argument
    arg("--arch", choices=tuple(models.maskrcnn.NETWORKS), default="maskrcnn_resnet50", help="network")
    arg("--proposals", type=flags.number(int, 0), default=0, help="regions a picture in validation; 0: the network's")
    start = "start from a Mask R-CNN or a ResNet, ours or torchvision's; auto: its COCO, else its ImageNet weights"
    arg("--regions", type=flags.number(int, 1), default=512, help="regions a picture to learn from; 128: faster")
    arg("--weights", "--pretrained", default="auto", metavar="auto|coco|imagenet|none|FILE", help=start)
    arg("--freeze-stages", type=int, choices=range(6), default=0, help="stages of the ResNet to keep as they are")

    arg = parser.add_argument_group("learning rate").add_argument
    arg("--learning-rate", "--lr", dest="lr", type=flags.unsigned, default=0.005, help="of all but the backbone")
    arg("--backbone-lr", type=flags.unsigned, help="of the backbone; as --lr if not given")
    arg("--scheduler", choices=schedule.NAMES, default="multi-step", help="learning rate over time")
    flags.add_detection_arguments(parser, masks=True)
    flags.add_data_arguments(parser)
    flags.add_run_arguments(parser)
    source = {"batch_size": 2, "lr_batch_size": 2, "epochs": 10, "milestones": "3,6,9"}
    parser.set_defaults(model_dir="runs/maskrcnn", freeze_bn=True, **source)
    return flags.parse(parser, argv)


def load(args, saved, run, out):
    """(train, val, faults); of PennFudanPed the held-out pictures stay those that RUN/held_out.txt names."""
    names, trained = flags.names_in_data(args), saved and saved["classes"]
    if args.dataset == "coco":
        return detection.load("coco", args.data, trained=trained, seed=args.seed, masks=True, **names)
    kept = out / HELD_OUT
    held_out = kept.read_text(encoding="utf-8").splitlines() if saved and kept.is_file() else None
    share = {"share": args.val_share, "split_seed": args.split_seed, "held_out": held_out}
    sets = detection.load_pennfudan(args.data, trained=trained, seed=args.seed, **share)
    if run.is_main and held_out is None and not (args.check_data or args.eval_only or args.preflight):
        out.mkdir(parents=True, exist_ok=True)
        kept.write_text("\n".join(pennfudan.names(sets[1])) + "\n", encoding="utf-8")
    return sets


@torch.no_grad()
def evaluate(net, val_set, batches, run, evaluator, seed, keep=0):
    """Losses, box AP and mask AP -> (metrics, [(image, target, found)] to look at, in pixels of the batch's pictures).

    Batch norm statistics stay untouched. Every process takes its share of the pictures, all get the same metrics.
    keep: the first so many pictures with objects come back.
    """
    net.eval()
    sums = dict.fromkeys(maskrcnn.NORMALISERS, torch.zeros((), dtype=torch.float64))
    totals, kept = torch.zeros(len(maskrcnn.COUNTS), dtype=torch.float64), []
    for images, targets in batches:
        shapes, sizes = ([tuple(target[name]) for target in targets] for name in ("shape", "size"))
        pixels = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
        goals = maskrcnn.Goals(targets, seed)
        with run.autocast():
            features, proposals, outputs = net.propose(pixels, shapes)
            found = net.detect(features, proposals, shapes)
            outputs |= net.answer(features, shapes, *goals.sample(proposals))
        for name, value in maskrcnn.sums(outputs, goals).items():
            sums[name] = sums[name] + value.double().cpu()
        totals += maskrcnn.count(outputs, goals).double().cpu()
        truth = [val_set.annotation(target["image_id"]) for target in targets]  # masks as they are in the files
        evaluator.update(truth, masks.pasted(in_file_pixels(found, targets), sizes))
        if keep > len(kept):
            samples = zip(images, targets, masks.pasted(found, [images.shape[-2:]] * len(images)))
            kept += [sample for sample in samples if len(sample[1]["labels"])][: keep - len(kept)]
    totals = run.mean(totals).clamp(min=1 / run.world)
    losses = {name: float(run.mean(sums[name]) / totals[maskrcnn.NORMALISERS[name]]) for name in sums}
    return {"loss": sum(losses.values()), **losses, **evaluator.compute(run.gather)}, kept


def log_pictures(logger, step, kept, names):
    for number, (image, target, found) in enumerate(kept):
        height, width = target["shape"]
        found = {**found, "masks": found["masks"][:, :height, :width]}
        beside = pictures.beside_truth(image[:, :height, :width], target, found, names)
        logger.images(f"Truth left, predictions right/{number}", beside, step)


def preflight(net, wrapped, optimizer, train_set, size, collate, args, run):
    """The largest padded batch forward, backward and through evaluation, then the peaks of memory."""
    train_set.transform = transforms.pyramid_evaluate(*size)
    images, targets = collate([train_set[i] for i in rehearsal.largest(train_set, args.batch_size // run.world, *size)])
    rehearsal.allocate(optimizer)
    shapes = [tuple(target["shape"]) for target in targets]
    pixels = normalize(images.to(run.device), net.image_mean, net.image_std, shapes)
    for part in torch.arange(len(images)).chunk(args.accumulate):
        goals = maskrcnn.Goals([targets[i] for i in part], (args.seed, 0), regions=args.regions)
        with run.autocast():
            outputs = wrapped(pixels[part], [shapes[i] for i in part], goals.sample)
        sum(maskrcnn.sums(outputs, goals).values()).backward()
    evaluate(net, train_set, [(images, targets)], run, COCOEvaluator(net.classes, masks=True), (args.seed, 0))
    run.say(f"preflight: {len(images)} pictures, padded to {images.shape[-2]} x {images.shape[-1]}")
    run.say(devices.memory_peaks(run, args.workers, images.nbytes))
    return {}


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, args.gpus, args.precision, args.seed)
    if len(run.gpus) > 1:
        raise flags.UsageError("--gpus: Mask R-CNN takes one GPU a process; run torchrun --nproc-per-node instead")
    out, batch = Path(args.model_dir), args.batch_size
    devices.check_batch(run, batch, args.accumulate)
    monitor = flags.choose_monitor(args.monitor, "mask AP", ["loss", *maskrcnn.NORMALISERS, *MEASURES, *MASK_MEASURES])
    flags.need_weights(args.eval_only, args.resume or args.weights not in ("auto", "imagenet", "none"), "--weights")

    # data
    resume = (args.resume, args.overwrite, args.eval_only or args.preflight, "--weights")
    saved = None if args.check_data else checkpoints.open_run(out, *resume)
    *sets, faults = load(args, saved, run, out)
    if args.check_data:
        return check.check_data(*sets, faults, args.workers, out / "data_faults.json", run.say)
    train_set, val_set = detection.settle(*sets, faults, args.bad_boxes, args.bad_images, args.workers, run.say)
    if args.subset:
        train_set = train_set.subset(args.subset, args.seed)
    told = (val_set.annotation_file, val_set.source_ids, val_set.category_ids)
    new_evaluator = functools.partial(COCOEvaluator, val_set.classes, *told, masks=True)
    truth = score_truth(new_evaluator(), val_set)
    run.say(f"ground truth scored as predictions: box AP {truth['AP']:.3f}, mask AP {truth['mask AP']:.3f}")

    # network
    arguments = {"proposals": args.proposals} if args.proposals else {}
    net = models.build(args.arch, len(train_set.classes), **arguments)
    net.classes, size = train_set.classes, (max(args.min_side), args.max_side)
    if not saved:
        published.begin_maskrcnn(net, args.weights, run.say, run.is_main)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.pyramid_train(args.min_side, args.max_side, args.flip, args.colour)
    val_set.transform = transforms.pyramid_evaluate(args.min_side[-1], args.max_side)
    pin, collate = run.device.type == "cuda", loader.PadCollate(32)
    val_batches = loader.evaluation_loader(val_set, batch, args.workers, run.rank, run.world, pin, collate)

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes)
    class_weights = class_weights and torch.tensor(class_weights, device=run.device)
    criterion = functools.partial(maskrcnn.loss, class_weights=class_weights)

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
    lr_factor = functools.partial(schedule.lr_factor, args.scheduler, warmup_steps=args.warmup_steps, **shape)
    scale = optimizers.batch_scale(batch, args.lr_batch_size, args.scale_lr, run.say)

    # resume
    progress = checkpoints.Progress()
    state = {"model": net, "optimizer": optimizer, "scaler": run.scaler, "ema": ema}
    if saved:
        checkpoints.restore(saved, state, progress, args.eval_only)
        for line in checkpoints.changed(saved["flags"], vars(args)):
            run.say(f"  changed: {line}")
    about = {**models.describe(net), "min_side": args.min_side[-1], "max_side": args.max_side, "flags": vars(args)}
    run.say(f"{net.name}, {devices.describe(run)}")
    if args.preflight:
        with devices.memory_advice(run, size, batch, args.accumulate):
            return preflight(net, wrapped, optimizer, train_set, size, collate, args, run)
    if args.eval_only:
        with ema.applied(net):
            coco = new_evaluator()
            metrics, _ = evaluate(net, val_set, val_batches, run, coco, (args.seed, 0))
        if run.is_main:
            coco.write(out / "detections.json")
        run.say(json.dumps(metrics, indent=1) + f"\n{out}: detections.json, detections_masks.json written")
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
    with checkpoints.StopSignals() as stop, logger, devices.memory_advice(run, size, batch, args.accumulate):
        for images, targets in logger.steps(batches):
            step = progress.step + 1
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale * lr_factor(step - 1)

            shapes = [tuple(target["shape"]) for target in targets]
            images = normalize(images.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
            for part in torch.arange(len(images)).chunk(args.accumulate):  # each with normalisers of its own
                goals = maskrcnn.Goals([targets[i] for i in part], (args.seed, step), regions=args.regions)
                with run.autocast():
                    outputs = wrapped(images[part], [shapes[i] for i in part], goals.sample)
                counts = run.mean(maskrcnn.count(outputs, goals)).clamp(min=1 / run.world)  # at least one in all
                losses = criterion(outputs, goals, counts)
                losses = {name: value * len(part) / len(images) for name, value in losses.items()}
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
                values = {f"train/{name}": value for name, value in losses.items()}
                values["lr"] = optimizer.param_groups[-1]["lr"]
                logger.log(step, values, images=(step - logged) * batch)
                logged = step
            best = False
            if not stopping and ((epoch and epoch % args.validation_epochs == 0) or step == total):
                checkpoints.save(out, {**state, **about, "progress": progress})  # a kill in here loses no step
                with ema.applied(net), logger.paused():
                    run.share_statistics(net)
                    coco = new_evaluator()
                    metrics, kept = evaluate(net, val_set, val_batches, run, coco, (args.seed, 0), keep=4)
                    if logger.enabled:
                        coco.write(out / "detections.json")
                train_mode(net, frozen, args.freeze_bn)
                logger.log(step, {f"val/{name}": value for name, value in metrics.items()})
                log_pictures(logger, step, kept, net.classes)
                best = progress.improved(metrics[monitor], lower_is_better="AP" not in monitor and "AR" not in monitor)
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
        run.say(
            f"box AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}; "
            f"mask AP {metrics['mask AP']:.3f}, AP50 {metrics['mask AP50']:.3f}"
        )
    if progress.best is not None:
        run.say(f"best {monitor} {progress.best:.4g} at step {progress.best_step}")
    run.say(f"checkpoints, curves and pictures: tensorboard --logdir {out}")
    return metrics


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, log.NonFinite)
