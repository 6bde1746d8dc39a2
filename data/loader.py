"""From a data set to batches: which pictures a step sees, and how they become one tensor."""

import gc
import math

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, Subset

WINDOW = 64  # batches whose pictures are sorted by aspect ratio together: more pad less and are less random


class StepSampler(Sampler):
    """Batches of (epoch, index) for steps `first_step` to `steps`, for process `rank` of `world`.

    The order is one stream: every epoch a new permutation of all pictures, end to end, cut into batches. No picture is
    lost or shown twice at an epoch's end, no batch is short, and a batch may span two epochs. Batch size is the total;
    process r takes every world-th picture of it. What a step sees depends on (seed, step) alone, so a resumed run
    goes on at the very next picture.

    count        pictures in the data set
    batch_size   pictures a step over all processes; a multiple of `world`
    weights      float64 [count], the chance of each picture: an epoch is then `count` draws with replacement
    aspects      float [count], height / width of each picture: a batch then holds alike ones, for less padding
    """

    def __init__(self, count, batch_size, steps, seed, first_step=0, rank=0, world=1, weights=None, aspects=None):
        self.count, self.batch_size, self.steps, self.seed = count, batch_size, steps, seed
        self.first_step, self.rank, self.world = first_step, rank, world
        self.weights, self.aspects = weights, None if aspects is None else np.asarray(aspects)

    def __len__(self):
        return self.steps - self.first_step

    def order(self, epoch):
        """int64 [count], the pictures of `epoch` (from 0) in their order."""
        random = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = random.permutation(self.count)
        else:
            order = random.choice(self.count, size=self.count, p=self.weights)
        return order if self.aspects is None else self.alike(epoch, order, random)

    def alike(self, epoch, order, random):
        """`order` with pictures of like aspect in each batch: windows of WINDOW batches are sorted, then their batches
        shuffled. The pictures that share a batch with another epoch, less than a batch at either end, stay as drawn."""
        first = min(self.count, -epoch * self.count % self.batch_size)  # where this epoch's first whole batch begins
        last = self.count - (self.count - first) % self.batch_size
        pieces = [order[:first]]
        for start in range(first, last, WINDOW * self.batch_size):
            window = order[start : min(last, start + WINDOW * self.batch_size)]
            window = window[np.argsort(self.aspects[window], kind="stable")].reshape(-1, self.batch_size)
            pieces.append(random.permutation(window).ravel())
        return np.concatenate([*pieces, order[last:]])

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.first_step, self.steps):
            batch = []
            for position in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = self.order(epoch)
                batch.append((epoch, int(order[position % self.count])))
            yield batch


def steps_in(epochs, count, batch_size):
    """Steps after which `epochs` epochs of `count` pictures have been seen."""
    return -(-epochs * count // batch_size)


def epoch_ended(step, count, batch_size):
    """How many epochs are complete after `step`, if `step` completed one, else 0."""
    epochs = step * batch_size // count
    return epochs if epochs > (step - 1) * batch_size // count else 0


class Targets(list):
    """The targets of a batch, which go from a worker to the loop as one message of plain bytes.

    torch sends each tensor as a file in shared memory of its own: boxes, labels and ignore of 128 pictures, twice, are
    more than the 1,024 files that a process may usually have open. Masks, megabytes each, go as eight pixels a byte.
    """

    def __reduce__(self):
        arrays = _convert(self, torch.Tensor, torch.Tensor.numpy)
        for target in arrays:
            if "masks" in target:
                target["masks"] = np.packbits(target["masks"]), target["masks"].shape
        return _from_arrays, (arrays,)


def _from_arrays(targets):
    for target in targets:
        if "masks" in target:
            bits, shape = target["masks"]
            target["masks"] = np.unpackbits(bits, count=math.prod(shape)).reshape(shape)
    return Targets(_convert(targets, np.ndarray, torch.from_numpy))


def _convert(targets, kind, change):
    """`targets` with every field of type `kind` put through the function `change`."""
    return [{k: change(v) if isinstance(v, kind) else v for k, v in target.items()} for target in targets]


def _plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def collate(samples):
    """[(image uint8 [3,H,W], target)] of one size -> (uint8 [B,3,H,W], list of B targets), all plain tensors."""
    images, targets = zip(*samples)
    return torch.stack([_plain(image) for image in images]), Targets(_convert(targets, torch.Tensor, _plain))


class PadCollate:
    """`collate` for pictures of any size: [(image uint8 [3,h,w], target)] -> (uint8 [B,3,H,W], list of B targets).

    multiple   H and W are those of the largest picture rounded up to a multiple of this, in pixels

    Each picture lies at the top left, what is left over is 0, and its target gains "shape", its own (h, w). Masks stay
    in the targets, of that shape.
    """

    def __init__(self, multiple):
        self.multiple = multiple

    def __call__(self, samples):
        shapes = [tuple(image.shape[-2:]) for image, _ in samples]
        height, width = (-(-max(sides) // self.multiple) * self.multiple for sides in zip(*shapes))
        batch = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels last
        for pixels, (image, _), (h, w) in zip(batch, samples, shapes):
            pixels[:, :h, :w] = _plain(image)
        targets = [target | {"shape": shape} for (_, target), shape in zip(samples, shapes)]
        return batch, Targets(_convert(targets, torch.Tensor, _plain))


def collate_labels(samples):
    """[(image uint8 [3,H,W], label, image_id)] of one size -> (uint8 [B,3,H,W], int64 [B], list of B ids)."""
    images, labels, image_ids = zip(*samples)
    return torch.stack([_plain(image) for image in images]), torch.tensor(labels, dtype=torch.int64), list(image_ids)


def train_loader(dataset, sampler, workers, pin_memory=False, collate=collate):
    """Batches for the steps of `sampler`, in order, whatever the number of worker processes."""
    how = {"collate_fn": collate, "pin_memory": pin_memory, "worker_init_fn": spare_memory}
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, **how)


def evaluation_loader(dataset, batch_size, workers, rank=0, world=1, pin_memory=False, collate=collate):
    """This process's share of the pictures, each once."""
    share = Subset(dataset, range(rank, len(dataset), world))
    how = {"collate_fn": collate, "pin_memory": pin_memory, "worker_init_fn": spare_memory}
    return DataLoader(share, batch_size, num_workers=workers, **how)


def spare_memory(worker):
    """In a forked worker, keep the garbage collector from what it shares with its parent: it would mark each object,
    and what is marked is copied, 80 MB a worker of Python's and torch's own."""
    gc.freeze()
