"""What a step sees: every image once per epoch, the same for any number of workers and processes."""

import gc
import hashlib
import os
import pickle
import re
import shutil
import types
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from data import DataError, loader, transforms
from data.detection import voc
from data.detection.dataset import BoxDataset
from data.loader import Loader, PadCollate, Process, SharedCollate, StepSampler, Targets, collate, collate_labels
from ops.matching import pad_boxes
from utils import interrupts


def batches(*args, **options):
    return list(StepSampler(*args, **options))


def steps_in(epochs, count, batch_size):
    return -(-epochs * count // batch_size)


def batches_of_processes(*args, **options):
    """The batches of each of two processes."""
    return [batches(*args, process=Process(rank, world_size=2), **options) for rank in (0, 1)]


# ---- the order of images ----


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (7, 7), (12, 4), (3, 8), (1, 2)])
def test_every_image_once_per_epoch(count, batch_size):
    steps = batches(count, batch_size, steps_in(5, count, batch_size), seed=0)
    assert all(len(batch) == batch_size for batch in steps)
    flat = [key for batch in steps for key in batch]
    for epoch in range(5):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == [(epoch, index) for index in range(count)]
    if count > 3:
        orders = {tuple(index for _, index in flat[e * count : (e + 1) * count]) for e in range(5)}
        assert len(orders) == 5
        assert steps != batches(count, batch_size, len(steps), seed=1)


def test_batches_span_epochs():
    assert [epoch for epoch, _ in batches(10, 4, 5, seed=0)[2]] == [0, 0, 1, 1]


@pytest.mark.parametrize("weights", [None, np.arange(1, 11) / 55])
def test_shares_of_processes_are_the_batches_of_one_process(weights):
    shares = batches_of_processes(10, 6, 9, seed=3, weights=weights)
    for batch, *parts in zip(batches(10, 6, 9, seed=3, weights=weights), *shares, strict=True):
        assert [len(part) for part in parts] == [3, 3]
        assert batch == [key for pair in zip(*parts) for key in pair]


@pytest.mark.parametrize("first", [0, 1, 4, 8, 9])
def test_a_resumed_run_continues_with_the_next_image(first):
    rest = StepSampler(10, 6, 9, seed=3, first_step=first)
    assert list(rest) == batches(10, 6, 9, seed=3)[first:]
    assert len(rest) == 9 - first


def test_weights_are_probabilities():
    weights = np.array([0.7, 0.1, 0.1, 0.1, 0.0])
    drawn = Counter(index for batch in batches(5, 10, 200, seed=0, weights=weights) for _, index in batch)
    np.testing.assert_allclose([drawn[i] / 2000 for i in range(5)], weights, atol=0.04)
    assert drawn[4] == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(1003, 8), (640, 10), (7, 16), (9, 4), (1, 2)])
def test_grouping_by_aspect_changes_only_the_order(count, batch_size, weighted):
    random = np.random.default_rng(4)
    aspects = random.choice([0.56, 0.67, 0.75, 1.0, 1.33, 1.5], size=count)
    weights = random.dirichlet(np.ones(count)) if weighted else None
    steps = steps_in(3, count, batch_size)
    options = {"seed": 2, "weights": weights, "aspects": aspects}
    grouped = batches(count, batch_size, steps, **options)
    flat = [key for batch in grouped for key in batch]
    plain = [key for batch in batches(count, batch_size, steps, seed=2, weights=weights) for key in batch]
    for epoch in range(3):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == sorted(plain[epoch * count : (epoch + 1) * count])
    for first in (1, steps // 2, steps - 1):
        assert batches(count, batch_size, steps, first_step=first, **options) == grouped[first:]
    shares = batches_of_processes(count, batch_size, steps, **options)
    for batch, *parts in zip(grouped, *shares, strict=True):
        assert batch == [key for pair in zip(*parts, strict=True) for key in pair]


def test_grouping_by_aspect_needs_less_padding():
    random = np.random.default_rng(0)
    aspects = np.exp(random.normal(0, 0.35, size=2000))
    area = (608 / np.minimum(1, aspects)) * (608 / np.minimum(1, 1 / aspects))

    def padding(**options):
        """Pixels of padding per pixel of an image, over two epochs; shortest side 608."""
        padded = 0
        for batch in batches(2000, 12, steps_in(2, 2000, 12), seed=1, **options):
            in_batch = aspects[[index for _, index in batch]]
            padded += 12 * max(608 * np.maximum(1, in_batch)) * max(608 * np.maximum(1, 1 / in_batch))
        return padded / (2 * area.sum()) - 1

    assert padding() > 0.8
    assert padding(aspects=aspects) < 0.1


def test_batches_of_similar_aspect_are_shuffled():
    aspects = np.arange(1000) / 1000
    steps = batches(1000, 10, 300, seed=0, aspects=aspects)
    means = np.array([aspects[[index for _, index in batch]].mean() for batch in steps])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # a batch does not predict the next one
    assert len({frozenset(batch) for batch in steps}) == 300
    assert len({frozenset(index for _, index in batch) for batch in steps}) > 295  # epochs have different batches


# ---- samples and batches ----


@pytest.fixture
def dataset(drawn_voc):
    transform = transforms.ssd_train((40, 48), (123, 117, 104))
    return BoxDataset(voc.read([drawn_voc], "train"), transform=transform, seed=5)


def fingerprint(images, targets):
    content = [images.contiguous().numpy().tobytes()]
    for target in targets:
        content += [target[name].numpy().tobytes() for name in ("boxes", "labels", "ignore")]
        content.append(repr((target["image_id"], target["size"])).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()


def test_a_sample_depends_on_seed_epoch_and_index_alone(dataset, drawn_voc):
    def of_sample(dataset, epoch, index):
        return fingerprint(*collate([dataset[epoch, index]]))

    first = of_sample(dataset, 1, 3)
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.random.get_rng_state()
    assert of_sample(dataset, 1, 3) == first
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers do not change
    other_seed = BoxDataset(voc.read([drawn_voc], "train"), transform=dataset.transform, seed=6)
    assert len({first, of_sample(dataset, 2, 3), of_sample(dataset, 1, 4), of_sample(other_seed, 1, 3)}) == 4
    assert of_sample(dataset, 0, 3) == fingerprint(*collate([dataset[3]]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_batches_are_the_same_for_any_number_of_workers(dataset):
    steps = len(dataset) // 5  # an epoch of 20 images

    def of_epoch(number, workers):
        sampler = StepSampler(len(dataset), 5, steps * number, seed=0, first_step=steps * (number - 1))
        train_loader = loader.train_loader(dataset, sampler, Process(workers=workers))
        return [fingerprint(*batch) for batch in train_loader]

    second = of_epoch(2, 0)
    assert len(set(second)) == steps == 4
    assert of_epoch(2, 1) == second
    assert of_epoch(2, 4) == second
    assert not set(second) & set(of_epoch(1, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_has_plain_tensors(dataset, workers):
    sampler = StepSampler(20, 5, 1, seed=0)
    images, targets = next(iter(loader.train_loader(dataset, sampler, Process(workers=workers))))
    assert type(images) is torch.Tensor and images.dtype == torch.uint8 and images.shape == (5, 3, 40, 48)
    assert isinstance(targets, list) and len(targets) == 5
    for target in targets:
        assert {type(target[name]) for name in ("boxes", "labels", "ignore")} == {torch.Tensor}
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (len(target["labels"]), 4)
        assert target["labels"].dtype == torch.int64 and target["ignore"].dtype == torch.bool
        assert isinstance(target["image_id"], int) and isinstance(target["size"], tuple)


def test_workers_send_targets_without_shared_memory():
    """Each tensor would be an open file; large batches then end in "too many open files"."""
    target = {"boxes": torch.rand(2, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 3}
    targets = Targets([target], {"boxes": torch.rand(1, 2, 4)})
    _, (content, _) = targets.__reduce__()
    assert not any(isinstance(value, torch.Tensor) for value in content[0].values())
    received = pickle.loads(pickle.dumps(targets))
    assert isinstance(received, Targets) and received[0]["image_id"] == 3
    torch.testing.assert_close(received[0]["boxes"], targets[0]["boxes"], rtol=0, atol=0)
    assert received[0]["labels"].shape == (0,) and received[0]["labels"].dtype == torch.int64
    torch.testing.assert_close(received.to("cpu"), targets.tensors, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 4, 13), (0, 6, 9), (1, 1, 1)])
def test_masks_are_the_same_after_pickling(shape):
    targets = Targets([{"masks": torch.randint(2, shape, dtype=torch.uint8), "image_id": 0}], {})
    (received,) = pickle.loads(pickle.dumps(targets))
    torch.testing.assert_close(received["masks"], targets[0]["masks"], rtol=0, atol=0)
    assert received.keys() == targets[0].keys()


class FrozenObjects(torch.utils.data.Dataset):
    """The number of objects that the garbage collector of the reading process ignores."""

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return gc.get_freeze_count()


def test_workers_do_not_collect_the_objects_of_their_parent():
    """A collection in a worker would copy every memory page with Python objects."""
    process = Process(workers=1)
    train_loader = loader.train_loader(FrozenObjects(), StepSampler(4, 2, 2, seed=0), process, collate=list)
    assert all(count > 10_000 for batch in train_loader for count in batch)
    eval_loader = loader.eval_loader(FrozenObjects(), 2, process, collate=list)
    assert all(count > 10_000 for batch in eval_loader for count in batch)
    assert gc.get_freeze_count() < 10_000


class Signalled(torch.utils.data.Dataset):
    """Items during the reading of which SIGINT and SIGTERM arrive."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        for number in interrupts.STOP:
            os.kill(os.getpid(), number)
        return torch.full((2,), index)


def test_workers_leave_signals_to_their_parent():
    """Ctrl-C, `timeout` and Slurm reach them too, while the parent finishes its step."""
    batches = list(Loader(Signalled(), 1, torch.stack, batch_size=1))
    torch.testing.assert_close(batches, [torch.full((1, 2), 0), torch.full((1, 2), 1)])


def test_a_full_dev_shm_is_an_error_and_no_hang(dataset, monkeypatch):
    """torch's DataLoader would wait for the batch for ever."""

    def share(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    train_loader = loader.train_loader(dataset, StepSampler(20, 5, 1, seed=0), Process(workers=1))
    line = r"^/dev/shm: no room for a batch of 0\.0 MB: No space left on device \(28\); use fewer --workers \(0 "
    assert re.match(line, str(data_error(lambda: list(train_loader))))
    assert len(list(loader.train_loader(dataset, StepSampler(20, 5, 1, seed=0)))) == 1  # no workers, no shared memory


def test_batches_are_in_shared_memory_before_they_are_sent(dataset):
    images, targets = SharedCollate(collate)([dataset[0, 0]])
    assert images.is_shared() and all(tensor.is_shared() for tensor in targets.tensors.values())


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="Linux")
def test_a_dev_shm_without_room_for_the_queues_to_the_workers(dataset, monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=4096))
    error = data_error(lambda: list(Loader(dataset, 1, collate)))
    assert str(error).startswith("/dev/shm: 4096 bytes free, too few to start a worker; use fewer --workers (0 ")


@pytest.mark.slow
def test_spawned_workers(dataset):
    sampler = StepSampler(len(dataset), 4, 2, seed=0)
    options = {"batch_sampler": sampler, "collate_fn": collate, "num_workers": 1}
    spawned = DataLoader(dataset, multiprocessing_context="spawn", **options)
    expected = [fingerprint(*batch) for batch in loader.train_loader(dataset, sampler)]
    assert [fingerprint(*batch) for batch in spawned] == expected


def test_data_sets_can_be_pickled(dataset):
    for transform in (dataset.transform, transforms.ssd_eval((40, 48))):
        dataset.transform = transform
        unpickled = pickle.loads(pickle.dumps(dataset))
        assert fingerprint(*collate([unpickled[1, 2]])) == fingerprint(*collate([dataset[1, 2]]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_validation_image_once(drawn_voc, world_size):
    dataset = BoxDataset(voc.read([drawn_voc], "val"), transform=transforms.ssd_eval((32, 32)))
    image_ids = []
    for rank in range(world_size):
        for images, targets in loader.eval_loader(dataset, 3 * world_size, Process(rank, world_size)):
            assert len(images) == len(targets) <= 3
            image_ids += [target["image_id"] for target in targets]
    assert sorted(image_ids) == list(range(len(dataset))) == [0, 1, 2, 3]


def test_an_error_in_a_worker_has_the_same_line(drawn_voc, tmp_path):
    root = tmp_path / "voc"
    shutil.copytree(drawn_voc, root)
    bad = root / "JPEGImages" / "000002.jpg"
    bad.write_bytes(bad.read_bytes()[:500])
    dataset = BoxDataset(voc.read([root], "train"), transform=transforms.ssd_eval((32, 32)))
    expected = data_error(lambda: dataset[2])
    sampler = StepSampler(len(dataset), 4, 5, seed=0)
    error = data_error(lambda: list(loader.train_loader(dataset, sampler, Process(workers=1))))
    assert str(error) == str(expected)
    assert str(error).startswith(f"{bad}: ") and "\n" not in str(error)
    assert "\n" not in error.path


def data_error(function):
    """The DataError of a call without its traceback, which would keep a worker until a garbage collection: that then
    waits for it for 5 s."""
    try:
        function()
    except DataError as error:
        return error.with_traceback(None)
    raise AssertionError("no DataError")


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path):
    """A file with an EXIF orientation, from the disk to the sample."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:20, 30:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "JPEGImages/a.jpg", exif=exif, quality=95)
    box = "<bndbox><xmin>31</xmin><ymin>11</ymin><xmax>50</xmax><ymax>20</ymax></bndbox>"
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation><object><name>x</name>{box}</object></annotation>")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a")
    image, target = BoxDataset(voc.read([tmp_path], "train"))[0]
    assert target["size"] == (40, 60)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[:, y1:y2, x1:x2].float().mean() > 245
    assert image.float().sum() < 1.05 * 255 * 3 * 200


def sample(height, width, boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)), "image_id": 7}
    target |= {"labels": torch.arange(len(boxes)), "ignore": torch.zeros(len(boxes), dtype=torch.bool)}
    return tv_tensors.Image(torch.randint(1, 255, (3, height, width), dtype=torch.uint8)), target


def test_images_are_padded_to_one_size():
    samples = [sample(40, 70, [[1, 2, 30, 40]]), sample(65, 33, []), sample(10, 64, [])]
    images, targets = pickle.loads(pickle.dumps(PadCollate(32)))(samples)
    assert type(images) is torch.Tensor and images.dtype == torch.uint8 and images.shape == (3, 3, 96, 96)
    assert isinstance(targets, Targets) and type(targets[0]["boxes"]) is torch.Tensor
    assert [target["shape"] for target in targets] == [(40, 70), (65, 33), (10, 64)]
    torch.testing.assert_close(targets.tensors, pad_boxes(targets), rtol=0, atol=0)
    assert "shape" not in samples[0][1]
    for pixels, (image, _), (height, width) in zip(images, samples, [(40, 70), (65, 33), (10, 64)]):
        assert torch.equal(pixels[:, :height, :width], torch.Tensor(image).to(torch.uint8))
        assert not pixels[:, height:].any() and not pixels[:, :, width:].any()


def test_padding_stops_at_the_next_multiple():
    images, _ = PadCollate(32)([sample(64, 96, [])])
    assert images.shape == (1, 3, 64, 96)
    images, _ = PadCollate(1)([sample(61, 90, []), sample(60, 91, [])])
    assert images.shape == (2, 3, 61, 91)


def test_collate_labels():
    samples = [
        (tv_tensors.Image(torch.full((3, 4, 5), value, dtype=torch.uint8)), value, value + 1) for value in (3, 9)
    ]
    images, labels, image_ids = collate_labels(samples)
    assert type(images) is torch.Tensor and images.shape == (2, 3, 4, 5) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 9] and image_ids == [4, 10]
    assert images[1].unique().tolist() == [9]


# ---- --preflight ----


class Shapes:
    """Images of known height / width and numbers of objects, without files."""

    def __init__(self, aspects, objects):
        self.heights_per_width, self.objects = np.array(aspects), np.array(objects)

    def aspects(self):
        return self.heights_per_width

    def most_objects(self, count):
        return np.argsort(-self.objects, kind="stable")[:count]


def test_the_largest_batch_has_the_highest_the_widest_and_the_most_objects():
    dataset = Shapes([1.0, 0.5, 3.0, 1.5], [9, 0, 1, 5])
    assert loader.largest_images(dataset, 4, 600, 1000) == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("max_side", "largest"),
    [
        (1000, 3),  # 600 x 900, and 333 x 1000 for an aspect of 3
        (2000, 2),  # 600 x 1800
    ],
)
def test_the_largest_single_image_has_the_largest_area(max_side, largest):
    dataset = Shapes([1.0, 0.8, 3.0, 1.5], [0, 0, 0, 0])
    assert loader.largest_images(dataset, 1, 600, max_side) == [largest]
    wide = Shapes([1.0, 0.5, 1.5], [0, 0, 0])
    assert loader.largest_images(wide, 1, 600, 2000) == [1]  # 1200 x 600


def test_one_batch_of_each_data_set():
    samples = [
        (torch.full((3, 2, 2), value, dtype=torch.uint8), sample(2, 2, [])[1] | {"image_id": value})
        for value in range(3)
    ]
    ((train,), (val,)) = loader.one_batch_each((samples, samples), ([2, 0], np.array([1])))
    assert [target["image_id"] for target in train[1]] == [2, 0] and train[0].shape == (2, 3, 2, 2)
    assert [target["image_id"] for target in val[1]] == [1]


def test_workers_of_a_validation_stay_alive():
    dataset = [sample(2, 2, []) for _ in range(4)]
    assert loader.eval_loader(dataset, 2, Process(workers=1)).persistent_workers
    assert not loader.eval_loader(dataset, 2).persistent_workers


def test_a_process_validates_its_part_of_the_batch_at_once():
    dataset = [sample(2, 2, []) for _ in range(12)]
    batches = list(loader.eval_loader(dataset, 6, Process(rank=1, world_size=3)))
    assert [len(images) for images, _ in batches] == [2, 2]


def test_a_slice_of_targets_has_its_rows_of_the_tensors():
    _, targets = collate([sample(4, 4, [[0, 0, 1, 1 + number]]) for number in range(3)])
    part = targets[1:]
    assert isinstance(part, Targets) and part[0] is targets[1] and len(part) == 2
    torch.testing.assert_close(part.tensors, pad_boxes(part), rtol=0, atol=0)
