"""Scenes of 2D shapes: boxes, masks, and how often what occurs."""

import numpy as np
import pytest

from synthetic.shapes import drawing


@pytest.fixture(scope="module")
def scenes():
    return [drawing.draw_shapes(0, index, (128, 96)) for index in range(150)]


def test_boxes_are_tight_around_the_masks_and_inside_the_image(scenes):
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert (scene.image.dtype, width, height) == (np.uint8, 128, 96)
        assert len(scene.labels) == len(scene.boxes) == len(scene.masks) == len(scene.hidden)
        for (x1, y1, x2, y2), mask in zip(scene.boxes, scene.masks, strict=True):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum()
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_frequencies_and_sizes(scenes):
    assert sum(len(scene.labels) == 0 for scene in scenes) == 12  # 8 %
    counts = np.bincount(np.concatenate([scene.labels for scene in scenes]), minlength=len(drawing.CLASSES))
    assert counts.min() > 0.5 * counts.max()
    assert 0 < sum(scene.difficult.sum() for scene in scenes) < 0.1 * counts.sum()
    assert 0 < sum(scene.truncated.sum() for scene in scenes) < 0.2 * counts.sum()
    assert sum(scene.crowd.sum() for scene in scenes) > 0
    sides = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2])[~s.truncated].max(axis=1) for s in scenes])
    assert sides.min() >= 0.09 * 96
    assert sides.max() <= 0.70 * 96
    assert all((scene.hidden < drawing.MAX_HIDDEN).all() for scene in scenes)


def test_hidden_is_the_share_that_later_objects_cover(scenes):
    compared = 0
    for scene in scenes:
        for i, mask in enumerate(scene.masks):
            covered = mask & scene.masks[i + 1 :].any(axis=0)
            # objects that are not annotated because they are hidden themselves may cover it too
            assert scene.hidden[i] >= covered.sum() / mask.sum() - 1e-12
            compared += bool(covered.any())
    assert compared > 5


def test_color_does_not_tell_the_class(scenes):
    """Each class has objects that are mainly red, green and blue; a class of one color would fail."""
    channels = {label: set() for label in range(len(drawing.CLASSES))}
    for scene in scenes:
        for label, mask in zip(scene.labels.tolist(), scene.masks, strict=True):
            channels[label].add(int(scene.image[mask].mean(axis=0).argmax()))
    assert all(values == {0, 1, 2} for values in channels.values())


def test_single_shapes_are_large_and_varied():
    scenes = [drawing.draw_single_shape(0, index, (96, 96)) for index in range(60)]
    whole = [scene for scene in scenes if not scene.truncated[0]]
    assert all(scene.labels.tolist() == [index % 5] for index, scene in enumerate(scenes))
    assert 0 < len(scenes) - len(whole) < 20
    sides = np.array([(scene.boxes[0, 2:] - scene.boxes[0, :2]).max() for scene in whole])
    assert sides.min() >= 0.4 * 96 and sides.max() <= 0.98 * 96 and sides.std() > 5
    centers = np.array([(scene.boxes[0, 2:] + scene.boxes[0, :2]) / 2 for scene in scenes])
    assert (centers.std(axis=0) > 8).all()
