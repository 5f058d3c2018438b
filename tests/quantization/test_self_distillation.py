"""Targets softened by last epoch's predictions."""

from __future__ import annotations

import pytest
import torch

from lightning_plugins.quantization import ProgressiveSelfDistillation


def test_targets_over_three_epochs():
    memory = ProgressiveSelfDistillation(5, num_classes=3, num_epochs=3, alpha=0.6)
    labels = torch.tensor([0, 2])
    onehot = torch.eye(3)[labels]
    ids = torch.tensor([4, 1])
    expected = onehot
    for epoch in range(3):
        torch.testing.assert_close(memory.soft_targets(ids, labels, epoch=epoch), expected)
        logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(epoch))
        memory.remember(ids, logits)
        memory.next_epoch()
        share = 0.6 * (epoch + 2) / 3
        expected = (1 - share) * onehot + share * logits.softmax(1)


def test_a_sample_that_was_not_seen_keeps_its_label():
    memory = ProgressiveSelfDistillation(3, num_classes=2, num_epochs=1, alpha=0.5)
    memory.remember(torch.tensor([0]), torch.zeros(1, 2))
    memory.next_epoch()
    targets = memory.soft_targets(torch.tensor([0, 1]), torch.tensor([1, 1]), epoch=0)
    torch.testing.assert_close(targets, torch.tensor([[0.25, 0.75], [0.0, 1.0]]))
    memory.next_epoch()  # nothing was seen in that one
    torch.testing.assert_close(
        memory.soft_targets(torch.tensor([0]), torch.tensor([1]), epoch=0), torch.tensor([[0.0, 1.0]])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0, "num_classes": 2, "num_epochs": 1}, "num_samples must be at least 1"),
        ({"num_samples": 1, "num_classes": 0, "num_epochs": 1}, "num_classes must be at least 1"),
        ({"num_samples": 1, "num_classes": 2, "num_epochs": 1, "alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    num_samples = arguments.pop("num_samples")
    with pytest.raises(ValueError, match=message):
        ProgressiveSelfDistillation(num_samples, **arguments)
