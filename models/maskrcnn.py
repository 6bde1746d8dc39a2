"""Mask R-CNN (He et al. 2017) on ResNet and pyramid, made of torchvision's parts under torchvision's names.

torchvision's own class resizes, proposes, samples, computes losses and detects in one call. Here the network ends where
its raw outputs do; what the regions should say, and which of them are looked at in training, is for losses/maskrcnn.py.

B batch, A anchors of a picture, K classes, R regions of the batch, P regions with an object. torchvision counts
background as class 0, and so do raw outputs; labels of detections do not.
"""

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from models import resnet
from models.errors import WeightsError
from models.layers import IMAGENET_MEAN, IMAGENET_STD

POOLED = (2, 3, 4, 5)  # levels that regions are cut out of; a level's stride is 2 to its power
SIZES = (32, 64, 128, 256, 512)  # side of the anchors of each level in pixels; the last level only proposes
RATIOS = (0.5, 1.0, 2.0)  # height / width
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the coder of regions; that of anchors has ones


class MaskRCNN(nn.Module):
    """Images of any size; sides that are multiples of 32 make every level exactly half the one before.

    name       key of NETWORKS, by which `models.build` makes it again
    depth      of the ResNet: 18, 34, 50, 101 or 152
    v2         torchvision's second recipe: batch norm in pyramid and heads, deeper heads
    width      channels of the pyramid and of the convolutions of the heads
    hidden     width of the fully connected layers that classify a region
    proposals  regions a picture in evaluation; in training twice as many to choose from
    """

    image_mean, image_std, channels = IMAGENET_MEAN, IMAGENET_STD, "rgb"
    min_side, max_side = 800, 1333  # as published
    task = "masks"

    def __init__(self, name, num_classes, depth, v2=False, width=256, hidden=1024, proposals=1000):
        super().__init__()
        for argument, value in (("width", width), ("hidden", hidden), ("proposals", proposals)):
            if value < 1:
                raise WeightsError(f"{argument} {value}: must be 1 or more")
        self.name, self.num_classes, self.arguments = name, num_classes, {"proposals": proposals}
        norm = nn.BatchNorm2d if v2 else None
        body = resnet.body(depth)
        fpn = FeaturePyramidNetwork(list(body.channels), width, LastLevelMaxPool(), norm)
        self.backbone = nn.ModuleDict({"body": body, "fpn": fpn})
        anchors = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES))
        kept = {"training": 2 * proposals, "testing": proposals}  # of each level before suppression, of all after it
        # The numbers that follow, of matching and sampling, are not used: losses/maskrcnn.py has its own.
        head = RPNHead(width, len(RATIOS), conv_depth=2 if v2 else 1)
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, kept, kept, nms_thresh=0.7)
        if v2:
            box_head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm)
        else:
            box_head = TwoMLPHead(width * 7 * 7, hidden)
        outputs = num_classes + 1
        box = (pooler(7), box_head, FastRCNNPredictor(hidden, outputs))
        mask = (pooler(14), MaskRCNNHeads(width, [width] * 4, 1, norm), MaskRCNNPredictor(width, width, outputs))
        limits = {"score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100}
        self.roi_heads = RoIHeads(*box, 0.5, 0.5, 512, 0.25, BOX_WEIGHTS, **limits)
        self.roi_heads.mask_roi_pool, self.roi_heads.mask_head, self.roi_heads.mask_predictor = mask

    def forward(self, images, shapes, sample=None):
        """Detections, or with `sample` raw outputs to learn from.

        images  float [B,3,H,W] normalised and padded
        shapes  (h, w) of each picture before padding
        sample  function of the proposals, B tensors [N,4] xyxy pixels, to the regions to classify, B tensors [n,4], and
                those to make masks for, B tensors [p,4]

        Detections are B dicts: boxes float32 [N,4] xyxy pixels within the picture, labels int64 [N] from 0, scores
        float32 [N], falling, masks float32 [N,28,28], the probabilities within the box that a pixel is its object's.
        Raw outputs are a dict: objectness [B,A], deltas [B,A,4], anchors [A,4]; logits [R,K+1], offsets [R,4(K+1)] of
        the regions and masks [P,K+1,28,28] of those that get some, picture after picture.
        """
        features, proposals, outputs = self.propose(images, shapes)
        if sample is None:
            return self.detect(features, proposals, shapes)
        return outputs | self.answer(features, shapes, *sample(proposals))

    def propose(self, images, shapes):
        """(maps that regions are cut out of, proposals, raw outputs of the anchors), for what `forward` is given."""
        maps = self.backbone["body"].maps(images)
        levels = self.backbone["fpn"]({str(i): x for i, x in enumerate(maps)})
        objectness, deltas = self.rpn.head(list(levels.values()))
        sizes = [x[0].numel() for x in objectness]
        objectness, deltas = (x.float() for x in concat_box_prediction_layers(objectness, deltas))
        # Anchors are made in the type of the maps, and pixels beyond 256 are no numbers of bf16: empty maps stand in.
        grids = [images.new_empty((), dtype=torch.float32).expand(1, 1, *x.shape[-2:]) for x in levels.values()]
        anchors = self.rpn.anchor_generator(ImageList(images, shapes), grids)
        boxes = self.rpn.box_coder.decode(deltas.detach(), anchors).view(len(images), -1, 4)
        proposals, _ = self.rpn.filter_proposals(boxes, objectness, shapes, sizes)
        outputs = {"objectness": objectness.view(len(images), -1), "deltas": deltas.view(len(images), -1, 4)}
        # Once for both poolers, which would copy it into this type and order each.
        features = {name: levels[name].float().contiguous() for name in self.roi_heads.box_roi_pool.featmap_names}
        return features, proposals, {**outputs, "anchors": anchors[0]}

    def answer(self, features, shapes, regions, masked):
        """The raw outputs of `forward` for regions to classify and regions to make masks for, as of `sample`."""
        logits, offsets = self.classify(features, regions, shapes)
        return {"logits": logits, "offsets": offsets, "masks": self.mask(features, masked, shapes)}

    def classify(self, features, regions, shapes):
        """Regions, B tensors [n,4] xyxy pixels -> (logits [R,K+1], offsets [R,4(K+1)])."""
        heads = self.roi_heads
        return heads.box_predictor(through(heads.box_roi_pool, features, regions, shapes, heads.box_head))

    def mask(self, features, regions, shapes):
        """Regions, B tensors [n,4] xyxy pixels -> raw masks [P,K+1,28,28]."""
        heads = self.roi_heads
        return through(heads.mask_roi_pool, features, regions, shapes, heads.mask_head, heads.mask_predictor)

    @torch.no_grad()
    def detect(self, features, proposals, shapes):
        """The detections of `forward`."""
        logits, offsets = (x.float() for x in self.classify(features, proposals, shapes))
        boxes, scores, labels = self.roi_heads.postprocess_detections(logits, offsets, proposals, shapes)
        masks = maskrcnn_inference(self.mask(features, boxes, shapes).float(), labels)
        parts = zip(boxes, labels, scores, masks, strict=True)
        return [{"boxes": b, "labels": k - 1, "scores": s, "masks": m[:, 0]} for b, k, s, m in parts]

    def stages(self):
        """The body from its first layer on, as five modules that can be frozen: the stem, then four stages."""
        body = self.backbone["body"]
        return [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3, body.layer4]

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}; the pyramid is of the heads."""
        heads = [part.parameters() for part in (self.backbone["fpn"], self.rpn, self.roi_heads)]
        return {"backbone": list(self.backbone["body"].parameters()), "heads": [p for part in heads for p in part]}


def pooler(size):
    """torchvision's pooler of regions to [R,C,size,size], told what it would guess from the first batch it sees.

    The guess is wrong where that batch is small or mostly padding, and it would stay.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(POOLED))], size, sampling_ratio=2)
    pool.scales, pool.map_levels = [2.0**-level for level in POOLED], LevelMapper(POOLED[0], POOLED[-1])
    return pool


def through(pool, features, regions, shapes, *parts):
    """What `parts`, one after the other, make of the regions, B tensors [n,4] xyxy pixels -> [R,...].

    Where there is no region at all, one is made up and its answer dropped: every parameter keeps its gradient, then of
    zeros, and no norm meets an empty batch.
    """
    count = sum(map(len, regions))
    if not count:
        height, width = shapes[0]
        regions = [regions[0].new_tensor([[0, 0, width, height]]), *regions[1:]]
    x = pool(features, regions, shapes)
    for part in parts:
        x = part(x)
    return x[:count]


def maskrcnn_resnet50(num_classes, proposals=1000):
    return MaskRCNN("maskrcnn_resnet50", num_classes, 50, proposals=proposals)


def maskrcnn_resnet50_v2(num_classes, proposals=1000):
    return MaskRCNN("maskrcnn_resnet50_v2", num_classes, 50, v2=True, proposals=proposals)


def maskrcnn_resnet18(num_classes, proposals=300, width=128, hidden=256):
    """For small machines: narrower heads and fewer proposals. torchvision's numbers are 1000, 256 and 1024."""
    net = MaskRCNN("maskrcnn_resnet18", num_classes, 18, width=width, hidden=hidden, proposals=proposals)
    net.arguments |= {"width": width, "hidden": hidden}
    return net


NETWORKS = {make.__name__: make for make in (maskrcnn_resnet50, maskrcnn_resnet50_v2, maskrcnn_resnet18)}
