"""What the tests of several networks share."""

import torch
import torchvision
from torch import nn

import models


def checkpoint(net, **more):
    """What a training run writes of `net`, as far as models.load reads it."""
    if not hasattr(net, "classes"):
        net.classes = [f"class {label}" for label in range(net.num_classes)]
    return {"format_version": 1, **models.describe(net), "model": net.state_dict(), **more}


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def assert_each_parameter_in_one_group(net, names):
    groups = net.parameter_groups()
    assert list(groups) == names
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in net.parameters())


def assert_stages_are_the_backbone(net):
    """What can be frozen is the group "backbone", in order."""
    stages = [id(p) for stage in net.stages() for p in stage.parameters()]
    assert stages == [id(p) for p in net.parameter_groups()["backbone"]]


def assert_compiles_in_one_graph(net, *args, **kwargs):
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args, **kwargs), net(*args, **kwargs))


def randomize_norms(net, affine=False):
    """Batch norms other than the identity, in place; affine: also their weights and biases. Returns the network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.05)
            if affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return net


def randomize_detector(net):
    """Random weights for one of torchvision's detectors, with outputs of moderate size, in place."""
    for name, values in net.state_dict().items():
        if values.ndim == 4:  # the maps before a norm of the body are small, so that its epsilon matters
            values.normal_(std=(2 / values[0].numel()) ** 0.5 * (0.03 if "body" in name else 1))
        elif name.endswith("running_var"):
            values.uniform_(5e-4, 2e-3) if "body" in name else values.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            values.normal_(std=3e-3)
        elif "body" in name and name.endswith("weight"):
            values.uniform_(0.3, 0.6)


def freeze_norms(module):
    """The norms of torchvision's first published detectors: frozen, epsilon 0, without step counters; in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = torchvision.ops.FrozenBatchNorm2d(child.num_features, eps=0.0)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def padded_batch(images, net, size):
    """Images [3,h,w] of 0..255 -> one batch of normalized images of `size`, padded with 0."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (net.image_mean, net.image_std))
    batch = torch.zeros(len(images), 3, *size)
    for padded, image in zip(batch, images):
        padded[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return batch
