"""A copy of a network that is quicker to attack."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_plugins.checks import warn_caller

__all__ = ["AttackCopy", "attack_copy"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class AttackCopy(nn.Module):
    """A frozen network that takes images of any floating type and returns logits of at least float32.

    It stays in evaluation mode whatever ``train`` is asked for. See :func:`attack_copy`.

    Args:
        network: that is called; it is not copied.
        dtype: images are cast to it; None leaves them.
        channels_last: hand images over in this memory format.
    """

    def __init__(
        self, network: nn.Module, *, dtype: torch.dtype | None = None, channels_last: bool | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.dtype, self.channels_last = dtype, bool(channels_last)
        self.train(False)

    def train(self, mode: bool = True) -> AttackCopy:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``(N, C)``."""
        last = self.channels_last and inputs.ndim == 4
        dtype = self.dtype or inputs.dtype
        inputs = inputs.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)
        logits: Tensor = self.network(inputs)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def attack_copy(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    example: Tensor | None = None,
) -> AttackCopy:
    """Copy a network for attacks: in evaluation mode, frozen, without batch normalisations, in a fast layout and type.

    Batch normalisation in evaluation mode is a linear map, and is folded into the convolution before it: the logits
    stay the same up to rounding. The copy shares no tensor with the model, so it does not follow its training.

    Args:
        model: from images to logits. Only ``forward`` is used.
        dtype: type of the copy's weights and activations, such as ``torch.bfloat16``; the perturbation and the logits
            stay in float32. Default: that of the model.
        channels_last: store convolutions' weights and images with channels as the quickest dimension.
        example: a batch of images on which the folded copy is compared with the model.

    Returns:
        The copy, a module for ``logits_fn``.

    Raises:
        TypeError: if ``model`` is a function, or for another argument of the wrong type.
        ValueError: if ``dtype`` is not a floating type.

    Warns:
        UserWarning: if the network cannot be traced by ``torch.fx``, or the folded copy differs on ``example``; the
            copy then keeps its batch normalisations.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
        >>> quick = attack_copy(net, example=torch.rand(2, 3, 4, 4))
        >>> sum(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attack_copy needs an nn.Module, found {type(model).__name__}; wrap the function in one")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating type such as torch.bfloat16, got {dtype}")
    if not isinstance(channels_last, bool):
        raise TypeError(f"channels_last must be True or False, got {channels_last!r}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example must be a batch of images, got a {type(example).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        plain = copy.deepcopy(getattr(model, "_orig_mod", model))  # a compiled module keeps the network there
        for module in plain.modules():
            module.training = False
        plain.requires_grad_(False)
        for parameter in plain.parameters():
            parameter.grad = None
        network = _folded(plain, example)
        network.to(dtype=dtype)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        return AttackCopy(network, dtype=dtype, channels_last=channels_last)


def _folded(plain: nn.Module, example: Tensor | None) -> nn.Module:
    if not any(isinstance(module, _NORMS) for module in plain.modules()):
        return plain
    try:
        traced = torch.fx.symbolic_trace(copy.deepcopy(plain))
        _fold_(traced)
        if example is not None:
            expected, found = plain(example), traced(example)
            difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
            if not difference < 1e-2:
                raise RuntimeError(f"its logits on the example differ by {difference:.2g} of the largest")
    except Exception as error:  # tracing runs the user's code on stand-ins, which may fail in any way
        warn_caller(
            f"{type(plain).__name__} keeps its batch normalisations in the attack copy, which is correct but slower: "
            f"{error}"
        )
        return plain
    return traced


def _fold_(traced: torch.fx.GraphModule) -> None:
    """Fold batch normalisations into convolutions whose output nothing else reads."""
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, convolution = modules[str(node.target)], modules[str(before.target)]
        exact = type(norm) in _NORMS and type(convolution) in _CONVOLUTIONS
        once = calls[node.target] == calls[before.target] == 1
        hooked = any((*m._forward_hooks, *m._forward_pre_hooks) for m in (norm, convolution))
        if not exact or not once or hooked or norm.running_mean is None:
            continue
        fused = fuse_conv_bn_eval(convolution, norm)
        traced.set_submodule(str(before.target), fused.requires_grad_(False))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
