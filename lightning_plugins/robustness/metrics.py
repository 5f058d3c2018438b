"""Accuracy under attack per class: how often, for which classes, and how unequally.

Every metric here counts the same four things per class, so that one attack feeds them all and a ``MetricCollection``
keeps the counts once. None of them runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from lightning_plugins.checks import check_types

__all__ = [
    "AccuracyDisparity",
    "AttackSuccessRate",
    "Average",
    "BalancedRobustAccuracy",
    "DisparityMode",
    "RobustAccuracy",
    "RobustErrorDecomposition",
    "TailRobustAccuracy",
    "WorstClassRobustAccuracy",
    "groups_by_count",
    "halves_by_count",
]

Average = Literal["micro", "macro", "none"]
"""Over all samples, over classes, or not at all: one value per class."""

DisparityMode = Literal["range", "std", "head_tail"]
"""Best minus worst class, standard deviation over classes, or mean of some classes minus mean of others."""


class _Outcomes(Metric):
    """What the metrics of this file share: per class, how many samples, right when clean, when attacked, and both.

    On a CPU, wrong input is refused by ``update``; on other devices, where looking would make the device wait, by
    ``compute``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    clean: Tensor
    attacked: Tensor
    both: Tensor
    problems: Tensor

    @check_types
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        self.num_classes = num_classes
        for name in ("total", "clean", "attacked", "both"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, pred_clean: Tensor, pred_adv: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            pred_clean: for the images as they are: logits or probabilities ``(N, C)``, or predicted classes ``(N,)``.
            pred_adv: the same for the attacked images.
            target: true classes ``(N,)``, integers in ``[0, C)``.
        """
        if target.ndim != 1 or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(
                f"target must hold integer classes (N,), got {tuple(target.shape)} of {target.dtype}; for one-hot rows "
                "pass target.argmax(1)"
            )
        clean, clean_nan = _classes("pred_clean", pred_clean, len(target), self.num_classes)
        attacked, attacked_nan = _classes("pred_adv", pred_adv, len(target), self.num_classes)
        known = (target >= 0) & (target < self.num_classes)
        problems = torch.stack([clean_nan | attacked_nan, ~known.all()]).long()
        if problems.device.type == "cpu":
            _raise_for(problems, self.num_classes)
        right = torch.stack([known, clean == target, attacked == target])
        outcomes = torch.cat([right, right[1:2] & right[2:]]).long() * known
        counts = outcomes.new_zeros(4, self.num_classes)
        counts = counts.index_add(1, target.long().clamp(0, self.num_classes - 1), outcomes)
        # Not in place: a state that was reset under inference mode could not be written outside of it.
        self.total, self.clean = self.total + counts[0], self.clean + counts[1]
        self.attacked, self.both = self.attacked + counts[2], self.both + counts[3]
        self.problems = self.problems + problems

    def _robust(self, require_clean: bool) -> Tensor:
        _raise_for(self.problems, self.num_classes)
        return self.both if require_clean else self.attacked

    def _present(self, whole: Tensor, what: str = "samples") -> Tensor:
        """Return which classes have a share to speak of ``(C,)``, and warn of the others."""
        present = whole > 0
        if not present.all():
            missing = (~present).nonzero().flatten().tolist()
            rank_zero_warn(f"{type(self).__name__} leaves out classes without {what}: {missing}", UserWarning)
        return present

    def _share(self, part: Tensor, whole: Tensor, average: Average, what: str = "samples") -> Tensor:
        if average == "micro":
            return part.sum() / whole.sum()
        present = self._present(whole, what)
        return (part / whole)[present].mean() if average == "macro" else part / whole


class RobustAccuracy(_Outcomes):
    """Share of samples that the model gets right in spite of the attack.

    Args:
        num_classes: C, at least 2.
        average: ``"micro"`` over samples, ``"macro"`` over classes, ``"none"`` for each class.
        require_clean: count a sample only if its clean prediction is right too, as RobustBench does. Otherwise an
            attack that turns a wrong prediction into a right one adds to the robust accuracy.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: logits or probabilities ``(N, C)``, or predicted classes ``(N,)``,
          without and under attack; true classes ``(N,)`` integer in ``[0, C)``.

    Returns:
        ``compute()``: a float32 scalar in [0, 1], or ``(C,)``. A class without samples is NaN in ``"none"``, left out
        of ``"macro"``, and named in a warning.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = RobustAccuracy(num_classes=2)
        >>> clean, attacked = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1])
        >>> metric.update(clean, attacked, torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()  # the last sample is right under attack only
        tensor(0.5000)
        >>> per_class = RobustAccuracy(num_classes=2, average="none", require_clean=False)
        >>> per_class(clean, attacked, torch.tensor([0, 0, 1, 1]))
        tensor([0.5000, 1.0000])

    Reference:
        F. Croce et al., "RobustBench: a standardized adversarial robustness benchmark", NeurIPS Datasets and
        Benchmarks 2021, for ``require_clean``.
    """

    @check_types
    def __init__(self, num_classes: int, *, average: Average = "micro", require_clean: bool = True) -> None:
        super().__init__(num_classes)
        _check_choice("average", average, Average)
        self.average, self.require_clean = average, require_clean

    def compute(self) -> Tensor:
        """Return the robust accuracy of all batches, of all processes."""
        return self._share(self._robust(self.require_clean), self.total, self.average)


class BalancedRobustAccuracy(_Outcomes):
    """Robust accuracy averaged over classes: what it would be on a balanced test set.

    Args:
        num_classes: C, at least 2.
        require_clean: see :class:`RobustAccuracy`.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a float32 scalar in [0, 1]; classes without samples are left out, with a warning.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = BalancedRobustAccuracy(num_classes=2)
        >>> metric(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        tensor(0.5000)
    """

    @check_types
    def __init__(self, num_classes: int, *, require_clean: bool = True) -> None:
        super().__init__(num_classes)
        self.require_clean = require_clean

    def compute(self) -> Tensor:
        """Return the mean over classes of all batches, of all processes."""
        return self._share(self._robust(self.require_clean), self.total, "macro")


class WorstClassRobustAccuracy(_Outcomes):
    """Robust accuracy of the class that has the least.

    Under strong imbalance one class is often at 0 whatever the method; :class:`TailRobustAccuracy` tells more then.

    Args:
        num_classes: C, at least 2.
        require_clean: see :class:`RobustAccuracy`.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a float32 scalar in [0, 1]; classes without samples are left out, with a warning; NaN if there
        is no other.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = WorstClassRobustAccuracy(num_classes=2)
        >>> metric(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
        tensor(0.6667)
    """

    @check_types
    def __init__(self, num_classes: int, *, require_clean: bool = True) -> None:
        super().__init__(num_classes)
        self.require_clean = require_clean

    def compute(self) -> Tensor:
        """Return the least of the classes of all batches, of all processes."""
        accuracy = self._robust(self.require_clean) / self.total
        return _least(accuracy[self._present(self.total)])


class TailRobustAccuracy(_Outcomes):
    """Robust accuracy averaged over the classes of each of some groups, such as frequent and rare ones.

    Args:
        num_classes: C, at least 2.
        groups: a name and the classes of each group, as :func:`groups_by_count` and :func:`halves_by_count` make them.
            Groups may overlap and need not cover all classes.
        require_clean: see :class:`RobustAccuracy`.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a dictionary with a float32 scalar in [0, 1] for each group; classes without samples are left
        out, with a warning; NaN for a group that has no other.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, a group that is empty, repeats a class or names one outside
            ``[0, C)``, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = TailRobustAccuracy(3, groups={"head": [0], "tail": [1, 2]})
        >>> metric(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 1, 2]))
        {'head': tensor(1.), 'tail': tensor(0.7500)}
    """

    @check_types
    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]], *, require_clean: bool = True) -> None:
        super().__init__(num_classes)
        if not groups:
            raise ValueError("groups must name at least one group of classes; groups_by_count(counts) makes some")
        self.groups = {name: _class_group(f"group {name!r}", ids, num_classes) for name, ids in groups.items()}
        self.require_clean = require_clean

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each group of all batches, of all processes."""
        accuracy = self._robust(self.require_clean) / self.total
        self._present(self.total)
        return {name: accuracy[list(ids)].nanmean() for name, ids in self.groups.items()}


class AccuracyDisparity(_Outcomes):
    """How far classes are apart in clean and in robust accuracy.

    Args:
        num_classes: C, at least 2.
        mode: ``"range"``: best minus worst class; ``"std"``: standard deviation over classes (divided by their number,
            not by one less); ``"head_tail"``: mean over ``head`` minus mean over ``tail``.
        head: classes of the frequent side, for ``"head_tail"`` only.
        tail: classes of the rare side, for ``"head_tail"`` only.
        require_clean: see :class:`RobustAccuracy`.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a dictionary of float32 scalars ``clean`` and ``robust``, in [0, 1] (in [-1, 1] for
        ``"head_tail"``); classes without samples are left out, with a warning.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = AccuracyDisparity(num_classes=2)
        >>> metric(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        {'clean': tensor(0.), 'robust': tensor(0.5000)}
        >>> standard = AccuracyDisparity(num_classes=2)
        >>> standard.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.gap(standard)["robust"]
        tensor(-0.5000)
    """

    higher_is_better = False

    @check_types
    def __init__(
        self,
        num_classes: int,
        mode: DisparityMode = "range",
        *,
        head: Sequence[int] | None = None,
        tail: Sequence[int] | None = None,
        require_clean: bool = True,
    ) -> None:
        super().__init__(num_classes)
        _check_choice("mode", mode, DisparityMode)
        if (mode == "head_tail") != (head is not None and tail is not None) or (head is None) != (tail is None):
            raise ValueError(f'head and tail must be given with mode="head_tail" and only then, got mode={mode!r}')
        self.mode, self.require_clean = mode, require_clean
        self.head = None if head is None else _class_group("head", head, num_classes)
        self.tail = None if tail is None else _class_group("tail", tail, num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Return both disparities of all batches, of all processes."""
        robust = self._robust(self.require_clean) / self.total
        present = self._present(self.total)
        return {
            name: self._spread(rate, present) for name, rate in (("clean", self.clean / self.total), ("robust", robust))
        }

    def gap(self, standard: AccuracyDisparity) -> dict[str, Tensor]:
        """Return by how much each disparity of this model exceeds that of a second, usually a standardly trained one.

        Args:
            standard: the metric of the other model, on the same samples.

        Raises:
            ValueError: if the two measure different things.
        """
        mine, other = ((m.num_classes, m.mode, m.head, m.tail, m.require_clean) for m in (self, standard))
        if mine != other:
            raise ValueError(f"both metrics must have the same arguments, got {mine} and {other}")
        theirs = standard.compute()
        return {name: value - theirs[name] for name, value in self.compute().items()}

    def _spread(self, rate: Tensor, present: Tensor) -> Tensor:
        if self.head is not None and self.tail is not None:
            return rate[list(self.head)].nanmean() - rate[list(self.tail)].nanmean()
        seen = rate[present]
        return -_least(-seen) - _least(seen) if self.mode == "range" else (seen - seen.mean()).square().mean().sqrt()


class AttackSuccessRate(_Outcomes):
    """Share of the rightly predicted samples that the attack turns into wrong predictions.

    Args:
        num_classes: C, at least 2.
        average: ``"micro"`` over samples, ``"macro"`` over classes, ``"none"`` for each class.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a float32 scalar in [0, 1], or ``(C,)``; a class of which no sample is right without attack is
        treated as one without samples in :class:`RobustAccuracy`.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = AttackSuccessRate(num_classes=2)
        >>> metric(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]))
        tensor(0.3333)
    """

    higher_is_better = False

    @check_types
    def __init__(self, num_classes: int, *, average: Average = "micro") -> None:
        super().__init__(num_classes)
        _check_choice("average", average, Average)
        self.average = average

    def compute(self) -> Tensor:
        """Return the success rate of all batches, of all processes."""
        return self._share(self.clean - self._robust(True), self.clean, self.average, "right clean predictions")


class RobustErrorDecomposition(_Outcomes):
    """Robust error as the sum of natural error and boundary error.

    Natural error: the clean prediction is wrong. Boundary error: it is right, and the attack makes it wrong. Robust
    error: either.

    Args:
        num_classes: C, at least 2.
        average: ``"micro"`` over samples, ``"macro"`` over classes, ``"none"`` for each class.

    Shape:
        - ``update(pred_clean, pred_adv, target)``: as in :class:`RobustAccuracy`.

    Returns:
        ``compute()``: a dictionary of float32 ``natural``, ``boundary`` and ``robust``, each a scalar in [0, 1] or
        ``(C,)``; classes without samples as in :class:`RobustAccuracy`.

    Raises:
        TypeError: if predicted classes are not integers.
        ValueError: for wrong arguments or shapes, NaN, or a label outside ``[0, C)``.

    Example:
        >>> metric = RobustErrorDecomposition(num_classes=2)
        >>> metric(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
        {'natural': tensor(0.2500), 'boundary': tensor(0.2500), 'robust': tensor(0.5000)}

    Reference:
        H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, section 2.
    """

    higher_is_better = False

    @check_types
    def __init__(self, num_classes: int, *, average: Average = "micro") -> None:
        super().__init__(num_classes)
        _check_choice("average", average, Average)
        self.average = average

    def compute(self) -> dict[str, Tensor]:
        """Return the three errors of all batches, of all processes."""
        robust = self._robust(True)
        parts = {"natural": self.total - self.clean, "boundary": self.clean - robust, "robust": self.total - robust}
        return {name: self._share(part, self.total, self.average) for name, part in parts.items()}


@check_types
def groups_by_count(counts: Sequence[int] | Tensor, *, few: int = 20, many: int = 100) -> dict[str, tuple[int, ...]]:
    """Group classes by the number of their training samples, for :class:`TailRobustAccuracy`.

    Args:
        counts: training samples of each class ``(C,)``.
        few: a class with less than this many is in ``"few"``.
        many: a class with more than this many is in ``"many"``; the others are in ``"medium"``.

    Returns:
        The classes of each group, groups without a class left out.

    Raises:
        ValueError: if ``few`` is above ``many``.

    Example:
        >>> groups_by_count([500, 100, 20, 19])
        {'many': (0,), 'medium': (1, 2), 'few': (3,)}

    Reference:
        Z. Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, for the usual 20 and 100.
    """
    if not few <= many:
        raise ValueError(f"few must not be above many, got few={few!r}, many={many!r}")
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for index, count in enumerate(_numbers(counts)):
        groups["many" if count > many else "few" if count < few else "medium"].append(index)
    return {name: tuple(ids) for name, ids in groups.items() if ids}


@check_types
def halves_by_count(counts: Sequence[int] | Tensor) -> dict[str, tuple[int, ...]]:
    """Split classes into ``"head"`` and ``"tail"``, the rarer half, for :class:`TailRobustAccuracy`.

    Of an odd number of classes the middle one belongs to the head; of equally rare ones the later is rarer.

    Args:
        counts: training samples of each class ``(C,)``, at least two classes.

    Raises:
        ValueError: if there are less than two classes.

    Example:
        >>> halves_by_count([50, 5000, 500, 5])
        {'head': (1, 2), 'tail': (0, 3)}
    """
    numbers = _numbers(counts)
    if len(numbers) < 2:
        raise ValueError(f"counts must hold at least 2 classes, got {len(numbers)}")
    order = sorted(range(len(numbers)), key=lambda index: -numbers[index])
    split = len(order) - len(order) // 2
    return {"head": tuple(sorted(order[:split])), "tail": tuple(sorted(order[split:]))}


def _numbers(counts: Sequence[int] | Tensor) -> list[int]:
    return counts.tolist() if isinstance(counts, Tensor) else list(counts)


def _least(values: Tensor) -> Tensor:
    return values.min() if values.numel() else values.new_full((), torch.nan)


def _class_group(name: str, classes: Sequence[int], num_classes: int) -> tuple[int, ...]:
    ids = tuple(int(index) for index in classes)
    if not ids or len(set(ids)) < len(ids) or not all(0 <= index < num_classes for index in ids):
        raise ValueError(f"{name} must name different classes in [0, {num_classes}), at least one, got {ids}")
    return ids


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def _classes(name: str, preds: Tensor, num_samples: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return predicted classes ``(N,)`` and whether there is a NaN among the scores ``()``."""
    if preds.shape == (num_samples,):
        if preds.is_floating_point() or preds.is_complex() or preds.dtype == torch.bool:
            raise TypeError(f"{name} of shape (N,) must be integer classes, got {preds.dtype}; pass logits (N, C)")
        return preds, preds.new_zeros((), dtype=torch.bool)
    if preds.shape != (num_samples, num_classes) or not preds.is_floating_point():
        raise ValueError(
            f"{name} must be logits ({num_samples}, {num_classes}) or classes ({num_samples},) for {num_samples} "
            f"targets and {num_classes} classes, got {tuple(preds.shape)} of {preds.dtype}"
        )
    return preds.argmax(1), preds.isnan().any()


def _raise_for(problems: Tensor, num_classes: int) -> None:
    nan, unknown = problems.tolist()
    if nan:
        raise ValueError(
            f"predictions must not hold NaN, found some in {nan} update(s); look at the model or the attack"
        )
    if unknown:
        raise ValueError(
            f"target must lie in [0, {num_classes}), found other classes in {unknown} update(s); drop ignored labels"
        )
