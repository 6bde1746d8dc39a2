"""The tables of nuScenes, read once into flat arrays.

    ROOT/{version}/*.json    v1.0-mini, v1.0-trainval, v1.0-test: lists of records that refer to each other by token

Only what cameras and radars need is kept: the cameras' key frames, every radar sweep, their poses, and all annotations
of the ten detection classes. A file is read record by record: sample_data of v1.0-trainval alone would be gigabytes of
Python objects. The arrays are cached on disk until the size or date of a table changes. They are mapped into memory, so
only the parts in use take memory, and workers and several data sets share them.
"""

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.cache import load_arrays, save_arrays
from data.files import are_inside, is_inside, open_regular, shortened
from data.packed import PackedBytes, PackedPaths
from utils.errors import DataError
from utils.nuscenes import ATTRIBUTES, CAMERAS, CLASS_OF_CATEGORY, CLASSES, RADARS, is_annotated

CHANNELS = CAMERAS + RADARS
TABLES = ("scene", "sample", "sensor", "calibrated_sensor", "sample_data", "ego_pose")
ANNOTATION_TABLES = ("category", "attribute", "instance", "sample_annotation")  # v1.0-test may be without them
FORMAT = 3  # of the cached arrays; others are replaced
CHUNK = 1 << 24  # characters read at a time; no record is longer
MAX_GAP = 1.5  # seconds between two consecutive annotations that still give a velocity, as in the devkit


class Tables:
    """Arrays of one version. S samples, F frames (files of a sensor), C calibrations, P poses, A annotations.

    scene_names        str [scenes]
    sample_tokens      PackedPaths [S];  sample_scene int32 [S], sample_time int64 [S] in microseconds
    frame_paths        PackedPaths [F], relative to the root;  frame_size int16 [F,2] (h, w)
    frame_sample, frame_calibration, frame_pose int32 [F];  frame_previous int32 [F], a frame or -1
    frame_channel      int8 [F], index into CHANNELS;  frame_key bool [F]
    calibration_rotation float64 [C,4] w x y z, calibration_translation [C,3] meters: sensor -> vehicle
    intrinsic          float64 [C,3,3], zeros for a radar
    pose_rotation      float64 [P,4], pose_translation [P,3]: vehicle -> global
    annotation_first   int64 [S+1]: annotations first[s] to first[s + 1] - 1 are those of sample s
    annotation_label, _attribute (-1: none), _visibility (1 to 4, 0: unknown) int8 [A];  annotation_points int32 [A]
    annotation_center float64 [A,3], _rotation float32 [A,4]: object -> global;  _size float32 [A,3] w, l, h
    annotation_velocity float32 [A,3] in m/s, global; NaN where unknown
    invalid_record     int32 [X], record numbers (from 1) of invalid boxes, not among the A;  _sample int32, _reason str
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        packed = ("sample_tokens", "frame_paths")
        for name, value in arrays.items():
            if name not in packed and name.removesuffix("_first") not in packed:
                setattr(self, name, value)
        for name in packed:
            setattr(self, name, PackedPaths.from_arrays(arrays[name], arrays[f"{name}_first"]))


def load(
    root: str | Path, version: str, cache: str | Path | None = None, print: Callable[[str], object] = print
) -> Tables:
    """The Tables of `version` in `root`.

    cache   folder for the cached arrays; None: `root`

    Raises DataError for a table that is missing or invalid.
    """
    folder = Path(root) / version
    if not folder.is_dir():
        versions = ", ".join(sorted(path.name for path in Path(root).glob("v1.0-*"))) or "none"
        raise DataError(folder, "", f"no such folder of tables; versions in {root}: {versions}; choose splits of those")
    required = TABLES + ANNOTATION_TABLES * is_annotated(version)
    missing = [f"{name}.json" for name in required if not (folder / f"{name}.json").is_file()]
    if missing:
        raise DataError(folder, "", f"{', '.join(missing)} missing; unpack the tables again")
    stamps = _stamps(folder)
    suffix = "" if cache is None else "_" + hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    cached = Path(root if cache is None else cache) / f".sightline_tables_{version}{suffix}"
    arrays = _load_cached(cached, stamps, print)
    if arrays is None:
        arrays = _read(folder)
        if save_arrays(cached, arrays | {"format": np.array(FORMAT)} | stamps):
            arrays = _load_cached(cached, stamps, print) or arrays  # mapped files in place of this process's memory
        else:
            print(f"{cached}: cannot be written, so every run parses the tables; --cache-dir names another folder")
    return Tables(arrays)


# ---- cached arrays


def _stamps(folder):
    """The size and date of each table, -1 for a missing one."""
    paths = [folder / f"{name}.json" for name in TABLES + ANNOTATION_TABLES]
    stats = [path.stat() if path.is_file() else None for path in paths]
    sizes, dates = zip(*((stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats))
    return {"stamp_sizes": np.array(sizes, dtype=np.int64), "stamp_dates": np.array(dates, dtype=np.int64)}


def _load_cached(cached, stamps, print):
    """The arrays in the folder `cached`, or None if there are none or the tables have changed."""
    if not cached.is_dir():
        return None
    try:
        arrays = load_arrays(cached)
        same = int(arrays.pop("format")) == FORMAT
        same = same and all(np.array_equal(arrays.pop(name), value) for name, value in stamps.items())
        if not same:
            return None
        if not are_inside(PackedPaths.from_arrays(arrays["frame_paths"], arrays["frame_paths_first"])):
            raise ValueError("a path leads out of the folder of the data")
        return arrays
    except PermissionError:
        print(f"{cached}: no permission to read it, so the tables are parsed again; --cache-dir names another folder")
        return None
    except (OSError, ValueError, LookupError, EOFError):
        print(f"{cached}: damaged, parsing the tables again")
        return None


# ---- parsing


def _read(folder):
    """All arrays by name, from the tables in `folder`."""
    samples, sample_rows = _read_samples(folder)
    calibrations, calibration_rows = _read_calibrations(folder)
    frames, pose_rows = _read_frames(folder, sample_rows, calibration_rows)
    annotations = _read_annotations(folder, sample_rows, samples["sample_time"])
    return samples | calibrations | frames | _read_poses(folder, pose_rows) | annotations


def _records(file: Path) -> Iterator[dict]:
    """The records of a table, one at a time. Raises DataError where it is not a JSON list of records."""
    decode, text, position, number = json.JSONDecoder().raw_decode, "", 0, 0
    try:
        with open_regular(file, "r", encoding="utf-8-sig") as stream:
            text = stream.read(CHUNK).lstrip()
            if not text.startswith("["):
                raise DataError(file, "", "not a JSON list of records; download the tables again")
            position = 1
            while True:
                while position < len(text) and text[position] in " \t\r\n,":
                    position += 1
                if text[position : position + 1] == "]":
                    return
                try:
                    record, position = decode(text, position)
                except ValueError as error:  # usually because the rest of the record has not been read yet
                    more = stream.read(CHUNK)
                    if not more or len(text) - position > CHUNK:
                        reason = f"not valid JSON: {getattr(error, 'msg', error)}; download the tables again"
                        raise DataError(file, f"record {number + 1}", reason) from None
                    text, position = text[position:] + more, 0
                    continue
                number += 1
                yield record
    except RecursionError:
        raise DataError(file, f"record {number + 1}", "is nested too deeply; download the tables again") from None
    except UnicodeDecodeError:
        raise DataError(file, "", "not UTF-8 text; download the tables again") from None
    except OSError as error:
        raise DataError(file, "", f"cannot be read: {error.strerror}") from None


def _for_each(folder, table, read):
    """Call `read(record)` for every record of a table. Missing fields, unknown tokens and values of a wrong type become
    one DataError, after the last record."""
    file, errors = folder / f"{table}.json", []
    if not file.is_file():
        return
    for number, record in enumerate(_records(file), start=1):
        try:
            read(record)
        except KeyError as error:
            errors.append(f"record {number}: no field or no record elsewhere for {error}")
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            errors.append(f"record {number}: not a record of this table: {error}")
    if errors:
        raise DataError(file, "", shortened(errors))


def _numbers(record, field, count):
    values = record[field]
    if len(values) != count:
        raise ValueError(f"{field} has {len(values)} numbers, not {count}")
    return values


def _text(record, field):
    value = record[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} {value!r} is not text")
    os.fsencode(value)  # UnicodeEncodeError for half of a surrogate pair
    return value


def _pose(record):
    """(rotation w, x, y, z, translation) of a record, finite, the rotation not zero. Raises ValueError."""
    rotation, translation = np.array(_numbers(record, "rotation", 4), float), _numbers(record, "translation", 3)
    translation = np.array(translation, float)
    if not (np.isfinite(rotation).all() and np.isfinite(translation).all() and rotation.any()):
        raise ValueError(f"no valid pose: rotation {rotation.tolist()}, translation {translation.tolist()}")
    return rotation, translation


def _append(columns, row):
    for name, value in row.items():
        columns[name].append(value)


def _read_samples(folder):
    """(arrays, {token of a sample: its row})."""
    scene_rows, names, rows, scene, time = {}, [], {}, array("i"), array("q")

    def read_scene(record):
        scene_rows[record["token"]] = len(names)
        names.append(_text(record, "name"))

    def read_sample(record):
        scene.append(scene_rows[record["scene_token"]])
        time.append(record["timestamp"])
        rows[_text(record, "token")] = len(rows)

    _for_each(folder, "scene", read_scene)
    _for_each(folder, "sample", read_sample)
    tokens = PackedPaths(rows)
    arrays = {"scene_names": np.array(names, dtype=str), "sample_scene": np.array(scene, dtype=np.int32)}
    arrays |= {"sample_time": np.array(time, dtype=np.int64)}
    return arrays | {"sample_tokens": tokens.content, "sample_tokens_first": tokens.first}, rows


def _read_calibrations(folder):
    """(arrays, {token of a calibration: (its row, its channel)}); the channel of unused sensors is -1."""
    channels, rows = {}, {}
    rotation, translation, intrinsic = array("d"), array("d"), array("d")

    def read_sensor(record):
        name = record["channel"]
        channels[record["token"]] = CHANNELS.index(name) if name in CHANNELS else -1

    def read_calibration(record):
        channel = channels[record["sensor_token"]]
        rows[record["token"]] = len(rows), channel
        for values, added in zip((rotation, translation), _pose(record)):
            values.extend(added)
        is_camera = 0 <= channel < len(CAMERAS)
        for line in _numbers(record, "camera_intrinsic", 3) if is_camera else [[0, 0, 0]] * 3:
            if len(line) != 3:
                raise ValueError(f"camera_intrinsic has a row of {len(line)} numbers, not 3")
            intrinsic.extend(line)

    _for_each(folder, "sensor", read_sensor)
    _for_each(folder, "calibrated_sensor", read_calibration)
    return {
        "calibration_rotation": np.array(rotation).reshape(-1, 4),
        "calibration_translation": np.array(translation).reshape(-1, 3),
        "intrinsic": np.array(intrinsic).reshape(-1, 3, 3),
    }, rows


def _read_frames(folder, sample_rows, calibration_rows):
    """(arrays, {token of a pose: its row}) of the cameras' key frames and of all radar sweeps."""
    rows, pose_rows, previous, paths = {}, {}, [], []
    types = {"sample": np.int32, "calibration": np.int32, "pose": np.int32, "channel": np.int8, "key": bool}
    types |= {"height": np.int16, "width": np.int16}
    columns = {name: array("i") for name in types}

    def read_frame(record):
        calibration, channel = calibration_rows[record["calibrated_sensor_token"]]
        is_key_frame = bool(record["is_key_frame"])
        if channel < 0 or (channel < len(CAMERAS) and not is_key_frame):
            return
        pose = pose_rows.setdefault(record["ego_pose_token"], len(pose_rows))
        row = {"sample": sample_rows[record["sample_token"]], "calibration": calibration, "pose": pose}
        row |= {"channel": channel, "key": is_key_frame, "height": record["height"], "width": record["width"]}
        _append(columns, row)
        if not all(0 <= record[side] < 1 << 15 for side in ("height", "width")):
            raise ValueError(f"the image cannot be {record['width']} x {record['height']}")
        if not is_inside(record["filename"]):
            raise ValueError(f"filename {record['filename']} is not in the folder of the data")
        paths.append(os.fsencode(record["filename"]))
        previous.append(_text(record, "prev"))
        rows[record["token"]] = len(rows)

    _for_each(folder, "sample_data", read_frame)
    arrays = {f"frame_{name}": np.array(columns[name], dtype) for name, dtype in types.items()}
    arrays["frame_size"] = np.stack([arrays.pop("frame_height"), arrays.pop("frame_width")], axis=1)
    arrays["frame_previous"] = np.array([rows.get(token, -1) for token in previous], dtype=np.int32)
    packed = PackedBytes(paths)
    return arrays | {"frame_paths": packed.content, "frame_paths_first": packed.first}, pose_rows


def _read_poses(folder, pose_rows):
    """Arrays of the poses in the order of `pose_rows`. Raises DataError where one is missing."""
    rotation, translation = np.full((len(pose_rows), 4), np.nan), np.full((len(pose_rows), 3), np.nan)
    is_missing = np.ones(len(pose_rows), dtype=bool)

    def read_pose(record):
        row = pose_rows.get(record["token"])
        if row is not None:
            rotation[row], translation[row] = _pose(record)
            is_missing[row] = False

    _for_each(folder, "ego_pose", read_pose)
    if is_missing.any():
        example = next(token for token, row in pose_rows.items() if is_missing[row])
        reason = f"{int(is_missing.sum())} poses that sample_data.json refers to are missing, such as {example}"
        raise DataError(folder / "ego_pose.json", "", f"{reason}; unpack the tables again")
    return {"pose_rotation": rotation, "pose_translation": translation}


def _read_instances(folder):
    """({token of an instance: its label, -1 if of no class}, {token of an attribute: its index, -1 if unknown})."""
    category_labels, labels, attributes = {}, {}, {}

    def read_category(record):
        name = CLASS_OF_CATEGORY.get(record["name"])
        category_labels[record["token"]] = -1 if name is None else CLASSES.index(name)

    def read_instance(record):
        labels[record["token"]] = category_labels[record["category_token"]]

    def read_attribute(record):
        name = record["name"]
        attributes[record["token"]] = ATTRIBUTES.index(name) if name in ATTRIBUTES else -1

    _for_each(folder, "category", read_category)
    _for_each(folder, "instance", read_instance)
    _for_each(folder, "attribute", read_attribute)
    return labels, attributes


def _read_annotations(folder, sample_rows, sample_time):
    """Arrays of the annotations of the ten classes, sorted by sample."""
    labels, attributes = _read_instances(folder)
    types = {"sample": np.int32, "label": np.int8, "attribute": np.int8, "visibility": np.int8, "points": np.int32}
    types["record"] = np.int32
    columns = {name: array("i") for name in types}
    center, rotation, size = array("d"), array("f"), array("f")
    rows, links, numbers = {}, [], itertools.count(1)

    def read_annotation(record):
        number = next(numbers)
        label, level, tokens = labels[record["instance_token"]], record["visibility_token"], record["attribute_tokens"]
        if label < 0:
            return
        row = {"sample": sample_rows[record["sample_token"]], "label": label, "record": number}
        row["attribute"] = attributes[tokens[0]] if tokens else -1
        row["visibility"] = int(level) if level in ("1", "2", "3", "4") else 0
        row["points"] = record["num_lidar_pts"] + record["num_radar_pts"]
        _append(columns, row)
        center.extend(_numbers(record, "translation", 3))
        rotation.extend(_numbers(record, "rotation", 4))
        size.extend(_numbers(record, "size", 3))
        links.append((_text(record, "prev"), _text(record, "next")))
        rows[record["token"]] = len(rows)

    _for_each(folder, "sample_annotation", read_annotation)
    arrays = {name: np.array(columns[name], dtype) for name, dtype in types.items()}
    sample, record = arrays.pop("sample"), arrays.pop("record")
    center, rotation, size = (np.array(values).reshape(-1, n) for values, n in ((center, 3), (rotation, 4), (size, 3)))
    invalid, reasons = _find_invalid(center, rotation, size)
    neighbors = np.array([[rows.get(token, -1) for token in pair] for pair in links], dtype=np.int64).reshape(-1, 2)
    finite_center = np.where(np.isfinite(center), center, np.nan)
    velocity = _velocity(finite_center, sample_time[sample], neighbors).astype(np.float32)
    arrays |= {"center": center, "rotation": rotation, "size": size, "velocity": velocity}
    order = np.argsort(sample, kind="stable")
    order = order[~invalid[order]]
    arrays = {f"annotation_{name}": value[order] for name, value in arrays.items()}
    arrays["annotation_first"] = np.searchsorted(sample[order], np.arange(len(sample_time) + 1))
    arrays |= {"invalid_record": record[invalid], "invalid_sample": sample[invalid]}
    return arrays | {"invalid_reason": np.array(reasons, dtype=str)}


def _find_invalid(center, rotation, size):
    """(bool [A]: whether center [A,3], rotation [A,4] and size [A,3] are no valid box, a reason for each True)."""
    columns = {"size": size, "rotation": rotation, "translation": center}
    valid = {name: np.isfinite(values).all(axis=1) for name, values in columns.items()}
    valid["size"] &= (size > 0).all(axis=1)
    valid["rotation"] &= (rotation != 0).any(axis=1)
    invalid, reasons = ~np.all(list(valid.values()), axis=0), []
    for row in np.flatnonzero(invalid):
        wrong = [name for name in columns if not valid[name][row]]
        values = [f"{name} {', '.join(f'{value:g}' for value in columns[name][row])}" for name in wrong]
        reasons.append(f"invalid box: {' and '.join(values)}")
    return invalid, reasons


def _velocity(center, time, neighbors):
    """float64 [A,3] in m/s: displacement from the previous annotation of the object to the next one (or from or to this
    one where only one exists) over the time between; NaN without either or where the time is too long.

    neighbors [A,2]: rows of the previous and the next annotation, or -1
    """
    own = np.arange(len(center))[:, None]
    before, after = np.where(neighbors < 0, own, neighbors).T
    seconds = 1e-6 * (time[after] - time[before])
    known = (seconds > 0) & (seconds <= MAX_GAP * (neighbors >= 0).sum(axis=1))
    velocity = (center[after] - center[before]) / np.where(known, seconds, 1)[:, None]
    return np.where(known[:, None], velocity, np.nan)
