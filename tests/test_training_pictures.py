import torch

from training import pictures


def test_neighbouring_classes_have_colours_apart():
    colours = torch.tensor([pictures.class_colour(label) for label in range(8)], dtype=torch.float)
    assert torch.pdist(colours).min() > 60


def test_boxes_are_drawn_in_their_class_colour_where_they_are():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    drawn = pictures.draw(image, torch.tensor([[10.0, 20, 50, 40]]), torch.tensor([1]), ["cat", "dog"])
    colour = torch.tensor(pictures.class_colour(1), dtype=torch.uint8)
    assert torch.equal(drawn[:, 39, 30], colour)
    assert torch.equal(drawn[:, 30, 10], colour)
    assert drawn[:, 30, 60].sum() == 0
    assert image.sum() == 0


def test_no_box_is_no_change():
    image = torch.randint(0, 255, (3, 20, 20), dtype=torch.uint8)
    assert torch.equal(pictures.draw(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), []), image)


def test_truth_is_left_and_sure_detections_are_right():
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 10, 20, 45]]), "labels": torch.tensor([0]), "size": (100, 200)}
    found = {"boxes": torch.tensor([[30.0, 10, 45, 45]]).repeat(2, 1), "labels": torch.tensor([0, 1])}
    found["scores"] = torch.tensor([0.9, 0.1])
    beside = pictures.beside_truth(image, target, found, ["cat", "dog"], side=100)
    assert beside.shape == (3, 100, 2 * 200 + 8)
    left, right = beside[:, :, :200].float().sum(0), beside[:, :, 208:].float().sum(0)
    assert left[:, :90].sum() > 0
    assert left[:, 110:].sum() == 0
    assert right[:, 110:].sum() > 0
    assert right[:, :90].sum() == 0
