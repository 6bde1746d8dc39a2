"""PennFudanPed folders, real and drawn, their faults in one pass, and the split by seed."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from data import DataError, check_target, drawn, pennfudan, scenes
from data.detection import load_pennfudan, settle

SIZE = (96, 80)  # width, height


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return drawn.draw_pennfudan(tmp_path_factory.mktemp("drawn") / "people", images=24, seed=7, size=SIZE)


def write(root, name, values, mode="L", size=None, suffix=".png"):
    """A picture and its mask of these values [H,W]; size (width, height) of the picture if not the mask's."""
    for folder in ("PNGImages", "PedMasks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.asarray(values, dtype={"I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0, 255, 0, 0] + [90] * 759)  # two values of one colour
    Image.new("RGB", size or mask.size, (9, 99, 199)).save(root / "PNGImages" / f"{name}{suffix}")
    (mask if mode in ("P", "I;16") else mask.convert(mode)).save(root / "PedMasks" / f"{name}_mask.png")


def two_people(first=1, second=2):
    values = np.zeros((20, 30), dtype=int)
    values[2:10, 3:7] = first
    values[5:20, 6:30] = second
    return values


def load(root, **options):
    faults = []
    return pennfudan.load([root], faults=faults, **options), faults


def corners_in(annotation):
    """Boxes of a PennFudanPed annotation: the first pixel is 1, the last one belongs to the box."""
    lines = annotation.read_text(encoding="latin-1").splitlines()
    pairs = [re.findall(r"\((\d+), (\d+)\)", line) for line in lines if line.startswith("Bounding box")]
    numbers = [list(map(int, low + high)) for low, high in pairs]
    return torch.tensor(numbers, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0])


def test_real_people(shared):
    folder = shared / "data/PennFudanPed"
    dataset, faults = load(folder)
    assert not faults and len(dataset) == 85 and len(dataset.labels) == len(dataset.masks) == 213
    small, differing = [], []
    for index, name in enumerate(pennfudan.names(dataset)):
        image, target = dataset[index]
        check_target(image, target, 1)
        told = corners_in(folder / "Annotation" / name.replace("png", "txt"))
        torch.testing.assert_close(torch.Tensor(target["boxes"]), told, rtol=0, atol=6)
        differing += [name] * (not torch.equal(torch.Tensor(target["boxes"]), told))
        values = np.asarray(Image.open(folder / "PedMasks" / name.replace(".png", "_mask.png")))
        seen = (target["masks"].numpy() * np.arange(1, len(told) + 1)[:, None, None]).sum(0)
        np.testing.assert_array_equal(seen, values)
        small += [name] * int((target["masks"].sum((1, 2)) < 80).sum())
    assert small == ["FudanPed00063.png"] * 2
    assert len(differing) == 7  # people whose box was drawn before another's mask covered a side of them


def test_drawn_people_show_what_is_seen(root):
    dataset, faults = load(root)
    assert not faults and len(dataset) == 24 and dataset.classes == ["person"]
    crowdless = (scene for scene in (scenes.draw_scene(7, index, SIZE) for index in range(99)) if not scene.crowd.any())
    covered = 0
    for index, scene in zip(range(24), crowdless):
        image, target = dataset[index]
        check_target(image, target, 1)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), scene.image)
        masks = target["masks"].numpy().astype(bool)
        assert masks.sum(0).max(initial=0) <= 1  # a pixel shows one object
        above = np.zeros(scene.image.shape[:2], bool)
        for seen, whole in zip(masks[::-1], scene.masks[::-1], strict=True):
            np.testing.assert_array_equal(seen, whole & ~above)
            covered += int((whole & above).any())
            above |= whole
        boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1]) if len(masks) else torch.zeros(0, 4)
        torch.testing.assert_close(torch.Tensor(target["boxes"]), boxes, rtol=0, atol=0)
    assert covered > 5
    assert (np.diff(dataset.first) == 0).sum() == 2  # background, of every twelve pictures one


def test_the_command_draws_the_same_set(root, tmp_path, capsys):
    drawn.main(["pennfudan", str(tmp_path / "a"), "--images", "24", "--seed", "7", "--size", "96x80"])
    assert "24 pictures, classes person" in capsys.readouterr().out
    for file in (file for file in root.rglob("*.*") if file.is_file()):
        assert (tmp_path / "a" / file.relative_to(root)).read_bytes() == file.read_bytes()
    (tmp_path / "a/PNGImages/Drawn00004.png").unlink()  # cut off: drawn again
    drawn.draw_pennfudan(tmp_path / "a", images=24, seed=7, size=SIZE)
    assert (tmp_path / "a/PNGImages/Drawn00004.png").is_file()


@pytest.mark.parametrize(("mode", "values"), [("L", (1, 2)), ("L", (200, 7)), ("P", (1, 2)), ("I;16", (900, 1))])
def test_a_value_is_an_instance(tmp_path, mode, values):
    write(tmp_path, "a", two_people(*values), mode)
    dataset, faults = load(tmp_path)
    target = dataset[0][1]
    assert not faults and target["labels"].tolist() == [0, 0] and target["ignore"].tolist() == [False, False]
    expected = [[3.0, 2, 7, 10], [6, 5, 30, 20]]
    assert target["boxes"].tolist() == (expected if values[0] < values[1] else expected[::-1])
    assert sorted(target["masks"].sum((1, 2)).tolist()) == [27, 15 * 24]  # five pixels of the first are covered


def test_a_picture_of_nobody_is_background(tmp_path):
    write(tmp_path, "a", np.zeros((20, 30)))
    write(tmp_path, "b", np.zeros((20, 30)), mode="1")
    dataset, faults = load(tmp_path)
    assert not faults and len(dataset) == 2
    image, target = dataset[0]
    check_target(image, target, 1)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 20, 30)


def test_all_faults_in_one_pass(tmp_path):
    for name in "abcdef":
        write(tmp_path, name, two_people(), mode="RGB" if name == "e" else "L", size=(31, 20) if name == "c" else None)
    (tmp_path / "PedMasks/b_mask.png").unlink()
    (tmp_path / "PNGImages/d.png").unlink()
    (tmp_path / "PedMasks/f_mask.png").write_bytes(b"no picture")
    dataset, faults = load(tmp_path)
    assert pennfudan.names(dataset) == ["a.png"] and {fault.kind for fault in faults} == {"image"}
    lines = sorted(str(fault).removeprefix(f"{tmp_path}/") for fault in faults)
    assert len(lines) == 5
    assert lines[0].startswith("PNGImages/b.png: no ") and "b_mask.png; for a picture of nobody" in lines[0]
    assert lines[1].startswith("PedMasks/c_mask.png: is 30 x 20, its picture 31 x 20")
    assert lines[2].startswith("PedMasks/e_mask.png: is a picture of colours (RGB)")
    assert lines[3].startswith("PedMasks/f_mask.png: cannot be read as a picture")
    assert "no picture in" in lines[4] and lines[4].endswith("for d_mask.png")
    with pytest.raises(DataError, match="no picture in"):
        pennfudan.load([tmp_path])


def test_folders_that_are_no_such_set(tmp_path):
    with pytest.raises(DataError, match="PNGImages: no such folder; a PennFudanPed set has PNGImages and PedMasks"):
        pennfudan.load([tmp_path])
    (tmp_path / "PNGImages").mkdir()
    with pytest.raises(DataError, match="PedMasks: no such folder"):
        pennfudan.load([tmp_path])
    (tmp_path / "PedMasks").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        pennfudan.load([tmp_path])
    with pytest.raises(DataError, match="no such folder; give --data"):
        load_pennfudan([tmp_path / "none"])


def test_the_seed_splits(root):
    dataset = load(root)[0]
    parts = {seed: pennfudan.split(dataset, 0.25, seed) for seed in (0, 1)}
    for train, val in parts.values():
        assert len(train) == 18 and len(val) == 6
        assert sorted(pennfudan.names(train) + pennfudan.names(val)) == pennfudan.names(dataset)
        check_target(*train[0], 1)
        assert len(train.masks) == len(train.labels) and len(train.labels) + len(val.labels) == len(dataset.labels)
    assert pennfudan.names(parts[0][1]) != pennfudan.names(parts[1][1])
    assert pennfudan.names(pennfudan.split(dataset, 0.25, 0)[1]) == pennfudan.names(parts[0][1])
    assert [len(part) for part in pennfudan.split(dataset, 0.0, 0)] == [23, 1]
    assert [len(part) for part in pennfudan.split(dataset, 1.0, 0)] == [1, 23]
    with pytest.raises(DataError, match="1 picture: too few"):
        pennfudan.split(dataset.only([3]), 0.2, 0)


def test_a_split_kept_is_made_again(root):
    train, val, faults = load_pennfudan([root], share=0.25, split_seed=3)
    settle(train, val, faults, "error", "error", 0, say=lambda line: None)
    again = load_pennfudan([root], share=0.5, split_seed=4, held_out=pennfudan.names(val))
    assert [pennfudan.names(part) for part in again[:2]] == [pennfudan.names(train), pennfudan.names(val)]
    with pytest.raises(DataError, match=r"held-out pictures: gone\.png not in the data"):
        load_pennfudan([root], held_out=[*pennfudan.names(val), "gone.png"])
    with pytest.raises(DataError, match="none is left to train on"):
        load_pennfudan([root], held_out=pennfudan.names(train) + pennfudan.names(val))


def test_a_checkpoints_classes_rule(root):
    train = load_pennfudan([root], trained=["car", "person"])[0]
    assert train.classes == ["car", "person"] and set(train.labels.tolist()) == {1}
    assert load_pennfudan([root], trained=["person"])[0].classes == ["person"]
    with pytest.raises(DataError, match="no class in common"):
        load_pennfudan([root], trained=["car"])
