"""Observation angles as two overlapping bins (Mousavian et al. 2017, as CenterNet has them).

Bin 1 is centred at -pi/2 and bin 2 at pi/2; both reach pi/6 beyond 0 and pi, where an angle belongs to both.
"""

import math

import torch

from ops.geometry import wrap

CENTERS = (-math.pi / 2, math.pi / 2)


def encode(alpha):
    """Angles [...] in (-pi, pi] -> (bins int64 [...,2], 1 where the angle lies in it, residuals [...,2]).

    A residual is the angle from the bin's centre, 0 outside the bin. It is not wrapped: only its sine and cosine count.
    """
    first = (alpha < math.pi / 6) | (alpha > 5 * math.pi / 6)
    second = (alpha > -math.pi / 6) | (alpha < -5 * math.pi / 6)
    bins = torch.stack([first, second], dim=-1)
    residuals = (alpha[..., None] - alpha.new_tensor(CENTERS)) * bins
    return bins.long(), residuals


def decode(rot):
    """A head's eight numbers [...,8] -> angles [...] in (-pi, pi].

    For each bin: the scores of "outside" and "inside", sine and cosine of the residual. The bin of the higher score of
    "inside" speaks.
    """
    bins = rot.unflatten(-1, (2, 4))
    angles = wrap(torch.atan2(bins[..., 2], bins[..., 3]) + rot.new_tensor(CENTERS))  # [...,2]
    first = bins[..., 0, 1] > bins[..., 1, 1]
    return torch.where(first, angles[..., 0], angles[..., 1])
