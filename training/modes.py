"""What learns and what stays as it is."""

from torch import nn


def train_mode(net, frozen=(), freeze_bn=False):
    """Put `net` in training mode, but for what is frozen.

    frozen      submodules that stay as they are: no gradient, batch norm uses its running statistics
    freeze_bn   so for every batch norm of the network, affine parameters too
    """
    net.train()
    for part in frozen:
        part.eval().requires_grad_(False)
    if freeze_bn:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
