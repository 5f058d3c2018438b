r"""One threshold for all classes of an embedding: a loss that asks for it, and a measure of how far it is.

Where two images are the same class if their embeddings are near enough, "near enough" should mean the same for every
class. Classes that spread differently need different thresholds, and a shared one serves some of them badly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_plugins.checks import check_types

__all__ = ["OPIS", "opis", "tcm_loss"]


@check_types
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> Tensor:
    r"""Return the threshold-consistent margin loss of a batch, to be added to a metric-learning loss.

    With the cosine similarities :math:`s` of all pairs in the batch,
    :math:`\lambda^+` times the mean of :math:`m^+ - s` over pairs of one class with :math:`s \le m^+`, plus
    :math:`\lambda^-` times the mean of :math:`s - m^-` over pairs of two classes with :math:`s \ge m^-`. A mean over no
    pair is 0. Only pairs that violate a margin have a gradient.

    Args:
        embeddings: ``(N, D)``; only their directions count. Computed in float32 at least.
        labels: classes ``(N,)``, integers.
        positive_margin: :math:`m^+` in [-1, 1].
        negative_margin: :math:`m^-` in [-1, 1].
        positive_weight: :math:`\lambda^+`, at least 0.
        negative_weight: :math:`\lambda^-`, at least 0.

    Returns:
        A scalar, at least 0; NaN for embeddings that are not finite.

    Raises:
        ValueError: for a wrong argument or shape.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> tcm_loss(rows, torch.tensor([0, 0, 1]))  # 0.9 - 0.6, and 0.8 - 0.5
        tensor(0.6000)

    Reference:
        Q. Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024. Margins and
        weights are the defaults of ``ThresholdConsistentMarginLoss`` in pytorch-metric-learning, whose values it gives.
    """
    for name, margin in (("positive_margin", positive_margin), ("negative_margin", negative_margin)):
        if not -1 <= margin <= 1:
            raise ValueError(f"{name} is a cosine and must lie in [-1, 1], got {margin!r}")
    for name, factor in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
        if not 0 <= factor < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {factor!r}")
    _check(embeddings, labels)
    similarities = _similarities(embeddings)
    upper = torch.ones_like(similarities, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels[None]
    near, far = similarities.detach() >= negative_margin, similarities.detach() <= positive_margin
    positive = _mean(positive_margin - similarities, upper & same & far)
    negative = _mean(similarities - negative_margin, upper & ~same & near)
    return positive_weight * positive + negative_weight * negative


@check_types
def opis(
    embeddings: Tensor,
    labels: Tensor,
    *,
    far_range: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 101,
    worst_share: float = 1.0,
) -> Tensor:
    r"""Return the operating-point inconsistency score: how differently one distance threshold serves the classes.

    At a threshold :math:`d`, class :math:`i` has the sensitivity :math:`\phi_i`, the share of pairs within it that are
    at most :math:`d` apart, and the specificity :math:`\psi_i`, the share of pairs of it and another class that are
    further apart. The score is the mean over classes and thresholds of :math:`(U_i - \bar U)^2` with the utility
    :math:`U_i = 2 \phi_i \psi_i / (\phi_i + \psi_i)`; thresholds are evenly spaced over a range of false acceptance
    rates of all pairs. Distance is one minus the cosine. Classes with one sample are left out.

    Time and memory grow with ``N^2``: 400 MB for 10,000 samples.

    Args:
        embeddings: ``(N, D)``; only their directions count.
        labels: classes ``(N,)``, integers.
        far_range: false acceptance rates at the two ends, in (0, 1), rising.
        num_thresholds: at least 2.
        worst_share: average over this share in (0, 1] of the classes, those of the lowest mean utility.

    Returns:
        A scalar in [0, 1], float32; 0 if every class would choose the same threshold with the same outcome.

    Raises:
        ValueError: for a wrong argument or shape, embeddings that are not finite, or fewer than two classes with two
            samples.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(300) % 3
        >>> centres = 4 * torch.eye(3)[labels]
        >>> noise = torch.randn(300, 3, generator=generator)
        >>> even = opis(centres + 0.5 * noise, labels)
        >>> uneven = opis(centres + torch.tensor([0.2, 0.5, 1.5])[labels][:, None] * noise, labels)
        >>> bool(uneven > 5 * even)
        True

    Reference:
        Q. Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024. The paper
        sets the range by data set; this one is a usual choice. ``worst_share`` stands for its epsilon-OPIS, whose
        exact form we could not check.
    """
    _check_options(far_range, num_thresholds, worst_share)
    _check(embeddings, labels)
    with torch.no_grad():
        return _opis(embeddings, labels, far_range, num_thresholds, worst_share)


class OPIS(Metric):
    """:func:`opis` over all batches and processes; keeps the embeddings.

    Args:
        far_range: false acceptance rates at the two ends, in (0, 1), rising.
        num_thresholds: at least 2.
        worst_share: average over this share in (0, 1] of the classes.

    Shape:
        - ``update(embeddings, labels)``: ``(N, D)``; classes ``(N,)`` integer.

    Returns:
        ``compute()``: a float32 scalar in [0, 1].

    Raises:
        ValueError: for a wrong argument or shape; in ``compute`` for embeddings that are not finite, or fewer than two
            classes with two samples.

    Example:
        >>> metric = OPIS()
        >>> for _ in range(2):
        ...     metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    embeddings: list[Tensor]
    labels: list[Tensor]

    @check_types
    def __init__(
        self,
        *,
        far_range: tuple[float, float] = (1e-2, 1e-1),
        num_thresholds: int = 101,
        worst_share: float = 1.0,
    ) -> None:
        super().__init__()
        _check_options(far_range, num_thresholds, worst_share)
        far_range = (far_range[0], far_range[1])
        self.far_range, self.num_thresholds, self.worst_share = far_range, num_thresholds, worst_share
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    @check_types
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        _check(embeddings, labels)
        self.embeddings.append(embeddings.detach())
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the score of all batches, of all processes."""
        return opis(
            dim_zero_cat(self.embeddings),
            dim_zero_cat(self.labels),
            far_range=self.far_range,
            num_thresholds=self.num_thresholds,
            worst_share=self.worst_share,
        )


def _check_options(far_range: tuple[float, float], num_thresholds: int, worst_share: float) -> None:
    if len(far_range) != 2 or not 0 < far_range[0] < far_range[1] < 1:
        raise ValueError(f"far_range must be two rising rates in (0, 1), got {far_range!r}")
    if num_thresholds < 2:
        raise ValueError(f"num_thresholds must be at least 2, got {num_thresholds!r}")
    if not 0 < worst_share <= 1:
        raise ValueError(f"worst_share must lie in (0, 1], 1 for all classes, got {worst_share!r}")


def _check(embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        raise ValueError(
            "embeddings must have shape (N, D) and labels be N integers, got "
            f"{tuple(embeddings.shape)} and {labels.dtype} of {tuple(labels.shape)}"
        )


def _similarities(embeddings: Tensor) -> Tensor:
    if embeddings.dtype != torch.float64:
        embeddings = embeddings.float()
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = F.normalize(embeddings, dim=1)
        return directions @ directions.T


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    # No look at how many there are: an accelerator would have to wait for the answer.
    # A similarity that is NaN violates no margin, but must not vanish: NaN times 0 is NaN.
    return (torch.where(chosen, values, 0).sum() + 0 * values.detach().sum()) / chosen.sum().clamp_min(1)


def _opis(
    embeddings: Tensor, labels: Tensor, far_range: tuple[float, float], num_thresholds: int, worst_share: float
) -> Tensor:
    classes, counts = torch.unique(labels, return_counts=True)
    counted = classes[counts > 1]
    if len(counted) < 2:
        raise ValueError(f"at least two classes with two samples are needed, found {len(counted)}; pass more samples")
    distances = 1 - _similarities(embeddings)
    if not distances.isfinite().all():
        raise ValueError("embeddings must be finite, found NaN or infinity; look for faulty inputs or a diverged net")
    # Rounding must not tell a distance from the threshold that was read off it.
    distances = distances.round(decimals=6 if distances.dtype == torch.float32 else 12)
    upper = torch.ones_like(distances, dtype=torch.bool).triu(1)
    between = distances[upper & (labels[:, None] != labels)].sort().values
    ends = [between[max(1, round(rate * len(between))) - 1] for rate in far_range]
    steps = torch.linspace(0, 1, num_thresholds, dtype=distances.dtype, device=distances.device)
    thresholds = ends[0] + (ends[1] - ends[0]) * steps
    utilities = []
    for label in counted:
        members = labels == label
        own = distances[members][:, members]
        own = own[torch.ones_like(own, dtype=torch.bool).triu(1)]
        sensitivity = _share_within(own, thresholds)
        specificity = 1 - _share_within(distances[members][:, ~members].flatten(), thresholds)
        total = (sensitivity + specificity).clamp_min(torch.finfo(distances.dtype).tiny)
        utilities.append(2 * sensitivity * specificity / total)
    utility = torch.stack(utilities)  # (classes, thresholds)
    deviation = (utility - utility.mean(0)).square().mean(1)
    worst = utility.mean(1).argsort()[: max(1, round(worst_share * len(utility)))]
    return deviation[worst].mean().float()


def _share_within(distances: Tensor, thresholds: Tensor) -> Tensor:
    """Return the share of distances up to each threshold."""
    counts = torch.searchsorted(distances.sort().values, thresholds, right=True)
    return counts.to(thresholds.dtype) / len(distances)
