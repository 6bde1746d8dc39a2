"""Radar sweeps in .pcd files: a text header, then every point's fields one after the other as bytes.

nuScenes writes 43 bytes a point and padding up to 4,096 more; a file cut to its points is as good. Whatever stands
behind the points is not looked at.
"""

import numpy as np

from data.errors import DataError
from data.images import POINTER

LONGEST_HEADER = 4096  # bytes; nuScenes' has under 400
USED = ("x", "y", "z", "vx_comp", "vy_comp", "invalid_state", "dyn_prop", "ambig_state")  # of a radar of nuScenes
TOO_CLOSE = 1.0  # metres along x and along y from a radar: returns from the vehicle itself
KINDS = {"F": "f", "I": "i", "U": "u"}  # TYPE of a field -> numpy's letter
SIZES = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}


def read(path):
    """(points float32 [P,F], names tuple of F) of the binary .pcd file `path`, in the sensor's frame and units.

    A radar of nuScenes has F = 18: x y z in metres, x forward and y left, vx vy vx_comp vy_comp in m/s, and states. A
    sweep whose first point holds a NaN has no points, by the format's own rule. Raises DataError of kind "image".
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(path, "", f"cannot be read: {error.strerror}", kind="image") from None
    if content.startswith(POINTER):
        reason = "a git-LFS pointer, not a radar sweep; fetch it with: git lfs pull"
        raise DataError(path, "", reason, kind="image")
    try:
        layout, count, first = _header(content)
    except ValueError as error:
        raise DataError(path, "header", f"{error}; fetch the file anew", kind="image") from None
    have = (len(content) - first) // layout.itemsize
    if have < count:
        reason = f"cut short: the header says {count} points, the file holds {have}; fetch the file anew"
        raise DataError(path, "", reason, kind="image")
    rows = np.frombuffer(content, dtype=layout, count=count, offset=first)
    points = np.empty((count, len(layout.names)), dtype=np.float32)
    for column, name in enumerate(layout.names):
        points[:, column] = rows[name]
    if count and np.isnan(points[0]).any():
        points = points[:0]
    return points, layout.names


def _header(content):
    """(dtype of one point, number of points, position of the first byte of data). Raises ValueError saying what is
    wrong."""
    start = content.find(b"\nDATA ", 0, LONGEST_HEADER)
    end = content.find(b"\n", start + 1)
    if start < 0 or end < 0:
        raise ValueError("no line DATA, so no .pcd file")
    lines = content[:end].decode("ascii", errors="replace").splitlines()
    said = {name: values for name, *values in (line.split() for line in lines if line.split())}
    lack = [name for name in ("FIELDS", "SIZE", "TYPE", "POINTS") if not said.get(name)]
    if lack:
        raise ValueError(f"lacks {', '.join(lack)}")
    if said["DATA"] != ["binary"]:
        raise ValueError(f"DATA is {' '.join(said['DATA'])}, and only binary is read")
    names, sizes, types = said["FIELDS"], said["SIZE"], said["TYPE"]
    if not len(names) == len(sizes) == len(types) == len(set(names)):
        raise ValueError(f"{len(names)} FIELDS, {len(sizes)} SIZE and {len(types)} TYPE do not name each field once")
    if any(number != "1" for number in said.get("COUNT", ())):
        raise ValueError("COUNT above 1 is not read")
    bad = [name for name, size, kind in zip(names, sizes, types) if int(size) not in SIZES.get(kind, ())]
    if bad:
        raise ValueError(f"SIZE and TYPE of {', '.join(bad)} are no number's")
    layout = np.dtype([(name, f"<{KINDS[kind]}{size}") for name, size, kind in zip(names, sizes, types)])
    count = int(said["POINTS"][0])
    if count < 0:
        raise ValueError(f"POINTS is {count}")
    return layout, count, end + 1


def trusted(points, at):
    """bool [P]: points [P,F] that the devkit's default filter keeps (valid, moving or standing in a known way, of one
    speed) and that are no returns from the vehicle itself. `at`: name of a field -> its column."""
    state = (points[:, at["invalid_state"]] == 0) & (points[:, at["ambig_state"]] == 3)
    kind = (points[:, at["dyn_prop"]] >= 0) & (points[:, at["dyn_prop"]] <= 6)
    own = (np.abs(points[:, at["x"]]) < TOO_CLOSE) & (np.abs(points[:, at["y"]]) < TOO_CLOSE)
    return state & kind & ~own
