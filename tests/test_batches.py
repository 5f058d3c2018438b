from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_plugins.batches import forward_logits, inputs_and_targets, replace_tensor
from toys import TinyModule


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Record:
    image: Tensor
    name: str


IMAGE, LABEL, NEW = torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2, 3)


@pytest.mark.parametrize("batch", [(IMAGE, LABEL), [IMAGE, LABEL, ["a", "b"]], Pair(IMAGE, LABEL)])
def test_the_first_two_tensors(batch):
    inputs, targets = inputs_and_targets(batch)
    assert inputs is IMAGE
    assert targets is LABEL


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"y": LABEL, "x": IMAGE}, r"a dict with keys \['x', 'y'\]"),
        ((IMAGE,), "a tuple"),
        ([IMAGE, {"box": LABEL}], "a list"),
        (IMAGE, "a Tensor"),
    ],
)
def test_other_forms_are_refused_with_the_remedy(batch, found):
    with pytest.raises(TypeError, match=f"found {found}; pass batch_fn="):
        inputs_and_targets(batch)


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ((IMAGE, LABEL), lambda batch: batch[0]),
        ([LABEL, IMAGE], lambda batch: batch[1]),
        (Pair(IMAGE, LABEL), lambda batch: batch.image),
        ({"a": {"b": [IMAGE]}, "name": "x"}, lambda batch: batch["a"]["b"][0]),
        ((Record(IMAGE, "x"), LABEL), lambda batch: batch[0].image),
    ],
)
def test_a_tensor_is_replaced_at_any_depth_in_a_copy(batch, read):
    replaced = replace_tensor(batch, IMAGE, NEW)
    assert type(replaced) is type(batch)
    assert read(replaced) is NEW
    assert read(batch) is IMAGE


def test_replacing_goes_by_identity():
    twin = IMAGE.clone()
    replaced = replace_tensor((twin, IMAGE), IMAGE, NEW)
    assert replaced[0] is twin
    with pytest.raises(ValueError, match="batch_fn must return the batch's own tensors"):
        replace_tensor((twin, LABEL), IMAGE, NEW)


def test_forward_logits_is_the_modules_forward():
    module, inputs = TinyModule(), torch.ones(2, 8)
    assert torch.equal(forward_logits(module, inputs), module(inputs))
