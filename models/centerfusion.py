"""CenterFusion (Nabati and Qi 2021): 3D boxes from a camera image and radar, under the names of the published file.

The first stage predicts centers, sizes, depths and angles from the image. Radar returns are associated with its boxes,
and the second stage predicts depth and angle again, velocity and attribute. Deformable convolutions are torchvision's.
The variants on ResNets are for small machines and have no published weights: plain convolutions instead of deformable
ones, and a second stage that predicts a correction of the depth.

B images; h, w: size of the maps, a quarter of the image's.
"""

import functools
import math

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation, deform_conv2d

from models.backbones import resnet
from models.backbones.dla import DLA34
from ops import radar as radar_ops
from utils.errors import WeightsError

CHANNELS = 64  # input of the heads
RADAR_CHANNELS = 3  # depth, vx, vz
HEATMAP_BIAS = -4.6  # initial score of every class: 0.01
DEPTH_BIAS = -3.0  # initial depth: 20 m, where most objects are; saves the first hundreds of steps
FIRST_HEADS = {"reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
SECOND_HEADS = {"dep_sec": 1, "rot_sec": 8}
MOTION_HEADS = {"nuscenes_att": 8, "velocity": 3}  # of the second stage; of the first in a network without radar
FLOAT32_HEADS = ("hm", "dep", "dep_sec")  # bfloat16 rounds a depth of 40 m by up to 0.6 m, and makes near scores equal
MEAN = (0.40789654 * 255, 0.44719302 * 255, 0.47026115 * 255)  # BGR
STD = (0.28863828 * 255, 0.27408164 * 255, 0.27809835 * 255)


class DeformableConv2d(nn.Conv2d):
    """A modulated deformable 3x3 convolution (Zhu et al. 2019)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.conv_offset_mask = nn.Conv2d(inputs, 27, 3, padding=1)  # (dy, dx) of nine points, then their nine weights
        limit = 1 / math.sqrt(9 * inputs)
        nn.init.uniform_(self.weight, -limit, limit)
        for value in (self.bias, self.conv_offset_mask.weight, self.conv_offset_mask.bias):
            nn.init.zeros_(value)

    def forward(self, x, scale=None, shift=None):
        """[B,C,H,W] -> [B,C',H,W]; scale, shift [C'] of a batch norm that follows and is folded into the weights.

        In float32 under autocast too: torchvision has no other kernel for CPUs, and casts on GPUs.
        """
        offset, mask = self.conv_offset_mask(x).split([18, 9], dim=1)
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        with torch.autocast(x.device.type, enabled=False):
            inputs, offset, mask = (value.to(weight.dtype) for value in (x, offset, mask.sigmoid()))
            return deform_conv2d(inputs, offset, weight, bias, padding=1, mask=mask).to(x.dtype)


class DeformableBlock(nn.Module):
    """Deformable convolution, batch norm, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        self.conv = DeformableConv2d(inputs, outputs)

    def forward(self, x):
        norm = self.actf[0]
        if norm.training:
            return self.actf(self.conv(x))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv(x, scale, norm.bias - norm.running_mean * scale).relu_()


class BilinearUpsample(nn.ConvTranspose2d):
    """Upsampling by `factor`, each channel by itself; learned, bilinear at first."""

    def __init__(self, channels, factor):
        super().__init__(channels, channels, 2 * factor, factor, factor // 2, groups=channels, bias=False)
        weights = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
        with torch.no_grad():
            self.weight.copy_(weights[:, None] * weights)


class IDAUp(nn.Module):
    """Iterative deep aggregation: each map is upsampled to the size of the first and added to the one before it.

    inputs   channels of the maps, from fine to coarse
    factors  how much coarser than the first each of them is
    block    block(inputs, outputs) makes a 3x3 convolution with norm and activation
    """

    def __init__(self, channels, inputs, factors, block):
        super().__init__()
        for i in range(1, len(inputs)):
            self.add_module(f"proj_{i}", block(inputs[i], channels))
            self.add_module(f"up_{i}", BilinearUpsample(channels, factors[i]))
            self.add_module(f"node_{i}", block(channels, channels))

    def forward(self, maps):
        merged = [maps[0]]
        for i, x in enumerate(maps[1:], 1):
            proj, up, node = (getattr(self, f"{part}_{i}") for part in ("proj", "up", "node"))
            merged.append(node(up(proj(x)) + merged[-1]))
        return merged


class DLAUp(nn.Module):
    """Maps of stride 4 to 32 -> maps of the same channels and sizes, each aggregated with all coarser ones."""

    def __init__(self, channels, block):
        super().__init__()
        inputs, factors = list(channels), [2**i for i in range(len(channels))]
        for i, j in enumerate(range(len(channels) - 2, -1, -1)):
            self.add_module(f"ida_{i}", IDAUp(channels[j], inputs[j:], [f // factors[j] for f in factors[j:]], block))
            inputs[j + 1 :] = [channels[j]] * (len(channels) - j - 1)
            factors[j + 1 :] = [factors[j]] * (len(channels) - j - 1)

    def forward(self, maps):
        maps = list(maps)
        outputs = [maps[-1]]
        for i, j in enumerate(range(len(maps) - 2, -1, -1)):
            maps[j:] = getattr(self, f"ida_{i}")(maps[j:])
            outputs.insert(0, maps[-1])
        return outputs


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 under autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def make_head(name, inputs, outputs, hidden, width):
    """`hidden` convolutions of `width` channels, the first 3x3, the others 1x1, and a 1x1 one to `outputs` channels."""
    layers = [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
    for _ in range(hidden - 1):
        layers += [nn.Conv2d(width, width, 1), nn.ReLU(inplace=True)]
    layers.append((Float32Conv2d if name in FLOAT32_HEADS else nn.Conv2d)(width, outputs, 1))
    for layer in layers[::2]:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class CenterFusion(nn.Module):
    """Input: BGR images whose sides are multiples of 32, 448 x 800 as published.

    body            gives maps of stride 4 to 32
    block           of the upsampling, see `IDAUp`
    width           channels within the heads
    residual_depth  dep_sec is added to the depth of the associated radar, or to dep where there is none, and the second
                    stage gets the difference of the two depths. As published it gets the radar's depth and predicts
                    depth itself, and takes very many steps to learn to copy. Also, where boxes overlap, the radar of
                    the top-scoring one is used
    radar           False: a camera-only network, with velocity and attribute from its first stage
    threshold       maximum distance of radar from a box's depth: "published" or "paper", see ops.radar
    max_distance    of radar in meters; the second stage gets depth as a fraction of it
    """

    image_mean, image_std = MEAN, STD

    def __init__(self, name, num_classes, body, block, *, width, residual_depth, radar, threshold, max_distance):
        super().__init__()
        if threshold not in radar_ops.THRESHOLDS:
            raise WeightsError(f"unknown threshold {threshold!r}; known are {', '.join(radar_ops.THRESHOLDS)}")
        if max_distance <= 0:
            raise WeightsError(f"max_distance {max_distance}: must be above 0 meters")
        self.name, self.residual_depth, self.num_classes = name, residual_depth, num_classes
        self.arguments = {"radar": radar, "threshold": threshold, "max_distance": max_distance}
        first = {"hm": num_classes, **FIRST_HEADS, **({} if radar else MOTION_HEADS)}
        second = {**SECOND_HEADS, **MOTION_HEADS} if radar else {}
        self.first_heads, self.second_heads = tuple(first), tuple(second)
        for head, outputs in first.items():
            self.add_module(head, make_head(head, CHANNELS, outputs, 1, width))
        for head, outputs in second.items():
            self.add_module(head, make_head(head, CHANNELS + RADAR_CHANNELS, outputs, 3, width))
        nn.init.constant_(self.hm[-1].bias, HEATMAP_BIAS)
        nn.init.constant_(self.dep[-1].bias, DEPTH_BIAS)
        if radar and not residual_depth:
            nn.init.constant_(self.dep_sec[-1].bias, DEPTH_BIAS)
        self.base = body
        channels = body.channels[-4:]
        self.dla_up = DLAUp(channels, block)
        self.ida_up = IDAUp(CHANNELS, channels[:3], (1, 2, 4), block)

    def forward(self, images, radar_map=None, calib=None, association=None):
        """Normalized images [B,3,H,W] -> raw heads by name, each [B,C,h,w].

        A network with radar needs either `association` [B,3,h,w] (see ops.radar.associate; in training it is made from
        the ground truth) or the radar map [B,3,h,w] and calib [B,3,4], which are associated with the network's own
        peaks. It also returns the depth channel of the association, "pc_hm" [B,1,h,w], as a fraction of max_distance.
        """
        features, outputs = self.first_stage(images)
        if not self.second_heads:
            return outputs
        if association is None:
            threshold, max_distance = self.arguments["threshold"], self.arguments["max_distance"]
            association = radar_ops.associate_peaks(
                outputs, radar_map, calib, threshold, max_distance, best_last=self.residual_depth
            )
        return {**outputs, **self.second_stage(features, outputs["dep"], association)}

    def first_stage(self, images):
        """Normalized images [B,3,H,W] -> features [B,64,h,w], and the raw heads of the first stage."""
        features = self.ida_up(self.dla_up(self.base.feature_maps(images)[-4:])[:3])[-1]
        return features, {name: getattr(self, name)(features) for name in self.first_heads}

    def second_stage(self, features, dep, association):
        """features [B,64,h,w], dep [B,1,h,w], association [B,3,h,w] -> pc_hm and the raw heads of the second stage."""
        depth, velocity = association.split([1, RADAR_CHANNELS - 1], dim=1)
        depth_input, base_depth = depth, None
        if self.residual_depth:  # depth in meters is exp(-dep); input 0: both depths agree, or there is no radar
            dep = dep.detach().float()
            radar_dep = -(depth * self.arguments["max_distance"]).clamp(min=1).log()
            base_depth = torch.where(depth > 0, radar_dep, dep)
            depth_input = dep - base_depth
        features = torch.cat([features, depth_input.to(features.dtype), velocity.to(features.dtype)], dim=1)
        outputs = {"pc_hm": depth, **{name: getattr(self, name)(features) for name in self.second_heads}}
        if self.residual_depth:
            outputs["dep_sec"] = outputs["dep_sec"] + base_depth
        return outputs

    def stages(self):
        """What --freeze-backbone freezes: body and upsampling."""
        return [self.base, self.dla_up, self.ida_up]

    def untrained_heads(self):
        """Names of the heads whose last bias is still the initial zero: their outputs are noise."""
        return [name for name in MOTION_HEADS if not getattr(self, name)[-1].bias.any()]

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}, upsampling in backbone."""
        heads = [p for name in (*self.first_heads, *self.second_heads) for p in getattr(self, name).parameters()]
        return {"backbone": [p for stage in self.stages() for p in stage.parameters()], "heads": heads}


def on_dla34(num_classes, radar=True, threshold="published", max_distance=60.0):
    options = {"radar": radar, "threshold": threshold, "max_distance": max_distance}
    name, body = "centerfusion_dla34", DLA34()
    return CenterFusion(name, num_classes, body, DeformableBlock, width=256, residual_depth=False, **options)


def on_resnet(depth, num_classes, radar=True, threshold="published", max_distance=60.0):
    """With plain convolutions: the gradient of deformable ones takes a CPU five times as long as the rest of a step."""
    options = {"radar": radar, "threshold": threshold, "max_distance": max_distance}
    name, body = f"centerfusion_resnet{depth}", resnet.body(depth)
    return CenterFusion(name, num_classes, body, Conv2dNormActivation, width=64, residual_depth=True, **options)


NETWORKS = {
    "centerfusion_dla34": on_dla34,
    **{f"centerfusion_resnet{depth}": functools.partial(on_resnet, depth) for depth in (18, 34)},
}
