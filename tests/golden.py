"""Golden cases: what the published programs computed for weights and inputs that follow from a rule.

fixtures/golden/*.json hold, for networks of dusty-nv/pytorch-ssd, yhenon/pytorch-retinanet and mrnabati/CenterFusion,
the names and shapes of the weights, the input, and a summary of each output (64 evenly spaced values, mean, standard
deviation). The values of the weights are not stored: each follows from its name and shape, so a network that loads the
same names strictly and gives the same outputs computes the same function.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent / "fixtures" / "golden"


def case(program, name=None):
    """A case of "ssd", "retinanet" or "centerfusion"; the last has only one."""
    contents = json.loads((FOLDER / f"{program}.json").read_text())
    return contents if name is None else contents[name]


def state_dict(case, prefix=""):
    """The weights of a case: {prefix + name: tensor}."""
    return {prefix + name: torch.from_numpy(weight(name, shape)) for name, shape in case["state_dict"].items()}


def weight(name, shape):
    """The values of one weight: normal numbers seeded by its name, scaled to keep activations near one."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("running_var"):
        return np.exp(0.2 * values)
    if name.endswith("running_mean"):
        return 0.1 * values
    if values.ndim >= 2:
        return values * np.float32(np.sqrt(1.0 / np.prod(values.shape[1:])))
    return 1 + 0.1 * values if name.endswith("weight") else 0.05 * values


def images(case):
    """The input of a case: normalized images float32 [B,3,H,W]."""
    random = np.random.RandomState(case["input"]["seed"])
    return torch.from_numpy((0.5 * random.standard_normal(tuple(case["input"]["shape"]))).astype(np.float32))


def radar_map(case, height, width):
    """The radar input of the CenterFusion case, float32 [1,3,height,width]: depth in meters, vx, vz in m/s."""
    random, radar = np.random.RandomState(case["radar"]["random_state"]), np.zeros((1, 3, height, width), np.float32)
    for _ in range(case["radar"]["points"]):
        row, column = random.randint(height), random.randint(width)
        depth = random.uniform(0.5, 3.0)
        value = np.array([depth, random.randn(), random.randn()], np.float32)
        radar[0, :, max(0, row - 4) : row + 1, column : column + 2] = value[:, None, None]
    return torch.from_numpy(radar)


def worst_difference(values, expected):
    """The largest difference from a summary's values, in its standard deviations; infinite if the size differs."""
    values = np.asarray(values, np.float64).ravel()
    if values.size != expected["size"]:
        return float("inf")
    return float(np.abs(values[expected["index"]] - np.array(expected["value"])).max() / (expected["std"] + 1e-12))
