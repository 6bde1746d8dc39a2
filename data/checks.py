"""Errors in the data: all of them, in one pass, one line each."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from data.loader import Loader
from utils import files
from utils.errors import DataError, WriteError

REPORT = "data_errors.json"
MAX_LINES = 50  # on the console before training; --check-data prints all of them
OUTCOME = {"box": "box dropped", "image": "image skipped"}
REMEDY = {"box": "--bad-boxes drop leaves out such boxes", "image": "--bad-images skip leaves out such images"}
Print = Callable[[str], object]


def apply_fault_policy(
    errors: Sequence[DataError], bad_boxes: str, bad_images: str, print: Print = print, max_lines: int = MAX_LINES
) -> None:
    """Print `errors`, at most `max_lines` of them, and return if training may go on without what they concern.

    bad_boxes    "drop": an error of kind "box" costs its object; "error": it stops the run
    bad_images   "skip": an error of kind "image" costs its image; "error": it stops the run

    Raises DataError for errors that stop the run: the error itself if there is only one, else their number.
    """
    tolerated = [kind for kind, ok in (("box", bad_boxes == "drop"), ("image", bad_images == "skip")) if ok]
    fatal = [error for error in errors if error.kind not in tolerated]
    lines = [str(error) for error in fatal if len(fatal) > 1]  # the script prints a single one, which is raised
    lines += [f"{error} ({OUTCOME[error.kind]})" for error in errors if error.kind in tolerated]
    for line in lines[:max_lines]:
        print(line)
    if len(lines) > max_lines:
        print(f"... and {len(lines) - max_lines} more; --check-data lists them all")
    if not fatal:
        return
    remedies = [text for kind, text in REMEDY.items() if kind in {error.kind for error in fatal}]
    if len(fatal) > 1:
        raise DataError(f"{len(fatal)} errors in the data, listed above", "", "; ".join(remedies) or "fix the files")
    error = fatal[0]
    raise DataError(error.path, error.place, "; ".join([error.reason, *remedies]), error.kind)


def apply(
    train: Any,
    val: Any,
    errors: Sequence[DataError],
    bad_boxes: str,
    bad_images: str,
    workers: int,
    print: Print = print,
) -> tuple[Any, Any]:
    """(train, val) without what the policies of `apply_fault_policy` leave out; prints a summary of both.

    train may be val itself: a validation set alone, see data.detection.load. Raises DataError as `apply_fault_policy`
    does, and if no image or no object is left for training.
    """
    apply_fault_policy(errors, bad_boxes, bad_images, print)
    val_only = train is val
    if bad_images == "skip":
        val = without_unreadable(val, workers, print)
        train = val if val_only else without_unreadable(train, workers, print)
    for name, dataset in (("train", train), ("val", val))[val_only:]:
        if not len(dataset):
            raise DataError(f"no image left for {name}", "", "fix the errors listed above")
        print(f"{name}: {dataset.summary()}")
    if not val_only and not train.class_counts().any():
        raise DataError("nothing to train on", "", "all training images are background; check the annotations")
    absent = [name for name, count in zip(train.classes, val.class_counts()) if not count]
    if absent:
        print(f"  not in the validation set, so not measured: {', '.join(absent)}")
    return train, val


def check_data(
    train: Any, val: Any, errors: Sequence[DataError], workers: int, folder: Path, print: Print = print
) -> dict:
    """--check-data: also read every image, write all errors to FOLDER/data_errors.json, and raise DataError for any.
    If the file cannot be written they are printed all the same.

    Returns the metrics of such a run: none.
    """
    datasets = {"val": val} if train is val else {"train": train, "val": val}
    image_errors = [error for dataset in datasets.values() for error in chain(*unreadable(dataset, workers).values())]
    errors = unique([*errors, *image_errors])
    try:
        write_report(Path(folder) / REPORT, errors, datasets)
    except WriteError:
        for error in errors:  # found in minutes or hours
            print(str(error))
        raise
    apply_fault_policy(errors, "error", "error", print, max_lines=len(errors))
    training = "" if train is val else f"{len(train)} training and "
    print(f"no errors in {training}{len(val)} validation images")
    return {}


class _ReadCheck(Dataset):
    """Reads every image and discards it: its items are (index, errors). A data set whose samples are several files has
    `parts(index)`, functions that read one each."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        reads = self.dataset.parts(index) if hasattr(self.dataset, "parts") else [partial(self.dataset.load, index)]
        errors = []
        for read in reads:
            try:
                read()
            except DataError as error:
                errors.append((error.path, error.place, error.reason, error.kind))
        return index, errors


def unreadable(dataset: Any, workers: int, progress: bool = True) -> dict[int, list[DataError]]:
    """The errors of the images that cannot be read, by index. Reads every file: minutes for a large data set."""
    loader = Loader(_ReadCheck(dataset), workers, None, batch_size=None)
    bar = tqdm(loader, desc="checking images", unit="image", disable=None if progress else True)
    return {index: [DataError(*error) for error in errors] for index, errors in bar if errors}


def without_unreadable(dataset: Any, workers: int, print: Print = print) -> Any:
    """`dataset` without the images that cannot be read; their errors are printed. Reads every file."""
    errors = unreadable(dataset, workers)
    apply_fault_policy(unique(chain(*errors.values())), "drop", "skip", print)
    return dataset.without(errors) if errors else dataset


def unique(errors: Iterable[DataError]) -> list[DataError]:
    """The errors without repetitions: a file may belong to several images, and to both splits."""
    return list({str(error): error for error in errors}.values())


def write_report(path: Path, errors: Sequence[DataError], datasets: dict[str, Any]) -> None:
    """Write a data check as JSON: the number of images in each of `datasets`, by name, and every error."""
    report = {
        "images": {name: len(dataset) for name, dataset in datasets.items()},
        "errors": [{"path": e.path, "place": e.place, "reason": e.reason, "kind": e.kind} for e in errors],
    }
    files.write_json(path, report, indent=1)
