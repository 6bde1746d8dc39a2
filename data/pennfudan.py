"""PennFudanPed folders: people with masks.

    ROOT/PNGImages/NAME.png            any picture format
    ROOT/PedMasks/NAME_mask.png        grey or palette, of the picture's size: 0 is background, other values are persons

The masks say everything: a box is the tight one around a mask, and a picture whose mask is all 0 is background. The
Annotation folder is not read. The set has no split: `split` draws one.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.boxes import Records, finish
from data.errors import DataError
from data.files import NAMED, missing_pictures
from data.images import SUFFIXES, image_size, opened
from ops import run_lengths

CLASSES = ("person",)
PICTURES, MASKS, ENDING = "PNGImages", "PedMasks", "_mask"
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # one number a pixel


def load(roots, classes=None, faults=None, transform=None, seed=0):
    """All pictures in all `roots`, joined and sorted by name in each, as a BoxDataset with masks.

    classes  names in label order; None takes CLASSES
    faults   a list that receives a DataError for everything wrong in the files; None raises the first

    Reads every mask once and keeps its run lengths. Raises DataError where a folder is no such set.
    """
    records, found = Records(masks=True), []
    for root in map(Path, roots):
        pictures, masks = _files(root / PICTURES, ""), _files(root / MASKS, ENDING)
        if not pictures:
            raise DataError(root / PICTURES, "", "holds no picture; put them there as NAME.png")
        alone = [masks[name].name for name in masks if name not in pictures]
        if alone:
            found.append(missing_pictures(root / MASKS, "", root / PICTURES, alone))
        for name in tqdm(pictures, desc="reading masks", unit="image", disable=None):
            try:
                _add(records, pictures[name], _read_pair(pictures[name], masks.get(name), root / MASKS))
            except DataError as error:
                found.append(error)
    return finish(records, classes or CLASSES, found, faults, transform=transform, seed=seed)


def _files(folder, ending):
    """NAME -> path of every picture file NAME + ending + suffix in `folder`, sorted."""
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; a PennFudanPed set has {PICTURES} and {MASKS}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.stem.endswith(ending))
    return {file.stem.removesuffix(ending): file for file in files}


def read_mask(path):
    """The numbers in a mask file, integers [H,W]; those of a palette file are its indices. Raises DataError of kind
    "image"."""
    with opened(path) as file:
        if file.mode not in MODES:
            reason = f"is a picture of colours ({file.mode}), not a number a pixel; save it as grey or palette PNG"
            raise DataError(path, "", reason, kind="image")
        return np.array(file).astype(np.int64)


def _read_pair(picture, mask, folder):
    """The numbers in the `mask` file of a `picture`, None where `folder` lacks it. Raises DataError of kind "image"."""
    if mask is None:
        reason = f"no {folder / picture.stem}{ENDING}.png; for a picture of nobody draw one of 0s"
        raise DataError(picture, "", reason, kind="image")
    (height, width), values = image_size(picture), read_mask(mask)
    if values.shape != (height, width):
        reason = f"is {values.shape[1]} x {values.shape[0]}, its picture {width} x {height}; draw it anew"
        raise DataError(mask, "", reason, kind="image")
    return values


def _add(records, path, values):
    """A picture, and an object for each value in its mask, as the values rise."""
    image = records.add_image(path, values.shape)
    for value in np.unique(values[values != 0]):
        mask = values == value
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        records.add_object(image, map(float, box), CLASSES[0], mask=run_lengths.encode(mask[None])[0])


def names(dataset):
    """File names of the pictures of a data set, in order: what to keep of a split."""
    return [Path(dataset.paths[index]).name for index in range(len(dataset))]


def split(dataset, share, seed):
    """(train, val) of `dataset`: val is a `share` (0 to 1) of the pictures, drawn by `seed`, one at least.

    The seed and the pictures' names alone decide, not where the folder lies. Raises DataError for fewer than two.
    """
    count = len(dataset)
    if count < 2:
        raise DataError(f"{count} picture", "", "too few to hold some out for validation; give two or more")
    held_out = min(count - 1, max(1, round(share * count)))
    order = np.argsort(names(dataset), kind="stable")
    return _divided(dataset, order[np.random.default_rng(seed).permutation(count)[:held_out]])


def split_by_names(dataset, held_out):
    """(train, val) of `dataset`: val is the pictures with these file names, of a split kept earlier.

    Raises DataError for a name that the data set lacks, and where no picture is left to train on.
    """
    have = names(dataset)
    lack = sorted(set(held_out) - set(have))
    if lack:
        more = f" and {len(lack) - NAMED} more" if len(lack) > NAMED else ""
        reason = f"{', '.join(lack[:NAMED])}{more} not in the data; give the set that the run began with"
        raise DataError("held-out pictures", "", reason)
    if not set(have) - set(held_out):
        raise DataError("held-out pictures", "", "all of the data: none is left to train on")
    return _divided(dataset, [index for index, name in enumerate(have) if name in set(held_out)])


def _divided(dataset, held_out):
    return dataset.without(held_out), dataset.only(held_out)
