"""Train CenterFusion: 3D boxes, velocities and attributes from one camera and radar, on nuScenes.

    python train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes-att --weights centernet.pth
    python train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes-att --resume
    python train_centerfusion.py --pointcloud --velocity --nuscenes-att --weights centerfusion_e60.pth --eval-only
    torchrun --nproc-per-node 8 train_centerfusion.py --data data/nuscenes --pointcloud --velocity --nuscenes-att

The flags are those of mrnabati/CenterFusion. The run folder gets last.pt, previous.pt and best.pt, metrics.jsonl,
submission.json and TensorBoard files. Published, not reproduced by us: NDS 0.453, mAP 0.332 on val.
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    from utils import interrupts

    interrupts.install()

import functools

import torch

import models
from data import checks, classes, loader, nuscenes
from data.nuscenes import collate, transforms
from evaluation.nuscenes import MEASURES, NuScenesEvaluator, score_ground_truth
from losses import assignment, centerfusion
from models import pretrained
from ops import decode3d, radar
from ops.images import normalize
from training import centerfusion_options, cli, distributed, memory, optim
from training.ema import Ema
from training.plan import Plan
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils.errors import UsageError
from utils.nuscenes import devkit_is_installed
from visualize import draw3d, pr_curves

USAGE = "python train_centerfusion.py --data FOLDER --pointcloud --velocity --nuscenes-att --model-dir RUN [flags]"
STRIDE = 4  # input pixels per cell of the output maps


def parse_args(argv):
    parser = cli.ArgumentParser("train_centerfusion.py", __doc__, USAGE)
    cli.add_nuscenes_arguments(parser)
    arg = parser.add_argument_group("image size, augmentation").add_argument
    arg("--input-size", type=int, nargs=2, default=[448, 800], metavar=("H", "W"), help="in pixels, multiples of 32")
    arg("--flip", type=cli.probability, default=0.5, help="probability of a horizontal flip")
    shift = "standard deviation of a random shift, as a share of the longer side; at most twice that"
    arg("--shift", type=cli.non_negative, default=0.1, help=shift)
    arg("--scale", type=cli.number(float, 0, 1), default=0.0, help="standard deviation, and maximum, of a random zoom")
    arg("--color-jitter", "--colour", type=cli.probability, default=0.5, help="probability of each color change")

    arg = parser.add_argument_group("radar").add_argument
    arg("--pointcloud", action="store_true", help="use radar; without it, the camera alone")
    arg("--radar-sweeps", type=cli.number(int, 1, 7), default=3, help="sweeps per radar, 1 to 6")
    height = "raise radar points by this height"
    arg("--pc-z-offset", type=cli.number(float, -10, 10), default=0.0, metavar="METERS", help=height)
    dims = "height, width and length of the pillar that a point becomes, in meters"
    arg("--pillar-dims", type=centerfusion_options.pillar_dims, default="1.5,0.2,0.2", metavar="H,W,L", help=dims)
    arg("--max-pc-dist", type=cli.non_negative, default=60.0, metavar="METERS", help="drop radar points farther away")
    frustum = "depth range in which a box looks for radar points, as in the published code or in the paper (2/3 of it)"
    arg("--frustum", choices=("published", "paper"), default="published", help=frustum)

    arg = parser.add_argument_group("network").add_argument
    names = {"choices": tuple(models.centerfusion.NETWORKS), "type": centerfusion_options.architecture}
    arg("--arch", default="centerfusion_dla34", help="network architecture", **names)
    start = "weights to start from: a file of a CenterFusion, of a CenterNet or of the backbone"
    arg("--weights", "--load-model", default="none", metavar="none|FILE", help=start)
    backbone = "start with these weights of the backbone alone; auto: ImageNet weights"
    arg("--backbone-weights", default="none", metavar="auto|none|FILE", help=backbone)
    arg("--freeze-backbone", action="store_true", help="train the heads only")
    arg("--velocity", action="store_true", help="train the velocity head")
    arg("--nuscenes-att", action="store_true", help="train the attribute head")
    arg("--run-dataset-eval", action="store_true", help="validate with nuscenes-devkit's official score too")
    arg("--flip-test", action="store_true", help="validate on the mean over each image and its mirror image")
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    published = {"batch_size": 32, "lr_batch_size": 32, "optimizer": "adam", "lr": 2.5e-4, "weight_decay": 0.0}
    parser.set_defaults(model_dir="runs/centerfusion", epochs=60, milestones="50", save_epochs="20,40,50", **published)
    centerfusion_options.add_arguments(parser)
    args = parser.parse(argv)
    if args.run_dataset_eval and args.monitor in MEASURES and not devkit_is_installed():
        raise UsageError(f"--monitor {args.monitor}: first do pip install -r requirements-nuscenes.txt")
    if any(side % 32 or not cli.MIN_SIDE <= side <= cli.MAX_SIDE for side in args.input_size):
        raise UsageError(f"--input-size {args.input_size}: height and width must be multiples of 32, as 448 800")
    return args


@torch.no_grad()
def evaluate(net, val_loader, evaluator=None, num_samples=0, *, run, loss_sums, flip_test):
    """Losses over the validation set and, with an evaluator, the official score: (metrics, evaluators, samples).

    Every process evaluates its share of the images, all get the same metrics. Batch norm statistics do not change.
    samples: the first `num_samples` images with objects, (image, target, detections) each, to be drawn.
    """
    run.set_eval_mode(net)
    heads, samples = [head for head in centerfusion.WEIGHTS if hasattr(net, head)], []
    counts = torch.zeros(len(centerfusion.COUNTS), dtype=torch.float64, device=run.device)
    sums, untrained = counts.repeat(len(heads), 1), net.untrained_heads()
    for images, targets in val_loader:
        matched = targets.to(run.device)
        pixels = normalize(images.to(run.device, non_blocking=True).flip(1), net.image_mean, net.image_std)  # BGR
        pixels = torch.cat([pixels, pixels.flip(-1)]) if flip_test else pixels
        with run.autocast():  # radar is associated with the network's own peaks, as in use
            outputs = net(pixels, matched.get("radar_map"), matched["calib"])
        own = {head: maps[: len(images)] for head, maps in outputs.items()}
        sums += torch.stack(list(loss_sums(own, matched).values()))
        counts += centerfusion.count(matched)
        outputs = decode3d.flip_averaged(outputs) if flip_test else own
        detections = decode3d.decode(outputs, targets, STRIDE, without=untrained)
        samples = (samples + [s for s in zip(images, targets, detections) if len(s[1]["labels"])])[:num_samples]
        if evaluator:
            evaluator.update(targets, detections)
    counts = run.mean(counts).clamp(min=1 / run.world_size)
    losses = dict(zip(heads, (run.mean(sums) / counts).sum(1).tolist()))
    official = evaluator.compute(run.gather, run.is_main) if evaluator else {}
    return {"loss": sum(losses.values()), **losses, **official}, [evaluator] * bool(evaluator), samples


def main(argv=None):
    args = parse_args(argv)
    run = distributed.init(args)
    trained = {"velocity": args.velocity, "nuscenes_att": args.nuscenes_att}  # weight 0: the head stays as it is
    heads = [name for name in centerfusion.WEIGHTS if trained.get(name, args.pointcloud or not name.endswith("_sec"))]
    monitor = cli.choose_monitor(args.monitor, "loss", ["loss", *heads, *MEASURES * args.run_dataset_eval])
    run_folder = RunFolder(args, run, monitor)
    for line in centerfusion_options.notes(args):
        run.print(line)

    # data
    sweeps = nuscenes.RadarOptions(args.radar_sweeps * args.pointcloud, args.max_pc_dist, args.pc_z_offset)
    with run.main_first():  # it parses the tables, the others use what it keeps
        options = {"radar": sweeps, "seed": args.seed, "print": run.print, **cli.nuscenes_options(args)}
        train_set, val_set, errors = nuscenes.load(args.data, **options)
    if args.check_data:
        run.close()
        return checks.check_data(train_set, val_set, errors, args.workers, run_folder.path) if run.is_main else {}
    train_set, val_set = checks.apply(train_set, val_set, errors, *cli.fault_policies(args), run.print)

    # network
    limits = {"threshold": args.frustum, "max_distance": args.max_pc_dist}
    net = models.build(args.arch, len(train_set.classes), radar=args.pointcloud, **limits)
    net.classes, size = train_set.classes, tuple(args.input_size)
    if not run_folder.checkpoint:
        pretrained.init_weights(net, **cli.start_options(args), download=run.is_main, print=run.print)
    net.to(run.device, memory_format=torch.channels_last)
    train_set.transform = transforms.centerfusion_train(size, args.flip, args.shift, args.scale, args.color_jitter)
    val_set.transform = transforms.centerfusion_eval(size)
    frozen = net.stages() if args.freeze_backbone else []
    optim.set_train_mode(net, frozen, args.freeze_bn)

    # loss
    class_weights = classes.class_weights(args.class_weights, net.classes, run.device)
    weights = {"weights": centerfusion.WEIGHTS | trained, "class_weights": class_weights}
    loss_sums = functools.partial(centerfusion.loss_sums, **weights)
    criterion = functools.partial(centerfusion.loss, **weights)
    maps = {"size": tuple(side // STRIDE for side in size), "stride": STRIDE}
    inputs_of = functools.partial(radar.network_inputs, radar=args.pointcloud, dims=args.pillar_dims, **maps)
    made = {"inputs_of": inputs_of, "assign": functools.partial(centerfusion.assign, **maps, **limits)}

    # optimizer, schedule, resume
    optimizer = optim.build(args, net.parameter_groups(), {"backbone": args.lr, "heads": args.lr})
    wrapped = run.wrap(net, args.sync_bn, args.compile)  # before Ema: all processes then have the same weights
    ema = Ema(net, args.ema)
    plan = Plan(args, len(train_set), run.print)
    progress = run_folder.restore(net, optimizer, ema, plan, models.describe(net, image_size=size))
    run.print(f"{models.summary(net)}, {size[0]} x {size[1]} pixels, {distributed.describe(run)}")

    # loaders
    process = loader.Process(run.rank, run.world_size, args.workers, run.pin_memory)
    train_collate = functools.partial(collate.train, **made)
    val_collate = functools.partial(collate.val, **made, flip_test=args.flip_test)
    val_loader = loader.eval_loader(val_set, args.batch_size, process, val_collate)
    validate = functools.partial(evaluate, net, run=run, loss_sums=loss_sums, flip_test=args.flip_test)
    tables = args.data, val_set.version, val_set.split
    new_evaluator = functools.partial(NuScenesEvaluator, *tables, args.pointcloud, print=run.print, draw=pr_curves.draw)
    if args.run_dataset_eval and not args.preflight and val_set.annotated:
        run.print(score_ground_truth(new_evaluator(merge_distance=0.5), val_set, run.gather, run.is_main))
    if args.eval_only:
        metrics, evaluators, _ = validate(val_loader, new_evaluator())
        return run_folder.report(metrics if val_set.annotated else {}, evaluators)
    balance = train_set.balance_weights() if args.balance_data else None
    steps = len(train_set), args.batch_size, plan.total_steps, args.seed, progress.step
    sampler = loader.StepSampler(*steps, process, balance)
    train_loader = loader.train_loader(train_set, sampler, process, train_collate)
    if args.preflight:
        largest = [dataset.most_objects(args.batch_size // run.world_size) for dataset in (train_set, val_set)]
        train_loader, val_loader = loader.one_batch_each((train_set, val_set), largest, (train_collate, val_collate))

    # train
    with run_folder.logger(plan, train_set) as logger, StopSignals(run) as stop, memory.advice(run, args, size):
        batches, due = logger.steps(train_loader), plan.start(progress)
        while True:
            if due.validate:  # after the step before, which may be that of an interrupted run
                with ema.applied(), logger.paused():
                    official = new_evaluator() if args.run_dataset_eval and not args.preflight else None
                    metrics, evaluators, samples = validate(val_loader, official, num_samples=4)
                    progress.record(metrics[monitor], cli.higher_is_better(monitor))
                optim.set_train_mode(net, frozen, args.freeze_bn)
                images = draw3d.truth_and_predictions(samples)
                logger.log_validation(progress.step, metrics, evaluators, images)
                run_folder.save()
            if due.stop or plan.is_stale(progress):
                break
            images, targets = next(batches)
            plan.set_lr(optimizer, progress.step)
            image_ids = [target["image_id"] for target in targets]
            images = normalize(images.to(run.device, non_blocking=True).flip(1), net.image_mean, net.image_std)  # BGR
            matched = targets.to(run.device)
            counts = run.mean(centerfusion.count(matched)).clamp(min=1 / run.world_size)  # over all processes
            parts = assignment.micro_batches(args.accumulate, images, matched)
            for part, part_matched in run.sync_last(wrapped, parts):
                with run.autocast():
                    outputs = wrapped(part, association=part_matched.get("radar"))
                losses = criterion(outputs, part_matched, counts)
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
