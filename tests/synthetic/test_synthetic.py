"""Synthetic data sets as a whole: the same bytes every time, complete or drawn again, refused with a reason."""

import hashlib
import json
import subprocess
import sys

import pytest

import synthetic
from synthetic.shapes import drawing, layouts
from tests import script_helpers
from utils.errors import DataError, WriteError

SIZE = (80, 64)


def digest(folder):
    """SHA-256 of the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


@pytest.mark.parametrize("layout", sorted(set(synthetic.LAYOUTS) - {"nuscenes"}))
def test_same_arguments_give_the_same_bytes(layout, tmp_path):
    one, same, other = (
        digest(synthetic.draw(layout, tmp_path / str(number), images=10, seed=seed, size=SIZE))
        for number, seed in enumerate((3, 3, 4))
    )
    assert one == same != other


def test_scenes_are_those_of_version_3():
    """If they change on purpose, raise drawing.VERSION, so that folders drawn before are not reused."""
    scene = drawing.draw_shapes(3, 1, SIZE)
    assert drawing.VERSION == 3
    assert scene.boxes.tolist() == [[55, 15, 74, 34], [14, 12, 44, 41]] and scene.labels.tolist() == [1, 2]


def test_an_image_does_not_depend_on_the_number_of_images(tmp_path):
    few, many = (synthetic.draw_voc(tmp_path / str(count), images=count, seed=3, size=SIZE) for count in (5, 12))
    for name in ("JPEGImages/000004.jpg", "Annotations/000004.xml"):
        assert (few / name).read_bytes() == (many / name).read_bytes()


def test_images_have_the_given_size_or_random_ones(tmp_path):
    assert drawing.draw_shapes(0, 0, (200, 150)).image.shape == (150, 200, 3)
    shapes = {drawing.draw_shapes(0, index).image.shape[:2] for index in range(12)}
    assert len(shapes) == 12 and all(216 <= height <= 264 and 288 <= width <= 352 for height, width in shapes)


def test_a_complete_set_is_reused_and_an_incomplete_one_drawn_again(tmp_path, monkeypatch):
    out = synthetic.draw_voc(tmp_path / "set", images=4, size=SIZE)
    complete = digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "draw_shapes", lambda *_: pytest.fail("drawn again"))
        synthetic.draw_voc(out, images=4, size=SIZE)
    (out / "JPEGImages/000002.jpg").unlink()
    synthetic.draw_voc(out, images=4, size=SIZE)
    assert digest(out) == complete

    def interrupted(seed, index, size):
        if index == 2:
            raise KeyboardInterrupt
        return drawing.draw_shapes(seed, index, size)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "draw_shapes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthetic.draw_voc(other, images=4, size=SIZE)
    assert digest(synthetic.draw_voc(other, images=4, size=SIZE)) == complete


def test_masks_are_not_counted_as_images(tmp_path):
    out = synthetic.draw_pennfudan(tmp_path, images=6, size=SIZE)
    assert synthetic.count_images(out) == 6
    (out / "PNGImages/Drawn00004.png").unlink()
    synthetic.draw_pennfudan(out, images=6, size=SIZE)
    assert (out / "PNGImages/Drawn00004.png").is_file()


def test_refuses_a_folder_with_other_files(tmp_path):
    out = tmp_path / "set"
    synthetic.draw_voc(out, images=3, size=SIZE)
    with pytest.raises(DataError, match="images 3, not 4"):
        synthetic.draw_voc(out, images=4, size=SIZE)
    with pytest.raises(DataError, match="layout voc, not open_images"):
        synthetic.draw_open_images(out, images=3, size=SIZE)
    (out / synthetic.MARK).write_text("[1]")
    with pytest.raises(DataError, match=r"drawn\.json: .*not written by synthetic"):
        synthetic.draw_voc(out, images=3, size=SIZE)
    (out / synthetic.MARK).unlink()
    with pytest.raises(DataError, match="contains files"):
        synthetic.draw_voc(out, images=3, size=SIZE)
    with pytest.raises(DataError, match="is a file"):
        synthetic.draw_voc(out / "labels.txt")
    with pytest.raises(WriteError, match="not written: Not a directory"):
        synthetic.draw_voc(out / "labels.txt" / "deeper")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"seed": -1}, "seed -1: must be 0"),
        ({"images": 2}, "2 images: too few .* draw 3 or more"),
        ({"size": (320, 20)}, "each side"),
        ({"layout": "imagefolder", "images": 9}, "9 images: too few .* draw 10 or more"),
        ({"layout": "nuscenes", "images": 23}, "18 images: too few .* draw 24 or more"),
    ],
)
def test_refuses_arguments_that_are_too_small(tmp_path, arguments, reason):
    with pytest.raises(DataError, match=reason):
        synthetic.draw(**{"layout": "voc", "out": tmp_path / "new"} | arguments)
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, capsys):
    shapes = "disc square triangle star ring"
    for layout, names in (("coco", shapes), ("csv", shapes), ("imagefolder", shapes), ("pennfudan", "person")):
        synthetic.main([layout, str(tmp_path / layout), "--images", "10", "--size", "64x64"])
        assert json.loads((tmp_path / layout / synthetic.MARK).read_text())["layout"] == layout
        assert f"10 images, classes {names}\n" in capsys.readouterr().out
        drawn = synthetic.draw(layout, tmp_path / "same" / layout, 10, size=(64, 64))
        assert digest(drawn) == digest(tmp_path / layout)
    for name in ("open_images", "openimages"):
        synthetic.main([name, str(tmp_path / "set"), "--images", "3", "--size", "96x80", "--seed", "7"])
        assert f"3 images, classes {shapes}" in capsys.readouterr().out
    synthetic.main(["nuscenes", str(tmp_path / "street"), "--images", "25", "--size", "96x64"])
    assert "24 images, classes car truck bus trailer construction_vehicle pedestrian" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        synthetic.main(["voc", str(tmp_path / "other"), "--size", "96"])
    assert "'96' is not WIDTHxHEIGHT" in capsys.readouterr().err
    command = [sys.executable, "-m", "synthetic", "voc", str(tmp_path / "set")]
    result = subprocess.run(command, cwd=script_helpers.ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
