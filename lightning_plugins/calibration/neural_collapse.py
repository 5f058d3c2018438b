r"""How far a trained net has come towards neural collapse, on clean samples and on mixtures of two.

Late in training the features of a class shrink to its mean, the means spread as a simplex, the classifier's rows line
up with them, and classifying becomes a matter of the nearest mean. Training on mixtures bends that: mixtures within
a class line up with its row of the classifier, mixtures of two classes lie in the plane of their two rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MixedCollapse",
    "NeuralCollapse",
    "SimplexETFClassifier",
    "collapse_curves",
    "mixed_collapse",
    "neural_collapse",
    "simplex_etf",
    "unconstrained_mixup_feature",
]


@dataclass(frozen=True)
class NeuralCollapse:
    r"""The four signs of neural collapse; every one is 0 at full collapse.

    Attributes:
        nc1: variation within classes over that between them, :math:`\operatorname{tr}(\Sigma_W \Sigma_B^\dagger) / C`.
        nc1_trace: the cheap form :math:`\operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B`.
        nc2_norm: standard deviation over mean of the lengths of the centred class means.
        nc2_angle: mean of :math:`|\cos(m_k, m_l) + 1 / (C - 1)|` over pairs of them.
        nc2_norm_head: as ``nc2_norm``, for the classifier's rows.
        nc2_angle_head: as ``nc2_angle``, for the classifier's centred rows.
        nc3: squared distance between class means and classifier, each centred and of Frobenius norm 1, in [0, 4].
        nc4: share of samples in [0, 1] whose prediction is not the class of the nearest mean.
    """

    nc1: float
    nc1_trace: float
    nc2_norm: float
    nc2_angle: float
    nc2_norm_head: float
    nc2_angle_head: float
    nc3: float
    nc4: float


@check_types
@torch.no_grad()
def neural_collapse(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> NeuralCollapse:
    r"""Measure neural collapse of features and a linear classifier, in float64.

    With class means :math:`\mu_k`, their mean :math:`\mu_G` and :math:`m_k = \mu_k - \mu_G`. No matrix of ``D x D`` is
    formed: the pseudo-inverse lives in the span of the ``C`` means (eigenvalues below a millionth of the largest
    count as 0). Classes without a sample are left out.

    Args:
        features: ``(N, D)``, what goes into the classifier, in eval mode.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        weight: ``(C, D)``.
        bias: ``(C,)``, or None.

    Raises:
        ValueError: for wrong shapes, a label out of range, fewer than two classes, features that are not finite, or
            class means that are all equal; for a weight or bias that is not finite.

    Example:
        >>> weight = simplex_etf(4, 6)
        >>> labels = torch.arange(8) % 4
        >>> neural_collapse(5 * weight[labels], labels, weight).nc3 < 1e-12
        True

    Reference:
        V. Papyan, X. Y. Han, D. L. Donoho, "Prevalence of neural collapse during the terminal phase of deep learning
        training", PNAS 2020. Definitions of ``nc2_norm`` and ``nc2_angle`` are the usual ones; constants differ
        between papers.
    """
    features, weight = features.double(), weight.double()
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features must have shape (N, D) and weight (C, D), got {tuple(features.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be {len(features)} integers, got {labels.dtype} of {tuple(labels.shape)}")
    labels = labels.long()
    _check_bias(weight, bias)
    if not features.isfinite().all():
        raise ValueError("features must be finite, found NaN or infinity; look for faulty inputs or a diverged net")
    num_classes = len(weight)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), the rows of weight")
    present, index = torch.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"samples of at least two classes are needed, found {len(present)}; pass more samples")
    counts = torch.bincount(index)
    means = features.new_zeros(len(present), features.shape[1]).index_add_(0, index, features) / counts[:, None]
    centred = means - means.mean(0)
    total_between = centred.square().sum()
    if not total_between > 0:
        raise ValueError("all class means are equal, so there is nothing to compare variations with")
    residual = features - means[index]
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = values.square() > 1e-6 * values[0].square()
    within = (residual @ directions[kept].T).square().mean(0)  # variances along the directions of the means
    head = weight[present]
    nc1 = (within / values[kept].square()).sum()  # C of the mean over classes and 1/C of NC1 cancel
    logits = F.linear(features, weight, None if bias is None else bias.double())
    nearest = present[torch.cdist(features, means).argmin(1)]
    return NeuralCollapse(
        nc1=nc1.item(),
        nc1_trace=(residual.square().sum(1).mean() / (total_between / len(present))).item(),
        nc2_norm=_spread(centred.norm(dim=1)),
        nc2_angle=_angles(centred),
        nc2_norm_head=_spread(head.norm(dim=1)),
        nc2_angle_head=_angles(head - head.mean(0)),
        nc3=_alignment(centred, head - head.mean(0)),
        nc4=(logits.argmax(1) != nearest).double().mean().item(),
    )


def _check_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (C,) for {len(weight)} classes, got {tuple(bias.shape)}")
    if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError("weight and bias must be finite, found NaN or infinity; look for a diverged net")


def _spread(lengths: Tensor) -> float:
    return float(lengths.std(correction=0) / lengths.mean().clamp_min(torch.finfo(lengths.dtype).tiny))


def _angles(rows: Tensor) -> float:
    count = len(rows)
    directions = F.normalize(rows, dim=1)
    cosines = (directions @ directions.T)[~torch.eye(count, dtype=torch.bool, device=rows.device)]
    return float((cosines + 1 / (count - 1)).abs().mean())


def _alignment(means: Tensor, head: Tensor) -> float:
    tiny = torch.finfo(means.dtype).tiny
    return float((head / head.norm().clamp_min(tiny) - means / means.norm().clamp_min(tiny)).square().sum())


@dataclass(frozen=True)
class MixedCollapse:
    r"""Where the features of mixtures lie; see :func:`mixed_collapse`.

    Attributes:
        alignment: cosine between mixtures within a class and its row of the classifier; 1 at collapse.
        plane: part in [0, 1] of the squared length of mixtures of two classes outside the plane of their two rows; 0
            at collapse.
        gap: distance of mixtures of two classes from the straight line between those within each, over the length of
            the latter; above 0 where mixtures are no convex combinations.
        margin: absolute difference of the two classes' logits at equal shares; 0 at collapse. NaN without equal shares.
    """

    alignment: float
    plane: float
    gap: float
    margin: float


@check_types
@torch.no_grad()
def mixed_collapse(
    features: Tensor, first: Tensor, second: Tensor, lambdas: Tensor, weight: Tensor, bias: Tensor | None = None
) -> MixedCollapse:
    r"""Measure the geometry of the features of mixtures :math:`\lambda x_i + (1 - \lambda) x_j`, in float64.

    Features of the same two classes and the same share are averaged, then the four measures over pairs and shares. The
    rows of the classifier are centred: a vector added to all of them changes no prediction. Pairs of two classes count
    for ``gap`` where both have mixtures within them; shares of 0 and 1, where it vanishes, are left out of it.

    Args:
        features: ``(M, L, D)``, of ``M`` pairs of samples at ``L`` shares.
        first: class of each pair's first sample ``(M,)``.
        second: class of its second sample ``(M,)``; equal to ``first`` for mixtures within a class.
        lambdas: shares of the first sample ``(L,)``, in [0, 1].
        weight: ``(C, D)``.
        bias: ``(C,)``, or None.

    Raises:
        ValueError: for wrong shapes, classes out of range, features, weight or bias that are not finite, or if there is
            no pair within a class or none of two classes.

    Example:
        >>> weight = simplex_etf(3, 4)
        >>> shares = torch.tensor([0.25, 0.5])
        >>> pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2)]
        >>> rows = [unconstrained_mixup_feature(weight, *pair, float(share)) for pair in pairs for share in shares]
        >>> features = torch.stack(rows).view(5, 2, 4)
        >>> first, second = torch.tensor(pairs).T
        >>> result = mixed_collapse(features, first, second, shares, weight)
        >>> round(result.alignment, 6), round(result.plane, 6), round(result.margin, 6)
        (1.0, 0.0, 0.0)

    Reference:
        Q. Fisher, H. Meng, V. Papyan, "Pushing Boundaries: Mixup's Influence on Neural Collapse", ICLR 2024, for what
        is to be expected. The four measures are ours.
    """
    features, lambdas, weight = features.double(), lambdas.double().to(features.device), weight.double()
    if (
        features.ndim != 3
        or lambdas.ndim != 1
        or first.ndim != 1
        or features.shape[:2] != (len(first), len(lambdas))
        or first.shape != second.shape
    ):
        raise ValueError(
            f"features must have shape (M, L, D) for M pairs and L shares, got {tuple(features.shape)} for "
            f"classes {tuple(first.shape)} and {tuple(second.shape)} and shares {tuple(lambdas.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != features.shape[2]:
        raise ValueError(f"weight must be (C, {features.shape[2]}) for these features, got {tuple(weight.shape)}")
    _check_bias(weight, bias)
    if not (features.isfinite().all() and ((lambdas >= 0) & (lambdas <= 1)).all()):
        raise ValueError("features must be finite and lambdas in [0, 1]; look for faulty inputs or a diverged net")
    for name, classes in (("first", first), ("second", second)):
        if classes.is_floating_point() or classes.dtype == torch.bool:
            raise ValueError(f"{name} must hold integer classes, got {classes.dtype}; use {name}.long()")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(weight):
            raise ValueError(f"{name} must lie in [0, {len(weight)}), the rows of weight")
    first, second = first.long(), second.long()
    pairs, index = torch.unique(torch.stack([first, second], 1).to(features.device), dim=0, return_inverse=True)
    counts = torch.bincount(index)
    mixed = features.new_zeros(len(pairs), *features.shape[1:]).index_add_(0, index, features) / counts[:, None, None]
    same = pairs[:, 0] == pairs[:, 1]
    if not same.any() or same.all():
        raise ValueError("pairs within a class and pairs of two classes are both needed; pass some of each")
    rows = weight - weight.mean(0)
    own = mixed[same].mean(1)
    alignment = F.cosine_similarity(own, rows[pairs[same, 0]], dim=1).mean()

    apart, (i, j) = mixed[~same], pairs[~same].T
    # With two classes the two centred rows are opposite: a basis of what they span, not of two dimensions.
    basis, lengths, _ = torch.linalg.svd(torch.stack([rows[i], rows[j]], 2), full_matrices=False)
    spans = lengths > 1e-9 * lengths[:, :1]
    inside = (torch.einsum("pld,pdk->plk", apart, basis).square() * spans[:, None]).sum(2)
    squares = apart.square().sum(2)
    # Half-way between two classes, a feature may be 0, which lies in every plane.
    plane = torch.where(squares > 1e-18 * squares.max(), 1 - inside / squares, 0).clamp_min(0)

    within = features.new_full(weight.shape, torch.nan).index_copy_(0, pairs[same, 0], own)
    share = lambdas[None, :, None]
    line = share * within[i][:, None] + (1 - share) * within[j][:, None]
    gap = (apart - line).norm(dim=2) / within[i].norm(dim=1, keepdim=True)
    inner = (lambdas > 0) & (lambdas < 1)
    logits = F.linear(apart, weight, None if bias is None else bias.double())
    pair = torch.arange(len(apart), device=features.device)
    margins = (logits[pair, :, i] - logits[pair, :, j])[:, (lambdas - 0.5).abs() < 1e-6].abs()
    return MixedCollapse(
        alignment=alignment.item(),
        plane=plane.mean().item(),
        gap=gap[:, inner].nanmean().item(),
        margin=margins.mean().item(),
    )


@check_types
def simplex_etf(num_classes: int, num_features: int, *, seed: int = 0) -> Tensor:
    r"""Return the ``(C, D)`` rows of a simplex equiangular tight frame: length 1, cosines :math:`-1 / (C - 1)`, sum 0.

    Args:
        num_classes: C, at least 2.
        num_features: ``D``, at least ``C - 1``.
        seed: of the rotation.

    Returns:
        float64.

    Raises:
        ValueError: for fewer classes or features.

    Example:
        >>> rows = simplex_etf(3, 5)
        >>> (rows @ rows.T).round(decimals=6)[0]
        tensor([ 1.0000, -0.5000, -0.5000], dtype=torch.float64)
    """
    if num_classes < 2 or num_features < num_classes - 1:
        raise ValueError(
            "a simplex needs at least 2 classes and num_classes - 1 features, got "
            f"num_classes={num_classes!r}, num_features={num_features!r}; widen the layer before it"
        )
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.randn(num_features, num_classes - 1, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(rotation).Q
    centring = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    corners = torch.linalg.eigh(centring).eigenvectors[:, 1:]  # eigenvalue 0 comes first
    scale: float = (num_classes / (num_classes - 1)) ** 0.5
    rows: Tensor = scale * corners @ rotation.T
    return rows


class SimplexETFClassifier(nn.Linear):
    """A classifier that is not trained: the rows of a simplex equiangular tight frame, no bias.

    It is what a balanced problem collapses to; the features are trained towards it. An ``nn.Linear`` like any other for
    hooks, exports and state.

    Args:
        num_features: D, at least one less than the classes.
        num_classes: C, at least 2.
        scale: length of the rows, above 0.
        seed: of the rotation.

    Shape:
        - input: features ``(..., D)``
        - output: logits ``(..., C)``

    Raises:
        ValueError: for a wrong argument.

    Example:
        >>> head = SimplexETFClassifier(8, 3)
        >>> head.weight.requires_grad, head(torch.zeros(2, 8)).shape
        (False, torch.Size([2, 3]))

    Reference:
        Z. Zhu et al., "A Geometric Analysis of Neural Collapse with Unconstrained Features", NeurIPS 2021, section 4.
    """

    @check_types
    def __init__(self, num_features: int, num_classes: int, *, scale: float = 1.0, seed: int = 0) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be above 0 and finite, got {scale!r}")
        rows = simplex_etf(num_classes, num_features, seed=seed)
        # nn.Linear draws its first weights from the global generator; these are not drawn there.
        super().__init__(num_features, num_classes, bias=False, device="meta")
        self.weight = nn.Parameter((scale * rows).to(torch.get_default_dtype()), requires_grad=False)

    def reset_parameters(self) -> None:
        """Leave the fixed weights alone."""


@check_types
def unconstrained_mixup_feature(
    weight: Tensor, first: int, second: int, share: float, *, decay: float = 0.01
) -> Tensor:
    r"""Return the feature that mixup wants if features were free: the solution of a small convex problem.

    It minimises :math:`\mathrm{CE}(W h, \lambda e_i + (1 - \lambda) e_j) + \frac{\eta}{2} \lVert h \rVert^2`, for a
    simplex ``weight``. There :math:`h = \eta^{-1} W^\top (y - p)`, in the span of the two rows; within one class it is
    along the row, whatever the share. Newton's method on the two coefficients, in float64.

    Args:
        weight: ``(C, D)``, rows of a simplex (:func:`simplex_etf`), scaled at will.
        first: class :math:`i`.
        second: class :math:`j`, maybe the same.
        share: :math:`\lambda` in [0, 1].
        decay: :math:`\eta`, above 0.

    Returns:
        ``(D,)``, float64.

    Raises:
        ValueError: for a wrong argument, or rows that do not sum to 0.

    Example:
        >>> weight = simplex_etf(3, 4)
        >>> h = unconstrained_mixup_feature(weight, 0, 1, 0.5)
        >>> (weight @ h).round(decimals=3)[:2].diff().abs().item()
        0.0
    """
    weight = weight.double()
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight must be (C, D), got {tuple(weight.shape)}")
    for name, label in (("first", first), ("second", second)):
        if not 0 <= label < len(weight):
            raise ValueError(f"{name} must lie in [0, {len(weight)}), the rows of weight, got {label!r}")
    first, second = int(first), int(second)
    if not decay > 0:
        raise ValueError(f"decay must be above 0, got {decay!r}; without it the feature is infinite")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}")
    if not weight.sum(0).abs().max() <= 1e-6 * weight.abs().max():
        raise ValueError("the rows of weight must sum to 0; use simplex_etf")
    rows = weight[[first]] if first == second else weight[[first, second]]
    target = torch.zeros(len(weight), dtype=torch.float64)
    target[first] += share
    target[second] += 1 - share
    if len(weight) == 2 and first != second:
        rows = rows[:1]  # the second row is the first one's opposite
    scores, lengths = weight @ rows.T, rows @ rows.T
    coefficients = torch.zeros(len(rows), dtype=torch.float64)

    def objective(c: Tensor) -> Tensor:
        logits = scores @ c
        return logits.logsumexp(0) - target @ logits + decay / 2 * (c @ lengths @ c)

    for _ in range(100):
        probs = (scores @ coefficients).softmax(0)
        gradient = scores.T @ (probs - target) + decay * lengths @ coefficients
        if gradient.abs().max() < 1e-13:
            break
        curvature = scores.T @ (torch.diag(probs) - probs.outer(probs)) @ scores + decay * lengths
        step, singular = torch.linalg.solve_ex(curvature, gradient)
        if singular:
            raise ValueError(
                f"rows {first} and {second} of weight must point apart and be of moderate size; use simplex_etf"
            )
        size = 1.0
        allowed = objective(coefficients) + 1e-14  # near the solution only rounding is left
        while objective(coefficients - size * step) > allowed and size > 1e-6:
            size /= 2
        coefficients = coefficients - size * step
    return coefficients @ rows


@check_types
def collapse_curves(epochs: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw measures over epochs, one small panel each, on a logarithmic scale where all values are above 0.

    Args:
        epochs: the horizontal axis, ``n`` numbers.
        curves: ``n`` values by name, at least one.

    Raises:
        ValueError: if there is none, or of another length than the epochs.

    Example:
        >>> figure = collapse_curves([1, 2], {"nc1": [1.0, 0.1], "nc4": [0.5, 0.0]})
        >>> [axes.get_title() for axes in figure.axes]
        ['nc1', 'nc4']
    """
    from matplotlib.figure import Figure

    if not curves or any(len(values) != len(epochs) for values in curves.values()):
        lengths = {name: len(values) for name, values in curves.items()}
        raise ValueError(f"curves must be one at least, each of {len(epochs)} values like epochs, got {lengths}")
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, (name, values) in zip(grid, curves.items(), strict=False):
        axes.plot(list(epochs), list(values), color="#0072B2", marker="." if len(values) < 30 else None)
        if values and min(values) > 0:
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.grid(color="#E3E3E3", lw=0.7)
        axes.tick_params(labelsize=8)
    for axes in grid[len(curves) :]:
        axes.remove()
    figure.supxlabel("epoch", fontsize=9)
    return figure
