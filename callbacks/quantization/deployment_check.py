"""Writing what a quantized net is deployed as, and running it on the test images."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_plugins._progress import progress_bar
from lightning_plugins.batches import BatchFn, inputs_and_targets
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.gradients import ordinary
from lightning_plugins.logging import log_callback_hyperparameters
from lightning_plugins.quantization.convert import check_precisions, model_precisions, restore_, switch_
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.layers import FULL_PRECISION
from lightning_plugins.quantization.onnx import export_onnx
from lightning_plugins.quantization.packed import borrowed, load_packed, save_packed

__all__ = ["DeploymentCheck"]

_ONNX = ("onnx", "onnxscript", "onnxruntime")


class DeploymentCheck(pl.Callback):
    """Write the files that a converted net is deployed as when ``test`` starts, and test them beside the net.

    The files are one ONNX file for each precision, run by onnxruntime, and the packed file for all precisions, read
    into a fresh net. Their predictions on the test data are compared with those of the module at the same precision.
    What is compared are logits: a calibrator that :class:`PostHocCalibration` has fitted is not part of the files.

    Logged, as fractions of the test samples: ``test/onnx_acc_8bit`` (accuracy of the file),
    ``test/onnx_agreement_8bit`` (samples for which file and module predict the same class; onnxruntime's integer
    arithmetic rounds in other places than torch's floats, which moves a few samples near a decision boundary),
    ``test/packed_agreement_8bit`` (samples with the same logits, bit by bit).

    Args:
        bits: precisions of the ONNX files; default all that the module has below 32, an empty list for none.
        batch_fn: takes the batch, returns its inputs, one tensor, and integer targets; default the first two elements
            of a tuple or list.

    Raises:
        ValueError: for a precision that there is not.
        MisconfigurationException: when ``fit`` or ``test`` starts, for a module that is not converted, or not for these
            bits.

    Warns:
        UserWarning: where ONNX files are wanted and onnx, onnxscript or onnxruntime is missing; there are none then.

    Example:
        >>> from lightning_plugins.callbacks import DeploymentCheck, MultiPrecisionQAT
        >>> callbacks = [MultiPrecisionQAT((8, 4), quantize_residual=True), DeploymentCheck()]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    @check_types
    def __init__(self, bits: Sequence[int] | None = None, *, batch_fn: BatchFn | None = None) -> None:
        self.bits = check_precisions(bits) if bits else None if bits is None else ()
        if self.bits and FULL_PRECISION in self.bits:
            raise ValueError(f"bits must be 2 to 8: a quantized net's files have no 32 bits, got {tuple(self.bits)}")
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self._files: dict[str, bytes] = {}
        self._runs: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {}
        self._same: dict[str, MeanMetric] = {}
        self._right: dict[str, MeanMetric] = {}
        self._results: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            log_callback_hyperparameters(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(pl_module)  # rather than after training

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._runs, self._results = {}, {}
        self._check(pl_module)

    def _check(self, pl_module: pl.LightningModule) -> None:
        precisions = [b for b in model_precisions(pl_module) if b != FULL_PRECISION]
        if not precisions:
            raise MisconfigurationException(
                f"DeploymentCheck: {type(pl_module).__name__} has no quantized layers; add a callback that converts "
                "it, such as MultiPrecisionQAT"
            )
        if not set(self.bits or ()) <= set(precisions):
            raise MisconfigurationException(
                f"DeploymentCheck: bits must be among the precisions {precisions} of {type(pl_module).__name__}, "
                f"got {self.bits}"
            )

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != 0:
            return
        with torch.inference_mode(False), torch.no_grad(), _own_forward(pl_module):
            inputs, targets = (ordinary(tensor) for tensor in self.batch_fn(batch))
            if not self._runs:
                self._write(pl_module, inputs)
            for name, (bits, run) in self._runs.items():
                with borrowed(pl_module, bits):
                    expected = pl_module(inputs)
                found = run(inputs).to(expected.device)
                if name.startswith("packed"):
                    same = (found == expected).flatten(1).all(1)
                else:
                    same = found.argmax(1) == expected.argmax(1)
                    self._right[name].update((found.argmax(1) == targets).float())
                self._same[name].update(same.float())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {}
        for name in self._runs:
            kind, _, ending = name.partition("_")
            metrics[f"test/{kind}_agreement_{ending}"] = self._same[name].compute()
            if name in self._right:
                metrics[f"test/{kind}_acc_{ending}"] = self._right[name].compute()
        self._results = {name: float(value) for name, value in metrics.items()}
        pl_module.log_dict(metrics, sync_dist=True)
        self._runs = {}

    def export(self, directory: Path) -> list[Path]:
        """Hand over the tested ONNX files, ``net_8bit.onnx`` and so on, and ``deployment.json``, what the test gave.

        The packed file is :meth:`.MultiPrecisionQAT.export`'s.
        """
        if not self._results:
            return []
        paths = [write_atomically(directory / name, content) for name, content in self._files.items()]
        return [*paths, write_atomically(directory / "deployment.json", json.dumps(self._results, indent=2).encode())]

    # Mechanism

    def _write(self, pl_module: pl.LightningModule, inputs: Tensor) -> None:
        self._files = {}
        precisions = tuple(b for b in model_precisions(pl_module) if b != FULL_PRECISION)
        with tempfile.TemporaryDirectory() as folder:
            path = save_packed(pl_module, Path(folder) / "packed.safetensors")
            packed = load_packed(path, restore_(copy_network(pl_module))).to(pl_module.device)
            for bits in precisions:
                self._runs[f"packed_{bits}bit"] = bits, _at(packed, bits)
            for bits in progress_bar(self._onnx_bits(precisions), title="ONNX files", delay=0):
                path = export_onnx(pl_module, Path(folder) / f"net_{bits}bit.onnx", bits=bits, example_input=inputs)
                self._files[path.name] = path.read_bytes()
                self._runs[f"onnx_{bits}bit"] = bits, _session(self._files[path.name])

        def shares(kind: str) -> dict[str, MeanMetric]:
            names = [name for name in self._runs if name.startswith(kind)]
            return {name: MeanMetric(nan_strategy="disable").to(pl_module.device) for name in names}

        self._same, self._right = shares(""), shares("onnx")

    def _onnx_bits(self, precisions: tuple[int, ...]) -> tuple[int, ...]:
        wanted = precisions if self.bits is None else self.bits
        missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
        if wanted and missing:
            rank_zero_warn(
                f"DeploymentCheck writes no ONNX files, because {' and '.join(missing)} cannot be imported: "
                "pip install 'lightning-plugins[onnx]', or pass bits=[] to do without."
            )
            return ()
        return wanted


@contextmanager
def _own_forward(module: pl.LightningModule) -> Iterator[None]:
    """Let a module compute by its class's forward, without what a callback has put in its place for the test."""
    borrowed_forward = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if borrowed_forward is not None:
            module.forward = borrowed_forward  # type: ignore[method-assign]


def _at(packed: pl.LightningModule, bits: int) -> Callable[[Tensor], Tensor]:
    def run(inputs: Tensor) -> Tensor:
        logits: Tensor = switch_(packed, bits)(inputs)
        return logits

    return run


def _session(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.cpu().numpy()})[0])

    return run
