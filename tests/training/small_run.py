"""A run of a few steps on the CPU, for the tests of checkpoints and run folders."""

from pathlib import Path

import torch
from torch import nn

from training import cli, distributed, run_folder
from training.checkpoint import Progress
from training.ema import Ema


def flags(words=""):
    """The flags that every training script has, from words of a command line."""
    parser = cli.ArgumentParser("train.py", "")
    parser.add_argument("--weights", default="none")
    cli.add_data_arguments(parser)
    cli.add_run_arguments(parser)
    return parser.parse(words.split())


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)
    )
    return net.to(memory_format=torch.channels_last)


def parts(optimizer="sgd", ema=0.9, precision="fp32"):
    """(Run, the parts of a checkpoint, Progress) before the first step."""
    run = distributed.init_device("cpu", precision=precision)
    net = network()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1, "base_lr": 0.1, "name": "base_net"},
        {"params": [*net[1].parameters(), *net[5].parameters()], "lr": 0.01, "base_lr": 0.01, "name": "heads"},
    ]
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.1)
    return run, {"model": net, "optimizer": optimizer, "scaler": run.scaler, "ema": Ema(net, ema)}, Progress()


def train(folder, run, parts, progress, until):
    """Train to step `until`, save."""
    net, optimizer, scaler = parts["model"], parts["optimizer"], parts["scaler"]
    while progress.step < until:
        step = progress.step + 1
        run.seed_step(step)
        images = torch.rand(2, 3, 6, 6)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] / step
        with run.autocast():
            loss = net(images).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        parts["ema"].update()
        progress.step = step
        progress.record(1 / 3 + step / 7, higher_is_better=True)
    save(folder, parts, progress)


def save(folder, parts, progress, copies=(), keep=0):
    contents = {**parts, **vars(progress), "flags": {"lr": 0.1, "out": Path("runs/x")}}
    run_folder.save(folder, contents, copies, keep)


def make(folder):
    """A run of 4 steps saved at 2 and 4; returns its folder."""
    run, state, progress = parts()
    train(folder, run, state, progress, 2)
    train(folder, run, state, progress, 4)
    return folder


def truncate(path, share=0.6):
    """Cut a file to a share of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
