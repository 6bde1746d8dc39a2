"""Which parameters are trained, and by which update rule."""

import argparse
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn


def set_train_mode(net: nn.Module, frozen: Sequence[nn.Module] = (), freeze_bn: bool | str = False) -> None:
    """Put `net` into training mode, except what is frozen.

    frozen      submodules that are not trained: no gradient, batch norm uses its running statistics
    freeze_bn   True: the same for every batch norm of the network, affine parameters included; "stats": they use their
                running statistics, and their affine parameters are trained
    """
    net.train()
    for part in frozen:
        part.eval().requires_grad_(False)
    if freeze_bn:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                if freeze_bn != "stats":
                    module.requires_grad_(False)


def build(
    args: argparse.Namespace, parts: Mapping[str, Iterable[nn.Parameter]], rates: Mapping[str, float | None]
) -> torch.optim.Optimizer:
    """The optimizer that the flags of training.cli ask for, over the parameters that require a gradient.

    parts   part of the network -> its parameters
    rates   part -> its base learning rate; None: --lr

    One group per part and kind (weights; norms and biases, which have one dimension), each with `name` and `base_lr`:
    Plan.set_lr sets lr = base_lr * schedule at every step.
    """
    norm_decay = args.weight_decay if args.norm_weight_decay is None else args.norm_weight_decay
    groups = []
    for part, parameters in parts.items():
        rate = args.lr if rates[part] is None else rates[part]
        trained = [p for p in parameters if p.requires_grad]
        weights, norms = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        for kind, params, decay in (("weights", weights, args.weight_decay), ("norms", norms, norm_decay)):
            if params:
                group = {"params": params, "name": f"{part} {kind}", "weight_decay": decay}
                groups.append({**group, "base_lr": rate, "lr": rate})
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    options = {"fused": True} if on_gpu else {}  # one kernel per step
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=args.momentum, **options)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](groups, **options)
    if args.preflight:
        allocate_state(optimizer)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate its state (momentum, Adam's moments), as its first step does, so that a later peak of
    memory includes it. Learning rates are 0 afterwards, and no weight has changed."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, net: nn.Module, clip_norm: float = 0.0
) -> None:
    """Update the weights with the accumulated gradients, clipped to `clip_norm` (0: not clipped), and zero those."""
    scaler.unscale_(optimizer)
    if clip_norm:
        nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
