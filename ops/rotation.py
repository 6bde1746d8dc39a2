"""Observation angles as two overlapping bins (Mousavian et al. 2017), in CenterNet's encoding.

Bin 1 is centered at -pi/2 and bin 2 at pi/2; both reach pi/6 beyond 0 and pi, where an angle belongs to both.
"""

import math

import torch

from ops.geometry import wrap

BIN_CENTERS = (-math.pi / 2, math.pi / 2)


def encode(alpha):
    """Angles [...] in (-pi, pi] -> (bins int64 [...,2], 1 where the angle is in the bin, residuals [...,2]).

    A residual is the angle minus the bin's center, 0 outside the bin. It is not wrapped: only its sine and cosine are
    used.
    """
    first = (alpha < math.pi / 6) | (alpha > 5 * math.pi / 6)
    second = (alpha > -math.pi / 6) | (alpha < -5 * math.pi / 6)
    bins = torch.stack([first, second], dim=-1)
    residuals = (alpha[..., None] - alpha.new_tensor(BIN_CENTERS)) * bins
    return bins.long(), residuals


def decode(rot):
    """The eight channels of a rotation head [...,8] -> angles [...] in (-pi, pi].

    Each bin has four: the logits of "outside" and "inside", sine and cosine of the residual. The angle is that of the
    bin with the higher logit of "inside".
    """
    bins = rot.unflatten(-1, (2, 4))
    residual = torch.atan2(bins[..., 2], bins[..., 3])  # [...,2]
    first = bins[..., 0, 1] > bins[..., 1, 1]
    return wrap(torch.where(first, residual[..., 0] + BIN_CENTERS[0], residual[..., 1] + BIN_CENTERS[1]))
