"""Two cheap orders of the blocks of a network: by how much they change their input, and by their weights' tails."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._processes import numbers_over_processes

__all__ = ["find_blocks", "input_modification", "keeps_shape", "lim_score", "weight_tails", "zd_score"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lim_score(inputs: Tensor, outputs: Tensor, *, channel_dim: int | None = None) -> Tensor:
    """Return the layer input modification of each sample, ``-cos(input, output)``: larger for what changes more.

    Args:
        inputs: hidden states that enter a block, ``(N, ...)``.
        outputs: what leaves it, residual included, of the same shape.
        channel_dim: subtract from both each channel's mean over samples and positions, along this dimension. Without
            it, tensors that are never negative (behind a ReLU) all point into one corner and look alike.

    Returns:
        ``(N,)``, in [-1, 1]; 0 for a sample that is all zeros.

    Raises:
        ValueError: if the shapes differ or there is no dimension beside the samples.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> lim_score(x, torch.tensor([[0.0, 2.0], [-3.0, -3.0]]))
        tensor([-0., 1.])

    Reference:
        Dumitru et al., *Layer-Wise Quantization*, 2024 (arXiv 2406.17415). Averaging per-sample cosines is ours.
    """
    if inputs.shape != outputs.shape or inputs.ndim < 2:
        raise ValueError(
            f"inputs and outputs must have one shape (N, ...), got {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    first, second = inputs.float(), outputs.float()
    if channel_dim is not None:
        others = [d for d in range(first.ndim) if d != channel_dim % first.ndim]
        first, second = (x - x.mean(others, keepdim=True) for x in (first, second))
    return -F.cosine_similarity(first.flatten(1), second.flatten(1)).clamp(-1, 1)


def zd_score(weight: Tensor, *, two_sided: bool = True) -> float:
    """Return the share of a weight's entries further than one standard deviation from their mean.

    Smaller means more important. 0.3173 for Gaussian weights, 0.1587 one-sided; heavy tails lower it.

    Args:
        weight: any shape.
        two_sided: count both tails; otherwise the upper one.

    Returns:
        In [0, 1]; minus infinity for weights that are all equal, which have no such share.

    Raises:
        ValueError: for weights that are not finite, or none.

    Example:
        >>> zd_score(torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]))
        0.2

    Reference:
        Dumitru et al., *Layer-Wise Quantization*, 2024 (arXiv 2406.17415).
    """
    weight = weight.detach().double()
    if not weight.numel() or not weight.isfinite().all():
        raise ValueError("weights must be finite numbers, at least one; look for the step that diverged")
    if weight.max() == weight.min():
        return -math.inf
    centred = weight - weight.mean()
    z = centred / centred.square().mean().sqrt()
    return float(((z.abs() if two_sided else z) > 1).double().mean())


@torch.no_grad()
def keeps_shape(model: nn.Module, inputs: Tensor) -> dict[str, bool]:
    """Return, for each module that a forward pass calls, whether what leaves it has the shape of what enters it.

    Of several inputs or outputs the first tensor counts.
    """
    found: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering, leaving = _first_tensor((*args, *kwargs.values())), _first_tensor(output)
            same = entering is not None and leaving is not None and entering.shape == leaving.shape
            found[name] = same and found.get(name, True)

        return hook

    handles = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def find_blocks(
    model: nn.Module, layers: Iterable[str], keeps: Mapping[str, bool], *, patterns: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the block that each layer belongs to.

    A block is the outermost module around the layer whose class occurs several times in the model and of which at least
    one instance keeps the shape of its input: the residual blocks of a ResNet, of an inverted-residual net, the encoder
    blocks of a transformer. Failing that it is the smallest module around the layer that keeps the shape, failing that
    the layer itself. The model as a whole and plain containers (``nn.Sequential`` and lists) do not count as repeated.

    Args:
        model: the network.
        layers: names of layers.
        keeps: from :func:`keeps_shape`.
        patterns: names of the blocks instead, ``*`` allowed; a layer in none of them stands alone.

    Raises:
        ValueError: if a pattern matches no module.
    """
    modules = dict(model.named_modules())
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"blocks: no module matches {pattern!r}; name modules as model.named_modules() does")
    count = Counter(type(module) for module in modules.values())
    repeated = {
        type(module)
        for name, module in modules.items()
        if name and keeps.get(name) and count[type(module)] > 1 and type(module) not in _CONTAINERS
    }
    blocks = {}
    for layer in layers:
        parts = layer.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts))]  # outermost first
        if patterns is not None:
            chosen = [name for name in around if any(fnmatchcase(name, pattern) for pattern in patterns)]
        else:
            chosen = [name for name in around if type(modules[name]) in repeated]
            chosen += [name for name in reversed(around) if keeps.get(name)]
        blocks[layer] = chosen[0] if chosen else layer
    return blocks


@torch.no_grad()
def input_modification(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], blocks: Iterable[str], *, centered: bool = False
) -> dict[str, tuple[float, float]]:
    """Return the mean of :func:`lim_score` over samples, and its standard error, for blocks that keep the shape."""
    samples: dict[str, list[Tensor]] = {name: [] for name in blocks}
    entering: dict[str, list[Tensor]] = {name: [] for name in samples}

    def hooks(name: str, module: nn.Module) -> Any:
        convolves = any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
        channel_dim = (1 if convolves else -1) if centered else None

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = _first_tensor((*args, *kwargs.values()))
            assert tensor is not None
            entering[name].append(tensor.clone())  # an activation in place may change it

        def after(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            assert tensor is not None
            samples[name].append(lim_score(entering[name].pop(), tensor, channel_dim=channel_dim).double().cpu())

        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )

    handles = [handle for name in samples for handle in hooks(name, model.get_submodule(name))]
    try:
        for inputs, _ in batches:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, parts in samples.items():
        scores = torch.cat(parts)
        count, total = numbers_over_processes(len(scores), float(scores.sum()))
        (squares,) = numbers_over_processes(float((scores - total / count).square().sum()))
        result[name] = (total / count, math.sqrt(squares / max(count - 1, 1) / count))
    return result


def weight_tails(model: nn.Module, blocks: Iterable[str], *, two_sided: bool = True) -> dict[str, float]:
    """Return the mean of :func:`zd_score` over the weight matrices and kernels of each block."""
    result = {}
    for name in dict.fromkeys(blocks):
        weights = [p for p in model.get_submodule(name).parameters() if p.ndim > 1]
        result[name] = sum(zd_score(weight, two_sided=two_sided) for weight in weights) / len(weights)
    return result


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)
