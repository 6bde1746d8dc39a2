"""The training and validation set of a detector, from any 2D layout, with their faults settled."""

from functools import partial
from pathlib import Path

from data import check, open_images, voc
from data.classes import agree_on_classes
from data.errors import DataError

LAYOUTS = {"voc": voc.load, "open_images": open_images.load}


def load(layout, roots, voc_offset=1, seed=0, trained=None, remap_by_name=False):
    """(train, val, faults): both sets as BoxDatasets with one class list, and a DataError for everything wrong.

    layout         one of LAYOUTS
    trained        classes of a checkpoint in label order: they rule; None takes the training set's
    remap_by_name  allow the data to name them in another order

    Raises DataError where a folder is no such set or the classes do not agree.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise DataError(root, "", "no such folder; give --data the folder that holds the set")
    read = partial(voc.load, offset=voc_offset) if layout == "voc" else LAYOUTS[layout]
    faults = []
    train = read(roots, "train", faults=faults, seed=seed)
    if trained and trained != train.classes:
        names, faults = agree_on_classes(trained, train.classes, remap_by_name), []
        train = read(roots, "train", names, faults=faults, seed=seed)
    val = read(roots, "val", train.classes, faults=faults, seed=seed)
    return train, val, list({str(fault): fault for fault in faults}.values())  # a file may serve both splits


def settle(train, val, faults, bad_boxes, bad_images, workers, say=print):
    """Report faults, sizes and class differences, leave out what the policies say -> (train, val).

    Raises DataError on faults that the policies (see data.check.settle) do not forgive, and where nothing is left.
    """
    check.settle(faults, bad_boxes, bad_images, say)
    if bad_images == "skip":
        train, val = (skip_unreadable(dataset, workers, say) for dataset in (train, val))
    for name, dataset in (("train", train), ("val", val)):
        if not len(dataset):
            raise DataError(f"no picture left for {name}", "", "mend the faults listed above")
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


def skip_unreadable(dataset, workers, say=print):
    """`dataset` less the pictures that cannot be read, each of which is said. Reads every file once."""
    faults = check.unreadable(dataset, workers)
    check.settle(list(faults.values()), "drop", "skip", say)
    return dataset.without(faults) if faults else dataset


def check_data(train, val, faults, workers, report, say=print):
    """--check-data: read every picture too, write all faults to the JSON file `report`, and raise DataError for any."""
    unreadable = [fault for dataset in (train, val) for fault in check.unreadable(dataset, workers).values()]
    faults = list({str(fault): fault for fault in faults + unreadable}.values())
    check.write_report(report, faults, {"train": train, "val": val})
    check.settle(faults, "error", "error", say, most=len(faults))
    say(f"no fault in {len(train)} training and {len(val)} validation pictures")
    return {}
