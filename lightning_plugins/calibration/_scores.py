"""What several calibrators share: softmax scores, rows that sum to 1, and a new confidence for the predicted class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plugins.calibration.calibrator import row_tiles

__all__ = ["check_num_classes", "like", "log_denominators", "log_normalized", "log_scores", "replace_confidence"]

_TINY = torch.finfo(torch.float32).tiny


def like(values: Tensor, buffer: Tensor) -> Tensor:
    """Return values with the type and on the device of a buffer, detached from both."""
    return values.detach().to(dtype=buffer.dtype, device=buffer.device)


def check_num_classes(logits: Tensor, num_classes: int) -> None:
    """Raise if logits have another number of classes than those of the fit."""
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the calibrator was fitted on {num_classes} classes, got logits of {logits.shape[-1]}; pass logits of the "
            "same network, or fit again"
        )


def log_scores(logits: Tensor) -> Tensor:
    """Return log-probabilities ``(..., C)``, by the same arithmetic as those of :func:`log_denominators`."""
    return logits - logits.logsumexp(-1, keepdim=True)


def log_denominators(logits: Tensor) -> Tensor:
    """Return the logs of the softmax denominators ``(N,)`` in float64: what the classes need to be scored one by one.

    Example:
        >>> log_denominators(torch.zeros(4, 2)).exp()
        tensor([2., 2., 2., 2.], dtype=torch.float64)
    """
    return torch.cat([rows.double().logsumexp(1) for rows, _ in row_tiles(logits, logits[:, 0])])


def log_normalized(scores: Tensor, log_fallback: Tensor) -> Tensor:
    """Return logs of rows of scores in [0, 1], made to sum to 1; rows of zeros take the fallback's log-probabilities.

    Zeros become the smallest normal float32, so that no log-probability is infinite.
    """
    total = scores.sum(-1, keepdim=True)
    return torch.where(total > 0, (scores / total).clamp_min(_TINY).log(), log_fallback)


def replace_confidence(log_probs: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Give the predicted class a new probability, and share what is left among the others as before.

    Where one of the others would overtake the predicted class, their shares are mixed with equal ones until none does;
    that takes a confidence above ``1 / C``, so lower ones are raised to it. All classes of a row keep their order.

    Args:
        log_probs: ``(N, C)``.
        confidence: ``(N,)`` in [0, 1].

    Returns:
        The new log-probabilities ``(N, C)``, finite, and whether a row needed that guard ``(N,)``.

    Raises:
        ValueError: for fewer than two classes.
    """
    num_classes = log_probs.shape[1]
    if num_classes < 2:
        raise ValueError(f"logits must have at least 2 classes, got {num_classes}; pass logits of the fitted network")
    margin = 1e-5  # more than float32 rounds away
    top = log_probs.argmax(1, keepdim=True)
    lowest = (1 + 2 * margin) / num_classes
    kept = confidence[:, None].clamp(lowest, 1)
    left = (1 - kept).clamp_min(_TINY)
    # A class that was masked with -inf would make NaN of its difference to another one.
    others = log_probs.clamp_min(-1e3).scatter(1, top, -math.inf)
    shares = others - others.logsumexp(1, keepdim=True)
    largest, equal = shares.amax(1, keepdim=True).exp(), 1 / (num_classes - 1)
    excess = left * largest - kept * (1 - margin)
    mix = (excess / (left * (largest - equal)).clamp_min(_TINY)).clamp(0, 1)
    shares = torch.logaddexp(torch.log1p(-mix) + shares, (mix * equal).log())
    guarded = (confidence < lowest) | (excess > 0).squeeze(1)
    return (left.log() + shares).scatter(1, top, kept.log()), guarded
