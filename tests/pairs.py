"""Several callbacks in one Trainer: what has to hold, for the tests and for the table in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_plugins.quantization import load_packed, quantized_layers, switch_
from test_callbacks import CALLBACKS
from toys import ThreeLayers, assert_same_weights, make_trainer, toy_data, weights

STEPS = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}


def class_name(row: str) -> str:
    """The callback's name; what stands behind a comma are its arguments."""
    return row.partition(",")[0]


# A Trainer takes one callback of a class.
PAIRS = [(one, two) for one, two in permutations(CALLBACKS, 2) if class_name(one) != class_name(two)]


class Outcome(NamedTuple):
    """Why ``setup`` refused, or what was trained."""

    refusal: str
    weights: dict[str, Tensor]


def run_together(make: Callable[[], Sequence[pl.Callback]], folder: Path) -> Outcome:
    """Run callbacks together, resume them, test them, export, and check what comes out.

    Args:
        make: makes them, anew at each call, in the order of the Trainer's list.
        folder: for files.

    Raises:
        AssertionError: if they neither work nor are refused.
    """
    module, callbacks = ThreeLayers(), make()
    keys = module.state_dict().keys()
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    straight = make_trainer(folder, 2, *callbacks, saving, enable_checkpointing=True, **STEPS)
    refusal = ""
    try:
        straight.fit(module)
    except MisconfigurationException as error:
        refusal = str(error)
    assert not {"training_step", "forward"} & set(vars(module))
    if refusal:
        assert straight.global_step == 0, f"refused in the middle of training: {refusal}"
        assert module.state_dict().keys() == keys, f"refused too late, the layers are converted: {refusal}"
        return Outcome(refusal, {})
    assert straight.global_step == 4
    resumed, others = ThreeLayers(), make()
    make_trainer(folder, 2, *others, **STEPS).fit(resumed, ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
    assert_same_weights(module, resumed)
    for one, two in zip(callbacks, others, strict=True):
        torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    straight.test(module, verbose=False)
    assert not {"training_step", "forward"} & set(vars(module))
    assert not module._forward_hooks
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(value.isfinite().all() for value in module.state_dict().values())
    for callback in callbacks:
        check_exports(callback, module, folder / type(callback).__name__)
    return Outcome("", weights(module))


def check_exports(callback: Any, module: pl.LightningModule, folder: Path) -> None:
    """Check that a callback's files are there, and that the packed ones hold the network of the run."""
    if not hasattr(callback, "export"):
        return
    folder.mkdir()
    names = {path.name for path in callback.export(folder)}
    assert names
    if "packed.safetensors" not in names:
        return
    own = callback.quantized_module() if hasattr(callback, "quantized_module") else module
    loaded = load_packed(folder / "packed.safetensors", ThreeLayers()).eval()
    own.eval()
    inputs = toy_data(8)[:][0]
    # The precisions that every layer of the file has; none where each layer has its own.
    for bits in set.intersection(*({*layer.bits} for layer in quantized_layers(loaded).values())):
        with torch.no_grad():
            torch.testing.assert_close(switch_(loaded, bits)(inputs), switch_(own, bits)(inputs))


@cache
def alone(name: str) -> dict[str, Tensor]:
    """The weights that a callback trains with no other one."""
    module, row = ThreeLayers(), CALLBACKS[name]
    make_trainer(Path(), 2, row.make(**row.paired), **STEPS).fit(module)
    return weights(module)


def run_pair(first: str, second: str, folder: Path) -> str:
    """Return why two rows are refused in this order; nothing if they work.

    Raises:
        AssertionError: if they neither work nor are refused, or one of them leaves the other without effect.
    """
    rows = {name: CALLBACKS[name] for name in (first, second)}
    refusal, together = run_together(lambda: [row.make(**row.paired) for row in rows.values()], folder)
    if refusal:
        return refusal
    for name, other in ((first, second), (second, first)):
        theirs = alone(other)
        same = together.keys() == theirs.keys() and all(torch.equal(together[key], theirs[key]) for key in theirs)
        assert same is not rows[name].changes_training, f"{name} must change what {other} trains, or leave it alone"
    return ""
