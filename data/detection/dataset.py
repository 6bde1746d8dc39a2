"""Images with boxes, in flat arrays.

Every 2D layout (VOC, Open Images, COCO, csv, PennFudanPed) is parsed into `Annotations`, from which a `BoxDataset` is
made. Its arrays hold no Python object per box or per image: forked workers share their memory pages for good, because
no reference count is ever written to them, so memory does not grow with the number of workers.
"""

import copy
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

from data.classes import balanced_weights
from data.images import image_size, read_image
from data.packed import PackedBytes, PackedPaths
from data.seeding import SeededDataset
from ops import rle
from utils.coco import CocoTruth
from utils.errors import DataError


class Annotations:
    """The images, objects and errors that a parser reads from the files of one split.

    masks      every object has a mask as run lengths (bytes, see ops.rle)
    coco       every object has the bbox and area of a COCO file; `image_ids` and `category_ids` are that file's
    relative   boxes are fractions of the image (Open Images), not pixels

    The parser sets `classes`, the class names of the data set in label order, and appends a DataError to `errors` for
    everything wrong in the files, or to `class_errors` for what is wrong only if `classes` are used.
    """

    def __init__(self, masks: bool = False, coco: bool = False, relative: bool = False):
        self.paths, self.sizes, self.relative = [], array("i"), relative
        self.names = {}  # class name -> provisional label, in order of appearance
        self.image, self.boxes, self.labels, self.ignore = array("q"), array("f"), array("i"), array("b")
        self.masks = [] if masks else None
        self.image_ids, self.bbox, self.area = (array("q"), array("d"), array("d")) if coco else (None, None, None)
        self.category_ids = {}  # class name -> id
        self.classes, self.class_errors, self.errors = [], [], []

    def add_image(self, path: str | Path, size: tuple[int, int] = (0, 0)) -> int:
        """Add an image with its annotated (h, w), (0, 0) if boxes are relative; returns its position."""
        self.paths.append(str(path))
        self.sizes.extend(size)
        return len(self.paths) - 1

    def add_object(
        self,
        image: int,
        box: Iterable[float],
        name: str,
        ignore: bool = False,
        mask: bytes | None = None,
        bbox: Sequence[float] = (),
        area: float = 0.0,
    ) -> None:
        """Add an object of the image at position `image`; objects may come in any order."""
        if self.masks is not None:
            self.masks.append(mask)
        if self.bbox is not None:
            self.bbox.extend(bbox)
            self.area.append(area)
        self.image.append(image)
        self.boxes.extend(box)
        self.labels.append(self.names.setdefault(name, len(self.names)))
        self.ignore.append(ignore)

    def size(self, image: int) -> tuple[int, int]:
        """(h, w) of the image at position `image`."""
        return tuple(self.sizes[2 * image : 2 * image + 2])


def clip_box(box: Sequence[float], size: tuple[int, int]) -> array | None:
    """The box (x1, y1, x2, y2) clipped to an image of `size` (h, w), as float32; None if no area is left.

    The test is made on float32, the type in which boxes are stored: rounding must not leave a box without area.
    """
    (x1, y1, x2, y2), (height, width) = box, size
    clipped = array("f", (max(0.0, x1), max(0.0, y1), min(x2, width), min(y2, height)))
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


class BoxDataset(SeededDataset):
    """Images with boxes; `dataset[i]` and `dataset[epoch, i]` meet the contract in data/__init__.py.

    annotations   filled by a parser
    classes       names in label order; None: those of the annotations. Objects of other classes are left out and
                  counted in `unknown` (name -> objects)
    transform     (image tv_tensors.Image, target) -> (image, target), or None
    seed          of the augmentation

    `masks` are the objects' run lengths, a few hundred bytes each, decoded by `dataset[i]`; None without masks.
    `image_ids` int64 [N] and `category_ids` int64 [K] are the ids in a COCO file (-1 for a class that it does not
    have); None for other layouts. Raises DataError for an image that cannot be read or does not have its annotated
    size.
    """

    def __init__(
        self,
        annotations: Annotations,
        classes: Sequence[str] | None = None,
        transform: Callable | None = None,
        seed: int = 0,
    ):
        self.classes = list(annotations.classes if classes is None else classes)
        self.relative, self.transform, self.seed = annotations.relative, transform, seed
        self.paths = PackedPaths(annotations.paths)
        self.sizes = np.array(annotations.sizes, dtype=np.int32).reshape(-1, 2)
        label_of = {name: label for label, name in enumerate(self.classes)}
        provisional = np.array(annotations.labels, dtype=np.int64)
        labels = np.array([label_of.get(name, -1) for name in annotations.names], dtype=np.int32)[provisional]
        counts = np.bincount(provisional[labels < 0], minlength=len(annotations.names))
        self.unknown = {name: int(count) for name, count in zip(annotations.names, counts) if count}
        image = np.array(annotations.image, dtype=np.int64)
        order = np.argsort(image, kind="stable")
        order = order[labels[order] >= 0]
        self.offsets = np.searchsorted(image[order], np.arange(len(self.paths) + 1))  # objects of image i: [i] to [i+1]
        self.boxes = np.array(annotations.boxes, dtype=np.float32).reshape(-1, 4)[order]
        self.labels = labels[order]
        self.ignore = np.array(annotations.ignore, dtype=bool)[order]
        self.masks = None if annotations.masks is None else PackedBytes(annotations.masks[row] for row in order)
        self.image_ids = self.category_ids = self.bbox = self.area = None
        if annotations.image_ids is not None:
            self.image_ids = np.array(annotations.image_ids, dtype=np.int64)
            ids = [annotations.category_ids.get(name, -1) for name in self.classes]
            self.category_ids = np.array(ids, dtype=np.int64)
            self.bbox = np.array(annotations.bbox, dtype=np.float64).reshape(-1, 4)[order]
            self.area = np.array(annotations.area, dtype=np.float64)[order]

    def __len__(self) -> int:
        return len(self.paths)

    def image_path(self, index: int) -> str:
        return self.paths[index]

    def annotation(self, index: int, size: tuple[int, int] = (1, 1)) -> dict:
        """The target of image `index` in pixels of the file, without reading it.

        Relative boxes are multiplied by `size` (h, w), which boxes in pixels do not need. `masks`, if there are any,
        are a list of COCO's run lengths here, {"size": [h, w], "counts": bytes}, not pixels.
        """
        rows = slice(self.offsets[index], self.offsets[index + 1])
        boxes = torch.tensor(self.boxes[rows])
        if self.relative:
            height, width = size
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        target = {
            "boxes": boxes,
            "labels": torch.tensor(self.labels[rows], dtype=torch.int64),
            "ignore": torch.tensor(self.ignore[rows]),
            "image_id": int(index),
            "size": tuple(size) if self.relative else tuple(self.sizes[index].tolist()),
        }
        if self.masks is not None:
            target["masks"] = [rle.as_coco(self.masks[row], target["size"]) for row in range(rows.start, rows.stop)]
        return target

    def load(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Image `index` and its target before any transform."""
        image = read_image(self.paths[index])
        size = tuple(image.shape[-2:])
        target = self.annotation(index, size)
        if target["size"] != size:
            raise _size_error(self.paths[index], target["size"], size)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(rle.decode([mask["counts"] for mask in target["masks"]], size))
        return tv_tensors.Image(image), target

    def without(self, indices: Iterable[int]) -> "BoxDataset":
        """This data set without the images at `indices`."""
        return self.select(np.setdiff1d(np.arange(len(self)), list(indices)))

    def subset(self, count: int, seed: int) -> "BoxDataset":
        """`count` random images of this data set, in its order; all if it has no more."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        return self if count >= len(self) else self.select(chosen)

    def select(self, indices: Iterable[int]) -> "BoxDataset":
        """The images at `indices` as a data set, in the order of this one."""
        images = np.unique(np.asarray(indices, dtype=np.int64))
        counts = np.diff(self.offsets)
        rows = np.flatnonzero(np.isin(self._image_of_objects(), images))
        part = copy.copy(self)
        part.paths, part.sizes = self.paths.select(images), self.sizes[images]
        part.offsets = np.concatenate([[0], np.cumsum(counts[images])])
        part.boxes, part.labels, part.ignore = self.boxes[rows], self.labels[rows], self.ignore[rows]
        if self.masks is not None:
            part.masks = self.masks.select(rows)
        if self.image_ids is not None:
            part.image_ids, part.bbox, part.area = self.image_ids[images], self.bbox[rows], self.area[rows]
        return part

    def coco_truth(self) -> CocoTruth | None:
        """The objects with the numbers of the COCO file, for the official score; None for other layouts."""
        if self.image_ids is None:
            return None
        image = self._image_of_objects()
        columns = {"image_id": self.image_ids[image], "category_id": self.category_ids[self.labels]}
        columns |= {"iscrowd": self.ignore.astype(np.int64), "bbox": self.bbox, "area": self.area}
        if self.masks is not None:
            columns["height"], columns["width"] = self.sizes[image].T
            columns["counts"] = np.empty(len(image), dtype=object)
            columns["counts"][:] = [self.masks[row] for row in range(len(image))]
        return CocoTruth(self.image_ids, self.category_ids, columns)

    def aspects(self) -> np.ndarray:
        """float64 [N], height / width of every image; see `file_sizes`."""
        sizes = self.file_sizes(range(len(self)))
        return sizes[:, 0] / sizes[:, 1]

    def file_sizes(self, indices: Sequence[int]) -> np.ndarray:
        """int64 [n,2], (h, w) of the image files at `indices`, as annotated or else from the files' headers; 1 x 1 for
        an image that cannot be read."""
        sizes = self.sizes[np.asarray(indices, dtype=np.int64)].astype(np.int64)
        unknown = np.flatnonzero((sizes == 0).any(axis=1))
        for row in tqdm(unknown, desc="reading image sizes", unit="image", disable=None if len(unknown) else True):
            try:
                sizes[row] = image_size(self.paths[indices[row]])
            except DataError:
                sizes[row] = 1  # reported when it is loaded
        return sizes

    def shapes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(h, w) of the images at `indices` as `dataset[i]` has them, without reading them, with the transform
        `multiscale_eval`."""
        return [self.transform.resized(size) for size in self.file_sizes(indices).tolist()]

    def class_counts(self) -> np.ndarray:
        """int64 [K], objects of each class, without those to ignore."""
        return np.bincount(self.labels[~self.ignore], minlength=len(self.classes))

    def balance_weights(self) -> np.ndarray:
        """See data.classes.balanced_weights."""
        image = self._image_of_objects()[~self.ignore]
        return balanced_weights(image, self.labels[~self.ignore], len(self), len(self.classes))

    def most_objects(self, count: int) -> np.ndarray:
        """int64 [count], the images with the most objects first; repeated if there are fewer images."""
        return np.resize(np.argsort(-np.diff(self.offsets), kind="stable"), count)

    def summary(self) -> str:
        """Lines for the console: images, background images and objects; objects of each class; unknown classes."""
        empty = int((np.diff(self.offsets) == 0).sum())
        share = 100 * empty / max(1, len(self))
        counts = ", ".join(f"{name} {count}" for name, count in zip(self.classes, self.class_counts()))
        ignored = f" ({int(self.ignore.sum())} ignored)" if self.ignore.any() else ""
        line = f"images {len(self)}, background {empty} ({share:.0f} %), boxes {len(self.labels)}{ignored}\n  {counts}"
        if self.unknown:
            names = ", ".join(f"{name} ({count})" for name, count in self.unknown.items())
            line += f"\n  left out, classes unknown to training: {names}"
        return line

    def _image_of_objects(self):
        """int64 [M], the image of each object."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def _size_error(path, annotated, size):
    """DataError for an image of `size` (h, w) whose annotation gives another one."""
    reason = f"annotated as {annotated[1]} x {annotated[0]} pixels, the file has {size[1]} x {size[0]}"
    if annotated == size[::-1]:
        reason += ": its EXIF orientation turns the image, but not the boxes"
    return DataError(path, "", f"{reason}; annotate it again", kind="image")
