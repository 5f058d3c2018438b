"""Whether the input coordinates with large gradients are those that carry the class.

:func:`diff_roar` retrains networks on images of which only the coordinates ranked highest, or lowest, are left.
:class:`BlockDataset` puts a block without information next to every image, where :func:`gradient_leakage` measures what
gradients waste on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_plugins.checks import check_types
from lightning_plugins.gradients import grad_context, ordinary
from lightning_plugins.robustness.attack import LogitsFn, attacking, check_classes, check_targets, private_generator

__all__ = [
    "BlockDataset",
    "DiffROAR",
    "diff_roar",
    "fit_classifier",
    "gradient_leakage",
    "input_gradients",
    "unmask",
]

Labelled = tuple[Tensor, Tensor]
_BATCH_SIZE = 512
_POSITIONS = 0x70B  # labels that were drawn with the same small seed must not give the positions away


@check_types
def input_gradients(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    of: Literal["logit", "loss"] = "logit",
) -> Tensor:
    """Return the gradient of a logit, or of the cross-entropy, with respect to the input.

    One pass forward and backward. A module is asked in evaluation mode and given back as it was. Works inside
    ``no_grad`` and ``inference_mode``.

    Args:
        logits_fn: from inputs to logits ``(N, C)``.
        inputs: ``(N, ...)``, floating-point.
        targets: classes ``(N,)`` int64 whose logit or loss is meant. Default: the predicted ones.
        of: ``"logit"`` or ``"loss"``.

    Returns:
        In shape and type of the inputs.

    Raises:
        ValueError: for wrong arguments, or logits that do not depend on the inputs through autograd.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
        >>> input_gradients(lambda x: x @ weight.T, torch.tensor([[1.0, 1.0]]))
        tensor([[2., 3.]])
    """
    if of not in ("logit", "loss"):
        raise ValueError(f"of must be 'logit' or 'loss', got {of!r}")
    if not inputs.is_floating_point() or inputs.ndim < 2:
        raise ValueError(f"inputs must be floating-point (N, ...), got {inputs.dtype} {tuple(inputs.shape)}")
    with attacking(logits_fn, inputs, full_precision=True) as network:
        images = ordinary(inputs).clone().requires_grad_()
        logits = network.forward(images)
        classes = logits.detach().argmax(1) if targets is None else check_targets("targets", targets, inputs)
        check_classes("targets", classes, logits)
        if not logits.requires_grad:
            raise ValueError(
                "the logits do not depend on the inputs through autograd; remove detach() or no_grad() from the network"
            )
        if of == "logit":
            total = logits.gather(1, classes[:, None]).sum()
        else:
            total = F.cross_entropy(logits, classes, reduction="sum")
        (gradient,) = torch.autograd.grad(total, [images])
        return gradient


@check_types
def unmask(
    inputs: Tensor,
    ranking: Tensor,
    share: float,
    *,
    keep: Literal["top", "bottom"] = "top",
    fill: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep the share of each input's coordinates that is ranked highest or lowest; overwrite the others.

    Args:
        inputs: ``(N, ...)``.
        ranking: how important each coordinate is, by magnitude: gradients do as they are. It broadcasts to the inputs,
            so that ``(N, 1, H, W)`` ranks pixels rather than the values of their channels.
        share: of the coordinates to keep, in [0, 1], rounded to whole coordinates.
        keep: ``"top"`` or ``"bottom"``.
        fill: what the others become, such as the mean image; it broadcasts to the inputs.
        generator: on the CPU; breaks ties at random. Default: one seeded with 0, with which the top share and the
            bottom rest of one ranking never overlap.

    Returns:
        In shape and type of the inputs.

    Raises:
        ValueError: for wrong arguments or shapes, or NaN in the ranking.

    Example:
        >>> inputs, ranking = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.1, -0.9, 0.5, 0.0]])
        >>> unmask(inputs, ranking, 0.5)
        tensor([[0., 2., 3., 0.]])
        >>> unmask(inputs, ranking, 0.5, keep="bottom", fill=-1.0)
        tensor([[ 1., -1., -1.,  4.]])
    """
    if keep not in ("top", "bottom"):
        raise ValueError(f"keep must be 'top' or 'bottom', got {keep!r}")
    _check_share(share)
    if ranking.ndim != inputs.ndim or len(ranking) != len(inputs) or not _broadcasts(ranking, inputs):
        raise ValueError(
            f"ranking must be {tuple(inputs.shape)} as the inputs, or 1 in places after the first, got "
            f"{tuple(ranking.shape)}"
        )
    other = torch.as_tensor(fill, dtype=inputs.dtype, device=inputs.device)
    if other.ndim > inputs.ndim or not _broadcasts(other[(None,) * (inputs.ndim - other.ndim)], inputs):
        raise ValueError(f"fill must broadcast to the inputs {tuple(inputs.shape)}, got {tuple(other.shape)}")
    order = _order(ranking, generator)
    count = round(share * order.shape[1])
    kept = order[:, :count] if keep == "top" else order[:, order.shape[1] - count :]
    mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, kept, True).view(ranking.shape)
    return torch.where(mask, inputs, other)


@dataclass(frozen=True)
class DiffROAR:
    """What networks learn from the coordinates ranked highest and lowest.

    Attributes:
        shares: of the coordinates kept, S of them.
        top: test accuracy of a network retrained on the highest of each share, float64 ``(S, R)`` for R repeats.
        bottom: likewise on the lowest.
    """

    shares: tuple[float, ...]
    top: Tensor
    bottom: Tensor

    @property
    def difference(self) -> Tensor:
        """DiffROAR ``(S,)``: how much more the highest say than the lowest, in [-1, 1], averaged over repeats."""
        return (self.top - self.bottom).mean(1)


@check_types
def diff_roar(
    train: Labelled,
    test: Labelled,
    attribution: Callable[[Tensor], Tensor],
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
    make_model: Callable[[], nn.Module] | None = None,
    fit: Callable[[nn.Module, Tensor, Tensor], Any] | None = None,
    fill: float | Tensor = 0.0,
    num_repeats: int = 1,
    generator: torch.Generator | None = None,
) -> DiffROAR:
    r"""Retrain on the coordinates that an attribution ranks highest, and on those it ranks lowest, and compare.

    The predictive power of an attribution's share k is the test accuracy of a fresh network trained and tested on
    inputs with nothing but that share left. :math:`\mathrm{DiffROAR}(k)` is that of the top k minus that of the bottom
    k: above 0 where the ranking is right, near 0 for a random one, below 0 for one that is upside down. It takes
    ``2 * len(shares) * num_repeats`` trainings. Top and bottom start from the same weights. The global generators are
    left as they were found.

    Args:
        train: inputs ``(N, ...)``, floating-point, and classes ``(N,)``, int64, 0 to C - 1.
        test: likewise.
        attribution: from inputs, in batches, to rankings as :func:`unmask` takes them; ``input_gradients`` of the
            network under examination, for instance.
        shares: of the coordinates to keep, in [0, 1].
        make_model: makes a fresh network. Default: a perceptron of two hidden layers of 256.
        fit: trains a network in place, given inputs and classes. Default: :func:`fit_classifier`.
        fill: what the other coordinates become: 0 by the paper's definition, ``train[0].mean(0)`` in its code.
        num_repeats: trainings of each, from different weights.
        generator: of the weights, on the CPU. Default: one seeded with 0.

    Returns:
        Accuracies and their difference.

    Raises:
        ValueError: for wrong arguments or shapes.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> inputs = torch.randn(256, 4, generator=g)
        >>> data = inputs, (inputs[:, 0] > 0).long()  # the first coordinate says it all
        >>> ranking = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> result = diff_roar(data, data, ranking.expand_as, shares=[0.25])
        >>> result.difference.item() > 0.2
        True

    Reference:
        H. Shah, P. Jain, P. Netrapalli, "Do Input Gradients Highlight Discriminative Features?", NeurIPS 2021. There
        ties are broken by the coordinate's index, here at random.
    """
    for name, (inputs, targets) in (("train", train), ("test", test)):
        if not len(inputs) or not inputs.is_floating_point() or inputs.ndim < 2:
            raise ValueError(f"{name} inputs must be floating-point (N, ...), got {inputs.dtype} {tuple(inputs.shape)}")
        check_targets(f"{name} classes", targets, inputs)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"train and test inputs differ: {tuple(train[0].shape[1:])}, {tuple(test[0].shape[1:])}")
    for share in shares:
        _check_share(share)
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats!r}")
    num_classes = int(torch.cat([train[1], test[1].to(train[1].device)]).max()) + 1

    def perceptron() -> nn.Module:
        widths = (math.prod(train[0].shape[1:]), 256, 256, num_classes)
        first, second, last = (nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)

    seeds = torch.randint(2**31, (num_repeats,), generator=private_generator(generator)).tolist()
    rankings = [torch.cat([attribution(part) for part in torch.split(data[0], _BATCH_SIZE)]) for data in (train, test)]
    top: list[float] = []
    bottom: list[float] = []
    with grad_context():
        for share in shares:
            for keep, accuracies in (("top", top), ("bottom", bottom)):
                side = cast(Literal["top", "bottom"], keep)
                (seen, classes), (unseen, truth) = (
                    (unmask(ordinary(inputs), ordinary(ranking), share, keep=side, fill=fill), ordinary(targets))
                    for (inputs, targets), ranking in zip((train, test), rankings, strict=True)
                )
                for seed in seeds:
                    with torch.random.fork_rng(range(torch.cuda.device_count())):
                        torch.manual_seed(seed)
                        model = (make_model or perceptron)().to(seen.device)
                        (fit or fit_classifier)(model, seen, classes)
                        accuracies.append(_accuracy(model, unseen, truth))
    size = (len(shares), num_repeats)
    return DiffROAR(tuple(shares), *(torch.tensor(part, dtype=torch.float64).view(size) for part in (top, bottom)))


def fit_classifier(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    num_epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
) -> None:
    """Train a network in place with Adam on the cross-entropy: the default of :func:`diff_roar`.

    Args:
        model: from inputs to logits ``(N, C)``.
        inputs: ``(N, ...)`` on the model's device.
        targets: classes ``(N,)``, int64.
        num_epochs: passes over the data.
        batch_size: of a step.
        learning_rate: of Adam.
        generator: of the order of the samples, on the CPU. Default: one seeded with 0.

    Raises:
        ValueError: for a number of epochs or a size below 1.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fit_classifier(model, inputs, torch.tensor([0, 1]), num_epochs=100, learning_rate=0.1)
        >>> model(inputs).argmax(1)
        tensor([0, 1])
    """
    if num_epochs < 1 or batch_size < 1:
        raise ValueError(f"num_epochs and batch_size must be at least 1, got {num_epochs!r} and {batch_size!r}")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    shuffle = private_generator(generator)
    model.train()
    for _ in range(num_epochs):
        for rows in torch.split(torch.randperm(len(inputs), generator=shuffle).to(inputs.device), batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


class BlockDataset(Dataset[tuple[Tensor, Any]]):
    """Images with a block that says nothing about the class above or below them.

    Args:
        base: map-style data set of samples ``(image, label, ...)`` with images ``(C, H, W)`` of one shape, such as
            28x28 digits.
        null: the block without information: ``"box"``, the outline of a square of value 1 on 0, or an image of the
            shape of the others.
        position: where the image goes: ``"random"`` for each sample, ``"top"`` or ``"bottom"``.
        seed: of the random positions; they are the same at each pass.

    Attributes:
        on_top: booleans ``(N,)``: the image is above the null block.
        null: the null block ``(C, H, W)``.

    Raises:
        TypeError: if the images are not tensors ``(C, H, W)``.
        ValueError: for wrong arguments or shapes.

    Example:
        >>> base = torch.utils.data.TensorDataset(torch.full((3, 1, 28, 28), 0.5), torch.arange(3))
        >>> blocks = BlockDataset(base, position="top")
        >>> image, label = blocks[2]
        >>> image.shape, label, image[:, :28].mean(), image[:, 28:].max()
        (torch.Size([1, 56, 28]), tensor(2), tensor(0.5000), tensor(1.))

    Reference:
        H. Shah, P. Jain, P. Netrapalli, "Do Input Gradients Highlight Discriminative Features?", NeurIPS 2021.
    """

    @check_types
    def __init__(
        self,
        base: Dataset[Any],
        *,
        null: Literal["box"] | Tensor = "box",
        position: Literal["random", "top", "bottom"] = "random",
        seed: int = 0,
    ) -> None:
        if position not in ("random", "top", "bottom"):
            raise ValueError(f"position must be 'random', 'top' or 'bottom', got {position!r}")
        self.base = base
        num_samples = len(base)  # type: ignore[arg-type]
        if not num_samples:
            raise ValueError("base must hold at least one sample")
        image = base[0][0]
        if not isinstance(image, Tensor) or image.ndim != 3:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images must be tensors (C, H, W), found {found}; add a transform such as ToTensor()")
        if isinstance(null, Tensor):
            if null.shape != image.shape:
                raise ValueError(f"null must have the images' shape {tuple(image.shape)}, got {tuple(null.shape)}")
            self.null = null.to(image.dtype)
        elif null == "box":
            self.null = _box(image)
        else:
            raise ValueError(f"null must be 'box' or an image, got {null!r}")
        if position == "random":
            generator = torch.Generator().manual_seed(seed ^ _POSITIONS)
            self.on_top = torch.rand(num_samples, generator=generator) < 0.5
        else:
            self.on_top = torch.full((num_samples,), position == "top")

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.on_top)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Return the image ``(C, 2 * H, W)`` and its label."""
        image, label, *_ = self.base[index]
        blocks = (image, self.null) if self.on_top[index] else (self.null, image)
        return torch.cat(blocks, dim=1), label

    def null_mask(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return where the null blocks are: booleans ``(N, 1, 2 * H, W)`` of the samples asked for, or of all."""
        on_top = self.on_top if indices is None else self.on_top[torch.as_tensor(indices)]
        height, width = self.null.shape[1:]
        below = (torch.arange(2 * height) >= height).view(1, 1, -1, 1)
        return (below == on_top.view(-1, 1, 1, 1)).expand(-1, -1, -1, width)


@check_types
def gradient_leakage(
    gradients: Tensor, null_mask: Tensor, *, share: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Return how much of the largest gradients' magnitude lies where there is nothing to see.

    Args:
        gradients: ``(N, ...)``, such as :func:`input_gradients` returns.
        null_mask: booleans that broadcast to the gradients, true where inputs hold no information, such as
            :meth:`BlockDataset.null_mask` returns.
        share: of the coordinates, those of largest magnitude, that count; in (0, 1].
        generator: on the CPU; breaks ties at random. Default: one seeded with 0.

    Returns:
        ``(N,)``, in [0, 1]; NaN where all gradients are 0. Gradients that ignore the difference give the share of the
        coordinates that is null, 0.5 for a :class:`BlockDataset`.

    Raises:
        ValueError: for wrong arguments or shapes, or NaN.

    Example:
        >>> gradients = torch.tensor([[3.0, -1.0, 0.0, 0.5]])
        >>> gradient_leakage(gradients, torch.tensor([[False, True, True, True]]), share=0.5)
        tensor([0.2500])

    Reference:
        H. Shah, P. Jain, P. Netrapalli, "Do Input Gradients Highlight Discriminative Features?", NeurIPS 2021. The
        paper shows leakage in pictures; this number is our choice.
    """
    _check_share(share)
    if gradients.ndim < 2 or not gradients.is_floating_point():
        raise ValueError(f"gradients must be floating-point (N, ...), got {gradients.dtype} {tuple(gradients.shape)}")
    if null_mask.dtype != torch.bool or null_mask.ndim != gradients.ndim or not _broadcasts(null_mask, gradients):
        raise ValueError(
            f"null_mask must be booleans that broadcast to {tuple(gradients.shape)}, got {null_mask.dtype} "
            f"{tuple(null_mask.shape)}"
        )
    order = _order(gradients, generator)
    count = round(share * order.shape[1])
    if not count:
        raise ValueError(f"share must leave at least one of {order.shape[1]} coordinates, got {share!r}")
    magnitudes = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).abs().flatten(1)
    largest = magnitudes.gather(1, order[:, :count])
    null = null_mask.to(gradients.device).expand_as(gradients).flatten(1).gather(1, order[:, :count])
    return (largest * null).sum(1) / largest.sum(1)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share!r}; 0.1 keeps ten percent")


def _broadcasts(tensor: Tensor, to: Tensor) -> bool:
    return all(own in (1, other) for own, other in zip(tensor.shape, to.shape, strict=True))


def _order(ranking: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the places of the coordinates of each row by falling magnitude ``(N, d)``, ties at random."""
    magnitude = ranking.abs().flatten(1)
    if bool(magnitude.isnan().any()):
        raise ValueError("the ranking must not hold NaN; look at the gradients")
    shuffled = torch.rand(magnitude.shape, generator=private_generator(generator), dtype=torch.float64).argsort(1)
    shuffled = shuffled.to(magnitude.device)
    return shuffled.gather(1, magnitude.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))


def _box(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    edge, line = min(height, width) // 4, max(1, min(height, width) // 14)
    box = torch.zeros_like(image)
    box[:, edge : height - edge, edge : width - edge] = 1
    box[:, edge + line : height - edge - line, edge + line : width - edge - line] = 0
    return box


def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [
            (model(part).argmax(1) == truth).sum()
            for part, truth in zip(torch.split(inputs, _BATCH_SIZE), torch.split(targets, _BATCH_SIZE), strict=True)
        ]
    return float(torch.stack(right).sum()) / len(inputs)
