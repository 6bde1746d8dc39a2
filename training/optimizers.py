"""Parameter groups and update rules."""

import torch

from training.flags import UsageError


def build(name, parts, rates, weight_decay, norm_weight_decay=None, momentum=0.9):
    """Optimizer `name` ("sgd", "adam", "adamw") over the parameters in `parts` that learn.

    parts              part of the network -> its parameters
    rates              part -> its base learning rate
    norm_weight_decay  of batch norm and biases (one dimension); None: as the weights

    A group a part and kind, each with `name` and `base_lr`: the loop sets lr = base_lr * schedule at every step.
    """
    norm_decay = weight_decay if norm_weight_decay is None else norm_weight_decay
    groups = []
    for part, parameters in parts.items():
        learning = [p for p in parameters if p.requires_grad]
        for kind, decay in (("weights", weight_decay), ("norms", norm_decay)):
            chosen = [p for p in learning if (p.ndim > 1) == (kind == "weights")]
            if chosen:
                group = {"params": chosen, "name": f"{part} {kind}", "base_lr": rates[part], "weight_decay": decay}
                groups.append({**group, "lr": rates[part]})
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups)


def batch_scale(batch_size, chosen_for, scale, say=print):
    """Factor on the learning rates for another batch size than they were chosen for (Goyal et al. 2017).

    chosen_for: that batch size, 0 if nobody said. scale: --scale-lr; without it the factor is 1 and a warning names it.
    UsageError for --scale-lr where nobody said.
    """
    if scale and not chosen_for:
        raise UsageError("--scale-lr: nobody said for which batch the rates are; give --lr-batch-size")
    factor = batch_size / chosen_for if chosen_for else 1.0
    if factor != 1 and not scale:
        say(
            f"WARNING: the learning rates were chosen for batch {chosen_for}, this is {batch_size}: "
            f"--scale-lr would multiply them by {factor:g}"
        )
        return 1.0
    return factor
