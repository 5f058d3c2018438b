from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from lightning_plugins.grouped import ClassAccuracy

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(pairs)
def test_against_scikit_learn(pairs):
    preds, target = torch.tensor(pairs).T
    metric = ClassAccuracy(4)
    metric.update(preds, target)
    values = {name: value.item() for name, value in metric.compute().items()}
    classes = sorted(set(target.tolist()))
    recalls = recall_score(target, preds, labels=classes, average=None, zero_division=0)
    assert values["acc"] == pytest.approx(accuracy_score(target, preds))
    assert values["worst_acc"] == pytest.approx(min(recalls))
    assert values["balanced_acc"] == pytest.approx(recalls.mean())
    if set(preds.tolist()) <= set(classes):  # scikit-learn warns otherwise, with the same value
        assert values["balanced_acc"] == pytest.approx(balanced_accuracy_score(target, preds))
    assert metric.per_class().isnan().tolist() == [c not in classes for c in range(4)]


def test_batches_logits_and_copies_add_up():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, 5, generator=generator), torch.randint(5, (50,), generator=generator)
    whole, parts, other = (ClassAccuracy(5) for _ in range(3))
    whole.update(logits.argmax(1), target)
    parts.update(logits[:7], target[:7])
    other.update(logits[7:], target[7:])
    parts.merge_state(other)
    assert parts.compute() == whole.compute()


def test_without_samples_everything_is_nan():
    metric = ClassAccuracy(3)
    metric.update(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    assert all(value.isnan() for value in metric.compute().values())


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        ClassAccuracy(1)
