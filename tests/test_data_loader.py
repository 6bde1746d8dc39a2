"""What a step sees: every picture once an epoch, the same for any number of workers and processes."""

import gc
import hashlib
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import DataError, loader, transforms, voc
from data.loader import StepSampler, Targets, collate, epoch_ended, steps_in


def batches_of(*args, **options):
    return list(StepSampler(*args, **options))


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (7, 7), (12, 4), (3, 8), (1, 2)])
def test_every_picture_once_an_epoch(count, batch):
    stream = batches_of(count, batch, steps_in(5, count, batch), seed=0)
    assert all(len(keys) == batch for keys in stream)
    flat = [key for keys in stream for key in keys]
    for epoch in range(5):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == [(epoch, index) for index in range(count)]
    if count > 3:
        orders = {tuple(index for _, index in flat[e * count : (e + 1) * count]) for e in range(5)}
        assert len(orders) == 5
        assert flat != [key for keys in batches_of(count, batch, len(stream), seed=1) for key in keys]


def test_batches_span_epochs():
    stream = batches_of(10, 4, 5, seed=0)
    assert [epoch for epoch, _ in stream[2]] == [0, 0, 1, 1]


@pytest.mark.parametrize("weights", [None, np.arange(1, 11) / 55])
def test_shares_of_processes_join_to_the_batch_of_one(weights):
    whole = batches_of(10, 6, 9, seed=3, weights=weights)
    shares = [batches_of(10, 6, 9, seed=3, rank=rank, world=2, weights=weights) for rank in (0, 1)]
    for step, keys in enumerate(whole):
        assert len(shares[0][step]) == len(shares[1][step]) == 3
        assert keys == [key for pair in zip(shares[0][step], shares[1][step]) for key in pair]


@pytest.mark.parametrize("first", [0, 1, 4, 8, 9])
def test_a_resumed_run_goes_on_at_the_next_picture(first):
    whole = batches_of(10, 6, 9, seed=3)
    rest = StepSampler(10, 6, 9, seed=3, first_step=first)
    assert list(rest) == whole[first:]
    assert len(rest) == 9 - first


def test_weights_are_chances():
    weights = np.array([0.7, 0.1, 0.1, 0.1, 0.0])
    drawn = Counter(index for keys in batches_of(5, 10, 200, seed=0, weights=weights) for _, index in keys)
    np.testing.assert_allclose([drawn[i] / 2000 for i in range(5)], weights, atol=0.04)
    assert drawn[4] == 0


# ---- batches of alike aspect ratio ----


@pytest.mark.parametrize("weights", [None, "drawn"])
@pytest.mark.parametrize(("count", "batch"), [(1003, 8), (640, 10), (7, 16), (9, 4), (1, 2)])
def test_alike_aspects_keep_every_promise(count, batch, weights):
    random = np.random.default_rng(4)
    aspects = random.choice([0.56, 0.67, 0.75, 1.0, 1.33, 1.5], size=count)
    weights = weights and random.dirichlet(np.ones(count))
    steps = steps_in(3, count, batch)
    options = {"seed": 2, "weights": weights, "aspects": aspects}
    whole = batches_of(count, batch, steps, **options)
    flat = [key for keys in whole for key in keys]
    plain = [key for keys in batches_of(count, batch, steps, seed=2, weights=weights) for key in keys]
    for epoch in range(3):  # the same pictures as without, which are each once where there are no weights
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == sorted(plain[epoch * count : (epoch + 1) * count])
    for first in (1, steps // 2, steps - 1):
        assert batches_of(count, batch, steps, first_step=first, **options) == whole[first:]
    shares = [batches_of(count, batch, steps, rank=rank, world=2, **options) for rank in (0, 1)]
    for keys, mine, yours in zip(whole, *shares, strict=True):
        assert keys == [key for pair in zip(mine, yours, strict=True) for key in pair]


def test_alike_aspects_waste_less_padding():
    random = np.random.default_rng(0)
    aspects = np.exp(random.normal(0, 0.35, size=2000))
    area = (608 / np.minimum(1, aspects)) * (608 / np.minimum(1, 1 / aspects))

    def padding(**options):
        """Pixels of padding in one of pictures, over two epochs; shortest side 608."""
        padded = 0
        for keys in batches_of(2000, 12, steps_in(2, 2000, 12), seed=1, **options):
            chosen = aspects[[index for _, index in keys]]
            padded += 12 * max(608 * np.maximum(1, chosen)) * max(608 * np.maximum(1, 1 / chosen))
        return padded / (2 * area.sum()) - 1

    assert padding() > 0.8
    assert padding(aspects=aspects) < 0.1


def test_alike_aspects_are_shuffled():
    aspects = np.arange(1000) / 1000
    keys = batches_of(1000, 10, 300, seed=0, aspects=aspects)
    means = np.array([aspects[[index for _, index in batch]].mean() for batch in keys])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # one batch tells nothing of the next
    assert len({frozenset(batch) for batch in keys}) == 300
    assert len({frozenset(index for _, index in batch) for batch in keys}) > 295  # other company in another epoch


# ---- steps and epochs ----


def test_steps_and_epochs():
    assert [steps_in(epochs, 10, 4) for epochs in (1, 2, 3)] == [3, 5, 8]
    assert steps_in(2.5, 10, 4) == 7
    assert [epoch_ended(step, 10, 4) for step in range(1, 11)] == [0, 0, 1, 0, 2, 0, 0, 3, 0, 4]
    assert [epoch_ended(step, 3, 8) for step in (1, 2, 3)] == [2, 5, 8]
    for epochs in (1, 2, 7):
        assert epoch_ended(steps_in(epochs, 10, 4), 10, 4) == epochs


# ---- samples and batches ----


@pytest.fixture
def dataset(drawn_voc):
    return voc.load([drawn_voc], "train", transform=transforms.ssd_train((40, 48), (123, 117, 104)), seed=5)


def digest(images, targets):
    content = [images.contiguous().numpy().tobytes()]
    for target in targets:
        content += [target[name].numpy().tobytes() for name in ("boxes", "labels", "ignore")]
        content.append(repr((target["image_id"], target["size"])).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()


def test_a_sample_depends_on_seed_epoch_and_index_alone(dataset, drawn_voc):
    def one(data, epoch, index):
        image, target = data[epoch, index]
        return digest(image.as_subclass(torch.Tensor), collate([(image, target)])[1])

    first = one(dataset, 1, 3)
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.random.get_rng_state()
    assert one(dataset, 1, 3) == first
    assert torch.equal(torch.random.get_rng_state(), before)  # and the caller's randomness is left alone
    other_seed = voc.load([drawn_voc], "train", transform=dataset.transform, seed=6)
    assert len({first, one(dataset, 2, 3), one(dataset, 1, 4), one(other_seed, 1, 3)}) == 4
    assert one(dataset, 0, 3) == digest(dataset[3][0].as_subclass(torch.Tensor), collate([dataset[3]])[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_batches_are_the_same_for_any_number_of_workers(dataset):
    steps = len(dataset) // 5  # an epoch of 20 pictures

    def epoch(number, workers):
        sampler = StepSampler(len(dataset), 5, steps * number, seed=0, first_step=steps * (number - 1))
        return [digest(*batch) for batch in loader.train_loader(dataset, sampler, workers)]

    second = epoch(2, 0)
    assert len(set(second)) == steps == 4
    assert epoch(2, 1) == second
    assert epoch(2, 4) == second
    assert not set(second) & set(epoch(1, 0))


def test_a_batch_is_plain_tensors_with_or_without_workers(dataset):
    for workers in (0, 1):
        images, targets = next(iter(loader.train_loader(dataset, StepSampler(20, 5, 1, seed=0), workers)))
        assert type(images) is torch.Tensor and images.dtype == torch.uint8 and images.shape == (5, 3, 40, 48)
        assert isinstance(targets, list) and len(targets) == 5
        for target in targets:
            assert {name: type(target[name]) for name in ("boxes", "labels", "ignore")} == dict.fromkeys(
                ("boxes", "labels", "ignore"), torch.Tensor
            )
            assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (len(target["labels"]), 4)
            assert target["labels"].dtype == torch.int64 and target["ignore"].dtype == torch.bool
            assert isinstance(target["image_id"], int) and isinstance(target["size"], tuple)


def test_targets_travel_without_shared_memory():
    """A tensor would be a file descriptor each; large batches then end in "too many open files"."""
    targets = Targets([{"boxes": torch.rand(2, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 3}])
    _, (content,) = targets.__reduce__()
    assert not any(isinstance(value, torch.Tensor) for value in content[0].values())
    again = pickle.loads(pickle.dumps(targets))
    assert isinstance(again, Targets) and again[0]["image_id"] == 3
    torch.testing.assert_close(again[0]["boxes"], targets[0]["boxes"], rtol=0, atol=0)
    assert again[0]["labels"].shape == (0,) and again[0]["labels"].dtype == torch.int64


class _Frozen(torch.utils.data.Dataset):
    """How many objects the garbage collector leaves alone."""

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return gc.get_freeze_count()


def test_workers_leave_what_they_share_to_their_parent():
    """A collection in a worker would copy every page of Python's objects: they are frozen there, and there alone."""
    batches = loader.train_loader(_Frozen(), loader.StepSampler(4, 2, 2, 0), 1, collate=list)
    assert all(count > 10_000 for batch in batches for count in batch)
    batches = loader.evaluation_loader(_Frozen(), 2, 1, collate=list)
    assert all(count > 10_000 for batch in batches for count in batch)
    assert gc.get_freeze_count() < 10_000


def test_spawned_workers(dataset):
    sampler = StepSampler(len(dataset), 4, 2, seed=0)
    spawned = DataLoader(
        dataset, batch_sampler=sampler, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    here = [digest(*batch) for batch in loader.train_loader(dataset, sampler, 0)]
    assert [digest(*batch) for batch in spawned] == here


def test_everything_can_be_pickled(dataset):
    for change in (dataset.transform, transforms.ssd_evaluate((40, 48))):
        dataset.transform = change
        again = pickle.loads(pickle.dumps(dataset))
        assert digest(*collate([again[1, 2]])) == digest(*collate([dataset[1, 2]]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_validation_picture_once(drawn_voc, world):
    dataset = voc.load([drawn_voc], "val", transform=transforms.ssd_evaluate((32, 32)))
    seen = []
    for rank in range(world):
        for images, targets in loader.evaluation_loader(dataset, 3, 0, rank, world):
            assert len(images) == len(targets)
            seen += [target["image_id"] for target in targets]
    assert sorted(seen) == list(range(len(dataset))) == [0, 1, 2, 3]


def test_a_workers_fault_keeps_its_one_line(drawn_voc, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(drawn_voc, root)
    bad = root / "JPEGImages" / "000002.jpg"
    bad.write_bytes(bad.read_bytes()[:500])
    dataset = voc.load([root], "train", transform=transforms.ssd_evaluate((32, 32)))
    with pytest.raises(DataError) as here:
        dataset[2]
    with pytest.raises(DataError) as caught:
        list(loader.train_loader(dataset, StepSampler(len(dataset), 4, 5, seed=0), workers=1))
    assert str(caught.value) == str(here.value)
    assert str(caught.value).startswith(f"{bad}: ") and "\n" not in str(caught.value)
    assert "\n" not in caught.value.path


def test_a_turned_photo_is_trained_on_upright(tmp_path):
    """The whole way: stored on its side, boxes for the upright view."""
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
    image, target = voc.load([tmp_path], "train")[0]
    assert target["size"] == (40, 60)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[:, y1:y2, x1:x2].float().mean() > 245
    assert image.float().sum() < 1.05 * 255 * 3 * 200
