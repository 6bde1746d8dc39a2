"""Masks: every transform and loader that carries them."""

import pickle

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

import synthetic
from data import check_target, loader, transforms
from data.detection import coco
from data.detection.dataset import BoxDataset

RECTANGLES = [[10, 20, 60, 90], [50, 33, 157, 71], [3, 3, 40, 119]]


def make_sample(boxes, size=(120, 160)):
    """An image of rectangles, whose masks fill their boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
        "ignore": torch.zeros(len(boxes), dtype=torch.bool),
        "masks": tv_tensors.Mask(masks),
        "image_id": 3,
        "size": size,
    }
    return tv_tensors.Image(torch.randint(0, 255, (3, *size), dtype=torch.uint8)), target


# ---- transforms ----

MULTISCALE = {
    "larger": transforms.multiscale_eval(203, 999),
    "smaller": transforms.multiscale_eval(47, 999),
    "longest side": transforms.multiscale_eval(300, 111),
    "train": transforms.multiscale_train((61, 97, 173), 201, flip=0.5, color=0.5),
    "ssd resize": transforms.ssd_eval((77, 133)),
}
TRANSFORMS = MULTISCALE | {
    "crop": transforms.ZoomOutIoUCrop((90, 90), zoom_out=0),
    "zoom out": transforms.ZoomOutIoUCrop((300, 280), zoom_out=1, iou_crop=0),
    "ssd train": transforms.ssd_train((111, 90), (123, 117, 104)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_mask_fills_its_transformed_box(name):
    """The box of a rectangle's mask is within a pixel of the transformed box, on every side, and full."""
    objects = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = TRANSFORMS[name](*make_sample(RECTANGLES))
        check_target(image, target, 3)
        assert isinstance(target["masks"], tv_tensors.Mask)
        for mask, box in zip(target["masks"], torch.Tensor(target["boxes"])):
            objects += 1
            if mask.any():
                mask_box = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                assert (mask_box - box).abs().max() <= 1, (seed, mask_box, box)
                assert mask.sum() == (mask_box[2:] - mask_box[:2]).prod()
            else:
                assert (box[2:] - box[:2]).min() < 2, (seed, box)
    assert objects > 60


@pytest.mark.parametrize("name", MULTISCALE)
def test_an_image_without_objects_has_no_masks(name):
    image, target = MULTISCALE[name](*make_sample([]))
    assert target["masks"].shape == (0, *image.shape[-2:])


def test_resized_edges_stay_within_half_a_pixel():
    """v2's nearest neighbor moves the edges of a mask by up to a pixel, always to one side."""
    for side in range(30, 200, 7):
        _, target = transforms.multiscale_eval(side, 999)(*make_sample(RECTANGLES))
        boxes = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        assert (boxes - torch.Tensor(target["boxes"])).abs().max() <= 0.5 + 1e-3


def test_masks_flip_with_their_boxes():
    train = transforms.multiscale_train((120,), 999, flip=1.0)
    image, target = make_sample(RECTANGLES)
    flipped_image, flipped = train(image, target)
    assert torch.equal(torch.Tensor(flipped_image), torch.Tensor(image).flip(2))
    assert torch.equal(torch.Tensor(flipped["masks"]), torch.Tensor(target["masks"]).flip(2))
    boxes = masks_to_boxes(flipped["masks"]) + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(torch.Tensor(flipped["boxes"]), boxes, rtol=0, atol=0)
    _, again = train(flipped_image, flipped)
    torch.testing.assert_close(again["masks"], target["masks"], rtol=0, atol=0)


def test_masks_are_dropped_with_their_objects():
    """A box that becomes too thin is dropped, and with it its own mask."""
    image, target = make_sample([[10, 20, 60, 90], [50, 33, 51, 71], [3, 3, 40, 119]])
    _, small = transforms.ResizeShortestEdge((60,), 999, min_box_size=0.9)(image, target)
    assert small["labels"].tolist() == [0, 2] and len(small["masks"]) == 2
    centers = [mask.nonzero().float().mean(0).flip(0) for mask in small["masks"]]
    boxes = torch.Tensor(small["boxes"])
    torch.testing.assert_close(torch.stack(centers), (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5, rtol=0, atol=0.5)
    selected = transforms.filter_objects(target, torch.tensor([False, True, False]))
    torch.testing.assert_close(selected["masks"], target["masks"][1:2], rtol=0, atol=0)


# ---- loaders ----


def test_padding_leaves_masks_as_they_are():
    samples = [make_sample(RECTANGLES), make_sample([], (90, 200)), make_sample(RECTANGLES[:1], (128, 97))]
    images, targets = loader.PadCollate(32)(samples)
    assert images.shape == (3, 3, 128, 224)
    for (_, before), target in zip(samples, targets):
        assert type(target["masks"]) is torch.Tensor and target["masks"].shape[-2:] == target["shape"]
        torch.testing.assert_close(target["masks"], before["masks"].as_subclass(torch.Tensor), rtol=0, atol=0)


def test_workers_send_masks_as_bits():
    batch = loader.PadCollate(32)([make_sample(RECTANGLES, (121, 163)), make_sample([], (90, 200))])[1]
    message = pickle.dumps(batch)
    assert len(message) < batch[0]["masks"].nbytes / 8 + 2000
    for again, target in zip(pickle.loads(message), batch, strict=True):
        torch.testing.assert_close(again["masks"], target["masks"], rtol=0, atol=0)


def test_masks_do_not_depend_on_the_number_of_workers(tmp_path):
    root = synthetic.draw_coco(tmp_path, images=10, seed=1, size=(96, 80))
    transform = transforms.multiscale_train((64, 80, 96), 160)
    dataset = BoxDataset(coco.read([root], "train", masks=True), transform=transform, seed=4)
    masks = []
    for workers in (0, 2):
        sampler = loader.StepSampler(len(dataset), 2, 6, seed=0)
        batches = loader.train_loader(dataset, sampler, loader.Process(workers=workers), loader.PadCollate(32))
        masks.append([target["masks"] for _, targets in batches for target in targets])
    assert len(masks[0]) == 12 and sum(map(len, masks[0])) > 12
    for alone, sent in zip(*masks, strict=True):
        torch.testing.assert_close(alone, sent, rtol=0, atol=0)
