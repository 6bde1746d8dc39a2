"""Mask R-CNN's five losses (He et al. 2017), and the targets of anchors and RoIs.

    sampled = maskrcnn.SampledTargets(targets, seed=(seed, step))
    outputs = network(images, shapes, sampled.sample)
    counts = run.mean(maskrcnn.count(outputs, sampled)).clamp(min=1 / run.world_size)
    losses = maskrcnn.loss(outputs, sampled, counts)

Matching and sampling follow torchvision's rules and numbers. Samples depend on (seed, step, image_id) and the network's
proposals alone, not on processes, workers or resumes.

B batch, A anchors of an image, K classes, M objects of an image, R RoIs of the batch, P positive RoIs, with an object.
"""

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from ops.boxes import encode
from ops.matching import BACKGROUND, IGNORE

ANCHOR_WEIGHTS, ROI_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)  # of ops.boxes.encode
ANCHOR_MATCHER = Matcher(0.7, 0.3, allow_low_quality_matches=True)  # each object's best anchors are positive
ROI_MATCHER = Matcher(0.5, 0.5)
ANCHOR_POSITIVES, ROI_POSITIVES = 0.5, 0.25  # maximum fraction of positives in the samples of an image
ANCHOR_STREAM, ROI_STREAM = 0, 1  # part of the seed: different random numbers for each
COUNTS = ("anchors", "rois", "objects")
NORMALIZERS = {"objectness": 0, "rpn_box": 0, "classification": 1, "box": 1, "mask": 2}  # loss -> index of COUNTS
BETA = 1 / 9  # of smooth L1: where it changes from quadratic to linear


class SampledTargets:
    """The anchors and RoIs of a batch that are trained on, and their targets.

    targets  B dicts of the data contract with `masks`, boxes in pixels of the batch's images. Objects with `ignore` are
             not trained on; an anchor or RoI with its maximum IoU on one of them is neither positive nor negative
    seed     non-negative integers, such as (seed, step)
    anchors_per_image, rois_per_image  maximum samples of an image
    """

    def __init__(self, targets, seed, anchors_per_image=256, rois_per_image=512):
        self.targets, self.seed = targets, tuple(seed)
        self.anchors_per_image, self.rois_per_image = anchors_per_image, rois_per_image
        self.rois = self._anchor_targets = None

    @torch.no_grad()
    def sample(self, proposals):
        """Sample RoIs from proposals, B tensors [N,4] xyxy pixels, and the objects' own boxes.

        Returns (all RoIs, B tensors [n,4], positives first; the positives alone, B tensors [p,4]). Sets `self.rois`, B
        dicts: boxes [n,4], labels int64 [n], 0 background; object_index int64 [p] and offsets [p,4] of the positives.
        """
        self.rois = []
        for target, candidates in zip(self.targets, proposals, strict=True):
            boxes, ignored, labels = _objects(target, candidates.device)
            candidates = torch.cat([candidates, boxes])
            matched = match(boxes, ignored, candidates, ROI_MATCHER)
            seed = (*self.seed, target["image_id"], ROI_STREAM)
            positive, negative = sample_balanced(matched, self.rois_per_image, ROI_POSITIVES, seed)
            index = matched[positive]
            roi = {"boxes": candidates[torch.cat([positive, negative])], "object_index": index}
            roi["labels"] = torch.cat([labels[index] + 1, torch.zeros_like(negative)])
            roi["offsets"] = encode(boxes[index], candidates[positive], ROI_WEIGHTS)
            self.rois.append(roi)
        return [roi["boxes"] for roi in self.rois], [roi["boxes"][: len(roi["object_index"])] for roi in self.rois]

    @torch.no_grad()
    def anchor_targets(self, anchors):
        """Sample from anchors [A,4] xyxy pixels in the first call; later calls return the same.

        Returns (positive int64 [p], negative int64 [q], indices of the batch's B*A anchors; offsets float32 [p,4]).
        """
        if self._anchor_targets is None:
            parts = []
            for i, target in enumerate(self.targets):
                boxes, ignored, _ = _objects(target, anchors.device)
                matched = match(boxes, ignored, anchors, ANCHOR_MATCHER)
                seed = (*self.seed, target["image_id"], ANCHOR_STREAM)
                positive, negative = sample_balanced(matched, self.anchors_per_image, ANCHOR_POSITIVES, seed)
                offsets = encode(boxes[matched[positive]], anchors[positive], ANCHOR_WEIGHTS)
                parts.append((positive + i * len(anchors), negative + i * len(anchors), offsets))
            self._anchor_targets = tuple(map(torch.cat, zip(*parts)))
        return self._anchor_targets

    @torch.no_grad()
    def mask_targets(self, size):
        """The objects' masks within the positive RoIs, resized: float32 [P,size,size], 0 to 1."""
        parts = []
        for target, roi in zip(self.targets, self.rois):
            index, boxes = roi["object_index"], roi["boxes"]
            used, row = index.unique(return_inverse=True)  # an image may have a hundred masks of a megapixel
            masks = torch.as_tensor(target["masks"])[~target["ignore"]][used.cpu()].to(boxes.device)
            rows_and_boxes = torch.cat([row[:, None].to(boxes), boxes[: len(index)]], 1)
            # The operator itself, whose forward pass is deterministic: under deterministic algorithms, torchvision's
            # function on a GPU expands every pixel of every RoI to a tensor as large as the image.
            align = torch.ops.torchvision.roi_align
            parts.append(align(masks[:, None].to(boxes), rows_and_boxes, 1.0, size, size, -1, False)[:, 0])
        return torch.cat(parts)


def _objects(target, device):
    """(boxes [M,4] to train on, boxes to ignore, labels [M]) of a target on `device`."""
    ignore, boxes = target["ignore"], torch.as_tensor(target["boxes"], dtype=torch.float32)
    return boxes[~ignore].to(device), boxes[ignore].to(device), target["labels"][~ignore].to(device)


def match(boxes, ignored, candidates, matcher):
    """The object that each candidate is matched to: int64 [N], an index of `boxes`, or BACKGROUND, or IGNORE.

    boxes [M,4], ignored [I,4] and candidates [N,4] xyxy pixels.
    """
    matched = torch.full((len(candidates),), BACKGROUND, device=candidates.device)
    max_iou = candidates.new_zeros(len(candidates))
    if len(boxes) and len(candidates):
        iou = box_iou(boxes, candidates)
        matched, max_iou = matcher(iou), iou.amax(0)
    if len(ignored):
        matched[box_iou(ignored, candidates).amax(0) > max_iou] = IGNORE
    return matched


def sample_balanced(matched, max_samples, positive_fraction, seed):
    """(positive, negative), int64 indices of `matched` [N]: at most `max_samples` together, positives at most that
    fraction of them.

    Each candidate gets a random number and those with the lowest are taken, so one candidate more or less does not
    change the others.
    """
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    keys = torch.rand(len(matched), generator=torch.Generator().manual_seed(int(state[0]))).to(matched.device)

    def lowest(index, count):
        return index[keys[index].topk(min(count, len(index)), largest=False).indices]

    positive = lowest(torch.where(matched >= 0)[0], int(max_samples * positive_fraction))
    return positive, lowest(torch.where(matched == BACKGROUND)[0], max_samples - len(positive))


def count(outputs, sampled):
    """float32 [3], COUNTS: sampled anchors, sampled RoIs, positive RoIs. Losses are divided by these, averaged over
    processes."""
    positive, negative, _ = sampled.anchor_targets(outputs["anchors"])
    rois, objects = (sum(len(roi[name]) for roi in sampled.rois) for name in ("labels", "object_index"))
    return outputs["logits"].new_tensor([len(positive) + len(negative), rois, objects], dtype=torch.float32)


def loss(outputs, sampled, counts, class_weights=None):
    """{"objectness": [], "rpn_box": [], "classification": [], "box": [], "mask": []}: sums over the batch by `counts`.

    outputs        the network's, for `sampled.sample`
    sampled        SampledTargets of the same images
    counts         float [3] of `count`, averaged over processes, each above 0
    class_weights  float [K+1], background first, for the classification of RoIs, or None

    In float32 for any type of outputs; finite and connected to every output even if no image has an object.
    """
    sums = loss_sums(outputs, sampled, class_weights)
    return {name: value / counts[NORMALIZERS[name]] for name, value in sums.items()}


def loss_sums(outputs, sampled, class_weights=None):
    """The losses before their division: an evaluation adds up these sums, and the counts, over all its batches."""
    positive, negative, anchor_offsets = sampled.anchor_targets(outputs["anchors"])
    anchors = torch.cat([positive, negative])
    is_object = torch.zeros_like(anchors, dtype=torch.float32)
    is_object[: len(positive)] = 1
    objectness, deltas = outputs["objectness"].float().flatten(), outputs["deltas"].float().flatten(0, 1)
    labels, offsets = (torch.cat([roi[name] for roi in sampled.rois]) for name in ("labels", "offsets"))
    objects = torch.where(labels > 0)[0]
    own_class = labels[objects]
    boxes = outputs["offsets"].float().unflatten(1, (-1, 4))[objects, own_class]  # [P,4]
    masks = outputs["masks"].float()[torch.arange(len(own_class), device=own_class.device), own_class]  # [P,28,28]
    mask_targets = sampled.mask_targets(masks.shape[-1])
    return {
        "objectness": F.binary_cross_entropy_with_logits(objectness[anchors], is_object, reduction="sum"),
        "rpn_box": F.smooth_l1_loss(deltas[positive], anchor_offsets, beta=BETA, reduction="sum"),
        "classification": F.cross_entropy(outputs["logits"].float(), labels, class_weights, reduction="sum"),
        "box": F.smooth_l1_loss(boxes, offsets, beta=BETA, reduction="sum"),
        "mask": F.binary_cross_entropy_with_logits(masks, mask_targets, reduction="sum") / masks.shape[-1] ** 2,
    }
