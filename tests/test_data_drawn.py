"""The drawn data sets: the same bytes each time, consistent layouts, and scenes as promised."""

import csv
import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import drawn, scene_files, scenes
from data.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 40


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return drawn.draw_voc(tmp_path_factory.mktemp("drawn") / "voc", images=IMAGES, seed=3)


@pytest.fixture(scope="module")
def open_images(tmp_path_factory):
    return drawn.draw_open_images(tmp_path_factory.mktemp("drawn") / "oi", images=IMAGES, seed=3)


@pytest.fixture(scope="module")
def many():
    return [scenes.draw_scene(0, index, (128, 96)) for index in range(150)]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_same_arguments_same_bytes(voc, open_images, tmp_path):
    assert digest(drawn.draw_voc(tmp_path / "a", images=IMAGES, seed=3)) == digest(voc)
    assert digest(drawn.draw_open_images(tmp_path / "b", images=IMAGES, seed=3)) == digest(open_images)
    assert digest(drawn.draw_voc(tmp_path / "c", images=IMAGES, seed=4)) != digest(voc)


def test_a_scene_does_not_depend_on_how_many_are_drawn(voc, tmp_path):
    few = drawn.draw_voc(tmp_path, images=5, seed=3)
    for name in ("JPEGImages/000004.jpg", "Annotations/000004.xml"):
        assert (few / name).read_bytes() == (voc / name).read_bytes()


def test_voc_layout(voc):
    names = {part: (voc / f"ImageSets/Main/{part}.txt").read_text().split() for part in ("train", "val", "test")}
    assert {part: len(lines) for part, lines in names.items()} == {"train": 28, "val": 6, "test": 6}
    assert (voc / "ImageSets/Main/trainval.txt").read_text().split() == names["train"] + names["val"]
    assert len({name for lines in names.values() for name in lines}) == IMAGES
    assert (voc / "labels.txt").read_text().split() == list(scenes.CLASSES)
    seen, empty = set(), 0
    for index, name in enumerate(names["train"] + names["val"] + names["test"]):
        tree = ElementTree.parse(voc / "Annotations" / f"{name}.xml").getroot()
        scene = scenes.draw_scene(3, index)
        with Image.open(voc / "JPEGImages" / tree.findtext("filename")) as image:
            assert image.mode == "RGB"
            assert image.size == (int(tree.findtext("size/width")), int(tree.findtext("size/height")))
        objects = tree.findall("object")
        corners = [[int(o.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        np.testing.assert_array_equal(np.reshape(corners, (-1, 4)) - [1, 1, 0, 0], scene.boxes)
        assert [o.findtext("name") for o in objects] == [scenes.CLASSES[label] for label in scene.labels]
        assert [o.findtext("difficult") == "1" for o in objects] == (scene.difficult | scene.crowd).tolist()
        assert [o.findtext("truncated") == "1" for o in objects] == scene.truncated.tolist()
        seen |= set(scene.labels.tolist())
        empty += not objects
    assert seen == set(range(len(scenes.CLASSES)))
    assert empty == 3


def test_open_images_layout(open_images):
    index = 0
    for split, count in (("train", 28), ("validation", 6), ("test", 6)):
        with open(open_images / f"sub-{split}-annotations-bbox.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        pictures = sorted((open_images / split).glob("*.jpg"))
        assert len(pictures) == count
        assert {row["ImageID"] for row in rows} <= {path.stem for path in pictures}
        for path in pictures:
            mine, scene = [row for row in rows if row["ImageID"] == path.stem], scenes.draw_scene(3, index)
            with Image.open(path) as image:
                size = image.size
            corners = [[float(row[key]) for key in ("XMin", "YMin", "XMax", "YMax")] for row in mine]
            np.testing.assert_allclose(np.reshape(corners, (-1, 4)) * [*size, *size], scene.boxes, atol=1e-3)
            assert [row["ClassName"] for row in mine] == [scenes.CLASSES[label] for label in scene.labels]
            assert [row["IsGroupOf"] == "1" for row in mine] == scene.crowd.tolist()
            assert [row["IsOccluded"] == "1" for row in mine] == scene.difficult.tolist()
            index += 1


def test_coco_layout(tmp_path):
    coco, seen, index = drawn.draw_coco(tmp_path, images=IMAGES, seed=3), set(), 0
    for part, count in (("train", 34), ("val", 6)):
        content = json.loads((coco / f"annotations/instances_{part}2017.json").read_text())
        assert [(c["id"], c["name"]) for c in content["categories"]] == list(zip((1, 3, 7, 10, 18), scenes.CLASSES))
        assert len(content["images"]) == count == len(list((coco / f"{part}2017").iterdir()))
        label_of = {category["id"]: label for label, category in enumerate(content["categories"])}
        for image in content["images"]:
            scene = scenes.draw_scene(3, index)
            with Image.open(coco / f"{part}2017" / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
            assert image["id"] > 0 and image["file_name"] == f"{image['id']:012d}.jpg"
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [label_of[a["category_id"]] for a in mine] == scene.labels.tolist()
            assert [a["iscrowd"] == 1 for a in mine] == scene.crowd.tolist()
            for annotation, box, mask in zip(mine, scene.boxes, scene.masks, strict=True):
                x, y, w, h = annotation["bbox"]
                assert [x, y, x + w, y + h] == box.tolist()
                np.testing.assert_array_equal(decoded(annotation["segmentation"]), mask)
                assert annotation["area"] == mask.sum()
                seen.add(annotation["id"])
            index += 1
    assert index == IMAGES and len(seen) > IMAGES  # ids are of one object each, over both files


def decoded(segmentation):
    """Uncompressed RLE -> bool [H,W]: runs down the columns, the first one outside."""
    inside = np.arange(len(segmentation["counts"])) % 2 == 1
    return np.repeat(inside, segmentation["counts"]).reshape(segmentation["size"], order="F")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools's own
def test_pycocotools_reads_the_masks():
    mask_tools = pytest.importorskip("pycocotools.mask")
    for mask in (np.zeros((4, 5), bool), np.ones((4, 5), bool), np.eye(4, 5, dtype=bool)):
        rle = scene_files.run_lengths(mask)
        np.testing.assert_array_equal(decoded(rle), mask)
        np.testing.assert_array_equal(mask_tools.decode(mask_tools.frPyObjects(rle, 4, 5)).astype(bool), mask)


def test_csv_layout(tmp_path):
    root = drawn.draw_csv(tmp_path, images=IMAGES, seed=3)
    with open(root / "classes.csv", newline="") as file:
        assert list(csv.reader(file)) == [[name, str(label)] for label, name in enumerate(scenes.CLASSES)]
    left_out = background = index = 0
    for part, count in (("train", 34), ("val", 6)):
        with open(root / f"{part}.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert all(len(row) == 6 for row in rows)
        paths = list(dict.fromkeys(row[0] for row in rows))
        assert len(paths) == count
        for path in paths:
            scene = scenes.draw_scene(3, index)
            with Image.open(root / path) as image:
                assert image.size == scene.image.shape[1::-1]
            mine = [row[1:] for row in rows if row[0] == path]
            plain = ~(scene.crowd | scene.difficult)
            if plain.any():
                assert [[int(value) for value in row[:4]] for row in mine] == scene.boxes[plain].tolist()
                assert [row[4] for row in mine] == [scenes.CLASSES[label] for label in scene.labels[plain]]
            else:
                assert mine == [[""] * 5]
                background += 1
            left_out += (~plain).sum()
            index += 1
    assert index == IMAGES and background >= 3 and left_out > 0


def test_imagefolder_layout(tmp_path):
    root = drawn.draw_imagefolder(tmp_path, images=IMAGES, seed=3)
    for part, indices in (("train", range(34)), ("val", range(34, 40))):
        assert sorted(folder.name for folder in (root / part).iterdir()) == sorted(scenes.CLASSES)
        for index in indices:
            scene = scenes.draw_portrait(3, index)
            assert len(scene.labels) == 1
            with Image.open(root / part / scenes.CLASSES[scene.labels[0]] / f"{index:06d}.jpg") as image:
                assert image.size == scene.image.shape[1::-1] and 80 <= min(image.size) <= max(image.size) <= 128
    assert sum(1 for _ in root.rglob("*.jpg")) == IMAGES
    with pytest.raises(DataError, match="draw 10 or more"):
        drawn.draw_imagefolder(tmp_path / "few", images=9)


def test_few_portraits_have_every_class_in_both_parts(tmp_path):
    root = drawn.draw_imagefolder(tmp_path, images=10, size=(64, 64))
    assert all(len(list((root / part / name).iterdir())) == 1 for part in ("train", "val") for name in scenes.CLASSES)


def test_portraits_are_large_and_varied():
    portraits = [scenes.draw_portrait(0, index, (96, 96)) for index in range(60)]
    whole = [scene for scene in portraits if not scene.truncated[0]]
    assert 0 < len(portraits) - len(whole) < 20
    sides = np.array([(scene.boxes[0, 2:] - scene.boxes[0, :2]).max() for scene in whole])
    assert sides.min() >= 0.4 * 96 and sides.max() <= 0.98 * 96 and sides.std() > 5
    centres = np.array([(scene.boxes[0, 2:] + scene.boxes[0, :2]) / 2 for scene in portraits])
    assert (centres.std(axis=0) > 8).all()


def test_boxes_are_tight_around_the_masks_and_inside(many):
    for scene in many:
        height, width = scene.image.shape[:2]
        assert (scene.image.dtype, width, height) == (np.uint8, 128, 96)
        assert len(scene.labels) == len(scene.boxes) == len(scene.masks) == len(scene.hidden)
        for (x1, y1, x2, y2), mask in zip(scene.boxes, scene.masks, strict=True):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum()
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_scenes_hold_what_they_promise(many):
    assert sum(len(scene.labels) == 0 for scene in many) == 12  # 8 %
    counts = np.bincount(np.concatenate([scene.labels for scene in many]), minlength=len(scenes.CLASSES))
    assert counts.min() > 0.5 * counts.max()
    objects = counts.sum()
    assert 0 < sum(scene.difficult.sum() for scene in many) < 0.1 * objects
    assert 0 < sum(scene.truncated.sum() for scene in many) < 0.2 * objects
    assert sum(scene.crowd.sum() for scene in many) > 0
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2])[~scene.truncated].max(axis=1) for scene in many])
    assert sides.min() >= 0.09 * 96
    assert sides.max() <= 0.70 * 96
    assert all((scene.hidden < scenes.UNSEEN).all() for scene in many)


def test_colour_does_not_tell_the_class(many):
    """Each class has objects in red, green and blue tones; a class of one colour would fail."""
    strongest = {label: set() for label in range(len(scenes.CLASSES))}
    for scene in many:
        for label, mask in zip(scene.labels.tolist(), scene.masks, strict=True):
            strongest[label].add(int(scene.image[mask].mean(axis=0).argmax()))
    assert all(channels == {0, 1, 2} for channels in strongest.values())


def test_size_is_exact_where_given_and_varied_where_not(voc, tmp_path):
    fixed = drawn.draw_voc(tmp_path, images=3, size=(200, 150))
    assert {Image.open(path).size for path in (fixed / "JPEGImages").iterdir()} == {(200, 150)}
    sizes = {Image.open(path).size for path in (voc / "JPEGImages").iterdir()}
    assert len(sizes) > IMAGES / 2
    assert all(288 <= width <= 352 and 216 <= height <= 264 for width, height in sizes)


def test_a_whole_set_is_kept_and_a_cut_off_one_drawn_again(tmp_path, monkeypatch):
    out = drawn.draw_voc(tmp_path / "set", images=4, size=(80, 64))
    whole = digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "draw_scene", lambda *_: pytest.fail("drew again"))
        drawn.draw_voc(out, images=4, size=(80, 64))
    (out / "JPEGImages/000002.jpg").unlink()
    drawn.draw_voc(out, images=4, size=(80, 64))
    assert digest(out) == whole

    def cut_off(seed, index, size):
        if index == 2:
            raise KeyboardInterrupt
        return scenes.draw_scene(seed, index, size)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "draw_scene", cut_off)
        with pytest.raises(KeyboardInterrupt):
            drawn.draw_voc(other, images=4, size=(80, 64))
    assert digest(drawn.draw_voc(other, images=4, size=(80, 64))) == whole


def test_refuses_a_folder_with_other_files(tmp_path):
    out = tmp_path / "set"
    drawn.draw_voc(out, images=3, size=(80, 64))
    with pytest.raises(DataError, match="images 3, not 4"):
        drawn.draw_voc(out, images=4, size=(80, 64))
    with pytest.raises(DataError, match="layout voc, not open_images"):
        drawn.draw_open_images(out, images=3, size=(80, 64))
    (out / drawn.MARK).write_text("[1]")
    with pytest.raises(DataError, match=r"drawn\.json: .*not written by data\.drawn"):
        drawn.draw_voc(out, images=3, size=(80, 64))
    (out / drawn.MARK).unlink()
    with pytest.raises(DataError, match="holds files"):
        drawn.draw_voc(out, images=3, size=(80, 64))
    with pytest.raises(DataError, match="is a file"):
        drawn.draw_voc(out / "labels.txt")
    with pytest.raises(DataError, match="cannot be written"):
        drawn.draw_voc(out / "labels.txt" / "deeper")
    with pytest.raises(DataError, match="seed -1: must be 0"):
        drawn.draw_voc(tmp_path / "new", seed=-1)
    with pytest.raises(DataError, match="too few"):
        drawn.draw_voc(tmp_path / "new", images=2)
    with pytest.raises(DataError, match="each side"):
        drawn.draw_voc(tmp_path / "new", size=(320, 20))
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, capsys):
    for layout in ("coco", "csv", "imagefolder"):
        drawn.main([layout, str(tmp_path / layout), "--images", "10", "--size", "64x64"])
        assert json.loads((tmp_path / layout / drawn.MARK).read_text())["layout"] == layout
        assert "10 pictures" in capsys.readouterr().out
    drawn.main(["openimages", str(tmp_path / "set"), "--images", "3", "--size", "96x80", "--seed", "7"])
    assert "3 pictures, classes disc square triangle star ring" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        drawn.main(["voc", str(tmp_path / "other"), "--size", "96"])
    assert "'96' is not WIDTHxHEIGHT" in capsys.readouterr().err
    command = [sys.executable, "-m", "data.drawn", "voc", str(tmp_path / "set")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
