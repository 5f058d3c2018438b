"""Curvature of a loss per layer: traces, leading eigenvalues and products of the Hessian with vectors.

The loss is the mean over a fixed sample of data, the network is in evaluation mode, and ``H_l`` is the block of second
derivatives by the weight of layer ``l`` alone. Two routes lead to it. The Hessian's own products take a second backward
pass for each layer. The Gauss-Newton block ``G_l = mean J^T H_o J``, with ``J`` the derivative of a sample's outputs by
the weight and ``H_o`` the loss's Hessian by its outputs, needs first derivatives of the network only, and one backward
pass probes all layers. They are the same wherever the network is piecewise linear in the layer's weight: behind it only
ReLUs, poolings, sums, linear layers and batch normalisation in evaluation mode, and the weight used once.
``curvature="auto"`` asks the network, layer by layer, and takes the cheap route where both agree.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.modes import evaluation_mode

__all__ = [
    "Estimate",
    "hessian_trace",
    "hessian_vector_product",
    "hessian_vector_products",
    "leading_eigenvalues",
    "top_eigenvalue",
]

Curvature = Literal["gauss_newton", "hessian"]
LossFn = Callable[[Any, Any], Tensor]
Layers = Sequence[str] | Mapping[str, nn.Parameter]

_LEAST_PROBES = 10
_MOST_OUTPUTS = 2048  # per sample, where its Hessian by the outputs must be built and factorised
_DETECTION_SAMPLES = 8
# On a CPU, smaller pieces of a batch cost no more in all, and the noise between their samples goes (see hessian_trace).
_CPU_CHUNK = 16


@dataclass(frozen=True)
class Estimate:
    """A number about one layer's block of the Hessian.

    Attributes:
        value: the trace or eigenvalue.
        error: standard error of a trace; for an eigenvalue the residual ``|Hv - value v|`` of a unit vector ``v``, and
            some eigenvalue lies no further away.
        curvature: ``"gauss_newton"`` or ``"hessian"``, the products that were used.
        num_samples: samples of data, over all processes.
        num_probes: random vectors for each piece of the data; 0 for an eigenvalue.
        num_iterations: products with a vector; 0 for a trace.
    """

    value: float
    error: float
    curvature: Curvature
    num_samples: int
    num_probes: int = 0
    num_iterations: int = 0


@check_types
def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    layers: Layers | None = None,
    curvature: Literal["auto", "gauss_newton", "hessian"] = "auto",
    num_probes: int = 200,
    tolerance: float = 0.05,
    seed: int = 0,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Estimate]:
    """Estimate the trace of each layer's block of the Hessian, with its standard error.

    A Gauss-Newton probe draws ``u`` with ``E[u u^T] = H_o`` for every sample; the squared norms of what one backward
    pass of ``<outputs, u>`` leaves at the weights are unbiased for the traces, for all layers at once, and never
    negative. A Hessian probe (Hutchinson) is ``<z, H_l z>`` with random signs ``z``, one layer at a time: a product
    with all layers together would put the blocks between the layers into the estimate as noise.

    Every piece of the data gets random signs of its own. The mean of the pieces' estimates has no noise from pairs of
    samples of different pieces, which a probe of the whole sample would have, at the same cost; so smaller pieces are
    better until they leave the processor idle. Where the loss is the mean over samples, batches are cut into pieces of
    ``chunk_size``; a loss that is not (class weights, say) is taken as it is on each batch, and the sample's loss is
    the mean over batches, weighted by their sizes.

    The model, its gradients and buffers and the global random number generators are left as they were. With several
    processes (``torch.distributed``), all call this function, each with its own share of the data, and all get the
    estimates for the union.

    Args:
        model: ``model(inputs)`` returns the outputs. In float32 or float64.
        loss_fn: from outputs and targets to the mean loss over the samples.
        batches: a list or DataLoader of ``(inputs, targets, ...)``, read once or a few times. A loader that shuffles or
            augments with torch's generator gives the same in every pass.
        layers: names of modules with a ``weight``, or any parameters by name; None for all convolutions and linear
            layers. They need not be trainable.
        curvature: ``"gauss_newton"`` or ``"hessian"`` for all layers, or ``"auto"``: Gauss-Newton for the layers where
            it equals the Hessian, as second derivatives of the outputs on the first samples tell. If torch has none for
            an operation (``hardsigmoid``, for one), Gauss-Newton for all, with a warning.
        num_probes: the most probes, at least 2.
        tolerance: a layer is done after 10 probes or more, when its standard error is at most this share of its trace;
            0 to use all probes.
        seed: of the probes.
        chunk_size: samples in a piece; None for 16 on a CPU and whole batches elsewhere.
        progress: show a bar; None shows it on a terminal, after a few seconds.

    Returns:
        The estimates by layer name, in the order of ``layers``.

    Raises:
        TypeError: if ``batches`` can be read only once or holds no batches, or the weights are not float32 or float64.
        ValueError: for an unknown or parametrized layer, a loss that is summed or not finite, a number out of range, or
            Gauss-Newton with a loss that is not convex in the outputs.
        RuntimeError: if an operation of the model has no second derivative. A custom function whose backward pass hides
            from autograd (detached tensors, numpy) cannot be noticed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 4), torch.arange(32) % 3)]
        >>> traces = hessian_trace(net, nn.functional.cross_entropy, batches)
        >>> list(traces), traces["2"].curvature, traces["2"].error < 0.05 * traces["2"].value
        (['0', '2'], 'gauss_newton', True)

    Reference:
        Hutchinson, *A Stochastic Estimator of the Trace of the Influence Matrix*, 1990; Dong et al., *HAWQ-V2*, 2020,
        for its use per layer; Schraudolph, *Fast Curvature Matrix-Vector Products*, 2002, for Gauss-Newton.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, for a standard error, got {num_probes!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    with _Problem.of(model, loss_fn, batches, layers, seed, chunk_size) as problem:
        kinds = problem.curvatures(curvature)
        generator = torch.Generator().manual_seed(_seed_of_process(seed))
        estimates: dict[str, Estimate] = {}
        for kind, probe in _PROBES.items():
            names = [name for name in kinds if kinds[name] == kind]
            title = f"trace, {kind.replace('_', '-')}"
            with _progress_bar(progress, f"{title}, {len(names)} layers", None if names else 0) as bar:
                estimates |= _probe_in_rounds(problem, names, kind, probe, num_probes, tolerance, generator, bar)
    return {name: estimates[name] for name in kinds}


@check_types
def top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    layers: Layers | None = None,
    curvature: Literal["auto", "gauss_newton", "hessian"] = "auto",
    num_iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Estimate]:
    """Find the eigenvalue of largest magnitude of each layer's block of the Hessian, by power iteration.

    ``v <- Hv / |Hv|`` and ``value = <v, Hv>``, until the value changes by no more than ``tolerance`` of itself. It can
    be negative. All layers share the forward passes; their products are kept apart. For arguments that are not below,
    what is left untouched, errors and several processes see :func:`hessian_trace`.

    Args:
        model: ``model(inputs)`` returns the outputs.
        loss_fn: from outputs and targets to the mean loss over the samples.
        batches: a list or DataLoader of ``(inputs, targets, ...)``, read once for each iteration.
        layers: names of modules with a ``weight``, or any parameters by name; None for all convolutions and linear
            layers.
        curvature: as for :func:`hessian_trace`.
        num_iterations: the most iterations, at least 1.
        tolerance: relative change between two iterations at which a layer is done, at least 0.
        seed: of the first vectors.
        progress: show a bar; None shows it on a terminal, after a few seconds.

    Returns:
        The estimates by layer name. The change from step to step can be small long before the vector is right; judge by
        the residual, ``error``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(50, 3, dtype=torch.float64)
        >>> halved_squares = lambda outputs, targets: (outputs - targets).square().sum() / (2 * len(outputs))
        >>> line = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
        >>> top = top_eigenvalue(line, halved_squares, [(inputs, inputs[:, :1])], num_iterations=1000, tolerance=1e-12)
        >>> torch.linalg.eigvalsh(inputs.T @ inputs / 50)[-1].isclose(torch.tensor(top["0"].value).double())
        tensor(True)

    Reference:
        Dong et al., *HAWQ: Hessian Aware Quantization of Neural Networks with Mixed-Precision*, 2019.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    with _Problem.of(model, loss_fn, batches, layers, seed) as problem:
        kinds = problem.curvatures(curvature)
        vectors = {name: _unit(vector) for name, vector in problem.random_vectors(seed).items()}
        estimates: dict[str, Estimate] = {}
        with _progress_bar(progress, f"top eigenvalue, {len(kinds)} layers", num_iterations) as bar:
            for iteration in range(1, num_iterations + 1):
                for name, product in problem.block_products(vectors, kinds).items():
                    value = float((vectors[name] * product).sum())
                    residual = float((product - value * vectors[name]).norm())
                    _check_finite(name, residual)
                    last = estimates[name].value if name in estimates else math.inf
                    estimates[name] = Estimate(
                        value, residual, kinds[name], problem.num_samples, num_iterations=iteration
                    )
                    if residual == 0 or abs(value - last) <= tolerance * abs(last) < math.inf:
                        del vectors[name]
                    else:
                        vectors[name] = _unit(product)
                bar.update()
                if not vectors:
                    break
    return {name: estimates[name] for name in kinds}


@check_types
def leading_eigenvalues(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    num_eigenvalues: int,
    *,
    layers: Layers | None = None,
    curvature: Literal["auto", "gauss_newton", "hessian"] = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, tuple[Estimate, ...]]:
    """Find the eigenvalues of largest magnitude of each layer's block, one layer after the other, by Lanczos iteration.

    This is :func:`scipy.sparse.linalg.eigsh` on products of the block with vectors; it needs fewer products than a
    power iteration. For arguments that are not below, what is left untouched, errors and several processes see
    :func:`hessian_trace`.

    Args:
        model: ``model(inputs)`` returns the outputs.
        loss_fn: from outputs and targets to the mean loss over the samples.
        batches: a list or DataLoader of ``(inputs, targets, ...)``, read once for each product.
        num_eigenvalues: how many, at least 1 and less than the number of weights of any of the layers.
        layers: names of modules with a ``weight``, or any parameters by name; None for all convolutions and linear
            layers.
        curvature: as for :func:`hessian_trace`.
        tolerance: relative accuracy of the eigenvalues, at least 0 (as accurate as the number format allows).
        seed: of the first vectors.
        progress: show a bar; None shows it on a terminal, after a few seconds.

    Returns:
        By layer name, the estimates in descending order of magnitude.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 4), torch.arange(32) % 3)]
        >>> first, second = leading_eigenvalues(net, nn.functional.cross_entropy, batches, 2, layers=["0"])["0"]
        >>> first.value > second.value > 0
        True
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if num_eigenvalues < 1:
        raise ValueError(f"num_eigenvalues must be at least 1, got {num_eigenvalues!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    found: dict[str, tuple[Estimate, ...]] = {}
    with _Problem.of(model, loss_fn, batches, layers, seed) as problem:
        for name, weight in problem.weights.items():
            if num_eigenvalues >= weight.numel():
                raise ValueError(
                    f"num_eigenvalues must be less than the {weight.numel()} weights of layer {name!r}, got "
                    f"{num_eigenvalues}; ask for fewer, or leave the layer out of layers"
                )
        kinds = problem.curvatures(curvature)
        starts = problem.random_vectors(seed)
        with _progress_bar(progress, "leading eigenvalues", len(kinds)) as bar:
            for name, weight in problem.weights.items():
                products = 0

                def multiply(vector: Any, name: str = name, weight: Tensor = weight) -> Any:
                    nonlocal products
                    products += 1
                    tensor = torch.from_numpy(vector).to(weight).reshape(weight.shape)
                    product = problem.block_products({name: tensor}, kinds)[name]
                    _check_finite(name, float(product.abs().max()))
                    return product.flatten().cpu().numpy()

                start = starts[name].flatten().cpu().numpy()
                if not multiply(start).any():  # ARPACK stops at a block of zeros, that of an unused layer for one
                    zero = Estimate(0.0, 0.0, kinds[name], problem.num_samples, num_iterations=products)
                    found[name] = (zero,) * num_eigenvalues
                    continue
                operator = LinearOperator((start.size, start.size), matvec=multiply, dtype=start.dtype)
                try:
                    values, vectors = eigsh(operator, num_eigenvalues, v0=start, tol=tolerance)
                except ArpackNoConvergence as error:
                    raise RuntimeError(
                        f"the {num_eigenvalues} leading eigenvalues of layer {name!r} did not settle within "
                        f"{products} products; raise tolerance, or ask for fewer"
                    ) from error
                count = products
                residuals = [
                    float(np.linalg.norm(multiply(vectors[:, i]) - values[i] * vectors[:, i]))
                    for i in range(num_eigenvalues)
                ]
                found[name] = tuple(
                    Estimate(float(values[i]), residuals[i], kinds[name], problem.num_samples, num_iterations=count)
                    for i in np.argsort(-np.abs(values), kind="stable")
                )
                bar.update()
    return found


@check_types
def hessian_vector_product(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    vector: Mapping[str, Tensor],
    layers: Layers | None = None,
) -> dict[str, Tensor]:
    """Multiply the Hessian over several layers, with the blocks between them, by a vector.

    Always the true Hessian, never Gauss-Newton. For what is left untouched, errors and several processes see
    :func:`hessian_trace`.

    Args:
        model: ``model(inputs)`` returns the outputs.
        loss_fn: from outputs and targets to the mean loss over the samples; a sample of several batches has the mean
            over them, weighted by their sizes.
        batches: a list or DataLoader of ``(inputs, targets, ...)``.
        vector: by layer name, a tensor of the weight's shape; 0 for the layers that are not there.
        layers: names of modules with a ``weight``, or any parameters by name, at least those in ``vector``; None for
            those in ``vector``.

    Returns:
        The product by layer name, for all of ``layers``: detached tensors of the weights' shapes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> halved_squares = lambda outputs, targets: (outputs - targets).square().mean() / 2
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> hessian_vector_product(net, halved_squares, batches, {"0": torch.tensor([[1.0, 1.0]])})
        {'0': tensor([[0.5000, 2.0000]])}
    """
    return hessian_vector_products(model, loss_fn, batches, [vector], layers)[0]


@check_types
def hessian_vector_products(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    vectors: Sequence[Mapping[str, Tensor]],
    layers: Layers | None = None,
) -> list[dict[str, Tensor]]:
    """Multiply the Hessian by several vectors: :func:`hessian_vector_product` with one gradient for all of them.

    Args:
        model: ``model(inputs)`` returns the outputs.
        loss_fn: from outputs and targets to the mean loss over the samples.
        batches: a list or DataLoader of ``(inputs, targets, ...)``, read once.
        vectors: each by layer name.
        layers: names of modules with a ``weight``, or any parameters by name; None for all that are in ``vectors``.

    Returns:
        One product for each vector.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> batches = [(torch.ones(4, 1), torch.zeros(4, 1))]
        >>> ones = torch.ones(1, 1)
        >>> first, second = hessian_vector_products(
        ...     net, nn.functional.mse_loss, batches, [{"0": ones}, {"1": ones}], layers=["0", "1"]
        ... )
        >>> bool(first["1"] == second["0"])  # the Hessian is symmetric
        True
    """
    if layers is None:
        layers = list(dict.fromkeys(name for vector in vectors for name in vector))
    with _Problem.of(model, loss_fn, batches, layers, seed=0) as problem:
        for vector in vectors:
            for name, part in vector.items():
                if name not in problem.weights:
                    raise ValueError(
                        f"vector has a part for {name!r}, which is not among layers {list(layers)}; add it"
                    )
                if part.shape != problem.weights[name].shape:
                    raise ValueError(
                        f"vector[{name!r}] must have the weight's shape {tuple(problem.weights[name].shape)}, got "
                        f"{tuple(part.shape)}"
                    )
        return problem.products(vectors)


class _NoGaussNewton(ValueError):
    """The loss has no Gauss-Newton probes; says why."""


class _Problem:
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
    ) -> Iterator[_Problem]:
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
            _output_factor(self.loss_fn, outputs, targets)
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
        flags = _over_processes(bent)  # one process that sees a bend decides for all
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
                for product, part in zip(products, _second(used, leaves), strict=True):
                    if part is not None:
                        product += count * part
        total = int(_over_processes(torch.tensor(float(total), device=self.device)))
        return [
            {name: _over_processes(part) / total for name, part in zip(self.weights, products, strict=True)}
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
        self.num_samples = int(_over_processes(torch.tensor(float(total), device=self.device)))
        return {name: _over_processes(part) / self.num_samples for name, part in sums.items()}

    def _hessian_blocks(self, inputs: Any, targets: Any, vectors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        leaves = [self.weights[name] for name in vectors]
        slopes = self.slopes(inputs, targets, leaves) if leaves else ()
        for (name, vector), slope, leaf in zip(vectors.items(), slopes, leaves, strict=True):
            if slope is not None and slope.requires_grad:
                (product,) = _second([(slope, vector)], [leaf])
                if product is not None:
                    yield name, product

    def _gauss_newton_blocks(
        self, inputs: Any, targets: Any, vectors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        if not vectors:
            return
        leaves = [self.weights[name] for name in vectors]
        outputs = _tensor_outputs(self.outputs(inputs))
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


# Probes of traces


def _gauss_newton_probes(
    problem: _Problem, names: Sequence[str], count: int, generator: torch.Generator, bar: tqdm
) -> tuple[Tensor, int]:
    """Return ``count`` estimates for each layer, summed over the samples, and the number of samples."""
    leaves = [problem.weights[name] for name in names]
    sums, total = torch.zeros(count, len(names), dtype=torch.float64), 0
    for inputs, targets, samples in problem.pieces():
        total += samples
        outputs = _tensor_outputs(problem.outputs(inputs))
        factor = _output_factor(problem.loss_fn, outputs, targets)
        for probe in range(count):
            bar.update(samples)
            if not outputs.requires_grad:
                continue
            signs = _signs_like(outputs, generator)
            parts = grad(outputs, leaves, factor(signs), retain_graph=probe < count - 1, allow_unused=True)
            norms = [outputs.new_zeros(()) if part is None else torch.linalg.vector_norm(part) for part in parts]
            sums[probe] += samples * torch.stack(norms).detach().cpu().double().square()
    return sums, total


def _hessian_probes(
    problem: _Problem, names: Sequence[str], count: int, generator: torch.Generator, bar: tqdm
) -> tuple[Tensor, int]:
    """Return ``count`` estimates for each layer, summed over the samples, and the number of samples."""
    leaves = [problem.weights[name] for name in names]
    sums, total = torch.zeros(count, len(names), dtype=torch.float64), 0
    for inputs, targets, samples in problem.pieces():
        total += samples
        slopes = problem.slopes(inputs, targets, leaves)
        for probe in range(count):
            bar.update(samples)
            values = []
            for slope, leaf in zip(slopes, leaves, strict=True):
                signs = _signs_like(leaf, generator)
                product = _second([(slope, signs)], [leaf])[0] if slope is not None and slope.requires_grad else None
                values.append(leaf.new_zeros(()) if product is None else (product * signs).sum())
            sums[probe] += samples * torch.stack(values).detach().cpu().double()
    return sums, total


_Probe = Callable[[_Problem, Sequence[str], int, torch.Generator, tqdm], tuple[Tensor, int]]
_PROBES: dict[Curvature, _Probe] = {"gauss_newton": _gauss_newton_probes, "hessian": _hessian_probes}


def _probe_in_rounds(
    problem: _Problem,
    names: Sequence[str],
    kind: Curvature,
    probe: _Probe,
    num_probes: int,
    tolerance: float,
    generator: torch.Generator,
    bar: tqdm,
) -> dict[str, Estimate]:
    """Probe the layers until each is accurate enough.

    A round reads the data once and keeps a piece's graph for all of its probes; how many those are follows from the
    accuracy that the earlier rounds reached.
    """
    probes: dict[str, Tensor] = {name: torch.zeros(0, dtype=torch.float64) for name in names}
    estimates: dict[str, Estimate] = {}
    open_names, done, total = list(names), 0, 0
    while open_names:
        if not tolerance:
            count = num_probes
        elif done == 0:
            count = min(num_probes, _LEAST_PROBES)
        else:
            worst = max(_relative_error(estimates[name]) for name in open_names)
            needed = math.ceil(min(done * (worst / tolerance) ** 2, num_probes))
            # Doubling at most, so that layers which are accurate earlier drop out.
            count = min(max(needed - done, done // 4), done, num_probes - done)
            bar.total = (done + count) * total
        sums, total = probe(problem, open_names, count, generator, bar)
        parts = [*sums.T, torch.tensor([float(total)], dtype=sums.dtype)]
        everything = _over_processes(torch.cat(parts).to(problem.device)).cpu()
        samples = everything[-1]
        done += count
        for name, column in zip(open_names, everything[:-1].reshape(-1, count), strict=True):
            probes[name] = torch.cat([probes[name], column / samples])
            mean, error = float(probes[name].mean()), float(probes[name].std()) / math.sqrt(done)
            _check_finite(name, mean)
            estimates[name] = Estimate(mean, error, kind, int(samples), num_probes=done)
        if done == num_probes:
            break
        open_names = [name for name in open_names if not _relative_error(estimates[name]) <= tolerance]
    return estimates


def _relative_error(estimate: Estimate) -> float:
    if estimate.error == 0:
        return 0.0
    return estimate.error / abs(estimate.value) if estimate.value else math.inf


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


def _output_factor(loss_fn: LossFn, outputs: Any, targets: Any) -> Callable[[Tensor], Tensor]:
    """Return a linear map from random signs to ``u`` with ``E[u u^T]`` = the loss's Hessian by the outputs.

    The form of the Hessian is found by trying it on random vectors, so that any spelling of a loss is known by what it
    does: diagonal (squared error, binary cross-entropy, with any weights); that of a softmax cross-entropy over axis 1
    (with any smoothing, soft targets, class weights, ignored targets); else one block for each sample.
    """
    outputs = _tensor_outputs(outputs)
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


def _tensor_outputs(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise _NoGaussNewton(
            f"Gauss-Newton products need a model that returns one tensor, got {_describe(outputs)}; wrap the model, or "
            "use curvature='hessian'"
        )
    return outputs


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"the curvature of layer {name!r} is {value}; are the weights, the data and the loss finite?")


def _second(slopes: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
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


def _signs_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same on every device.
    signs = torch.randint(2, tensor.shape, generator=generator, dtype=tensor.dtype)
    return signs.mul_(2).sub_(1).to(tensor.device)


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _over_processes(tensor: Tensor) -> Tensor:
    """Return the sum over processes."""
    if _distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def _seed_of_process(seed: int) -> int:
    """Return a seed of this process's own: signs shared between processes would couple their samples."""
    rank = torch.distributed.get_rank() if _distributed() else 0
    seeds = torch.randint(2**62, (rank + 1,), generator=torch.Generator().manual_seed(seed))
    return int(seeds[rank])


def _progress_bar(progress: bool | None, title: str, total: int | None) -> tqdm:
    hidden = progress is False or total == 0 or (_distributed() and torch.distributed.get_rank() != 0)
    shown = False if progress else None  # None: on a terminal only, not in a log file
    return tqdm(desc=title, total=total, disable=hidden or shown, delay=0 if progress else 3, leave=False)
