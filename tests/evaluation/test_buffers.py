"""Rows of images, gathered from several processes."""

import numpy as np
import pytest
import torch

from evaluation.buffers import ImageBuffer, check_batch, structured

BOX = [("image", np.int64), ("label", np.int32), ("box", np.float32, 4)]


def boxes(*labels):
    return structured(BOX, label=np.array(labels, dtype=int), box=np.zeros((len(labels), 4)))


def texts(*values):
    return np.array(values, dtype=object)


def test_images_of_all_processes_are_in_the_order_of_their_ids_and_each_counts_once():
    first, second = ImageBuffer(BOX, object), ImageBuffer(BOX, object)
    first.add(7, boxes(1, 2), texts("a"))
    first.add(3, boxes(), texts())
    first.add(7, boxes(9), texts("again"))
    second.add(5, boxes(4), texts("b", "c"))
    second.add(7, boxes(8, 8, 8), texts("other"))
    shares = []
    second.gathered(lambda share: shares.append(share) or [share])
    ids, rows, objects = first.gathered(lambda share: [share, *shares])
    assert ids.tolist() == [3, 5, 7]
    assert rows["label"].tolist() == [4, 1, 2] and rows["image"].tolist() == [1, 2, 2]
    assert objects.tolist() == ["b", "c", "a"]
    ids, rows, _ = first.gathered()
    assert ids.tolist() == [3, 7] and rows["image"].tolist() == [1, 1]


def test_without_images():
    ids, rows, objects = ImageBuffer(BOX, object).gathered()
    assert len(ids) == len(rows) == len(objects) == 0 and rows["box"].shape == (0, 4)


def test_rows_of_tensors_in_any_precision():
    box = torch.tensor([[0.5, 1, 2, 3]], dtype=torch.bfloat16, requires_grad=True)
    rows = structured(BOX, label=torch.tensor([3]), box=box)
    assert rows["box"].tolist() == [[0.5, 1, 2, 3]] and rows["label"].tolist() == [3] and rows["image"].tolist() == [0]
    assert structured(BOX, label=[], box=[]).shape == (0,)
    with pytest.raises(ValueError, match=r"fields differ in length: \{'label': 2, 'box': 1\}"):
        structured(BOX, label=[1, 2], box=box)


def test_batches_that_do_not_fit_are_refused():
    item = {"labels": torch.tensor([0, 4])}
    check_batch([item], [item], 5)
    with pytest.raises(ValueError, match="1 targets, but 2 detections"):
        check_batch([item], [item, item], 5)
    with pytest.raises(ValueError, match="labels from 0 to 4, but 4 classes from 0"):
        check_batch([{"labels": []}], [item], 4)
    with pytest.raises(ValueError, match="labels from -1 to 0"):
        check_batch([{"labels": np.array([-1, 0])}], [{"labels": []}], 4)
