"""TopKAccuracy against torch.topk, its tables, and the order of equal logits."""

import csv

import numpy as np
import pytest
import torch

from evaluation.classification import TopKAccuracy, score_labels

CLASSES = [f"class {label}" for label in range(9)]


def evaluate(labels, logits, batch=7):
    evaluator = TopKAccuracy(CLASSES)
    for labels_part, logits_part in zip(labels.split(batch), logits.split(batch)):
        evaluator.update(labels_part, logits_part)
    return evaluator, evaluator.compute()


@pytest.fixture
def case():
    """labels [100], logits [100,9] that are right for some of them; the last class has no images."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (100,), generator=random)
    return labels, torch.randn(100, 9, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, 9)


def test_accuracy_equals_topk(case):
    labels, logits = case
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    _, metrics = evaluate(labels, logits)
    assert metrics == {"top1": hits[:, 0].sum().item() / 100, "top5": hits.sum().item() / 100}
    assert 0.3 < metrics["top1"] < metrics["top5"] < 1


@pytest.mark.parametrize("num_classes", [2, 5])
def test_five_classes_or_fewer(case, num_classes):
    labels, logits = case[0] % num_classes, case[1][:, :num_classes]
    _, metrics = evaluate(labels, logits)
    assert metrics["top1"] == (logits.argmax(1) == labels).sum().item() / 100 < 1
    assert metrics["top5"] == 1.0


def test_of_equal_logits_the_lower_label_comes_first():
    _, metrics = evaluate(torch.tensor([0, 1, 4, 5]), torch.zeros(4, 8))
    assert metrics == {"top1": 0.25, "top5": 0.75}


def test_logits_of_nan_are_never_correct():
    nan = torch.full((2, 8), float("nan"))
    assert evaluate(torch.tensor([0, 7]), nan)[1] == {"top1": 0.0, "top5": 0.0}
    assert evaluate(torch.tensor([0]), nan[:1, :2])[1] == {"top1": 0.0, "top5": 0.0}
    one_nan = torch.tensor([[0.0, float("nan"), 1.0]])
    assert evaluate(torch.tensor([2]), one_nan)[1] == {"top1": 0.0, "top5": 1.0}


def test_half_precision_and_no_images(case):
    labels, logits = case
    assert evaluate(labels, logits.bfloat16())[1] == evaluate(labels, logits.bfloat16().float())[1]
    assert TopKAccuracy(CLASSES).compute() == {"top1": 0.0, "top5": 0.0}


def test_two_processes_equal_one(case):
    labels, logits = case
    whole, metrics = evaluate(labels, logits)
    first, second, shares = TopKAccuracy(CLASSES), TopKAccuracy(CLASSES), []
    first.update(labels[0::2], logits[0::2])
    second.update(labels[1::2], logits[1::2])
    second.compute(lambda share: shares.append(share) or [share])
    assert first.compute(lambda share: [share, *shares]) == metrics
    np.testing.assert_array_equal(first.confusion(), whole.confusion())


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_written_tables(case, tmp_path):
    labels, logits = case
    evaluator, _ = evaluate(labels, logits)
    assert evaluator.write(tmp_path / "run") == ["per_class.csv", "confusion.csv"]
    head, *rows = read_csv(tmp_path / "run/confusion.csv")
    expected = np.zeros((9, 9), int)
    np.add.at(expected, (labels.numpy(), logits.argmax(1).numpy()), 1)
    assert head[1:] == CLASSES == [row[0] for row in rows]
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], int), expected)
    head, *rows = read_csv(tmp_path / "run/per_class.csv")
    assert head == ["class", "images", "top1", "top5"]
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    for label, (name, images, *shares) in enumerate(rows[:8]):
        of_class = hits[labels == label]
        assert (name, images) == (CLASSES[label], str(len(of_class)))
        expected = [of_class[:, 0].float().mean().item(), of_class.any(1).float().mean().item()]
        assert [float(share) for share in shares] == pytest.approx(expected, abs=1e-6)
    assert rows[8] == ["class 8", "0", "", ""]


def test_console_table(case):
    evaluator, metrics = evaluate(*case)
    lines = evaluator.table().splitlines()
    assert len(lines) == 1 + 8 + 1  # head, classes with images, all
    assert lines[0].split() == ["images", "top1", "top5"]
    assert lines[-1].split() == ["all", "100", f"{metrics['top1']:.3f}", f"{metrics['top5']:.3f}"]


def test_labels_scored_as_predictions_are_correct(case):
    labels, _ = case
    for kind in (labels, labels.numpy(), labels.int().tolist()):
        evaluator = TopKAccuracy(CLASSES)
        assert score_labels(evaluator, kind, batch_size=32) == {"top1": 1.0, "top5": 1.0}
        np.testing.assert_array_equal(evaluator.confusion(), np.diag(np.bincount(labels, minlength=9)))
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        score_labels(TopKAccuracy(CLASSES[:5]), labels)  # a label that is no class


def test_errors_of_the_caller():
    evaluator = TopKAccuracy(["a", "b"])
    with pytest.raises(ValueError, match=r"labels \[3\], but logits \[2, 4\]"):
        evaluator.update(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.confusion()
    assert evaluator.compute()["top1"] == 0.0
    assert evaluator.table().splitlines()[-1].split() == ["all", "0", "0.000", "0.000"]
