"""The modules that export.py writes as ONNX files: from pixels to scores and boxes, in operations that ONNX has.

Two layouts. "sightline": the input is RGB pixels 0..255, and the graph normalizes them. "jetson": what jetson-inference
loads, which normalizes the pixels itself. The caller resizes and pads.

B batch, A anchors or priors, K classes, N detections.
"""

import torch
from torch import nn
from torchvision.ops import nms

from models import backbones, ssd
from models.centerfusion import CenterFusion
from models.onnx.centerfusion import CenterFusionGraph
from models.onnx.padding import PaddedImages
from models.retinanet import LEVELS, SHAPES, RetinaNet
from ops.boxes import decode, take
from utils.errors import WeightsError

LAYOUTS = ("sightline", "jetson")
# The defaults of ops.nms; candidates of each class of SSD, of each level of RetinaNet.
SSD_RULES = {"score_threshold": 0.01, "iou_threshold": 0.45, "candidates": 400, "max_detections": 200}
RETINANET_RULES = {"score_threshold": 0.05, "iou_threshold": 0.5, "candidates": 1000, "max_detections": 100}
CANDIDATES = ("all_boxes", "all_scores")  # inputs of NMS: outputs of the module, but not of the file


@torch.library.custom_op("sightline::nms_mask", mutates_args=())
def nms_mask(boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, iou_threshold: float) -> torch.Tensor:
    """Whether boxes [B,N,4] with scores [B,K,N] are selected by the NMS of any class: bool [B,N].

    A custom operation, because torch.export cannot trace intermediate results of data-dependent size.
    """
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for image_keep, image_boxes, image_scores in zip(keep, boxes, scores):
        for class_scores in image_scores:
            above = (class_scores > score_threshold).nonzero()[:, 0]
            image_keep[above[nms(image_boxes[above], class_scores[above], iou_threshold)]] = True
    return keep


@nms_mask.register_fake
def _(boxes, scores, score_threshold, iou_threshold):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


@torch.library.custom_op("sightline::topk_sorted", mutates_args=())
def topk_sorted(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest values of the last dimension, in descending order, and their indices.

    Equal values stay in order, as in ONNX; torch.topk guarantees no order, and a blank image has many equal scores.
    """
    values, index = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :count].contiguous(), index[..., :count].contiguous()


@topk_sorted.register_fake
def _(values, count):
    shape = (*values.shape[:-1], count)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


def onnx_topk_sorted(values, count: int):
    from onnxscript import opset18 as op

    return op.TopK(values, op.Constant(value_ints=[count]), axis=-1, largest=1, sorted=1)


def onnx_nms_mask(boxes, scores, score_threshold: float, iou_threshold: float):
    """`nms_mask` in ONNX, whose NonMaxSuppression returns a list of (image, class, box)."""
    from onnxscript import BOOL
    from onnxscript import opset18 as op

    max_boxes = op.Shape(boxes, start=1, end=2)
    selected = op.NonMaxSuppression(boxes, scores, max_boxes, iou_threshold, score_threshold)  # [S,3]
    index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # [S,2], image and box
    zeros = op.Expand(op.Constant(value_ints=[0]), op.Shape(boxes, end=2))  # [B,N]
    ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(selected, end=1))  # [S]
    return op.Cast(op.ScatterND(zeros, index, ones), to=BOOL.dtype)


def translations():
    """The ONNX versions of the custom operations above, for torch.onnx.export."""
    ours = torch.ops.sightline
    return {ours.nms_mask.default: onnx_nms_mask, ours.topk_sorted.default: onnx_topk_sorted}


def is_bgr(net):
    return isinstance(net, CenterFusion)


class Normalize(nn.Module):
    """RGB pixels 0..255, float32 [B,3,H,W] -> the input of the network."""

    def __init__(self, net):
        super().__init__()
        self.bgr = is_bgr(net)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(net, f"image_{name}"), dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        return ((images.flip(1) if self.bgr else images) - self.mean) / self.std


class Classifier(nn.Module):
    """Images -> scores [B,K], which sum to 1."""

    opset = 18

    def __init__(self, net, layout):
        super().__init__()
        jetson = layout == "jetson"
        self.net, self.normalize = net, nn.Identity() if jetson else Normalize(net)
        self.inputs, self.outputs = ("input_0" if jetson else "images",), ("output_0" if jetson else "scores",)

    def forward(self, images):
        return self.postprocess(self.net(self.normalize(images)))

    def postprocess(self, logits):
        return (logits.softmax(-1),)


class Detector(nn.Module):
    """Images -> scores [B,A,K] and boxes [B,A,4], xyxy pixels within the input.

    layout     "jetson": scores [B,A,K+1], background first, and boxes as fractions of the input, not clipped
    with_nms   instead: boxes [B,N,4], labels int64 [B,N] and scores [B,N], highest first; unused rows have score 0,
               label -1 and a box of zeros. The CANDIDATES follow: boxes and scores as above
    threshold  minimum score with NMS; None: that of the run's validation, see models.load
    """

    opset = 18

    def __init__(self, net, size, layout="sightline", with_nms=False, threshold=None):
        super().__init__()
        self.net, self.jetson, self.with_nms = net, layout == "jetson", with_nms
        self.normalize = nn.Identity() if self.jetson else Normalize(net)
        self.background = isinstance(net, ssd.SSD)
        height, width = size
        self.register_buffer("anchors", net.anchors(size).clone())
        self.register_buffer("image_size", torch.tensor([width, height, width, height], dtype=torch.float32))
        self.rules = (SSD_RULES if self.background else RETINANET_RULES) | getattr(net, "nms_limits", {})
        if threshold is not None:
            self.rules["score_threshold"] = threshold
        self.level_sizes = None if self.background else net.level_sizes(size)
        self.inputs = ("input_0",) if self.jetson else ("images",)
        self.outputs = ("boxes", "labels", "scores", *CANDIDATES) if with_nms else ("scores", "boxes")

    def forward(self, images):
        return self.postprocess(self.net(self.normalize(images)))

    def postprocess(self, outputs):
        scores = outputs["logits"].softmax(-1) if self.background else outputs["logits"].sigmoid()
        boxes = decode(outputs["offsets"], self.anchors, self.net.box_weights)
        if self.jetson:
            return scores, boxes / self.image_size
        scores = scores[..., 1:] if self.background else scores
        boxes = boxes.clamp(min=0).minimum(self.image_size)
        return (*self.nms(boxes, scores), boxes, scores) if self.with_nms else (scores, boxes)

    def nms(self, boxes, scores):
        """Boxes [B,A,4] and scores [B,A,K] -> boxes [B,N,4], labels [B,N] and scores [B,N] of the detections."""
        if self.background:
            return ssd_nms(boxes, scores, **self.rules)
        return retinanet_nms(boxes, scores, self.level_sizes, **self.rules)


class PaddedRetinaNet(Detector):
    """Images and `sizes` float32 [B,2], (h, w) of each image at the top left of the input -> as Detector with NMS.

    What is beyond an image has no influence, whatever its pixels are: the detections are those of the image padded
    alone to multiples of 32, as predict.py pads it. Its boxes are clipped to its size.
    """

    def __init__(self, net, size, threshold=None):
        super().__init__(net, size, with_nms=True, threshold=threshold)
        self.inputs, self.size, self.map_sizes = ("images", "sizes"), tuple(size), net.map_sizes(size)
        grids = [torch.meshgrid(*map(torch.arange, map_size), indexing="ij") for map_size in self.map_sizes]
        cells = [torch.stack([x, y, x, y], -1).flatten(0, 1).repeat_interleave(SHAPES, 0) for y, x in grids]
        self.register_buffer("cells", torch.cat(cells).float())  # [A,4], column and row of each anchor, twice
        whole = PaddedImages(torch.tensor([size], dtype=torch.float32), size, LEVELS)
        self.register_buffer("shapes", self.anchors - self.cells * self.strides(whole)[0])  # torchvision's at cell 0, 0

    def forward(self, images, sizes):
        images = self.normalize(images)
        with PaddedImages(sizes, self.size, LEVELS) as padded:
            outputs = self.net(images)
        return self.postprocess(outputs, padded)

    def postprocess(self, outputs, padded):
        own = padded.contain_anchors(self.map_sizes, SHAPES)[..., None]  # [B,A,1]
        boxes = decode(outputs["offsets"], self.own_anchors(padded), self.net.box_weights)
        boxes = boxes.clamp(min=0).minimum(padded.sizes.flip(1).repeat(1, 2)[:, None]) * own
        scores = outputs["logits"].sigmoid() * own
        return *self.nms(boxes, scores), boxes, scores

    def own_anchors(self, padded):
        """[A,4]; of torchvision's variant [B,A,4], because the strides of P6 and P7 depend on the size of the image."""
        if self.net.arguments["anchors"] != "torchvision":
            return self.anchors
        return self.shapes + self.cells * self.strides(padded)

    def strides(self, padded):
        """[B,A,4], pixels per cell in x, y, x, y."""
        strides = (strides.flip(1).repeat(1, 2)[:, None] for strides in padded.strides(self.map_sizes))
        return torch.cat([x.expand(-1, count, -1) for x, count in zip(strides, self.level_sizes)], 1)


def ssd_nms(boxes, scores, score_threshold, iou_threshold, candidates, max_detections):
    """`ops.nms.ssd_detections` with outputs of a fixed size."""
    count, classes = min(candidates, scores.shape[1]), scores.shape[2]
    best, prior = topk_sorted(scores.transpose(1, 2), count)  # [B,K,n]
    boxes = take(boxes, prior.flatten(1))  # [B,K*n,4]
    rows = boxes.unflatten(1, (classes, count)).flatten(0, 1)  # [B*K,n,4]
    keep = nms_mask(rows, best.flatten(0, 1)[:, None], score_threshold, iou_threshold)
    labels = torch.arange(classes, device=boxes.device)[:, None].expand(-1, count).flatten()  # [K*n]
    keep = keep.unflatten(0, (-1, classes)).flatten(1)
    return top_detections(boxes, labels.expand_as(boxes[..., 0]), best.flatten(1), keep, max_detections)


def retinanet_nms(boxes, scores, level_sizes, score_threshold, iou_threshold, candidates, max_detections):
    """`ops.nms.retinanet_detections` with outputs of a fixed size."""
    classes, levels = scores.shape[2], []
    for level_boxes, level_scores in zip(boxes.split(level_sizes, 1), scores.split(level_sizes, 1)):
        level_scores = level_scores.flatten(1)  # [B,A*K]
        best, pair = topk_sorted(level_scores, min(candidates, level_scores.shape[1]))
        levels.append((take(level_boxes, pair // classes), pair % classes, best))
    boxes, labels, scores = (torch.cat(parts, 1) for parts in zip(*levels))  # [B,n,4], [B,n], [B,n]
    of_class = labels[:, None] == torch.arange(classes, device=boxes.device)[:, None]  # [B,K,n]
    keep = nms_mask(boxes, torch.where(of_class, scores[:, None], 0.0), score_threshold, iou_threshold)
    return top_detections(boxes, labels, scores, keep, max_detections)


def top_detections(boxes, labels, scores, keep, max_detections):
    """The `max_detections` top-scoring of those in the mask `keep` [B,n], highest first."""
    scores = torch.where(keep, scores, 0.0)
    scores, index = topk_sorted(scores, min(max_detections, scores.shape[1]))
    used = scores > 0
    boxes = torch.where(used[..., None], take(boxes, index), 0.0)
    return boxes, torch.where(used, labels.gather(1, index), -1), scores


def graph(net, size, layout="sightline", with_nms=False, threshold=None):
    """The module to export for `net` and images of `size` (height, width), in evaluation mode.

    It has `inputs` and `outputs`, their names in order; `opset`, the minimum ONNX opset version; and
    `postprocess(outputs of net)`, which returns its outputs. Raises WeightsError if a network cannot be exported so.
    """
    detector = isinstance(net, (ssd.SSD, RetinaNet))
    if layout == "jetson" and not (isinstance(net, ssd.SSD) or net.name in backbones.NETWORKS):
        raise WeightsError(f"jetson-inference cannot run {net.name}, only SSD and classifiers; remove --layout")
    if with_nms and (not detector or layout == "jetson"):
        reason = "jetson-inference does NMS itself" if detector else f"{net.name} has no boxes for NMS"
        raise WeightsError(f"{reason}; remove --nms")
    if with_nms and isinstance(net, RetinaNet):
        return PaddedRetinaNet(net, size, threshold).eval()
    if detector:
        return Detector(net, size, layout, with_nms, threshold).eval()
    if isinstance(net, CenterFusion):
        return CenterFusionGraph(net, Normalize(net)).eval()
    if net.name in backbones.NETWORKS:
        return Classifier(net, layout).eval()
    raise WeightsError(
        f"{net.name} cannot be exported to ONNX: its number of proposals depends on the image, which torch.export does "
        "not support (in batched_nms), and torch's older exporter fixes it to that of the example image, so that "
        "onnxruntime fails on others; use predict.py, or export.py --state-dict"
    )
