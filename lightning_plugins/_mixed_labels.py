"""Labels of mixed samples that pass for integer labels; :mod:`.mixing` is their door."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.checks import check_types

P = ParamSpec("P")

# Losses that torch computes from integer labels as their second argument.
_LOSSES = {F.cross_entropy, F.nll_loss, F.multi_margin_loss}
# After these the labels are still the same labels.
_SAME_LABELS = {"long", "to", "detach", "clone", "contiguous", "view", "reshape", "flatten", "squeeze", "cpu", "cuda"}


class MixedLabels(Tensor):
    r"""Labels of mixed samples, which pass for the integer labels ``(N,)`` that a training step expects.

    Sample ``i`` belongs to class ``components[k, i]`` with share :math:`\lambda_{k}` (or :math:`\lambda_{k,i}`).

    - ``F.cross_entropy``, ``F.nll_loss`` and ``F.multi_margin_loss`` (and the modules that call them) return
      :math:`\sum_k \lambda_k\, \ell(f, y_k)`, whatever their class weights, label smoothing or ignored index; so do
      functions under :func:`takes_mixed_labels`.
    - ``F.one_hot`` returns the soft labels ``(N, C)``, float32.
    - Everything else, an accuracy for instance, sees plain integers: the class with the largest share of each sample.

    ``used`` says whether one of the first two has happened, here or in what a slice, ``.long()`` or ``.to()`` made.
    Changing it in place is refused. It belongs inside one training step: a pickled copy is plain integers.

    Args:
        components: integer labels ``(K, N)``.
        shares: ``(K,)``, the same for all samples, or ``(K, N)``; at least 0, summing to 1 over ``K``.

    Raises:
        TypeError: for what are no tensors.
        ValueError: if the shapes do not fit.

    Example:
        >>> labels = MixedLabels(torch.tensor([[0, 1], [2, 1]]), torch.tensor([0.25, 0.75]))
        >>> labels
        tensor([2, 1])
        >>> labels.soft(3)
        tensor([[0.2500, 0.0000, 0.7500],
                [0.0000, 1.0000, 0.0000]])
        >>> F.cross_entropy(torch.zeros(2, 3), labels)  # log 3
        tensor(1.0986)
    """

    components: Tensor
    shares: Tensor
    dominant: Tensor
    _uses: list[str]

    @staticmethod
    def __new__(cls, components: Tensor, shares: Tensor) -> MixedLabels:  # noqa: D102
        if not (isinstance(components, Tensor) and isinstance(shares, Tensor)):
            raise TypeError(
                f"components and shares must be tensors, got {type(components).__name__} and {type(shares).__name__}; "
                "use torch.as_tensor"
            )
        if (
            components.ndim != 2
            or components.is_floating_point()
            or components.is_complex()
            or shares.is_complex()
            or shares.shape
            not in (
                components.shape,
                components.shape[:1],
            )
        ):
            raise ValueError(
                "components must be integer labels (K, N) and shares (K,) or (K, N), got "
                f"{tuple(components.shape)} {components.dtype} and {tuple(shares.shape)}"
            )
        # A class that two of the mixed samples share has the sum of their shares.
        per_sample = shares.reshape(len(shares), -1)
        total = ((components[:, None] == components[None]) * per_sample[None]).sum(1)
        return cls._of(components.gather(0, total.argmax(0, keepdim=True))[0], components, shares, [])

    @classmethod
    def _of(cls, dominant: Tensor, components: Tensor, shares: Tensor, uses: list[str]) -> MixedLabels:
        labels = dominant.as_subclass(cls)
        labels.components, labels.shares, labels.dominant, labels._uses = components, shares, dominant, uses
        return labels

    @property
    def used(self) -> bool:
        """Whether a loss, or one-hot coding, has read the shares."""
        return bool(self._uses)

    def soft(self, num_classes: int) -> Tensor:
        """Return the soft labels ``(N, C)``, float32.

        Raises:
            ValueError: for a label outside ``[0, C)``.
        """
        self._uses.append("soft")
        return soft_labels(self.components, self.shares, num_classes)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what the class says."""
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], MixedLabels) else None
        name = getattr(func, "__name__", "")
        if func in _LOSSES:
            target = kwargs["target"] if "target" in kwargs else args[1]
            if isinstance(target, MixedLabels):
                return target._mix(func, args, kwargs)
        if func is F.one_hot and own is not None:
            count = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            return own.soft(int(own.components.max()) + 1 if count == -1 else count)
        tracked = own is not None and not own.dominant.is_inference()
        before = own.dominant._version if own is not None and tracked else None
        result = func(*_plain(args), **_plain(kwargs))
        if own is None:
            return result
        if tracked and own.dominant._version != before:
            raise TypeError(
                f"{name} changes the labels of a mixed batch in place, where their shares cannot follow; work on "
                "a copy, targets.clone(), before the batch is mixed"
            )
        if not isinstance(result, Tensor) or result.is_floating_point() or result.dtype == torch.bool:
            return result
        if name in _SAME_LABELS and result.shape == own.dominant.shape:
            return cls._of(result, own.components.to(result), own.shares.to(result.device), own._uses)
        if name == "__getitem__" and result.ndim == 1 and isinstance(args[1], (slice, Tensor)):
            chosen = _plain(args[1])
            shares = own.shares if own.shares.ndim == 1 else own.shares[:, chosen]
            return cls._of(result, own.components[:, chosen], shares, own._uses)
        return result

    def _mix(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the loss for each component, weighted by its share."""
        self._uses.append(getattr(func, "__name__", "loss"))

        def loss(labels: Tensor, **more: Any) -> Tensor:
            if "target" in kwargs:
                return func(*args, **{**kwargs, "target": labels, **more})
            return func(args[0], labels, *args[2:], **{**kwargs, **more})

        logits = kwargs["input"] if "input" in kwargs else args[0]
        shares = self.shares.to(logits.device)
        components = self.components.to(logits.device)
        if shares.ndim == 1:
            return torch.stack([share * loss(labels) for share, labels in zip(shares, components, strict=True)]).sum(0)
        reduction = kwargs.get("reduction", "mean")
        losses = torch.stack([loss(labels, reduction="none") for labels in components])
        if reduction == "none":
            return (shares * losses).sum(0)
        if reduction == "sum":
            return (shares * losses).sum()
        # As torch does it, a weighted mean divides by the weights of what is counted; its margin loss divides by N.
        counted = shares * (components != kwargs.get("ignore_index", -100))
        weight = kwargs.get("weight")
        if weight is not None and func in (F.cross_entropy, F.nll_loss):
            counted = counted * weight[components.clamp_min(0)]
        mean: Tensor = (shares * losses).sum() / counted.sum()
        return mean


def takes_mixed_labels(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    r"""Let a loss ``(logits, target, ...)`` of integer labels take :class:`MixedLabels`.

    It is then :math:`\sum_k \lambda_k\, \ell(f, y_k)`. With shares that differ between samples the loss must take
    ``reduction="none"``, and its mean divides by the number of samples.

    Example:
        >>> @takes_mixed_labels
        ... def squared(logits, target, reduction="mean"):
        ...     losses = (1 - logits.softmax(1).gather(1, target[:, None])[:, 0]).square()
        ...     return losses.mean() if reduction == "mean" else losses
        >>> squared(torch.zeros(1, 2), MixedLabels(torch.tensor([[0], [1]]), torch.tensor([0.5, 0.5])))
        tensor(0.2500)
    """

    @functools.wraps(loss)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        target = kwargs["target"] if "target" in kwargs else args[1] if len(args) > 1 else None
        if isinstance(target, MixedLabels):
            if "logits" in kwargs:
                args, kwargs = (kwargs.pop("logits"), *args), kwargs  # type: ignore[assignment]
            return target._mix(loss, args, kwargs)
        return loss(*args, **kwargs)

    return wrapped


@check_types
def mixed_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the accuracy on mixed labels, :math:`\sum_k \lambda_k\, acc(y_k)`, a float32 scalar.

    Args:
        logits: ``(N, C)``.
        targets: :class:`MixedLabels`, soft labels ``(N, C)``, or integers ``(N,)``.

    Raises:
        ValueError: for other shapes.

    Example:
        >>> labels = MixedLabels(torch.tensor([[0], [1]]), torch.tensor([0.7, 0.3]))
        >>> mixed_accuracy(torch.tensor([[0.0, 2.0]]), labels)
        tensor(0.3000)
    """
    if logits.ndim != 2 or not logits.shape[1] or targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            "logits must be (N, C) and targets (N,) or soft labels (N, C), got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    predicted = logits.argmax(1)
    if isinstance(targets, MixedLabels):
        shares = targets.shares.reshape(len(targets.shares), -1)
        return ((targets.components == predicted) * shares).sum(0).mean()
    if targets.ndim == 2:
        return targets.float().gather(1, predicted[:, None]).mean()
    return (predicted == targets).float().mean()


def _plain(value: Any) -> Any:
    """Return the value with integer labels in the place of mixed ones, at any depth."""
    if isinstance(value, MixedLabels):
        return value.dominant
    if isinstance(value, (tuple, list)):
        plain = [_plain(part) for part in value]
        return plain if isinstance(value, list) else tuple(plain)
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def soft_labels(components: Tensor, shares: Tensor, num_classes: int) -> Tensor:
    if components.numel() and (int(components.min()) < 0 or int(components.max()) >= num_classes):
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {int(components.min())} to {int(components.max())}; correct "
            "the data or num_classes"
        )
    shares = shares.reshape(len(shares), -1).expand(components.shape).float()
    soft = torch.zeros(components.shape[1], num_classes, dtype=torch.float32, device=components.device)
    return soft.scatter_add_(1, components.T.long(), shares.T)
