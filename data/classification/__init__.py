"""Images sorted into one folder per class, as ImageNet is distributed.

    ROOT/train/CLASS/ID.jpg     any depth below a class folder; suffixes of data.images.SUFFIXES in either case
    ROOT/val/CLASS/ID.jpg

Names that begin with a dot are ignored.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision import tv_tensors

from data.classification.file_list import list_files
from data.files import shortened
from data.images import SUFFIXES, read_image
from data.packed import PackedPaths
from data.seeding import seeded
from utils.errors import DataError
from utils.labels import check_names

MAX_NAMED = 10  # classes named in one message


class ImageFolderDataset(Dataset):
    """Images with one label each; `dataset[i]`, `dataset[epoch, i]` are (image uint8 [3,H,W], int label from 0, i).

    folder      which `paths` are relative to
    labels      int32 [N], positions in `classes`
    transform   image tv_tensors.Image -> image, or None; its random numbers are seeded from (seed, epoch, i)

    Raises DataError, which names the file, for an image that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        paths: PackedPaths,
        labels: np.ndarray,
        classes: Sequence[str],
        transform: Callable | None = None,
        seed: int = 0,
    ):
        self.folder, self.paths, self.labels, self.classes = str(folder), paths, labels, list(classes)
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def image_path(self, index: int) -> str:
        return os.path.join(self.folder, self.paths[index])

    def load(self, index: int) -> tuple[tv_tensors.Image, int]:
        """Image `index` and its label before any transform."""
        return tv_tensors.Image(read_image(self.image_path(index))), int(self.labels[index])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[tv_tensors.Image, int, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.load(index)
        if self.transform is None:
            return image, label, int(index)
        with seeded(self.seed, epoch, index):
            return self.transform(image), label, int(index)

    def without(self, indices: Iterable[int]) -> "ImageFolderDataset":
        """This data set without the images at `indices`."""
        remaining = np.setdiff1d(np.arange(len(self)), list(indices))
        part = copy.copy(self)
        part.paths, part.labels = self.paths.select(remaining), self.labels[remaining]
        return part

    def class_counts(self) -> np.ndarray:
        """int64 [K], images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def balance_weights(self) -> np.ndarray:
        """float64 [N], sum 1: sampling probabilities of images with which classes come up equally often."""
        weights = (1 / self.class_counts().clip(min=1))[self.labels]
        return weights / weights.sum()

    def summary(self) -> str:
        """One or two lines for the console: images, and images of each class or their range."""
        counts = self.class_counts()
        if len(counts) > 2 * MAX_NAMED:
            return f"images {len(self)}, classes {len(counts)} of {counts.min()} to {counts.max()} images"
        each = ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts))
        return f"images {len(self)}, classes {len(counts)}\n  {each}"


def load(
    root: str | Path = "data",
    train: str = "",
    val: str = "",
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    seed: int = 0,
    print: Callable[[str], object] = print,
    val_only: bool = False,
    split: str = "",
) -> tuple[ImageFolderDataset, ImageFolderDataset, list[DataError]]:
    """(train, val, errors): both sets with one class list, the names of the training folders sorted.

    root         folder with train and val in it
    train, val   folders with the class folders, if they are not ROOT/train and ROOT/val
    classes      class names of a checkpoint in label order: they set the order, and the folders must have these names
    cache        folder for the cached lists of files if the data's own folder cannot be written
    val_only     read no training set: val takes its place, and has its own classes if `classes` is None; else it may
                 lack some of `classes`
    split        of val_only: the folder ROOT/SPLIT is the validation set

    The errors are class folders without an image, and those that training does not have, whose images get label -1.
    Raises DataError where a folder is missing or has no class folder, and where the checkpoint has other classes.
    """
    folders = {"train": Path(train or Path(root) / "train"), "val": Path(val or Path(root) / "val")}
    if split:
        folders["val"] = _split_folder(Path(root), split)
    if val_only:
        del folders["train"]
    lists = {split: list_files(folder, split, cache, print) for split, folder in folders.items()}
    first = next(iter(folders))
    own_classes = lists[first]["classes"].tolist()
    check_names({name for files in lists.values() for name in files["classes"].tolist()}, folders[first])
    if classes is not None and set(classes) != set(own_classes) and not (val_only and set(classes) & set(own_classes)):
        raise DataError(folders[first], "", _class_difference(set(classes), set(own_classes)))
    classes = own_classes if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(classes)}
    sets, errors = [], []
    for split, folder in folders.items():
        files = lists[split]
        label = np.array([label_of.get(name, -1) for name in files["classes"].tolist()], dtype=np.int32)
        paths = PackedPaths.from_arrays(files["content"], files["first"])
        sets.append(ImageFolderDataset(folder, paths, label[files["labels"]], classes, seed=seed))
        errors += _class_errors(folder, files, set(classes))
    return sets[0], sets[-1], errors


def _split_folder(root, split):
    if (root / split).is_dir():
        return root / split
    folders = [path.name for path in root.glob("[!.]*") if path.is_dir()]
    names = shortened(sorted(folders), MAX_NAMED) or "none"
    raise DataError(root / split, "", f"no such split; folders in {root}: {names}")


def _class_errors(folder: Path, files: dict, classes: set) -> Iterator[DataError]:
    counts = np.bincount(files["labels"], minlength=len(files["classes"]))
    for name, count in zip(files["classes"].tolist(), counts):
        if not count:
            reason = f"no image ({' '.join(SUFFIXES)}) in this class folder; fill or remove it"
            yield DataError(folder / name, "", reason)
        if name not in classes:
            yield DataError(folder / name, "", "training has no such class; remove or rename the folder")


def _class_difference(checkpoint, folder):
    """One line on two sets of class names that differ."""
    names = {"the checkpoint": checkpoint - folder, "the folder": folder - checkpoint}
    parts = [f"only {owner} has {shortened(sorted(own), MAX_NAMED)}" for owner, own in names.items() if own]
    return f"not the checkpoint's classes: {'; '.join(parts)}; give the data that it was trained on"
