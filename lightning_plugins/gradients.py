"""Gradients where the caller has switched them off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["grad_context", "ordinary"]


@contextmanager
def grad_context() -> Iterator[None]:
    """Enable gradients inside ``no_grad`` and ``inference_mode``, hence in every hook and entry point of a Trainer.

    Tensors that were made in inference mode stay unusable until they are copied inside: see :func:`ordinary`.

    Example:
        >>> with torch.inference_mode():
        ...     batch = torch.ones(2)
        ...     with grad_context():
        ...         inputs = ordinary(batch).requires_grad_()
        ...         (gradient,) = torch.autograd.grad(inputs.square().sum(), inputs)
        >>> gradient
        tensor([2., 2.])
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@check_types
def ordinary(tensor: Tensor) -> Tensor:
    """Return a detached tensor that autograd may use; one from inference mode is copied. Call inside `grad_context`."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
