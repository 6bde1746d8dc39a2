"""Faults in the data: all of them, in one pass, one line each."""

import json
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.errors import DataError

SHOWN = 50  # lines on the console; the JSON of --check-data has them all


def settle(faults, bad_boxes, bad_images, say=print):
    """Report `faults` (DataErrors) and go on if the policies allow it.

    bad_boxes    "drop": faults of kind "box" cost their object, "error": they stop the run
    bad_images   "skip": faults of kind "image" cost their picture, "error": they stop the run

    Raises DataError with the number of faults that stop the run; each has been said before.
    """
    forgiven = {"box": bad_boxes == "drop", "image": bad_images == "skip"}
    fatal = [fault for fault in faults if not forgiven.get(fault.kind)]
    what = {"box": "box dropped", "image": "picture skipped"}
    shown = fatal if fatal else faults
    for fault in shown[:SHOWN]:
        say(f"{fault}" if fatal else f"{fault} ({what[fault.kind]})")
    if len(shown) > SHOWN:
        say(f"... and {len(shown) - SHOWN} more; --check-data writes them all")
    if len(fatal) == 1:
        raise fatal[0]
    if fatal:
        ways = {"box": "--bad-boxes drop leaves such boxes out", "image": "--bad-images skip leaves such pictures out"}
        remedy = "; ".join(ways[kind] for kind in sorted({fault.kind for fault in fatal} & set(ways)))
        raise DataError(f"{len(fatal)} faults in the data, listed above", "", remedy or "mend the files")


class _Readable(Dataset):
    """Every picture read and thrown away: what comes back is its fault, or None."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            self.dataset.load(index)
        except DataError as error:
            return index, (error.path, error.place, error.reason)
        return index, None


def _first(samples):
    return samples[0]


def unreadable(dataset, workers, progress=True):
    """{index: DataError} of the pictures that cannot be read. Reads every file once: minutes for a large set."""
    loader = DataLoader(_Readable(dataset), batch_size=1, num_workers=workers, collate_fn=_first)
    bar = tqdm(loader, desc="checking pictures", unit="image", disable=None if progress else True)
    return {index: DataError(*fault, kind="image") for index, fault in bar if fault}


def write_report(path, faults, datasets):
    """JSON of a data check: what was looked at and every fault."""
    report = {
        "images": {name: len(dataset) for name, dataset in datasets.items()},
        "faults": [{"path": f.path, "place": f.place, "reason": f.reason, "kind": f.kind} for f in faults],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
