"""The data set of images with boxes: from a parser's annotations to targets, and parts of it."""

import numpy as np
import pytest
import torch

import synthetic
from data.detection import coco, voc
from data.detection.dataset import Annotations, BoxDataset, clip_box
from data.packed import PackedBytes, PackedPaths

OBJECTS = [(3, "cat", False), (0, "dog", False), (3, "dog", True), (1, "dog", False), (3, "emu", False)]


def make_annotations(objects, images, **options):
    """Annotations of `images` images and (image, class name, ignore) objects."""
    annotations = Annotations(**options)
    for index in range(images):
        annotations.add_image(f"images/{index} ü.jpg", (10, 20))
    for number, (image, name, ignore) in enumerate(objects):
        annotations.add_object(image, (0, 0, 1 + number, 5), name, ignore)
    return annotations


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """12 synthetic images with masks."""
    root = synthetic.draw_coco(tmp_path_factory.mktemp("drawn") / "coco", images=12, seed=1, size=(96, 80))
    return BoxDataset(coco.read([root], "train", masks=True))


def test_objects_may_come_in_any_order():
    dataset = BoxDataset(make_annotations(OBJECTS, 5), ["dog", "cat"])
    targets = [dataset.annotation(index) for index in range(5)]
    assert [target["labels"].tolist() for target in targets] == [[0], [0], [], [1, 0], []]
    assert [target["ignore"].tolist() for target in targets] == [[False], [False], [], [False, True], []]
    assert targets[3]["boxes"].tolist() == [[0, 0, 1, 5], [0, 0, 3, 5]]
    assert targets[2]["boxes"].shape == (0, 4)
    assert targets[2]["size"] == (10, 20)
    assert dataset.paths[4] == dataset.image_path(4) == "images/4 ü.jpg"
    assert dataset.unknown == {"emu": 1}
    assert dataset.class_counts().tolist() == [2, 1]  # without those to ignore
    assert dataset.summary().splitlines() == [
        "images 5, background 2 (40 %), boxes 4 (1 ignored)",
        "  dog 2, cat 1",
        "  left out, classes unknown to training: emu (1)",
    ]


def test_no_objects_at_all():
    dataset = BoxDataset(make_annotations([], 4), ["dog"])
    assert dataset.annotation(3)["boxes"].shape == (0, 4) and dataset.unknown == {}
    assert dataset.class_counts().tolist() == [0]
    np.testing.assert_allclose(dataset.balance_weights(), 0.25)


def test_the_summary_of_one_image():
    assert BoxDataset(make_annotations([], 1), ["dog"]).summary() == "images 1, background 1 (100 %), boxes 0\n  dog 0"


def test_clip_box():
    assert list(clip_box((-5, 2.5, 30, 8), (10, 20))) == [0, 2.5, 20, 8]
    for outside in ((20, 0, 30, 8), (-9, 0, 0, 8), (3, 10, 5, 12), (5, 2, 5 + 1e-7, 8), (5, 2, 4, 8)):
        assert clip_box(outside, (10, 20)) is None, outside


def test_without_images():
    dataset = BoxDataset(make_annotations(OBJECTS, 5, relative=True), ["dog", "cat"], transform=len, seed=3)
    part = dataset.without([0, 2])
    assert [part.paths[index] for index in range(len(part))] == [f"images/{i} ü.jpg" for i in (1, 3, 4)]
    assert [part.annotation(index)["labels"].tolist() for index in range(3)] == [[0], [1, 0], []]
    assert part.annotation(1)["boxes"].tolist() == dataset.annotation(3)["boxes"].tolist()
    assert part.annotation(1)["ignore"].tolist() == [False, True]
    assert (part.relative, part.transform, part.seed, part.unknown) == (True, len, 3, {"emu": 1})
    assert part.image_ids is part.coco_truth() is None
    assert len(dataset) == 5 and len(dataset.without(range(5))) == 0


def test_a_part_keeps_masks_and_ids(masked):
    paths = [masked.paths[index] for index in range(len(masked))]
    for part, length in ((masked.without([0, 3]), len(masked) - 2), (masked.subset(4, seed=5), 4)):
        assert len(part) == length
        images = [paths.index(part.paths[index]) for index in range(length)]
        assert images == sorted(images)  # in the order of the whole
        assert part.image_ids.tolist() == masked.image_ids[images].tolist()
        assert part.category_ids is masked.category_ids
        for index, image in enumerate(images):
            assert part.annotation(index)["masks"] == masked.annotation(image)["masks"]
            torch.testing.assert_close(part[index][1]["masks"], masked[image][1]["masks"], rtol=0, atol=0)


def test_a_subset_depends_on_the_seed(masked):
    subsets = {tuple(masked.subset(4, seed).image_ids.tolist()) for seed in range(5, 9)}
    assert len(subsets) > 1 and tuple(masked.subset(4, 5).image_ids.tolist()) in subsets
    assert masked.subset(99, seed=5) is masked


def test_annotations_are_flat_arrays():
    """No Python object per box or per image: their reference counts would copy memory into every worker."""
    dataset = BoxDataset(make_annotations([(i % 1000, "cat", False) for i in range(5000)], 1000), ["cat"])
    values = {**vars(dataset), **vars(dataset.paths)}
    allowed = (np.ndarray, PackedPaths, bool, int, type(None))
    assert {name for name, value in values.items() if not isinstance(value, allowed)} == {"classes", "unknown"}
    assert len(dataset.classes) + len(dataset.unknown) == 1
    assert all(value.dtype != object for value in values.values() if isinstance(value, np.ndarray))
    assert sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray)) < 5000 * 24 + 1000 * 50


def test_masks_stay_run_lengths_until_an_image_is_loaded(masked):
    assert isinstance(masked.masks, PackedBytes)
    arrays = vars(masked.masks).copy()
    assert {type(value) for value in arrays.values()} == {np.ndarray}  # no Python object per mask
    assert len(masked.masks.content) < 200 * len(masked.labels)
    masked[0], masked[1]
    assert vars(masked.masks) == arrays
    target = masked.annotation(0)
    assert target["masks"][0].keys() == {"size", "counts"} and target["masks"][0]["size"] == [80, 96]


def test_an_image_that_cannot_be_read_counts_as_square(tmp_path):
    annotations = make_annotations([], 1)
    annotations.add_image(tmp_path / "gone.jpg")
    assert BoxDataset(annotations, ["dog"]).aspects().tolist() == [0.5, 1]


def test_balance_weights():
    objects = [(0, "dog", False), (0, "dog", False), (1, "dog", False), (2, "dog", False), (2, "cat", False)]
    weights = BoxDataset(make_annotations([*objects, (3, "cat", True)], 5), ["dog", "cat"]).balance_weights()
    # dogs in 3 images, cats in 1: weights 1/3, 1/3, 1; without an object that counts: the median, 1/3
    np.testing.assert_allclose(weights * weights.size, np.array([1, 1, 3, 1, 1]) * 5 / 7)


def test_balance_weights_even_out_classes():
    objects = [(i, "rare" if i < 5 else "common", False) for i in range(100)]
    dataset = BoxDataset(make_annotations(objects, 100), ["rare", "common"])
    assert dataset.balance_weights()[:5].sum() == pytest.approx(0.5)


def test_images_with_the_most_objects_come_first_and_repeat(drawn_voc):
    dataset = BoxDataset(voc.read([drawn_voc], "train"))
    counts = [len(dataset.annotation(i)["labels"]) for i in range(len(dataset))]
    images = dataset.most_objects(len(dataset) + 2).tolist()
    assert sorted(images[:-2]) == list(range(len(dataset)))
    assert [counts[i] for i in images[:-2]] == sorted(counts, reverse=True)
    assert images[-2:] == images[:2]
