"""What adversarial training minimises, for a callback and for a plain loop alike.

An objective is called as ``objective(model, clean, adversarial, targets)`` and returns a scalar loss. It calls the
model on the inputs that it needs, each batch on its own: clean and adversarial images together would share the
statistics of one batch normalisation. Those that depend on class frequencies take the training set's counts, or are
told them by :meth:`Objective.set_class_counts`; those that change over time follow :meth:`Objective.set_progress`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._mixed_labels import MixedLabels
from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.features import PenultimateFeatures
from lightning_plugins.losses import checked_logits, wide
from lightning_plugins.robustness.reweighting import (
    balanced_softmax_loss,
    cdt_loss,
    effective_number_weights,
    focal_loss,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    weighted_cross_entropy,
)

__all__ = [
    "CDT",
    "LDAM",
    "MART",
    "PGDAT",
    "REAT",
    "SRAT",
    "TAET",
    "TRADES",
    "BalancedSoftmax",
    "ClassBalanced",
    "CosineClassifier",
    "LogitAdjustment",
    "Objective",
    "RoBal",
    "separation_loss",
]

Model = Callable[[Tensor], Tensor]


class Objective(nn.Module):
    """Base of the objectives.

    Attributes:
        attack_loss: what the inner attack maximises, ``"ce"`` or ``"kl"`` (to the clean prediction).
        attack_start: ``"uniform"`` in the budget or ``"gaussian"`` noise of 0.001 around the input.
        needs_counts: whether class counts are needed.
    """

    attack_loss: Literal["ce", "kl"] = "ce"
    attack_start: Literal["uniform", "gaussian"] = "uniform"
    needs_counts = False
    counts: Tensor | None

    def __init__(self, counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("counts", None, persistent=False)
        self.progress = 0.0
        if counts is not None:
            self.set_class_counts(torch.as_tensor(counts))

    def set_class_counts(self, counts: Tensor) -> None:
        """Tell how many training samples each class has.

        Raises:
            ValueError: if a class has none.
        """
        if counts.ndim != 1 or len(counts) < 2 or not bool((counts > 0).all()):
            raise ValueError(f"class counts must be at least two numbers above 0, got {counts.tolist()}")
        self.counts = counts.to(torch.float64)

    def set_progress(self, progress: float) -> None:
        """Tell which share of the training, in [0, 1], lies behind."""
        self.progress = progress

    def attack_logits(self, logits: Tensor) -> Tensor:
        """Return the logits that the net is evaluated by; attacks see these. Identity for most objectives."""
        return logits

    def known_counts(self, like: Tensor) -> Tensor:
        """Return the class counts, float32 on the device of ``like``.

        Raises:
            ValueError: if nobody told them.
        """
        if self.counts is None:
            raise ValueError(
                f"{type(self).__name__} needs the number of training samples in each class; pass counts=[...]"
            )
        return self.counts.to(like.device, torch.float32)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss.

        Args:
            model: gives logits ``(N, C)``; an ``nn.Module`` where features are needed.
            clean: inputs ``(N, ...)``.
            adversarial: the attacked inputs.
            targets: labels ``(N,)``.
        """
        raise NotImplementedError


def _logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return logits in float32 at least; refuse labels that are no classes, unless they are mixed or soft."""
    soft = isinstance(targets, MixedLabels) or (targets.is_floating_point() and targets.shape == logits.shape)
    return wide(logits) if soft else checked_logits(logits, targets)


def _need_pairs(clean: Tensor, attacked: Tensor) -> None:
    if clean.shape != attacked.shape:
        raise ValueError(
            "the objective compares each clean input with the attacked one; found logits of the shapes "
            f"{tuple(clean.shape)} and {tuple(attacked.shape)}"
        )


class PGDAT(Objective):
    """Cross-entropy on the attacked inputs.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> inputs, targets = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
        >>> PGDAT()(model, inputs, inputs, targets).shape
        torch.Size([])

    Reference:
        Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018.
    """

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        return F.cross_entropy(_logits(model(adversarial), targets), targets)


class TRADES(Objective):
    r"""Cross-entropy on clean inputs plus the divergence of the prediction on attacked ones.

    .. math:: CE(f(x), y) + \beta\, \frac{1}{N} \sum_i KL(p(x_i) \,\|\, p(x'_i))

    Args:
        beta: weight of the divergence, at least 0; the paper has 6 on CIFAR-10 and 1 on MNIST.
        detach_target: no gradient through the clean prediction in the divergence; the released code has it.

    Raises:
        ValueError: for a negative ``beta``.

    Reference:
        Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, 2019, equation 5.
    """

    attack_loss = "kl"
    attack_start = "gaussian"

    @check_types
    def __init__(self, beta: float = 6.0, *, detach_target: bool = False) -> None:
        super().__init__()
        self.beta, self.detach_target = _at_least_0("beta", beta), detach_target

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        natural, attacked = model(clean).float(), model(adversarial).float()
        _need_pairs(natural, attacked)
        target = natural.detach() if self.detach_target else natural
        divergence = F.kl_div(attacked.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
        return F.cross_entropy(_logits(natural, targets), targets) + self.beta * divergence


class MART(Objective):
    r"""Boosted cross-entropy on attacked inputs, and a divergence weighted by how wrong the clean prediction is.

    With ``q`` the prediction on attacked and ``p`` on clean inputs:
    :math:`-\log q_y - \log(1.0001 - \max_{k \ne y} q_k) + \beta\, KL(p \| q)\, (1 - p_y)`.

    Args:
        beta: weight of the divergence, at least 0.

    Raises:
        ValueError: for a negative ``beta``.

    Reference:
        Wang et al., *Improving Adversarial Robustness Requires Revisiting Misclassified Examples*, 2020; constants as
        in the released code. Everything is computed from log-probabilities in float32.
    """

    attack_start = "gaussian"

    @check_types
    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        self.beta = _at_least_0("beta", beta)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        attacked, natural = model(adversarial).float(), model(clean).float()
        _need_pairs(natural, attacked)
        log_q, log_p = _logits(attacked, targets).log_softmax(1), natural.log_softmax(1)
        others = log_q.exp().scatter(1, targets[:, None], 0.0).amax(1)
        boosted = F.cross_entropy(attacked, targets) - (1.0001 - others + 1e-12).log().mean()
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        wrongness = 1.0000001 - log_p.exp().gather(1, targets[:, None])[:, 0]
        return boosted + self.beta * (divergence * wrongness).mean()


class ClassBalanced(Objective):
    """Cross-entropy or focal loss on attacked inputs, weighted by the effective number of samples of each class.

    Args:
        beta: of the effective number, in [0, 1).
        focal_gamma: focusing of the focal loss; 0 is cross-entropy.
        start: share of the training, in [0, 1], after which the weights set in; 0 from the beginning, 0.8 is deferred
            reweighting.
        counts: training samples of each class.

    Raises:
        ValueError: for an argument out of range.

    Reference:
        Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, 2019; Cao et al., 2019 (deferred).
    """

    needs_counts = True

    @check_types
    def __init__(
        self,
        beta: float = 0.9999,
        *,
        focal_gamma: float = 0.0,
        start: float = 0.0,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(counts)
        self.beta, self.focal_gamma = beta, _at_least_0("focal_gamma", focal_gamma)
        self.start = _share("start", start)
        effective_number_weights(torch.ones(2), beta=beta)

    def weights(self, like: Tensor) -> Tensor:
        """Return the weight of each class now, ``(C,)`` with mean 1."""
        counts = self.known_counts(like)
        if self.progress < self.start:
            return torch.ones_like(counts)
        return effective_number_weights(counts, beta=self.beta)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits."""
        weights = self.weights(logits)
        if self.focal_gamma:
            return focal_loss(logits, targets, self.focal_gamma, weights)
        return weighted_cross_entropy(logits, targets, weights)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        return self.loss(model(adversarial).float(), targets)


class LDAM(ClassBalanced):
    """Cross-entropy with larger margins for rarer classes, on attacked inputs; reweighted from ``start`` on.

    Args:
        max_margin: of the rarest class, above 0.
        scale: multiplies the logits in the loss only; attacks see the logits that the net is evaluated by. 30 belongs
            to a cosine classifier, 1 to a linear layer.
        beta: of the effective number, in [0, 1).
        start: share of the training, in [0, 1], after which the weights set in.
        counts: training samples of each class.

    Reference:
        Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, 2019.
    """

    @check_types
    def __init__(
        self,
        max_margin: float = 0.5,
        *,
        scale: float = 1.0,
        beta: float = 0.9999,
        start: float = 0.8,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(beta, start=start, counts=counts)
        self.max_margin, self.scale = _above_0("max_margin", max_margin), _above_0("scale", scale)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits."""
        margins = ldam_margins(self.known_counts(logits), max_margin=self.max_margin)
        return ldam_loss(logits, targets, margins, self.scale, self.weights(logits))


class BalancedSoftmax(Objective):
    """Cross-entropy of the logits plus the logarithm of the class counts, on attacked inputs: AT-BSL.

    Args:
        counts: training samples of each class.

    Reference:
        Yue et al., *Revisiting Adversarial Training under Long-Tailed Distributions*, 2024; Ren et al., 2020.
    """

    needs_counts = True
    attack_start = "gaussian"

    @check_types
    def __init__(self, *, counts: Sequence[int] | None = None) -> None:
        super().__init__(counts)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        logits = model(adversarial).float()
        return balanced_softmax_loss(logits, targets, self.known_counts(logits))


class LogitAdjustment(Objective):
    """Cross-entropy of the logits plus ``tau`` times the logarithm of the class shares, on attacked inputs.

    Args:
        tau: strength; 1 is the balanced softmax.
        counts: training samples of each class.

    Reference:
        Menon et al., *Long-Tail Learning via Logit Adjustment*, 2021.
    """

    needs_counts = True

    @check_types
    def __init__(self, tau: float = 1.0, *, counts: Sequence[int] | None = None) -> None:
        super().__init__(counts)
        self.tau = _at_least_0("tau", tau)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        logits = model(adversarial).float()
        return logit_adjusted_loss(logits, targets, self.known_counts(logits), tau=self.tau)


class CDT(Objective):
    """Cross-entropy with logits divided by class-dependent temperatures, on attacked inputs.

    Args:
        gamma: exponent of the temperatures; 0 is plain cross-entropy.
        counts: training samples of each class.

    Reference:
        Ye et al., *Identifying and Compensating for Feature Deviation in Imbalanced Deep Learning*, 2020.
    """

    needs_counts = True

    @check_types
    def __init__(self, gamma: float = 0.3, *, counts: Sequence[int] | None = None) -> None:
        super().__init__(counts)
        self.gamma = _at_least_0("gamma", gamma)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        logits = model(adversarial).float()
        return cdt_loss(logits, targets, self.known_counts(logits), gamma=self.gamma)


@check_types
def separation_loss(features: Tensor, targets: Tensor, *, temperature: float = 0.1, normalize: bool = True) -> Tensor:
    r"""Pull the features of one class together and push those of others away: supervised contrastive.

    .. math:: \frac{1}{|\{i: P(i) \ne \emptyset\}|} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
              \Big[ z_i \cdot z_p / \tau - \log \sum_{a \ne i} e^{z_i \cdot z_a / \tau} \Big]

    ``P(i)`` holds the other samples of the class of ``i``; samples without any are skipped.

    Args:
        features: any floating type; computed in float32 at least.
        targets: labels.
        temperature: :math:`\tau`, above 0.
        normalize: let features have length 1.

    Shape:
        - features: ``(N, D)``
        - targets: ``(N,)``
        - output: scalar; 0 if no class has two samples

    Raises:
        ValueError: for wrong shapes, or a temperature that is not above 0.

    Example:
        >>> apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> targets = torch.tensor([0, 0, 1, 1])
        >>> bool(separation_loss(apart, targets) < separation_loss(apart, targets[[0, 2, 1, 3]]))
        True

    Reference:
        Wang et al., *Imbalanced Adversarial Training with Reweighting* (SRAT), 2021, whose term this is; Khosla et
        al., *Supervised Contrastive Learning*, 2020.
    """
    _above_0("temperature", temperature)
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (N, D) and targets (N,), got {tuple(features.shape)} and {tuple(targets.shape)}"
        )
    z = features if features.dtype == torch.float64 else features.float()
    if normalize:
        z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_shares = similarity - similarity.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    positive = (targets[:, None] == targets[None, :]) & ~itself
    count = positive.sum(1)
    anchors = count > 0
    if len(z) < 2 or not bool(anchors.any()):
        return z.sum() * 0.0
    per_anchor = -log_shares.masked_fill(~positive, 0.0).sum(1) / count.clamp_min(1)
    return per_anchor[anchors].mean()


class SRAT(Objective):
    """Reweighted loss on attacked inputs, deferred, and a term that separates the classes' features.

    The weight of the term, its temperature and whether features are normalised could not be read from the paper: they
    are arguments, and the term grows linearly over the first ``ramp`` of the training. At full strength from the first
    step nets were seen to collapse to one feature direction, where the term is ``log(N - 1)`` and its gradient
    vanishes; twenty such steps in a row give a warning.

    Args:
        base: loss on the logits, ``"ce"``, ``"focal"`` or ``"ldam"``.
        separation: weight of the separating term, at least 0.
        temperature: of the term, above 0.
        normalize: let features have length 1 in the term.
        features_from: name of the module whose output are the features, such as the layer before a last ReLU, which
            collapses less easily. Default: what goes into the last linear layer.
        beta: of the effective number, in [0, 1).
        start: share of the training, in [0, 1], after which the weights set in.
        ramp: share of the training over which the term grows to its full weight.
        focal_gamma: focusing, for ``base="focal"``.
        max_margin: margin of the rarest class, for ``base="ldam"``.
        counts: training samples of each class.

    Raises:
        ValueError: for an argument out of range.

    Reference:
        Wang et al., *Imbalanced Adversarial Training with Reweighting*, arXiv 2107.13639, 2021.
    """

    needs_counts = True

    @check_types
    def __init__(
        self,
        base: Literal["ce", "focal", "ldam"] = "ce",
        *,
        separation: float = 0.3,
        temperature: float = 0.1,
        normalize: bool = True,
        features_from: str | None = None,
        beta: float = 0.9999,
        start: float = 0.8,
        ramp: float = 0.15,
        focal_gamma: float = 1.0,
        max_margin: float = 0.5,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(counts)
        if base not in ("ce", "focal", "ldam"):
            raise ValueError(f"base must be 'ce', 'focal' or 'ldam', got {base!r}")
        if base == "ldam":
            self.base: ClassBalanced = LDAM(max_margin, beta=beta, start=start, counts=counts)
        else:
            gamma = focal_gamma if base == "focal" else 0.0
            self.base = ClassBalanced(beta, focal_gamma=gamma, start=start, counts=counts)
        self.separation, self.temperature = _at_least_0("separation", separation), _above_0("temperature", temperature)
        self.normalize, self.features_from, self.ramp = normalize, features_from, _share("ramp", ramp)
        self._collapsed_steps = 0

    def set_class_counts(self, counts: Tensor) -> None:
        """Tell how many training samples each class has."""
        super().set_class_counts(counts)
        if "base" in self._modules:
            self.base.set_class_counts(counts)

    def set_progress(self, progress: float) -> None:
        """Tell which share of the training, in [0, 1], lies behind."""
        super().set_progress(progress)
        self.base.set_progress(progress)

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        if not self.separation:
            return self.base.loss(model(adversarial).float(), targets)
        logits, features = _logits_and_features(model, adversarial, self.features_from)
        term = separation_loss(features, targets, temperature=self.temperature, normalize=self.normalize)
        self._watch(term, len(targets))
        strength = self.separation * (min(self.progress / self.ramp, 1.0) if self.ramp else 1.0)
        return self.base.loss(logits.float(), targets) + strength * term

    def _watch(self, term: Tensor, batch_size: int) -> None:
        # A comparison on the host each step would make an accelerator wait; the first steps are where it happens.
        if self._collapsed_steps < 0 or batch_size < 3:
            return
        collapsed = float(term.detach()) > math.log(batch_size - 1) - 1e-2
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        if self._collapsed_steps == 20:
            self._collapsed_steps = -1
            warn_caller(
                "SRAT: all features have pointed the same way for 20 steps and the separating term has no gradient "
                "there; use a smaller separation, a longer ramp, or features_from a layer before the last ReLU"
            )


class RoBal(Objective):
    """Margins and a prior on the logits of a cosine classifier, and a divergence to the clean prediction.

    The net's last layer must be a :class:`CosineClassifier`: logits are cosines in [-1, 1], and ``scale`` makes them
    sharp in the loss. Evaluate and attack :meth:`attack_logits`, scaled and adjusted as the net is used.

    Args:
        scale: of the cosines, above 0.
        margin: subtracted from every true class's cosine.
        margin_tau: strength of the further margin ``log(n_y / n_min) / scale``.
        prior_tau: strength of the logarithm of the class shares.
        kl_weight: of the divergence between clean and attacked predictions.
        posthoc_tau: strength of the adjustment at evaluation.
        counts: training samples of each class.

    Reference:
        Wu et al., *Adversarial Robustness under Long-Tailed Distribution*, 2021. The defaults are its variant N; its
        variant R has ``prior_tau=1.5, margin_tau=0.3``.
    """

    needs_counts = True

    @check_types
    def __init__(
        self,
        scale: float = 10.0,
        *,
        margin: float = 0.1,
        margin_tau: float = 0.0,
        prior_tau: float = 1.2,
        kl_weight: float = 6.0,
        posthoc_tau: float = 0.1,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(counts)
        self.scale = _above_0("scale", scale)
        self.margin, self.margin_tau, self.prior_tau = margin, margin_tau, prior_tau
        self.kl_weight, self.posthoc_tau = _at_least_0("kl_weight", kl_weight), posthoc_tau

    def attack_logits(self, logits: Tensor) -> Tensor:
        """Return the scaled logits less ``posthoc_tau`` times the log shares: what the net predicts by."""
        counts = self.known_counts(logits)
        return self.scale * logits - self.posthoc_tau * (counts / counts.sum()).log()

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        attacked, natural = model(adversarial).float(), model(clean).float()
        _need_pairs(natural, attacked)
        counts = self.known_counts(attacked)
        if len(counts) != attacked.shape[1]:
            raise ValueError(f"RoBal has counts of {len(counts)} classes, the net {attacked.shape[1]}; correct counts")
        margins = self.margin + self.margin_tau * (counts / counts.min()).log() / self.scale
        lowered = _logits(attacked, targets) - F.one_hot(targets, attacked.shape[1]) * margins
        loss = F.cross_entropy(self.scale * lowered + self.prior_tau * (counts / counts.sum()).log(), targets)
        divergence = F.kl_div(attacked.log_softmax(1), natural.log_softmax(1), reduction="batchmean", log_target=True)
        return loss + self.kl_weight * divergence


class CosineClassifier(nn.Linear):
    """A last layer whose logits are cosines between features and class vectors, for :class:`RoBal`.

    Args:
        in_features: D.
        out_features: C.
        gamma: added to the length of the class vectors, at least 0.

    Shape:
        - input ``(N, D)``, output ``(N, C)`` in (-1, 1)

    Raises:
        ValueError: for widths below 1, a negative ``gamma``, or an input that is not floating-point ``(N, D)``.
    """

    @check_types
    def __init__(self, in_features: int, out_features: int, *, gamma: float = 1 / 32) -> None:
        for name, width in {"in_features": in_features, "out_features": out_features}.items():
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width!r}")
        super().__init__(in_features, out_features, bias=False)
        self.gamma = _at_least_0("gamma", gamma)

    @check_types
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        """Return the cosines, computed in the type of the weight."""
        # A graph is traced without looking at shapes.
        if isinstance(input, Tensor) and not (
            input.ndim == 2 and input.shape[1] == self.in_features and input.is_floating_point()
        ):
            raise ValueError(
                f"the input must be floating-point (N, {self.in_features}), got {tuple(input.shape)} of {input.dtype}"
            )
        vectors = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.gamma)
        return F.linear(F.normalize(input.to(vectors.dtype), dim=1), vectors)


class REAT(Objective):
    """Balanced softmax on attacked inputs, and a term that sets the tail classes' features apart.

    The released code weighs the inner attack's loss by class too. A positive weight for each sample does not change
    the direction of its gradient, so this is no difference for attacks that step along a sign or a unit vector, and
    there is nothing of it here.

    Args:
        variant: ``"official"`` is the term as the released code computes it, one average divergence times one average
            weight. ``"pairwise"`` is the term as written: the divergence between the softmaxed features of each tail
            anchor and each other sample, with a minus for its own class; it has no lower bound, and nets without batch
            normalisation collapsed to one class under it.
        weight: of the term, at least 0.
        tail_share: share of the classes, the rarest ones, that count as tail, in (0, 1].
        features_from: name of the module whose output are the features; default the input of the last linear layer.
        counts: training samples of each class.

    Reference:
        Li et al., *Alleviating the Effect of Data Imbalance on Adversarial Training*, 2023 (REAT).
    """

    needs_counts = True

    @check_types
    def __init__(
        self,
        variant: Literal["pairwise", "official"] = "official",
        *,
        weight: float = 1.0,
        tail_share: float = 1 / 3,
        features_from: str | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(counts)
        if variant not in ("pairwise", "official"):
            raise ValueError(f"variant must be 'pairwise' or 'official', got {variant!r}")
        if not 0 < tail_share <= 1:
            raise ValueError(f"tail_share must lie in (0, 1], got {tail_share!r}")
        self.variant, self.weight = variant, _at_least_0("weight", weight)
        self.tail_share, self.features_from = tail_share, features_from

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        logits, features = _logits_and_features(model, adversarial, self.features_from)
        logits = logits.float()
        counts = self.known_counts(logits)
        loss = balanced_softmax_loss(logits, targets, counts)
        return loss + self.weight * self._tail(features.float(), targets, counts) if self.weight else loss

    def _tail(self, features: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        num_tail = max(1, int(len(counts) * self.tail_share))
        tail = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
        tail[counts.argsort()[:num_tail]] = True
        anchors = tail[targets]
        if not bool(anchors.any()):
            return features.sum() * 0.0
        log_z = features.log_softmax(1)
        log_anchor = log_z[anchors].detach()
        p = log_anchor.exp()
        divergence = (p * log_anchor).sum(1, keepdim=True) - p @ log_z.T  # (anchors, N)
        rarity = (counts.sum() / counts).sqrt()
        same = targets[anchors][:, None] == targets[None, :]
        weight = torch.where(same, -1.0, 1.0) * (rarity[targets[anchors]][:, None] + rarity[targets][None, :])
        if self.variant == "pairwise":
            return (divergence * weight).mean()
        # One divergence averaged over anchors, samples and features, as torch's KLDivLoss averages.
        return divergence.mean() / features.shape[1] * weight.mean()


class TAET(Objective):
    """Two stages: cross-entropy first, then a loss that evens out the classes.

    The second stage is ``0.1 mean_c L_c + 0.1 mean_c (L_c - mean L)^2 + 0.1 sum_c (L_c / sum L)^2`` of the mean
    attacked losses ``L_c`` of each class. Its scale is a tenth of the usual one, which belongs to its learning rate.

    Args:
        switch: share of the training, in [0, 1], after which the second stage begins; the paper has 40 of 100 epochs.
        first_stage: cross-entropy on ``"clean"`` inputs, as the released code, or on ``"adversarial"`` ones.
        present_only: average over the classes in the batch; False counts absent ones as loss 0, as the released code.

    Reference:
        Li et al., *TAET: Two-Stage Adversarial Equalization Training on Long-Tailed Distributions*, 2025.
    """

    attack_start = "gaussian"

    @check_types
    def __init__(
        self,
        switch: float = 0.4,
        *,
        first_stage: Literal["clean", "adversarial"] = "clean",
        present_only: bool = False,
    ) -> None:
        super().__init__()
        if first_stage not in ("clean", "adversarial"):
            raise ValueError(f"first_stage must be 'clean' or 'adversarial', got {first_stage!r}")
        self.switch, self.first_stage, self.present_only = _share("switch", switch), first_stage, present_only

    @check_types
    def forward(self, model: Model, clean: Tensor, adversarial: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; see :class:`Objective`."""
        if self.progress < self.switch:
            chosen = clean if self.first_stage == "clean" else adversarial
            return F.cross_entropy(_logits(model(chosen), targets), targets)
        logits = model(adversarial).float()
        losses = F.cross_entropy(_logits(logits, targets), targets, reduction="none")
        count = torch.bincount(targets, minlength=logits.shape[1])
        per_class = torch.zeros_like(logits[0]).index_add(0, targets, losses) / count.clamp_min(1)
        if self.present_only:
            per_class = per_class[count > 0]
        share = per_class / per_class.sum().clamp_min(1e-12)
        spread = (per_class - per_class.mean()).square().mean()
        return 0.1 * per_class.mean() + 0.1 * spread + 0.1 * share.square().sum()


def _logits_and_features(model: Model, inputs: Tensor, features_from: str | None) -> tuple[Tensor, Tensor]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"this objective reads features inside the model and needs an nn.Module, got a {type(model).__name__}"
        )
    with PenultimateFeatures(model, output_of=features_from) as features:
        logits = model(inputs)
    return logits, features.last.flatten(1)


def _at_least_0(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return value


def _above_0(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return value


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return value
