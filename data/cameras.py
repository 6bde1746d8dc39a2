"""Camera matrices of plain images, for networks that predict in 3D."""

import json
import re
from pathlib import Path

import torch

from data.files import open_regular
from utils.errors import DataError, UsageError

# Focal length in widths of the image without a calibration: 1200 pixels for nuScenes' 1600, as CenterTrack and
# CenterFusion assume for images without one. Its front cameras have 0.79, the rear one has 0.51.
USUAL_FOCAL_LENGTH = 0.75
KEYS = {"calib", "P2", "camera_intrinsic", "camera_matrix"}  # of a JSON object; camera_intrinsic is nuScenes'
FORMATS = "9 or 12 numbers, row by row, as text or JSON; or KITTI's calibration file, of which P2 is used"


def read_calib(path: str | Path) -> torch.Tensor:
    """A camera's 3x3 or 3x4 matrix in pixels from a text or JSON file -> projection matrix [3,4], see ops.geometry.

    Raises DataError if it is none.
    """
    try:
        with open_regular(path, "r", encoding="utf-8") as file:
            values = _numbers(file.read())
    except OSError as error:
        raise DataError(path, "", f"{error.strerror}; give a file with a camera matrix: {FORMATS}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, RuntimeError):
        raise DataError(path, "", f"is no camera matrix: {FORMATS}") from None
    if values.numel() not in (9, 12):
        raise DataError(path, "", f"has {values.numel()} numbers; a camera matrix is {FORMATS}")
    calib = torch.zeros(3, 4)
    calib[:, : values.numel() // 3] = values.view(3, -1)
    if (
        not calib.isfinite().all()
        or min(calib[0, 0], calib[1, 1]) <= 0
        or not torch.equal(calib[2, :3], calib.new_tensor([0, 0, 1]))
    ):
        raise DataError(path, "", "is no camera matrix: rows fx 0 cx, 0 fy cy, 0 0 1 are expected, fx and fy above 0")
    return calib


def _numbers(text):
    """All numbers of a file's matrix, a flat tensor. ValueError or TypeError if it has none."""
    try:
        value = json.loads(text)
    except ValueError:
        match = re.search(r"^P2:(.*)$", text, re.MULTILINE)
        return torch.tensor([float(word) for word in re.split(r"[\s,;]+", match[1] if match else text) if word])
    if isinstance(value, dict):
        (key,) = KEYS & value.keys()
        value = value[key]
    return torch.tensor(value, dtype=torch.float32).flatten()


def usual_calib(height: int, width: int) -> torch.Tensor:
    """The matrix [3,4] of a camera that looks through the middle of its image, USUAL_FOCAL_LENGTH."""
    focal = USUAL_FOCAL_LENGTH * width
    return torch.tensor([[focal, 0, width / 2, 0], [0, focal, height / 2, 0], [0, 0, 1, 0]])


def target(image: torch.Tensor, calib: torch.Tensor | None) -> dict:
    """The target of an image (uint8 [3,H,W]) of a camera alone, see data.nuscenes.dataset: no objects, no radar.

    calib   [3,4], or None for `usual_calib`. UsageError if it is of another image size
    """
    height, width = image.shape[-2:]
    calib = usual_calib(height, width) if calib is None else calib
    x, y = calib[:2, 2].tolist()
    if not (0 <= x <= width and 0 <= y <= height):
        reason = f"its center ({x:g}, {y:g}) is outside the image of {width} x {height} pixels"
        raise UsageError(f"--calib: {reason}; give the matrix of images of this size")
    nothing = {"radar": torch.zeros(0, 5), "boxes": torch.zeros(0, 4), "amodal": torch.zeros(0, 2)}
    return {"calib": calib, "affine": torch.eye(2, 3), "size": (height, width), **nothing}
