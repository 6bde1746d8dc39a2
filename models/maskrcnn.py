"""Mask R-CNN (He et al. 2017) on ResNet and feature pyramid, made of torchvision's parts under torchvision's names.

torchvision's own class resizes, proposes, samples, computes losses and detects in one call. This network ends with the
raw outputs: losses/maskrcnn.py samples RoIs and computes the losses. Its parts select boxes image by image and pool
them level by level, and wait for a GPU each time; ops/proposals.py and ops/roi_pool.py do the same for a whole batch.

B batch, A anchors per image, N proposals per image, K classes, R RoIs of the batch, P of them with an object.
torchvision's class 0 is background, and so it is in raw outputs; labels of detections start at the first class.
"""

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.backbones import resnet
from models.backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from ops.proposals import select_detections, select_proposals
from ops.roi_pool import STRIDES, pool_rois
from ops.transfer import to_cpu, to_device
from utils.errors import WeightsError

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # side of the anchors of each level in pixels; the last level only proposes
RATIOS = (0.5, 1.0, 2.0)  # height / width
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box coder of RoIs; that of anchors has ones
BOX_SIZE, MASK_SIZE = 7, 14  # bins per side that RoIs are pooled to for each head


class MaskRCNN(nn.Module):
    """Images of any size; sides that are multiples of 32 make every level exactly half the one before.

    name       key of NETWORKS
    depth      of the ResNet: 18, 34, 50, 101 or 152
    v2         torchvision's second version: batch norm in pyramid and heads, deeper heads
    width      channels of the pyramid and of the convolutions of the heads
    hidden     width of the fully connected layers of the box head
    proposals  number of RoIs per image in evaluation; in training they are sampled from twice as many
    """

    image_mean, image_std = IMAGENET_MEAN, IMAGENET_STD
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
        anchors = AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), (RATIOS,) * len(ANCHOR_SIZES))
        top_n = {"training": 2 * proposals, "testing": proposals}  # of each level before NMS, of all levels after it
        # The constructors also ask for limits of matching and sampling; losses/maskrcnn.py has its own.
        head = RPNHead(width, len(RATIOS), conv_depth=2 if v2 else 1)
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, top_n, top_n, nms_thresh=0.7)
        if v2:
            box_head = FastRCNNConvFCHead((width, BOX_SIZE, BOX_SIZE), [width] * 4, [hidden], norm)
        else:
            box_head = TwoMLPHead(width * BOX_SIZE**2, hidden)
        outputs = num_classes + 1
        limits = {"score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100}
        box = (None, box_head, FastRCNNPredictor(hidden, outputs))  # None: torchvision's pooler
        self.roi_heads = RoIHeads(*box, 0.5, 0.5, 512, 0.25, BOX_WEIGHTS, **limits)
        self.roi_heads.mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm)
        self.roi_heads.mask_predictor = MaskRCNNPredictor(width, width, outputs)

    def forward(self, images, shapes, sample=None):
        """Detections; with `sample`, the raw outputs that the losses need.

        images  float [B,3,H,W], normalized and padded
        shapes  (h, w) of each image before padding
        sample  sample(proposals), [B,N,4] as `propose` returns them -> (RoIs to classify, B tensors [n,4]; RoIs to
                predict masks for, B tensors [p,4])

        Detections are B dicts on the CPU: boxes float32 [N,4] xyxy pixels within the image, labels int64 [N] from 0,
        scores float32 [N], highest first, masks float32 [N,28,28], probabilities within the box.
        Raw outputs are a dict: objectness [B,A], deltas [B,A,4], anchors [A,4]; logits [R,K+1] and offsets [R,4(K+1)]
        of the RoIs to classify; masks [P,K+1,28,28] of the others. RoIs are in the order of the images.
        """
        features, proposals, outputs = self.propose(images, shapes)
        if sample is None:
            return self.detect(features, proposals, shapes)
        return outputs | self.roi_outputs(features, shapes, *sample(proposals))

    def propose(self, images, shapes):
        """images and shapes as in `forward` -> (features by level, proposals [B,N,4], raw outputs of the RPN).

        Proposals are xyxy pixels, the best first; where an image has fewer than N, the last rows are zeros. They and
        the features are for `detect` and `roi_outputs`: an evaluation wants detections and losses of one pass.
        """
        maps = self.backbone["body"].feature_maps(images)
        levels = list(self.backbone["fpn"]({str(i): x for i, x in enumerate(maps)}).values())
        objectness, deltas = self.rpn.head(levels)
        sizes = [x[0].numel() for x in objectness]
        objectness, deltas = (x.float() for x in concat_box_prediction_layers(objectness, deltas))
        objectness, deltas = objectness.view(len(images), -1), deltas.view(len(images), -1, 4)
        # Anchors get the dtype of the maps, and bf16 cannot hold pixels above 256: pass empty float32 maps instead.
        grids = [images.new_empty((), dtype=torch.float32).expand(1, 1, *x.shape[-2:]) for x in levels]
        (anchors,) = self.rpn.anchor_generator(ImageList(images, shapes[:1]), grids)
        rpn = self.rpn
        limits = rpn.pre_nms_top_n(), rpn.post_nms_top_n(), rpn.nms_thresh, rpn.min_size
        proposals = select_proposals(objectness.detach(), deltas.detach(), anchors, shapes, sizes, *limits)
        # Converted once; pooling for each of the two heads would otherwise make its own copy.
        features = [x.float().contiguous() for x in levels[: len(STRIDES)]]
        return features, proposals, {"objectness": objectness, "deltas": deltas, "anchors": anchors}

    def roi_outputs(self, features, shapes, rois, mask_rois):
        """The raw outputs of `forward` for RoIs to classify and RoIs to predict masks for, as `sample` returns them."""
        logits, offsets = self.classify(features, rois, shapes)
        return {"logits": logits, "offsets": offsets, "masks": self.predict_masks(features, mask_rois, shapes)}

    def classify(self, features, rois, shapes):
        """RoIs, B tensors [n,4] xyxy pixels -> (logits [R,K+1], offsets [R,4(K+1)])."""
        heads = self.roi_heads
        return heads.box_predictor(pool_and_apply(features, rois, shapes, BOX_SIZE, heads.box_head))

    def predict_masks(self, features, rois, shapes):
        """RoIs, B tensors [n,4] xyxy pixels -> raw masks [P,K+1,28,28]."""
        heads = self.roi_heads
        return pool_and_apply(features, rois, shapes, MASK_SIZE, heads.mask_head, heads.mask_predictor)

    def limit_detections(self, score_threshold=0.05, iou_threshold=0.5, max_detections=100):
        """Set the minimum score, the IoU threshold of NMS and the maximum number per image of `detect`."""
        heads = self.roi_heads
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = score_threshold, iou_threshold, max_detections

    @torch.no_grad()
    def detect(self, features, proposals, shapes, *others):
        """The detections of `forward`; with other tensors, (detections, *others), all on the CPU by the same copy.

        features, proposals  of `propose`
        """
        heads = self.roi_heads
        outputs = self.classify(features, proposals, shapes)
        logits, offsets = (x.float().unflatten(0, proposals.shape[:2]) for x in outputs)
        limits = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
        boxes, scores, labels = select_detections(logits, offsets, proposals, shapes, BOX_WEIGHTS, *limits)
        found = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1)  # [B,n,6]
        # On a CPU without the padding; on a GPU that would wait, and masks for padding cost less.
        found = list(found) if found.is_cuda else [rows[rows[:, 4] >= 0] for rows in found]
        masks = self.predict_masks(features, [rows[:, :4] for rows in found], shapes).float()
        own_class = torch.cat(found)[:, 5].long() + 1
        masks = masks[torch.arange(len(masks), device=masks.device), own_class].sigmoid()  # [P,28,28]
        sizes = [len(rows) for rows in found]
        rows, masks, *others = to_cpu(torch.cat(found), masks, *others)
        detections = [as_dict(*image) for image in zip(rows.split(sizes), masks.split(sizes), strict=True)]
        return (detections, *others) if others else detections

    def stages(self):
        """The stages of the body, see `resnet.ResNet.stages`."""
        return self.backbone["body"].stages()

    def parameter_groups(self):
        """Parameters by part, each exactly once: {"backbone": [...], "heads": [...]}, with the pyramid in heads."""
        heads = [part.parameters() for part in (self.backbone["fpn"], self.rpn, self.roi_heads)]
        return {"backbone": list(self.backbone["body"].parameters()), "heads": [p for part in heads for p in part]}


def pool_and_apply(features, rois, shapes, size, *layers):
    """Pool RoIs, B tensors [n,4] xyxy pixels, to size x size bins and apply the layers in order -> [R,...].

    If there are none, one RoI is made up and its result dropped: all parameters then get a gradient, of zeros, and no
    batch norm gets an empty batch.
    """
    count = sum(map(len, rois))
    if not count:
        height, width = shapes[0]
        whole = torch.tensor([[0.0, 0.0, width, height]])
        rois = [to_device(whole, rois[0].device), *rois[1:]]
    x = pool_rois(features, rois, size)
    for layer in layers:
        x = layer(x)
    return x[:count]


def as_dict(rows, masks):
    """Detections of one image from rows [n,6] of box, score, label and from masks [n,28,28], without the padding."""
    found = rows[:, 4] >= 0
    rows = rows[found]
    return {"boxes": rows[:, :4], "labels": rows[:, 5].long(), "scores": rows[:, 4], "masks": masks[found]}


def maskrcnn_resnet50(num_classes, proposals=1000):
    return MaskRCNN("maskrcnn_resnet50", num_classes, 50, proposals=proposals)


def maskrcnn_resnet50_v2(num_classes, proposals=1000):
    return MaskRCNN("maskrcnn_resnet50_v2", num_classes, 50, v2=True, proposals=proposals)


def maskrcnn_resnet18(num_classes, proposals=300, width=128, hidden=256):
    """For small machines: narrower heads and fewer proposals."""
    net = MaskRCNN("maskrcnn_resnet18", num_classes, 18, width=width, hidden=hidden, proposals=proposals)
    net.arguments |= {"width": width, "hidden": hidden}
    return net


NETWORKS = {make.__name__: make for make in (maskrcnn_resnet50, maskrcnn_resnet50_v2, maskrcnn_resnet18)}
