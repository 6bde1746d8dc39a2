"""What a trained network predicts in images of any size: classes, or boxes in pixels of each file.

run         a training.distributed.Run: device and precision
threshold   minimum score; labels: int64 [K], the classes that count
"""

import functools

import torch
from torchvision import tv_tensors

from data import cameras, loader, transforms
from data.nuscenes import transforms as nuscenes_transforms
from models import backbones, centerfusion
from ops import decode3d, nms
from ops.boxes import to_file_pixels
from ops.geometry import apply_affine, invert_affine
from ops.images import normalize
from ops.radar import network_inputs

STRIDE = 4  # input pixels per cell of CenterFusion's maps
PILLAR_DIMS = (1.5, 0.2, 0.2)  # of radar pillars, if not given


def task_of(net):
    """What a network predicts: "boxes", "masks", "fusion" (boxes in 3D) or "classes"."""
    if net.name in backbones.NETWORKS:
        return "classes"
    return "fusion" if net.name in centerfusion.NETWORKS else getattr(net, "task", "boxes")


@torch.no_grad()
def classify(net, images, run, threshold, labels):
    """The five top-scoring of `labels` for each image (uint8 [3,H,W]): a dict of labels and scores, 0 to 1, each."""
    crop = transforms.classification_eval(net.image_size[0], net.image_size[0])
    batch = torch.stack([crop(image) for image in images]).to(run.device, non_blocking=True)
    with run.autocast():
        logits = net(normalize(batch, net.image_mean, net.image_std))
    scores, indices = logits.float().softmax(1).cpu()[:, labels].topk(min(5, len(labels)))
    return [select({"labels": labels[row], "scores": score}, threshold, labels) for row, score in zip(indices, scores)]


@torch.no_grad()
def detect(net, images, run, threshold, labels):
    """Detections in each image (uint8 [3,H,W], any size): a dict of boxes in pixels of that image, labels, scores and,
    if the network has them, masks as probabilities within the box [N,28,28]."""
    if net.image_size:
        resize, collate = transforms.ssd_eval(net.image_size), loader.PadCollate(1)
    else:
        resize, collate = transforms.multiscale_eval(net.min_side, net.max_side), loader.PadCollate(32)
    samples = [resize(tv_tensors.Image(image), empty_target(image)) for image in images]
    detections = [None] * len(samples)
    for rows in collate.groups(image.shape[-2:] for image, _ in samples):  # as in evaluation: of one padded shape
        found = detect_in_batch(net, *collate([samples[row] for row in rows]), run, threshold)
        for row, detection in zip(rows, found, strict=True):
            detections[row] = select(detection, threshold, labels)
    return detections


def detect_in_batch(net, batch, targets, run, threshold):
    """`detect` in a padded batch (uint8 [B,3,H,W]), of all classes."""
    size, shapes = tuple(batch.shape[-2:]), [target["shape"] for target in targets]
    pixels = normalize(batch.to(run.device, non_blocking=True), net.image_mean, net.image_std, shapes)
    limits = getattr(net, "nms_limits", {}) | {"score_threshold": threshold}  # those of the run's validation
    if task_of(net) == "masks":
        net.limit_detections(**limits)
    with run.autocast():
        outputs = net(pixels, shapes) if task_of(net) == "masks" else net(pixels)
    if task_of(net) == "masks":
        detections = outputs
    elif net.image_size:
        detections = nms.ssd_detections(outputs, net.anchors(size), net.box_weights, size, **limits)
    else:
        anchors, levels = net.anchors(size), net.level_sizes(size)
        detections = nms.retinanet_detections(outputs, anchors, net.box_weights, shapes, levels, **limits)
    return to_file_pixels(detections, targets)


def empty_target(image):
    """The target of an image without annotations."""
    size, empty = tuple(image.shape[-2:]), torch.zeros(0)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    return {"boxes": boxes, "labels": empty.long(), "ignore": empty.bool(), "image_id": 0, "size": size}


@torch.no_grad()
def detect_3d(net, samples, run, threshold, labels, dims=PILLAR_DIMS, without=()):
    """Detections of ops.decode3d in camera images, but boxes in pixels of the file.

    samples   (image uint8 [3,H,W], target with calib, affine and radar) each
    dims      of radar pillars; without: untrained heads
    """
    resize = nuscenes_transforms.centerfusion_eval(net.image_size)
    maps = {"size": tuple(side // STRIDE for side in net.image_size), "stride": STRIDE}
    inputs_of = functools.partial(network_inputs, radar=net.arguments["radar"], dims=dims, **maps)
    images, resized = loader.collate([resize(*sample) for sample in samples], inputs_of)
    inputs, images = resized.to(run.device), images.to(run.device, non_blocking=True).flip(1)  # BGR
    with run.autocast():
        outputs = net(normalize(images, net.image_mean, net.image_std), **inputs)
    detections = decode3d.decode(outputs, resized, STRIDE, without=without)
    for detection, target in zip(detections, resized):
        corners = apply_affine(detection["boxes"].view(-1, 2), invert_affine(target["affine"])).view(-1, 2, 2)
        height, width = target["size"]
        detection["boxes"] = corners.clamp(min=0).minimum(corners.new_tensor([width, height])).flatten(1)
    return [select(detection, threshold, labels) for detection in detections]


def detect_in_camera(net, images, run, threshold, labels, calib, without):
    """`detect_3d` in images (uint8 [3,H,W]) of a camera alone, each dict with the calib [3,4] of its image.

    calib   see data.cameras.target
    """
    samples = [(tv_tensors.Image(image), cameras.target(image, calib)) for image in images]
    detections = detect_3d(net, samples, run, threshold, labels, without=without)
    return [{**detection, "calib": target["calib"]} for detection, (_, target) in zip(detections, samples)]


def select(detections, threshold, labels):
    """The detections with a score of at least `threshold` and one of `labels`, on the CPU."""
    detections = {name: value.cpu() for name, value in detections.items()}
    keep = (detections["scores"] >= threshold) & torch.isin(detections["labels"], labels)
    return {name: value[keep] for name, value in detections.items()}
