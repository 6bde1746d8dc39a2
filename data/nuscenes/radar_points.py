"""Radar sweeps in binary .pcd files: a text header, then the points, each with all its fields.

nuScenes writes 43 bytes per point and up to 4,096 bytes of padding, which is not needed and not read.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.files import open_regular
from data.images import LFS_POINTER
from utils.errors import DataError

MAX_HEADER = 4096  # bytes; nuScenes' has under 400
FIELDS = ("x", "y", "z", "vx_comp", "vy_comp", "invalid_state", "dyn_prop", "ambig_state")  # that the data set uses
MIN_DISTANCE = 1.0  # meters along x and along y; closer returns come from the vehicle itself
NUMPY_KINDS = {"F": "f", "I": "i", "U": "u"}  # by TYPE of a field
SIZES = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}


def read(path: str | Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """(points float32 [P,F], names of the F fields) of the .pcd file `path`, in the sensor's frame.

    nuScenes has F = 18: x y z in meters, x forward and y left, vx vy vx_comp vy_comp in m/s, and states. A sweep whose
    first point has a NaN is empty, as nuScenes defines it. Raises DataError of kind "image".
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(path, "", f"cannot be read: {error.strerror}", kind="image") from None
    if content.startswith(LFS_POINTER):
        reason = "a git-LFS pointer, not a radar sweep; fetch it with: git lfs pull"
        raise DataError(path, "", reason, kind="image")
    try:
        dtype, count, start = _parse_header(content)
    except ValueError as error:
        raise DataError(path, "header", f"{error}; download it again", kind="image") from None
    available = (len(content) - start) // dtype.itemsize
    if available < count:
        reason = f"truncated: {count} points in the header, {available} in the file; download it again"
        raise DataError(path, "", reason, kind="image")
    rows = np.frombuffer(content, dtype=dtype, count=count, offset=start)
    points = np.empty((count, len(dtype.names)), dtype=np.float32)
    for column, name in enumerate(dtype.names):
        points[:, column] = rows[name]
    if count and np.isnan(points[0]).any():
        points = points[:0]
    return points, dtype.names


def _parse_header(content):
    """(dtype of a point, number of points, position of the first byte of data). Raises ValueError with the reason."""
    start = content.find(b"\nDATA ", 0, MAX_HEADER)
    end = content.find(b"\n", start + 1)
    if start < 0 or end < 0:
        raise ValueError("no DATA line: not a .pcd file")
    lines = content[:end].decode("ascii", errors="replace").splitlines()
    header = {name: values for name, *values in (line.split() for line in lines if line.split())}
    missing = [name for name in ("FIELDS", "SIZE", "TYPE", "POINTS") if not header.get(name)]
    if missing:
        raise ValueError(f"no {', '.join(missing)} line")
    if header["DATA"] != ["binary"]:
        raise ValueError(f"DATA is {' '.join(header['DATA'])}, only binary is supported")
    names, sizes, types = header["FIELDS"], header["SIZE"], header["TYPE"]
    if not len(names) == len(sizes) == len(types) == len(set(names)):
        raise ValueError(f"{len(names)} FIELDS, {len(sizes)} SIZE and {len(types)} TYPE do not match")
    if any(number != "1" for number in header.get("COUNT", ())):
        raise ValueError("a COUNT above 1 is not supported")
    invalid = [name for name, size, kind in zip(names, sizes, types) if int(size) not in SIZES.get(kind, ())]
    if invalid:
        raise ValueError(f"invalid SIZE and TYPE of {', '.join(invalid)}")
    dtype = np.dtype([(name, f"<{NUMPY_KINDS[kind]}{size}") for name, size, kind in zip(names, sizes, types)])
    count = int(header["POINTS"][0])
    if count < 0:
        raise ValueError(f"POINTS is {count}")
    return dtype, count, end + 1


def is_valid(points: np.ndarray, column: Mapping[str, int]) -> np.ndarray:
    """bool [P]: points [P,F] that the devkit's default filter keeps (valid, with a known motion state and an
    unambiguous speed) and that are not returns from the vehicle itself. column: index of each field."""
    valid = (points[:, column["invalid_state"]] == 0) & (points[:, column["ambig_state"]] == 3)
    known = (points[:, column["dyn_prop"]] >= 0) & (points[:, column["dyn_prop"]] <= 6)
    x, y = np.abs(points[:, column["x"]]), np.abs(points[:, column["y"]])
    return valid & known & ~((x < MIN_DISTANCE) & (y < MIN_DISTANCE))
