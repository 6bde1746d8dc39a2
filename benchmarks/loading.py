"""The loaders of the scripts without a network, and Pillow decoding the same files."""

import time
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.programs import Speed
from data import classification, detection, loader, nuscenes, transforms
from data.nuscenes import transforms as nuscenes_transforms

LAYOUTS = {"backbone": "imagefolder", "ssd": "coco", "retinanet": "coco", "centerfusion": "nuscenes"}  # of a script
BATCH_SIZE = 4


def script_loader(script: str, data: Path, workers: int) -> DataLoader:
    """One epoch of the training set in `data` with the augmentation that is the script's default."""
    collate = loader.collate
    if script == "backbone":
        dataset, collate = classification.load(data)[0], loader.collate_labels
        dataset.transform = transforms.classification_train(224)
    elif script == "centerfusion":
        dataset = nuscenes.load_split(data, "v1.0-mini", "mini_train")
        dataset.transform = nuscenes_transforms.centerfusion_train()
    else:
        dataset = detection.load("coco", [data])[0]
        dataset.transform = transforms.ssd_train((300, 300), (127, 127, 127))
        if script == "retinanet":
            dataset.transform, collate = transforms.multiscale_train([608], 1024), loader.PadCollate(32)
    sampler = loader.StepSampler(len(dataset), BATCH_SIZE, len(dataset) // BATCH_SIZE, seed=0)
    return loader.train_loader(dataset, sampler, loader.Process(workers=workers), collate)


def decoder(batches: DataLoader) -> DataLoader:
    """A loader that decodes the files of `batches` and does nothing with them."""
    paths = [batches.dataset.image_path(index) for index in range(len(batches.dataset))]
    return DataLoader(paths, BATCH_SIZE, collate_fn=decode, num_workers=batches.num_workers, drop_last=True)


def decode(paths):
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")


def speed(batches: DataLoader) -> Speed:
    """Images per second and worker. The first batch is not counted: meanwhile the workers start."""
    iterator = iter(batches)
    next(iterator)
    start = time.perf_counter()
    count = sum(BATCH_SIZE for _ in iterator)
    return Speed(count / (time.perf_counter() - start) / max(1, batches.num_workers))
