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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd import grad
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_plugins._curvature import (
    Curvature,
    Layers,
    LossFn,
    Problem,
    differentiate_again,
    output_factor,
    tensor_outputs,
)
from lightning_plugins._processes import over_processes, rank
from lightning_plugins._progress import progress_bar
from lightning_plugins.checks import check_types

__all__ = [
    "Estimate",
    "hessian_trace",
    "hessian_vector_product",
    "hessian_vector_products",
    "leading_eigenvalues",
    "top_eigenvalue",
]

_LEAST_PROBES = 10


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
    with Problem.of(model, loss_fn, batches, layers, seed, chunk_size) as problem:
        kinds = problem.curvatures(curvature)
        generator = torch.Generator().manual_seed(_seed_of_process(seed))
        estimates: dict[str, Estimate] = {}
        for kind, probe in _PROBES.items():
            names = [name for name in kinds if kinds[name] == kind]
            title = f"trace, {kind.replace('_', '-')}"
            with progress_bar(title=f"{title}, {len(names)} layers", show=progress if names else False) as bar:
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
    with Problem.of(model, loss_fn, batches, layers, seed) as problem:
        kinds = problem.curvatures(curvature)
        vectors = {name: _unit(vector) for name, vector in problem.random_vectors(seed).items()}
        estimates: dict[str, Estimate] = {}
        with progress_bar(title=f"top eigenvalue, {len(kinds)} layers", total=num_iterations, show=progress) as bar:
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
    with Problem.of(model, loss_fn, batches, layers, seed) as problem:
        for name, weight in problem.weights.items():
            if num_eigenvalues >= weight.numel():
                raise ValueError(
                    f"num_eigenvalues must be less than the {weight.numel()} weights of layer {name!r}, got "
                    f"{num_eigenvalues}; ask for fewer, or leave the layer out of layers"
                )
        kinds = problem.curvatures(curvature)
        starts = problem.random_vectors(seed)
        with progress_bar(title="leading eigenvalues", total=len(kinds), show=progress) as bar:
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
    with Problem.of(model, loss_fn, batches, layers, seed=0) as problem:
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


# Probes of traces


def _gauss_newton_probes(
    problem: Problem, names: Sequence[str], count: int, generator: torch.Generator, bar: tqdm
) -> tuple[Tensor, int]:
    """Return ``count`` estimates for each layer, summed over the samples, and the number of samples."""
    leaves = [problem.weights[name] for name in names]
    sums, total = torch.zeros(count, len(names), dtype=torch.float64), 0
    for inputs, targets, samples in problem.pieces():
        total += samples
        outputs = tensor_outputs(problem.outputs(inputs))
        factor = output_factor(problem.loss_fn, outputs, targets)
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
    problem: Problem, names: Sequence[str], count: int, generator: torch.Generator, bar: tqdm
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
                product = (
                    differentiate_again([(slope, signs)], [leaf])[0]
                    if slope is not None and slope.requires_grad
                    else None
                )
                values.append(leaf.new_zeros(()) if product is None else (product * signs).sum())
            sums[probe] += samples * torch.stack(values).detach().cpu().double()
    return sums, total


_Probe = Callable[[Problem, Sequence[str], int, torch.Generator, tqdm], tuple[Tensor, int]]
_PROBES: dict[Curvature, _Probe] = {"gauss_newton": _gauss_newton_probes, "hessian": _hessian_probes}


def _probe_in_rounds(
    problem: Problem,
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
        everything = over_processes(torch.cat(parts).to(problem.device)).cpu()
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


# Small parts


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"the curvature of layer {name!r} is {value}; are the weights, the data and the loss finite?")


def _signs_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same on every device.
    signs = torch.randint(2, tensor.shape, generator=generator, dtype=tensor.dtype)
    return signs.mul_(2).sub_(1).to(tensor.device)


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _seed_of_process(seed: int) -> int:
    """Return a seed of this process's own: signs shared between processes would couple their samples."""
    seeds = torch.randint(2**62, (rank() + 1,), generator=torch.Generator().manual_seed(seed))
    return int(seeds[-1])
