"""Image folders: which files are found, the cached list of files, errors in the data, and the samples."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import synthetic
from data import DataError, cache, checks, classification, loader, transforms
from data.classification import file_list


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Class folders of 30 synthetic images; not to be changed."""
    return synthetic.draw_imagefolder(tmp_path_factory.mktemp("drawn") / "set", images=30, seed=2, size=(64, 64))


@pytest.fixture
def root(tmp_path):
    """train and val with classes cat and dog; empty files."""
    for name in ("train/dog/2.jpg", "train/dog/deep/er/1.PNG", "train/cat/3.jpeg", "val/dog/4.gif", "val/cat/5.webp"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "set"


def load(*args, **options):
    """(train, val) of folders without errors."""
    train, val, errors = classification.load(*args, **options)
    assert not errors
    return train, val


def names(dataset):
    return [(dataset.paths[index], dataset.classes[dataset.labels[index]]) for index in range(len(dataset))]


def test_files_that_are_found(root):
    for other in ("train/dog/notes.txt", "train/dog/._2.jpg", "train/.hidden/6.jpg", "train/readme.jpg"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).touch()
    train, val = load(root)
    assert train.classes == val.classes == ["cat", "dog"]
    assert names(train) == [("cat/3.jpeg", "cat"), ("dog/2.jpg", "dog"), ("dog/deep/er/1.PNG", "dog")]
    assert names(val) == [("cat/5.webp", "cat"), ("dog/4.gif", "dog")]
    assert train.image_path(1) == str(root / "train/dog/2.jpg")
    assert train.labels.dtype == np.int32 and train.class_counts().tolist() == [1, 2]
    assert train.summary() == "images 3, classes 2\n  cat 1, dog 2"


def test_other_folders(root):
    (root / "train").rename(root / "learn")
    (root / "val").rename(root / "try")
    train, val = load("nowhere", root / "learn", str(root / "try"))
    assert (len(train), len(val)) == (3, 2)
    (root / "try").rename(root / "val")
    assert len(load(root, train=root / "learn")[1]) == 2


def test_the_classes_of_a_checkpoint_apply(root):
    train, val = load(root, classes=["dog", "cat"])
    assert train.classes == val.classes == ["dog", "cat"]
    assert dict(names(train))["cat/3.jpeg"] == "cat" and train.labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="only the checkpoint has cow; only the folder has dog"):
        load(root, classes=["cat", "cow"])


def test_a_validation_set_alone(root):
    """It may lack classes of the checkpoint, and may be another folder."""
    expected = names(load(root)[1])
    (root / "train").rename(root / "extra")
    train, val = load(root, val_only=True)
    assert train is val and names(val) == expected
    assert names(load(root, val_only=True, split="extra")[0])[0] == ("cat/3.jpeg", "cat")
    val, _ = load(root, classes=["cow", "dog", "cat"], val_only=True)
    assert val.classes == ["cow", "dog", "cat"] and sorted(val.labels.tolist()) == [1, 2]
    with pytest.raises(DataError, match="not the checkpoint's classes"):
        load(root, classes=["cow"], val_only=True)
    assert len(classification.load(root, classes=["cat"], val_only=True)[2]) == 1
    with pytest.raises(DataError, match=r"nowhere: no such split; folders in .*set: extra, val"):
        load(root, val_only=True, split="nowhere")


def test_long_lists_of_classes_are_shortened(root):
    with pytest.raises(DataError, match=r"only the checkpoint has c00, .*, c09 and 20 more; only") as caught:
        load(root, classes=[f"c{number:02}" for number in range(30)])
    assert "\n" not in str(caught.value)


def test_the_validation_set_may_have_fewer_classes(root):
    (root / "val/cat/5.webp").unlink()
    (root / "val/cat").rmdir()
    train, val = load(root)
    assert val.classes == train.classes and names(val) == [("dog/4.gif", "dog")]


def test_missing_folders(root):
    with pytest.raises(DataError, match=r"nowhere/train: no such folder; .*--train DIR"):
        load("nowhere")
    (root / "plain").mkdir()
    (root / "plain/8.jpg").touch()
    with pytest.raises(DataError, match="plain: contains no class folder"):
        load(root, train=root / "plain")


def test_all_invalid_class_folders_are_listed(root):
    """Also from the cached lists of files, the second time; the images of an unknown class are checked too."""
    for name in ("train/c1", "train/c2", "val/c1", "val/d1"):
        (root / name).mkdir()
    (root / "val/d1/8.jpg").touch()
    reason = "no image (.jpg .jpeg .png .bmp .tif .tiff .webp .gif) in this class folder; fill or remove it"
    expected = [(name, reason) for name in ("train/c1", "train/c2", "val/c1")]
    expected.append(("val/d1", "training has no such class; remove or rename the folder"))
    for _ in range(2):
        train, val, errors = classification.load(root)
        assert [(os.path.relpath(error.path, root), error.reason) for error in errors] == expected
        assert -1 not in train.labels and val.labels.tolist() == [2, -1, 3]
    assert "d1/8.jpg" in [val.paths[index] for index in checks.unreadable(val, workers=0, progress=False)]
    lines = []
    with pytest.raises(DataError, match="4 errors in the data, listed above"):
        checks.apply(train, val, errors, "error", "skip", 0, lines.append)
    assert len(lines) == 4


# ---- the cached list of files ----


def listed_classes(monkeypatch):
    """A list to which the name of each class folder is added when it is read."""
    listed, read_class = [], file_list._read_class

    def count(folder, name):
        listed.append(name)
        return read_class(folder, name)

    monkeypatch.setattr(file_list, "_read_class", count)
    return listed


def cached(folder):
    return sorted(Path(folder).glob(".sightline_files_*"))


def test_a_second_load_lists_nothing(root, monkeypatch):
    listed = listed_classes(monkeypatch)
    first = load(root)
    assert len(listed) == 4 and len(cached(root)) == 2
    again = load(root)
    assert len(listed) == 4
    for one, other in zip(first, again):
        assert names(one) == names(other) and one.labels.dtype == other.labels.dtype
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("place", ["train/dog/9.jpg", "train/dog/deep/er/9.jpg", "train/cow/9.jpg"])
def test_a_new_file_anywhere_is_found(root, place):
    before = len(load(root)[0])
    file = root / place
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.utime(file.parent, ns=(1, 1))  # another time, whatever the resolution of the clock
    train = load(root)[0]
    assert len(train) == before + 1
    assert place.removeprefix("train/") in [name for name, _ in names(train)]


def test_a_removed_folder_is_noticed(root):
    load(root)
    (root / "train/dog/deep/er/1.PNG").unlink()
    (root / "train/dog/deep/er").rmdir()
    assert len(load(root)[0]) == 2


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["content", "mtimes", "format"])
def test_a_damaged_list_is_made_again(root, damage, name, monkeypatch):
    whole, lines = names(load(root)[0]), []
    folder = next(folder for folder in cached(root) if "_train_" in folder.name)
    DAMAGE[damage](folder / f"{name}.npy")
    assert names(load(root, print=lines.append)[0]) == whole
    assert len(lines) == 1 and str(folder) in lines[0] and "damaged" in lines[0]
    listed = listed_classes(monkeypatch)
    load(root, print=lines.append)
    assert not listed and len(lines) == 1


def test_a_list_without_permission_to_read_is_not_called_damaged(root, monkeypatch):
    whole, lines = names(load(root)[0]), []

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_list, "load_arrays", refuse)
    assert names(load(root, print=lines.append)[0]) == whole
    assert len(lines) == 2 and all("no permission to read it" in line and "damaged" not in line for line in lines)


def test_a_list_of_another_format_is_made_again(root, monkeypatch):
    load(root)
    listed = listed_classes(monkeypatch)
    monkeypatch.setattr(file_list, "FORMAT", file_list.FORMAT + 1)
    load(root)
    assert len(listed) == 4


def test_where_the_data_cannot_be_written(root, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).parent == root:
            raise PermissionError("read-only")
        replace(source, target)

    monkeypatch.setattr(cache.os, "replace", refuse)
    listed, lines = listed_classes(monkeypatch), []
    load(root, cache=tmp_path / "run", print=lines.append)
    assert not lines and not cached(root) and len(cached(tmp_path / "run")) == 2
    load(root, cache=tmp_path / "run", print=lines.append)
    assert len(listed) == 4
    load(root, print=lines.append)
    assert len(listed) == 8 and len(lines) == 2 and "could not be cached" in lines[0]


# ---- samples ----


def test_a_sample_depends_on_seed_epoch_and_index_alone(drawn):
    train, _ = load(drawn, seed=5)
    train.transform = transforms.classification_train(32)
    image, label, image_id = train[1, 3]
    assert image_id == 3
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and type(label) is int
    before = torch.random.get_rng_state()
    assert torch.equal(train[1, 3][0], image)
    assert torch.equal(torch.random.get_rng_state(), before)
    other, _ = load(drawn, seed=6)
    other.transform = train.transform
    assert not any(torch.equal(image, one) for one in (train[2, 3][0], train[1, 4][0], other[1, 3][0]))
    assert torch.equal(train[3][0], train[0, 3][0])
    assert torch.equal(pickle.loads(pickle.dumps(train))[1, 3][0], image)


def test_batches_are_the_same_for_any_number_of_workers(drawn):
    train, _ = load(drawn)
    train.transform = transforms.classification_train(32)
    sampler = loader.StepSampler(len(train), 4, 5, seed=0)
    here, there = (
        list(loader.train_loader(train, sampler, loader.Process(workers=workers), loader.collate_labels))
        for workers in (0, 2)
    )
    assert len(here) == len(there) == 5
    for (images, labels, ids), (others, other_labels, other_ids) in zip(here, there):
        assert ids == other_ids
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert images.shape == (4, 3, 32, 32) and labels.dtype == torch.int64


def test_without_images_and_balance_weights(root):
    train, _ = load(root)
    assert names(train.without({1: "error"})) == [("cat/3.jpeg", "cat"), ("dog/deep/er/1.PNG", "dog")]
    assert len(train) == 3
    np.testing.assert_allclose(train.balance_weights(), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(train.without([0]).balance_weights(), [0.5, 0.5])


def test_an_unreadable_image_is_named(root):
    train, val = load(root)
    with pytest.raises(DataError, match=r"train/dog/2\.jpg: cannot be read") as caught:
        train[0, 1]
    assert caught.value.kind == "image"
    assert sorted(checks.unreadable(train, workers=0, progress=False)) == [0, 1, 2]
    lines = []
    assert len(checks.without_unreadable(train, 0, lines.append)) == 0 and len(lines) == 3
    with pytest.raises(DataError, match="no image left for train"):
        checks.apply(train, val, [], "error", "skip", 0, lines.append)


def test_the_summary_of_many_classes(tmp_path):
    for split in ("train", "val"):
        for number in range(40):
            (tmp_path / split / f"{number:02}").mkdir(parents=True)
            for file in range(1 + number % 3):
                (tmp_path / split / f"{number:02}" / f"{file}.jpg").touch()
    assert load(tmp_path)[0].summary() == "images 79, classes 40 of 1 to 3 images"


def test_synthetic_images_are_read(drawn, tmp_path):
    """Also a grayscale PNG and an animated palette GIF among them."""
    train, val = load(drawn)
    assert (len(train), len(val)) == (25, 5)
    assert train.class_counts().tolist() == [5] * 5 and val.class_counts().tolist() == [1] * 5
    assert not checks.unreadable(train, workers=0, progress=False)
    for name in ("train/disc", "val/disc"):
        (tmp_path / name).mkdir(parents=True)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "val/disc/gray.png")
    frames = [Image.fromarray(np.full((5, 7), value, np.uint8)).convert("P") for value in (20, 200)]
    frames[0].save(tmp_path / "train/disc/1.gif", save_all=True, append_images=frames[1:])
    for dataset in load(tmp_path):
        assert dataset[0][0].shape == (3, 5, 7)


@pytest.mark.realdata
def test_photos(shared, tmp_path):
    """Photos of ants and bees, one of them a palette GIF."""
    (tmp_path / "hymenoptera").symlink_to(shared / "data/hymenoptera_data/train")  # the list is cached in tmp_path
    train, _ = load(train=tmp_path / "hymenoptera", val=tmp_path / "hymenoptera")
    assert train.classes == ["ants", "bees"] and len(train) == 81
    gif = next(index for index in range(len(train)) if train.paths[index].endswith("imageNotFound.gif"))
    image, label, _ = train[gif]
    assert image.shape == (3, 300, 300) and label == 0
    assert not checks.unreadable(train, workers=0, progress=False)
