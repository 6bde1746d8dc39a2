"""The training and validation set of a detector, from any 2D layout."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data import checks
from data.classes import agree_on_classes
from data.detection import coco, csv, open_images, penn_fudan, voc
from data.detection.dataset import BoxDataset
from utils.errors import DataError
from utils.labels import check_names

LAYOUTS = {"voc": voc.read, "open_images": open_images.read, "coco": coco.read, "csv": csv.read}
Sets = tuple[BoxDataset, BoxDataset, list[DataError]]


def load(
    layout: str,
    roots: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    remap_by_name: bool = False,
    seed: int = 0,
    voc_offset: int = 1,
    coco_sets: Sequence[str] = coco.SETS,
    csv_files: Sequence[str] = ("", "", ""),
    masks: bool = False,
    val_only: bool = False,
    split: str = "",
) -> Sets:
    """(train, val, errors): both sets with one class list, and a DataError for everything wrong in the files.

    layout          one of LAYOUTS
    roots           folders, joined; csv needs none if `csv_files` names a training file
    classes         class names of a checkpoint in label order, which then apply; None: those of the training set
    remap_by_name   allow the data to have the same names in another order
    seed            of the augmentation
    voc_offset      coordinate of the first pixel in a VOC data set
    coco_sets       names of the training and the validation set in a COCO folder
    csv_files       (train, val, classes) for csv, each "" to take the folder's
    masks           targets have masks; only COCO has them
    val_only        read no training set: val takes its place, and has its own classes if `classes` is None
    split           of val_only: the split of this name (csv: a csv file) as validation set; "": the usual one

    Raises DataError where a folder does not have this layout or the classes do not agree.
    """
    if layout == "coco" and split:
        coco_sets = ("", split)
    if layout == "csv" and split:
        file, class_file = csv.find(split, roots)
        csv_files = ("", file, csv_files[2] or class_file)
    options = {"voc": {"offset": voc_offset, "name": split}, "open_images": {"name": split}}
    options |= {"csv": {"files": csv_files}, "coco": {"sets": coco_sets, "masks": masks}}
    read = partial(LAYOUTS[layout], **options[layout])
    _check_folders([] if layout == "csv" and csv_files[val_only] else roots)
    first = read(roots, "val" if val_only else "train")
    if val_only and first.classes == sorted(first.names):  # without a list of its own, whose order could be wrong
        remap_by_name = True
    check_names([*first.names, *first.classes], roots[0] if roots else csv_files[0])
    names = agree_on_classes(classes, first.classes, remap_by_name) if classes else first.classes
    errors = first.errors + (first.class_errors if names == first.classes else [])
    train_set = BoxDataset(first, names, seed=seed)
    if val_only:
        return train_set, train_set, checks.unique(errors)
    val = read(roots, "val")
    check_names(val.names, roots[0] if roots else csv_files[1])
    return train_set, BoxDataset(val, names, seed=seed), checks.unique(errors + val.errors)


def load_penn_fudan(
    roots: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    val_share: float = 0.294,
    split_seed: int = 0,
    held_out: Sequence[str] | None = None,
    val_only: bool = False,
    split: str = "",
) -> Sets:
    """(train, val, errors) of PennFudanPed folders, with masks, as `load` returns them.

    classes                 class names of a checkpoint in label order, person among them, which then apply
    val_share, split_seed   see data.detection.penn_fudan.split
    held_out                file names of the validation images of an earlier split, instead of a new split
    val_only                val takes the place of train, whose images may be missing
    split                   of val_only: "all" images, or a text file of their names, instead of the images held out

    Raises DataError where a folder does not have this layout or the classes do not agree.
    """
    _check_folders(roots)
    if split:
        held_out = None if split == "all" else penn_fudan.read_names(split)
    annotations = penn_fudan.read(roots, held_out if val_only else None)
    names = agree_on_classes(classes, annotations.classes, False) if classes else annotations.classes
    train_set = val_set = BoxDataset(annotations, names, seed=seed)
    if val_only and held_out is not None:
        penn_fudan.check_names(val_set, held_out)
    elif held_out is not None:
        train_set, val_set = penn_fudan.split_by_names(train_set, held_out)
    elif split != "all":
        train_set, val_set = penn_fudan.split(train_set, val_share, split_seed)
    return val_set if val_only else train_set, val_set, annotations.errors


def _check_folders(roots):
    for root in roots:
        if not Path(root).is_dir():
            raise DataError(root, "", "no such folder; give --data the folder of the data set")
