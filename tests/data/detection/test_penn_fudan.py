"""PennFudanPed folders: masks and boxes, all errors in one pass, and the split by seed."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

import synthetic
from data import DataError, check_target, checks
from data.detection import load_penn_fudan, penn_fudan
from data.detection.dataset import BoxDataset
from synthetic.shapes import drawing

SIZE = (96, 80)  # width, height


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synthetic.draw_pennfudan(tmp_path_factory.mktemp("drawn") / "people", images=24, seed=7, size=SIZE)


def write(root, name, values, mode="L", size=None):
    """An image and its mask of these values [H,W]; size (width, height) of the image if not the mask's."""
    for folder in ("PNGImages", "PedMasks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.asarray(values, dtype={"I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0, 255, 0, 0] + [90] * 759)  # two values of one color
    Image.new("RGB", size or mask.size, (9, 99, 199)).save(root / "PNGImages" / f"{name}.png")
    (mask if mode in ("P", "I;16") else mask.convert(mode)).save(root / "PedMasks" / f"{name}_mask.png")


def two_people(first=1, second=2):
    values = np.zeros((20, 30), dtype=int)
    values[2:10, 3:7] = first
    values[5:20, 6:30] = second
    return values


def read(root):
    annotations = penn_fudan.read([root])
    return BoxDataset(annotations), annotations.errors


def boxes_in(annotation):
    """Boxes of a PennFudanPed annotation file: the first pixel is 1, the last one belongs to the box."""
    lines = annotation.read_text(encoding="latin-1").splitlines()
    pairs = [re.findall(r"\((\d+), (\d+)\)", line) for line in lines if line.startswith("Bounding box")]
    numbers = [list(map(int, low + high)) for low, high in pairs]
    return torch.tensor(numbers, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0])


@pytest.mark.realdata
def test_people(shared):
    folder = shared / "data/PennFudanPed"
    dataset, errors = read(folder)
    assert not errors and len(dataset) == 85 and len(dataset.labels) == len(dataset.masks) == 213
    small, different = [], []
    for index, name in enumerate(penn_fudan.names(dataset)):
        image, target = dataset[index]
        check_target(image, target, 1)
        boxes = boxes_in(folder / "Annotation" / name.replace("png", "txt"))
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=6)
        different += [name] * (not torch.equal(torch.Tensor(target["boxes"]), boxes))
        values = np.asarray(Image.open(folder / "PedMasks" / name.replace(".png", "_mask.png")))
        combined = (target["masks"].numpy() * np.arange(1, len(boxes) + 1)[:, None, None]).sum(0)
        np.testing.assert_array_equal(combined, values)
        small += [name] * int((target["masks"].sum((1, 2)) < 80).sum())
    assert small == ["FudanPed00063.png"] * 2
    assert len(different) == 7  # people whose box was annotated before another's mask covered a side of them


def test_synthetic_masks_are_the_visible_parts(root):
    dataset, errors = read(root)
    assert not errors and len(dataset) == 24 and dataset.classes == ["person"]
    scenes = (drawing.draw_shapes(7, index, SIZE) for index in range(99))
    covered = 0
    for index, scene in zip(range(24), (scene for scene in scenes if not scene.crowd.any())):
        image, target = dataset[index]
        check_target(image, target, 1)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), scene.image)
        masks = target["masks"].numpy().astype(bool)
        assert masks.sum(0).max(initial=0) <= 1  # a pixel shows one object
        above = np.zeros(scene.image.shape[:2], bool)
        for visible, whole in zip(masks[::-1], scene.masks[::-1], strict=True):
            np.testing.assert_array_equal(visible, whole & ~above)
            covered += int((whole & above).any())
            above |= whole
        boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1]) if len(masks) else torch.zeros(0, 4)
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=0)
    assert covered > 5
    assert (np.diff(dataset.offsets) == 0).sum() == 2  # background images, one in twelve


@pytest.mark.parametrize(("mode", "values"), [("L", (1, 2)), ("L", (200, 7)), ("P", (1, 2)), ("I;16", (900, 1))])
def test_each_value_is_an_object(tmp_path, mode, values):
    write(tmp_path, "a", two_people(*values), mode)
    dataset, errors = read(tmp_path)
    target = dataset[0][1]
    assert not errors and target["labels"].tolist() == [0, 0] and target["ignore"].tolist() == [False, False]
    expected = [[3.0, 2, 7, 10], [6, 5, 30, 20]]
    assert target["boxes"].tolist() == (expected if values[0] < values[1] else expected[::-1])
    assert sorted(target["masks"].sum((1, 2)).tolist()) == [27, 15 * 24]  # five pixels of the first are covered


def test_an_image_without_people_is_background(tmp_path):
    write(tmp_path, "a", np.zeros((20, 30)))
    write(tmp_path, "b", np.zeros((20, 30)), mode="1")
    dataset, errors = read(tmp_path)
    assert not errors and len(dataset) == 2
    image, target = dataset[0]
    check_target(image, target, 1)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 20, 30)


def test_all_errors_in_one_pass(tmp_path):
    for name in "abcdef":
        write(tmp_path, name, two_people(), mode="RGB" if name == "e" else "L", size=(31, 20) if name == "c" else None)
    (tmp_path / "PedMasks/b_mask.png").unlink()
    (tmp_path / "PNGImages/d.png").unlink()
    (tmp_path / "PedMasks/f_mask.png").write_bytes(b"not an image")
    dataset, errors = read(tmp_path)
    assert penn_fudan.names(dataset) == ["a.png"] and {error.kind for error in errors} == {"image"}
    lines = sorted(str(error).removeprefix(f"{tmp_path}/") for error in errors)
    assert len(lines) == 5
    assert lines[0].startswith("PNGImages/b.png: no ") and "b_mask.png; an image without people" in lines[0]
    assert lines[1].startswith("PedMasks/c_mask.png: is 30 x 20, its image 31 x 20")
    assert lines[2].startswith("PedMasks/e_mask.png: is a color image (RGB)")
    assert lines[3].startswith("PedMasks/f_mask.png: cannot be read")
    assert "no image in" in lines[4] and lines[4].endswith("for d_mask.png")


def test_folders_that_are_not_such_data_sets(tmp_path):
    with pytest.raises(DataError, match="PNGImages: no such folder; a PennFudanPed data set has PNGImages and Ped"):
        penn_fudan.read([tmp_path])
    (tmp_path / "PNGImages").mkdir()
    with pytest.raises(DataError, match="PedMasks: no such folder"):
        penn_fudan.read([tmp_path])
    (tmp_path / "PedMasks").mkdir()
    with pytest.raises(DataError, match="contains no image"):
        penn_fudan.read([tmp_path])
    with pytest.raises(DataError, match="no such folder; give --data"):
        load_penn_fudan([tmp_path / "none"])


def test_the_split_depends_on_the_seed(root):
    dataset = read(root)[0]
    parts = {seed: penn_fudan.split(dataset, 0.25, seed) for seed in (0, 1)}
    for train, val in parts.values():
        assert len(train) == 18 and len(val) == 6
        assert sorted(penn_fudan.names(train) + penn_fudan.names(val)) == penn_fudan.names(dataset)
        check_target(*train[0], 1)
        assert len(train.masks) == len(train.labels) and len(train.labels) + len(val.labels) == len(dataset.labels)
    assert penn_fudan.names(parts[0][1]) != penn_fudan.names(parts[1][1])
    assert penn_fudan.names(penn_fudan.split(dataset, 0.25, 0)[1]) == penn_fudan.names(parts[0][1])
    assert [len(part) for part in penn_fudan.split(dataset, 0.0, 0)] == [23, 1]
    assert [len(part) for part in penn_fudan.split(dataset, 1.0, 0)] == [1, 23]
    with pytest.raises(DataError, match="1 image: too few"):
        penn_fudan.split(dataset.select([3]), 0.2, 0)


def test_two_images_of_one_name_are_an_error(root, tmp_path):
    """The saved split could not tell them apart."""
    shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(DataError, match=r"\.png has the same name; rename one"):
        load_penn_fudan([root, tmp_path / "copy"])


def test_an_earlier_split_by_its_file_names(root):
    train, val, errors = load_penn_fudan([root], val_share=0.25, split_seed=3)
    checks.apply(train, val, errors, "error", "error", 0, print=lambda line: None)
    again = load_penn_fudan([root], val_share=0.5, split_seed=4, held_out=penn_fudan.names(val))
    assert [penn_fudan.names(part) for part in again[:2]] == [penn_fudan.names(train), penn_fudan.names(val)]
    with pytest.raises(DataError, match=r"validation images: gone\.png not in the data"):
        load_penn_fudan([root], held_out=[*penn_fudan.names(val), "gone.png"])
    with pytest.raises(DataError, match="none is left for training"):
        load_penn_fudan([root], held_out=penn_fudan.names(train) + penn_fudan.names(val))


def test_a_validation_set_alone(root, tmp_path):
    """The images that were held out are enough; without their names, a part of the images is drawn, as for training."""
    _, val, _ = load_penn_fudan([root], split_seed=3)
    held_out = penn_fudan.names(val)
    again, second, _ = load_penn_fudan([root], split_seed=3, val_only=True)
    assert again is second and penn_fudan.names(again) == held_out
    alone = Path(shutil.copytree(root, tmp_path / "alone"))
    for path in (alone / "PNGImages").iterdir():
        if path.name not in held_out:
            path.unlink()
    (tmp_path / "names.txt").write_text("\n".join(held_out) + "\n\n")
    for options in ({"held_out": held_out}, {"split": str(tmp_path / "names.txt")}):
        dataset, _, errors = load_penn_fudan([alone], val_only=True, **options)
        assert penn_fudan.names(dataset) == held_out and not errors
    (alone / "PNGImages" / held_out[0]).unlink()
    with pytest.raises(DataError, match=f"{held_out[0]} not in the data"):
        load_penn_fudan([alone], val_only=True, held_out=held_out)
    assert len(load_penn_fudan([root], val_only=True, held_out=held_out, split="all")[0]) > len(held_out)
    with pytest.raises(DataError, match="nowhere: no such split; give all, or a text file"):
        load_penn_fudan([root], val_only=True, split="nowhere")


def test_the_classes_of_a_checkpoint_apply(root):
    train = load_penn_fudan([root], classes=["car", "person"])[0]
    assert train.classes == ["car", "person"] and set(train.labels.tolist()) == {1}
    assert load_penn_fudan([root], classes=["person"])[0].classes == ["person"]
    with pytest.raises(DataError, match="no class in common"):
        load_penn_fudan([root], classes=["car"])
