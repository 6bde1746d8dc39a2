"""CenterFusion's losses (Nabati and Qi 2021), one per head, and the targets of each head.

    matched = centerfusion.assign(targets, radar_map, calib)  # in a data loading worker; then copied to the GPU
    counts = run.mean(centerfusion.count(matched)).clamp(min=1 / run.world_size)
    losses = centerfusion.loss(network(images, association=matched["radar"]), matched, counts)

B batch, N maximum number of objects per image in the batch, K classes, h and w of the output maps. Positions and sizes
are in cells of those maps, depth and sizes of objects in meters, velocities in m/s in the camera frame.
"""

import torch
from torch.nn import functional as F

from ops.geometry import decode_depth
from ops.heatmaps import cells_in_boxes, draw_gaussian, gather_cells, gaussian_radius
from ops.radar import associate, depth_tolerance
from ops.rotation import encode
from utils.nuscenes import ATTRIBUTE_GROUPS

WEIGHTS = {"hm": 1.0, "reg": 1.0, "wh": 0.1, "dep": 1.0, "dep_sec": 1.0, "rot": 1.0, "rot_sec": 1.0, "dim": 1.0}
WEIGHTS |= {"amodel_offset": 1.0, "velocity": 1.0, "nuscenes_att": 1.0}
COUNTS = ("objects", "first_bin", "second_bin", "velocities", "attributes")
# field of a target -> numbers per object
FIELDS = {"boxes": 4, "labels": 1, "ignore": 1, "center": 3, "dims": 3, "alpha": 1, "velocity": 3, "attribute": 1}
FIELDS |= {"amodal": 2}


@torch.no_grad()
def assign(
    targets,
    radar_map=None,
    calib=None,
    *,
    size=(112, 200),
    stride=4,
    num_classes=10,
    threshold="published",
    max_distance=60.0,
):
    """The values that each head is trained to predict: a dict of tensors on the CPU, batch first.

    targets    B dicts of the data contract with its 3D fields, boxes in pixels of the network's input
    radar_map  [B,3,h,w], calib [B,3,4]: adds "radar" [B,3,h,w], radar returns associated with the true boxes by
               ops.radar.associate with `threshold` and `max_distance`: the input of the second stage in training
    size       (h, w) of the output maps, with `stride` pixels per cell

    hm [B,K,h,w]           Gaussian peaks, 1 at each object's cell; also 1 all over a box to ignore, so that a detection
                           of its class there costs nothing
    index [B,N], mask      flat cell of an object's peak, the center of its 2D box rounded down; False for padding and
    bool [B,N]             for objects to ignore, where all other values are meaningless
    label [B,N]            class
    reg, wh [B,N,2]        2D center minus cell, 2D size
    dep [B,N,1], dim [B,N,3], amodel_offset [B,N,2]   depth, h w l, projected 3D center minus cell
    bins int64, residuals [B,N,2]     of ops.rotation.encode
    velocity [B,N,3], velocity_mask bool [B,N]        False where the velocity is unknown
    attribute, attribute_mask [B,N,8] 1 at the object's attribute; bool: the attributes of its class group, none if
                                      its attribute is unknown
    boxes [B,N,4], alpha [B,N]        for `association`; farther objects come first
    """
    matched, ignored = object_targets(targets, size, stride)
    matched["hm"] = heatmaps(matched, ignored, num_classes, size)
    if radar_map is not None:
        matched["radar"] = association(matched, radar_map, calib, threshold, max_distance)
    return matched


def pack_targets(targets):
    """All objects of the batch as one float32 [B,N,1+19]: 1 for an object, 0 for padding, then FIELDS in order.

    Farther objects come first, so that radar written into boxes later belongs to nearer ones.
    """
    max_objects = max(1, *(len(target["labels"]) for target in targets))
    table = torch.zeros(len(targets), max_objects, 1 + sum(FIELDS.values()))
    for row, target in zip(table, targets):
        order = target["center"][:, 2].argsort(descending=True, stable=True)
        columns = [torch.ones(len(order), 1)]
        columns += [target[name][order].reshape(len(order), width).float() for name, width in FIELDS.items()]
        row[: len(order)] = torch.cat(columns, 1)
    return table


def object_targets(targets, size, stride):
    """(`assign` without hm and radar; bool [B,N], True for objects to ignore)."""
    height, width = size
    parts = pack_targets(targets).split([1, *FIELDS.values()], dim=-1)
    exists, boxes, label, ignore, center, dims, alpha, velocity, attribute, amodal = parts
    exists, ignore = exists[..., 0] > 0, ignore[..., 0] > 0
    mask, label, boxes = exists & ~ignore, label[..., 0].long(), boxes / stride
    center2d, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    cell = center2d.floor().clamp(min=0).minimum(center2d.new_tensor([width - 1, height - 1]))
    bins, residuals = encode(alpha[..., 0])
    known = velocity.isfinite().all(-1) & mask
    matched = {
        "index": (cell[..., 1] * width + cell[..., 0]).long(),
        "mask": mask,
        "label": label,
        "reg": center2d - cell,
        "wh": sides,
        "dep": center[..., 2:],
        "dim": dims,
        "amodel_offset": amodal / stride - cell,
        "bins": bins,
        "residuals": residuals,
        "velocity": torch.where(known[..., None], velocity, 0),
        "velocity_mask": known,
        "boxes": boxes,
        "alpha": alpha[..., 0],
    }
    return matched | attribute_targets(attribute[..., 0].long(), mask), exists & ignore


def association(matched, radar_map, calib, threshold, max_distance):
    """Radar returns associated with the true boxes: [B,3,h,w], see ops.radar.associate."""
    boxes = matched["boxes"]
    x = boxes[..., ::2].mean(-1)
    tolerance = depth_tolerance(matched["dim"], matched["alpha"], x, calib, threshold)
    depth, valid = matched["dep"][..., 0], matched["mask"]
    return associate(radar_map, boxes, depth, tolerance, max_distance=max_distance, valid=valid)


def heatmaps(matched, ignored, num_classes, size):
    """hm of `assign`, for the results of `object_targets`."""
    boxes, index, mask = matched["boxes"], matched["index"], matched["mask"]
    batch, (height, width) = len(boxes), size
    map_index = torch.arange(batch)[:, None] * num_classes + matched["label"]  # [B,N]
    cell = torch.stack([index % width, index // width], dim=-1)  # [B,N,2]
    sides = matched["wh"].ceil()
    radii = gaussian_radius(sides[..., 1], sides[..., 0])
    hm = draw_gaussian(cell[mask], radii[mask], map_index[mask], batch * num_classes, size)
    if ignored.any():
        hm = hm.masked_fill(cells_in_boxes(boxes[ignored], map_index[ignored], batch * num_classes, size), 1)
    return hm.view(batch, num_classes, height, width)


def attribute_targets(attribute, mask):
    """attribute and attribute_mask of `assign` for attribute int64 [B,N], -1 where unknown."""
    groups = attribute.new_tensor(ATTRIBUTE_GROUPS)
    own = groups[attribute.clamp(min=0)]  # [B,N]
    known = (attribute >= 0) & mask
    one_hot = F.one_hot(attribute.clamp(min=0), len(ATTRIBUTE_GROUPS)).float()
    return {"attribute": one_hot, "attribute_mask": (own[..., None] == groups) & known[..., None]}


def count(matched):
    """float32 [5], COUNTS: objects, objects in the first and in the second rotation bin, objects with a velocity, and
    attributes of the class groups of objects. Losses are divided by these, averaged over processes.
    """
    mask = matched["mask"]
    bins = (matched["bins"] > 0) & mask[..., None]
    masks = (mask, bins[..., 0], bins[..., 1], matched["velocity_mask"], matched["attribute_mask"])
    return torch.stack([each.sum() for each in masks]).float()


def loss(outputs, matched, counts, weights=WEIGHTS, class_weights=None):
    """{head: []}: the loss of each head that is in both `outputs` and `weights`, times its weight.

    outputs        the network's raw heads by name, each [B,C,h,w]
    matched        of `assign`
    counts         float [5] of `count`, averaged over processes, each above 0
    class_weights  [K] of the classes in the heatmap's loss; None: 1 each

    Sums over the batch divided by counts; L1 terms are means over a head's coordinates, as in mrnabati/CenterFusion. In
    float32 for any type of outputs; finite and connected to every head even if no image has an object.
    """
    return {head: (sums / counts).sum() for head, sums in loss_sums(outputs, matched, weights, class_weights).items()}


def loss_sums(outputs, matched, weights=WEIGHTS, class_weights=None):
    """{head: float32 [5]}: the loss before its division, as the sums to be divided by each of COUNTS.

    An evaluation adds up these sums, and the counts, over all its batches.
    """
    sums = {}
    for head in (head for head in weights if head in outputs):
        if head == "hm":
            terms = heatmap_sums(outputs[head], matched, class_weights)
        elif head in ("rot", "rot_sec"):
            terms = rotation_sums(outputs[head], matched)
        elif head == "nuscenes_att":
            terms = attribute_sums(outputs[head], matched)
        else:
            terms = distance_sums(head, outputs[head], matched)
        zero = matched["hm"].new_zeros(())
        sums[head] = weights[head] * torch.stack([terms.get(name, zero) for name in COUNTS])
    return sums


def heatmap_sums(hm, matched, class_weights=None):
    """CornerNet's focal loss: (1 - p)^2 * -log p at an object's cell, (1 - target)^4 * p^2 * -log(1 - p) elsewhere."""
    raw = hm.float()
    p = raw.sigmoid()
    background = ((1 - matched["hm"]).pow(4) * p * p * F.softplus(raw)).sum((0, 2, 3))  # [K]
    cells = raw.shape[2] * raw.shape[3]
    own = raw.flatten(1).gather(1, matched["label"] * cells + matched["index"])  # [B,N]
    objects = (own.sigmoid() - 1).square() * F.softplus(-own) * matched["mask"]
    if class_weights is not None:
        objects, background = objects * class_weights[matched["label"]], background * class_weights
    return {"objects": objects.sum() + background.sum()}


def distance_sums(head, output, matched):
    """Mean L1 over coordinates of reg, wh, dep, dep_sec, dim, amodel_offset and velocity."""
    predicted = gather_cells(output, matched["index"]).float()  # [B,N,C]
    predicted = decode_depth(predicted) if head in ("dep", "dep_sec") else predicted
    target = matched["dep" if head == "dep_sec" else head]
    mask, count_name = ("velocity_mask", "velocities") if head == "velocity" else ("mask", "objects")
    distance = torch.where(matched[mask][..., None], (predicted - target).abs(), 0)
    return {count_name: distance.sum() / predicted.shape[-1]}


def rotation_sums(output, matched):
    """For each of the two bins: cross entropy of inside or outside; if inside, smooth L1 of the residual's sine and
    cosine."""
    predicted = gather_cells(output, matched["index"]).float().unflatten(-1, (2, 4))  # [B,N,bin,(out, in, sin, cos)]
    bins, residuals, mask = matched["bins"], matched["residuals"], matched["mask"][..., None]
    entropy = F.cross_entropy(predicted[..., :2].flatten(0, 2), bins.flatten(), reduction="none").view_as(bins)
    target = torch.stack([residuals.sin(), residuals.cos()], dim=-1)
    distance = F.smooth_l1_loss(predicted[..., 2:], target, reduction="none").sum(-1)  # [B,N,bin]
    first, second = torch.where(mask & (bins > 0), distance, 0).sum((0, 1)).unbind()
    return {"objects": torch.where(mask, entropy, 0).sum(), "first_bin": first, "second_bin": second}


def attribute_sums(output, matched):
    """Binary cross entropy, mean over the attributes of each object's class group."""
    predicted = gather_cells(output, matched["index"]).float()  # [B,N,8]
    entropy = F.binary_cross_entropy_with_logits(predicted, matched["attribute"], reduction="none")
    return {"attributes": torch.where(matched["attribute_mask"], entropy, 0).sum()}
