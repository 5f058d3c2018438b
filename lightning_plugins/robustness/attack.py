"""What all attacks share: the result, the borrowed network, counted queries, private randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_generator, warn_caller
from lightning_plugins.gradients import grad_context, ordinary
from lightning_plugins.modes import evaluation_mode
from lightning_plugins.robustness.perturbation import Bounds, Norm, PerturbationSet

__all__ = ["AttackResult", "LogitsFn"]

LogitsFn = Callable[[Tensor], Tensor]
"""From images ``(N, ...)`` to logits ``(N, C)``; an ``nn.Module`` or any function."""

_HALF_SCALE = 2.0**14  # float16 loses gradients below 6e-8; a power of two changes no direction
MANY_ZEROS = 0.01


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        adversarial: images in the type, device and memory format of the inputs.
        success: ``(N,)`` booleans: the prediction for ``adversarial`` is not the true class. Images that were
            misclassified before the attack count. One minus its mean is the robust accuracy.
        logits: ``(N, C)`` for ``adversarial``, at least float32: metrics need no further pass.
        num_gradients: passes forward and backward to the input, whatever the number of images in each.
        num_forwards: all forward passes, those of the gradients included.
        num_zero_gradients: images, summed over passes, whose gradient was exactly zero while they were still classified
            right. Many mean that the attack was blind and the network only looks robust.
    """

    adversarial: Tensor
    success: Tensor
    logits: Tensor
    num_gradients: int
    num_forwards: int
    num_zero_gradients: int


class Network:
    """A logits function with its passes counted."""

    def __init__(self, logits_fn: LogitsFn) -> None:
        self._logits_fn = logits_fn
        self.num_forwards = self.num_gradients = 0
        self._num_rows = 0
        self._zeros: Tensor | None = None
        self._half = False

    def logits(self, images: Tensor) -> Tensor:
        """Return logits without a graph."""
        with torch.no_grad():
            return self.forward(images)

    def gradient(
        self,
        space: PerturbationSet,
        coordinates: Tensor,
        loss: Callable[[Tensor], Tensor],
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of each row's loss with respect to its coordinates, the losses, and the logits.

        With ``targets`` only rows that are still right count among the zero gradients: the DLR loss is constant where
        the true class comes third, and a row that is wrong already needs no gradient.
        """
        images = space.image(coordinates).detach().requires_grad_()
        logits = self.forward(images)
        losses = loss(logits)
        scaled = self._half or _autocasts_to_half(images.device.type)
        total = losses.sum() * _HALF_SCALE if scaled else losses.sum()
        right = None if targets is None else ~wrong(logits, targets)
        gradient = self.input_gradient(space, total, images, counted=right)
        if scaled:
            gradient = gradient.nan_to_num(0.0)  # an overflow in one pixel must not spoil the image
        return gradient, losses.detach(), logits.detach()

    def input_gradient(
        self,
        space: PerturbationSet,
        total: Tensor,
        images: Tensor,
        *,
        keep: bool = False,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of a sum over rows with respect to the coordinates of the images."""
        if not total.requires_grad:
            raise ValueError(
                "the logits do not depend on the inputs through autograd, so no gradient attack can work; remove "
                "detach() or no_grad() from the network, or use square(), which needs no gradients"
            )
        (gradient,) = torch.autograd.grad(total, [images], retain_graph=keep)
        self.num_gradients += 1
        gradient = space.pull_back(gradient)
        if gradient.numel():
            zero = (gradient != 0).flatten(1).sum(1) == 0
            zeros = zero.sum() if counted is None else (zero & counted).sum()
        else:
            zeros = torch.tensor(0)
        self._zeros = zeros if self._zeros is None else self._zeros + zeros
        self._num_rows += len(gradient)
        return gradient

    def zero_gradients(self) -> tuple[int, int]:
        """Return how many images had a gradient of exactly zero, and of how many, summed over passes."""
        return 0 if self._zeros is None else int(self._zeros), self._num_rows

    def result(self, adversarial: Tensor, logits: Tensor, targets: Tensor, *, warn: bool = True) -> AttackResult:
        """Return the result; warn if many gradients were zero."""
        if bool(logits.isnan().any()):
            raise ValueError(
                "the network returned NaN for an attacked image; check it for divisions and logarithms of zero, or "
                "attack it in float32"
            )
        zeros, of = self.zero_gradients()
        if warn and zeros > MANY_ZEROS * of:
            warn_caller(
                f"{zeros} of {of} input gradients were exactly zero, so the attack did not see those images; where "
                'logits are saturated, loss="dlr", float32 or auto_attack help'
            )
        return AttackResult(adversarial, wrong(logits, targets), logits, self.num_gradients, self.num_forwards, zeros)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in the caller's gradient mode, checked and counted."""
        logits = self._logits_fn(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"logits_fn must return logits ({len(images)}, C), found {found}; wrap the network in a function that "
                "picks them out"
            )
        self.num_forwards += 1
        self._half = logits.dtype == torch.float16
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def attacking(logits_fn: LogitsFn, inputs: Tensor, *, full_precision: bool = False) -> Iterator[Network]:
    """Borrow the network: gradients on, a module in evaluation mode; give it back as it was.

    Args:
        logits_fn: the network.
        inputs: where it will be asked; only the device is read.
        full_precision: switch off the caller's autocast.
    """
    device = inputs.device.type
    modules = list(logits_fn.modules()) if isinstance(logits_fn, nn.Module) else []
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    if any(tensor.is_inference() for tensor in tensors):
        raise RuntimeError(
            "the network's parameters or buffers were made in inference mode, which rules out gradients; build it "
            "outside, or use Trainer(inference_mode=False)"
        )
    autocast = torch.is_autocast_enabled(device)
    with ExitStack() as stack:
        stack.enter_context(grad_context())
        if autocast:
            # The cache holds low-precision weights without a graph after a pass under no_grad, or inference tensors:
            # the former would cost the training step its gradients, the latter would stop ours.
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
            if full_precision:
                stack.enter_context(torch.autocast(device, enabled=False))
        if isinstance(logits_fn, nn.Module):
            stack.enter_context(evaluation_mode(logits_fn))
        yield Network(logits_fn)


def make_space(
    inputs: Tensor, eps: float | Tensor, norm: Norm, bounds: Bounds, luminance_only: bool
) -> PerturbationSet:
    """Check the inputs and copy them out of inference mode."""
    return PerturbationSet(
        ordinary(inputs) if isinstance(inputs, Tensor) else inputs,
        eps,
        norm=norm,
        bounds=bounds,
        luminance_only=luminance_only,
    )


def check_targets(name: str, targets: Tensor, inputs: Tensor) -> Tensor:
    """Check that there is one class for each input and return them on its device, usable by autograd."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
        found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"{name} must be classes, int64 of shape ({len(inputs)},), found {found}; use .long()")
    return ordinary(targets).to(inputs.device)


def check_classes(name: str, classes: Tensor, logits: Tensor) -> None:
    """Check that all classes have a logit."""
    if len(classes) and not (int(classes.min()) >= 0 and int(classes.max()) < logits.shape[1]):
        raise ValueError(
            f"{name} must lie in [0, {logits.shape[1]}), found {int(classes.min())} to {int(classes.max())}"
        )


def private_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return the caller's generator, or one seeded with 0: the global one is never touched."""
    check_generator(generator)
    return torch.Generator().manual_seed(0) if generator is None else generator


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """Return which rows are misclassified."""
    return logits.argmax(1) != targets if logits.numel() else torch.zeros_like(targets, dtype=torch.bool)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return values ``(N,)`` with as many dimensions as ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _autocasts_to_half(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
