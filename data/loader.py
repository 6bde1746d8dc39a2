"""From a data set to batches: which images a step sees, and how they become one tensor."""

import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ops.matching import pad_boxes
from utils import interrupts
from utils.errors import DataError

Pack = Callable[[Sequence[dict]], Mapping[str, torch.Tensor]]
SHM_REMEDY = "use fewer --workers (0 needs none), a smaller --batch-size, or a larger /dev/shm (docker run --shm-size)"
QUEUES_BYTES = 64 * 1024  # per worker, that the queues to it take in /dev/shm at most
WINDOW = 64  # batches that are sorted by aspect ratio together: a larger window needs less padding but is less random


@dataclass(frozen=True)
class Process:
    """One of the processes that share the data, and how it loads its share."""

    rank: int = 0
    world_size: int = 1
    workers: int = 0  # data loading processes
    pin_memory: bool = False


class StepSampler(Sampler):
    """Batches of (epoch, index) for steps `first_step` to `steps`, for one process.

    The epochs, each a new permutation of all images, form one sequence that is cut into batches. No image is lost or
    repeated at the end of an epoch, no batch is short, and a batch may span two epochs. Process r gets every world-th
    image of a batch. A batch depends on the seed and the step alone, so a resumed run continues with the next image.

    count        images in the data set
    batch_size   images per step over all processes; a multiple of their number
    weights      float64 [count], the probability of each image: an epoch is then `count` draws with replacement
    aspects      float [count], height / width of each image: batches then have similar images, for less padding
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        process: Process = Process(),
        weights: np.ndarray | None = None,
        aspects: np.ndarray | None = None,
    ):
        self.count, self.batch_size, self.steps, self.seed = count, batch_size, steps, seed
        self.first_step, self.process = first_step, process
        self.weights, self.aspects = weights, None if aspects is None else np.asarray(aspects)

    def __len__(self) -> int:
        return self.steps - self.first_step

    def order(self, epoch: int) -> np.ndarray:
        """int64 [count], the images of `epoch` (from 0) in their order."""
        random = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = random.permutation(self.count)
        else:
            order = random.choice(self.count, size=self.count, p=self.weights)
        return order if self.aspects is None else self.group_by_aspect(epoch, order, random)

    def group_by_aspect(self, epoch: int, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """`order` with images of similar aspect in each batch: windows of WINDOW batches are sorted, then their batches
        shuffled. Images that share a batch with another epoch, less than a batch at either end, stay as drawn."""
        first = min(self.count, -epoch * self.count % self.batch_size)  # where this epoch's first whole batch begins
        last = self.count - (self.count - first) % self.batch_size
        parts = [order[:first]]
        for start in range(first, last, WINDOW * self.batch_size):
            window = order[start : min(last, start + WINDOW * self.batch_size)]
            window = window[np.argsort(self.aspects[window], kind="stable")].reshape(-1, self.batch_size)
            parts.append(random.permutation(window).ravel())
        return np.concatenate([*parts, order[last:]])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = order = None
        for step in range(self.first_step, self.steps):
            batch, end = [], (step + 1) * self.batch_size
            for position in range(step * self.batch_size + self.process.rank, end, self.process.world_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = self.order(epoch)
                batch.append((epoch, int(order[position % self.count])))
            yield batch


class Targets(list):
    """The targets of a batch, on the CPU, and `tensors`: what the losses need of them, as a dict of tensors [B,...].

    Data loading workers make both, and send the targets as arrays, with masks as bits: torch would pass each tensor on
    as a file in shared memory, and boxes, labels and ignore of two batches of 128 images are more than the 1,024 files
    that a process may usually have open. Two images with 20 masks each of 800 x 1333 pixels take 31 ms as bits, 128 ms
    as bytes.
    """

    def __init__(self, targets: Iterable[dict], tensors: Mapping[str, torch.Tensor]):
        super().__init__(targets)
        self.tensors = dict(tensors)

    def __getitem__(self, key):
        """A target; of a slice, `Targets`."""
        part = super().__getitem__(key)
        return Targets(part, {n: tensor[key] for n, tensor in self.tensors.items()}) if isinstance(key, slice) else part

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """`tensors` on a device; if it is a GPU, it is not waited for."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}

    def pin_memory(self) -> "Targets":
        """torch's DataLoader calls it; only `tensors` are copied to the GPU."""
        return Targets(self, {name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def __reduce__(self):
        return _unpack, ([_pack(target) for target in self], self.tensors)


def _pack(target):
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in target.items()}
    if "masks" in arrays:
        arrays["masks"] = np.packbits(arrays["masks"], axis=2), arrays["masks"].shape[2]
    return arrays


def _unpack(packed, tensors):
    targets = Targets([], tensors)
    for arrays in packed:
        if "masks" in arrays:
            bits, width = arrays["masks"]
            arrays["masks"] = np.unpackbits(bits, axis=2, count=width)
        targets.append({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()})
    return targets


def _plain(target):
    """`target` without torchvision's tensor classes."""
    return {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in target.items()}


def collate(samples: Sequence[tuple], pack: Pack = pad_boxes) -> tuple[torch.Tensor, Targets]:
    """[(image uint8 [3,H,W], target)] of one size -> (uint8 [B,3,H,W], B targets), all plain tensors.

    pack   makes `Targets.tensors` of a list of targets
    """
    images, targets = zip(*samples)
    targets = [_plain(target) for target in targets]
    return torch.stack(images), Targets(targets, pack(targets))


class PadCollate:
    """`collate` for images of any size: [(image uint8 [3,h,w], target)] -> (uint8 [B,3,H,W], B targets).

    multiple   H and W are the largest height and width, rounded up to a multiple of this number of pixels

    Each image is at the top left, padded with 0. Its target gets "shape", its own (h, w); masks keep that shape.
    """

    def __init__(self, multiple: int):
        self.multiple = multiple

    def padded_shape(self, *shapes: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a batch of images of these `shapes` (h, w)."""
        return tuple(-(-max(sides) // self.multiple) * self.multiple for sides in zip(*shapes))

    def groups(self, shapes: Iterable[tuple[int, int]]) -> list[list[int]]:
        """Positions in `shapes` (h, w) of images that alone have the same padded shape, in order of appearance.

        A network sees the padding, so what it detects in an image would depend on the other images of a batch if they
        had other padded shapes.
        """
        groups = {}
        for position, shape in enumerate(shapes):
            groups.setdefault(self.padded_shape(shape), []).append(position)
        return list(groups.values())

    def __call__(self, samples: Sequence[tuple]) -> tuple[torch.Tensor, Targets]:
        shapes = [tuple(image.shape[-2:]) for image, _ in samples]
        height, width = self.padded_shape(*shapes)
        batch = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels last
        for pixels, (image, _), (h, w) in zip(batch, samples, shapes):
            pixels[:, :h, :w] = image
        targets = [_plain(target) | {"shape": shape} for (_, target), shape in zip(samples, shapes)]
        return batch, Targets(targets, pad_boxes(targets))


def collate_labels(samples: Sequence[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """[(image uint8 [3,H,W], label, image_id)] of one size -> (uint8 [B,3,H,W], int64 [B], list of B ids)."""
    images, labels, image_ids = zip(*samples)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64), list(image_ids)


class Loader(DataLoader):
    """torch's DataLoader, the workers of which leave Ctrl-C and SIGTERM to their parent and end with it.

    A batch that does not fit into /dev/shm raises DataError: torch would print the error and wait for the batch for
    ever, because it moves a batch there in a thread.
    """

    def __init__(self, dataset: Dataset, workers: int, collate: Callable | None, **options: Any):
        collate_fn = SharedCollate(collate) if collate and workers else collate
        super().__init__(dataset, num_workers=workers, collate_fn=collate_fn, worker_init_fn=init_worker, **options)
        if workers:
            Finalize(None, interrupts.end_children, exitpriority=100)  # at the exit, before multiprocessing waits

    def __iter__(self):
        if self.num_workers and os.path.isdir("/dev/shm"):
            free = shutil.disk_usage("/dev/shm").free
            if free < QUEUES_BYTES * self.num_workers:
                raise DataError("/dev/shm", "", f"{free} bytes free, too few to start a worker; {SHM_REMEDY}")
        with interrupts.blocked():
            return super().__iter__()


@dataclass(frozen=True)
class SharedCollate:
    """`collate` in a worker, which then moves the tensors of the batch into shared memory. Raises DataError."""

    collate: Callable

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self.collate(samples)
        targets = [part.tensors.values() for part in batch if isinstance(part, Targets)]
        tensors = [part for part in chain(batch, *targets) if isinstance(part, torch.Tensor)]
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError as error:  # "unable to allocate ... </torch_...>: No space left on device (28)"
            size = sum(tensor.nbytes for tensor in tensors) / 2**20
            reason = f"no room for a batch of {size:.1f} MB: {str(error).rpartition(': ')[2]}; {SHM_REMEDY}"
            raise DataError("/dev/shm", "", reason) from error
        return batch


def init_worker(worker: int) -> None:
    """In a worker: leave signals to the parent, and exclude the objects that a forked worker shares with it from
    garbage collection, which writes to every object and thereby copies its memory page: 80 MB per worker for Python's
    and torch's own objects."""
    interrupts.follow_parent()
    gc.freeze()


def train_loader(
    dataset: Dataset, sampler: StepSampler, process: Process = Process(), collate: Callable = collate
) -> Loader:
    """Batches for the steps of `sampler`, in order, whatever the number of workers."""
    return _loader(dataset, process, collate, batch_sampler=sampler)


def eval_loader(dataset: Dataset, batch_size: int, process: Process = Process(), collate: Callable = collate) -> Loader:
    """This process's share of the images, each once. batch_size: over all processes. Its workers stay alive.

    With a PadCollate, the images of a batch have one padded shape, the one that each has alone: so their detections and
    losses are the same for any batch size and number of processes. The order of the images is the same for any batch
    size. The data set then has shapes(indices), (h, w) of its images.
    """
    indices, size = range(process.rank, len(dataset), process.world_size), batch_size // process.world_size
    options = {"batch_size": size}
    if isinstance(collate, PadCollate):
        groups = collate.groups(dataset.shapes(indices))
        batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        options = {"batch_sampler": batches}
    return _loader(Subset(dataset, indices), process, collate, persistent_workers=process.workers > 0, **options)


def _loader(dataset, process, collate, **options):
    return Loader(dataset, process.workers, collate, pin_memory=process.pin_memory, **options)


def one_batch_each(
    datasets: Sequence[Any], indices: Sequence[Sequence[int]], collates: Sequence[Callable] = (collate, collate)
) -> list[list[tuple]]:
    """For --preflight: in place of a loader for each data set, a list of one batch, of the images at its `indices`."""
    parts = zip(datasets, indices, collates, strict=True)
    return [[collate([dataset[int(i)] for i in chosen])] for dataset, chosen, collate in parts]


def largest_images(dataset: Any, count: int, min_side: int, max_side: int) -> list[int]:
    """Indices of `count` images that make the largest padded batch; those with the most objects fill the rest.

    dataset              with aspects(), float [N] of height / width, and most_objects(count), int [count]
    min_side, max_side   length of the shortest side and maximum of the longest after resizing, in pixels

    A batch is as high as its highest image and as wide as its widest; for one image only the area counts.
    """
    aspects = dataset.aspects()
    if count > 1:
        return [int(aspects.argmax()), int(aspects.argmin()), *dataset.most_objects(count - 2)]
    stretch = np.maximum(aspects, 1 / aspects)
    areas = np.minimum(min_side * stretch, max_side) * np.minimum(min_side, max_side / stretch)
    return [int(areas.argmax())]
