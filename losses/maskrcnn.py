"""Mask R-CNN's five losses (He et al. 2017), and what anchors and regions should say.

    goals = maskrcnn.Goals(targets, seed=(seed, step))
    outputs = network(images, shapes, goals.sample)
    counts = run.mean(maskrcnn.count(outputs, goals)).clamp(min=1 / run.world)
    losses = maskrcnn.loss(outputs, goals, counts)

Matching and sampling have torchvision's rules and numbers. What is drawn depends on (seed, step, image_id) and on the
network's proposals alone, so processes, workers and resumes change nothing.

B batch, A anchors of a picture, K classes, M objects of a picture, R regions of the batch, P those with an object.
"""

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from ops.boxes import encode
from ops.matching import BACKGROUND, IGNORE

ANCHOR_WEIGHTS, REGION_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)  # of the two box coders
# An object's best anchors are positive, however small their IoU.
ANCHOR_MATCHER = Matcher(0.7, 0.3, allow_low_quality_matches=True)
REGION_MATCHER = Matcher(0.5, 0.5)
ANCHORS, REGIONS = 0, 1  # what a draw is for, so that each has random numbers of its own
COUNTS = ("anchors", "regions", "objects")
# loss -> which of COUNTS it is divided by
NORMALISERS = {"objectness": 0, "rpn_box": 0, "classification": 1, "box": 1, "mask": 2}
BETA = 1 / 9  # where smooth L1 turns from square to straight


class Goals:
    """What the anchors and regions of a batch should say.

    targets  B dicts of the data contract with `masks`, boxes in pixels of the batch's pictures; objects marked `ignore`
             are never learnt, and what overlaps most with one of them is neither positive nor negative
    seed     whole numbers from 0, such as (seed, step)
    anchors, regions              the most that are drawn for a picture
    anchor_share, region_share    of them the most that are positive
    """

    def __init__(self, targets, seed, anchors=256, regions=512, anchor_share=0.5, region_share=0.25):
        self.targets, self.seed = targets, tuple(seed)
        self.anchor_limits, self.region_limits = (anchors, anchor_share), (regions, region_share)
        self.regions = self._anchors = None  # what was drawn

    @torch.no_grad()
    def sample(self, proposals):
        """Draw regions from proposals, B tensors [N,4] xyxy pixels, and the objects' own boxes.

        Returns (regions, B tensors [n,4], those with an object first, and the latter alone, B tensors [p,4]); kept as
        `self.regions`: B dicts of boxes [n,4], labels int64 [n], 0 background, and owner int64 [p], the object's place.
        """
        self.regions = []
        for target, places in zip(self.targets, proposals, strict=True):
            boxes, ignored, labels = self._objects(target, places.device)
            places = torch.cat([places, boxes])
            matched = match(boxes, ignored, places, REGION_MATCHER)
            positive, negative = draw(matched, *self.region_limits, (*self.seed, target["image_id"], REGIONS))
            owner = matched[positive]
            said = torch.cat([labels[owner] + 1, torch.zeros_like(negative)])
            self.regions.append({"boxes": places[torch.cat([positive, negative])], "labels": said, "owner": owner})
        regions = [each["boxes"] for each in self.regions]
        return regions, [boxes[: len(each["owner"])] for boxes, each in zip(regions, self.regions)]

    @torch.no_grad()
    def anchors(self, anchors):
        """Draw from anchors [A,4] xyxy pixels, once: the same for every call.

        Returns (positive int64 [p], negative int64 [q], places in the batch's B*A anchors; goals float32 [p,4]).
        """
        if self._anchors is None:
            found = []
            for first, target in enumerate(self.targets):
                boxes, ignored, _ = self._objects(target, anchors.device)
                matched = match(boxes, ignored, anchors, ANCHOR_MATCHER)
                positive, negative = draw(matched, *self.anchor_limits, (*self.seed, target["image_id"], ANCHORS))
                offsets = encode(boxes[matched[positive]], anchors[positive], ANCHOR_WEIGHTS)
                found.append((positive + first * len(anchors), negative + first * len(anchors), offsets))
            self._anchors = tuple(map(torch.cat, zip(*found)))
        return self._anchors

    @torch.no_grad()
    def boxes(self):
        """What the drawn regions with an object should say of their boxes: float32 [P,4]."""
        found = []
        for target, region in zip(self.targets, self.regions):
            owner, places = region["owner"], region["boxes"]
            boxes, _, _ = self._objects(target, places.device)
            found.append(encode(boxes[owner], places[: len(owner)], REGION_WEIGHTS))
        return torch.cat(found)

    @torch.no_grad()
    def masks(self, size):
        """What they should say of their masks: float32 [P,size,size], 0 to 1, the object's mask cut out and resized."""
        found = []
        for target, region in zip(self.targets, self.regions):
            owner, places = region["owner"], region["boxes"]
            used, index = owner.unique(return_inverse=True)  # a picture may have a hundred masks of a megapixel
            kept = torch.as_tensor(target["masks"])[~target["ignore"]][used.cpu()].to(places.device)
            corners = torch.cat([index[:, None].to(places), places[: len(owner)]], 1)
            # The kernel itself: where torch is told to be deterministic, torchvision's function on a GPU spreads out a
            # tensor as large as the picture for every pixel of every region. Forward the kernel is deterministic.
            align = torch.ops.torchvision.roi_align
            found.append(align(kept[:, None].to(places), corners, 1.0, size, size, -1, False)[:, 0])
        return torch.cat(found)

    def _objects(self, target, device):
        """(boxes [M,4] to learn, boxes to ignore, labels [M]) of a target on `device`."""
        ignore, boxes = target["ignore"], torch.as_tensor(target["boxes"], dtype=torch.float32)
        return boxes[~ignore].to(device), boxes[ignore].to(device), target["labels"][~ignore].to(device)


def match(boxes, ignored, places, matcher):
    """The object that each place answers for: int64 [N], its index in `boxes`, or BACKGROUND, or IGNORE.

    boxes [M,4], ignored [I,4] and places [N,4] xyxy pixels.
    """
    matched = torch.full((len(places),), BACKGROUND, device=places.device)
    overlap = places.new_zeros(len(places))
    if len(boxes) and len(places):
        iou = box_iou(boxes, places)
        matched, overlap = matcher(iou), iou.amax(0)
    if len(ignored):
        matched[box_iou(ignored, places).amax(0) > overlap] = IGNORE
    return matched


def draw(matched, most, share, seed):
    """(positives, negatives) out of `matched` [N]: int64 places, at most `most` in all, positives at most that share.

    Every place gets a random number and the smallest are taken: one place more or less leaves the others alone.
    """
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    keys = torch.rand(len(matched), generator=torch.Generator().manual_seed(int(state[0]))).to(matched.device)

    def some(places, number):
        return places[keys[places].topk(min(number, len(places)), largest=False).indices]

    positive = some(torch.where(matched >= 0)[0], int(most * share))
    return positive, some(torch.where(matched == BACKGROUND)[0], most - len(positive))


def count(outputs, goals):
    """float32 [3], COUNTS: anchors and regions drawn, regions with an object.

    The normalisers: averaged over processes, they make N of them compute what one would.
    """
    positive, negative, _ = goals.anchors(outputs["anchors"])
    regions, objects = (sum(len(each[name]) for each in goals.regions) for name in ("labels", "owner"))
    return outputs["logits"].new_tensor([len(positive) + len(negative), regions, objects], dtype=torch.float32)


def loss(outputs, goals, counts, class_weights=None):
    """{"objectness": [], "rpn_box": [], "classification": [], "box": [], "mask": []}: sums over the batch by `counts`.

    outputs        the network's, made with `goals.sample`
    goals          Goals of the same pictures
    counts         float [3] of `count`, averaged over processes, each above 0
    class_weights  float [K+1], background first, for the classification of regions, or None

    In float32 whatever the outputs are; finite and connected to every output also where no picture holds an object.
    """
    return {name: value / counts[NORMALISERS[name]] for name, value in sums(outputs, goals, class_weights).items()}


def sums(outputs, goals, class_weights=None):
    """The losses before they are divided: an evaluation adds these up, and the counts, over all its batches."""
    positive, negative, offsets = goals.anchors(outputs["anchors"])
    drawn = torch.cat([positive, negative])
    objectness, deltas = outputs["objectness"].float().flatten(), outputs["deltas"].float().flatten(0, 1)
    said = torch.zeros_like(drawn, dtype=torch.float32)
    said[: len(positive)] = 1
    labels = torch.cat([each["labels"] for each in goals.regions])
    objects = torch.where(labels > 0)[0]
    own = labels[objects]
    boxes = outputs["offsets"].float().unflatten(1, (-1, 4))[objects, own]
    masks = outputs["masks"].float()[torch.arange(len(own), device=own.device), own]  # [P,28,28]
    surely = F.binary_cross_entropy_with_logits(masks, goals.masks(masks.shape[-1]), reduction="sum")
    return {
        "objectness": F.binary_cross_entropy_with_logits(objectness[drawn], said, reduction="sum"),
        "rpn_box": F.smooth_l1_loss(deltas[positive], offsets, beta=BETA, reduction="sum"),
        "classification": F.cross_entropy(outputs["logits"].float(), labels, class_weights, reduction="sum"),
        "box": F.smooth_l1_loss(boxes, goals.boxes(), beta=BETA, reduction="sum"),
        "mask": surely / masks.shape[-1] ** 2,
    }
