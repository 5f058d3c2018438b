"""Is a model robust, or does it only look so to gradients? The usual symptoms, and a verdict that names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_plugins.checks import check_types

__all__ = ["GradientMaskingCheck", "MaskingReason", "MaskingVerdict"]

MaskingReason = Literal[
    "fgsm_beats_pgd",
    "restarts_beat_pgd",
    "black_box_beats_white_box",
    "survives_large_eps",
    "accuracy_rises_with_eps",
    "accuracy_rises_with_steps",
    "zero_gradients",
]
"""A symptom of masked gradients; :class:`GradientMaskingCheck` says what each one is."""

_UNBOUNDED = 0.5  # an l-infinity budget that turns every image in [0, 1] grey


@dataclass(frozen=True)
class MaskingVerdict:
    """What :class:`GradientMaskingCheck` found.

    Args:
        reasons: each symptom found and a sentence with its numbers.
        not_checked: symptoms that could not be looked for, since their measurement is missing.
        upper_bound: least robust accuracy measured at the budget, in [0, 1]: the true one is not above it.
    """

    reasons: Mapping[MaskingReason, str]
    not_checked: tuple[MaskingReason, ...]
    upper_bound: float

    @property
    def masked(self) -> bool:
        """Whether there is a symptom of masked gradients."""
        return bool(self.reasons)

    @property
    def conclusive(self) -> bool:
        """Whether a black box, a budget of at least 0.5 and the share of zero gradients were all looked at."""
        return not {"black_box_beats_white_box", "survives_large_eps", "zero_gradients"} & set(self.not_checked)

    @property
    def robust_accuracy(self) -> float:
        """Least robust accuracy measured, in [0, 1], if it may be called so.

        Raises:
            ValueError: if there is a symptom of masked gradients, or one of the three main ones was not looked for.
        """
        if self.masked or not self.conclusive:
            raise ValueError(f"no robust accuracy to report: {self}; use upper_bound for the number that was measured")
        return self.upper_bound

    def __str__(self) -> str:
        parts = [f"{name}: {sentence}" for name, sentence in self.reasons.items()] or ["no symptom of masked gradients"]
        if self.not_checked:
            parts.append(f"not checked: {', '.join(self.not_checked)}")
        return "; ".join(parts)


@check_types
@dataclass(frozen=True)
class GradientMaskingCheck:
    """Look for the symptoms of masked gradients in robust accuracies that were measured already.

    - ``fgsm_beats_pgd``: one step fools more than many.
    - ``restarts_beat_pgd``: other random starts fool many more samples.
    - ``black_box_beats_white_box``: an attack without gradients fools more than every one with them.
    - ``survives_large_eps``: at a budget of 0.5 or more, which can turn every image grey, accuracy is left.
    - ``accuracy_rises_with_eps``, ``accuracy_rises_with_steps``: a larger budget or more steps fool less.
    - ``zero_gradients``: the attack's loss has no gradient at too many samples.

    A model without symptoms may still not be robust; a constant one, which cannot be fooled, has some.

    Args:
        tolerance: how much an accuracy may be on the wrong side of another one, in [0, 1]. CE-based PGD alone is
            honestly 0.01 above a black box on small nets, hence the default; with a targeted or margin-based attack
            among the white boxes AutoAttack's own 0.002 will do, on as many samples as that can be told on.
        max_restart_gain: how much restarts may lower the accuracy of PGD, in [0, 1].
        max_large_eps_accuracy: what accuracy may be left at a budget of 0.5 or more, in [0, 1].
        max_zero_gradients: share of samples whose gradient may be all zero, in [0, 1].

    Raises:
        ValueError: for an argument, an accuracy or a share outside [0, 1], a budget not above 0, or steps below 1.

    Example:
        >>> check = GradientMaskingCheck()
        >>> verdict = check(fgsm=0.5, pgd=0.6, black_box=0.2)
        >>> verdict.masked, sorted(verdict.reasons), verdict.upper_bound
        (True, ['black_box_beats_white_box', 'fgsm_beats_pgd'], 0.2)
        >>> check(fgsm=0.65, pgd=0.63, black_box=0.62, by_eps={0.5: 0.0}, zero_gradients=0.0).robust_accuracy
        0.62

    Reference:
        A. Athalye, N. Carlini, D. Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 3;
        N. Carlini et al., "On Evaluating Adversarial Robustness", 2019. The thresholds are ours, but for the 0.002 of
        F. Croce and M. Hein's AutoAttack.
    """

    tolerance: float = 0.02
    max_restart_gain: float = 0.05
    max_large_eps_accuracy: float = 0.01
    max_zero_gradients: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_share(name, value)

    @check_types
    def __call__(
        self,
        *,
        fgsm: float,
        pgd: float,
        pgd_restarts: float | None = None,
        targeted: float | None = None,
        black_box: float | None = None,
        by_eps: Mapping[float, float] | None = None,
        by_steps: Mapping[int, float] | None = None,
        zero_gradients: float | None = None,
    ) -> MaskingVerdict:
        """Return the verdict on one model. Accuracies are at one budget, on the same samples, in [0, 1].

        Args:
            fgsm: robust accuracy under one step.
            pgd: under many steps.
            pgd_restarts: under many steps from several starts.
            targeted: under a targeted or margin-based white-box attack, such as APGD-T.
            black_box: under an attack without gradients, such as Square.
            by_eps: under PGD at several l-infinity budgets on the [0, 1] pixel scale, one of them at least 0.5.
            by_steps: under PGD with several numbers of steps.
            zero_gradients: share of samples whose gradient was all zero.
        """
        single = {"fgsm": fgsm, "pgd": pgd, "pgd_restarts": pgd_restarts, "targeted": targeted, "black_box": black_box}
        known = {name: value for name, value in single.items() if value is not None}
        by_eps, by_steps = dict(sorted((by_eps or {}).items())), dict(sorted((by_steps or {}).items()))
        shares = known if zero_gradients is None else known | {"zero_gradients": zero_gradients}
        for name, value in shares.items():
            _check_share(name, value)
        for name, curve, least in (("by_eps", by_eps, 0.0), ("by_steps", by_steps, 1.0)):
            for key, value in curve.items():
                if not (key > least or key == least >= 1):
                    raise ValueError(
                        f"{name} must have keys {'above 0' if not least else 'of at least 1'}, got {key!r}"
                    )
                _check_share(f"{name}[{key!r}]", value)

        reasons: dict[MaskingReason, str] = {}
        missing: list[MaskingReason] = []
        if fgsm < pgd - self.tolerance:
            reasons["fgsm_beats_pgd"] = f"accuracy {fgsm:.3f} under FGSM is below {pgd:.3f} under PGD"
        if pgd_restarts is None:
            missing.append("restarts_beat_pgd")
        elif pgd_restarts < pgd - self.max_restart_gain:
            reasons["restarts_beat_pgd"] = f"restarts lower the accuracy under PGD from {pgd:.3f} to {pgd_restarts:.3f}"
        white_box = min(value for name, value in known.items() if name != "black_box")
        if black_box is None:
            missing.append("black_box_beats_white_box")
        elif black_box < white_box - self.tolerance:
            reasons["black_box_beats_white_box"] = (
                f"accuracy {black_box:.3f} without gradients is below {white_box:.3f} with them"
            )
        large = [(eps, value) for eps, value in by_eps.items() if eps >= _UNBOUNDED]
        if not large:
            missing.append("survives_large_eps")
        elif (worst := max(large, key=lambda pair: pair[1]))[1] > self.max_large_eps_accuracy:
            reasons["survives_large_eps"] = f"accuracy {worst[1]:.3f} is left at eps={worst[0]:g}"
        self._look_for_a_rise("accuracy_rises_with_eps", "eps", by_eps, reasons, missing)
        self._look_for_a_rise("accuracy_rises_with_steps", "steps", by_steps, reasons, missing)
        if zero_gradients is None:
            missing.append("zero_gradients")
        elif zero_gradients > self.max_zero_gradients:
            reasons["zero_gradients"] = f"{zero_gradients:.1%} of the samples have an all-zero gradient"
        return MaskingVerdict(reasons, tuple(missing), min(known.values()))

    def _look_for_a_rise(
        self,
        reason: MaskingReason,
        name: str,
        curve: Mapping[float, float] | Mapping[int, float],
        reasons: dict[MaskingReason, str],
        missing: list[MaskingReason],
    ) -> None:
        if len(curve) < 2:
            missing.append(reason)
            return
        lowest, lowest_at = 1.0, next(iter(curve.items()))[0]
        for key, value in curve.items():
            if value > lowest + self.tolerance:
                reasons[reason] = f"accuracy rises from {lowest:.3f} at {name}={lowest_at:g} to {value:.3f} at {key:g}"
                return
            if value < lowest:
                lowest, lowest_at = value, key


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}; give shares, not percent")
