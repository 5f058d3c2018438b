r"""How far a decision boundary is tilted away from the line between two classes, and how near that brings it to them.

The classifier that asks which class mean is nearest has its boundary half-way between the means, at right angles to
the line between them. A boundary tilted by an angle :math:`\theta` (and through the same point) is nearer to the means
by the factor :math:`\cos\theta`: small perturbations cross it. Tilting along directions in which the data hardly vary
costs no accuracy, so nothing in ordinary training stops it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_plugins.checks import check_types
from lightning_plugins.robustness.attack import LogitsFn, attacking
from lightning_plugins.robustness.geometry import _Sums

__all__ = ["BoundaryTilting", "adversarial_strength", "deviation_angle", "input_jacobian", "tilting_type"]


@check_types
def deviation_angle(weight: Tensor, positive_mean: Tensor, negative_mean: Tensor) -> Tensor:
    r"""Return the angle between a linear classifier and the nearest-mean classifier.

    :math:`\theta = \arccos(\hat c \cdot \hat z)`, with :math:`\hat c` the direction of ``weight`` and :math:`\hat z`
    that from the negative to the positive mean.

    Args:
        weight: of the linear classifier, which answers the sign of ``weight @ x + bias``, ``(..., d)``, not 0.
        positive_mean: of the class that it should answer with a positive value, ``(..., d)``.
        negative_mean: of the other class, ``(..., d)``.

    Returns:
        ``(...)``, float64, in degrees, in [0, 180]; NaN where ``weight`` or the difference of the means is 0.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> deviation_angle(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(45., dtype=torch.float64)

    Reference:
        T. Tanay, L. Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016.
    """
    weight, difference = _weight_and_difference(weight, positive_mean, negative_mean)
    return _angle(weight, difference)


@check_types
def adversarial_strength(weight: Tensor, bias: Tensor | float, positive_mean: Tensor, negative_mean: Tensor) -> Tensor:
    r"""Return how many times nearer the boundary of a linear classifier is to each mean than the bisector of the means.

    For a boundary half-way between the means it is :math:`1 / \cos\theta` for both, with :math:`\theta` the
    :func:`deviation_angle`. With an offset the distances to the means differ, and so do the strengths.

    Args:
        weight: ``(..., d)``, not 0.
        bias: a number or ``(...)``.
        positive_mean: of the class that the classifier should answer with a positive value, ``(..., d)``.
        negative_mean: of the other class, ``(..., d)``.

    Returns:
        Strengths for the positive and the negative mean, ``(..., 2)``, float64: 1 for a boundary as far away as the
        bisector, larger for a nearer one, infinite for one through the mean, negative where the mean is misclassified.

    Raises:
        ValueError: for wrong shapes.

    Example:
        >>> mean = torch.tensor([1.0, 0.0])
        >>> adversarial_strength(torch.tensor([3.0, 4.0]), 0.0, mean, -mean)  # cos = 0.6
        tensor([1.6667, 1.6667], dtype=torch.float64)

    Reference:
        T. Tanay, L. Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016. How an
        offset counts is our choice.
    """
    weight, difference = _weight_and_difference(weight, positive_mean, negative_mean)
    offset = torch.as_tensor(bias, dtype=torch.float64, device=weight.device)
    margins = [sign * ((weight * mean).sum(-1) + offset) for sign, mean in ((1, positive_mean), (-1, negative_mean))]
    both = torch.stack(torch.broadcast_tensors(*margins), -1)  # type: ignore[no-untyped-call]
    to_boundary = both / _length(weight)[..., None]
    return _length(difference)[..., None] / 2 / to_boundary


@check_types
def tilting_type(
    angle: Tensor, error: Tensor, *, weak: float = 30.0, strong: float = 75.0, max_error: float = 0.25
) -> Tensor:
    """Sort boundaries by how far they are tilted, and by whether they separate the classes all the same.

    Type 0, hardly tilted: adversarial examples are as far away as the classes allow. Type 1, tilted moderately, which
    commonly costs accuracy as well. Type 2, tilted strongly though it separates the classes: it leans on directions in
    which the data hardly vary, which is overfitting, and regularisation cures it.

    Args:
        angle: deviation angles in degrees, in [0, 180], of any shape.
        error: share of the samples of the two classes on the wrong side, in [0, 1], of the same shape.
        weak: angle at which type 1 begins. At the default of 30 degrees the boundary is 1.15 times as near.
        strong: angle at which type 2 begins. At the default of 75 degrees the boundary is 3.9 times as near.
        max_error: largest error of type 2. The default is half of that of guessing. A boundary that is tilted strongly
            and errs more was not learned for these classes, as in an untrained network: -1.

    Returns:
        0, 1, 2 or -1, int64, of the shape of ``angle``; -1 also where an argument is NaN.

    Raises:
        ValueError: for shapes that differ, or thresholds out of order.

    Example:
        >>> tilting_type(torch.tensor([5.0, 50.0, 88.0, 88.0]), torch.tensor([0.0, 0.2, 0.01, 0.5]))
        tensor([ 0,  1,  2, -1])

    Reference:
        T. Tanay, L. Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016. The
        thresholds are our choice.
    """
    if not 0 <= weak <= strong <= 180:
        raise ValueError(f"need 0 <= weak <= strong <= 180, got weak={weak!r}, strong={strong!r}")
    if not 0 <= max_error <= 1:
        raise ValueError(f"max_error must lie in [0, 1], got {max_error!r}")
    if angle.shape != error.shape:
        raise ValueError(f"angle and error must have one shape, got {tuple(angle.shape)} and {tuple(error.shape)}")
    kind = (angle >= weak).long() + (angle >= strong)
    unknown = angle.isnan() | error.isnan() | ((kind == 2) & (error > max_error))
    return torch.where(unknown, -1, kind)


def input_jacobian(logits_fn: LogitsFn, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and the derivative of each logit with respect to the input.

    One forward pass, and one backward pass for each of the C classes. A module is asked in evaluation mode and given
    back as it was. Works inside ``no_grad`` and ``inference_mode``.

    Args:
        logits_fn: from inputs to logits ``(N, C)``.
        inputs: ``(N, ...)``, floating-point.

    Returns:
        Logits ``(N, C)``, at least float32, and the derivatives ``(N, C, ...)`` in the type of the inputs.

    Raises:
        ValueError: if the inputs are not floating-point, or the logits do not depend on them through autograd.

    Example:
        >>> logits, jacobian = input_jacobian(lambda x: x @ torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.ones(1, 2))
        >>> jacobian
        tensor([[[1., 2.],
                 [0., 3.]]])
    """
    if not inputs.is_floating_point() or inputs.ndim < 2:
        raise ValueError(f"inputs must be floating-point (N, ...), got {inputs.dtype} {tuple(inputs.shape)}")
    with attacking(logits_fn, inputs, full_precision=True) as network:
        images = inputs.detach().clone().requires_grad_()
        logits = network.forward(images)
        if not logits.requires_grad:
            raise ValueError(
                "the logits do not depend on the inputs through autograd; remove detach() or no_grad() from the network"
            )
        totals = logits.sum(0).unbind()
        rows = [
            torch.autograd.grad(total, [images], retain_graph=k + 1 < len(totals))[0] for k, total in enumerate(totals)
        ]
        return logits.detach(), torch.stack(rows, 1)


class BoundaryTilting(_Sums):
    r"""How far a classifier's boundary between each pair of classes is tilted, and how near to the classes it is.

    Between classes a and b the mean of :math:`\nabla (o_a - o_b)` over samples of both, each class with half of the
    weight, stands in for the weight of a linear classifier. For a linear network all values are exact; for others they
    describe the boundary to first order, as seen from the data. Between classes whose gradients point in all directions
    the mean is short and the boundary seems farther than it is.

    The states hold ``num_classes ** 2 * num_features`` float64 numbers: 2.5 MB for CIFAR-10.

    Args:
        num_classes: C, at least 2.
        num_features: elements d of one input.
        reduction: ``"mean"`` for one value of each over the pairs of classes, ``"none"`` for matrices.

    Shape:
        - ``update(inputs, logits, jacobian, target)``: inputs ``(N, ...)`` with d elements each, logits ``(N, C)`` and
          the derivative of each logit with respect to the input ``(N, C, ...)`` as :func:`input_jacobian` returns them,
          all floating-point; true classes ``(N,)``.

    Returns:
        ``compute()``: a dictionary of float32 tensors. For ``"none"``, ``(C, C)`` each with NaN on the diagonal:
        ``angle`` in degrees in [0, 180], symmetric; ``strength``, how many times nearer to the mean of the row's class
        the boundary is than the bisector of the means; ``error``, the share of the row's class on the column's side of
        the boundary. For ``"mean"``, scalars: the mean angle and error, and the sum of the distances to the bisectors
        over the sum of those to the boundaries. Classes without samples are left out, and named in a warning. NaN where
        nothing is left, or where two classes have the same mean or no gradient tells them apart.
        :meth:`types` sorts the pairs.

    Raises:
        ValueError: for wrong arguments or shapes, labels outside of ``[0, C)``, or values that are not finite.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> inputs, target = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1])
        >>> metric = BoundaryTilting(num_classes=2, num_features=2)
        >>> metric(inputs, *input_jacobian(lambda x: x @ weight.T, inputs), target)
        {'angle': tensor(45.), 'strength': tensor(1.4142), 'error': tensor(0.)}

    Reference:
        T. Tanay, L. Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016. Mean
        gradients in place of weights are our choice.
    """

    higher_is_better = None

    inputs: Tensor
    logits: Tensor
    gradients: Tensor
    wrong: Tensor
    counts: Tensor
    problems: Tensor

    @check_types
    def __init__(self, num_classes: int, num_features: int, *, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features!r}")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        self.num_classes, self.num_features, self.reduction = num_classes, num_features, reduction
        square = (num_classes, num_classes)
        for name, shape in (("inputs", (num_classes, num_features)), ("logits", square)):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gradients", torch.zeros(*square, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("wrong", torch.zeros(square, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, inputs: Tensor, logits: Tensor, jacobian: Tensor, target: Tensor) -> None:
        """Add one batch; see the class for shapes."""
        n, c, d = len(target), self.num_classes, self.num_features
        if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"target must hold integer classes (N,), got {tuple(target.shape)} of {target.dtype}")
        rows = {"inputs": (inputs, (n, d)), "logits": (logits, (n, c)), "jacobian": (jacobian, (n, c, d))}
        for name, (tensor, shape) in rows.items():
            fits = tensor.shape[: len(shape) - 1] == shape[:-1] and tensor.numel() == math.prod(shape)
            fits &= name != "logits" or tensor.ndim == 2
            if not fits or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must be floating-point {shape} up to a flattening of the input, got "
                    f"{tuple(tensor.shape)} of {tensor.dtype}"
                )
        known = (target >= 0) & (target < c)
        finite = torch.stack([tensor.isfinite().all() for tensor, _ in rows.values()]).all()
        problems = torch.stack([~known.all(), ~finite]).long()
        if problems.device.type == "cpu":
            _raise_for(problems, c)
        classes = target.long().clamp(0, c - 1)
        dtype = self.inputs.dtype
        own = logits.gather(1, classes[:, None])
        # Not in place: a state that was reset under inference mode could not be written outside of it.
        self.inputs = self.inputs.index_add(0, classes, inputs.reshape(n, d).to(dtype))
        self.logits = self.logits.index_add(0, classes, logits.to(dtype))
        self.gradients = self.gradients.index_add(0, classes, jacobian.reshape(n, c, d).to(dtype))
        self.wrong = self.wrong.index_add(0, classes, (logits >= own).long())
        self.counts = self.counts + torch.bincount(classes, minlength=c)
        self.problems = self.problems + problems

    def compute(self) -> dict[str, Tensor]:
        """Return angles, strengths and errors of all batches, of all processes."""
        angle, error, to_bisector, to_boundary = self._pairs()
        if self.reduction == "none":
            strength = to_bisector / to_boundary
            return {"angle": angle.float(), "strength": strength.float(), "error": error.float()}
        strength = to_bisector.nansum() / to_boundary.nansum()
        return {"angle": angle.nanmean().float(), "strength": strength.float(), "error": error.nanmean().float()}

    def types(self, *, weak: float = 30.0, strong: float = 75.0, max_error: float = 0.25) -> Tensor:
        """Return :func:`tilting_type` of each pair, int64 ``(C, C)``, of this process alone; -1 on the diagonal."""
        angle, error, _, _ = self._pairs()
        return tilting_type(angle, (error + error.T) / 2, weak=weak, strong=strong, max_error=max_error)

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _raise_for(self.problems, self.num_classes)
        if not self.counts.all():
            missing = (self.counts == 0).nonzero().flatten().tolist()
            rank_zero_warn(f"BoundaryTilting leaves out classes without samples: {missing}", UserWarning)
        counts = self.counts.to(self.inputs.dtype)[:, None]
        means, logits, gradients = self.inputs / counts, self.logits / counts, self.gradients / counts[..., None]
        # [k, c]: the mean over class k of the gradient of o_k - o_c.
        toward = gradients.diagonal().T[:, None] - gradients
        normal = (toward - toward.transpose(0, 1)) / 2
        difference = means[:, None] - means
        to_boundary = (logits.diagonal()[:, None] - logits) / _length(normal)
        to_bisector = _length(difference) / 2
        to_bisector = torch.where(to_boundary.isnan(), torch.nan, to_bisector)
        seen = self.counts > 0
        unknown = torch.eye(self.num_classes, device=counts.device).bool() | ~(seen[:, None] & seen)
        results = (_angle(normal, difference), self.wrong / counts, to_bisector, to_boundary)
        angle, error, to_bisector, to_boundary = (result.masked_fill(unknown, torch.nan) for result in results)
        return angle, error, to_bisector, to_boundary


def _raise_for(problems: Tensor, num_classes: int) -> None:
    unknown, infinite = problems.tolist()
    if unknown:
        raise ValueError(f"target must lie in [0, {num_classes}); leave out samples to be ignored")
    if infinite:
        raise ValueError("inputs, logits and jacobian must be finite, found NaN or infinity; look at the model")


def _weight_and_difference(weight: Tensor, positive_mean: Tensor, negative_mean: Tensor) -> tuple[Tensor, Tensor]:
    tensors = {"weight": weight, "positive_mean": positive_mean, "negative_mean": negative_mean}
    for name, tensor in tensors.items():
        if tensor.ndim < 1 or not tensor.is_floating_point() or tensor.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"{name} must be floating-point (..., d) with the d of the weight, got {tuple(tensor.shape)} of "
                f"{tensor.dtype}"
            )
    return weight.double(), positive_mean.double() - negative_mean.double()


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """Return degrees; unlike the arc cosine, exact for small angles too."""
    first, second = first / _length(first)[..., None], second / _length(second)[..., None]
    return (2 * torch.atan2(_length(first - second), _length(first + second))).rad2deg()
