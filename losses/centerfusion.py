"""CenterFusion's losses (Nabati and Qi 2021), one a head, and what each head should say.

    goals = centerfusion.assign(targets, run.device, radar_map, calib)
    counts = run.mean(centerfusion.count(goals)).clamp(min=1 / run.world)
    losses = centerfusion.loss(network(images, association=goals["radar"]), goals, counts)

B batch, N the most objects of a picture in the batch, K classes, h and w of the output maps. Positions and sizes are in
cells of those maps, depth and sizes of objects in metres, velocities in m/s in the camera frame.
"""

import functools

import torch
from torch.nn import functional as F

from ops.geometry import depth_of
from ops.heatmap import cover, gather, radius, splat
from ops.radar import associate
from ops.rotation import encode

WEIGHTS = {"hm": 1.0, "reg": 1.0, "wh": 0.1, "dep": 1.0, "dep_sec": 1.0, "rot": 1.0, "rot_sec": 1.0, "dim": 1.0}
WEIGHTS |= {"amodel_offset": 1.0, "velocity": 1.0, "nuscenes_att": 1.0}
GROUP_OF = (0, 0, 1, 1, 1, 2, 2, 2)  # of each attribute
COUNTS = ("objects", "first_bin", "second_bin", "velocities", "attributes")
# field of a target -> how many numbers an object has there
FIELDS = {"boxes": 4, "labels": 1, "ignore": 1, "center": 3, "dims": 3, "alpha": 1, "velocity": 3, "attribute": 1}
FIELDS |= {"amodal": 2}


def packed(targets):
    """All objects of the batch as one float32 [B,N,1+20]: 1 for an object, 0 for padding, then FIELDS in order.

    Far objects come first: where radar is spread into boxes, the later box has the last word, and that is the nearer.
    """
    most = max(1, *(len(target["labels"]) for target in targets))
    table = torch.zeros(len(targets), most, 1 + sum(FIELDS.values()))
    for row, target in zip(table, targets):
        order = target["center"][:, 2].argsort(descending=True, stable=True)
        columns = [torch.ones(len(order), 1)]
        columns += [target[name][order].reshape(len(order), width).float() for name, width in FIELDS.items()]
        row[: len(order)] = torch.cat(columns, 1)
    return table


@torch.no_grad()
def assign(
    targets,
    device,
    radar_map=None,
    calib=None,
    *,
    size=(112, 200),
    stride=4,
    num_classes=10,
    threshold="published",
    max_distance=60.0,
    roots="published",
):
    """What each head should say: a dict of tensors on `device`, batch first.

    targets    B dicts of the data contract with its 3D fields, boxes in pixels of the network's input
    radar_map  [B,3,h,w], calib [B,3,4]: adds "radar" [B,3,h,w], returns handed to the true boxes by `threshold` and
               `max_distance` of ops.radar.associate, which is what the second stage sees in training
    size       (h, w) of the output maps, `stride` pixels a cell
    roots      of ops.heatmap.radius

    hm [B,K,h,w]           Gaussian peaks, 1 at each object's cell; 1 also all over a box to ignore, so that nothing
                           its class says there is wrong
    index [B,N], mask      flat cell of an object's peak, the centre of its 2D box rounded down; False: padding or to
    bool [B,N]             ignore, all else of that row means nothing
    label [B,N]            class
    reg, wh [B,N,2]        2D centre minus cell, 2D size
    dep [B,N,1], dim [B,N,3], amodel_offset [B,N,2]   depth, h w l, projected 3D centre minus cell
    bins int64, residuals [B,N,2]     of ops.rotation.encode
    velocity [B,N,3], velocity_mask bool [B,N]        False where the data set knows no velocity
    attribute, attribute_mask [B,N,8] 1 at the object's attribute, and bool: those of its class group, none if unknown
    boxes [B,N,4], alpha [B,N]        for ops.radar.associate with dep, dim and mask; far objects come first
    """
    goals, cell, ignored = object_goals(targets, size, stride)
    objects = goals["boxes"], cell, goals["label"], goals["mask"], ignored
    hm = heatmaps(*objects, (len(targets), num_classes, *size), roots, device)
    goals = {"hm": hm} | {name: value.to(device, non_blocking=True) for name, value in goals.items()}
    if radar_map is not None:
        goals["radar"] = association(goals, radar_map, calib, threshold, max_distance)
    return goals


def object_goals(targets, size, stride):
    """What `assign` says of objects, on the CPU: (all but hm and radar, cells of the peaks [B,N,2] x y, bool [B,N]: an
    object to ignore)."""
    height, width = size
    parts = packed(targets).split([1, *FIELDS.values()], dim=-1)
    exists, boxes, label, ignore, center, dims, alpha, velocity, attribute, amodal = parts
    exists, ignore = exists[..., 0] > 0, ignore[..., 0] > 0
    mask, label, boxes = exists & ~ignore, label[..., 0].long(), boxes / stride
    middle, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    cell = middle.floor().clamp(min=0).minimum(middle.new_tensor([width - 1, height - 1]))
    bins, residuals = encode(alpha[..., 0])
    known = velocity.isfinite().all(-1) & mask
    goals = {
        "index": (cell[..., 1] * width + cell[..., 0]).long(),
        "mask": mask,
        "label": label,
        "reg": middle - cell,
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
    return goals | attributes(attribute[..., 0].long(), mask), cell, exists & ignore


def association(goals, radar_map, calib, threshold, max_distance):
    """Radar handed to the true boxes [B,3,h,w], see ops.radar.associate; goals and the others on one device."""
    found = goals["dep"][..., 0], goals["dim"], goals["alpha"], goals["boxes"][..., ::2].mean(-1), calib
    limits = {"threshold": threshold, "max_distance": max_distance, "valid": goals["mask"]}
    return associate(radar_map, goals["boxes"], *found, **limits)


def heatmaps(boxes, cell, label, mask, ignored, shape, roots, device):
    """hm of `assign`, made on `device` of objects on the CPU: boxes [B,N,4] in cells, cell [B,N,2], ignored bool [B,N].

    shape: B, K, h, w.
    """
    batch, num_classes, *size = shape
    where = torch.arange(batch)[:, None] * num_classes + label  # [B,N]
    sides = (boxes[..., 2:] - boxes[..., :2]).ceil()
    reach = radius(sides[..., 1], sides[..., 0], roots=roots)
    hm = splat(cell[mask].long(), reach[mask], where[mask], batch * num_classes, size, device)
    if ignored.any():
        covered = cover(boxes[ignored].to(device), where[ignored].to(device), batch * num_classes, size)
        hm = hm.masked_fill(covered, 1)
    return hm.view(shape)


def attributes(attribute, mask):
    """attribute and attribute_mask of `assign` for attribute int64 [B,N], -1 where unknown."""
    groups = attribute.new_tensor(GROUP_OF)
    own = groups[attribute.clamp(min=0)]  # [B,N]
    known = (attribute >= 0) & mask
    one_hot = F.one_hot(attribute.clamp(min=0), len(GROUP_OF)).float()
    return {"attribute": one_hot, "attribute_mask": (own[..., None] == groups) & known[..., None]}


def count(goals):
    """float32 [5], COUNTS: objects, those whose angle lies in the first and the second bin, with a velocity, and the
    attributes that are asked for. The normalisers: averaged over processes, they make N of them compute what one would.
    """
    mask = goals["mask"]
    bins = (goals["bins"] > 0) & mask[..., None]
    counted = (mask, bins[..., 0], bins[..., 1], goals["velocity_mask"], goals["attribute_mask"])
    return torch.stack([each.sum() for each in counted]).float()


def loss(outputs, goals, counts, weights=WEIGHTS, class_weights=None):
    """{head: []}: the loss of each head in `outputs` that `weights` names, times its weight.

    outputs        the network's raw heads by name, each [B,C,h,w]
    goals          of `assign`
    counts         float [5] of `count`, averaged over processes, each above 0
    class_weights  [K] of the classes in the heatmap's loss; None: each counts once

    Sums over the batch divided by counts; L1 terms are means over a head's coordinates, as in the source. In float32
    whatever the outputs are; finite and connected to every head also where no picture holds an object.
    """
    return {head: (terms / counts).sum() for head, terms in sums(outputs, goals, weights, class_weights).items()}


def sums(outputs, goals, weights=WEIGHTS, class_weights=None):
    """{head: float32 [5]}: what of each head's `loss` is to be divided by each of COUNTS, before it is.

    An evaluation adds these up, and the counts, over all its batches.
    """
    criteria = {"rot": rotation_sums, "rot_sec": rotation_sums, "nuscenes_att": attribute_sums}
    criteria["hm"] = functools.partial(heatmap_sums, class_weights=class_weights)
    found = {}
    for head in weights:
        if head in outputs:
            criterion = criteria.get(head) or functools.partial(distance_sums, head)
            terms = criterion(outputs[head], goals)
            nothing = goals["hm"].new_zeros(())
            found[head] = weights[head] * torch.stack([terms.get(name, nothing) for name in COUNTS])
    return found


def heatmap_sums(hm, goals, class_weights=None):
    """CornerNet's focal loss: an object's cell costs (1 - p)^2 -log p, all others (1 - goal)^4 p^2 -log(1 - p)."""
    raw = hm.float()
    p = raw.sigmoid()
    background = ((1 - goals["hm"]).pow(4) * p * p * F.softplus(raw)).sum((0, 2, 3))  # [K]
    cells = raw.shape[2] * raw.shape[3]
    at = goals["label"] * cells + goals["index"]  # [B,N]
    own = raw.flatten(1).gather(1, at)
    objects = (own.sigmoid() - 1).square() * F.softplus(-own) * goals["mask"]  # [B,N]
    if class_weights is not None:
        objects, background = objects * class_weights[goals["label"]], background * class_weights
    return {"objects": objects.sum() + background.sum()}


def distance_sums(head, output, goals):
    """Mean L1 over coordinates of reg, wh, dep, dep_sec, dim, amodel_offset and velocity."""
    said = gather(output, goals["index"]).float()  # [B,N,C]
    said = depth_of(said) if head in ("dep", "dep_sec") else said
    goal = goals["dep" if head == "dep_sec" else head]
    mask, number = ("velocity_mask", "velocities") if head == "velocity" else ("mask", "objects")
    difference = torch.where(goals[mask][..., None], (said - goal).abs(), 0)
    return {number: difference.sum() / said.shape[-1]}


def rotation_sums(output, goals):
    """Two bins, each in or out by cross entropy; where in, smooth L1 of the residual's sine and cosine."""
    said = gather(output, goals["index"]).float().unflatten(-1, (2, 4))  # [B,N,bin,(out, in, sin, cos)]
    bins, residuals, mask = goals["bins"], goals["residuals"], goals["mask"][..., None]
    entropy = F.cross_entropy(said[..., :2].flatten(0, 2), bins.flatten(), reduction="none").view_as(bins)
    goal = torch.stack([residuals.sin(), residuals.cos()], dim=-1)
    difference = F.smooth_l1_loss(said[..., 2:], goal, reduction="none").sum(-1)  # [B,N,bin]
    first, second = torch.where(mask & (bins > 0), difference, 0).sum((0, 1)).unbind()
    return {"objects": torch.where(mask, entropy, 0).sum(), "first_bin": first, "second_bin": second}


def attribute_sums(output, goals):
    """Binary cross entropy, mean over the attributes of each object's class group."""
    said = gather(output, goals["index"]).float()  # [B,N,8]
    entropy = F.binary_cross_entropy_with_logits(said, goals["attribute"], reduction="none")
    return {"attributes": torch.where(goals["attribute_mask"], entropy, 0).sum()}
