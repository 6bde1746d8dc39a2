"""From a checkpoint back into the objects of a run, exactly or with a line that says what does not fit."""

import copy
from dataclasses import asdict

import torch
from torch import nn

from training import devices
from training.flags import UsageError

SWITCHES = {"scaler": "--precision", "ema": "--ema", "plateau": "--scheduler"}  # parts that a flag turns on
# arguments of a network -> the flag that sets each, where it has another name
FLAGS = {"width_mult": "--width-mult or --mb2-width-mult", "radar": "--pointcloud", "threshold": "--frustum"}
FLAGS |= {"max_distance": "--max_pc_dist"}
FREE = {"proposals"}  # arguments that say how much work a network does, not what its weights mean


def restore(saved, state, progress, evaluate_only=False):
    """Load the parts of `saved` into the objects of `state` (model, optimizer, scaler, ema) and `progress`, in place.

    Tensors and lr come from the checkpoint; the optimizer's other settings stay those it was built with, so flags
    mean what they say also after a resume. evaluate_only: the weights alone, and as the run judged them: where the
    file has averages the network takes these, whatever the flags say. UsageError names a part that is missing or does
    not fit.
    """
    file, net = saved["file"], devices.unwrap(state["model"])
    needed = ("model", "ema") if evaluate_only else state
    missing = [name for name in (*needed, *asdict(progress)) if name not in saved]
    if missing:
        raise UsageError(
            f"{file}: no {', '.join(missing)} in it, so the run cannot be continued exactly; start a new run"
        )
    _check_arguments(file, saved.get("arguments", {}), getattr(net, "arguments", {}))
    if evaluate_only:
        averaged = bool(saved["ema"])
        _load_network(file, "ema" if averaged else "model", net, saved["ema"]["model"] if averaged else saved["model"])
        state["ema"].load_state_dict({"updates": 0, "model": net.state_dict()})  # they are applied for an evaluation
    for name, part in {} if evaluate_only else state.items():
        _load_part(file, name, part, saved[name])
    progress.load_state_dict(saved)
    if devices.is_main():
        rates = [part.param_groups[0]["lr"] for part in state.values() if isinstance(part, torch.optim.Optimizer)]
        lr = f" lr {rates[0]:.1e}" if rates else ""
        lr = (" averaged weights" if saved["ema"] else " weights") if evaluate_only else lr
        print(f"resumed epoch {progress.epoch} step {progress.step}{lr} from {file}", flush=True)


def first_line(fault):
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def _check_arguments(file, saved, own):
    """UsageError where the network was built with other arguments than the saved one: the weights may fit all the
    same and mean something else."""
    for name in sorted((saved.keys() & own.keys()) - FREE):
        if saved[name] != own[name]:
            raise UsageError(
                f"{file}: its network has {name} {saved[name]}, this run's {own[name]}; "
                f"give {FLAGS.get(name, '--' + name.replace('_', '-'))} as in that run"
            )


def _load_part(file, name, part, state):
    on = bool(part.state_dict())
    if on and not state:
        raise UsageError(f"{file}: {name} was off in that run and is on now; resume with its {SWITCHES[name]}")
    if name == "ema" and state and not on:
        raise UsageError(f"{file}: ema was on in that run and is off now; resume with its --ema")
    if isinstance(part, nn.Module):
        _load_network(file, name, devices.unwrap(part), state)
    elif isinstance(part, torch.optim.Optimizer):
        _load_optimizer(file, part, state)
    else:
        try:
            part.load_state_dict(state)
        except (KeyError, RuntimeError) as fault:
            raise UsageError(f"{file}: {name} does not fit: {first_line(fault)}; use the flags of that run") from None


def _load_network(file, name, net, tensors):
    own = net.state_dict()
    faults = [f"{key} is missing" for key in own if key not in tensors]
    faults += [f"{key} is not in this network" for key in tensors if key not in own]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, here {tuple(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if faults:
        raise UsageError(
            f"{file}: {name} does not fit this network, {len(faults)} of {len(own)} tensors: {faults[0]}; "
            "resume with the network and classes of that run"
        )
    net.load_state_dict(tensors)


def _load_optimizer(file, optimizer, state):
    own, kind = optimizer.state_dict()["param_groups"], type(optimizer).__name__
    if state.get("class", kind) != kind:
        raise UsageError(
            f"{file}: its optimizer is {state['class']}, this run's {kind}; resume with the optimizer of that run"
        )
    here, there = (
        [(group.get("name"), len(group["params"])) for group in groups] for groups in (own, state["param_groups"])
    )
    if here != there:
        raise UsageError(
            f"{file}: its optimizer has groups {there}, this run's {here}; resume with the --freeze flags of that run"
        )
    groups = [
        {**mine, "lr": its["lr"], "params": its["params"]} for mine, its in zip(own, state["param_groups"], strict=True)
    ]
    # A copy, for the optimizer would go on to write into the caller's tensors.
    optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})
