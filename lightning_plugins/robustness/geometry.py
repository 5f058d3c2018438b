"""How far inputs are from being misclassified: norms of perturbations, margins, error as a function of the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins.checks import check_types

__all__ = [
    "AdversarialPowerLaw",
    "LogitMargin",
    "MinimalPerturbation",
    "PerturbationNorm",
    "PowerLaw",
    "fit_power_law",
    "linearised_minimal_eps",
]


class _Sums(Metric):
    """A metric whose float64 sums become float32 on a device that has none, such as mps."""

    full_state_update = False
    is_differentiable = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def with_fallback(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except TypeError:
                return fn(tensor.float())

        return super()._apply(with_fallback, exclude_state)


class PerturbationNorm(_Sums):
    """Mean and largest norm of ``x_adv - x``, and the proof that an attack kept to its budget.

    On a CPU, a perturbation that is too large or not finite is refused by ``update``; on other devices, where looking
    would make the device wait, by ``compute``.

    Args:
        p: order of the norm over all elements of one sample, at least 1; ``math.inf`` for the largest element.
        eps: budget in the unit of the images; None does not check.
        tol: how far a norm may exceed ``eps``, besides the rounding of values in [0, 1] of the images' type.

    Shape:
        - ``update(x, x_adv)``: images ``(N, ...)`` without and under attack, floating-point, of the same shape.

    Returns:
        ``compute()``: a dictionary of float32 scalars ``mean`` and ``max``, at least 0; NaN without samples.

    Raises:
        ValueError: for wrong arguments or shapes, a perturbation above ``eps``, or one that is not finite.

    Example:
        >>> metric = PerturbationNorm(p=2, eps=5.0)
        >>> metric(torch.zeros(2, 1, 1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(2, 1, 1, 2))
        {'mean': tensor(3.), 'max': tensor(5.)}
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    norms: Tensor
    count: Tensor
    largest: Tensor
    excess: Tensor

    @check_types
    def __init__(self, p: float = math.inf, *, eps: float | None = None, tol: float = 1e-6) -> None:
        super().__init__()
        if not p >= 1:
            raise ValueError(f"p must be at least 1 or infinite, got {p!r}")
        if eps is not None and not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps!r}")
        if not tol >= 0:
            raise ValueError(f"tol must be at least 0, got {tol!r}")
        self.p, self.eps, self.tol = float(p), eps, tol
        self.add_state("norms", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("excess", torch.full((), -math.inf, dtype=torch.float64), dist_reduce_fx="max")

    @check_types
    def update(self, x: Tensor, x_adv: Tensor) -> None:
        """Add the perturbations of one batch; see the class for shapes."""
        if x.shape != x_adv.shape or x.ndim < 2 or not (x.is_floating_point() and x_adv.is_floating_point()):
            raise ValueError(
                f"x and x_adv must be floating-point (N, ...) of the same shape, got {tuple(x.shape)} of {x.dtype} and "
                f"{tuple(x_adv.shape)} of {x_adv.dtype}"
            )
        if len(x) == 0:
            return
        dtype = self.norms.dtype
        difference = (x_adv.to(dtype) - x.to(dtype)).flatten(1)
        norms = torch.linalg.vector_norm(difference, self.p, dim=1)
        largest = norms.amax()
        rounding = max(torch.finfo(tensor.dtype).eps for tensor in (x, x_adv)) / 2
        allowed = math.inf if self.eps is None else self.eps + self.tol + rounding * difference.shape[1] ** (1 / self.p)
        excess = largest - allowed
        if largest.device.type == "cpu":
            self._check(largest, excess)
        self.norms, self.count = self.norms + norms.sum(), self.count + len(x)
        self.largest, self.excess = torch.maximum(self.largest, largest), torch.maximum(self.excess, excess)

    def compute(self) -> dict[str, Tensor]:
        """Return mean and largest norm of all batches, of all processes."""
        self._check(self.largest, self.excess)
        empty = 0 / self.count  # NaN without samples
        return {"mean": (self.norms / self.count).float(), "max": (self.largest + empty).float()}

    def _check(self, largest: Tensor, excess: Tensor) -> None:
        if not largest.isfinite():
            raise ValueError(
                f"x_adv - x must be finite, got a norm of {largest.item()}; look at the attack's gradients"
            )
        if excess > 0:
            raise ValueError(
                f"perturbations must have an l{self.p:g} norm of at most eps={self.eps:g}, got {largest.item():.6g}; "
                "project onto the budget, or give eps and images in the same unit"
            )


class MinimalPerturbation(_Sums):
    """Robust accuracy as a function of the budget, from the smallest perturbation that fools the model on each sample.

    Counted in equal bins of the budget. Robust accuracy is the share of samples whose smallest perturbation is above
    the budget; the area under it up to ``max_eps`` is exact, the median is interpolated within its bin.

    Args:
        max_eps: end of the curve, in the unit of the perturbations, above 0.
        num_bins: at least 1.

    Shape:
        - ``update(eps_hat)``: norms ``(N,)`` of the smallest perturbations found, floating-point: 0 where the clean
          prediction is wrong already, infinite where none was found.

    Returns:
        ``compute()``: a dictionary of float32 scalars: ``median``, infinite if it lies above ``max_eps``; ``auc``, the
        mean robust accuracy over budgets in [0, ``max_eps``], in [0, 1]. NaN without samples.

    Raises:
        ValueError: for wrong arguments or shapes, or a negative or NaN perturbation.

    Example:
        >>> metric = MinimalPerturbation(max_eps=1.0, num_bins=4)
        >>> metric(torch.tensor([0.0, 0.25, 0.75, torch.inf]))
        {'median': tensor(0.2500), 'auc': tensor(0.5000)}
        >>> metric.curve()[1]
        tensor([0.7500, 0.5000, 0.5000, 0.2500, 0.2500])
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    histogram: Tensor
    area: Tensor
    problems: Tensor

    @check_types
    def __init__(self, max_eps: float, *, num_bins: int = 256) -> None:
        super().__init__()
        if not 0 < max_eps < math.inf:
            raise ValueError(f"max_eps must be above 0 and finite, got {max_eps!r}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins!r}")
        self.max_eps, self.num_bins = max_eps, num_bins
        # First those at 0, then the bins (lo, hi], then those above max_eps.
        self.add_state("histogram", torch.zeros(num_bins + 2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("area", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, eps_hat: Tensor) -> None:
        """Add the smallest perturbations of one batch; see the class for shapes."""
        if eps_hat.ndim != 1 or not eps_hat.is_floating_point():
            raise ValueError(
                f"eps_hat must be floating-point (N,), got {tuple(eps_hat.shape)} of {eps_hat.dtype}; pass one norm "
                "for each sample"
            )
        wrong = (~(eps_hat >= 0)).any().long()  # NaN fails every comparison
        if wrong.device.type == "cpu":
            _raise_if_negative(wrong)
        index = torch.bucketize(eps_hat.contiguous(), self._edges().to(eps_hat))
        ones = torch.ones_like(index)
        self.histogram = self.histogram.index_add(0, index, ones)
        self.area = self.area + eps_hat.to(self.area.dtype).clamp_max(self.max_eps).sum()
        self.problems = self.problems + wrong

    def compute(self) -> dict[str, Tensor]:
        """Return median and area of all batches, of all processes."""
        _raise_if_negative(self.problems)
        count = self.histogram.sum()
        return {"median": self._median(), "auc": (self.area / (count * self.max_eps)).float()}

    def curve(self) -> tuple[Tensor, Tensor]:
        """Return budgets and robust accuracies there, float32 ``(num_bins + 1,)`` each, of this process alone."""
        _raise_if_negative(self.problems)
        return self._edges().float(), 1 - self._fooled().float()

    def _edges(self) -> Tensor:
        steps = torch.arange(self.num_bins + 1, dtype=self.area.dtype, device=self.area.device)
        return steps / self.num_bins * self.max_eps

    def _fooled(self) -> Tensor:
        return (self.histogram.cumsum(0)[:-1]).to(self.area.dtype) / self.histogram.sum()

    def _median(self) -> Tensor:
        fooled, edges = self._fooled(), self._edges()
        if fooled[0].isnan():
            return fooled[0].float()
        if not fooled[-1] >= 0.5:
            return torch.full_like(fooled[0], math.inf).float()
        last = int((fooled >= 0.5).int().argmax())
        if last == 0:
            return edges[0].float()
        before, width = fooled[last - 1], edges[last] - edges[last - 1]
        return (edges[last - 1] + (0.5 - before) / (fooled[last] - before) * width).float()


def _raise_if_negative(problems: Tensor) -> None:
    if problems:
        raise ValueError(
            f"eps_hat must be at least 0, found negative values or NaN in {int(problems)} update(s); use 0 for samples "
            "misclassified without attack, infinity for those never fooled"
        )


class LogitMargin(_Sums):
    r"""Distribution of the gap between the largest and a lower logit, :math:`\Delta_{1j} = o_{(1)} - o_{(j)}`.

    How dense small gaps are says how many samples a tiny perturbation can flip. The density at 0 is read off a straight
    line through the histogram's first fifth (of its range up to the 99th percentile).

    Args:
        max_margin: end of the histogram, in units of logits, above 0; larger gaps are counted together.
        num_bins: of the histogram, at least 16.
        rank: j, at least 2: the gap to the j-th largest logit.

    Shape:
        - ``update(logits)``: ``(N, C)``, floating-point, with C at least ``rank``.

    Returns:
        ``compute()``: a dictionary of float32 scalars: ``mean``; ``density_at_zero``, per unit of logits, at least 0.
        NaN without samples.

    Raises:
        ValueError: for wrong arguments or shapes, or logits that are not finite.

    Example:
        >>> metric = LogitMargin(max_margin=1.0, num_bins=16)
        >>> gaps = (torch.arange(160) + 0.5) / 160  # evenly from 0 to 1: a density of 1
        >>> {name: round(value.item(), 2) for name, value in metric(torch.stack([gaps, 0 * gaps], 1)).items()}
        {'mean': 0.5, 'density_at_zero': 1.0}

    Reference:
        E. D. Cubuk, B. Zoph, S. S. Schoenholz, Q. V. Le, "Intriguing Properties of Adversarial Examples", 2017. How the
        density is estimated is our choice.
    """

    higher_is_better = None
    plot_lower_bound = 0.0

    histogram: Tensor
    margins: Tensor

    @check_types
    def __init__(self, max_margin: float = 50.0, *, num_bins: int = 2000, rank: int = 2) -> None:
        super().__init__()
        if not 0 < max_margin < math.inf:
            raise ValueError(f"max_margin must be above 0 and finite, got {max_margin!r}")
        if num_bins < 16:
            raise ValueError(f"num_bins must be at least 16, got {num_bins!r}")
        if rank < 2:
            raise ValueError(f"rank must be at least 2, got {rank!r}")
        self.max_margin, self.num_bins, self.rank = max_margin, num_bins, rank
        self.add_state("histogram", torch.zeros(num_bins + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("margins", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @check_types
    def update(self, logits: Tensor) -> None:
        """Add the gaps of one batch; see the class for shapes."""
        if logits.ndim != 2 or logits.shape[1] < self.rank or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating-point (N, C) with C at least rank={self.rank}, got {tuple(logits.shape)} of "
                f"{logits.dtype}"
            )
        top = logits.to(self.margins.dtype).topk(self.rank, dim=1).values
        # topk puts NaN first; infinities leave inf or NaN: either shows in the sum.
        margin = top[:, 0] - top[:, -1]
        total = margin.sum()
        if total.device.type == "cpu":
            _raise_if_not_finite(total)
        index = (margin / self.max_margin * self.num_bins).nan_to_num(0.0).clamp(0, self.num_bins).long()
        self.histogram = self.histogram.index_add(0, index, torch.ones_like(index))
        self.margins = self.margins + total

    def compute(self) -> dict[str, Tensor]:
        """Return the mean gap and the density at 0 of all batches, of all processes."""
        _raise_if_not_finite(self.margins)
        count = self.histogram.sum()
        return {"mean": (self.margins / count).float(), "density_at_zero": self._density_at_zero().float()}

    def density(self) -> tuple[Tensor, Tensor]:
        """Return gaps and their density per unit of logits, float32 ``(num_bins,)`` each, of this process alone."""
        _raise_if_not_finite(self.margins)
        width = self.max_margin / self.num_bins
        centres = (torch.arange(self.num_bins, device=self.histogram.device) + 0.5) * width
        return centres, self.histogram[:-1] / (self.histogram.sum() * width)

    def _density_at_zero(self) -> Tensor:
        centres, density = (part.to(self.margins.dtype) for part in self.density())
        reached = self.histogram.cumsum(0)[:-1] < 0.99 * self.histogram.sum()
        first = max(3, math.ceil(0.2 * (int(reached.sum()) + 1)))
        x, y = centres[:first], density[:first]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return (y.mean() - slope * x.mean()).clamp_min(0)


def _raise_if_not_finite(total: Tensor) -> None:
    if not total.isfinite():
        raise ValueError("logits must be finite, found NaN or infinity; look at the model")


@dataclass(frozen=True)
class PowerLaw:
    r"""The line :math:`\log(\mathrm{error}) = \log A + B \log \epsilon`.

    Args:
        scale: A, the error that the line gives at a budget of 1.
        exponent: B.
        r_squared: share of the variance of the log errors that the line explains, at most 1; 1 for two points.
        num_points: budgets whose error was in the range; below 2 the rest is NaN.
    """

    scale: float
    exponent: float
    r_squared: float
    num_points: int


@check_types
def fit_power_law(
    eps: Tensor | Sequence[float], error: Tensor | Sequence[float], *, error_range: tuple[float, float] = (0.003, 0.3)
) -> PowerLaw:
    """Fit adversarial error as a power of the budget, by least squares on the logarithms.

    Errors outside of ``error_range`` are left out: small ones are noise, large ones saturate.

    Args:
        eps: budgets ``(E,)``, above 0.
        error: share of the samples fooled at each budget ``(E,)``, in [0, 1].
        error_range: least and largest error that count, with ``0 < least < largest <= 1``.

    Raises:
        ValueError: for wrong shapes or values out of range.

    Example:
        >>> round(fit_power_law([0.01, 0.02, 0.04], [0.02, 0.04, 0.08]).exponent, 6)
        1.0
    """
    _check_range(error_range)
    x, y = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in (eps, error))
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"eps and error must both be (E,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not ((x > 0) & x.isfinite() & (y >= 0) & (y <= 1)).all():
        raise ValueError("eps must be above 0 and error in [0, 1]; leave out the budget 0, and budgets without samples")
    counts = (y >= error_range[0]) & (y <= error_range[1])
    x, y = x[counts].log(), y[counts].log()
    spread = (x - x.mean()).square().sum()
    if len(x) < 2 or spread == 0:
        return PowerLaw(math.nan, math.nan, math.nan, len(x))
    exponent = ((x - x.mean()) * (y - y.mean())).sum() / spread
    offset = y.mean() - exponent * x.mean()
    total, rest = (y - y.mean()).square().sum(), (y - offset - exponent * x).square().sum()
    r_squared = 1 - (rest / total).item() if total > 0 else math.nan
    return PowerLaw(offset.exp().item(), exponent.item(), r_squared, len(x))


class AdversarialPowerLaw(_Sums):
    r"""How adversarial error grows with the budget: :math:`\mathrm{error} \approx A \epsilon^B`, with B near 1.

    Counts rightly classified samples only. :func:`fit_power_law` is the fit.

    Args:
        eps_grid: budgets of the attacks, above 0, at least two.
        error_range: least and largest error that count for the fit, with ``0 < least < largest <= 1``.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: predicted classes ``(N,)`` or logits ``(N, C)``; the same under
          attack for each of the E budgets, ``(E, N)`` or ``(E, N, C)``; true classes ``(N,)``.

    Returns:
        ``compute()``: a dictionary of float32 scalars ``scale`` (A), ``exponent`` (B), ``r_squared`` and
        ``num_points``, as in :class:`PowerLaw`.

    Raises:
        ValueError: for wrong arguments or shapes, or NaN.

    Example:
        >>> metric = AdversarialPowerLaw((0.1, 0.2), error_range=(0.1, 1.0))
        >>> target = torch.zeros(4, dtype=torch.long)
        >>> metric(target, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]), target)["exponent"]
        tensor(1.)

    Reference:
        E. D. Cubuk, B. Zoph, S. S. Schoenholz, Q. V. Le, "Intriguing Properties of Adversarial Examples", 2017. The
        range of errors is our choice.
    """

    higher_is_better = None

    fooled: Tensor
    count: Tensor
    problems: Tensor

    @check_types
    def __init__(self, eps_grid: Sequence[float], *, error_range: tuple[float, float] = (0.003, 0.3)) -> None:
        super().__init__()
        self.eps_grid = tuple(float(eps) for eps in eps_grid)
        if len(set(self.eps_grid)) < 2 or not all(0 < eps < math.inf for eps in self.eps_grid):
            raise ValueError(f"eps_grid must hold at least two different budgets above 0, got {self.eps_grid}")
        _check_range(error_range)
        self.error_range = (float(error_range[0]), float(error_range[1]))
        self.add_state("fooled", torch.zeros(len(self.eps_grid), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, pred_clean: Tensor, pred_adv: Tensor, target: Tensor) -> None:
        """Count one batch; see the class for shapes."""
        if target.ndim != 1 or target.is_floating_point():
            raise ValueError(f"target must hold integer classes (N,), got {tuple(target.shape)} of {target.dtype}")
        wrong = pred_clean.isnan().any() | pred_adv.isnan().any()
        if wrong.device.type == "cpu":
            _raise_if_nan(wrong)
        clean = _hard("pred_clean", pred_clean, (len(target),))
        attacked = _hard("pred_adv", pred_adv, (len(self.eps_grid), len(target)))
        right = clean == target
        self.fooled = self.fooled + (right & (attacked != target)).sum(1)
        self.count = self.count + right.sum()
        self.problems = self.problems + wrong

    def compute(self) -> dict[str, Tensor]:
        """Return the fit to all batches, of all processes."""
        fit = fit_power_law(self.eps_grid, self.errors(), error_range=self.error_range) if self.count else None
        values = (math.nan, math.nan, math.nan, 0) if fit is None else vars(fit).values()
        names = ("scale", "exponent", "r_squared", "num_points")
        device = self.count.device
        return {name: torch.tensor(float(value), device=device) for name, value in zip(names, values, strict=True)}

    def errors(self) -> Tensor:
        """Return the share of rightly classified samples fooled at each budget, float32 ``(E,)``, of this process."""
        _raise_if_nan(self.problems)
        return self.fooled / self.count


def _hard(name: str, preds: Tensor, shape: tuple[int, ...]) -> Tensor:
    classes = preds.argmax(-1) if preds.ndim == len(shape) + 1 and preds.is_floating_point() else preds
    if classes.shape != shape or classes.is_floating_point():
        raise ValueError(
            f"{name} must be integer classes {shape} or logits {(*shape, 'C')}, got {tuple(preds.shape)} of "
            f"{preds.dtype}"
        )
    return classes


def _raise_if_nan(problems: Tensor) -> None:
    if problems:
        raise ValueError("predictions must not hold NaN; look at the model or the attack")


def _check_range(error_range: tuple[float, float]) -> None:
    if len(error_range) != 2 or not 0 < error_range[0] < error_range[1] <= 1:
        raise ValueError(f"error_range must be (least, largest) with 0 < least < largest <= 1, got {error_range!r}")


@check_types
def linearised_minimal_eps(logits: Tensor, jacobian: Tensor, *, p: float = math.inf) -> Tensor:
    r"""Return the budget at which a model, linear around each sample, changes its decision.

    :math:`\hat\epsilon = \min_{k \ne \hat y} (o_{\hat y} - o_k) / \|\nabla (o_{\hat y} - o_k)\|_q`, with q dual to p.
    Exact for a linear model without bounds on its inputs.

    Args:
        logits: ``(N, C)``, floating-point.
        jacobian: derivative of each logit with respect to the input, ``(N, C, ...)``.
        p: norm of the budget, at least 1; ``math.inf`` for the largest element.

    Returns:
        ``(N,)``, at least 0; infinite where no logit depends on the input. Misclassified samples are treated like the
        others: set them to 0 for :class:`MinimalPerturbation`, leave them out for :func:`fit_power_law`.

    Raises:
        ValueError: for wrong shapes or ``p``.

    Example:
        >>> linearised_minimal_eps(torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
        tensor([1.])
    """
    if not p >= 1:
        raise ValueError(f"p must be at least 1 or infinite, got {p!r}")
    if logits.ndim != 2 or logits.shape[1] < 2 or jacobian.ndim < 3 or jacobian.shape[:2] != logits.shape:
        raise ValueError(
            f"logits must be (N, C) with at least 2 classes and jacobian (N, C, ...), got {tuple(logits.shape)} and "
            f"{tuple(jacobian.shape)}"
        )
    if not (logits.is_floating_point() and jacobian.is_floating_point()):
        raise ValueError(f"logits and jacobian must be floating-point, got {logits.dtype} and {jacobian.dtype}")
    dual = 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)
    top = logits.argmax(1, keepdim=True)
    rows = jacobian.flatten(2)
    own = rows.gather(1, top[:, :, None].expand(-1, -1, rows.shape[2]))
    gap = logits.gather(1, top) - logits
    eps = gap / torch.linalg.vector_norm(own - rows, dual, dim=2)
    eps = torch.where(gap == 0, 0.0, eps)  # a tie flips at once, also where both gradients are 0
    return eps.scatter(1, top, math.inf).amin(1)
