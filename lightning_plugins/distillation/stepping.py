"""One optimizer step for all classes that moves the images as far as a step for each class would."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning_plugins.checks import check_types

__all__ = ["vectorised_constants"]


@check_types
def vectorised_constants(
    optimizer: Literal["adam", "adamw", "sgd"],
    num_classes: int,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> dict[str, Any]:
    r"""Turn the constants of class-wise stepping into those of one step per pass over the classes.

    The published code of several methods takes one step of the optimizer per class, on the whole image tensor: the
    momentum moves the other ``C - 1`` classes each time. As the gradient of a class depends on that class alone, one
    step for all classes comes to nearly the same with, for Adam and AdamW,

    .. math:: \eta' = \eta \sqrt C, \quad \beta_i' = \beta_i^C, \quad \lambda' = \lambda \sqrt C

    and for SGD :math:`\eta' = \eta (1 - \mu^C) / (1 - \mu)`, :math:`\mu' = \mu^C`, :math:`\lambda' = C \lambda`.

    Args:
        optimizer: which of torch's optimizers.
        num_classes: C, at least 1.
        learning_rate: of the class-wise steps, above 0.
        betas: of Adam and AdamW, each in [0, 1).
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0; for Adam 0, as its decay is part of a gradient that all classes would share.

    Returns:
        Keyword arguments for the class in ``torch.optim``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> constants = vectorised_constants("adamw", 10, learning_rate=1e-3)
        >>> round(constants["lr"], 5), [round(beta, 3) for beta in constants["betas"]]
        (0.00316, [0.349, 0.99])
    """
    if optimizer not in ("adam", "adamw", "sgd"):
        raise ValueError(f"optimizer must be 'adam', 'adamw' or 'sgd', got {optimizer!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate!r}")
    if len(betas) != 2 or not all(0 <= value < 1 for value in (*betas, momentum)):
        raise ValueError(f"betas and momentum must lie in [0, 1), got {tuple(betas)!r} and {momentum!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
    if optimizer == "sgd":
        return {
            "lr": learning_rate * (1 - momentum**num_classes) / (1 - momentum),
            "momentum": momentum**num_classes,
            "weight_decay": weight_decay * num_classes,
        }
    if optimizer == "adam" and weight_decay:
        raise ValueError(f"the weight decay of Adam has no vectorised form, got {weight_decay!r}; use 'adamw'")
    root = math.sqrt(num_classes)
    return {
        "lr": learning_rate * root,
        "betas": (betas[0] ** num_classes, betas[1] ** num_classes),
        "weight_decay": weight_decay * root,
    }
