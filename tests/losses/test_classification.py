"""Cross entropy for classification against that of torch."""

import pytest
import torch
from torch.nn import functional as F

from losses.classification import cross_entropy


@pytest.fixture
def case():
    """logits [12,7], labels [12], mixed labels [12,7]."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 7, generator=random)
    return logits, torch.randint(7, (12,), generator=random), torch.rand(12, 7, generator=random).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_on_a_whole_batch(case, smoothing):
    logits, integers, mixed = case
    for labels in (integers, mixed):
        losses = cross_entropy(logits, labels, 12, smoothing)
        assert set(losses) == {"cross_entropy"} and losses["cross_entropy"].shape == ()
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(losses["cross_entropy"], expected)


def test_one_hot_labels_equal_integer_labels(case):
    logits, labels, _ = case
    one_hot = cross_entropy(logits, F.one_hot(labels, 7).float(), 12, 0.1)
    torch.testing.assert_close(one_hot, cross_entropy(logits, labels, 12, 0.1))


@pytest.mark.parametrize("kind", [1, 2])
def test_micro_batches_sum_to_the_whole_batch(case, kind):
    logits, labels = case[0].requires_grad_(), case[kind]
    whole = cross_entropy(logits, labels, torch.tensor(12.0), 0.1)["cross_entropy"]
    parts = zip(logits.split(5), labels.split(5))
    total = sum(cross_entropy(*part, torch.tensor(12.0), 0.1)["cross_entropy"] for part in parts)
    torch.testing.assert_close(total, whole)
    actual, expected = (torch.autograd.grad(value, logits)[0] for value in (total, whole))
    torch.testing.assert_close(actual, expected)


def test_half_precision_logits_are_summed_in_float32(case):
    logits, labels, _ = case
    loss = cross_entropy(logits.bfloat16(), labels, 12)["cross_entropy"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.bfloat16().float(), labels))


def test_class_weights(case):
    logits, labels, _ = case
    weights = torch.arange(1.0, 8)
    expected = (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).sum() / 12
    torch.testing.assert_close(cross_entropy(logits, labels, 12, class_weights=weights)["cross_entropy"], expected)
