"""Pictures sorted into one folder a class, as ImageNet is handed out.

    ROOT/train/CLASS/ID.jpg     any depth below a class folder; suffixes of data.images.SUFFIXES in either case
    ROOT/val/CLASS/ID.jpg

Names that begin with a dot are passed over. Listing the 1.28 million files of ImageNet takes a while on a slow disk, so
the list is kept beside the data, or in a folder named, and used for as long as no folder in it has changed.
"""

import copy
import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from data import check
from data.boxes import Paths, seeded
from data.errors import DataError
from data.files import keep_arrays, kept_arrays
from data.images import SUFFIXES, read_image

THREADS = 16  # listing folders at once: a network disk answers each after a while, but many at a time
FORMAT = 1  # of a kept list; another number is listed anew
NAMED = 10  # classes named in one message


class FolderDataset(Dataset):
    """Pictures with one label each; `dataset[i]`, `dataset[epoch, i]` are (image uint8 [3,H,W], int label from 0, i).

    folder      holds the pictures; `paths` are relative to it
    labels      int32 [N], positions in `classes`
    transform   image tv_tensors.Image -> image, or None; what it draws is seeded from (seed, epoch, i)

    Raises DataError, which names the file, for a picture that cannot be read.
    """

    def __init__(self, folder, paths, labels, classes, transform=None, seed=0):
        self.folder, self.paths, self.labels, self.classes = str(folder), paths, labels, list(classes)
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.path.join(self.folder, self.paths[index])

    def load(self, index):
        """Picture `index` and its label before any transform."""
        return tv_tensors.Image(read_image(self.path(index))), int(self.labels[index])

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.load(index)
        if self.transform is None:
            return image, label, int(index)
        with seeded(self.seed, epoch, index):
            return self.transform(image), label, int(index)

    def without(self, indices):
        """This data set less the pictures in `indices`."""
        left = np.setdiff1d(np.arange(len(self)), list(indices))
        less = copy.copy(self)
        less.paths, less.labels = Paths(self.paths[index] for index in left), self.labels[left]
        return less

    def class_counts(self):
        """Pictures of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def balance_weights(self):
        """float64 [N] to draw pictures with, so that classes come up equally often."""
        weights = (1 / self.class_counts().clip(min=1))[self.labels]
        return weights / weights.sum()

    def summary(self):
        """One or two lines for the console: pictures, and pictures of each class or their range."""
        counts = self.class_counts()
        if len(counts) > 2 * NAMED:
            return f"images {len(self)}, classes {len(counts)} of {counts.min()} to {counts.max()} images"
        each = ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts))
        return f"images {len(self)}, classes {len(counts)}\n  {each}"


def load(root="data", train="", val="", classes=None, cache=None, seed=0, say=print, faults=None):
    """(train, val): both sets as FolderDatasets with one class list, the names of the training folders sorted.

    root      folder with train and val in it
    train     folder of the training classes if it is another than ROOT/train; `val` likewise
    classes   names in label order, of a checkpoint: they rule the order, and the folders must have the same names
    cache     folder for the lists of files where the data's own folder cannot be written; None keeps none there
    faults    a list that receives a DataError for every class folder that holds no picture or that training does not
              have, whose pictures have the label -1; None raises the first

    Raises DataError where a folder lacks or holds no class, and where the checkpoint has other classes.
    """
    given = {"train": train, "val": val}
    indices = [_index(Path(path or Path(root) / split), split, cache, say) for split, path in given.items()]
    found = indices[0]["classes"].tolist()
    if classes is not None and set(classes) != set(found):
        raise DataError(indices[0]["folder"], "", _difference("the checkpoint", classes, "the folder", found))
    classes = found if classes is None else list(classes)
    wrong = [fault for index in indices for fault in _class_faults(index, set(classes))]
    if faults is None and wrong:
        raise wrong[0]
    if faults is not None:
        faults.extend(wrong)
    label_of = {name: label for label, name in enumerate(classes)}
    sets = []
    for index in indices:
        label = np.array([label_of.get(name, -1) for name in index["classes"].tolist()], dtype=np.int32)
        paths = _paths(index["content"], index["first"])
        sets.append(FolderDataset(index["folder"], paths, label[index["labels"]], classes, seed=seed))
    return tuple(sets)


def settle(train, val, faults, bad_images, workers, say=print):
    """Report faults and sizes, leave out the pictures that cannot be read where `bad_images` is "skip" -> (train, val).

    Raises DataError for any of the `faults` that `load` found, and where no picture is left.
    """
    check.settle(faults, "error", bad_images, say)
    train, val = check.usable(train, val, bad_images, workers, say)
    for name, dataset in (("train", train), ("val", val)):
        say(f"{name}: {dataset.summary()}")
    return train, val


def _class_faults(index, classes):
    """A DataError for each class folder of a list of files that holds no picture or is none of `classes`."""
    counts = np.bincount(index["labels"], minlength=len(index["classes"]))
    for name, count in zip(index["classes"].tolist(), counts):
        if not count:
            reason = f"no picture ({' '.join(SUFFIXES)}) in this class folder; fill or remove it"
            yield DataError(index["folder"] / name, "", reason)
        if name not in classes:
            yield DataError(index["folder"] / name, "", "training has no such class; remove or rename the folder")


def _some(names):
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _difference(one, names, other, others):
    """One line on two sets of class names that are not the same."""
    parts = [
        f"only {who} has {_some(sorted(set(mine) - set(theirs)))}"
        for who, mine, theirs in ((one, names, others), (other, others, names))
        if set(mine) - set(theirs)
    ]
    return f"other classes than the checkpoint's: {'; '.join(parts)}; name the folder it was trained on"


def _paths(content, first):
    paths = Paths([])
    paths.content, paths.first = content, first
    return paths


# ---- the list of files: dict of arrays
# content uint8, first int64 [N+1]: paths relative to the folder as in data.boxes.Paths; labels int32 [N];
# classes str [K]; folders str [F], relative, with mtimes int64 [F] in nanoseconds


def _index(folder, split, cache, say):
    """The list of files of one split, from where it is kept or made anew and kept; "folder" is added to it."""
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; give the one that holds train and val, or --{split} DIR")
    name = f".sightline_index_{folder.name}_{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}.npz"
    places = [Path(place) / name for place in (folder.parent, cache) if place is not None]
    for file in places:
        index = _kept(file, folder, say)
        if index is not None:
            return index | {"folder": folder}
    index = _listed(folder)
    for file in places:
        if keep_arrays(file, {"format": FORMAT, **index}):
            break
    else:
        say(f"{folder}: the list of its files could not be kept, neither in {' nor in '.join(str(p) for p in places)}")
    return index | {"folder": folder}


def _kept(file, folder, say):
    """The list in `file`, or None where there is none or it holds no longer."""
    if not file.is_file():
        return None
    try:
        index = kept_arrays(file)
        version, folders, mtimes = int(index.pop("format")), index["folders"], index["mtimes"].tolist()
    except PermissionError:
        say(f"{file}: may not be read, listing the files of {folder} anew; mend its rights")
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        say(f"{file}: damaged, listing the files of {folder} anew")
        return None
    try:
        same = version == FORMAT and mtimes == [os.stat(folder / name).st_mtime_ns for name in folders.tolist()]
    except FileNotFoundError:
        same = False
    return index if same else None


def _listed(folder):
    """The list of files of `folder`, read from the disk. Raises DataError."""
    try:
        mtime = os.stat(folder).st_mtime_ns  # before it is listed: what comes later changes it
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise DataError(folder, "", "holds no class folder; put the pictures of each class in a folder of its name")
        with ThreadPoolExecutor(THREADS) as threads:
            parts = threads.map(_list_class, [folder] * len(classes), classes)
            bar = tqdm(parts, desc=f"listing {folder}", total=len(classes), unit="class", disable=None)
            contents, lengths, folders, mtimes = zip(*bar)
    except OSError as error:
        raise DataError(error.filename or folder, "", f"cannot be listed: {error.strerror}") from None
    return {
        "content": np.frombuffer(b"".join(contents), dtype=np.uint8),
        "first": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        "labels": np.repeat(np.arange(len(classes), dtype=np.int32), [len(length) for length in lengths]),
        "classes": np.array(classes),
        "folders": np.array(["", *(name for names in folders for name in names)]),
        "mtimes": np.array([mtime, *(mtime for times in mtimes for mtime in times)], dtype=np.int64),
    }


def _list_class(folder, name):
    """(paths end to end as bytes, their lengths, folders, their mtimes) of the class folder `name`, in sorted order."""
    pictures, folders, mtimes, waiting = [], [], [], [name]
    while waiting:
        inside = waiting.pop()
        folders.append(inside)
        mtimes.append(os.stat(folder / inside).st_mtime_ns)
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(SUFFIXES):  # asked first: it spares most entries the other question
                    pictures.append(f"{inside}/{entry.name}")
                elif entry.is_dir():
                    waiting.append(f"{inside}/{entry.name}")
    encoded = [os.fsencode(path) for path in sorted(pictures)]
    return b"".join(encoded), np.array([len(path) for path in encoded], dtype=np.int64), folders, mtimes
