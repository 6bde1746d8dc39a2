"""The tables of nuScenes, read once into flat arrays.

    ROOT/{version}/*.json    v1.0-mini, v1.0-trainval, v1.0-test: lists of records that point at each other by token

Kept is what cameras and radars need: the cameras' key frames, every radar sweep, their poses, all annotations of the
ten detection classes. A file is read record by record, never whole: sample_data of v1.0-trainval alone would be
gigabytes of Python objects. The arrays are kept in one .npz for as long as no table has another size or date, and stay
in it: what is not looked at takes no memory, and workers and several data sets share what is.
"""

import hashlib
import itertools
import json
import os
import zipfile
from array import array
from pathlib import Path

import numpy as np

from data.boxes import Paths
from data.errors import DataError
from data.files import NAMED, keep_arrays, kept_arrays

CLASSES = (
    *("car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle"),
    *("traffic_cone", "barrier"),
)
CLASS_OF = {  # category of the tables -> class; other categories are not detected
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
ATTRIBUTES = (
    *("cycle.with_rider", "cycle.without_rider"),
    *("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down"),
    *("vehicle.moving", "vehicle.parked", "vehicle.stopped"),
)
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
CHANNELS = CAMERAS + RADARS
TABLES = ("scene", "sample", "sensor", "calibrated_sensor", "sample_data", "ego_pose")
ANNOTATED = ("category", "attribute", "instance", "sample_annotation")  # v1.0-test may do without
FORMAT = 2  # of the kept arrays; with another number they are made anew
PIECE = 1 << 24  # characters read at once; no record is longer
LONGEST_GAP = 1.5  # seconds between two annotations that still give a velocity, as the devkit has it


class Tables:
    """Arrays of one version. S samples, F frames (files of a sensor), C calibrations, P poses, A annotations.

    scene_names        str [scenes]
    sample_tokens      Paths [S];  sample_scene int32 [S], sample_time int64 [S] in microseconds
    frame_paths        Paths [F], relative to the root;  frame_size int16 [F,2] (h, w)
    frame_sample, frame_calibration, frame_pose int32 [F];  frame_previous int32 [F], a frame or -1
    frame_channel      int8 [F], position in CHANNELS;  frame_key bool [F]
    calibration_rotation float64 [C,4], calibration_translation [C,3]: sensor -> vehicle, w x y z and metres
    intrinsic          float64 [C,3,3], zeros for a radar
    pose_rotation      float64 [P,4], pose_translation [P,3]: vehicle -> global
    annotation_first   int64 [S+1]: annotations first[s] to first[s + 1] are those of sample s
    annotation_label, _attribute (-1 without), _visibility (1..4, 0 unknown) int8 [A];  annotation_points int32 [A]
    annotation_center float64 [A,3], _rotation float32 [A,4]: object -> global;  _size float32 [A,3] w, l, h
    annotation_velocity float32 [A,3] in m/s, global; NaN where unknown
    impossible_record  int32 [X], from 1, of annotations that no box can be, none of the A;  _sample int32, _reason str
    """

    def __init__(self, arrays):
        for name, value in arrays.items():
            if not name.endswith("_first") or name == "annotation_first":
                setattr(self, name, value)
        for name in ("sample_tokens", "frame_paths"):
            setattr(self, name, Paths([]))
            getattr(self, name).content, getattr(self, name).first = arrays[name], arrays[f"{name}_first"]


def load(root, version, cache=None, say=print):
    """The Tables of `version` in `root`.

    cache   folder for the kept arrays; None keeps them in `root`

    Raises DataError for a table that lacks or cannot be understood.
    """
    folder = Path(root) / version
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in Path(root).glob("v1.0-*"))) or "none"
        raise DataError(folder, "", f"no such folder of tables; versions found there: {have}")
    optional = ANNOTATED if version.endswith("test") else ()
    lack = [name for name in TABLES + ANNOTATED if name not in optional and not (folder / f"{name}.json").is_file()]
    if lack:
        raise DataError(folder, "", f"lacks {', '.join(f'{name}.json' for name in lack)}; unpack the tables anew")
    stamps = _stamps(folder)
    mark = "" if cache is None else "_" + hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    file = Path(root if cache is None else cache) / f".sightline_tables_{version}{mark}.npz"
    arrays = _kept(file, stamps, say)
    if arrays is None:
        arrays = _read(folder)
        if keep_arrays(file, arrays | {"format": FORMAT} | stamps):
            arrays = _kept(file, stamps, say) or arrays  # in the file's pages instead of in this process's memory
        else:
            say(f"{file}: could not be written, so the tables are read anew each time; name a folder by --cache-dir")
    return Tables(arrays)


# ---- keeping the arrays


def _stamps(folder):
    """The size and date of each table."""
    paths = [folder / f"{name}.json" for name in TABLES + ANNOTATED]
    found = [os.stat(path) if path.is_file() else None for path in paths]
    return {
        "stamp_sizes": np.array([-1 if stat is None else stat.st_size for stat in found], dtype=np.int64),
        "stamp_dates": np.array([-1 if stat is None else stat.st_mtime_ns for stat in found], dtype=np.int64),
    }


def _kept(file, stamps, say):
    """The arrays in `file`, or None where there are none or the tables are no longer the same."""
    if not file.is_file():
        return None
    try:
        arrays = kept_arrays(file)
        same = int(arrays.pop("format")) == FORMAT
        same = same and all(np.array_equal(arrays.pop(name), value) for name, value in stamps.items())
        return arrays if same else None
    except PermissionError:
        say(f"{file}: may not be read, so the tables are read anew; mend its rights or name a folder by --cache-dir")
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        say(f"{file}: damaged, reading the tables anew")
        return None


# ---- reading


def _read(folder):
    """All arrays by name, from the tables in `folder`."""
    scenes, samples = _read_samples(folder)
    calibrations, channels = _read_calibrations(folder)
    frames, poses = _read_frames(folder, samples["rows"], channels)
    arrays = samples["arrays"] | calibrations | frames | _read_poses(folder, poses)
    arrays["scene_names"] = np.array(scenes, dtype=str)
    return arrays | _read_annotations(folder, samples["rows"], arrays["sample_time"])


def _records(file):
    """The records of a table, one after the other. Raises DataError where it is no JSON list of records."""
    decode, text, at, number = json.JSONDecoder().raw_decode, "", 0, 0
    try:
        with open(file, encoding="utf-8-sig") as stream:
            text = stream.read(PIECE).lstrip()
            if not text.startswith("["):
                raise DataError(file, "", "is no JSON list of records; fetch the tables anew")
            at = 1
            while True:
                while at < len(text) and text[at] in " \t\r\n,":
                    at += 1
                if text[at : at + 1] == "]":
                    return
                try:
                    record, at = decode(text, at)
                except ValueError as error:  # mostly: the rest of the record is not read yet
                    more = stream.read(PIECE)
                    if not more or len(text) - at > PIECE:
                        reason = f"not valid JSON: {error}; fetch the tables anew"
                        raise DataError(file, f"record {number + 1}", reason) from None
                    text, at = text[at:] + more, 0
                    continue
                number += 1
                yield record
    except UnicodeDecodeError:
        raise DataError(file, "", "not UTF-8 text; fetch the tables anew") from None
    except OSError as error:
        raise DataError(file, "", f"cannot be read: {error.strerror}") from None


def _each(folder, table, take):
    """`take(record)` for every record of a table; lacking fields and unknown tokens become one DataError."""
    file, faults = folder / f"{table}.json", []
    if not file.is_file():
        return
    for number, record in enumerate(_records(file), start=1):
        try:
            take(record)
        except KeyError as error:
            faults.append((f"record {number}", f"has no field or no record elsewhere for {error}"))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            faults.append((f"record {number}", f"is no such record: {error}"))
    if faults:
        (place, first), more = faults[0], [" ".join(fault) for fault in faults[1:NAMED]]
        more += [f"{len(faults) - NAMED} more"] * (len(faults) > NAMED)
        raise DataError(file, place, "; ".join([first, *more]))


def _matrix(values, width, dtype=np.float64):
    return np.frombuffer(values, dtype=values.typecode).astype(dtype).reshape(-1, width)


def _column(values, dtype):
    return np.frombuffer(values, dtype=values.typecode).astype(dtype)


def _numbers(record, field, count):
    values = record[field]
    if len(values) != count:
        raise ValueError(f"{field} has {len(values)} numbers, not {count}")
    return values


def _read_samples(folder):
    """(scene names, {"rows": token -> sample, "arrays"})."""
    scene_of, rows, scene, time = {}, {}, array("i"), array("q")
    names = []

    def take_scene(record):
        scene_of[record["token"]] = len(names)
        names.append(record["name"])

    def take_sample(record):
        scene.append(scene_of[record["scene_token"]])
        time.append(record["timestamp"])
        rows[record["token"]] = len(rows)

    _each(folder, "scene", take_scene)
    _each(folder, "sample", take_sample)
    tokens = Paths(rows)
    arrays = {"sample_scene": _column(scene, np.int32), "sample_time": _column(time, np.int64)}
    arrays |= {"sample_tokens": tokens.content, "sample_tokens_first": tokens.first}
    return names, {"rows": rows, "arrays": arrays}


def _read_calibrations(folder):
    """(arrays, token -> (row, channel)); the channel is -1 for sensors that are not used."""
    channel_of, rows = {}, {}
    rotation, translation, intrinsic = array("d"), array("d"), array("d")

    def take_sensor(record):
        known = record["channel"] in CHANNELS
        channel_of[record["token"]] = CHANNELS.index(record["channel"]) if known else -1

    def take_calibration(record):
        channel = channel_of[record["sensor_token"]]
        rows[record["token"]] = len(rows), channel
        rotation.extend(_numbers(record, "rotation", 4))
        translation.extend(_numbers(record, "translation", 3))
        camera = 0 <= channel < len(CAMERAS)
        lines = _numbers(record, "camera_intrinsic", 3) if camera else [[0, 0, 0]] * 3
        intrinsic.extend(value for line in lines for value in line)

    _each(folder, "sensor", take_sensor)
    _each(folder, "calibrated_sensor", take_calibration)
    arrays = {"calibration_rotation": _matrix(rotation, 4), "calibration_translation": _matrix(translation, 3)}
    return arrays | {"intrinsic": _matrix(intrinsic, 9).reshape(-1, 3, 3)}, rows


def _read_frames(folder, samples, channels):
    """(arrays, token of a pose -> its row) of the cameras' key frames and all radar sweeps."""
    rows, poses, previous, paths = {}, {}, [], []
    columns = {name: array("i") for name in ("sample", "calibration", "pose", "channel", "key", "height", "width")}

    def take(record):
        calibration, channel = channels[record["calibrated_sensor_token"]]
        if channel < 0 or (channel < len(CAMERAS) and not record["is_key_frame"]):
            return
        pose = poses.setdefault(record["ego_pose_token"], len(poses))
        values = samples[record["sample_token"]], calibration, pose, channel, bool(record["is_key_frame"])
        for column, value in zip(columns.values(), (*values, record["height"], record["width"])):
            column.append(value)
        paths.append(os.fsencode(record["filename"]))
        previous.append(record["prev"])
        rows[record["token"]] = len(rows)

    _each(folder, "sample_data", take)
    kinds = {"channel": np.int8, "key": bool, "height": np.int16, "width": np.int16}
    arrays = {f"frame_{name}": _column(column, kinds.get(name, np.int32)) for name, column in columns.items()}
    arrays["frame_size"] = np.stack([arrays.pop("frame_height"), arrays.pop("frame_width")], axis=1)
    arrays["frame_previous"] = np.array([rows.get(token, -1) for token in previous], dtype=np.int32)
    arrays["frame_paths"] = np.frombuffer(b"".join(paths), dtype=np.uint8)
    arrays["frame_paths_first"] = np.cumsum([0] + [len(path) for path in paths], dtype=np.int64)
    return arrays, poses


def _read_poses(folder, poses):
    """Arrays of the poses in the order of the rows `poses`. Raises DataError where one lacks."""
    values, have = np.full((len(poses), 7), np.nan), np.zeros(len(poses), dtype=bool)

    def take(record):
        row = poses.get(record["token"])
        if row is not None:
            values[row, :4], values[row, 4:] = _numbers(record, "rotation", 4), _numbers(record, "translation", 3)
            have[row] = True

    _each(folder, "ego_pose", take)
    if not have.all():
        lack = next(token for token, row in poses.items() if not have[row])
        reason = f"lacks {int((~have).sum())} poses that sample_data.json names, such as {lack}"
        raise DataError(folder / "ego_pose.json", "", f"{reason}; unpack the tables anew")
    return {"pose_rotation": values[:, :4].copy(), "pose_translation": values[:, 4:].copy()}


def _read_annotations(folder, samples, sample_time):
    """Arrays of the annotations that are of a class, sorted by their samples."""
    label_of, attribute_of, label_of_instance, rows, links = {}, {}, {}, {}, []
    columns = {name: array("i") for name in ("sample", "label", "attribute", "visibility", "points", "record")}
    numbers = itertools.count(1)
    center, rotation, size = array("d"), array("f"), array("f")

    def take_category(record):
        name = CLASS_OF.get(record["name"])
        label_of[record["token"]] = -1 if name is None else CLASSES.index(name)

    def take_attribute(record):
        name = record["name"]
        attribute_of[record["token"]] = ATTRIBUTES.index(name) if name in ATTRIBUTES else -1

    def take_instance(record):
        label_of_instance[record["token"]] = label_of[record["category_token"]]

    def take(record):
        number = next(numbers)
        label, level = label_of_instance[record["instance_token"]], record["visibility_token"]
        if label < 0:
            return
        named = record["attribute_tokens"]
        seen = record["num_lidar_pts"] + record["num_radar_pts"]
        attribute = attribute_of[named[0]] if named else -1
        visibility = int(level) if level in ("1", "2", "3", "4") else 0
        values = samples[record["sample_token"]], label, attribute, visibility, seen, number
        for column, value in zip(columns.values(), values):
            column.append(value)
        center.extend(_numbers(record, "translation", 3))
        rotation.extend(_numbers(record, "rotation", 4))
        size.extend(_numbers(record, "size", 3))
        links.append((record["prev"], record["next"]))
        rows[record["token"]] = len(rows)

    for table, function in (
        *(("category", take_category), ("attribute", take_attribute), ("instance", take_instance)),
        ("sample_annotation", take),
    ):
        _each(folder, table, function)
    neighbours = np.array([[rows.get(token, -1) for token in pair] for pair in links], dtype=np.int64).reshape(-1, 2)
    sample, center, number = _column(columns.pop("sample"), np.int32), _matrix(center, 3), columns.pop("record")
    arrays = {name: _column(column, np.int32 if name == "points" else np.int8) for name, column in columns.items()}
    arrays |= {"center": center, "rotation": _matrix(rotation, 4, np.float32), "size": _matrix(size, 3, np.float32)}
    bad, reasons = _impossible(center, arrays["rotation"], arrays["size"])
    place = np.where(np.isfinite(center), center, np.nan)
    arrays["velocity"] = _velocity(place, sample_time[sample], neighbours).astype(np.float32)
    order = np.argsort(sample, kind="stable")
    order = order[~bad[order]]
    arrays = {f"annotation_{name}": value[order] for name, value in arrays.items()}
    arrays["annotation_first"] = np.searchsorted(sample[order], np.arange(len(sample_time) + 1))
    arrays |= {"impossible_record": _column(number, np.int32)[bad], "impossible_sample": sample[bad]}
    return arrays | {"impossible_reason": np.array(reasons, dtype=str)}


def _impossible(center, rotation, size):
    """(bool [A]: can no box have this center [A,3], rotation [A,4] and size [A,3]?; why not, for each True a text)."""
    columns = {"size": size, "rotation": rotation, "translation": center}
    possible = {name: np.isfinite(values).all(axis=1) for name, values in columns.items()}
    possible["size"] &= (size > 0).all(axis=1)
    possible["rotation"] &= (rotation != 0).any(axis=1)
    bad, reasons = ~np.all(list(possible.values()), axis=0), []
    for row in np.flatnonzero(bad):
        wrong = [name for name in columns if not possible[name][row]]
        values = [f"{name} {', '.join(f'{value:g}' for value in columns[name][row])}" for name in wrong]
        reasons.append(f"no box: its {' and its '.join(values)}")
    return bad, reasons


def _velocity(center, time, neighbours):
    """float64 [A,3] in m/s: the way from the annotation before to the one after, or from or to this one where only one
    is there, over the time between; NaN without either or over too long a time. `neighbours` [A,2] are rows or -1."""
    here = np.arange(len(center))[:, None]
    before, after = np.where(neighbours < 0, here, neighbours).T
    seconds = 1e-6 * (time[after] - time[before])
    longest = LONGEST_GAP * (neighbours >= 0).sum(axis=1)
    known = (seconds > 0) & (seconds <= longest)
    way = (center[after] - center[before]) / np.where(known, seconds, 1)[:, None]
    return np.where(known[:, None], way, np.nan)
