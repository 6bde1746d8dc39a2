"""The training and validation set of a detector, from any 2D layout."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data import checks
from data.classes import agree_on_classes
from data.detection import coco, csv, open_images, penn_fudan, voc
from data.detection.dataset import BoxDataset
from utils.errors import DataError

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

    Raises DataError where a folder does not have this layout or the classes do not agree.
    """
    options = {"voc": {"offset": voc_offset}, "csv": {"files": csv_files}}
    options["coco"] = {"sets": coco_sets, "masks": masks}
    read = partial(LAYOUTS[layout], **options.get(layout, {}))
    _check_folders([] if layout == "csv" and csv_files[0] else roots)
    train = read(roots, "train")
    names = agree_on_classes(classes, train.classes, remap_by_name) if classes else train.classes
    val = read(roots, "val")
    errors = train.errors + (train.class_errors if names == train.classes else []) + val.errors
    return BoxDataset(train, names, seed=seed), BoxDataset(val, names, seed=seed), checks.unique(errors)


def load_penn_fudan(
    roots: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    val_share: float = 0.294,
    split_seed: int = 0,
    held_out: Sequence[str] | None = None,
) -> Sets:
    """(train, val, errors) of PennFudanPed folders, with masks, as `load` returns them.

    classes                 class names of a checkpoint in label order, person among them, which then apply
    val_share, split_seed   see data.detection.penn_fudan.split
    held_out                file names of the validation images of an earlier split, instead of a new split

    Raises DataError where a folder does not have this layout or the classes do not agree.
    """
    _check_folders(roots)
    annotations = penn_fudan.read(roots)
    names = agree_on_classes(classes, annotations.classes, False) if classes else annotations.classes
    dataset = BoxDataset(annotations, names, seed=seed)
    if held_out is None:
        return *penn_fudan.split(dataset, val_share, split_seed), annotations.errors
    return *penn_fudan.split_by_names(dataset, held_out), annotations.errors


def _check_folders(roots):
    for root in roots:
        if not Path(root).is_dir():
            raise DataError(root, "", "no such folder; give --data the folder of the data set")
