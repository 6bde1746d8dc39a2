"""Pasting masks into whole images."""

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ops.masks import paste_masks

BOXES = torch.tensor([[10.0, 5, 38, 33], [-6.5, 20, 14.25, 70], [40, 40, 41, 41]])


def test_masks_are_pasted_as_in_torchvision():
    random = torch.Generator().manual_seed(0)
    sizes = [(60, 50), (80, 90)]
    detections = [
        {"boxes": BOXES, "masks": torch.rand(3, 28, 28, generator=random), "scores": torch.rand(3, generator=random)},
        {"boxes": BOXES[:0], "masks": torch.zeros(0, 28, 28), "scores": torch.zeros(0)},
    ]
    pasted = paste_masks(detections, sizes, threshold=0.4)
    expected = paste_masks_in_image(detections[0]["masks"][:, None], BOXES, sizes[0])[:, 0] > 0.4
    assert pasted[0]["masks"].dtype == torch.bool and pasted[0]["masks"].any()
    torch.testing.assert_close(pasted[0]["masks"], expected)
    assert pasted[0]["scores"] is detections[0]["scores"] and pasted[1]["masks"].shape == (0, 80, 90)
    assert detections[0]["masks"].shape == (3, 28, 28)  # the detections themselves do not change


def test_a_full_mask_fills_its_box():
    detection = {"boxes": BOXES[:1], "masks": torch.ones(1, 28, 28, dtype=torch.bfloat16)}
    mask = paste_masks([detection], [(60, 50)])[0]["masks"][0]
    assert mask[6:32, 11:37].all()  # torchvision's padding of the mask fades at the border
    assert not mask[:4].any() and not mask[35:].any() and not mask[:, :9].any() and not mask[:, 40:].any()
