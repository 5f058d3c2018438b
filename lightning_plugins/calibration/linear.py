"""Linear maps of the logits: one scale a class, a full matrix, and the same on log-probabilities (Dirichlet)."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.calibration._scores import check_num_classes, like
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.checks import check_types

__all__ = ["DirichletCalibration", "MatrixScaling", "VectorScaling"]

_Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


class VectorScaling(Calibrator):
    r"""Scale and shift the logits of every class by numbers of its own: ``softmax(w * z + b)``.

    ``w`` and ``b`` minimise the mean negative log-likelihood, which is convex, by L-BFGS in float64 from ``w = 1``,
    ``b = 0``. Unlike a softmax, the map sees a constant that is added to all logits of a row: logits and their
    log-probabilities need calibrators of their own. The predicted class can change.

    Args:
        bias: whether to fit ``b``; without it the method is also called class-wise temperature scaling.
        max_iterations: most steps of L-BFGS, at least 0; with 0 the map stays the identity.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: if ``max_iterations`` is negative, or for logits of another number of classes than the fit's.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10 + [[0.0, 2.0]] * 10)
        >>> labels = torch.tensor([0] * 8 + [1] * 2 + [0] * 4 + [1] * 6)
        >>> calibrator = VectorScaling().fit(logits, labels)
        >>> calibrator(logits[[0, -1]]).exp().round(decimals=3)  # 8 of 10 and 6 of 10 right
        tensor([[0.8000, 0.2000],
                [0.4000, 0.6000]])

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """

    preserves_ranking = False
    scale: Tensor
    shift: Tensor
    _sized_by_fit = ("scale", "shift")

    @check_types
    def __init__(self, *, bias: bool = True, max_iterations: int = 200) -> None:
        super().__init__()
        _check_max_iterations(max_iterations)
        self.bias, self.max_iterations = bias, max_iterations
        self.register_buffer("scale", torch.ones(0, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(0, dtype=torch.float64))

    def quantities(self) -> dict[str, float]:
        """Return the smallest, mean and largest scale; nothing before a fit."""
        if len(self.scale) == 0:
            return {}
        smallest, mean, largest = torch.stack([self.scale.min(), self.scale.mean(), self.scale.max()]).tolist()
        return {"scale_min": smallest, "scale_mean": mean, "scale_max": largest}

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        num_classes = logits.shape[1]

        def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = parameters
            loss, gradient = logits.new_zeros((), dtype=torch.float64), torch.zeros_like(parameters)
            for rows, classes in row_tiles(logits, labels):
                features = rows.double()
                part, residual = _loss_and_residual(features * scale + shift, classes)
                loss += part
                gradient += torch.stack([(residual * features).sum(0), residual.sum(0)])
            gradient[1] *= self.bias
            return loss / len(labels), gradient / len(labels)

        start = logits.new_zeros((2, num_classes), dtype=torch.float64)
        start[0] = 1
        curvature = torch.zeros_like(start)
        with torch.no_grad():
            for rows, _ in row_tiles(logits, labels):
                features = rows.double()
                probs = features.softmax(1)
                spread = probs * (1 - probs)
                curvature += torch.stack([(spread * features**2).sum(0), spread.sum(0)]) / len(labels)
            (scale, shift), iterations, converged = _minimize(objective, start, curvature, self.max_iterations, 1e-6)
        self.scale, self.shift = like(scale, self.scale), like(shift, self.shift)
        return {"iterations": iterations, "converged": converged}

    def _calibrate(self, logits: Tensor) -> Tensor:
        if self.scale.shape[0] == 0:
            return logits.log_softmax(-1)
        check_num_classes(logits, self.scale.shape[0])
        return (logits * self.scale.to(logits.dtype) + self.shift.to(logits.dtype)).log_softmax(-1)


class _MatrixMap(Calibrator):
    """``softmax(W f(z) + b)`` with off-diagonal and intercept regularisation, or the mean of several such maps."""

    preserves_ranking = False
    weight: Tensor
    shift: Tensor
    _sized_by_fit = ("weight", "shift")

    def __init__(
        self,
        *,
        off_diagonal_penalty: float,
        bias_penalty: float,
        cross_validate: bool,
        off_diagonal_grid: Sequence[float],
        bias_grid: Sequence[float],
        num_folds: int,
        seed: int,
        max_iterations: int,
    ) -> None:
        super().__init__()
        self.off_diagonal_grid, self.bias_grid = tuple(off_diagonal_grid), tuple(bias_grid)
        for name, penalties in {
            "off_diagonal_penalty": (off_diagonal_penalty,),
            "bias_penalty": (bias_penalty,),
            "off_diagonal_grid": self.off_diagonal_grid,
            "bias_grid": self.bias_grid,
        }.items():
            if not penalties or not all(0 <= penalty < math.inf for penalty in penalties):
                raise ValueError(f"{name} must be finite and at least 0, got {list(penalties)}")
        if num_folds < 2:
            raise ValueError(f"num_folds must be at least 2, got {num_folds!r}")
        _check_max_iterations(max_iterations)
        self.off_diagonal_penalty, self.bias_penalty = off_diagonal_penalty, bias_penalty
        self.cross_validate, self.num_folds, self.seed = cross_validate, num_folds, seed
        self.max_iterations = max_iterations
        self.register_buffer("weight", torch.ones((0, 0, 0), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros((0, 0), dtype=torch.float64))

    def quantities(self) -> dict[str, float]:
        """Return the mean of the diagonal and the root mean square of the rest; nothing before a fit."""
        num_classes = self.weight.shape[-1]
        if num_classes == 0:
            return {}
        mean = self.weight.mean(0)
        diagonal = mean.diagonal()
        rest = (mean.square().sum() - diagonal.square().sum()).clamp_min(0) / (num_classes * (num_classes - 1))
        return {"diagonal_mean": float(diagonal.mean()), "off_diagonal_rms": math.sqrt(float(rest))}

    @abstractmethod
    def _features(self, logits: Tensor) -> Tensor:
        """Return what the matrix is applied to, ``(N, C)``."""

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        with torch.no_grad():
            features = torch.cat([self._features(rows.double()) for rows, _ in row_tiles(logits, labels)])
            if self.cross_validate:
                weight, shift, info = self._cross_validated(features, labels)
            else:
                penalties = self.off_diagonal_penalty, self.bias_penalty
                one, iterations, converged = _fit_matrix(features, labels, *penalties, self.max_iterations)
                weight, shift = one[None, :-1].mT, one[None, -1]
                info = {"iterations": iterations, "converged": converged}
        self.weight, self.shift = like(weight.contiguous(), self.weight), like(shift, self.shift)
        return info

    def _cross_validated(
        self, features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float | int | bool]]:
        if len(labels) < self.num_folds:
            raise ValueError(
                f"cross-validation in {self.num_folds} folds needs at least as many samples, got {len(labels)}; pass "
                "more held-out data or cross_validate=False"
            )
        # Dealt out class by class, so that every fold has its share of each.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed)).to(labels.device)
        fold_of = torch.empty_like(labels)
        fold_of[order[labels[order].argsort(stable=True)]] = torch.arange(len(labels), device=labels.device)
        fold_of %= self.num_folds

        # Strong penalties first: each solution starts the next, and of equal losses the first counts.
        grid = list(
            itertools.product(sorted(set(self.bias_grid), reverse=True), sorted(set(self.off_diagonal_grid))[::-1])
        )
        losses = dict.fromkeys(grid, 0.0)
        with progress_bar(title=type(self).__name__, total=self.num_folds * (len(grid) + 1)) as bar:
            for fold in range(self.num_folds):
                train, held = fold_of != fold, fold_of == fold
                data, start = (features[train], labels[train]), None
                for bias_penalty, off_diagonal_penalty in grid:
                    penalties = off_diagonal_penalty, bias_penalty
                    # Enough to tell the pairs apart.
                    start, _, _ = _fit_matrix(*data, *penalties, self.max_iterations, start, tolerance=1e-3)
                    loss, _ = _matrix_loss(start, features[held], labels[held])
                    losses[bias_penalty, off_diagonal_penalty] += float(loss) * int(held.sum())
                    bar.update()
            bias_penalty, off_diagonal_penalty = min(losses, key=losses.__getitem__)
            solutions = []
            for fold in range(self.num_folds):
                data = features[fold_of != fold], labels[fold_of != fold]
                solutions.append(_fit_matrix(*data, off_diagonal_penalty, bias_penalty, self.max_iterations))
                bar.update()
        maps = torch.stack([solution for solution, _, _ in solutions])
        return (
            maps[:, :-1].mT,
            maps[:, -1],
            {
                "iterations": max(iterations for _, iterations, _ in solutions),
                "converged": all(converged for _, _, converged in solutions),
                "off_diagonal_penalty": off_diagonal_penalty,
                "bias_penalty": bias_penalty,
                "nll_cross_validated": losses[bias_penalty, off_diagonal_penalty] / len(labels),
            },
        )

    def _calibrate(self, logits: Tensor) -> Tensor:
        num_maps, num_classes = self.shift.shape
        if num_maps == 0:
            return logits.log_softmax(-1)
        check_num_classes(logits, num_classes)
        features = self._features(logits)
        log_probs = [
            torch.nn.functional.linear(features, weight.to(logits.dtype), shift.to(logits.dtype)).log_softmax(-1)
            for weight, shift in zip(self.weight, self.shift, strict=True)
        ]
        if num_maps == 1:
            return log_probs[0]
        return torch.stack(log_probs).logsumexp(0) - math.log(num_maps)


class MatrixScaling(_MatrixMap):
    r"""Map all logits together: ``softmax(W z + b)``, with penalties on what is not the diagonal, and on ``b``.

    Minimises the mean negative log-likelihood plus
    :math:`\frac{\lambda}{C(C-1)}\sum_{i\ne j}W_{ij}^2 + \frac{\mu}{C}\sum_i b_i^2` (ODIR) by L-BFGS in float64 from the
    identity; the problem is convex. Logits and their log-probabilities need calibrators of their own, since the map
    sees a constant that is added to all logits of a row. Without penalties the matrix of many classes overfits a small
    held-out set badly. The predicted class can change.

    With ``cross_validate`` the penalties are those of the grid with the smallest negative log-likelihood on left-out
    folds, and the prediction is the mean probability of the fold models, as in the paper's experiments. The default
    grid has 5 x 2 pairs, where the paper's has 36 x 12 for ten classes. On a terminal a bar shows what takes longer
    than five seconds.

    Args:
        off_diagonal_penalty: lambda, at least 0, where ``cross_validate`` is off.
        bias_penalty: mu, at least 0, where ``cross_validate`` is off.
        cross_validate: whether to choose both penalties by cross-validation.
        off_diagonal_grid: values of lambda to choose from.
        bias_grid: values of mu to choose from; all pairs are tried.
        num_folds: folds, at least 2, each with its share of every class.
        seed: of the division into folds.
        max_iterations: most steps of L-BFGS for a fit, at least 0; with 0 the map stays the identity.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for an argument out of range, fewer samples than folds, or logits of another number of classes than
            the fit's.

    Example:
        >>> logits = 2 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> swapped = logits[:, [1, 0, 2]].argmax(1)  # a network that takes two classes for each other
        >>> calibrator = MatrixScaling(off_diagonal_penalty=0.01).fit(logits, swapped)
        >>> bool((calibrator(logits).argmax(1) == swapped).float().mean() > 0.95)
        True

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2;
        penalties: M. Kull et al., "Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with
        Dirichlet calibration", NeurIPS 2019, section 4.
    """

    @check_types
    def __init__(
        self,
        *,
        off_diagonal_penalty: float = 100.0,
        bias_penalty: float = 1.0,
        cross_validate: bool = False,
        off_diagonal_grid: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0),
        bias_grid: Sequence[float] = (0.01, 1.0),
        num_folds: int = 5,
        seed: int = 0,
        max_iterations: int = 200,
    ) -> None:
        super().__init__(
            off_diagonal_penalty=off_diagonal_penalty,
            bias_penalty=bias_penalty,
            cross_validate=cross_validate,
            off_diagonal_grid=off_diagonal_grid,
            bias_grid=bias_grid,
            num_folds=num_folds,
            seed=seed,
            max_iterations=max_iterations,
        )

    def _features(self, logits: Tensor) -> Tensor:
        return logits


class DirichletCalibration(_MatrixMap):
    r"""Map all log-probabilities together: ``softmax(W log p + b)``, regularised and chosen by cross-validation.

    The map that is exact where the scores of every class are Dirichlet-distributed. As :class:`MatrixScaling`, with
    ``log p`` in the place of the logits: ``W log p`` is ``W z`` less the row sums of ``W`` times the log of the softmax
    denominator. The same penalties, the same cross-validation, here on by default.

    Args:
        cross_validate: whether to choose both penalties by cross-validation, and to predict the mean probability of the
            fold models; else one fit to all data.
        off_diagonal_penalty: lambda, at least 0, where ``cross_validate`` is off.
        bias_penalty: mu, at least 0, where ``cross_validate`` is off.
        off_diagonal_grid: values of lambda to choose from.
        bias_grid: values of mu to choose from; all pairs are tried.
        num_folds: folds, at least 2, each with its share of every class.
        seed: of the division into folds.
        max_iterations: most steps of L-BFGS for a fit, at least 0; with 0 the map stays the identity.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes; log-probabilities give the same.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for an argument out of range, fewer samples than folds, or logits of another number of classes than
            the fit's.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(400, 3, generator=generator)
        >>> labels = torch.multinomial((2 * logits + torch.tensor([1.0, 0, 0])).softmax(1), 1, generator=generator)
        >>> calibrator = DirichletCalibration(off_diagonal_grid=[0.1, 10], bias_grid=[0.1]).fit(logits, labels[:, 0])
        >>> calibrator.weight.shape, calibrator.fit_info["nll_after"] < calibrator.fit_info["nll_before"] - 0.1
        (torch.Size([5, 3, 3]), True)

    Reference:
        M. Kull, M. Perello-Nieto, M. Kängsepp, T. Silva Filho, H. Song, P. Flach, "Beyond temperature scaling:
        Obtaining well-calibrated multiclass probabilities with Dirichlet calibration", NeurIPS 2019, equation 1 and
        section 4.
    """

    @check_types
    def __init__(
        self,
        *,
        cross_validate: bool = True,
        off_diagonal_penalty: float = 100.0,
        bias_penalty: float = 1.0,
        off_diagonal_grid: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0),
        bias_grid: Sequence[float] = (0.01, 1.0),
        num_folds: int = 5,
        seed: int = 0,
        max_iterations: int = 200,
    ) -> None:
        super().__init__(
            off_diagonal_penalty=off_diagonal_penalty,
            bias_penalty=bias_penalty,
            cross_validate=cross_validate,
            off_diagonal_grid=off_diagonal_grid,
            bias_grid=bias_grid,
            num_folds=num_folds,
            seed=seed,
            max_iterations=max_iterations,
        )

    def _features(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)


def _check_max_iterations(max_iterations: int) -> None:
    if max_iterations < 0:
        raise ValueError(f"max_iterations must be at least 0, got {max_iterations!r}")


def _loss_and_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood and its gradient in the logits."""
    log_probs = logits.log_softmax(1)
    index = labels[:, None]
    residual = log_probs.exp()
    residual.scatter_add_(1, index, residual.new_full((1, 1), -1.0).expand_as(index))
    return -log_probs.gather(1, index).sum(), residual


def _matrix_loss(parameters: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean negative log-likelihood and its gradient; ``parameters`` is ``W^T`` above ``b``."""
    loss, gradient = features.new_zeros(()), torch.zeros_like(parameters)
    for rows, classes in row_tiles(features, labels):
        part, residual = _loss_and_residual(torch.addmm(parameters[-1], rows, parameters[:-1]), classes)
        loss += part
        gradient[:-1].addmm_(rows.T, residual)
        gradient[-1] += residual.sum(0)
    return loss / len(labels), gradient / len(labels)


def _fit_matrix(
    features: Tensor,
    labels: Tensor,
    off_diagonal_penalty: float,
    bias_penalty: float,
    max_iterations: int,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
) -> tuple[Tensor, int, bool]:
    num_classes = features.shape[1]
    identity = torch.eye(num_classes + 1, num_classes, dtype=features.dtype, device=features.device)
    penalty = (1 - identity) * off_diagonal_penalty / (num_classes * (num_classes - 1))
    penalty[-1] = bias_penalty / num_classes
    start = identity if start is None else start

    def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = _matrix_loss(parameters, features, labels)
        weighted = penalty * parameters
        return loss + (weighted * parameters).sum(), gradient.add_(weighted, alpha=2)

    curvature = 2 * penalty
    for rows, _ in row_tiles(features, labels):
        probs = torch.addmm(start[-1], rows, start[:-1]).softmax(1)
        spread = probs * (1 - probs) / len(labels)
        curvature[:-1].addmm_(rows.T**2, spread)
        curvature[-1] += spread.sum(0)
    return _minimize(objective, start, curvature, max_iterations, tolerance)


def _minimize(
    objective: _Objective, start: Tensor, curvature: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int, bool]:
    """Minimise a convex function by L-BFGS in coordinates whose first curvature is 1; return what it took, too.

    ``tolerance`` is that of the largest slope in these coordinates; the loss is within about its square times the
    number of parameters.
    """
    from scipy.optimize import minimize

    if max_iterations == 0:
        return start, 0, True
    # Without a floor a class that is hardly ever predicted would get steps without measure.
    unit = curvature.clamp_min(1e-6).rsqrt()

    def position(steps: Tensor) -> Tensor:
        return start + unit * steps.to(start.device, start.dtype).view_as(start)

    def scaled(steps: object) -> tuple[float, object]:
        loss, gradient = objective(position(torch.as_tensor(steps)))
        return float(loss), (gradient * unit).flatten().cpu().numpy()

    options = {"maxiter": max_iterations, "maxfun": 4 * max_iterations, "maxcor": 20, "ftol": 0.0}
    options["gtol"] = tolerance
    found = minimize(scaled, torch.zeros(start.numel()).double().numpy(), jac=True, method="L-BFGS-B", options=options)
    converged = float(abs(found.jac).max()) <= 10 * tolerance
    return position(torch.as_tensor(found.x)), int(found.nit), converged
