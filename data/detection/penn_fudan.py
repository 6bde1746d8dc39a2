"""PennFudanPed folders: people with masks.

    ROOT/PNGImages/NAME.png            images, in any format
    ROOT/PedMasks/NAME_mask.png        grayscale or palette, of the image's size: 0 is background, other values persons

A box is the tight one around a mask, and an image whose mask is all 0 is background. The Annotation folder is not read.
The data set has no split: `split` draws one.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.detection.dataset import Annotations, BoxDataset
from data.files import missing_images, read_lines, shortened
from data.images import SUFFIXES, image_size, open_image
from ops import rle
from utils.errors import DataError

CLASSES = ("person",)
IMAGES, MASKS, MASK_ENDING = "PNGImages", "PedMasks", "_mask"
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes with one number per pixel


def read(roots: Sequence[str | Path], only: Collection[str] | None = None) -> Annotations:
    """All images in all `roots`, joined and sorted by name in each, with masks, as run lengths.

    only: file names of the images to read, if not all

    Raises DataError where a folder is not a PennFudanPed data set.
    """
    annotations = Annotations(masks=True)
    annotations.classes = list(CLASSES)
    for root in map(Path, roots):
        images, masks = _list_images(root / IMAGES, ""), _list_images(root / MASKS, MASK_ENDING)
        if not images:
            raise DataError(root / IMAGES, "", "contains no image; put them there as NAME.png")
        if only is not None:
            stems = {Path(name).stem for name in only}
            images = {name: path for name, path in images.items() if path.name in only}
            masks = {name: path for name, path in masks.items() if name in stems}
        alone = [masks[name].name for name in masks if name not in images]
        if alone:
            annotations.errors.append(missing_images(root / MASKS, "", root / IMAGES, alone))
        for name in tqdm(images, desc="reading masks", unit="image", disable=None):
            try:
                values = _read_mask(images[name], masks.get(name), root / MASKS)
            except DataError as error:
                annotations.errors.append(error)
            else:
                _add(annotations, images[name], values)
    return annotations


def _list_images(folder, ending):
    """NAME -> path of every image file NAME + ending + suffix in `folder`, sorted."""
    if not folder.is_dir():
        raise DataError(folder, "", f"no such folder; a PennFudanPed data set has {IMAGES} and {MASKS}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.stem.endswith(ending))
    return {file.stem.removesuffix(ending): file for file in files}


def _read_mask(image, mask, folder):
    """int64 [H,W], the values in the file `mask` of `image`, indices if it has a palette. Raises DataError of kind
    "image", also for `mask` None: `folder` has no such file."""
    if mask is None:
        reason = f"no {folder / image.stem}{MASK_ENDING}.png; an image without people has a mask of zeros"
        raise DataError(image, "", reason, kind="image")
    height, width = image_size(image)
    with open_image(mask) as file:
        if file.mode not in MODES:
            reason = f"is a color image ({file.mode}); save it as a grayscale or palette PNG with a number per person"
            raise DataError(mask, "", reason, kind="image")
        values = np.array(file).astype(np.int64)
    if values.shape != (height, width):
        reason = f"is {values.shape[1]} x {values.shape[0]}, its image {width} x {height}; draw it again"
        raise DataError(mask, "", reason, kind="image")
    return values


def _add(annotations, path, values):
    """Add an image, and an object for each value in its mask, in increasing order."""
    image = annotations.add_image(path, values.shape)
    for value in np.unique(values[values != 0]):
        mask = values == value
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        annotations.add_object(image, map(float, box), CLASSES[0], mask=rle.encode(mask[None])[0])


def names(dataset: BoxDataset) -> list[str]:
    """File names of the images of a data set, in order: what identifies a split. DataError if two are the same."""
    paths = {}
    for index in range(len(dataset)):
        path = Path(dataset.paths[index])
        if path.name in paths:
            reason = f"{paths[path.name]} has the same name; rename one, because the split is saved by name"
            raise DataError(path, "", reason)
        paths[path.name] = path
    return list(paths)


def split(dataset: BoxDataset, share: float, seed: int) -> tuple[BoxDataset, BoxDataset]:
    """(train, val) of `dataset`: val is a random `share` (0 to 1) of the images, at least one.

    The split depends on the seed and on the file names, not on where the folder is. Raises DataError for fewer than two
    images.
    """
    count = len(dataset)
    if count < 2:
        raise DataError(f"{count} image", "", "too few for training and validation; give two or more")
    val_count = min(count - 1, max(1, round(share * count)))
    order = np.argsort(names(dataset), kind="stable")
    val = order[np.random.default_rng(seed).permutation(count)[:val_count]]
    return dataset.without(val), dataset.select(val)


def read_names(file: str) -> list[str]:
    """The names in a text file with the file name of an image per line. Raises DataError."""
    if not Path(file).is_file():
        raise DataError(
            file, "", "no such split; give all, or a text file of image names, such as held_out.txt of a run"
        )
    return [line.strip() for line in read_lines(file) if line.strip()]


def check_names(dataset: BoxDataset, held_out: Iterable[str]) -> None:
    """Raises DataError if an image with one of these file names is not in the data set."""
    missing = sorted(set(held_out) - set(names(dataset)))
    if missing:
        remedy = "give the data set that the run began with, or --eval-only --split all"
        reason = f"{shortened(missing)} not in the data; {remedy}"
        raise DataError("validation images", "", reason)


def split_by_names(dataset: BoxDataset, held_out: Iterable[str]) -> tuple[BoxDataset, BoxDataset]:
    """(train, val) of `dataset`: val is the images with the file names `held_out`, those of an earlier split.

    Raises DataError for a name that is not in the data set, and where no image is left for training.
    """
    available, held_out = names(dataset), set(held_out)
    check_names(dataset, held_out)
    val = [index for index, name in enumerate(available) if name in held_out]
    if len(val) == len(available):
        raise DataError("validation images", "", "are all images of the data set: none is left for training")
    return dataset.without(val), dataset.select(val)
