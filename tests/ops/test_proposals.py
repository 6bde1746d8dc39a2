"""Selection of proposals and detections against torchvision's, with the NMS of a CPU and that of a GPU."""

import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from ops import proposals

SHAPES = [(96, 128), (70, 90), (128, 100)]
LEVEL_SIZES = [150, 90, 20]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """Both ways of NMS, on a CPU."""
    if request.param == "gpu":

        def suppress(boxes, scores, group, valid, iou_threshold):
            return proposals.nms_without_counting(boxes, scores, group, iou_threshold) & valid

        monkeypatch.setattr(proposals.nms, "suppress", suppress)


def random_boxes(*size):
    corner = torch.rand(*size, 2) * 80
    return torch.cat([corner, corner + 5 + torch.rand(*size, 2) * 60], dim=-1)


def rpn_outputs():
    count = sum(LEVEL_SIZES)
    deltas = torch.randn(3, count, 4) * 0.3
    deltas[:, ::7, 2] = -30  # without a width
    deltas[:, ::11, 0] = -20  # outside of the image
    return torch.randn(3, count), deltas, random_boxes(count)


@pytest.mark.parametrize("before_nms", [40, 1000])
@pytest.mark.parametrize("after_nms", [25, 1000])
def test_proposals_are_torchvisions(device, before_nms, after_nms):
    objectness, deltas, anchors = rpn_outputs()
    ours = proposals.select_proposals(
        objectness, deltas, anchors, SHAPES, LEVEL_SIZES, before_nms, after_nms, 0.7, 1e-3
    )
    limits = {name: {"training": n, "testing": n} for name, n in (("before", before_nms), ("after", after_nms))}
    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, limits["before"], limits["after"], nms_thresh=0.7)
    boxes = rpn.box_coder.decode(deltas.flatten(0, 1), [anchors] * 3).view(3, -1, 4)
    expected, _ = rpn.filter_proposals(boxes, objectness, SHAPES, LEVEL_SIZES)
    assert ours.shape[1] == max(map(len, expected))
    for rows, boxes in zip(ours, expected, strict=True):
        torch.testing.assert_close(rows[: len(boxes)], boxes, rtol=0, atol=1e-4)
        assert not rows[len(boxes) :].any() and not proposals.is_padding(boxes).any()
    assert len(set(map(len, expected))) > 1 or after_nms == 25


@pytest.mark.parametrize("classes", [1, 6])
def test_detections_are_torchvisions(device, classes):
    boxes = random_boxes(3, 60)
    boxes[1, 40:] = 0  # padding
    logits, offsets = torch.randn(3, 60, classes + 1) * 2, torch.randn(3, 60, 4 * (classes + 1))
    offsets[2, ::2, 2::4] = -30  # too narrow
    ours = proposals.select_detections(logits, offsets, boxes, SHAPES, WEIGHTS, 0.05, 0.5, 30)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.05, 0.5, 30)
    real = ~proposals.is_padding(boxes)
    expected = heads.postprocess_detections(logits[real], offsets[real], [b[r] for b, r in zip(boxes, real)], SHAPES)
    for our_boxes, scores, labels, *theirs in zip(*ours, *expected, strict=True):
        found = scores >= 0
        assert 5 < found.sum() == len(theirs[1])
        for a, b in zip((our_boxes, scores, labels + 1), theirs):
            torch.testing.assert_close(a[found], b, rtol=1e-5, atol=1e-4)


def test_detections_beyond_the_limit_of_candidates_do_not_matter(monkeypatch):
    boxes, logits, offsets = random_boxes(2, 200), torch.randn(2, 200, 5) * 2, torch.randn(2, 200, 20)
    arguments = logits, offsets, boxes, SHAPES[:2], WEIGHTS, 0.05, 0.5, 20
    expected = proposals.select_detections(*arguments)
    monkeypatch.setattr(proposals, "PAIRS_PER_IMAGE", 100)
    torch.testing.assert_close(proposals.select_detections(*arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1, 500, 10_000])
def test_nms_of_a_gpu_equals_that_of_a_cpu(limit, monkeypatch):
    monkeypatch.setattr(proposals.nms, "MAX_CANDIDATES", limit)
    boxes, scores, group = random_boxes(4, 200), torch.rand(4, 200), torch.randint(0, 3, (4, 200))
    scores[0, :50] = scores[2] = -1
    boxes[0, 0] = boxes[0, 1] = float("nan")
    expected = proposals.nms.suppress(boxes, scores, group, scores >= 0, 0.5)
    keep = proposals.nms_without_counting(boxes, scores, group, 0.5)
    assert torch.equal(keep & (scores >= 0), expected) and 0 < expected.sum() < (scores >= 0).sum()


def test_an_image_does_not_depend_on_the_others(device):
    objectness, deltas, anchors = rpn_outputs()
    rest = LEVEL_SIZES, 60, 50, 0.7, 1e-3
    batch = proposals.select_proposals(objectness, deltas, anchors, SHAPES, *rest)
    for i, shape in enumerate(SHAPES):
        one = slice(i, i + 1)
        single = proposals.select_proposals(objectness[one], deltas[one], anchors, [shape], *rest)[0]
        torch.testing.assert_close(batch[i, : len(single)], single, rtol=0, atol=0)


def test_equal_scores_keep_their_order(device):
    boxes = random_boxes(1, 100)
    scores, best = proposals.best_after_nms(boxes, torch.ones(1, 100), torch.arange(100)[None], 0.5, 90)
    assert best.tolist() == [list(range(90))] and scores.eq(1).all()
