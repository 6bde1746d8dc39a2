"""Weights from elsewhere: published detectors and backbones, and checkpoints with another class count.

Each family of networks has its own file; what the others need of them is named here.
"""

from models import published_centerfusion, published_maskrcnn, published_retinanet, published_ssd
from models.published_backbones import begin_backbone, load_backbone, load_base_net
from models.published_centerfusion import begin_centerfusion
from models.published_maskrcnn import begin_maskrcnn
from models.published_retinanet import begin_retinanet
from models.published_ssd import begin, download, fine_tune
from models.weights import family_of, load_matching, load_strictly, open_weights, read, trained_weights

__all__ = [
    "begin",
    "begin_backbone",
    "begin_centerfusion",
    "begin_maskrcnn",
    "begin_retinanet",
    "download",
    "fine_tune",
    "load",
    "load_backbone",
    "load_base_net",
    "load_matching",
    "load_strictly",
    "read",
    "trained_weights",
]


def load(path_or_state_dict, source=None):
    """The detector of a published file or state dict, loaded strictly, in evaluation mode.

    The family is known by its keys, class count, depth and width by names and shapes; names may begin with `module.`.
    It gets `classes`, names in label order or None where they are unknown, and `image_size` (h, w), or, where that is
    None, `min_side` and `max_side`. source: name for messages. Raises WeightsError.
    """
    _, state, label = open_weights(path_or_state_dict, source)
    ssd, retinanet = published_ssd.FAMILIES, published_retinanet.FAMILIES
    retinanet = {f"retinanet of {name}": marks for name, marks in retinanet.items()}
    centerfusion, maskrcnn = published_centerfusion.FAMILIES, published_maskrcnn.FAMILIES
    family = family_of(state, {**ssd, **retinanet, **centerfusion, **maskrcnn}, label)
    if family in maskrcnn:
        return published_maskrcnn.from_state(state, label).eval()
    if family in centerfusion:
        return published_centerfusion.from_state(family, state, label).eval()
    if family in ssd:
        return published_ssd.from_state(family, state, label).eval()
    return published_retinanet.from_state(family.removeprefix("retinanet of "), state, label).eval()
