"""As few bits as an accuracy allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.quantization._calibration_batches import Forward
from lightning_plugins.quantization.bisection import BisectionResult, bisect_bits
from lightning_plugins.quantization.convert import model_precisions, quantized_layers, switch_
from lightning_plugins.quantization.layers import FULL_PRECISION
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.scale_calibration import calibrate_scales_
from lightning_plugins.quantization.sensitivity import SensitivityTable

__all__ = ["plan_within_accuracy"]


@check_types
def plan_within_accuracy(
    model: nn.Module,
    table: SensitivityTable,
    batches: Iterable[Any],
    *,
    ratio: float,
    bits: Sequence[int] | None = None,
    evaluation: Iterable[Any] | None = None,
    forward: Forward | None = None,
    confidence: float | None = None,
) -> BisectionResult:
    """Lower the bits of as many layers as leave a share of the full-precision accuracy.

    Layers are lowered in the order of a score, the least important first, and how many of them is found by bisection:
    each trial sets the scales for its plan from the calibration data and classifies the evaluation data.

    Args:
        model: trained, converted by ``convert_(model, (*bits, 32))``. Its scales are left as the last trial set them;
            weights and the bits in use stay.
        table: of any score, for exactly the model's quantized layers.
        batches: calibration data, ``(inputs, ...)``.
        ratio: share of the full-precision accuracy that must be left, in (0, 1], such as 0.99.
        bits: the precisions to choose among, of those that the model has; default all below 32. With 32, layers stay in
            full precision where even the highest of the others costs too much.
        evaluation: batches of inputs and classes to measure accuracy on; default ``batches``, which flatters. What is
            found holds for these samples: keep others to report.
        forward: takes the model and inputs, returns logits ``(N, C)``; default ``model(inputs)``.
        confidence: in [0.5, 1): how sure a plan must be to leave that share, so that it also does on other samples; see
            :func:`.bisect_bits`. None takes the accuracy as measured.

    Returns:
        The plan, its accuracy and standard error on the evaluation data, and all trials.

    Raises:
        ValueError: for a ratio out of range, a table of other layers, or if all layers at their highest precision are
            not accurate enough.

    Example:
        >>> from lightning_plugins.quantization import convert_, score_layers
        >>> rng = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> inputs = torch.rand(20, 4)
        >>> batches = [(inputs, net(inputs).argmax(1))]
        >>> net = convert_(net, (8, 4, 32), first_last_bits=4)
        >>> result = plan_within_accuracy(net, score_layers(net, "zd"), batches, ratio=0.9)
        >>> result.metric >= 0.9
        True

    Reference:
        Schaefer et al., *Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
        Quantization*, 2023, for bisection under an accuracy target.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio!r}")
    layers = quantized_layers(model)
    if table.layers.keys() != layers.keys():
        raise ValueError(
            "the table must be one of the model's quantized layers; missing: "
            f"{sorted(layers.keys() - table.layers.keys())}, not in the model: {sorted(table.layers.keys() - layers)}"
        )
    known = model_precisions(model)
    chosen = [b for b in known if (b != FULL_PRECISION if bits is None else b in bits)]
    if bits is not None and (unknown := sorted(set(bits) - set(known))):
        raise ValueError(
            f"bits must be among the model's precisions {known}, got {unknown}; convert the model for them"
        )
    if len(chosen) < 2:
        raise ValueError(f"there is nothing to choose among with {chosen} bits alone; convert the model for more")
    calibration = list(batches)
    if not all(isinstance(batch, Tensor | tuple | list) for batch in calibration):
        raise TypeError("batches must be tensors, or tuples or lists that start with one")
    samples = calibration if evaluation is None else list(evaluation)
    run = forward or (lambda net, inputs: net(inputs))

    @torch.no_grad()
    def outcomes() -> Tensor:
        device = next(model.parameters()).device
        right = [run(model, inputs.to(device)).argmax(1) == targets.to(device) for inputs, targets, *_ in samples]
        return torch.cat(right).double()

    def evaluate(plan: BitPlan) -> Tensor:
        calibrate_scales_(model, calibration, plan, forward=forward)
        switch_(model, plan)
        return outcomes()

    with borrowed(model, FULL_PRECISION):
        baseline = outcomes()
        candidates = {
            name: [b for b in layer.bits if b in chosen] or [min(layer.bits)] for name, layer in layers.items()
        }
        return bisect_bits(
            table.order(),
            evaluate,
            bits=chosen,
            ratio=ratio,
            baseline=baseline,
            candidates=candidates,
            confidence=confidence,
        )
