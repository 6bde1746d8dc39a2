"""Networks as they leave for other programs: one module from pixels to answers, in operations that ONNX has.

Two layouts. "sightline": RGB pixels 0..255 come in as they are, and the graph normalises them. "jetson": what
jetson-inference loads; it normalises by itself, so its input is normalised already. Nothing is padded or resized.

B batch, A anchors or priors, K classes, N boxes that are kept.
"""

import torch
from torch import nn
from torchvision.ops import nms

from models import backbones, ssd
from models.centerfusion import CenterFusion
from models.deploy_radar import CameraRadar
from models.errors import WeightsError
from models.retinanet import RetinaNet
from ops.boxes import decode

LAYOUTS = ("sightline", "jetson")
# Of ops.suppress: score and IoU thresholds, candidates (a class of SSD, a level of RetinaNet), most a picture.
SSD_RULES, PYRAMID_RULES = (0.01, 0.45, 400, 200), (0.05, 0.5, 1000, 100)
CANDIDATES = ("all_boxes", "all_scores")  # what suppression gets; in the graph, but no outputs of the file


@torch.library.custom_op("sightline::survivors", mutates_args=())
def survivors(boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, iou_threshold: float) -> torch.Tensor:
    """Which boxes [B,N,4] with scores [B,K,N] stay after suppression class by class: bool [B,N].

    One operation for torch.export, because what lies within has no size known before.
    """
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for kept, picture_boxes, picture_scores in zip(keep, boxes, scores):
        for class_scores in picture_scores:
            above = (class_scores > score_threshold).nonzero()[:, 0]
            kept[above[nms(picture_boxes[above], class_scores[above], iou_threshold)]] = True
    return keep


@survivors.register_fake
def _(boxes, scores, score_threshold, iou_threshold):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


@torch.library.custom_op("sightline::greatest", mutates_args=())
def greatest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` greatest of the last dimension, falling, and their indices; of equal ones the first come first.

    So ONNX has it, where torch.topk promises no order: a blank picture has many equal scores.
    """
    values, index = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :count].contiguous(), index[..., :count].contiguous()


@greatest.register_fake
def _(values, count):
    shape = (*values.shape[:-1], count)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


def onnx_greatest(values, count: int):
    from onnxscript import opset18 as op

    return op.TopK(values, op.Constant(value_ints=[count]), axis=-1, largest=1, sorted=1)


def onnx_survivors(boxes, scores, score_threshold: float, iou_threshold: float):
    """`survivors` in ONNX: NonMaxSuppression lists (picture, class, box), of which a mask is made."""
    from onnxscript import BOOL
    from onnxscript import opset18 as op

    most = op.Shape(boxes, start=1, end=2)
    listed = op.NonMaxSuppression(boxes, scores, most, iou_threshold, score_threshold)  # [S,3]
    place = op.Gather(listed, op.Constant(value_ints=[0, 2]), axis=1)  # [S,2]
    zeros = op.Expand(op.Constant(value_ints=[0]), op.Shape(boxes, end=2))  # [B,N]
    ones = op.Expand(op.Constant(value_ints=[1]), op.Shape(listed, end=1))  # [S]
    return op.Cast(op.ScatterND(zeros, place, ones), to=BOOL.dtype)


def translations():
    """What torch.onnx.export needs to know of the operations above."""
    ours = torch.ops.sightline
    return {ours.survivors.default: onnx_survivors, ours.greatest.default: onnx_greatest}


def blue_first(net):
    return getattr(net, "channels", "") == "bgr"  # a ResNet's are numbers


class Normalise(nn.Module):
    """RGB pixels 0..255, float32 [B,3,H,W] -> what the network was trained on."""

    def __init__(self, net):
        super().__init__()
        self.blue_first = blue_first(net)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(net, f"image_{name}"), dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        return ((images.flip(1) if self.blue_first else images) - self.mean) / self.std


class Classifier(nn.Module):
    """Images -> scores [B,K], which sum to 1."""

    opset = 18

    def __init__(self, net, layout):
        super().__init__()
        jetson = layout == "jetson"
        self.net, self.before = net, nn.Identity() if jetson else Normalise(net)
        self.inputs, self.outputs = ("input_0" if jetson else "images",), ("output_0" if jetson else "scores",)

    def forward(self, images):
        return self.answers(self.net(self.before(images)))

    def answers(self, logits):
        return (logits.softmax(-1),)


class Detector(nn.Module):
    """Images -> scores [B,A,K] and boxes [B,A,4], xyxy pixels within the input.

    layout     "jetson": scores [B,A,K+1], background first, and boxes in parts of the input, which may leave it
    suppress   instead: boxes [B,N,4], labels int64 [B,N] and scores [B,N], highest first; what is no detection has
               score 0, label -1 and a box of zeros. Then what suppression got: boxes and scores as above
    threshold  least score, None: that of evaluation
    """

    opset = 18

    def __init__(self, net, size, layout="sightline", suppress=False, threshold=None):
        super().__init__()
        self.net, self.jetson, self.suppress = net, layout == "jetson", suppress
        self.before = nn.Identity() if self.jetson else Normalise(net)
        self.background = isinstance(net, ssd.SSD)
        height, width = size
        self.register_buffer("anchors", net.anchors(size).clone())
        self.register_buffer("high", torch.tensor([width, height, width, height], dtype=torch.float32))
        rules = SSD_RULES if self.background else PYRAMID_RULES
        self.rules = (rules[0] if threshold is None else threshold, *rules[1:])
        self.level_sizes = None if self.background else net.level_sizes(size)
        self.inputs = ("input_0",) if self.jetson else ("images",)
        self.outputs = ("boxes", "labels", "scores", *CANDIDATES) if suppress else ("scores", "boxes")

    def forward(self, images):
        return self.answers(self.net(self.before(images)))

    def answers(self, outputs):
        scores = outputs["logits"].softmax(-1) if self.background else outputs["logits"].sigmoid()
        boxes = decode(outputs["offsets"], self.anchors, self.net.box_weights)
        if self.jetson:
            return scores, boxes / self.high
        scores = scores[..., 1:] if self.background else scores
        boxes = boxes.clamp(min=0).minimum(self.high)
        return (*self.kept(boxes, scores), boxes, scores) if self.suppress else (scores, boxes)

    def kept(self, boxes, scores):
        """Boxes [B,A,4] and scores [B,A,K] -> boxes [B,N,4], labels [B,N], scores [B,N] that suppression leaves."""
        if self.background:
            return best_a_class(boxes, scores, *self.rules)
        return best_a_level(boxes, scores, self.level_sizes, *self.rules)


def best_a_class(boxes, scores, score_threshold, iou_threshold, candidates, most):
    """`ops.suppress.detections` for a graph: as many boxes a picture whatever is in it."""
    count, classes = min(candidates, scores.shape[1]), scores.shape[2]
    best, prior = greatest(scores.transpose(1, 2), count)  # [B,K,n]
    boxes = picked(boxes, prior.flatten(1))  # [B,K*n,4]
    rows = boxes.unflatten(1, (classes, count)).flatten(0, 1)  # [B*K,n,4]
    keep = survivors(rows, best.flatten(0, 1)[:, None], score_threshold, iou_threshold)
    labels = torch.arange(classes, device=boxes.device)[:, None].expand(-1, count).flatten()  # [K*n]
    return leave(boxes, labels.expand_as(boxes[..., 0]), best.flatten(1), keep.unflatten(0, (-1, classes)), most)


def best_a_level(boxes, scores, level_sizes, score_threshold, iou_threshold, candidates, most):
    """`ops.suppress.from_pyramid` for a graph."""
    classes, found = scores.shape[2], []
    for level_boxes, level_scores in zip(boxes.split(level_sizes, 1), scores.split(level_sizes, 1)):
        level_scores = level_scores.flatten(1)  # [B,A*K]
        best, pair = greatest(level_scores, min(candidates, level_scores.shape[1]))
        found.append((picked(level_boxes, pair // classes), pair % classes, best))
    boxes, labels, scores = (torch.cat(parts, 1) for parts in zip(*found))  # [B,n,4], [B,n], [B,n]
    own = labels[:, None] == torch.arange(classes, device=boxes.device)[:, None]  # [B,K,n]
    keep = survivors(boxes, torch.where(own, scores[:, None], 0.0), score_threshold, iou_threshold)
    return leave(boxes, labels, scores, keep, most)


def picked(boxes, index):
    """Boxes [B,A,4] at index [B,n] -> [B,n,4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def leave(boxes, labels, scores, keep, most):
    """The `most` best that `keep` leaves, highest first."""
    scores = torch.where(keep.flatten(1), scores, 0.0)
    scores, index = greatest(scores, min(most, scores.shape[1]))
    held = scores > 0
    boxes = torch.where(held[..., None], picked(boxes, index), 0.0)
    return boxes, torch.where(held, labels.gather(1, index), -1), scores


def graph(net, size, layout="sightline", suppress=False, threshold=None):
    """The module to export for `net` and pictures of `size` (height, width), in evaluation mode.

    It has `inputs` and `outputs`, their names in order, `opset`, the least version of ONNX's operations that has all of
    its own, and `answers(what net returned)`, its outputs. Raises WeightsError where a network has no such graph.
    """
    detector = isinstance(net, (ssd.SSD, RetinaNet))
    if layout == "jetson" and not (isinstance(net, ssd.SSD) or net.name in backbones.NETWORKS):
        raise WeightsError(f"jetson-inference reads no {net.name}: it knows SSD and classifiers; leave --layout out")
    if suppress and (not detector or layout == "jetson"):
        program = "jetson-inference suppresses by itself" if detector else f"{net.name} gives no boxes to suppress"
        raise WeightsError(f"{program}; leave --nms out")
    if detector:
        return Detector(net, size, layout, suppress, threshold).eval()
    if isinstance(net, CenterFusion):
        return CameraRadar(net, Normalise(net)).eval()
    if net.name in backbones.NETWORKS:
        return Classifier(net, layout).eval()
    raise WeightsError(
        f"no ONNX file of {net.name}: how many regions it looks at differs from picture to picture. Tried: "
        "torch.export, which stops there (in batched_nms), and the older TorchScript exporter, which writes down the "
        "number of its example, so that onnxruntime fails on other pictures; use predict.py, or export.py --weights"
    )
