"""Train CenterFusion: 3D boxes, velocities and attributes from one camera and radar, on nuScenes.

    python train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes_att --load_model centernet.pth
    python train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes_att --resume
    torchrun --nproc-per-node 8 train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes_att

The flags are those of its source (mrnabati/CenterFusion). Published, not reproduced by us: val NDS 0.453, mAP 0.332.
"""

import argparse
import functools
import json
from pathlib import Path

import torch

import models
from data import DataError, check, classes, loader, nuscenes_radar, nuscenes_transforms
from evaluation import nuscenes
from losses import assignment, centerfusion
from models import WeightsError, published
from ops.geometry import apply_affine, project, seen
from ops.radar import inputs
from training import checkpoints, devices, flags, log, optimizers, pictures3d, rehearsal, schedule
from training.modes import train_mode

USAGE = "python train_centerfusion.py --data FOLDER --pointcloud --velocity --nuscenes_att --model-dir RUN [flags]"
STRIDE = 4  # input pixels a cell of the output maps


def parse_args(argv):
    parser = argparse.ArgumentParser("train_centerfusion.py", USAGE, __doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("task", nargs="?", choices=("ddd",), default="ddd", help="3D detection, the only task")
    parser.add_argument("--exp_id", default="", metavar="NAME", help="run folder runs/NAME, without --model-dir")
    arg = parser.add_argument_group("data").add_argument
    arg("--data", "--dataset-root", dest="data", default="data/nuscenes", help="folder with v1.0-*/, samples/, sweeps/")
    arg("--version", default="v1.0-trainval", help="folder of the tables")
    arg("--train_split", default="train", help="train, mini_train, ...")
    arg("--val_split", default="mini_val", help="val, mini_val, ...")
    arg("--cache-dir", default="", metavar="DIR", help="where the tables are kept as arrays; else beside them")
    arg("--skip-missing", action="store_true", help="leave out pictures and sweeps whose files are missing")
    arg("--input-size", type=int, nargs=2, default=[448, 800], metavar=("H", "W"), help="pixels, multiples of 32")
    arg("--shuffle_train", "--not_rand_crop", action="store_true", help="as ever: always shuffled, never cropped")
    arg("--flip", type=flags.chance, default=0.5, help="augmentation: chance of a mirror image")
    arg("--shift", type=flags.unsigned, default=0.1, help="standard deviation in longer sides, cut at twice that")
    arg("--scale", type=flags.number(float, 0, 1), default=0.0, help="standard deviation of the zoom, cut at that")
    arg("--colour", type=flags.chance, default=0.5, help="augmentation: chance of each colour change")
    arg("--bad-boxes", choices=("drop", "error"), default="drop", help="boxes without size, place or rotation")

    arg = parser.add_argument_group("radar").add_argument
    arg("--pointcloud", action="store_true", help="use radar; without it the camera alone")
    arg("--radar_sweeps", type=flags.number(int, 1, 7), default=3, help="sweeps of each radar, 1 to 6")
    arg("--pc_z_offset", type=float, default=0.0, help="metres that radar points are moved up by")
    arg("--pillar_dims", type=flags.numbers, default="1.5,0.2,0.2", help="height, width, length of a pillar in metres")
    arg("--max_pc_dist", type=float, default=60.0, help="radar points farther away than this are dropped")
    arg("--frustum", choices=("published", "paper"), default="published", help="reach of a box; paper: half its extent")

    arg = parser.add_argument_group("network").add_argument
    arg("--arch", choices=("dla34", "resnet18", "resnet34"), default="dla34", help="of the body")
    arg("--load_model", default="", metavar="FILE", help="start from a CenterFusion, CenterNet or backbone file")
    arg("--freeze_backbone", action="store_true", help="train the heads alone")
    arg("--velocity", action="store_true", help="train the velocity head")
    arg("--nuscenes_att", action="store_true", help="train the attribute head")

    arg = parser.add_argument_group("learning rate and validation").add_argument
    arg("--learning-rate", "--lr", dest="lr", type=flags.unsigned, default=2.5e-4, help="at --batch-size")
    arg("--scheduler", choices=schedule.NAMES, default="multi-step", help="learning rate over time")
    arg("--save_point", type=flags.numbers, default="20,40,50", help="epochs whose checkpoint is kept")
    arg("--run_dataset_eval", action="store_true", help="score by nuscenes-devkit too")
    arg("--flip_test", action="store_true", help="validate on the mean over a picture and its mirror image")
    flags.add_run_arguments(parser)
    flags.add_data_arguments(parser)
    source = {"batch_size": 32, "epochs": 60, "optimizer": "adam", "weight_decay": 0.0, "workers": 4}
    parser.set_defaults(model_dir="", milestones="50", lr_batch_size=32, **source)
    return flags.parse(parser, argv)


@torch.no_grad()
def evaluate(net, batches, run, args, inputs_of, assign, sums_of, evaluator=None, out=None, keep=0):
    """Losses and, with an evaluator, OUT/submission.json and its score -> (metrics, [(image, target, found)] to see).

    Every process takes its share of the pictures, all get the same metrics. keep: pictures with objects to give back.
    """
    net.eval()
    totals, kept = torch.zeros(len(centerfusion.COUNTS), dtype=torch.float64), []
    sums = {head: torch.zeros_like(totals) for head in centerfusion.WEIGHTS if hasattr(net, head)}
    for images, targets in batches:
        with run.autocast():
            outputs = net(*inputs_of(images, targets))  # radar is handed to the network's own peaks, as in use
        goals = assign(targets, run.device)
        for head, terms in sums_of(outputs, goals).items():
            sums[head] += terms.double().cpu()
        totals += centerfusion.count(goals).double().cpu()
        if args.flip_test:
            turned = [nuscenes_transforms.mirrored(target, images.shape[-1]) for target in targets]
            with run.autocast():
                outputs = nuscenes.flip_averaged(outputs, net(*inputs_of(images.flip(-1), turned)))
        found = nuscenes.decode(outputs, targets, STRIDE, without=nuscenes.untrained(net))
        kept += [sample for sample in zip(images, targets, found) if len(sample[1]["labels"])][: keep - len(kept)]
        if evaluator is not None:
            evaluator.update(targets, found)
    totals = run.mean(totals).clamp(min=1 / run.world)
    losses = {head: float((run.mean(terms) / totals).sum()) for head, terms in sums.items()}
    official = evaluator.compute(run.gather, run.is_main) if evaluator else {}
    if evaluator and run.is_main:
        evaluator.write(out / "submission.json")
    return {"loss": sum(losses.values()), **losses, **official}, kept


def log_pictures(logger, step, kept, surest=0.3):
    """Truth over predictions on the camera's picture, with radar, and both from above, for TensorBoard."""
    for number, (image, target, found) in enumerate(kept):
        both = target, {name: value[found["scores"] > surest] for name, value in found.items()}
        points, distances = project(target["radar"][:, :3], target["calib"])
        points, views, solids = apply_affine(points, target["affine"]), [], []
        for boxes in both:
            solid, pixels, depth = seen(boxes, target["calib"], target["affine"])
            views.append(pictures3d.on_camera(image, pixels, depth, boxes["labels"], points, distances))
            solids.append({**boxes, "corners": solid})
        logger.images(f"Truth above, predictions below/{number}", torch.cat(views, dim=1), step)
        logger.images(f"From above, truth green/{number}", pictures3d.from_above(*solids, target["radar"]), step)


def preflight(net, wrapped, optimizer, train_set, args, run, inputs_of, assign, sums_of):
    """A batch of the fullest key frames forward, backward and through evaluation, then the peaks of memory."""
    images, targets = loader.collate([train_set[i] for i in train_set.fullest(args.batch_size // run.world)])
    rehearsal.allocate(optimizer)
    pixels, radar_map, calib = inputs_of(images, targets)
    goals = assign(targets, run.device, radar_map, calib)
    for part, part_goals in assignment.pieces(args.accumulate, pixels, goals):
        with run.autocast():
            outputs = wrapped(part, association=part_goals.get("radar"))
        torch.stack([terms.sum() for terms in sums_of(outputs, part_goals).values()]).sum().backward()
    evaluate(net, [(images, targets)], run, args, inputs_of, assign, sums_of)
    run.say(devices.memory_peaks(run, args.workers, images.nbytes))
    return {}


def main(argv=None):
    args = parse_args(argv)
    run = devices.setup(args.device, args.gpus, args.precision, args.seed)
    out, batch = Path(args.model_dir or f"runs/{args.exp_id or 'centerfusion'}"), args.batch_size
    devices.check_batch(run, batch, args.accumulate)
    if any(side <= 0 or side % 32 for side in args.input_size):
        raise flags.UsageError(f"--input-size {args.input_size}: height and width must be multiples of 32, as 448 800")
    if len(args.pillar_dims) != 3 or not all(0 < side < float("inf") for side in args.pillar_dims):
        raise flags.UsageError(f"--pillar_dims {args.pillar_dims}: must be three numbers above 0, as 1.5,0.2,0.2")
    if args.run_dataset_eval and args.monitor in nuscenes.MEASURES and not nuscenes.has_devkit():
        raise flags.UsageError(f"--monitor {args.monitor}: first do pip install -r requirements-nuscenes.txt")
    asked = {"velocity": args.velocity, "nuscenes_att": args.nuscenes_att}  # 0: the head stays as it is
    heads = [name for name in centerfusion.WEIGHTS if asked.get(name, args.pointcloud or not name.endswith("_sec"))]
    flags.need_weights(args.eval_only, args.resume or args.load_model, "--load_model")
    monitor = flags.choose_monitor(args.monitor, "loss", ["loss", *heads, *nuscenes.MEASURES * args.run_dataset_eval])

    # data
    resume = (args.resume, args.overwrite, args.eval_only or args.preflight, "--load_model")
    saved = None if args.check_data else checkpoints.open_run(out, *resume)
    tables = {"skip_missing": args.skip_missing or args.check_data, "cache": args.cache_dir or None, "say": run.say}
    tables |= {"sweeps": args.radar_sweeps * args.pointcloud, "z_offset": args.pc_z_offset, "seed": args.seed}
    read = functools.partial(nuscenes_radar.load, args.data, args.version, max_distance=args.max_pc_dist, **tables)
    train_set, val_set = read(args.train_split), read(args.val_split)
    faults = check.each_once(train_set.faults() + val_set.faults())
    if args.check_data:
        return check.check_data(train_set, val_set, faults, args.workers, out / "data_faults.json", run.say)
    check.settle([fault for fault in faults if fault.kind == "box"], args.bad_boxes, "skip", run.say)
    train_set, val_set = check.usable(train_set, val_set, args.bad_images, args.workers, run.say)
    run.say(f"train: {train_set.summary()}\nval: {val_set.summary()}")

    # network
    limits = {"threshold": args.frustum, "max_distance": args.max_pc_dist}
    net = models.build(f"centerfusion_{args.arch}", len(train_set.classes), radar=args.pointcloud, **limits)
    net.classes, size, pin = list(train_set.classes), tuple(args.input_size), run.device.type == "cuda"
    if not saved:
        published.begin_centerfusion(net, args.load_model, run.say)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = nuscenes_transforms.train(size, args.flip, args.shift, args.scale, args.colour)
    val_set.transform = nuscenes_transforms.evaluate(size)
    val_batches = loader.evaluation_loader(val_set, batch, args.workers, run.rank, run.world, pin)

    # loss
    assign = functools.partial(centerfusion.assign, size=[side // STRIDE for side in size], stride=STRIDE, **limits)
    class_weights = classes.class_weights(args.class_weights, net.classes)
    class_weights = class_weights and torch.tensor(class_weights[1:], device=run.device)
    weights = {"weights": centerfusion.WEIGHTS | asked, "class_weights": class_weights}
    criterion = functools.partial(centerfusion.loss, **weights)
    how = {"mean": net.image_mean, "std": net.image_std, "device": run.device, "dims": args.pillar_dims}
    inputs_of = functools.partial(inputs, radar=args.pointcloud, stride=STRIDE, **how)
    steps_of = (inputs_of, assign, functools.partial(centerfusion.sums, **weights))  # what the evaluation adds up

    # optimiser
    frozen = net.stages() if args.freeze_backbone else []
    train_mode(net, frozen, args.freeze_bn)
    rates = ({"backbone": args.lr, "heads": args.lr}, args.weight_decay, args.norm_weight_decay)
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
    about = {**models.describe(net), "image_size": size, "flags": vars(args)}
    run.say(f"{net.name}, {size[0]} x {size[1]} pixels, {devices.describe(run)}")
    split = (args.data, args.version, args.val_split, ("camera", "radar") if args.pointcloud else ("camera",))
    scorer = functools.partial(nuscenes.NuScenesEvaluator, *split, say=run.say)
    if args.preflight:
        with devices.memory_advice(run, size, batch, args.accumulate):
            return preflight(net, wrapped, optimizer, train_set, args, run, *steps_of)
    if args.run_dataset_eval and run.is_main:
        run.say(nuscenes.score_truth(scorer(merge=0.5), map(val_set.annotation, range(len(val_set)))))
    if args.eval_only:
        with ema.applied(net):
            metrics, _ = evaluate(net, val_batches, run, args, *steps_of, scorer(), out)
        run.say(json.dumps(metrics, indent=1) + f"\n{out}/submission.json" + " and per_class.csv" * ("mAP" in metrics))
        run.close()
        return metrics

    # train
    for warning in devices.check_machine(args.workers, 3 * size[0] * size[1] * batch // run.world):
        run.say(f"WARNING: {warning}")
    share = (run.rank, run.world, train_set.balance_weights() if args.balance_data else None)
    sampler = loader.StepSampler(len(train_set), batch, total, args.seed, progress.step, *share)
    batches = loader.train_loader(train_set, sampler, args.workers, pin)
    logger = log.Logger(out, total, progress.step, run.is_main, args.debug_steps, vars(args), args.log_level)
    meter, metrics, logged = log.Meter(limit=20 if run.scaler.is_enabled() else 0), {}, progress.step
    with checkpoints.StopSignals() as stop, logger, devices.memory_advice(run, size, batch, args.accumulate):
        for images, targets in logger.steps(batches):
            step = progress.step + 1
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale * lr_factor(step - 1)

            images, radar_map, calib = inputs_of(images, targets)
            goals = assign(targets, run.device, radar_map, calib)
            counts = run.mean(centerfusion.count(goals)).clamp(min=1 / run.world)  # at least one in all
            for part, part_goals in assignment.pieces(args.accumulate, images, goals):
                with run.autocast():
                    outputs = wrapped(part, association=part_goals.get("radar"))
                losses = criterion(outputs, part_goals, counts)
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
                    official = (scorer(), out) if args.run_dataset_eval else ()
                    metrics, kept = evaluate(net, val_batches, run, args, *steps_of, *official, keep=4)
                train_mode(net, frozen, args.freeze_bn)
                logger.log(step, {f"val/{name}": value for name, value in metrics.items()})
                log_pictures(logger, step, kept)
                best = progress.improved(metrics[monitor], lower_is_better=monitor not in ("NDS", "mAP"))
            if saving:
                copies = schedule.copies(epoch, step, args.save_every_epochs, args.save_every_steps)
                copies |= {"epoch_copy": epoch} if epoch in args.save_point else {}
                checkpoints.save(out, {**state, **about, "progress": progress}, best=best, keep=args.keep, **copies)
            if stopping or (args.patience and progress.stale >= args.patience):
                break
    run.close()
    if stop.requested:
        run.say(f"stopped and saved at step {progress.step}; go on with --resume auto")
        raise SystemExit(stop.exit_code)
    if progress.best is not None:
        run.say(f"best {monitor} {progress.best:.4g} at step {progress.best_step}")
    run.say(f"checkpoints, curves and pictures: tensorboard --logdir {out}")
    return metrics


if __name__ == "__main__":
    flags.run(main, DataError, WeightsError, log.NonFinite)
