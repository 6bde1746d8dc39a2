"""Predictions in the formats of predict.py's JSON files: dicts of plain values, and files of any number of them.

categories   of the classes in label order: {"id", "name"}
info         about an image: {"id", "file_name"} and, of a video, "frame"
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch

from ops import rle
from utils import files
from utils.errors import DataError, UsageError
from utils.files import open_regular
from utils.labels import first_names
from utils.nuscenes import ATTRIBUTES


class JsonList:
    """A JSON list in a file, or one within an object, of any length: rows are written as they come.

    with JsonList(path, before='{"images": ', after="}") as rows: rows.add(row)

    Until the block ends the file has the suffix .tmp; if an error ends it, there will be no file. WriteError if it
    cannot be written.
    """

    def __init__(self, path: Path, before: str = "", after: str = ""):
        self.path, self.count = path, 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._before, self._after = before + "[", "]" + after

    def add(self, *rows: Mapping) -> None:
        """Append rows of plain values."""
        for row in rows:
            with files.writing(self.path):
                self._file.write((",\n" if self.count else "\n") + json.dumps(row))
            self.count += 1

    def __enter__(self):
        with files.writing(self.path):
            self._file = open(self._temporary, "w", encoding="utf-8")
            self._file.write(self._before)
        return self

    def __exit__(self, kind, error, trace):
        try:
            with files.writing(self.path):
                with self._file:
                    if kind is None:
                        self._file.write("\n" * bool(self.count) + self._after)
                if kind is None:
                    self._temporary.replace(self.path)
        finally:
            files.remove(self._temporary)


def images_json(path: Path, categories: Sequence[Mapping], info: Mapping) -> JsonList:
    """The list of images of a COCO file with these categories and "info", and without annotations."""
    listed = json.dumps([category for category in categories if category["id"] is not None])
    return JsonList(path, f'{{"info": {json.dumps(info)}, "categories": {listed}, "annotations": [], "images": ', "}")


def categories(names: Sequence[str]) -> list[dict]:
    """Categories of classes: k + 1 is label k."""
    return [{"id": label + 1, "name": name} for label, name in enumerate(names)]


def coco_ids(
    path: str | Path, images: Sequence[Path | str], names: Sequence[str]
) -> tuple[dict[Path | str, int], list[dict]]:
    """({image: id}, categories) of a COCO annotation file.

    images   files, found by name, and by their folders where several images have that name
    names    of the classes. The id of a class that is not in the file is None

    DataError if it is not such a file, UsageError if an image is not in it, or no class.
    """
    known, ids_of = _read_annotations(path)
    ids = {image: _coco_id(Path(image), known) for image in images}
    missing = [str(image) for image, number in ids.items() if number is None]
    if missing:
        listed = f"{len(missing)} of {len(ids)} inputs are not in it: {first_names(missing)}"
        raise UsageError(f"--annotations {path}: {listed}; give its images only")
    if len(set(ids.values())) < len(ids):
        raise UsageError(f"--annotations {path}: several of the inputs are the same image in it; give each once")
    if not ids_of.keys() & set(names):
        classes = f"{first_names(names)} are not among its {first_names(list(ids_of))}"
        raise UsageError(f"--annotations {path}: the network's classes {classes}; give the file of its data set")
    return ids, [{"id": ids_of.get(name), "name": name} for name in names]


def _read_annotations(path):
    """({name of an image without folders: [(parts of its path, id)]}, {name of a category: id})."""
    try:
        with open_regular(path, "r", encoding="utf-8") as file:
            contents = json.load(file)
        images = defaultdict(list)
        for image in contents["images"]:
            name = PurePosixPath(image["file_name"])
            images[name.name].append((name.parts, int(image["id"])))
        return images, {category["name"]: int(category["id"]) for category in contents["categories"]}
    except OSError as error:
        raise DataError(path, "", f"{error.strerror}; give a COCO annotation file") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        reason = "is not a COCO annotation file: JSON with images (file_name, id) and categories (name, id)"
        raise DataError(path, "", reason) from None


def _coco_id(path, known):
    images = known.get(path.name, [])
    if len(images) > 1:
        parts = path.resolve().parts
        images = [(tail, number) for tail, number in images if parts[-len(tail) :] == tail]
    return images[0][1] if len(images) == 1 else None


def known(labels: torch.Tensor, categories: Sequence[Mapping], path: str | Path) -> torch.Tensor:
    """The `labels` int64 [K] whose categories have an id; prints which have none in the annotations at `path`."""
    unknown = [categories[label]["name"] for label in labels.tolist() if categories[label]["id"] is None]
    if unknown:
        print(f"{len(unknown)} classes are not in {path} and left out: {first_names(unknown)}")
    return labels[[categories[label]["id"] is not None for label in labels.tolist()]]


def coco(detections: Mapping[str, torch.Tensor], categories: Sequence[Mapping], info: Mapping) -> list[dict]:
    """COCO's results format, one dict per detection, with the class name and the file added.

    detections   boxes [N,4] xyxy in pixels of the file, labels and scores [N] and, if there are any, masks bool
                 [N,H,W]
    """
    columns = _columns(detections, categories)
    if "masks" in detections:
        size, runs = list(detections["masks"].shape[1:]), rle.encode(detections["masks"])
        columns["segmentation"] = [{"size": size, "counts": counts.decode("ascii")} for counts in runs]
    return _rows(columns, info)


def boxes_3d(detections: Mapping[str, torch.Tensor], categories: Sequence[Mapping], info: Mapping) -> list[dict]:
    """One dict per detection of a camera image: as in `coco`, and the 3D box in the camera's frame (x right, y down, z
    forward): "center" x, y, z and "size" h, w, l in meters, "yaw" about the y axis in radians (0: facing along x),
    "velocity" along x, y, z in m/s, "attribute".

    detections   see ops.decode3d, boxes in pixels of the file
    """
    columns = _columns(detections, categories)
    for name, field in (("center", "center"), ("size", "dims"), ("velocity", "velocity")):
        columns[name] = [[round(value, 3) for value in row] for row in detections[field].tolist()]
    columns["yaw"] = [round(value, 4) for value in detections["yaw"].tolist()]
    columns["attribute"] = ["" if index < 0 else ATTRIBUTES[index] for index in detections["attribute"].tolist()]
    return _rows(columns, info)


def classification(predictions: Mapping[str, torch.Tensor], names: Sequence[str], info: Mapping) -> dict:
    """Labels and scores [N] of an image: {"image_id", "file_name", "predictions": [{"label", "name", "score"}]}."""
    rows = zip(predictions["labels"].tolist(), predictions["scores"].tolist())
    predicted = [{"label": label, "name": names[label], "score": round(score, 5)} for label, score in rows]
    return {"image_id": info["id"], **_file(info), "predictions": predicted}


def _columns(detections, categories):
    low, high = detections["boxes"].double().split(2, dim=1)
    labels = detections["labels"].tolist()
    return {
        "category_id": [categories[label]["id"] for label in labels],
        "bbox": [[round(value, 4) for value in box] for box in torch.cat([low, high - low], dim=1).tolist()],
        "score": [round(score, 6) for score in detections["scores"].tolist()],
        "category_name": [categories[label]["name"] for label in labels],
    }


def _rows(columns, info):
    return [{"image_id": info["id"], **dict(zip(columns, row)), **_file(info)} for row in zip(*columns.values())]


def _file(info):
    return {name: info[name] for name in ("file_name", "frame") if name in info}
