"""Faults in the data: all of them, in one pass, one line each."""

import json
from functools import partial
from itertools import chain
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.errors import DataError

SHOWN = 50  # lines on the console before training; --check-data shows every one


def settle(faults, bad_boxes, bad_images, say=print, most=SHOWN):
    """Report `faults` (DataErrors) and go on if the policies allow it.

    bad_boxes    "drop": faults of kind "box" cost their object, "error": they stop the run
    bad_images   "skip": faults of kind "image" cost their picture, "error": they stop the run
    most         lines said, those that stop the run first

    Raises DataError for faults that stop the run: the fault itself where it is one, else their number.
    """
    outcome = {"box": "box dropped", "image": "picture skipped"}
    forgiven = {"box": bad_boxes == "drop", "image": bad_images == "skip"}
    fatal = [fault for fault in faults if not forgiven.get(fault.kind)]
    lines = [str(fault) for fault in fatal] if len(fatal) > 1 else []  # a lone one is raised, and said by the script
    lines += [f"{fault} ({outcome[fault.kind]})" for fault in faults if forgiven.get(fault.kind)]
    for line in lines[:most]:
        say(line)
    if len(lines) > most:
        say(f"... and {len(lines) - most} more; --check-data lists them all")
    if fatal:
        ways = {"box": "--bad-boxes drop leaves such boxes out", "image": "--bad-images skip leaves such pictures out"}
        remedy = "; ".join(ways[kind] for kind in sorted({fault.kind for fault in fatal} & set(ways)))
        if len(fatal) > 1:
            raise DataError(f"{len(fatal)} faults in the data, listed above", "", remedy or "mend the files")
        fault = fatal[0]
        raise DataError(fault.path, fault.place, "; ".join(filter(None, (fault.reason, remedy))), fault.kind)


class _Readable(Dataset):
    """Every picture read and thrown away: what comes back is its faults. A data set whose samples are several files
    offers `parts(index)`, functions that read one each."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        reads = self.dataset.parts(index) if hasattr(self.dataset, "parts") else [partial(self.dataset.load, index)]
        faults = []
        for read in reads:
            try:
                read()
            except DataError as error:
                faults.append((error.path, error.place, error.reason, error.kind))
        return index, faults


def _first(samples):
    return samples[0]


def unreadable(dataset, workers, progress=True):
    """{index: DataErrors} of the pictures that cannot be read. Reads every file: minutes for a large set."""
    loader = DataLoader(_Readable(dataset), batch_size=1, num_workers=workers, collate_fn=_first)
    bar = tqdm(loader, desc="checking pictures", unit="image", disable=None if progress else True)
    return {index: [DataError(*fault) for fault in faults] for index, faults in bar if faults}


def each_once(faults):
    """The DataErrors of a list without those that say the same: a file may serve several pictures, and both splits."""
    return list({str(fault): fault for fault in faults}.values())


def write_report(path, faults, datasets):
    """JSON of a data check: what was looked at and every fault."""
    report = {
        "images": {name: len(dataset) for name, dataset in datasets.items()},
        "faults": [{"path": f.path, "place": f.place, "reason": f.reason, "kind": f.kind} for f in faults],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def skip_unreadable(dataset, workers, say=print):
    """`dataset` less the pictures that cannot be read, each of which is said. Reads every file."""
    faults = unreadable(dataset, workers)
    settle(each_once(chain(*faults.values())), "drop", "skip", say)
    return dataset.without(faults) if faults else dataset


def usable(train, val, bad_images, workers, say=print):
    """(train, val) less the pictures that cannot be read where `bad_images` is "skip"; DataError where none is left."""
    if bad_images == "skip":
        train, val = (skip_unreadable(dataset, workers, say) for dataset in (train, val))
    for name, dataset in (("train", train), ("val", val)):
        if not len(dataset):
            raise DataError(f"no picture left for {name}", "", "mend the faults listed above")
    return train, val


def check_data(train, val, faults, workers, report, say=print):
    """--check-data: read every picture too, write all faults to the JSON file `report`, and raise DataError for any."""
    found = [fault for dataset in (train, val) for fault in chain(*unreadable(dataset, workers).values())]
    faults = each_once(faults + found)
    write_report(report, faults, {"train": train, "val": val})
    settle(faults, "error", "error", say, most=len(faults))
    say(f"no fault in {len(train)} training and {len(val)} validation pictures")
    return {}
