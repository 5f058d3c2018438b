"""The one interface of post-hoc calibrators: fit on held-out logits, then map logits to log-probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types, warn_caller

__all__ = ["CalibratedModule", "Calibrator", "check_fit_data", "row_tiles"]


class Calibrator(nn.Module, ABC):
    """A map from logits to calibrated log-probabilities that is fitted after training, on held-out data.

    Log-probabilities are logits too: a softmax, a cross-entropy or an argmax takes them as it took the logits. All
    fitted state is in buffers, so it moves with ``.to(device)``, enters ``state_dict`` and is exported with a model;
    a change of the floating type, such as ``.to(torch.bfloat16)`` on the model, leaves it alone.

    A subclass sets :attr:`preserves_ranking`, registers buffers whose first values make the identity map, and writes
    ``_fit`` and ``_calibrate``. Buffers whose shape a fit decides are named in ``_sized_by_fit``: loading a state gives
    them the saved shape. One that looks up a table by the logits sets ``_looks_up``: a row with NaN or +infinity is
    then kept from it and gives NaN.

    Attributes:
        preserves_ranking: whether the classes of a sample keep their order, and with it the predicted class.
        fit_info: numbers about the last fit: ``nll_before`` and ``nll_after`` on the data of the fit (nats),
            ``converged``, ``iterations`` and whatever the method adds. Empty before a fit and after loading a state.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``, float32, or float64 for float64 logits.

    Example:
        >>> from lightning_plugins.calibration import TemperatureScaling
        >>> logits, labels = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]), torch.tensor([0, 0, 1, 1])
        >>> calibrator: Calibrator = TemperatureScaling().fit(logits, labels)
        >>> calibrator(logits).exp()[0].round(decimals=4)  # three of four are right
        tensor([0.7500, 0.2500])
    """

    preserves_ranking: bool
    fitted: Tensor
    _sized_by_fit: ClassVar[tuple[str, ...]] = ()
    _looks_up: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        self.fit_info: dict[str, float | int | bool] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether the state is that of a fit; before, the map is the identity followed by a log-softmax."""
        return bool(self.fitted)

    @check_types
    def fit(self, logits: Tensor, labels: Tensor) -> Self:
        """Fit to held-out data that took no part in training; a second fit replaces the first.

        Deterministic, draws no random numbers, leaves its arguments as they are, and works for callers inside
        ``torch.no_grad`` or ``torch.inference_mode``. A fit that raises leaves the earlier state in place.

        Args:
            logits: ``(N, C)`` of any floating type, finite, ``N >= 1``, ``C >= 2``; log-probabilities will do.
            labels: true classes ``(N,)``, integers in ``[0, C)``.

        Returns:
            The calibrator itself.

        Raises:
            TypeError: if ``logits`` are not floating-point or ``labels`` not integers.
            ValueError: for wrong shapes, no rows, a label outside ``[0, C)``, non-finite logits, or probabilities.

        Warns:
            UserWarning: if the fit did not converge, or the mean negative log-likelihood rose.
        """
        with torch.inference_mode(False), torch.enable_grad():
            logits, labels = check_fit_data(logits, labels)
            info = self._fit(logits, labels)
            self.fitted = torch.tensor(True, device=self.fitted.device)
        nll_before, nll_after = self._mean_nll(logits, labels)
        self.fit_info = {**info, "nll_before": nll_before, "nll_after": nll_after}
        if not info.get("converged", True):
            warn_caller(
                f"{type(self).__name__} stopped before it converged, after {info.get('iterations')} iterations; "
                "compare fit_info['nll_after'] with fit_info['nll_before'] before relying on it"
            )
        # A millionth is what float32 log-probabilities can add up to.
        if not nll_after <= nll_before + 1e-6 * (1 + abs(nll_before)):
            warn_caller(
                f"{type(self).__name__} raised the negative log-likelihood of the data it was fitted on from "
                f"{nll_before:.6g} to {nll_after:.6g}; use the uncalibrated logits, or another calibrator"
            )
        return self

    @check_types
    def forward(self, logits: Tensor) -> Tensor:
        """Return calibrated log-probabilities.

        Raises:
            TypeError: if ``logits`` are not floating-point.
            ValueError: if they have no dimension of classes.
        """
        if not logits.is_floating_point():
            raise TypeError(f"logits must be floating-point, got {logits.dtype}; pass the network's raw outputs")
        if not logits.ndim or not logits.shape[-1]:
            raise ValueError(f"logits must be (..., C) with at least one class, got {tuple(logits.shape)}")
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not self._looks_up:
            return self._calibrate(logits)
        # NaN has no place in a table: an index made of it would be any, or end the process on an accelerator.
        lost = (logits.isnan() | logits.isposinf()).any(-1, keepdim=True)
        return self._calibrate(logits.masked_fill(lost, 0.0)).masked_fill(lost, float("nan"))

    def quantities(self) -> dict[str, float]:
        """Return the few fitted numbers that are worth logging, such as a temperature; none by default."""
        return {}

    @abstractmethod
    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        """Fit to checked data, with gradients enabled; set new buffers and return ``converged`` and other numbers."""

    @abstractmethod
    def _calibrate(self, logits: Tensor) -> Tensor:
        """Map float32 or float64 logits ``(..., C)`` to log-probabilities of the same type."""

    def _mean_nll(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        totals = torch.zeros(2, dtype=torch.float64, device=logits.device)
        # The data may have been fitted on another device than the one this module is on.
        device = self.fitted.device
        with torch.no_grad():
            for rows, classes in row_tiles(logits, labels):
                after = self(rows.to(device)).to(rows.device)
                before = rows.to(after.dtype).log_softmax(1)
                index = classes[:, None]
                totals -= torch.stack([part.gather(1, index).sum(dtype=torch.float64) for part in (before, after)])
        before_total, after_total = (totals / len(labels)).tolist()
        return before_total, after_total

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._sized_by_fit:
            saved, buffer = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # a device without float64, such as mps
                return fn(tensor.float())
            # A model cast to half precision must not round its temperature.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class CalibratedModule(nn.Module):
    """A network followed by its calibrator: images in, calibrated log-probabilities out, no Lightning needed.

    Args:
        module: returns logits ``(N, C)``.
        calibrator: fitted on logits of that module.

    Example:
        >>> from lightning_plugins.calibration import TemperatureScaling
        >>> CalibratedModule(nn.Linear(4, 3), TemperatureScaling())(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    @check_types
    def __init__(self, module: nn.Module, calibrator: Calibrator) -> None:
        super().__init__()
        self.module = module
        self.calibrator = calibrator

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return calibrated log-probabilities ``(N, C)`` for what the module's ``forward`` takes."""
        log_probs: Tensor = self.calibrator(self.module(*args, **kwargs))
        return log_probs


def check_fit_data(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check held-out logits and labels, and return them detached, on one device, fit for autograd.

    Args:
        logits: ``(N, C)``, as for :meth:`Calibrator.fit`.
        labels: ``(N,)``, as for :meth:`Calibrator.fit`.

    Returns:
        The logits in their own floating type and the labels as int64; copies only where sharing is impossible.

    Raises:
        TypeError: if ``logits`` are not floating-point or ``labels`` not integers.
        ValueError: for wrong shapes, no rows, a label outside ``[0, C)``, non-finite logits, or probabilities.

    Example:
        >>> _, labels = check_fit_data(torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.uint8))
        >>> labels
        tensor([0, 2])
        >>> check_fit_data(torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
            ...
        ValueError: labels must lie in [0, 3) for logits of 3 classes, found 3; ...
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}; pass the network's raw outputs")
    if logits.ndim != 2:
        raise ValueError(
            f"logits must have shape (N, C), got {tuple(logits.shape)}; for dense predictions use "
            "logits.movedim(1, -1).flatten(0, -2) and labels.flatten()"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer classes, got {labels.dtype}; use labels.argmax(1) or labels.long()")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(logits)},), one class for each row of logits, got {tuple(labels.shape)}; "
            "pass class indices, not one-hot rows"
        )
    if len(logits) == 0:
        raise ValueError("logits have no rows; pass at least one held-out sample")
    num_classes = logits.shape[1]
    if num_classes < 2:
        raise ValueError(
            f"logits must have at least 2 classes, got {num_classes}; for one logit z of a binary classifier pass "
            "torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    smallest, largest = (int(bound) for bound in labels.aminmax())
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}) for logits of {num_classes} classes, found "
            f"{smallest if smallest < 0 else largest}; drop the rows of ignored labels"
        )
    lowest, highest = (float(bound) for bound in logits.detach().aminmax())
    if not -float("inf") < lowest <= highest < float("inf"):  # aminmax carries NaN along
        raise ValueError(
            "logits must be finite, found NaN or infinity; drop those rows, or, for logarithms of zero, use "
            "probs.clamp_min(torch.finfo(probs.dtype).tiny).log()"
        )
    if lowest >= 0 and highest <= 1:
        tolerance = max(1e-3, torch.finfo(logits.dtype).eps)
        sums_to_one = bool(((logits.detach().sum(1, dtype=torch.float32) - 1).abs() <= tolerance).all())
        # Rows of 1/C each say the same as logits and as probabilities: nothing to refuse.
        if sums_to_one and highest - lowest > tolerance:
            raise ValueError(
                "logits look like probabilities: all in [0, 1], every row with sum 1; pass the network's raw outputs, "
                "or logits = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()"
            )
    if logits.device.type == "mps":  # fits need float64
        logits = logits.cpu()
    # Tensors made under inference mode cannot enter autograd; their clones can.
    logits = logits.clone() if logits.is_inference() else logits.detach()
    labels = labels.clone() if labels.is_inference() else labels
    return logits, labels.to(device=logits.device, dtype=torch.int64)


def row_tiles(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split ``(N, C)`` logits and their labels, without copying, into tiles that stay in a CPU's cache.

    Example:
        >>> [len(labels) for _, labels in row_tiles(torch.zeros(70_000, 8), torch.zeros(70_000))]
        [32768, 32768, 4464]
    """
    elements = 2**18 if logits.device.type == "cpu" else 2**24
    rows = max(1, elements // logits.shape[1])
    return list(zip(torch.split(logits, rows), torch.split(labels, rows), strict=True))
