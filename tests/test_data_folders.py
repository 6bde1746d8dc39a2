"""Class folders: what is found, the kept list of files, and what is said about mistakes."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, check, drawn, files, folders, loader, transforms
from data.loader import StepSampler, collate_labels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of 30 drawn pictures; not to be written in."""
    return drawn.draw_imagefolder(tmp_path_factory.mktemp("drawn") / "set", images=30, seed=2, size=(64, 64))


@pytest.fixture
def root(tmp_path):
    """train and val with classes cat and dog; empty files."""
    for name in ("train/dog/2.jpg", "train/dog/deep/er/1.PNG", "train/cat/3.jpeg", "val/dog/4.gif", "val/cat/5.webp"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "set"


def names(dataset):
    return [(dataset.paths[index], dataset.classes[dataset.labels[index]]) for index in range(len(dataset))]


def test_what_is_found(root):
    for other in ("train/dog/notes.txt", "train/dog/._2.jpg", "train/.hidden/6.jpg", "train/readme.jpg"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).touch()
    train, val = folders.load(root)
    assert train.classes == val.classes == ["cat", "dog"]
    assert names(train) == [("cat/3.jpeg", "cat"), ("dog/2.jpg", "dog"), ("dog/deep/er/1.PNG", "dog")]
    assert names(val) == [("cat/5.webp", "cat"), ("dog/4.gif", "dog")]
    assert train.path(1) == str(root / "train/dog/2.jpg")
    assert train.labels.dtype == np.int32 and train.class_counts().tolist() == [1, 2]
    assert train.summary() == "images 3, classes 2\n  cat 1, dog 2"


def test_other_folders(root):
    (root / "train").rename(root / "learn")
    (root / "val").rename(root / "try")
    train, val = folders.load("nowhere", root / "learn", str(root / "try"))
    assert (len(train), len(val)) == (3, 2)
    (root / "try").rename(root / "val")
    assert len(folders.load(root, train=root / "learn")[1]) == 2


def test_a_checkpoints_classes_rule(root):
    train, val = folders.load(root, classes=["dog", "cat"])
    assert train.classes == val.classes == ["dog", "cat"]
    assert dict(names(train))["cat/3.jpeg"] == "cat" and train.labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="only the checkpoint has cow; only the folder has dog"):
        folders.load(root, classes=["cat", "cow"])


def test_a_set_without_some_classes_may_validate(root):
    (root / "val/cat/5.webp").unlink()
    (root / "val/cat").rmdir()
    train, val = folders.load(root)
    assert val.classes == train.classes and names(val) == [("dog/4.gif", "dog")]


def test_mistakes(root):
    with pytest.raises(DataError, match=r"nowhere/train: no such folder; .*--train DIR"):
        folders.load("nowhere")
    (root / "val/cow").mkdir()
    with pytest.raises(DataError, match=r"val/cow: no picture \(\.jpg .*\) in this class folder; fill or remove"):
        folders.load(root)
    (root / "val/cow/7.jpg").touch()
    os.utime(root / "val/cow", ns=(1, 1))
    with pytest.raises(DataError, match="val/cow: training has no such class; remove or rename the folder"):
        folders.load(root)
    (root / "plain").mkdir()
    (root / "plain/8.jpg").touch()
    with pytest.raises(DataError, match="plain: holds no class folder"):
        folders.load(root, train=root / "plain")


def test_all_faulty_folders_are_listed(root):
    """Also from the kept lists of files, the second time; the pictures of an unknown class are read by the check."""
    for name in ("train/c1", "train/c2", "val/c1", "val/d1"):
        (root / name).mkdir()
    (root / "val/d1/8.jpg").touch()
    for _ in range(2):
        faults = []
        train, val = folders.load(root, faults=faults)
        found = [(os.path.relpath(fault.path, root), fault.reason[:10]) for fault in faults]
        bare = [(name, "no picture") for name in ("train/c1", "train/c2", "val/c1")]
        assert found == [*bare, ("val/d1", "training h")]
        assert -1 not in train.labels and val.labels.tolist() == [2, -1, 3]
    assert "d1/8.jpg" in [val.paths[index] for index in check.unreadable(val, workers=0, progress=False)]
    said = []
    with pytest.raises(DataError, match="4 faults in the data, listed above"):
        folders.settle(train, val, faults, "skip", 0, said.append)
    assert len(said) == 4


def test_many_names_are_not_all_said(root):
    with pytest.raises(DataError, match=r"only the checkpoint has c00, .*, c09 and 20 more; only") as caught:
        folders.load(root, classes=[f"c{number:02}" for number in range(30)])
    assert "\n" not in str(caught.value)


# ---- the kept list ----


def scans(monkeypatch):
    """A list that grows by one for each class folder listed."""
    listed, real = [], folders._list_class

    def count(folder, name):
        listed.append(name)
        return real(folder, name)

    monkeypatch.setattr(folders, "_list_class", count)
    return listed


def kept(folder):
    return sorted(Path(folder).glob(".sightline_index_*.npz"))


def test_a_second_load_lists_nothing(root, monkeypatch):
    listed = scans(monkeypatch)
    first = folders.load(root)
    assert len(listed) == 4 and len(kept(root)) == 2
    again = folders.load(root)
    assert len(listed) == 4
    for one, other in zip(first, again):
        assert names(one) == names(other) and one.labels.dtype == other.labels.dtype
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("place", ["train/dog/9.jpg", "train/dog/deep/er/9.jpg", "train/cow/9.jpg"])
def test_a_new_file_anywhere_is_found(root, place):
    before = len(folders.load(root)[0])
    file = root / place
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.utime(file.parent, ns=(1, 1))  # whatever the clock's grain, another time
    train = folders.load(root)[0]
    assert len(train) == before + 1
    assert place.removeprefix("train/") in [name for name, _ in names(train)]


def test_a_folder_that_went_is_noticed(root):
    folders.load(root)
    (root / "train/dog/deep/er/1.PNG").unlink()
    (root / "train/dog/deep/er").rmdir()
    assert len(folders.load(root)[0]) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-300] + bytes(300)])
def test_a_damaged_list_is_made_anew(root, damage, monkeypatch):
    whole, said = names(folders.load(root)[0]), []
    file = next(file for file in kept(root) if "_train_" in file.name)
    file.write_bytes(damage(file.read_bytes()))
    assert names(folders.load(root, say=said.append)[0]) == whole
    assert len(said) == 1 and str(file) in said[0] and "damaged" in said[0]
    listed = scans(monkeypatch)
    folders.load(root, say=said.append)
    assert not listed and len(said) == 1


def test_a_list_that_may_not_be_read_is_not_called_damaged(root, monkeypatch):
    whole, said = names(folders.load(root)[0]), []

    def refuse(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders, "kept_arrays", refuse)
    assert names(folders.load(root, say=said.append)[0]) == whole
    assert len(said) == 2 and all("may not be read" in line and "damaged" not in line for line in said)


def test_a_list_of_another_format_is_made_anew(root, monkeypatch):
    folders.load(root)
    listed = scans(monkeypatch)
    monkeypatch.setattr(folders, "FORMAT", folders.FORMAT + 1)
    folders.load(root)
    assert len(listed) == 4


def test_where_the_data_cannot_be_written(root, tmp_path, monkeypatch):
    real = os.replace

    def refuse(source, place):
        if Path(place).parent == root:
            raise PermissionError("read-only")
        real(source, place)

    monkeypatch.setattr(files.os, "replace", refuse)
    listed, said = scans(monkeypatch), []
    folders.load(root, cache=tmp_path / "run", say=said.append)
    assert not said and not kept(root) and len(kept(tmp_path / "run")) == 2
    folders.load(root, cache=tmp_path / "run", say=said.append)
    assert len(listed) == 4
    folders.load(root, say=said.append)
    assert len(listed) == 8 and len(said) == 2 and "could not be kept" in said[0]


# ---- samples ----


def test_a_sample_depends_on_seed_epoch_and_index_alone(pictures):
    train, _ = folders.load(pictures, seed=5)
    train.transform = transforms.classify_train(32)
    image, label, image_id = train[1, 3]
    assert image_id == 3
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and type(label) is int
    before = torch.random.get_rng_state()
    assert torch.equal(train[1, 3][0], image)
    assert torch.equal(torch.random.get_rng_state(), before)
    other, _ = folders.load(pictures, seed=6)
    other.transform = train.transform
    assert not any(torch.equal(image, one) for one in (train[2, 3][0], train[1, 4][0], other[1, 3][0]))
    assert torch.equal(train[3][0], train[0, 3][0])
    assert torch.equal(pickle.loads(pickle.dumps(train))[1, 3][0], image)


def test_batches_are_the_same_for_any_number_of_workers(pictures):
    train, _ = folders.load(pictures)
    train.transform = transforms.classify_train(32)
    sampler = StepSampler(len(train), 4, 5, seed=0)
    here, there = (list(loader.train_loader(train, sampler, workers, collate=collate_labels)) for workers in (0, 2))
    assert len(here) == len(there) == 5
    for (images, labels, ids), (others, other_labels, other_ids) in zip(here, there):
        assert ids == other_ids
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert images.shape == (4, 3, 32, 32) and labels.dtype == torch.int64


def test_without_and_weights(root):
    train, _ = folders.load(root)
    assert names(train.without({1: "fault"})) == [("cat/3.jpeg", "cat"), ("dog/deep/er/1.PNG", "dog")]
    assert len(train) == 3
    np.testing.assert_allclose(train.balance_weights(), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(train.without([0]).balance_weights(), [0.5, 0.5])


def test_an_unreadable_picture_is_named(root):
    train, _ = folders.load(root)
    with pytest.raises(DataError, match=r"train/dog/2\.jpg: cannot be read as a picture") as caught:
        train[0, 1]
    assert caught.value.kind == "image"
    assert sorted(check.unreadable(train, workers=0, progress=False)) == [0, 1, 2]
    said = []
    assert len(check.skip_unreadable(train, 0, said.append)) == 0 and len(said) == 3
    with pytest.raises(DataError, match="no picture left for train"):
        folders.settle(*folders.load(root), [], "skip", 0, said.append)


def test_the_summary_of_many_classes(tmp_path):
    for split in ("train", "val"):
        for number in range(40):
            (tmp_path / split / f"{number:02}").mkdir(parents=True)
            for file in range(1 + number % 3):
                (tmp_path / split / f"{number:02}" / f"{file}.jpg").touch()
    assert folders.load(tmp_path)[0].summary() == "images 79, classes 40 of 1 to 3 images"


def test_drawn_pictures_can_be_read(pictures):
    train, val = folders.load(pictures)
    assert (len(train), len(val)) == (25, 5)
    assert train.class_counts().tolist() == [5] * 5 and val.class_counts().tolist() == [1] * 5
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(pictures / "val/disc/grey.png")
    grey = folders.load(pictures)[1]
    assert grey[[grey.paths[i] for i in range(6)].index("disc/grey.png")][0].shape == (3, 5, 5)
    (pictures / "val/disc/grey.png").unlink()


def test_real_pictures(shared, tmp_path):
    """80 photos of ants and bees for each split, one of them a palette GIF."""
    (tmp_path / "hymenoptera").symlink_to(shared / "data/hymenoptera_data/train")  # so that nothing is written there
    train, _ = folders.load(train=tmp_path / "hymenoptera", val=tmp_path / "hymenoptera")
    assert train.classes == ["ants", "bees"] and len(train) == 81
    gif = next(index for index in range(len(train)) if train.paths[index].endswith("imageNotFound.gif"))
    image, label, _ = train[gif]
    assert image.shape == (3, 300, 300) and label == 0
    assert not check.unreadable(train, workers=0, progress=False)
