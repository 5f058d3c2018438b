"""From an order of layers to a plan that keeps a measured metric: bisection over how many layers are lowered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.quantization.plan import BitPlan

__all__ = ["BisectionResult", "Evaluation", "bisect_bits"]


@dataclass(frozen=True)
class Evaluation:
    """One plan that was evaluated.

    Attributes:
        bits: the precision to which layers were being lowered; None for the starting plan.
        num_lowered: how many layers stood at ``bits``, of those that this step could lower.
        plan: all bits.
        metric: what was measured; the mean where outcomes of samples were given.
        standard_error: of the difference to the baseline on the same samples; None without outcomes of both.
        feasible: whether the metric reaches the target, with the confidence that was asked for.
    """

    bits: int | None
    num_lowered: int
    plan: BitPlan
    metric: float
    standard_error: float | None
    feasible: bool


@dataclass(frozen=True)
class BisectionResult:
    """What :func:`bisect_bits` found.

    Attributes:
        plan: an evaluated plan that reaches the target.
        metric: as measured for it.
        evaluations: how often ``evaluate`` was called.
        history: every evaluation, in order; the first is that of the starting plan.
        target: the least metric that was acceptable.
        baseline: the metric that a ratio refers to and noise is judged against.
    """

    plan: BitPlan
    metric: float
    evaluations: int
    history: tuple[Evaluation, ...]
    target: float
    baseline: float


@check_types
def bisect_bits(
    order: Sequence[str],
    evaluate: Callable[[BitPlan], float | Tensor],
    *,
    bits: Sequence[int],
    target: float | None = None,
    ratio: float | None = None,
    baseline: float | Tensor | None = None,
    start: Mapping[str, int] | None = None,
    candidates: Mapping[str, Sequence[int]] | None = None,
    num_samples: int | None = None,
    confidence: float | None = None,
) -> BisectionResult:
    """Lower as many layers as a metric allows, the least important first, with few evaluations.

    The first step bisects how many layers of the order can go from the highest precision to the next; each following
    step takes the layers up to the last one lowered and bisects how many of them can go one precision further. Of L
    layers a step needs ``ceil(log2 L)`` evaluations, and at most two more: the metric is only roughly monotone in the
    number of lowered layers, so the two plans beyond the last feasible one are tried as well. (The plan with one layer
    less is not: it could only be worse than the one at hand.) The returned plan was evaluated and reaches the target.

    A plan is feasible if its metric, or the mean of its outcomes, is at least the target; a metric that is not a number
    never is. The plan that is just feasible on these samples misses the target on others about every second time. With
    ``confidence`` it must lie above the target by as many standard errors as that one-sided confidence takes.

    Args:
        order: layer names, the least important first: :meth:`.SensitivityTable.order`.
        evaluate: measures a plan, higher is better: a number, or the outcomes of its samples ``(N,)``, such as whether
            each was classified correctly, always of the same samples in the same order. Outcomes give the standard
            error of the difference to the baseline, which for the same samples is far smaller than that of each.
        bits: the precisions, highest first, at least two.
        target: the least acceptable metric; give this or ``ratio``.
        ratio: of the baseline, such as 0.99, in place of ``target``.
        baseline: metric or outcomes of a reference, such as the full-precision model; default those of the starting
            plan.
        start: the plan to begin with; layers outside of ``order`` keep their bits in it, and none is ever raised.
            Default the highest of ``bits`` for each layer of the order, or the highest of its candidates.
        candidates: the bits that layers can take, for those that cannot take all of ``bits``: a step passes over a
            layer that cannot take its precision.
        num_samples: behind a metric that is a fraction, to judge its noise where outcomes are not given.
        confidence: in [0.5, 1), such as 0.95: how sure a plan must be to reach the target, by the normal distribution
            of the difference to the baseline. Needs outcomes. None asks for no more than the metric itself.

    Warns:
        UserWarning: if the drop from the baseline to the target is below one standard error: that of the difference to
            the baseline for the plan nearest to the target, or else that of a fraction among ``num_samples``. Not with
            ``confidence``, which knows the noise.

    Raises:
        ValueError: if the starting plan misses the target, or for arguments that are wrong.

    Example:
        >>> accuracy = {8: 0.0, 4: 0.01, 2: 0.2}  # what each layer loses
        >>> result = bisect_bits(
        ...     ["conv3", "conv1", "conv2"],
        ...     lambda plan: 0.9 - sum(accuracy[b] for b in plan.values()),
        ...     bits=(8, 4, 2),
        ...     target=0.875,
        ... )
        >>> dict(result.plan), round(result.metric, 3)
        ({'conv3': 4, 'conv1': 4, 'conv2': 8}, 0.88)

    Reference:
        Schaefer et al., *Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
        Quantization*, 2023 (arXiv 2306.04879), of which only the idea of a bisection over an order is taken.
    """
    _check(order, bits, target, ratio, start, candidates, num_samples)
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), got {confidence!r}; 0.95 is a common one")
    able = {name: set(bits if candidates is None else candidates.get(name, bits)) for name in order}
    if start is None:
        start = {name: max(able[name] & set(bits), default=max(able[name])) for name in order}
    search = _Search(evaluate, target, ratio, baseline, BitPlan(start), confidence)
    best, active = search.history[0], list(order)
    for low in bits[1:]:
        movable = [name for name in active if low in able[name] and best.plan[name] > low]
        best, count = search.step(best, movable, low)
        if count < len(movable):
            active = active[: active.index(movable[count - 1]) + 1] if count else []
    if confidence is None:
        search.judge_noise(num_samples)
    history = tuple(search.history)
    return BisectionResult(best.plan, best.metric, len(history), history, search.target, search.baseline)


class _Search:
    """The evaluations so far, and what they are held against."""

    def __init__(
        self,
        evaluate: Callable[[BitPlan], float | Tensor],
        target: float | None,
        ratio: float | None,
        baseline: float | Tensor | None,
        start: BitPlan,
        confidence: float | None,
    ) -> None:
        self.evaluate = evaluate
        self.errors_above = None if confidence is None else NormalDist().inv_cdf(confidence)
        measured = evaluate(start)
        reference = measured if baseline is None else baseline
        self.outcomes = _outcomes(reference)
        self.baseline = _metric(reference)
        if ratio is not None and not 0 < self.baseline < math.inf:
            raise ValueError(
                f"ratio= needs a baseline that is a positive number, got {self.baseline!r}; give target= instead"
            )
        self.target = self.baseline * ratio if ratio is not None else float(target or 0.0)
        self.history: list[Evaluation] = []
        first = self.record(measured, start, None, 0)
        if not first.feasible:
            short = "below" if self.errors_above is None else f"not {self.errors_above:.3g} standard errors above"
            raise ValueError(
                f"the starting plan reaches {first.metric:.6g}, {short} the target of {self.target:.6g}; lower the "
                "target, or start from more bits"
            )

    def record(self, measured: float | Tensor, plan: BitPlan, bits: int | None, num_lowered: int) -> Evaluation:
        """Keep one evaluation."""
        outcomes, error = _outcomes(measured), None
        if outcomes is not None and self.outcomes is not None:
            if len(outcomes) != len(self.outcomes):
                raise ValueError(
                    f"evaluate gave {len(outcomes)} outcomes, the baseline has {len(self.outcomes)}; both must be of "
                    "the same samples"
                )
            error = _standard_error(outcomes - self.outcomes)
        least = self.target
        if self.errors_above is not None:
            if error is None:
                raise ValueError(
                    "confidence= needs the outcomes (N,) of the samples from evaluate, and those of the baseline; "
                    "return them in place of a number"
                )
            least += self.errors_above * error
        metric = _metric(measured)
        # Written so that NaN is infeasible.
        self.history.append(Evaluation(bits, num_lowered, plan, metric, error, metric >= least))
        return self.history[-1]

    def step(self, best: Evaluation, movable: list[str], low: int) -> tuple[Evaluation, int]:
        """Return the feasible evaluation with the most of these layers lowered, and how many they are."""
        base, seen = best.plan, {0: best}

        def try_lowering(count: int) -> bool:
            plan = BitPlan({**base, **dict.fromkeys(movable[:count], low)})
            seen[count] = self.record(self.evaluate(plan), plan, low, count)
            return seen[count].feasible

        feasible, infeasible = 0, len(movable)
        while infeasible - feasible > 1:
            middle = (feasible + infeasible) // 2
            if try_lowering(middle):
                feasible = middle
            else:
                infeasible = middle
        for count in (feasible + 1, feasible + 2):
            if count <= len(movable) and count not in seen:
                try_lowering(count)
        most = max(count for count, evaluation in seen.items() if evaluation.feasible)
        return seen[most], most

    def judge_noise(self, num_samples: int | None) -> None:
        """Warn if the target is too near to the baseline to be told from it."""
        drop, error = self.baseline - self.target, None
        lowered = [evaluation for evaluation in self.history[1:] if evaluation.standard_error is not None]
        if lowered:
            error = min(lowered, key=lambda evaluation: abs(evaluation.metric - self.target)).standard_error
        elif num_samples is not None and 0 <= self.baseline <= 1:
            error = math.sqrt(self.baseline * (1 - self.baseline) / num_samples)
        if error is not None and drop < error:
            warn_caller(
                f"the target lies {drop:.3g} below the baseline of {self.baseline:.6g}, less than one standard error "
                f"({error:.3g}): noise decides which plan is feasible; take more samples or a lower target"
            )


def _outcomes(measured: float | Tensor) -> Tensor | None:
    if not isinstance(measured, Tensor) or not measured.ndim:
        return None
    if measured.ndim != 1 or not len(measured):
        raise ValueError(
            f"outcomes of samples must have shape (N,), got {tuple(measured.shape)}; give one number for each sample"
        )
    return measured.detach().double().cpu()


def _metric(measured: float | Tensor) -> float:
    outcomes = _outcomes(measured)
    return float(measured) if outcomes is None else float(outcomes.mean())


def _standard_error(differences: Tensor) -> float:
    return float(differences.std(correction=0)) / math.sqrt(len(differences))


def _check(
    order: Sequence[str],
    bits: Sequence[int],
    target: float | None,
    ratio: float | None,
    start: Mapping[str, int] | None,
    candidates: Mapping[str, Sequence[int]] | None,
    num_samples: int | None,
) -> None:
    if not order or len(set(order)) != len(order):
        raise ValueError(f"order must name at least one layer, and each once, got {list(order)}")
    if len(bits) < 2 or any(high <= low for high, low in zip(bits, bits[1:], strict=False)):
        raise ValueError(f"bits must be at least two precisions, highest first, such as (8, 4), got {tuple(bits)}")
    if (target is None) == (ratio is None):
        raise ValueError(f"give either target= or ratio=, got target={target!r} and ratio={ratio!r}")
    if math.isnan(target if target is not None else ratio or 0.0):
        raise ValueError("the target must be a number, got nan")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio!r}; target= takes the metric itself")
    missing = [name for name in order if start is not None and name not in start]
    if missing:
        raise ValueError(f"start lacks layer {missing[0]!r} of the order; give its bits")
    empty = [name for name in order if candidates is not None and not candidates.get(name, bits)]
    if empty:
        raise ValueError(f"layer {empty[0]!r} has no candidates; leave it out of order")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}")
