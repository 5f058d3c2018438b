r"""Retraining a classifier's last layer on features drawn from a Gaussian for each class.

The last layer of a net is the one most biased by skewed data: few samples of a class, or clients that each hold other
classes. Means and covariances of its input, class by class, are sums, which clients can add up without sharing samples.
The layer is then retrained alone, on as many virtual features of each class as one likes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically

__all__ = ["FeatureStatistics", "HeadCalibration", "calibrate_head_", "sample_virtual_features"]

_FORMAT = "lightning_plugins.FeatureStatistics"


class FeatureStatistics:
    r"""Number, sum and sum of outer products of each class's features, :math:`N_c, \sum h, \sum h h^\top`, in float64.

    Sums add up: statistics of clients, processes and batches merge exactly and in any order, classes and clients with
    one sample or none included. A client's sums tell more about its samples than a trained net does: of a class with
    one sample they hold that sample's features. Memory is ``8 C D^2`` bytes: 21 MB for 10 classes of 512 features,
    34 GB for 1,000 of 2,048.

    Args:
        num_classes: ``C``, at least 1.
        num_features: ``D``, at least 1.
        power: exponent in (0, 1] applied to the features first and undone when virtual features are drawn (Tukey's
            ladder; 0.5 makes the skewed features behind a ReLU more like Gaussians). Below 1 it needs features of at
            least 0.
        device: of the sums; one with float64.

    Attributes:
        counts: samples of each class ``(C,)``, int64.
        sums: ``(C, D)``, float64.
        products: ``(C, D, D)``, float64.

    Raises:
        ValueError: for a wrong argument.

    Example:
        >>> statistics = FeatureStatistics(num_classes=2, num_features=1)
        >>> _ = statistics.update(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> statistics.mean().flatten()
        tensor([2., 5.], dtype=torch.float64)
        >>> statistics.covariance().flatten()  # unbiased; nobody knows it from one sample
        tensor([2., nan], dtype=torch.float64)
    """

    @check_types
    def __init__(
        self, num_classes: int, num_features: int, *, power: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        for name, value in (("num_classes", num_classes), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not 0 < power <= 1:
            raise ValueError(f"power must lie in (0, 1], 1 for the features as they are, got {power!r}")
        self.power = power
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.sums = torch.zeros(num_classes, num_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_classes, num_features, num_features, dtype=torch.float64, device=device)

    @property
    def num_classes(self) -> int:
        """``C``."""
        return self.sums.shape[0]

    @property
    def num_features(self) -> int:
        """``D``."""
        return self.sums.shape[1]

    @check_types
    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> Self:
        """Add samples.

        Args:
            features: ``(N, D)`` floating-point, finite, on any device.
            labels: true classes ``(N,)``, integers in ``[0, C)``.

        Returns:
            The statistics themselves.

        Raises:
            ValueError: for wrong shapes, a label out of range, features that are not finite, or negative ones under a
                power below 1.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features must have shape (N, {self.num_features}) and labels (N,), got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}; pass one feature vector and one class index for each sample"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integer classes, got {labels.dtype}; use labels.long()")
        if not len(labels):
            return self
        features = features.to(self.sums)
        labels = labels.to(self.counts)
        if not features.isfinite().all():
            raise ValueError("features must be finite, found NaN or infinity; look for faulty inputs or a diverged net")
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must lie in [0, {self.num_classes}), found {low if low < 0 else high}")
        if self.power != 1:
            if features.min() < 0:
                raise ValueError(
                    f"power={self.power} needs features of at least 0, found {features.min().item():.4g}; use power=1"
                )
            features = features**self.power
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        self.sums.index_add_(0, labels, features)
        for label in torch.unique(labels).tolist():
            rows = features[labels == label]
            self.products[label].addmm_(rows.T, rows)
        return self

    def merge(self, *others: FeatureStatistics) -> Self:
        """Add the samples of other statistics, such as those of other clients, and return the merged ones.

        Raises:
            ValueError: if they have other classes, features or another power.
        """
        for other in others:
            if other.sums.shape != self.sums.shape or other.power != self.power:
                raise ValueError(
                    f"statistics of (classes, features) {tuple(self.sums.shape)} and power {self.power} cannot take "
                    f"those of {tuple(other.sums.shape)} and power {other.power}; let all clients use one network"
                )
            self.counts += other.counts.to(self.counts)
            self.sums += other.sums.to(self.sums)
            self.products += other.products.to(self.products)
        return self

    def mean(self) -> Tensor:
        """Return the mean of each class ``(C, D)``, float64; NaN for a class without samples."""
        return self.sums / self.counts[:, None]

    def covariance(self) -> Tensor:
        r"""Return the unbiased covariance of each class ``(C, D, D)``, float64; NaN with fewer than two samples."""
        mean = torch.where(self.counts[:, None] > 0, self.mean(), 0)
        scatter = self.products - self.counts[:, None, None] * mean[:, :, None] * mean[:, None, :]
        scatter = (scatter + scatter.mT) / 2
        enough = (self.counts > 1)[:, None, None]
        return torch.where(enough, scatter / (self.counts - 1).clamp_min(1)[:, None, None], torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums and the power as tensors, by name; they are not copied."""
        power = torch.tensor(self.power, dtype=torch.float64)
        return {"counts": self.counts, "sums": self.sums, "products": self.products, "power": power}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """Return statistics with copies of what :meth:`state_dict` gave.

        Raises:
            ValueError: if names or shapes are not those of statistics.
        """
        names = {"counts", "sums", "products", "power"}
        if set(state) != names:
            raise ValueError(f"a state of feature statistics has {sorted(names)}, found {sorted(state)}")
        sums = state["sums"]
        num_classes, num_features = sums.shape if sums.ndim == 2 else (0, 0)
        shapes = [tuple(state[name].shape) for name in ("counts", "products")]
        if not num_features or shapes != [(num_classes,), (num_classes, num_features, num_features)]:
            raise ValueError(
                f"the shapes of counts and products, {shapes}, do not belong to sums of shape {tuple(sums.shape)}; the "
                "state is damaged"
            )
        statistics = cls(num_classes, num_features, power=float(state["power"]), device=sums.device)
        statistics.counts.copy_(state["counts"])
        statistics.sums.copy_(sums)
        statistics.products.copy_(state["products"])
        return statistics

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, for whoever merges the statistics of all clients."""
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        return write_atomically(path, save(state, metadata={"format": _FORMAT, "checksum": _checksum(state)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the statistics of a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = Path(path).read_bytes()
        try:
            state = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            # Files of earlier versions have no checksum.
            if header.get("__metadata__", {}).get("checksum", checksum := _checksum(state)) != checksum:
                raise ValueError("its checksum differs from the one that was written")
            return cls.from_state_dict(state)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no feature statistics: {error}; write it by .save(path)") from error


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@check_types
def sample_virtual_features(
    statistics: FeatureStatistics,
    samples_per_class: int | Sequence[int] | Tensor,
    *,
    shrinkage: float = 0.1,
    jitter: float = 1e-6,
    non_negative: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Draw features of each class from a Gaussian with its mean and covariance.

    A class with fewer samples than features has a singular covariance; it is mixed with the sphere of the same trace,
    :math:`(1 - \gamma) \Sigma + \gamma \operatorname{tr}(\Sigma) / D \cdot I`. A class with one sample takes the mean
    covariance of the other classes. What is drawn depends on ``seed`` and the class alone, not on the other classes,
    the device or the global generator.

    Args:
        statistics: of the real features.
        samples_per_class: how many of each class that has samples, or ``C`` numbers.
        shrinkage: :math:`\gamma` in [0, 1]; our choice.
        jitter: part of the mean variance that is added to all variances, so that rounding leaves a Cholesky factor;
            above 0.
        non_negative: clamp at 0, as a ReLU does. It moves the mean of features that are mostly 0.
        seed: at least 0.

    Returns:
        Virtual features ``(M, D)``, float32, and their classes ``(M,)``, sorted by class; on the statistics' device.

    Raises:
        ValueError: for a wrong argument, samples asked of a class that has none, or statistics without two samples
            of one class.

    Example:
        >>> rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 5
        >>> statistics = FeatureStatistics(1, 2).update(rows, torch.zeros(500, dtype=torch.int64))
        >>> features, labels = sample_virtual_features(statistics, 10_000)
        >>> bool((features.mean(0) - rows.mean(0)).abs().max() < 0.05)
        True
    """
    for name, value in (("shrinkage", shrinkage), ("jitter", jitter)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    counts = statistics.counts.tolist()
    if isinstance(samples_per_class, int):
        wanted = [samples_per_class if count else 0 for count in counts]
    else:
        wanted = [int(number) for number in samples_per_class]
    if len(wanted) != len(counts) or min(wanted) < 0 or not any(wanted):
        raise ValueError(
            f"samples_per_class must be a positive number, or {len(counts)} numbers of at least 0, got "
            f"{samples_per_class!r} for classes of {counts} samples"
        )
    if missing := [label for label, (n, count) in enumerate(zip(wanted, counts, strict=True)) if n and not count]:
        raise ValueError(f"classes {missing} have no samples to draw like; ask for 0 of them")
    if max(counts) < 2:
        raise ValueError("no class has two samples, so there is no covariance; collect more features")
    means, covariances = statistics.mean(), statistics.covariance()
    known = statistics.counts > 1
    shared = (covariances[known] * (statistics.counts[known] - 1)[:, None, None]).sum(0)
    shared = shared / (statistics.counts[known] - 1).sum()
    identity = torch.eye(statistics.num_features, dtype=torch.float64, device=means.device)
    features, labels = [], []
    for label, number in enumerate(wanted):
        if not number:
            continue
        covariance = covariances[label] if counts[label] > 1 else shared
        variance = covariance.diagonal().mean()
        if counts[label] < statistics.num_features:
            covariance = (1 - shrinkage) * covariance + shrinkage * variance * identity
        factor = _cholesky(covariance, jitter * variance, identity)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        noise = torch.randn(number, statistics.num_features, generator=generator, dtype=torch.float64)
        drawn = means[label] + noise.to(means.device) @ factor.T
        if statistics.power != 1:
            drawn = drawn.clamp_min(0) ** (1 / statistics.power)
        features.append((drawn.clamp_min(0) if non_negative else drawn).float())
        labels.append(torch.full((number,), label, device=means.device))
    return torch.cat(features), torch.cat(labels)


def _cholesky(covariance: Tensor, jitter: Tensor, identity: Tensor) -> Tensor:
    """Return a lower factor of a covariance that rounding may have made slightly indefinite."""
    if not covariance.diagonal().any():  # all samples are equal
        return torch.zeros_like(covariance)
    for _ in range(8):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * identity)
        if not failed:
            return factor
        jitter = 10 * jitter + torch.finfo(torch.float64).eps * covariance.diagonal().mean()
    raise ValueError(
        "a class covariance is far from positive; the sums were damaged, or the features are too far from 0 for the "
        "squares of their differences: normalise them"
    )


@dataclass(frozen=True)
class HeadCalibration:
    """What retraining a head gave, on the virtual features.

    Attributes:
        num_samples: virtual features of all classes.
        loss_before: mean cross-entropy in nats.
        loss_after: likewise.
        acc_before: share in [0, 1] that is classified as it was drawn.
        acc_after: likewise.
    """

    num_samples: int
    loss_before: float
    loss_after: float
    acc_before: float
    acc_after: float


@check_types
def calibrate_head_(
    head: nn.Linear,
    statistics: FeatureStatistics,
    *,
    samples_per_class: int = 200,
    balance: bool = True,
    learning_rate: float = 0.01,
    num_epochs: int = 10,
    batch_size: int = 64,
    shrinkage: float = 0.1,
    non_negative: bool = False,
    seed: int = 0,
) -> HeadCalibration:
    """Retrain a linear classifier in place, from where it is, on virtual features of all classes.

    SGD on the cross-entropy, in float32 whatever the type of the head. Nothing but ``weight`` and ``bias`` changes; no
    ``grad`` is left behind and no global random number drawn. Works inside ``torch.no_grad`` and ``inference_mode``.

    Args:
        head: ``D`` features to ``C`` classes.
        statistics: of the features that go into the head, over all clients or processes.
        samples_per_class: virtual features of a class, at least 1; the mean over classes without ``balance``.
        balance: the same number of each class, whatever their counts; otherwise in proportion to the counts.
        learning_rate: above 0.
        num_epochs: passes over the virtual features, at least 1.
        batch_size: at least 1.
        shrinkage: see :func:`sample_virtual_features`.
        non_negative: likewise.
        seed: of what is drawn and of the order, at least 0.

    Returns:
        Loss and accuracy on the virtual features before and after.

    Raises:
        ValueError: for a wrong argument, a class without samples, statistics that do not belong to the head, or a loss
            that is not finite; the head is then as it was.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> features, labels = torch.randn(100, 4), torch.arange(100) % 2
        >>> features[labels == 1] += 2
        >>> head = nn.Linear(4, 2)
        >>> statistics = FeatureStatistics(2, 4).update(features, labels)
        >>> calibrate_head_(head, statistics, learning_rate=0.1).acc_after > 0.9
        True

    Reference:
        M. Luo et al., "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
        NeurIPS 2021, section 4. There clients send means and covariances; sums hold the same and pool exactly. Step
        size, batch and number of epochs are ours.
    """
    for name, value in (
        ("samples_per_class", samples_per_class),
        ("num_epochs", num_epochs),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate!r}")
    if (head.out_features, head.in_features) != tuple(statistics.sums.shape):
        raise ValueError(
            f"statistics of {statistics.num_classes} classes and {statistics.num_features} features do not belong to a "
            f"head of {head.out_features} and {head.in_features}; collect what goes into this layer"
        )
    if not statistics.counts.all():
        missing = (statistics.counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"classes {missing} have no samples, and a head retrained without them would never predict them; merge "
            "statistics in which every class occurs"
        )
    wanted = torch.full_like(statistics.counts, samples_per_class)
    if not balance:
        share = statistics.counts / statistics.counts.sum()
        wanted = (share * samples_per_class * statistics.num_classes).round().long().clamp_min(1)
    with torch.inference_mode(False), torch.enable_grad():
        features, labels = sample_virtual_features(
            statistics, wanted, shrinkage=shrinkage, non_negative=non_negative, seed=seed
        )
        features, labels = features.to(head.weight.device), labels.to(head.weight.device)
        weight = head.weight.detach().clone().float().requires_grad_()
        bias = None if head.bias is None else head.bias.detach().clone().float().requires_grad_()
        before = _loss_and_accuracy(features, labels, weight, bias)
        optimizer = torch.optim.SGD([part for part in (weight, bias) if part is not None], lr=learning_rate)
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast(features.device.type, enabled=False):
            for _ in range(num_epochs):
                order = torch.randperm(len(labels), generator=generator).to(labels.device)
                for rows in torch.split(order, batch_size):
                    loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        after = _loss_and_accuracy(features, labels, weight, bias)
    if not torch.isfinite(torch.tensor(after[0])):
        raise ValueError(f"the head diverged at learning_rate={learning_rate}; lower it, for the features are large")
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return HeadCalibration(len(labels), before[0], after[0], before[1], after[1])


@torch.no_grad()
def _loss_and_accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[float, float]:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
