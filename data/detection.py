"""The training and validation set of a detector, from any 2D layout, with their faults settled."""

from functools import partial
from pathlib import Path

from data import check, coco, csv_boxes, open_images, pennfudan, voc
from data.classes import agree_on_classes
from data.errors import DataError

LAYOUTS = {"voc": voc.load, "open_images": open_images.load, "coco": coco.load, "csv": csv_boxes.load}
HELD_OUT = 0.2  # share of PennFudanPed, which comes without a split, to validate on


def load(
    layout,
    roots,
    *,
    trained=None,
    remap_by_name=False,
    seed=0,
    voc_offset=1,
    coco_sets=coco.SETS,
    csv_files=("", "", ""),
    masks=False,
):
    """(train, val, faults): both sets as BoxDatasets with one class list, and a DataError for everything wrong.

    layout         one of LAYOUTS
    roots          folders, joined; csv needs none where `csv_files` names a file to train on
    trained        classes of a checkpoint in label order: they rule; None takes the training set's
    remap_by_name  allow the data to name them in another order
    seed           of the augmentation
    voc_offset     number of the first pixel in a VOC set
    coco_sets      names of the training and the validation set in a COCO folder
    csv_files      (train, val, classes) for csv, each "" to take the folder's
    masks          targets have masks; coco alone can give them

    Raises DataError where a folder is no such set or the classes do not agree.
    """
    options = {"voc": {"offset": voc_offset}, "csv": {"files": csv_files}}
    options["coco"] = {"sets": coco_sets, "masks": masks}
    read = partial(LAYOUTS[layout], seed=seed, **options.get(layout, {}))
    for root in [] if layout == "csv" and csv_files[0] else roots:
        if not Path(root).is_dir():
            raise DataError(root, "", "no such folder; give --data the folder that holds the set")
    faults = []
    train = read(roots, "train", faults=faults)
    if trained and trained != train.classes:
        names, faults = agree_on_classes(trained, train.classes, remap_by_name), []
        train = read(roots, "train", names, faults=faults)
    val = read(roots, "val", train.classes, faults=faults)
    return train, val, list({str(fault): fault for fault in faults}.values())  # a file may serve both splits


def load_pennfudan(roots, *, trained=None, seed=0, share=HELD_OUT, split_seed=0, held_out=None):
    """(train, val, faults) of PennFudanPed folders, with masks, as `load` gives them.

    trained             classes of a checkpoint in label order, person among them: they rule
    share, split_seed   see data.pennfudan.split
    held_out            file names of a validation set kept earlier, instead of a split; see data.pennfudan.names

    Raises DataError where a folder is no such set or the classes do not agree.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise DataError(root, "", "no such folder; give --data the folder that holds the set")
    names = agree_on_classes(trained, list(pennfudan.CLASSES), False) if trained else None
    faults = []
    dataset = pennfudan.load(roots, names, faults, seed=seed)
    if held_out is None:
        return *pennfudan.split(dataset, share, split_seed), faults
    return *pennfudan.split_by_names(dataset, held_out), faults


def settle(train, val, faults, bad_boxes, bad_images, workers, say=print):
    """Report faults, sizes and class differences, leave out what the policies say -> (train, val).

    Raises DataError on faults that the policies (see data.check.settle) do not forgive, and where nothing is left.
    """
    check.settle(faults, bad_boxes, bad_images, say)
    train, val = check.usable(train, val, bad_images, workers, say)
    for name, dataset in (("train", train), ("val", val)):
        say(f"{name}: {dataset.summary()}")
        if dataset.unknown:
            names = ", ".join(f"{unknown} ({count})" for unknown, count in dataset.unknown.items())
            say(f"  left out, classes that training does not know: {names}")
    if not len(train.labels):
        raise DataError("no box to train on", "", "every training picture is background; check the annotations")
    lacking = [name for name, count in zip(train.classes, val.class_counts()) if not count]
    if lacking:
        say(f"  no validation box, so no AP, for: {', '.join(lacking)}")
    return train, val
