"""From CenterFusion's raw heads to 3D boxes (postprocessing of CenterNet and CenterFusion).

A detection is a dict of one camera image with N boxes in the camera frame, highest score first: labels int64 [N],
scores [N], center [N,3] (geometric, meters), dims [N,3] h, w, l, yaw [N], velocity [N,3] in m/s, attribute int64 [N],
-1 for classes without attributes, boxes [N,4] xyxy in pixels of the network's input.

B batch, N boxes per image, h, w the size of the maps.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from ops.geometry import alpha_to_yaw, apply_affine, decode_depth, invert_affine, unproject
from ops.heatmaps import gather_cells, topk_peaks
from ops.rotation import decode as decode_rotation
from ops.transfer import to_cpu
from utils.nuscenes import ATTRIBUTE_GROUPS, GROUP_OF_CLASS

MIN_SIZE = 0.01  # meters: nuScenes scores only sizes above 0
# Signs of a head's channels in the mirror image. Mirrored, the angle alpha becomes pi - alpha, which is in the same
# bin: its residual, and so its sine, changes sign.
ROTATION_SIGNS = (1, 1, -1, 1) * 2
FLIP_SIGNS = {"rot": ROTATION_SIGNS, "rot_sec": ROTATION_SIGNS, "velocity": (-1, 1, 1)}


@torch.no_grad()
def decode(
    outputs: Mapping[str, torch.Tensor],
    targets: Sequence[Mapping],
    stride: int = 4,
    count: int = 100,
    without: Collection[str] = (),
) -> list[dict[str, torch.Tensor]]:
    """Raw heads by name, each [B,C,h,w] -> B detections of `count` boxes, on the CPU.

    targets    of the same images: `calib` [3,4], and `affine` [2,3] from pixels of the file to those of the input
    stride     pixels of the input per cell
    without    untrained heads, "velocity" or "nuscenes_att": their results are 0 and -1

    Depth and rotation are those of the second stage if the network has one. The center is the cell of the peak plus
    amodel_offset, converted to pixels of the file and unprojected to that depth.
    """
    peaks = topk_peaks(outputs["hm"].float().sigmoid(), count)  # [B,N] each
    names = sorted(outputs.keys() - {"hm", "pc_hm", *without})
    values = [gather_cells(outputs[name], peaks[2]).float() for name in names]
    scores, labels, index, *values = to_cpu(*peaks, *values)  # the rest is little
    heads = dict(zip(names, values))
    calib, affine = (torch.stack([target[name] for target in targets]) for name in ("calib", "affine"))
    width = outputs["hm"].shape[-1]
    cell = torch.stack([index % width, index // width], dim=-1).float()  # [B,N,2]
    center, half = cell + heads["reg"], heads["wh"].clamp(min=0) / 2  # of the 2D box
    pixels = apply_affine((cell + heads["amodel_offset"]) * stride, invert_affine(affine))
    depth = decode_depth(heads.get("dep_sec", heads["dep"])[..., 0])
    yaw = alpha_to_yaw(decode_rotation(heads.get("rot_sec", heads["rot"])), pixels[..., 0], calib)
    velocity = along_heading(heads["velocity"], yaw) if "velocity" in heads else yaw.new_zeros(*yaw.shape, 3)
    detections = {
        "labels": labels,
        "scores": scores,
        "center": unproject(pixels, depth, calib),
        "dims": heads["dim"].clamp(min=MIN_SIZE),
        "yaw": yaw,
        "velocity": velocity,
        "attribute": best_attribute(heads.get("nuscenes_att"), labels),
        "boxes": torch.cat([center - half, center + half], dim=-1) * stride,
    }
    return [{name: value[i] for name, value in detections.items()} for i in range(len(scores))]


def flip_averaged(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Raw heads [2B,C,h,w] by name, of B images and then of their mirror images -> their means [B,C,h,w], for `decode`.

    Offsets within a cell, angles and velocities of the mirror images are flipped back first. hm is averaged as a
    probability.
    """
    means = {}
    for name, maps in outputs.items():
        maps, flipped = maps.float().chunk(2)
        flipped = flipped.flip(-1)
        if name in ("reg", "amodel_offset"):  # x within the cell
            flipped = torch.cat([1 - flipped[:, :1], flipped[:, 1:]], dim=1)
        elif name in FLIP_SIGNS:
            channels = zip(flipped.unbind(1), FLIP_SIGNS[name], strict=True)
            flipped = torch.stack([sign * channel for channel, sign in channels], dim=1)
        means[name] = ((maps.sigmoid() + flipped.sigmoid()) / 2).logit(1e-6) if name == "hm" else (maps + flipped) / 2
    return means


def along_heading(velocity: torch.Tensor, yaw: torch.Tensor) -> torch.Tensor:
    """Velocities [...,3] rotated in the ground plane onto the heading axis of their boxes, at the same speed.

    Of the two directions of that axis, the one closer to the velocity: reversing vehicles, and boxes with a yaw that is
    off by pi, keep their direction of motion.
    """
    heading = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], dim=-1)
    speed = velocity[..., ::2].norm(dim=-1, keepdim=True)
    return heading * torch.where((heading * velocity).sum(-1, keepdim=True) < 0, -speed, speed)


def best_attribute(logits: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """The attribute [B,N] with the highest of logits [B,N,8] in the group of each label [B,N]; -1 without a group."""
    if logits is None:
        return torch.full_like(labels, -1)
    group = labels.new_tensor(GROUP_OF_CLASS)[labels]  # [B,N]
    allowed = labels.new_tensor(ATTRIBUTE_GROUPS) == group[..., None]  # [B,N,8]
    best = torch.where(allowed, logits, -torch.inf).argmax(-1)
    return torch.where(group >= 0, best, -1)
