"""A radius of attack for each class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["class_budgets"]


@check_types
def class_budgets(counts: Sequence[int] | Tensor, *, alpha: float = 0.3) -> Tensor:
    r"""Return factors of the radius that grow with a class's rarity and have mean 1 over the training samples.

    With :math:`u_c = \sqrt{\log(n_{max} / n_c)}` and shares :math:`\pi_c`, the factor is
    :math:`(1 - \alpha) + \alpha\, u_c / \sum_k \pi_k u_k`.

    Args:
        counts: training samples of each class, above 0.
        alpha: strength in [0, 1]; 0 leaves all radii alike.

    Shape:
        - counts, output: ``(C,)``

    Raises:
        ValueError: for a class without samples, or ``alpha`` out of range.

    Example:
        >>> factors = class_budgets([900, 90, 10])
        >>> factors[0] < factors[1] < factors[2], round(float((factors * torch.tensor([0.9, 0.09, 0.01])).sum()), 6)
        (tensor(True), 1.0)

    Reference:
        Zhang et al., *RobustLT*, 2026; from the released code.
    """
    numbers = torch.as_tensor(counts, dtype=torch.float64)
    if numbers.ndim != 1 or not len(numbers) or not bool((numbers > 0).all()):
        raise ValueError(f"class counts must be numbers above 0, got {numbers.tolist()}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
    rarity = (numbers.max() / numbers).log().sqrt()
    mean = (numbers / numbers.sum() * rarity).sum()
    if mean == 0:  # all classes alike
        return torch.ones_like(numbers, dtype=torch.float32)
    return ((1 - alpha) + alpha * rarity / mean).float()
