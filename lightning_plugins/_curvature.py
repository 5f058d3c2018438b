"""A model, a loss and data ready for the derivatives that curvature is made of; :mod:`.hessian` asks for them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from lightning_plugins._processes import over_processes
from lightning_plugins.checks import warn_caller
from lightning_plugins.modes import evaluation_mode

Curvature = Literal["gauss_newton", "hessian"]
LossFn = Callable[[Any, Any], Tensor]
Layers = Sequence[str] | Mapping[str, nn.Parameter]

_MOST_OUTPUTS = 2048  # per sample, where its Hessian by the outputs must be built and factorised
_DETECTION_SAMPLES = 8
# On a CPU, smaller pieces of a batch cost no more in all, and the noise between their samples goes (see hessian_trace).
_CPU_CHUNK = 16


class _NoGaussNewton(ValueError):
    """The loss has no Gauss-Newton probes; says why."""


class Problem:
    """A model, a loss and a sample of data, ready for derivatives by some weights and no others."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        parameters: dict[str, nn.Parameter],
        seed: int,
        chunk_size: int | None,
    ) -> None:
        self.model, self.loss_fn, self.source, self.seed = model, loss_fn, batches, seed
        first = next(iter(parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.chunk_size = chunk_size or (_CPU_CHUNK if first.device.type == "cpu" else 2**62)
        self.num_samples = 0
        # Leaves of our own, on the same memory: requires_grad and hooks of the model's parameters stay out of it.
        leaves = {parameter: parameter.detach().requires_grad_() for parameter in parameters.values()}
        self.weights = {name: leaves[parameter] for name, parameter in parameters.items()}
        self.state = {name: leaves.get(value, value.detach()) for name, value in model.named_parameters()}
        self.state |= {name: value.detach().clone() for name, value in model.named_buffers()}
        self.first = next(self.batches())
        self.divisible = self._check_loss()

    @classmethod
    @contextmanager
    def of(
        cls,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        layers: Layers | None,
        seed: int,
        chunk_size: int | None = None,
    ) -> Iterator[Problem]:
        """Borrow the model, and give it back as it was."""
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size!r}")
        _check_batches(batches)
        model = getattr(model, "_orig_mod", model)  # of torch.compile: its graphs have no second derivatives
        parameters = _parameters_of(model, layers)
        device = next(iter(parameters.values())).device
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivatives
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(evaluation_mode(model))
            yield cls(model, loss_fn, batches, parameters, seed, chunk_size)

    # Data

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """Yield inputs, targets and the number of samples, on the model's device and in its floating type."""
        torch.manual_seed(self.seed)  # a loader that shuffles or augments repeats itself; the caller's state comes back
        seen = False
        for batch in self.source:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise TypeError(
                    f"batches must yield (inputs, targets, ...), got a {type(batch).__name__}; wrap the loader, or "
                    "pass a list [(inputs, targets)]"
                )
            inputs, targets = move_data_to_device(tuple(batch[:2]), self.device)
            inputs, targets = apply_to_collection((inputs, targets), Tensor, self._usable)
            if not isinstance(targets, Tensor) or targets.ndim == 0 or not len(targets):
                raise TypeError(
                    f"the targets of a batch must be a tensor with one row for each sample, got {_describe(targets)}; "
                    "a single batch is passed as batches=[(inputs, targets)]"
                )
            seen = True
            yield inputs, targets, len(targets)
        if not seen:
            raise TypeError("batches holds no batch; pass at least one (inputs, targets)")

    def pieces(self, most: int | None = None) -> Iterator[tuple[Any, Any, int]]:
        """Yield the batches, cut into chunks where that leaves the loss as it is."""
        for inputs, targets, count in self.batches():
            if self.divisible:
                size = min(self.chunk_size, most or self.chunk_size)
                for start in range(0, count, size):
                    piece = targets[start : start + size]
                    yield inputs[start : start + size], piece, len(piece)
            else:
                yield inputs, targets, count

    def _usable(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            tensor = tensor.clone()
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _check_loss(self) -> bool:
        """Whether the loss is the mean over the samples, and each output depends on its own sample alone."""
        inputs, targets, count = self.first
        with torch.no_grad():
            outputs = self.outputs(inputs)
            loss = self.loss(outputs, targets)
            if not math.isfinite(float(loss)):
                raise ValueError(f"the loss of the first batch is {float(loss)}; its curvature needs a finite one")
            rows = all(
                isinstance(part, Tensor) and len(part) == count for part in (inputs, outputs) if part is not None
            )
            if not rows or count < 2:
                return False
            few = min(count, _CPU_CHUNK)
            alone = torch.stack([self.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(few)])
            together = self.loss(outputs[:few], targets[:few])
            rtol = 1e-3 if self.dtype == torch.float32 else 1e-8
            mean = torch.isclose(together, alone.mean(), rtol=rtol)
            if not mean and torch.isclose(together, alone.sum(), rtol=rtol):
                raise ValueError(
                    f"loss_fn must return the mean over the samples, but for {few} samples it returned the sum; use "
                    "reduction='mean'"
                )
            part = self.outputs(inputs[: few - 1])
            return bool(
                mean
                and part.shape == outputs[: few - 1].shape
                and torch.allclose(part, outputs[: few - 1], rtol=rtol, atol=rtol * float(outputs.abs().max()))
            )

    # Derivatives

    def outputs(self, inputs: Any) -> Any:
        """Run the model with our leaves in the place of its parameters."""
        return functional_call(self.model, self.state, (inputs,))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss, a single number."""
        return _scalar(self.loss_fn(outputs, targets))

    def curvatures(self, curvature: str) -> dict[str, Curvature]:
        """Decide for each layer which products to use."""
        if curvature in ("gauss_newton", "hessian"):
            return dict.fromkeys(self.weights, curvature)  # type: ignore[arg-type]
        if curvature != "auto":
            raise ValueError(f"curvature must be 'auto', 'gauss_newton' or 'hessian', got {curvature!r}")
        inputs, targets, count = self.first
        if self.divisible and count > _DETECTION_SAMPLES:
            inputs, targets = inputs[:_DETECTION_SAMPLES], targets[:_DETECTION_SAMPLES]
        outputs = self.outputs(inputs)
        bent = torch.ones(len(self.weights), device=self.device)
        try:
            output_factor(self.loss_fn, outputs, targets)
        except _NoGaussNewton:
            pass
        else:
            try:
                bent = torch.tensor(self._bends(outputs), dtype=bent.dtype, device=self.device)
            except _NoSecondDerivative as error:
                bent = torch.zeros_like(bent)
                warn_caller(
                    f"the Gauss-Newton matrix stands in for the Hessian of all layers, since {error.__cause__}; it is "
                    "exact only where the network is piecewise linear in a layer's weights"
                )
        flags = over_processes(bent)  # one process that sees a bend decides for all
        return {name: "hessian" if flag > 0 else "gauss_newton" for name, flag in zip(self.weights, flags, strict=True)}

    def _bends(self, outputs: Tensor) -> list[bool]:
        """Whether the second derivative of the outputs by each weight alone is other than exactly 0.

        Autograd's second derivatives of piecewise linear functions are exact zeros, so nothing needs a threshold.
        """
        if not outputs.requires_grad:
            return [False] * len(self.weights)
        generator = torch.Generator().manual_seed(0)
        functional = _normal_like(outputs, generator)
        bends = []
        with _explain_second_derivatives():
            leaves = list(self.weights.values())
            slopes = grad(outputs, leaves, functional, create_graph=True, allow_unused=True)
            _check_twice_differentiable(slopes)
            for slope, leaf in zip(slopes, leaves, strict=True):
                if slope is None or not slope.requires_grad:
                    bends.append(False)
                    continue
                (bend,) = grad(slope, leaf, _normal_like(leaf, generator), retain_graph=True, allow_unused=True)
                bends.append(bend is not None and bool(bend.any()))
        return bends

    def products(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Multiply the Hessian over all layers by vectors that may lack some layers."""
        leaves = list(self.weights.values())
        sums = [[torch.zeros_like(leaf, requires_grad=False) for leaf in leaves] for _ in vectors]
        total = 0
        for inputs, targets, count in self.batches():
            total += count
            slopes = self.slopes(inputs, targets, leaves)
            for vector, products in zip(vectors, sums, strict=True):
                used = [
                    (slope, self._usable(vector[name].detach().to(self.device)))
                    for name, slope in zip(self.weights, slopes, strict=True)
                    if name in vector and slope is not None and slope.requires_grad
                ]
                for product, part in zip(products, differentiate_again(used, leaves), strict=True):
                    if part is not None:
                        product += count * part
        total = int(over_processes(torch.tensor(float(total), device=self.device)))
        return [
            {name: over_processes(part) / total for name, part in zip(self.weights, products, strict=True)}
            for products in sums
        ]

    def slopes(self, inputs: Any, targets: Any, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the loss's gradients by these weights, themselves differentiable."""
        loss = self.loss(self.outputs(inputs), targets)
        if not loss.requires_grad:
            return (None,) * len(leaves)
        with _explain_second_derivatives():
            slopes = grad(loss, leaves, create_graph=True, allow_unused=True)
            _check_twice_differentiable(slopes)
            return slopes

    def block_products(self, vectors: Mapping[str, Tensor], kinds: Mapping[str, Curvature]) -> dict[str, Tensor]:
        """Multiply each layer's own block by its own vector, in one pass over the data."""
        sums = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        total = 0
        for inputs, targets, count in self.batches():
            total += count
            for kind, multiply in (("gauss_newton", self._gauss_newton_blocks), ("hessian", self._hessian_blocks)):
                names = [name for name in vectors if kinds[name] == kind]
                for name, product in multiply(inputs, targets, {name: vectors[name] for name in names}):
                    sums[name] += count * product
        self.num_samples = int(over_processes(torch.tensor(float(total), device=self.device)))
        return {name: over_processes(part) / self.num_samples for name, part in sums.items()}

    def _hessian_blocks(self, inputs: Any, targets: Any, vectors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        leaves = [self.weights[name] for name in vectors]
        slopes = self.slopes(inputs, targets, leaves) if leaves else ()
        for (name, vector), slope, leaf in zip(vectors.items(), slopes, leaves, strict=True):
            if slope is not None and slope.requires_grad:
                (product,) = differentiate_again([(slope, vector)], [leaf])
                if product is not None:
                    yield name, product

    def _gauss_newton_blocks(
        self, inputs: Any, targets: Any, vectors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        if not vectors:
            return
        leaves = [self.weights[name] for name in vectors]
        outputs = tensor_outputs(self.outputs(inputs))
        if not outputs.requires_grad:
            return
        curve = _output_curvature(self.loss_fn, outputs, targets)
        # J v is the derivative, by the dummy, of <J^T dummy, v>: reverse mode is there for every operation.
        dummy = torch.zeros_like(outputs, requires_grad=True)
        with _explain_second_derivatives():
            pulled: tuple[Tensor | None, ...] = grad(outputs, leaves, dummy, create_graph=True, allow_unused=True)
            _check_twice_differentiable(pulled)
            for (name, vector), back, leaf in zip(vectors.items(), pulled, leaves, strict=True):
                if back is None:
                    continue
                (pushed,) = grad(back, dummy, vector, retain_graph=True, materialize_grads=True)
                (product,) = grad(outputs, leaf, curve(pushed), retain_graph=True)
                yield name, product

    def random_vectors(self, seed: int) -> dict[str, Tensor]:
        """Draw normal vectors, the same in every process."""
        generator = torch.Generator().manual_seed(seed)
        return {name: _normal_like(weight, generator) for name, weight in self.weights.items()}


# The loss as a function of the outputs


def _output_curvature(loss_fn: LossFn, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
    """Return the map that multiplies the loss's Hessian by the outputs with a tensor of their shape."""
    point = outputs.detach().requires_grad_()
    loss = _scalar(loss_fn(point, targets))
    slope = grad(loss, point, create_graph=True, materialize_grads=True)[0] if loss.requires_grad else None

    def multiply(vector: Tensor) -> Tensor:
        if slope is None or not slope.requires_grad:
            return torch.zeros_like(vector)
        with _explain_second_derivatives():
            (product,) = grad(slope, point, vector, retain_graph=True, materialize_grads=True)
        return product

    return multiply


def output_factor(loss_fn: LossFn, outputs: Any, targets: Any) -> Callable[[Tensor], Tensor]:
    """Return a linear map from random signs to ``u`` with ``E[u u^T]`` = the loss's Hessian by the outputs.

    The form of the Hessian is found by trying it on random vectors, so that any spelling of a loss is known by what it
    does: diagonal (squared error, binary cross-entropy, with any weights); that of a softmax cross-entropy over axis 1
    (with any smoothing, soft targets, class weights, ignored targets); else one block for each sample.
    """
    outputs = tensor_outputs(outputs)
    multiply = _output_curvature(loss_fn, outputs, targets)
    generator = torch.Generator().manual_seed(1)
    trial, second = _normal_like(outputs, generator), _normal_like(outputs, generator)
    image = multiply(second)
    if not math.isfinite(float(image.norm())):
        raise ValueError("the loss's curvature is not finite; are the weights, the data and the loss finite?")
    eps = torch.finfo(outputs.dtype).eps
    rtol = 1e-3 if outputs.dtype == torch.float32 else 1e-7

    diagonal = multiply(torch.ones_like(outputs))
    if _close(image, diagonal * second, rtol):
        _check_convex(float(diagonal.min()), float(diagonal.max()), rtol)
        root = diagonal.clamp_min(0).sqrt()
        return lambda signs: root * signs

    if outputs.ndim >= 2 and outputs.shape[1] >= 2:
        probs = outputs.detach().softmax(1)

        def softmax_curvature(vector: Tensor) -> Tensor:
            product: Tensor = probs * (vector - (probs * vector).sum(1, keepdim=True))
            return product

        ours, theirs = softmax_curvature(trial), multiply(trial)
        weights = []
        for axes in (tuple(range(outputs.ndim)), (1,)):  # one weight for all rows, or one for each
            denominator = ours.square().sum(axes, keepdim=True).clamp_min(torch.finfo(outputs.dtype).tiny)
            weights.append(((ours * theirs).sum(axes, keepdim=True) / denominator).clamp_min(0))
        # A saturated softmax leaves nothing but rounding errors.
        noise = 4 * eps * float(weights[0]) * float(second.norm())
        root_probs = probs.sqrt()
        for weight in weights:
            if _close(image, weight * softmax_curvature(second), rtol, noise):
                return partial(_softmax_factor, scale=weight.sqrt(), root_probs=root_probs)

    size = outputs[0].numel()
    if size > _MOST_OUTPUTS:
        raise _NoGaussNewton(
            f"Gauss-Newton probes for this loss need its Hessian by the {size} outputs of a sample, and "
            f"{_MOST_OUTPUTS} are the most; use curvature='hessian'"
        )
    columns = []
    for index in range(size):
        basis = torch.zeros_like(outputs).flatten(1)
        basis[:, index] = 1
        columns.append(multiply(basis.reshape(outputs.shape)).flatten(1))
    blocks = torch.stack(columns, 2)
    if not _close(image.flatten(1), (blocks @ second.flatten(1).unsqueeze(2)).squeeze(2), rtol):
        raise _NoGaussNewton(
            "Gauss-Newton probes need a loss that is a mean over samples, but this one's second derivatives couple the "
            "samples of a batch; use curvature='hessian'"
        )
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    _check_convex(float(values.min()), float(values.max()), rtol)
    roots = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    return lambda signs: (roots @ signs.flatten(1).unsqueeze(2)).reshape(signs.shape)


def _softmax_factor(signs: Tensor, *, scale: Tensor, root_probs: Tensor) -> Tensor:
    projection = (root_probs * signs).sum(1, keepdim=True)
    return scale * root_probs * (signs - root_probs * projection)


def _check_convex(smallest: float, largest: float, rtol: float) -> None:
    if smallest < -rtol * max(largest, 0.0):
        raise _NoGaussNewton(
            "Gauss-Newton probes need a loss that is convex in the outputs, but its Hessian by them has the eigenvalue "
            f"{smallest:.3g} here; use curvature='hessian'"
        )


def _close(first: Tensor, second: Tensor, rtol: float, atol: float = 0.0) -> bool:
    return bool((first - second).norm() <= rtol * second.norm() + atol)


# Small parts


def _parameters_of(model: nn.Module, layers: Layers | None) -> dict[str, nn.Parameter]:
    """Return the weights to derive by, by layer name."""
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}; pass [{layers!r}]")
    if isinstance(layers, Mapping):
        own = {id(parameter) for parameter in model.parameters()}
        parameters = dict(layers)
        for name, parameter in parameters.items():
            if id(parameter) not in own:
                raise ValueError(
                    f"layers[{name!r}] is not a parameter of the model; take it from model.named_parameters()"
                )
    else:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        modules = dict(model.named_modules())
        if layers is None:
            layers = [name for name, module in modules.items() if isinstance(module, kinds)]
        if unknown := [name for name in layers if name not in modules]:
            raise ValueError(f"the model has no layers {unknown}; it has {[name for name in modules if name]}")
        parameters = {}
        for name in layers:
            weight = getattr(modules[name], "weight", None)
            if not isinstance(weight, nn.Parameter):
                found = "parametrized or computed" if isinstance(weight, Tensor) else "missing"
                if parametrize.is_parametrized(modules[name], "weight"):
                    found = "parametrized"
                raise ValueError(
                    f"layer {name!r} must have a parameter 'weight', and it is {found}; leave the layer out of layers, "
                    "bake the parametrization in (torch.nn.utils.parametrize.remove_parametrizations), or pass "
                    "layers={name: parameter} with the parameter underneath"
                )
            parameters[name] = weight
    if not parameters:
        raise ValueError("there is no layer to look at; pass layers, names of modules with a weight")
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(
            f"the weights must all be float32 or all float64, found {sorted(map(str, dtypes))}; second derivatives "
            "drown in the rounding of shorter formats, so pass copy.deepcopy(model).float()"
        )
    return parameters


def _check_batches(batches: Iterable[Any]) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(f"batches can be read only once, being a {type(batches).__name__}; pass a list or a DataLoader")
    if isinstance(batches, Tensor) or (
        isinstance(batches, (tuple, list)) and batches and all(isinstance(part, Tensor) for part in batches)
    ):
        raise TypeError("batches must hold (inputs, targets) pairs, found tensors; pass [(inputs, targets)]")


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return one number, the mean over the samples, got {_describe(loss)}; use reduction='mean'"
        )
    return loss.reshape(())


def tensor_outputs(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise _NoGaussNewton(
            f"Gauss-Newton products need a model that returns one tensor, got {_describe(outputs)}; wrap the model, or "
            "use curvature='hessian'"
        )
    return outputs


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def differentiate_again(slopes: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Differentiate the sum of ``<slope, vector>`` by the leaves."""
    if not slopes:
        return [None] * len(leaves)
    with _explain_second_derivatives():
        firsts, vectors = zip(*slopes, strict=True)
        return grad(firsts, leaves, vectors, retain_graph=True, allow_unused=True)


def _check_twice_differentiable(slopes: Sequence[Tensor | None]) -> None:
    """Refuse what cannot be differentiated again and would count as constant.

    Autograd marks such gradients by an error node that leads nowhere, and so never runs into it.
    """
    stack = [slope.grad_fn for slope in slopes if slope is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().rpartition("::")[2] in ("Error", "NotImplemented"):
            raise RuntimeError("the backward pass of a custom function is marked as once differentiable")
        stack += [following for following, _ in node.next_functions]


@contextmanager
def _explain_second_derivatives() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _NoSecondDerivative(
            f"an operation of the model or the loss has no second derivative ({error}); replace it, or use "
            "curvature='gauss_newton' for traces, which needs first derivatives of the model only"
        ) from error


class _NoSecondDerivative(RuntimeError):
    """An operation cannot be differentiated twice."""


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
