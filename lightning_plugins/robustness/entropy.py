"""Cross-entropy that also asks for sure predictions, which lie farther from the decision boundary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._mixed_labels import takes_mixed_labels
from lightning_plugins.checks import check_types
from lightning_plugins.losses import Reduction, check_at_least_0, checked_logits, reduced

__all__ = ["LowEntropyLoss", "low_entropy_loss"]


@check_types
@takes_mixed_labels
def low_entropy_loss(logits: Tensor, target: Tensor, penalty: float = 0.1, *, reduction: Reduction = "mean") -> Tensor:
    r"""Return cross-entropy plus the entropy of the prediction, :math:`-\log p_y - \lambda \sum_k p_k \log p_k`.

    Low entropy means a large gap between the first and the second logit. It can also saturate the softmax, where the
    gradients of attacks on the cross-entropy vanish: evaluate by ``loss="dlr"`` or ``auto_attack``.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``, or :class:`.MixedLabels`.
        penalty: :math:`\lambda`, at least 0; 0 is cross-entropy. The default is ours.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for a penalty below 0, wrong shapes or an unknown choice.

    Example:
        >>> import torch
        >>> low_entropy_loss(torch.zeros(1, 2), torch.tensor([0]), penalty=1.0)  # 2 log(2)
        tensor(1.3863)

    Reference:
        E. D. Cubuk, B. Zoph, S. S. Schoenholz, Q. V. Le, "Intriguing Properties of Adversarial Examples", 2017.
    """
    check_at_least_0("penalty", penalty)
    wide = checked_logits(logits, target)
    log_p = wide.log_softmax(1)
    # A logit of minus infinity has probability 0 and adds nothing.
    entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(1)
    losses = F.cross_entropy(wide, target, reduction="none") + penalty * entropy
    return reduced(losses, target, None, logits, "batch_size", reduction)


class LowEntropyLoss(nn.Module):
    """:func:`low_entropy_loss` as a module.

    Args:
        penalty: at least 0.

    Raises:
        ValueError: for a penalty below 0.

    Example:
        >>> import torch
        >>> LowEntropyLoss(penalty=1.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.3863)
    """

    @check_types
    def __init__(self, penalty: float = 0.1) -> None:
        super().__init__()
        check_at_least_0("penalty", penalty)
        self.penalty = penalty

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return low_entropy_loss(logits, target, self.penalty)
