"""Mask R-CNN's five losses (He et al. 2017), and the targets of anchors and RoIs.

    sampled = maskrcnn.SampledTargets(targets, seed=(seed, step))
    outputs = network(images, shapes, sampled.sample)
    counts = run.mean(maskrcnn.count(outputs, sampled)).clamp(min=1 / run.world_size)
    losses = maskrcnn.loss(outputs, sampled, counts)

Matching and sampling follow torchvision's rules and numbers. Samples depend on (seed, step, image_id) and the network's
proposals alone, not on processes, workers or resumes.

B batch, A anchors of an image, K classes, M objects of an image, R RoIs of the batch, P positive RoIs, with an object.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from ops.boxes import encode, pairwise_iou, take
from ops.matching import BACKGROUND, IGNORE
from ops.proposals import is_padding
from ops.roi_pool import align
from ops.transfer import to_device

ANCHOR_WEIGHTS, ROI_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)  # of ops.boxes.encode
ANCHOR_MATCHING = {"threshold": 0.7, "low": 0.3, "keep_best": True}  # of `match`
ROI_MATCHING = {"threshold": 0.5, "low": 0.5, "keep_best": False}
ANCHOR_POSITIVES, ROI_POSITIVES = 0.5, 0.25  # maximum fraction of positives in the samples of an image
ANCHOR_STREAM, ROI_STREAM = 0, 1  # part of the seed: different random numbers for each
COUNTS = ("anchors", "rois", "objects")
NORMALIZERS = {"objectness": 0, "rpn_box": 0, "classification": 1, "box": 1, "mask": 2}  # loss -> index of COUNTS
BETA = 1 / 9  # of smooth L1: where it changes from quadratic to linear


class SampledTargets:
    """The anchors and RoIs of a batch that are trained on, and their targets.

    targets  B dicts of the data contract with `masks`, boxes in pixels of the batch's images; `targets.to(device)` are
             their `pad_boxes` there, as of data.loader.Targets. Objects with `ignore` are not trained on; an anchor or
             RoI with its maximum IoU on one of them is neither positive nor negative
    seed     non-negative integers, such as (seed, step)
    anchors_per_image, rois_per_image  maximum samples of an image

    Everything is computed with tensors of fixed size on the device, S samples of each image, some of them padding. The
    program waits for a GPU only between `draw_rois` and `cut_rois`, for the numbers of RoIs.
    """

    def __init__(self, targets, seed, anchors_per_image=256, rois_per_image=512):
        self.targets, self.seed = targets, tuple(seed)
        self.anchors_per_image, self.rois_per_image = anchors_per_image, rois_per_image
        self.rois = self._rois = self._objects = self._anchors = None

    def sample(self, proposals):
        """Sample RoIs from proposals [B,N,4] xyxy pixels, zeros where an image has fewer, and the objects' own boxes.

        Returns (all RoIs, B tensors [n,4], positives first; the positives alone, B tensors [p,4]).
        """
        return self.cut_rois(self.draw_rois(proposals).cpu())

    @torch.no_grad()
    def draw_rois(self, proposals):
        """The first half of `sample`; returns what `cut_rois` needs on the CPU."""
        boxes, labels = self.objects(proposals.device)
        candidates = torch.cat([proposals, boxes], dim=1)
        real = torch.cat([~is_padding(proposals), labels >= 0], dim=1)
        matched = match(boxes, labels, candidates, **ROI_MATCHING).masked_fill(~real, IGNORE)
        index, matched = self._draw(matched, real, self.rois_per_image, ROI_POSITIVES, ROI_STREAM)
        rois = take(candidates, index)
        self._rois = rois, *assign(boxes, labels, rois, matched, ROI_WEIGHTS), matched
        return matched

    @torch.no_grad()
    def cut_rois(self, matched):
        """The second half of `sample`: without padding, given the result of `draw_rois` on the CPU.

        Sets `self.rois`, B dicts: boxes [n,4], labels int64 [n], 0 background, offsets [n,4], zeros for background;
        object_index int64 [p] of the positives, on the CPU.
        """
        self.rois = []
        for boxes, labels, offsets, of_image in zip(*self._rois[:3], matched, strict=True):
            count = int((of_image != IGNORE).sum())
            roi = {"boxes": boxes[:count], "labels": labels[:count], "offsets": offsets[:count]}
            self.rois.append(roi | {"object_index": of_image[of_image >= 0]})
        return [roi["boxes"] for roi in self.rois], [roi["boxes"][: len(roi["object_index"])] for roi in self.rois]

    @torch.no_grad()
    def anchor_targets(self, anchors):
        """Sample from anchors [A,4] xyxy pixels in the first call; later calls return the same.

        Returns (index int64 [B,S] of the sampled anchors; matched int64 [B,S], an object's index, BACKGROUND, or IGNORE
        for padding; offsets float32 [B,S,4], zeros where there is no object).
        """
        if self._anchors is None:
            boxes, labels = self.objects(anchors.device)
            anchors = anchors.expand(len(boxes), -1, -1)
            matched = match(boxes, labels, anchors, **ANCHOR_MATCHING)
            real = torch.ones_like(matched, dtype=torch.bool)
            index, matched = self._draw(matched, real, self.anchors_per_image, ANCHOR_POSITIVES, ANCHOR_STREAM)
            _, offsets = assign(boxes, labels, take(anchors, index), matched, ANCHOR_WEIGHTS)
            self._anchors = index, matched, offsets
        return self._anchors

    @torch.no_grad()
    def mask_targets(self, size):
        """The objects' masks within the positive RoIs, resized: float32 [P,size,size], 0 to 1."""
        parts = []
        for target, roi in zip(self.targets, self.rois):
            index, boxes = roi["object_index"], roi["boxes"]
            used, row = index.unique(return_inverse=True)  # an image may have a hundred masks of a megapixel
            masks = to_device(torch.as_tensor(target["masks"])[used], boxes.device)
            rows_and_boxes = torch.cat([to_device(row[:, None], boxes.device).to(boxes), boxes[: len(index)]], 1)
            parts.append(align(masks[:, None].to(boxes), rows_and_boxes, 1, size, samples=-1)[:, 0])
        return torch.cat(parts)

    def objects(self, device):
        """`pad_boxes` of the targets: boxes [B,M,4] and labels [B,M] on `device`."""
        if self._objects is None:
            self._objects = self.targets.to(device)
        return self._objects["boxes"], self._objects["labels"]

    def counts(self, anchors):
        """int64 [3], COUNTS."""
        anchors, rois = self.anchor_targets(anchors)[1], self._rois[-1]
        return torch.stack([(anchors != IGNORE).sum(), (rois != IGNORE).sum(), (rois >= 0).sum()])

    def _draw(self, matched, real, max_samples, positive_fraction, stream):
        """`sample_balanced` with the same random numbers for an image in any batch: its n-th real candidate gets the
        n-th number of a generator seeded for this image."""
        keys = torch.stack(
            [random_numbers((*self.seed, t["image_id"], stream), matched.shape[1]) for t in self.targets]
        )
        order = (real.cumsum(1) - 1).clamp(min=0)
        keys = to_device(keys, matched.device).gather(1, order)
        return sample_balanced(matched, keys, max_samples, positive_fraction)


def random_numbers(seed, count):
    """float32 [count] from 0 to 1, on the CPU; the first ones do not depend on `count`."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.rand(count, generator=torch.Generator().manual_seed(int(state[0])))


def match(boxes, labels, candidates, threshold, low, keep_best):
    """The object that each candidate is matched to: int64 [B,N], an index of `boxes`, or BACKGROUND, or IGNORE.

    boxes [B,M,4], labels [B,M]  of `pad_boxes`
    candidates [B,N,4]           xyxy pixels
    threshold, low, keep_best    as in ops.matching.match, whose rules are the same but for two of torchvision's: of a
                                 box all best candidates are kept, each for the box with which its own IoU is highest;
                                 one is IGNORE if its IoU with a box to ignore exceeds that with every other

    One image at a time: the IoU of 100 boxes and 270,000 anchors take 108 MB.
    """
    images = zip(boxes, labels, candidates, strict=True)
    return torch.stack([match_image(*image, threshold, low, keep_best) for image in images])


def match_image(boxes, labels, candidates, threshold, low, keep_best):
    """`match` of one image: boxes [M,4], labels [M], candidates [N,4]."""
    sign = (labels >= 0).float() - (labels == IGNORE).float()  # 1 an object, -1 to ignore, 0 padding
    iou = pairwise_iou(boxes, candidates).mul_(sign[:, None])  # [M,N]
    max_iou, best = iou.max(0)
    matched = best.masked_fill(max_iou < threshold, IGNORE).masked_fill(max_iou < low, BACKGROUND)
    if keep_best:
        highest = iou.amax(1, keepdim=True)
        matched = torch.where(((iou == highest) & (highest > 0)).any(0), best, matched)
    return matched.masked_fill(-iou.amin(0) > max_iou.clamp(min=0), IGNORE)


def sample_balanced(matched, keys, max_samples, positive_fraction):
    """(index, matched) of the samples, int64 [B,S]: at most `max_samples`, positives first, at most that fraction.

    matched  [B,N] of `match`; in the result IGNORE is padding, which comes last
    keys     random numbers [B,N]: those with the lowest are taken, so one candidate more or less does not change the
             others
    """

    def lowest(chosen, count):
        return keys.masked_fill(~chosen, math.inf).topk(min(count, keys.shape[1]), largest=False)

    positive = lowest(matched >= 0, int(max_samples * positive_fraction))
    negative = lowest(matched == BACKGROUND, max_samples)
    order = torch.cat([positive.values, negative.values.double() + 1], dim=1)  # inf is padding
    order, index = order.topk(min(max_samples, order.shape[1]), largest=False)
    index = torch.cat([positive.indices, negative.indices], dim=1).gather(1, index)
    return index, matched.gather(1, index).masked_fill(order == math.inf, IGNORE)


def assign(boxes, labels, samples, matched, weights):
    """(labels [B,S], 0 background; offsets [B,S,4] to the matched boxes, zeros for background) of samples [B,S,4]."""
    positive, index = matched >= 0, matched.clamp(min=0)
    labels = torch.where(positive, take(labels, index) + 1, 0)
    offsets = encode(torch.where(positive[..., None], take(boxes, index), samples), samples, weights)
    return labels, offsets.masked_fill(~positive[..., None], 0)


def count(outputs, sampled):
    """float32 [3], COUNTS: sampled anchors, sampled RoIs, positive RoIs. Losses are divided by these, averaged over
    processes."""
    return sampled.counts(outputs["anchors"]).float()


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
    index, matched, anchor_offsets = sampled.anchor_targets(outputs["anchors"])
    objectness, deltas = take(outputs["objectness"].float(), index), take(outputs["deltas"].float(), index)
    is_object, is_sample = (matched >= 0).float(), (matched != IGNORE).float()
    labels, offsets = (torch.cat([roi[name] for roi in sampled.rois]) for name in ("labels", "offsets"))
    boxes = outputs["offsets"].float().unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]
    object_labels = torch.cat([roi["labels"][: len(roi["object_index"])] for roi in sampled.rois])
    masks = outputs["masks"].float()[torch.arange(len(object_labels), device=labels.device), object_labels]  # [P,28,28]
    mask_targets = sampled.mask_targets(masks.shape[-1])
    return {
        "objectness": F.binary_cross_entropy_with_logits(objectness, is_object, is_sample, reduction="sum"),
        "rpn_box": smooth_l1(deltas, anchor_offsets, matched >= 0),
        "classification": F.cross_entropy(outputs["logits"].float(), labels, class_weights, reduction="sum"),
        "box": smooth_l1(boxes, offsets, labels > 0),
        "mask": F.binary_cross_entropy_with_logits(masks, mask_targets, reduction="sum") / masks.shape[-1] ** 2,
    }


def smooth_l1(offsets, targets, positive):
    """The sum over positive rows; `targets` of the others are zeros."""
    return F.smooth_l1_loss(offsets.masked_fill(~positive[..., None], 0), targets, beta=BETA, reduction="sum")
