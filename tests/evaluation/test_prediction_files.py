"""The rows of predict.py's JSON files."""

import json
from pathlib import Path

import pytest
import torch
from pycocotools import mask as coco_masks

from evaluation import prediction_files
from utils.errors import DataError, UsageError, WriteError

NAMES = ["cat", "dog"]
CATEGORIES = prediction_files.categories(NAMES)


def test_detections_in_cocos_results_format():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[1, 5:9, 3:7] = True
    detections = {"boxes": torch.tensor([[1.0, 2, 4.12345678, 8], [3, 5, 7, 9]]), "labels": torch.tensor([1, 0])}
    detections["scores"] = torch.tensor([0.987654321, 0.5])
    info = {"id": 7, "file_name": "clip.mp4", "frame": 3, "height": 20, "width": 30}
    expected = {"image_id": 7, "category_id": 2, "bbox": [1.0, 2.0, 3.1235, 6.0], "score": 0.987654}
    expected |= {"category_name": "dog", "file_name": "clip.mp4", "frame": 3}
    assert prediction_files.coco(detections, CATEGORIES, info)[0] == expected
    rows = json.loads(json.dumps(prediction_files.coco(detections | {"masks": masks}, CATEGORIES, info)))
    decoded = coco_masks.decode([row["segmentation"] for row in rows])
    assert torch.equal(torch.from_numpy(decoded).permute(2, 0, 1).bool(), masks)


def test_without_detections_there_are_no_rows():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    info = {"id": 1, "file_name": "a.jpg"}
    assert prediction_files.coco(nothing, CATEGORIES, info) == []
    assert prediction_files.coco(nothing | {"masks": torch.zeros(0, 9, 9).bool()}, CATEGORIES, info) == []


def test_predictions_of_a_classifier():
    predictions = {"labels": torch.tensor([1, 0]), "scores": torch.tensor([0.75, 0.25])}
    row = prediction_files.classification(predictions, NAMES, {"id": 4, "file_name": "a.jpg", "height": 9, "width": 9})
    predicted = [{"label": 1, "name": "dog", "score": 0.75}, {"label": 0, "name": "cat", "score": 0.25}]
    assert row == {"image_id": 4, "file_name": "a.jpg", "predictions": predicted}


def test_3d_boxes():
    detections = {name: torch.tensor([[1.0, 2, 3]]) for name in ("center", "dims", "velocity")}
    detections |= {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    detections |= {"yaw": torch.tensor([-1.5]), "attribute": torch.tensor([5])}
    (row,) = prediction_files.boxes_3d(detections, CATEGORIES, {"id": 2, "file_name": "a.jpg"})
    expected = {"image_id": 2, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5, "category_name": "dog"}
    expected |= {name: [1.0, 2.0, 3.0] for name in ("center", "size", "velocity")}
    assert row == expected | {"yaw": -1.5, "attribute": "vehicle.moving", "file_name": "a.jpg"}


# ---- files ----


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_any_length(tmp_path, count):
    with (
        prediction_files.JsonList(tmp_path / "a.json") as rows,
        prediction_files.images_json(tmp_path / "b.json", CATEGORIES, {"radar": False}) as images,
    ):
        for number in range(count):
            rows.add({"id": number})
            images.add({"id": number})
        assert not (tmp_path / "a.json").exists()
    expected = [{"id": number} for number in range(count)]
    assert json.loads((tmp_path / "a.json").read_text()) == expected and rows.count == count
    contents = {"info": {"radar": False}, "categories": CATEGORIES, "annotations": [], "images": expected}
    assert json.loads((tmp_path / "b.json").read_text()) == contents


def test_an_error_leaves_no_list(tmp_path):
    with pytest.raises(ZeroDivisionError), prediction_files.JsonList(tmp_path / "a.json") as rows:
        rows.add({"id": 1 // 0})
    assert not list(tmp_path.iterdir())


def test_a_list_on_a_full_disk_is_one_error_and_leaves_no_file(tmp_path):
    """Which is noticed in `add`, or not before the end."""

    def write(rows):
        with prediction_files.JsonList(tmp_path / "a.json") as rows_json:
            rows_json._file.close()
            rows_json._file = open("/dev/full", "w")  # noqa: SIM115
            rows_json.add(*rows)

    for rows in ([{}], [{"id": number} for number in range(10000)]):
        with pytest.raises(WriteError, match=r"a\.json: not written: No space left on device; free some disk space"):
            write(rows)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.json").mkdir()
    with (
        pytest.raises(WriteError, match=r"a\.json: not written: Is a directory"),
        prediction_files.JsonList(tmp_path / "a.json"),
    ):
        pass


# ---- COCO's ids ----


def write_annotations(tmp_path, names, categories=(("dog", 18), ("zebra", 24))):
    images = [{"file_name": name, "id": 100 + number} for number, name in enumerate(names)]
    listed = [{"name": name, "id": number} for name, number in categories]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "categories": listed}))
    return path


def test_images_have_cocos_ids_by_name_and_by_folder_where_names_are_equal(tmp_path):
    path = write_annotations(tmp_path, ["1.jpg", "a/2.jpg", "b/2.jpg"])
    images = [Path("x/1.jpg"), Path("x/b/2.jpg")]
    ids, categories = prediction_files.coco_ids(path, images, NAMES)
    assert ids == {images[0]: 100, images[1]: 102}
    assert categories == [{"id": None, "name": "cat"}, {"id": 18, "name": "dog"}]
    labels = prediction_files.known(torch.tensor([0, 1]), categories, path)
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    ("images", "names", "reason"),
    [
        (["1.jpg", "3.jpg"], NAMES, r"1 of 2 inputs are not in it: 3\.jpg; give its images only"),
        (["2.jpg"], NAMES, "1 of 1 inputs are not in it"),  # which of the two?
        (["x/1.jpg", "y/1.jpg"], NAMES, "several of the inputs are the same image in it"),
        (["1.jpg"], ["cat"], "classes cat are not among its dog, zebra; give the file of its data set"),
    ],
)
def test_images_and_classes_that_are_not_in_the_annotations(tmp_path, images, names, reason):
    path = write_annotations(tmp_path, ["1.jpg", "a/2.jpg", "b/2.jpg"])
    with pytest.raises(UsageError, match=f"--annotations .*truth.json: .*{reason}"):
        prediction_files.coco_ids(path, [Path(image) for image in images], names)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"images": [], "categories": [{"id": 1}]}', "[" * 200_000])
def test_what_is_no_coco_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="is not a COCO annotation file"):
        prediction_files.coco_ids(tmp_path / "a.json", [], NAMES)
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        prediction_files.coco_ids(tmp_path / "none.json", [], NAMES)
