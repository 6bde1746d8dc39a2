"""Pictures with boxes, in flat arrays.

Every 2D layout (VOC, Open Images, COCO, csv) is parsed into a `BoxDataset`. The arrays hold no Python object a
box or a picture: forked workers share their pages for good, because no reference count is ever written to them, so
memory does not grow with the number of workers.
"""

import copy
import os
from array import array
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from data.classes import balanced
from data.errors import DataError
from data.images import image_size, read_image
from ops import run_lengths


class Pieces:
    """Many bytes in two arrays: all of them end to end, and where each begins."""

    def __init__(self, pieces):
        pieces = list(pieces)
        self.content = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.first = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)

    def __len__(self):
        return len(self.first) - 1

    def __getitem__(self, index):
        return self.content[self.first[index] : self.first[index + 1]].tobytes()


class Paths(Pieces):
    """Many paths in two arrays."""

    def __init__(self, paths):
        super().__init__(os.fsencode(path) for path in paths)

    def __getitem__(self, index):
        return os.fsdecode(super().__getitem__(index))


class Records:
    """What a parser fills, a picture and then its objects; `BoxDataset` takes it from there.

    masks   every object comes with its mask as run lengths, bytes (see ops.run_lengths), and every picture has a size
    """

    def __init__(self, masks=False):
        self.paths, self.sizes = [], array("i")
        self.names = {}  # class name -> provisional label, in order of appearance
        self.image, self.boxes, self.labels, self.ignore = array("q"), array("f"), array("i"), array("b")
        self.masks = [] if masks else None

    def add_image(self, path, size=(0, 0)):
        """A picture with its annotated (h, w), (0, 0) if it is not told; returns its position."""
        self.paths.append(str(path))
        self.sizes.extend(size)
        return len(self.paths) - 1

    def add_object(self, image, box, name, ignore=False, mask=None):
        """One object of the picture at position `image`; objects may come in any order."""
        if self.masks is not None:
            self.masks.append(mask)
        self.image.append(image)
        self.boxes.extend(box)
        self.labels.append(self.names.setdefault(name, len(self.names)))
        self.ignore.append(ignore)

    def size(self, image):
        """(h, w) of the picture at position `image`."""
        return tuple(self.sizes[2 * image : 2 * image + 2])


def clip(box, size):
    """The corners (x1, y1, x2, y2) of `box` within a picture of `size` (h, w), as float32, the form they are kept in;
    None where nothing is left."""
    (x1, y1, x2, y2), (height, width) = box, size
    inside = array("f", (max(0.0, x1), max(0.0, y1), min(x2, width), min(y2, height)))
    return inside if inside[2] > inside[0] and inside[3] > inside[1] else None


def finish(records, classes, found, faults, **options):
    """What every parser ends with: a BoxDataset of its `records` with `options`. The DataErrors that it `found` are
    added to the list `faults`; where that is None the first is raised."""
    if faults is None and found:
        raise found[0]
    if faults is not None:
        faults.extend(found)
    return BoxDataset(records, classes, **options)


class BoxDataset(Dataset):
    """Pictures with boxes; `dataset[i]` and `dataset[epoch, i]` meet the contract in data/__init__.py.

    records    a filled `Records`
    classes    names in label order; objects of other names are left out and counted in `unknown` (name -> objects)
    relative   boxes are fractions of the picture (Open Images), not pixels
    transform  (image tv_tensors.Image, target) -> (image, target), or None
    seed       of the augmentation

    `masks` are the objects' as run lengths, some hundred bytes each, of which `dataset[i]` alone makes pixels; None
    where the records have none.
    `annotation_file`, `source_ids` int64 [N] and `category_ids` [K] lead back to a COCO file (see data/coco.py) and are
    None without one. Raises DataError for a picture that cannot be read or has another size than its annotation says.
    """

    def __init__(self, records, classes, relative=False, transform=None, seed=0):
        self.classes = list(classes)
        self.relative, self.transform, self.seed = relative, transform, seed
        self.annotation_file = self.source_ids = self.category_ids = None
        self.paths = Paths(records.paths)
        self.sizes = np.array(records.sizes, dtype=np.int32).reshape(-1, 2)
        label_of = {name: label for label, name in enumerate(self.classes)}
        label = np.array([label_of.get(name, -1) for name in records.names] or [-1], dtype=np.int32)
        label = label[np.array(records.labels, dtype=np.int64)]
        counts = np.bincount(np.array(records.labels, dtype=np.int64)[label < 0], minlength=len(records.names))
        self.unknown = {name: int(count) for name, count in zip(records.names, counts) if count}
        image = np.array(records.image, dtype=np.int64)
        order = np.argsort(image, kind="stable")
        order = order[label[order] >= 0]
        self.first = np.searchsorted(image[order], np.arange(len(self.paths) + 1))
        self.boxes = np.array(records.boxes, dtype=np.float32).reshape(-1, 4)[order]
        self.labels = label[order]
        self.ignore = np.array(records.ignore, dtype=bool)[order]
        self.masks = None if records.masks is None else Pieces(records.masks[row] for row in order)

    def __len__(self):
        return len(self.paths)

    def annotation(self, index, size=(1, 1)):
        """The target of picture `index` in file pixels, without reading the file.

        Relative corners are multiplied by `size` (h, w); layouts in pixels do not need it. `masks`, where the data set
        has them, are a list of COCO's run lengths here, {"size": [h, w], "counts": bytes}, and no pixels.
        """
        rows = slice(self.first[index], self.first[index + 1])
        boxes = torch.tensor(self.boxes[rows])
        if self.relative:
            height, width = size
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        target = {
            "boxes": boxes,
            "labels": torch.tensor(self.labels[rows], dtype=torch.int64),
            "ignore": torch.tensor(self.ignore[rows]),
            "image_id": int(index),
            "size": tuple(size) if self.relative else tuple(int(v) for v in self.sizes[index]),
        }
        if self.masks is not None:
            rows = range(self.first[index], self.first[index + 1])
            target["masks"] = [run_lengths.as_coco(self.masks[row], target["size"]) for row in rows]
        return target

    def load(self, index):
        """Picture `index` and its target before any transform."""
        path = self.paths[index]
        image = read_image(path)
        size = tuple(image.shape[-2:])
        told = tuple(int(v) for v in self.sizes[index])
        if all(told) and told != size:
            why = "it is turned by its EXIF orientation and the boxes are not: " if told == size[::-1] else ""
            reason = f"the annotation says {told[1]} x {told[0]}, the file {size[1]} x {size[0]}; {why}annotate it anew"
            raise DataError(path, "", reason, kind="image")
        target = self.annotation(index, size)
        target["size"] = size
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(run_lengths.decode([one["counts"] for one in target["masks"]], size))
        return tv_tensors.Image(image), target

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self.load(index)
        if self.transform is None:
            return image, target
        with seeded(self.seed, epoch, index):
            return self.transform(image, target)

    def without(self, indices):
        """This data set less the pictures in `indices`."""
        return self.only(np.setdiff1d(np.arange(len(self)), list(indices)))

    def subset(self, count, seed):
        """`count` pictures of this data set, drawn by `seed`, in its order; all where it has no more."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        return self if count >= len(self) else self.only(chosen)

    def only(self, indices):
        """The pictures in `indices` as a data set, in the order of this one."""
        left = np.unique(np.asarray(indices, dtype=np.int64))
        counts = np.diff(self.first)
        rows = np.isin(np.repeat(np.arange(len(self)), counts), left)
        less = copy.copy(self)
        less.paths, less.sizes = Paths(self.paths[index] for index in left), self.sizes[left]
        less.first = np.concatenate([[0], np.cumsum(counts[left])])
        less.boxes, less.labels, less.ignore = self.boxes[rows], self.labels[rows], self.ignore[rows]
        less.masks = None if self.masks is None else Pieces(self.masks[row] for row in np.flatnonzero(rows))
        less.source_ids = None if self.source_ids is None else self.source_ids[left]
        return less

    def aspects(self):
        """float64 [N], height / width of every picture, as annotated or else from the files' headers; a picture that
        cannot be read counts as 1."""
        sizes = self.sizes.astype(np.float64)
        untold = np.flatnonzero((sizes == 0).any(axis=1))
        for index in tqdm(untold, desc="reading picture sizes", unit="image", disable=None if len(untold) else True):
            try:
                sizes[index] = image_size(self.paths[index])
            except DataError:
                sizes[index] = 1  # named when it is loaded
        return sizes[:, 0] / sizes[:, 1]

    def class_counts(self):
        """Objects of each class that count, int64 [K]."""
        return np.bincount(self.labels[~self.ignore], minlength=len(self.classes))

    def balance_weights(self):
        """See data.classes.balanced."""
        picture = np.repeat(np.arange(len(self)), np.diff(self.first))
        return balanced(picture[~self.ignore], self.labels[~self.ignore], len(self), len(self.classes))

    def fullest(self, count):
        """int64 [count], the pictures with the most objects; from the first again where there are fewer pictures."""
        return np.resize(np.argsort(-np.diff(self.first), kind="stable"), count)

    def summary(self):
        """Two lines for the console: pictures, objects and background; objects of each class."""
        empty = int((np.diff(self.first) == 0).sum())
        share = 100 * empty / max(1, len(self))
        counts = ", ".join(f"{name} {count}" for name, count in zip(self.classes, self.class_counts()))
        ignored = f" ({int(self.ignore.sum())} to ignore)" if self.ignore.any() else ""
        return f"images {len(self)}, background {empty} ({share:.0f} %), boxes {len(self.labels)}{ignored}\n  {counts}"


@contextmanager
def seeded(seed, epoch, index):
    """Within it torch draws what belongs to picture `index` of `epoch`, and after it goes on as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs' generators too, and fork_rng would not give their state back
        torch.default_generator.manual_seed(sample_seed(seed, epoch, index))
        yield


def sample_seed(seed, epoch, index):
    """One well mixed 64-bit seed of three small numbers, the same on every machine."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0])
