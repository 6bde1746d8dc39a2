"""CenterFusion (Nabati and Qi 2021): 3D boxes from a camera picture and radar, under the names of the published file.

A first stage finds centres, sizes, depths and angles in the picture; radar returns are handed to what it found, and a
second stage answers depth and angle again, velocity and attribute. Deformable convolutions are torchvision's. The
ResNets, which have no published weights, are for small machines: plain convolutions in the place of deformable ones,
and a second stage that corrects the radar's depth, or the first stage's where there is no radar.

B pictures, h, w the size of the maps: a quarter of the picture's.
"""

import functools
import math

import torch
from torch import nn
from torchvision.ops import deform_conv2d

from models import resnet
from models.dla import DLA34
from models.errors import WeightsError
from ops import radar as frustum

CHANNELS = 64  # of the maps that the heads see
RADAR_CHANNELS = 3  # depth, vx, vz
WIDTH, SMALL_WIDTH = 256, 64  # of the heads on DLA-34 and on a ResNet, as CenterNet has them
HEAT_BIAS = -4.6  # score of every class at the start: 0.01
DEPTH_BIAS = -3.0  # depth at the start: 20 m, where most objects are; without it the first hundreds of steps go there
FIRST_STAGE = {"reg": 2, "wh": 2, "dep": 1, "rot": 8, "dim": 3, "amodel_offset": 2}
SECOND_STAGE = {"dep_sec": 1, "rot_sec": 8}
RADAR_HEADS = {"nuscenes_att": 8, "velocity": 3}  # of the second stage, of the first where there is no radar
EXACT = ("hm", "dep", "dep_sec")  # bfloat16 would round a depth of 40 m to 0.6 m, and make equals of neighbours' scores
MEAN = (0.40789654 * 255, 0.44719302 * 255, 0.47026115 * 255)  # blue, green, red
STD = (0.28863828 * 255, 0.27408164 * 255, 0.27809835 * 255)


class Deformable(nn.Conv2d):
    """A 3x3 convolution whose nine points move, and count, as the picture says (Zhu et al. 2019)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.conv_offset_mask = nn.Conv2d(inputs, 27, 3, padding=1)  # nine of dy, dx each, then nine weights
        limit = 1 / math.sqrt(9 * inputs)
        nn.init.uniform_(self.weight, -limit, limit)
        for value in (self.bias, self.conv_offset_mask.weight, self.conv_offset_mask.bias):
            nn.init.zeros_(value)

    def forward(self, x, scale=None, shift=None):
        """[B,C,H,W] -> [B,C',H,W]; scale, shift [C'] of a norm that follows and is folded into the weights.

        In float32 under autocast too: torchvision has no other kernel on a CPU, and casts on a GPU.
        """
        offset, mask = self.conv_offset_mask(x).split([18, 9], dim=1)
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        with torch.autocast(x.device.type, enabled=False):
            wide, offset, mask = (value.to(weight.dtype) for value in (x, offset, mask.sigmoid()))
            return deform_conv2d(wide, offset, weight, bias, padding=1, mask=mask).to(x.dtype)


class DeformableNorm(nn.Module):
    """Deformable convolution, batch norm, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        self.conv = Deformable(inputs, outputs)

    def forward(self, x):
        norm = self.actf[0]
        if norm.training:
            return self.actf(self.conv(x))
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv(x, scale, norm.bias - norm.running_mean * scale).relu_()


def plain(inputs, outputs):
    """Convolution, batch norm, ReLU: the ResNets' place of DeformableNorm, whose gradient takes a CPU five times longer
    than all the rest of a step."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Upsample(nn.ConvTranspose2d):
    """Each channel by itself to `factor` times the size; bilinear at the start."""

    def __init__(self, channels, factor):
        super().__init__(channels, channels, 2 * factor, factor, factor // 2, groups=channels, bias=False)
        near = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
        with torch.no_grad():
            self.weight.copy_(near[:, None] * near)


class Merge(nn.Module):
    """Maps from fine to coarse become maps of `channels` and of the first one's size, each added to the one before.

    inputs, factors: channels of the maps, and how much coarser than the first each of them is.
    block: DeformableNorm or `plain`.
    """

    def __init__(self, channels, inputs, factors, block):
        super().__init__()
        for i in range(1, len(inputs)):
            self.add_module(f"proj_{i}", block(inputs[i], channels))
            self.add_module(f"up_{i}", Upsample(channels, factors[i]))
            self.add_module(f"node_{i}", block(channels, channels))

    def forward(self, maps):
        merged = [maps[0]]
        for i, x in enumerate(maps[1:], 1):
            proj, up, node = (getattr(self, f"{part}_{i}") for part in ("proj", "up", "node"))
            merged.append(node(up(proj(x)) + merged[-1]))
        return merged


class Aggregate(nn.Module):
    """The maps of stride 4 to 32 -> as many of the same channels and sizes, each having seen all the coarser ones."""

    def __init__(self, channels, block):
        super().__init__()
        inputs, factors = list(channels), [2**i for i in range(len(channels))]
        for i, j in enumerate(range(len(channels) - 2, -1, -1)):
            self.add_module(f"ida_{i}", Merge(channels[j], inputs[j:], [f // factors[j] for f in factors[j:]], block))
            inputs[j + 1 :] = [channels[j]] * (len(channels) - j - 1)
            factors[j + 1 :] = [factors[j]] * (len(channels) - j - 1)

    def forward(self, maps):
        maps = list(maps)
        found = [maps[-1]]
        for i, j in enumerate(range(len(maps) - 2, -1, -1)):
            maps[j:] = getattr(self, f"ida_{i}")(maps[j:])
            found.insert(0, maps[-1])
        return found


class Exact(nn.Conv2d):
    """A convolution in float32 under autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def head(inputs, outputs, hidden, width, last=nn.Conv2d):
    """A 3x3 convolution, hidden - 1 of 1x1, each with a ReLU, and `last` of 1x1 to `outputs` numbers a cell."""
    parts = [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
    for _ in range(hidden - 1):
        parts += [nn.Conv2d(width, width, 1), nn.ReLU(inplace=True)]
    parts.append(last(width, outputs, 1))
    for part in parts:
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.bias)
    return nn.Sequential(*parts)


class CenterFusion(nn.Module):
    """Pictures whose sides are multiples of 32, blue first; 448 x 800 as published.

    name, body    its name, and what gives maps of stride 4 to 32
    block         what its upsampling is made of: DeformableNorm or `plain`
    width         channels within the heads
    refines       dep_sec is what the second stage adds to the radar's depth where a box was handed any, else to dep,
                  and it sees how far the two are apart. The published head sees metres and answers whole depths: to
                  copy the radar's takes it very many steps. Where peaks overlap, the surest hands its radar last
    radar         false: a network of the camera alone, velocity and attribute from its first stage
    threshold     how far from a box's depth its radar may lie: "published" or "paper" (see ops.radar)
    max_distance  of radar, metres; the second stage sees depth in parts of it
    """

    channels = "bgr"
    image_mean, image_std = MEAN, STD

    def __init__(self, name, body, block, width, refines, num_classes, radar, threshold, max_distance):
        super().__init__()
        if threshold not in frustum.THRESHOLDS:
            raise WeightsError(f"no threshold called {threshold!r}; there are {', '.join(frustum.THRESHOLDS)}")
        if max_distance <= 0:
            raise WeightsError(f"max_distance {max_distance}: must lie above 0 metres")
        self.name, self.refines, self.num_classes = name, refines, num_classes
        self.arguments = {"radar": radar, "threshold": threshold, "max_distance": max_distance}
        first = {"hm": num_classes, **FIRST_STAGE, **({} if radar else RADAR_HEADS)}
        second = {**SECOND_STAGE, **RADAR_HEADS} if radar else {}
        for inputs, hidden, outputs in ((CHANNELS, 1, first), (CHANNELS + RADAR_CHANNELS, 3, second)):
            for output, count in outputs.items():
                last = Exact if output in EXACT else nn.Conv2d
                self.add_module(output, head(inputs, count, hidden, width, last))
        nn.init.constant_(self.hm[-1].bias, HEAT_BIAS)
        for depth in [self.dep, self.dep_sec] if radar and not refines else [self.dep]:
            nn.init.constant_(depth[-1].bias, DEPTH_BIAS)
        self.first_stage, self.second_stage = tuple(first), tuple(second)
        self.base = body
        channels = body.channels[-4:]
        self.dla_up = Aggregate(channels, block)
        self.ida_up = Merge(CHANNELS, channels[:3], (1, 2, 4), block)

    def forward(self, images, radar_map=None, calib=None, association=None):
        """Normalised images [B,3,H,W] -> raw heads by name, each [B,C,h,w].

        A network with radar needs either `association` [B,3,h,w] (see ops.radar.associate; training makes it from the
        ground truth) or the radar map [B,3,h,w] and calib [B,3,4] to associate with its own peaks. It returns the
        depth channel of what was associated too, in parts of max_distance, as "pc_hm" [B,1,h,w].
        """
        seen, outputs = self.first(images)
        if not self.second_stage:
            return outputs
        if association is None:
            how = self.arguments["threshold"], self.arguments["max_distance"]
            association = frustum.associate_peaks(outputs, radar_map, calib, *how, surest_last=self.refines)
        return {**outputs, **self.second(seen, outputs["dep"], association)}

    def first(self, images):
        """Normalised images [B,3,H,W] -> the maps that the heads see [B,64,h,w], and the first stage's raw heads."""
        seen = self.ida_up(self.dla_up(self.base.maps(images)[-4:])[:3])[-1]
        return seen, {name: getattr(self, name)(seen) for name in self.first_stage}

    def second(self, seen, dep, association):
        """seen [B,64,h,w], the first stage's dep [B,1,h,w], association [B,3,h,w] -> pc_hm and raw heads."""
        depth, velocity = association.split([1, RADAR_CHANNELS - 1], dim=1)
        sight, start = depth, None
        if self.refines:  # exp(-dep) is metres; 0 for the head: radar and first stage agree, or there is no radar
            dep, handed = dep.detach().float(), depth > 0
            start = torch.where(handed, -(depth * self.arguments["max_distance"]).clamp(min=1).log(), dep)
            sight = dep - start
        seen = torch.cat([seen, sight.to(seen.dtype), velocity.to(seen.dtype)], dim=1)
        outputs = {"pc_hm": depth, **{name: getattr(self, name)(seen) for name in self.second_stage}}
        if self.refines:
            outputs["dep_sec"] = outputs["dep_sec"] + start
        return outputs

    def stages(self):
        """What --freeze_backbone holds fixed, from the picture on: body and upsampling."""
        return [self.base, self.dla_up, self.ida_up]

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}; upsampling is of the backbone."""
        heads = [p for name in (*self.first_stage, *self.second_stage) for p in getattr(self, name).parameters()]
        return {"backbone": [p for stage in self.stages() for p in stage.parameters()], "heads": heads}


def on_dla34(num_classes, radar=True, threshold="published", max_distance=60.0):
    parts = ("centerfusion_dla34", DLA34(), DeformableNorm, WIDTH, False)
    return CenterFusion(*parts, num_classes, radar, threshold, max_distance)


def on_resnet(depth, num_classes, radar=True, threshold="published", max_distance=60.0):
    parts = (f"centerfusion_resnet{depth}", resnet.body(depth), plain, SMALL_WIDTH, True)
    return CenterFusion(*parts, num_classes, radar, threshold, max_distance)


NETWORKS = {
    "centerfusion_dla34": on_dla34,
    **{f"centerfusion_resnet{depth}": functools.partial(on_resnet, depth) for depth in (18, 34)},
}
