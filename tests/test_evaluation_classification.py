"""TopK against torch.topk and by hand."""

import csv

import numpy as np
import pytest
import torch

from evaluation.classification import TopK, score_labels


def evaluate(labels, logits, batch=7):
    evaluator = TopK()
    for some in zip(labels.split(batch), logits.split(batch)):
        evaluator.update(*some)
    return evaluator, evaluator.compute()


@pytest.fixture
def case():
    """labels [100], logits [100,9] that know a little, and no picture of the last class."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (100,), generator=random)
    return labels, torch.randn(100, 9, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, 9)


def test_equals_topk(case):
    labels, logits = case
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    _, metrics = evaluate(labels, logits)
    assert metrics == {"top1": hits[:, 0].sum().item() / 100, "top5": hits.sum().item() / 100}
    assert 0.3 < metrics["top1"] < metrics["top5"] < 1


@pytest.mark.parametrize("classes", [2, 5])
def test_five_classes_or_fewer(case, classes):
    labels, logits = case[0] % classes, case[1][:, :classes]
    _, metrics = evaluate(labels, logits)
    assert metrics["top1"] == (logits.argmax(1) == labels).sum().item() / 100 < 1
    assert metrics["top5"] == 1.0


def test_equal_logits_and_no_numbers():
    _, metrics = evaluate(torch.tensor([0, 1, 4, 5]), torch.zeros(4, 8))
    assert metrics == {"top1": 0.25, "top5": 0.75}  # the lower label is the surer one
    nothing = torch.full((2, 8), float("nan"))
    assert evaluate(torch.tensor([0, 7]), nothing)[1] == {"top1": 0.0, "top5": 0.0}
    assert evaluate(torch.tensor([0]), nothing[:1, :2])[1] == {"top1": 0.0, "top5": 0.0}
    one = torch.tensor([[0.0, float("nan"), 1.0]])
    assert evaluate(torch.tensor([2]), one)[1] == {"top1": 0.0, "top5": 1.0}


def test_half_precision_and_no_pictures(case):
    labels, logits = case
    assert evaluate(labels, logits.bfloat16())[1] == evaluate(labels, logits.bfloat16().float())[1]
    assert TopK().compute() == {"top1": 0.0, "top5": 0.0}


def test_two_processes_equal_one(case):
    labels, logits = case
    whole, metrics = evaluate(labels, logits)
    others, parts = [], [TopK(), TopK()]
    for i, part in enumerate(parts):
        part.update(labels[i::2], logits[i::2])
    parts[1].compute(lambda mine: others.append(mine) or [mine])
    assert parts[0].compute(lambda mine: [mine, *others]) == metrics
    np.testing.assert_array_equal(parts[0].confusion(9), whole.confusion(9))


def test_tables(case, tmp_path):
    labels, logits = case
    evaluator, metrics = evaluate(labels, logits)
    classes = [f"class {i}" for i in range(9)]
    evaluator.write_tables(tmp_path / "run", classes)
    with open(tmp_path / "run/confusion.csv", newline="") as file:
        table = list(csv.reader(file))
    expected = np.zeros((9, 9), int)
    np.add.at(expected, (labels.numpy(), logits.argmax(1).numpy()), 1)
    assert table[0] == ["truth / answer", *classes] and [row[0] for row in table[1:]] == classes
    np.testing.assert_array_equal(np.array([row[1:] for row in table[1:]], int), expected)
    with open(tmp_path / "run/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    for label, row in enumerate(rows[:8]):
        of_class = hits[labels == label]
        assert (row["class"], row["pictures"]) == (classes[label], str(len(of_class)))
        shares = [of_class[:, 0].float().mean().item(), of_class.any(1).float().mean().item()]
        assert [float(row["top1"]), float(row["top5"])] == pytest.approx(shares, abs=1e-6)
    assert list(rows[8].values()) == ["class 8", "0", "", ""]
    lines = evaluator.table(classes).splitlines()
    assert len(lines) == 1 + 8 + 1  # a head, the classes with pictures, all
    assert lines[-1].split() == ["all", "100", f"{metrics['top1']:.3f}", f"{metrics['top5']:.3f}"]


def test_labels_as_answers_are_exactly_right(case):
    labels, _ = case
    for kind in (labels, labels.numpy(), labels.int().tolist()):
        evaluator = TopK()
        assert score_labels(evaluator, kind, 9, at_once=32) == {"top1": 1.0, "top5": 1.0}
        np.testing.assert_array_equal(evaluator.confusion(9), np.diag(np.bincount(labels, minlength=9)))
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        score_labels(TopK(), labels, 5)  # a label that is no class


def test_mistakes_of_the_caller():
    evaluator = TopK()
    with pytest.raises(ValueError, match=r"labels \[3\], but logits \[2, 4\]"):
        evaluator.update(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="compute"):
        evaluator.confusion(4)
    assert evaluator.compute()["top1"] == 0.0
    assert evaluator.table(["a", "b"]).splitlines()[-1].split() == ["all", "0", "0.000", "0.000"]
