"""h-calibration: a monotone map whose probabilities, in order of size, sum to the number of events they announce."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.calibration._criteria import criterion_of
from lightning_plugins.calibration.calibrator import Calibrator
from lightning_plugins.calibration.monotone_maps import (
    IntegralMap,
    MonotoneMap,
    PiecewiseLinearMap,
    TemperatureEnsemble,
)
from lightning_plugins.checks import check_types
from lightning_plugins.losses import check_range

__all__ = ["HCalibration", "MapName", "Selector", "h_calibration_loss"]

MapName = Literal["linear", "piecewise_linear", "nonlinear"]
"""Temperature ensemble, piecewise-linear map, integral of a small network."""

Selector = Literal["debiased_ece", "classwise_ece", "ece", "nll"]
"""What decides between the states that a fit passes through, all on the data of the fit."""

_LLOYD_STEPS = 25


@check_types
def h_calibration_loss(
    probs: Tensor,
    labels: Tensor,
    *,
    window: int = 200,
    num_clusters: int = 15,
    tolerance: float = 1e-20,
    leave_one_class_out: bool = False,
) -> Tensor:
    r"""Return how far the running mean of ``p - y`` over all class events, ordered by ``p``, strays from zero.

    Each of the ``N C`` probabilities is a forecast of the event that its class is the true one. Sorted by probability
    :math:`p_{(1)} \le p_{(2)} \le \dots`, with outcomes :math:`y_{(l)} \in \{0, 1\}` and window :math:`M`,

    .. math:: e_j = \max\Big(0, \Big|\frac1{M+1}\sum_{|l-j| \le M/2} (p_{(l)} - y_{(l)})\Big| - \epsilon\Big),

    averaged within each of ``num_clusters`` clusters of the probabilities (1-D k-means) and then over the clusters, so
    that the many probabilities near 0 do not outweigh the rest. Order and clusters are constants of the gradient.

    For perfectly calibrated probabilities it is the noise of a mean of ``window + 1`` events, about
    :math:`E|\mathcal N(0, p(1-p)/(M+1))|`, and not 0, however many samples there are. Running sums, in float64, make
    the cost independent of the window. The published code multiplies by 1e5, smooths by convolution, and clusters a
    random subsample from a random start; clusters here are those of Lloyd's algorithm from even centres.

    Args:
        probs: ``(N, C)`` probabilities in [0, 1].
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        window: even, at least 0 and below ``N C``; the mean is over ``window + 1`` neighbours, zeros past the ends.
        num_clusters: at least 1; empty ones do not count.
        tolerance: the :math:`\epsilon` by which the running mean may stray for nothing, at least 0.
        leave_one_class_out: average the loss over classes, each time without the samples of that class; a pass for
            each class.

    Returns:
        A scalar of the type of ``probs``, in [0, 1].

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, labels that are no classes, or fewer than ``window + 1`` events.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> h_calibration_loss(probs, torch.tensor([0] * 6 + [1] * 4), window=0, num_clusters=2)
        tensor(0.4200)

    Reference:
        W. Huang et al., "h-calibration: Rethinking Classifier Recalibration with Probabilistic Error-Bounded
        Objective", and its code (``loss/hCalib.py``).
    """
    _check_options(window, num_clusters, tolerance)
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating-point, got {probs.dtype}; pass logits.softmax(1)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer classes, got {labels.dtype}; use labels.argmax(1) or labels.long()")
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs must have shape (N, C) and labels (N,), got {tuple(probs.shape)} and {tuple(labels.shape)}; pass "
            "one row of probabilities and one class index for each sample"
        )
    check_range(labels, probs.shape[1])
    if probs.numel() < window + 1:
        raise ValueError(
            f"a window of {window} needs at least {window + 1} class events, got {len(probs)} samples x "
            f"{probs.shape[1]} classes; lower window or pass more samples"
        )
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call, unused-ignore]
        probs, labels.long(), window, num_clusters, tolerance, leave_one_class_out
    )
    return loss


class _Loss(torch.autograd.Function):
    """The loss and, because it costs no more than another running sum, its gradient, in the forward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        probs: Tensor,
        labels: Tensor,
        window: int,
        num_clusters: int,
        tolerance: float,
        leave_one_class_out: bool,
    ) -> Tensor:
        values, order, hits = _sorted_events(probs, labels)
        gradient = torch.zeros(probs.numel(), dtype=torch.float64, device=probs.device)
        if leave_one_class_out:
            rows, total, classes = order // probs.shape[1], values.new_zeros(()), torch.unique(labels)
            for one in classes.tolist():
                kept = (labels != one)[rows]
                if int(kept.sum()) < window + 1:
                    raise ValueError(
                        f"a window of {window} needs at least {window + 1} class events, got {int(kept.sum())} without "
                        f"class {one}; lower window or set leave_one_class_out=False"
                    )
                loss, part = _loss_of_sorted(values[kept], hits[kept], window, num_clusters, tolerance)
                total = total + loss / len(classes)
                gradient.index_add_(0, order[kept], part / len(classes))
        else:
            total, part = _loss_of_sorted(values, hits, window, num_clusters, tolerance)
            gradient.scatter_(0, order, part)
        ctx.save_for_backward(gradient.view_as(probs).to(probs.dtype))
        return total.to(probs.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * gradient, None, None, None, None, None


def _sorted_events(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all probabilities in ascending order as float64, their positions, and whether each event happened."""
    flat = probs.detach().flatten()
    hit_positions = torch.arange(len(labels), device=probs.device) * probs.shape[1] + labels
    if probs.dtype == torch.float32 and len(flat) < 2**30 and bool((flat >= 0).all()):
        # The bits of floats that are not negative are ordered as the floats are. Integers sort several times faster
        # than pairs, and bring along where they came from and whether the event happened.
        keys = ((flat + 0.0).view(torch.int32).long() << 32).add_(torch.arange(0, 2 * len(flat), 2, device=flat.device))
        keys[hit_positions] += 1
        keys = keys.sort().values
        values = (keys >> 32).int().view(torch.float32).double()
        return values, (keys & 0xFFFFFFFE) >> 1, (keys & 1).double()
    hits = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    hits[hit_positions] = 1
    values, order = flat.sort(stable=True)
    return values.double(), order, hits[order]


def _loss_of_sorted(
    values: Tensor, hits: Tensor, window: int, num_clusters: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of sorted events and its gradient in their probabilities, both float64."""
    means = _window_sums(values - hits, window) / (window + 1)
    excess = (means.abs() - tolerance).clamp_min(0)
    bounds = _cluster_bounds(values, num_clusters).tolist()
    clusters = [slice(first, last) for first, last in itertools.pairwise(bounds) if last > first]
    slope = means.sign().mul_(excess > 0)
    loss = torch.stack([excess[cluster].mean() for cluster in clusters]).mean()
    for cluster in clusters:
        slope[cluster] /= len(clusters) * (cluster.stop - cluster.start)
    # An event is in the windows of the same neighbours that are in its own.
    return loss, _window_sums(slope, window) / (window + 1)


def _window_sums(values: Tensor, window: int) -> Tensor:
    """Return the sum over each position's ``window + 1`` neighbours, with zeros past the ends."""
    half, count = window // 2, len(values)
    sums = F.pad(values.cumsum(0), (1 + half, 0))
    right = F.pad(sums[1 + 2 * half :], (0, half), value=0.0)
    right[count - half :] = sums[-1]
    return right - sums[:count]


def _cluster_bounds(values: Tensor, num_clusters: int) -> Tensor:
    """Return where the clusters of 1-D k-means begin and end in sorted values, ``(num_clusters + 1,)``."""
    count = len(values)
    sums = F.pad(values.cumsum(0), (1, 0))
    first, last = values[0], values[-1]
    steps = (torch.arange(num_clusters, device=values.device, dtype=values.dtype) + 0.5) / num_clusters
    centres = first + (last - first) * steps
    ends = torch.tensor([0, count], device=values.device)
    for _ in range(_LLOYD_STEPS):
        inner = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        bounds = torch.cat([ends[:1], inner, ends[1:]])
        sizes = bounds.diff()
        means = sums[bounds].diff() / sizes.clamp_min(1)
        # A cluster without members stays where it is, which keeps the centres in order.
        centres = torch.where(sizes > 0, means, centres)
    return bounds


class HCalibration(Calibrator):
    """A map that keeps the order of the classes, fitted by :func:`h_calibration_loss`.

    Where one temperature is too stiff, because a net is overconfident at some confidences and not at others, this map
    bends; where one temperature is enough it gains nothing, and it usually pays with a little likelihood.

    Adam runs on all rows, or on batches of ``batch_size``; the step halves when the ECE has stalled for half of
    ``patience`` epochs, the fit stops after ``patience``, and the best state by ``select_by``, the identity included,
    is kept. All of that is measured on the data of the fit, as in the published code, which halves sooner (after 20
    epochs), stops later (after 160), and ends with about the same ECE on test data. ``fit_info`` also holds
    ``iterations`` (epochs), ``best_iteration``, ``selector`` (its best value), ``selector_before`` and ``window``.

    Args:
        map: ``"piecewise_linear"`` (:class:`.PiecewiseLinearMap`), ``"linear"`` (:class:`.TemperatureEnsemble`) or
            ``"nonlinear"`` (:class:`.IntegralMap`).
        size: segments, members, or width of the hidden layers; default 100, 32, 10.
        select_by: ``"debiased_ece"`` for the confidence of the predicted class, ``"classwise_ece"`` for the
            probabilities of all classes, ``"nll"`` for proper scores, or ``"ece"``.
        window: neighbours in the running mean of the loss; even. Less data than that lowers it.
        leave_one_class_out: as in the loss; costs as many times more as there are classes and has changed no second
            digit for us.
        learning_rate: of Adam, positive.
        max_epochs: at least 1.
        patience: epochs without a better ECE after which to stop, at least 1.
        step_patience: epochs without a better ECE after which the step halves, at least 1; default half of
            ``patience``. The published schedule is ``patience=160, step_patience=20``.
        batch_size: rows of a step; all rows if there are no more.
        seed: of the private generator that draws first values and batches.
        progress: whether to show a bar; default on terminals, for fits of more than 5 seconds.

    Shape:
        - Input: logits ``(..., C)``.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(400, 5, generator=generator)
        >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        >>> calibrator = HCalibration(max_epochs=500).fit(3 * logits, labels)
        >>> calibrator.fit_info["selector"] < calibrator.fit_info["selector_before"] / 2
        True

    Reference:
        W. Huang et al., "h-calibration: Rethinking Classifier Recalibration with Probabilistic Error-Bounded
        Objective". Our piecewise-linear map is continuous, the published one is not; see :func:`.piecewise_linear`.
    """

    _looks_up = True
    preserves_ranking = True

    @check_types
    def __init__(
        self,
        map: MapName = "piecewise_linear",
        *,
        size: int | None = None,
        select_by: Selector = "debiased_ece",
        window: int = 200,
        leave_one_class_out: bool = False,
        learning_rate: float = 5e-3,
        max_epochs: int = 2000,
        patience: int = 80,
        step_patience: int | None = None,
        batch_size: int = 5000,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        super().__init__()
        if map not in get_args(MapName):
            raise ValueError(f"map must be one of {', '.join(get_args(MapName))}, got {map!r}")
        if select_by not in get_args(Selector):
            raise ValueError(f"select_by must be one of {', '.join(get_args(Selector))}, got {select_by!r}")
        _check_options(window, 1, 0.0)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate!r}; 5e-3 is the default")
        for name, value in {"max_epochs": max_epochs, "patience": patience, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        for name, number in {"size": size, "step_patience": step_patience}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number!r}")
        self.map: MonotoneMap
        if map == "linear":
            self.map = TemperatureEnsemble(size or 32)
        elif map == "piecewise_linear":
            self.map = PiecewiseLinearMap(size or 100)
        else:
            self.map = IntegralMap(size or 10)
        self.map_name, self.select_by, self.window = map, select_by, window
        self.leave_one_class_out = leave_one_class_out
        self.learning_rate, self.max_epochs, self.patience = learning_rate, max_epochs, patience
        self.step_patience = step_patience
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def extra_repr(self) -> str:
        """Show the map and the selector."""
        return f"map={self.map_name!r}, select_by={self.select_by!r}"

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        generator = torch.Generator().manual_seed(self.seed)
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        leaves = {name: leaf.requires_grad_() for name, leaf in self.map.start(log_probs, generator).items()}
        optimizer = torch.optim.Adam(list(leaves.values()), lr=self.learning_rate)
        step_patience = self.patience // 2 if self.step_patience is None else self.step_patience
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=step_patience)
        # A last batch of a few rows joins the others: alone it is too short for the running mean.
        num_batches = max(1, len(labels) // self.batch_size)
        events = len(labels) // num_batches * log_probs.shape[1]
        window = min(self.window, (events - 1) // 2 * 2)

        def step(mapped: Tensor, classes: Tensor) -> None:
            loss = h_calibration_loss(
                mapped.exp(), classes, window=window, leave_one_class_out=self.leave_one_class_out
            )
            optimizer.zero_grad()
            torch.autograd.backward(1e5 * loss)  # the published factor: beside it Adam's eps is nothing
            optimizer.step()

        before = best = criterion_of(log_probs, labels, self.select_by)
        best_leaves: dict[str, Tensor] | None = None
        lowest_ece, best_epoch, stalled, epoch = float("inf"), 0, 0, 0
        epochs = progress_bar(
            range(self.max_epochs + 1), title=f"h-calibration, {self.map_name} map", show=self.progress
        )
        for epoch in epochs:
            # With one batch, the pass that measures the state is also the one that improves it.
            with torch.set_grad_enabled(num_batches == 1):
                mapped = self.map.evaluate(leaves, log_probs)
            state = mapped.detach()
            value, error = (criterion_of(state, labels, by) for by in (self.select_by, "ece"))
            if value < best:
                best, best_epoch = value, epoch
                best_leaves = {name: leaf.detach().clone() for name, leaf in leaves.items()}
            lowest_ece, stalled = (error, 0) if error < lowest_ece else (lowest_ece, stalled + 1)
            if stalled >= self.patience or epoch == self.max_epochs:
                break
            if epoch:
                schedule.step(error)
            if num_batches == 1:
                step(mapped, labels)
                continue
            for rows in torch.randperm(len(labels), generator=generator).to(labels.device).tensor_split(num_batches):
                step(self.map.evaluate(leaves, log_probs[rows]), labels[rows])
        epochs.close()
        if best_leaves is None:
            self.map.reset()
        else:
            self.map.store(best_leaves)
        return {
            "iterations": epoch,
            "converged": stalled >= self.patience,
            "best_iteration": best_epoch,
            "selector": best,
            "selector_before": before,
            "window": window,
        }

    def _calibrate(self, logits: Tensor) -> Tensor:
        log_probs: Tensor = self.map(logits.log_softmax(-1))
        return log_probs


def _check_options(window: int, num_clusters: int, tolerance: float) -> None:
    if window < 0 or window % 2:
        raise ValueError(f"window must be even and at least 0, got {window!r}; the published value is 200")
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters!r}; the published value is 15")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}; the published value is 1e-20")
