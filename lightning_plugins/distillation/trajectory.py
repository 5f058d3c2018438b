"""Trajectory matching: training on the synthetic images is to lead where training on the real ones led."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import SiameseAugmentation
from lightning_plugins.distillation.extractors import NetFactory, train_expert_, untrained_net
from lightning_plugins.distillation.flip import FlipUnion
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.objectives import Objective, ObjectiveDraw, ObjectiveLoss
from lightning_plugins.distillation.pool import ClassPool, RealBatch
from lightning_plugins.files import write_atomically
from lightning_plugins.gradients import grad_context

__all__ = ["ExpertTrajectories", "TrajectoryMatch", "TrajectoryMatching", "match_trajectory"]

FORMAT = "lightning_plugins.distillation.trajectories"


@dataclass(frozen=True)
class TrajectoryMatch:
    """What :func:`match_trajectory` found.

    Attributes:
        value: the loss.
        inputs: its gradient for the inputs of each step.
        step_size: its gradient for the step size.
        end: the student's weights after the last step.
    """

    value: Tensor
    inputs: list[Tensor]
    step_size: Tensor
    end: Tensor


@check_types
def match_trajectory(
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    target: Tensor,
    inputs: Sequence[Tensor],
    labels: Sequence[Tensor],
    step_size: float | Tensor,
    *,
    exact: bool = True,
) -> TrajectoryMatch:
    r"""Take gradient steps from an expert's weights, and differentiate the distance to its later weights.

    .. math:: L = \lVert\theta_N - \theta^*\rVert^2 / \lVert\theta_0 - \theta^*\rVert^2, \quad
        \theta_{i+1} = \theta_i - \eta \nabla_\theta \ell(\theta_i; x_i)

    The steps are taken without a graph. Each is then differentiated alone, from the last to the first, so that only the
    graph of one step is in memory at a time, beside the weights of all.

    Args:
        loss_of: the loss of flat weights, inputs and labels, scalar and twice differentiable.
        start: weights :math:`\theta_0`.
        target: weights :math:`\theta^*`.
        inputs: of each step.
        labels: of each step.
        step_size: :math:`\eta`.
        exact: True for the gradient of ``L``. False for that of the published constant-memory form, in which inputs and
            step size change the gradients that they are part of but not the later weights; both agree for one step and
            cost about the same.

    Shape:
        - start, target: ``(P,)``

    Raises:
        ValueError: if there is no step, if start and target are equal or no vectors of one length, or for a step size
            that is no single number.

    Example:
        >>> loss_of = lambda weights, x, y: (x @ weights - y).square().mean()
        >>> x, y = torch.eye(2), torch.ones(2)
        >>> match_trajectory(loss_of, torch.zeros(2), torch.ones(2), [x], [y], 0.5).value
        tensor(0.2500)

    Reference:
        G. Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022, equation 2; the
        constant-memory form after J. Cui et al., "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory",
        ICML 2023. The exact form is plain reverse differentiation.
    """
    if not inputs or len(inputs) != len(labels):
        raise ValueError(f"as many inputs as labels were expected, one step or more, got {len(inputs)}, {len(labels)}")
    if start.ndim != 1 or start.shape != target.shape:
        raise ValueError(f"start and target must both be (P,), got {tuple(start.shape)} and {tuple(target.shape)}")
    start, target = start.detach(), target.detach()
    norm = (start - target).square().sum()
    if not start.is_floating_point() or not norm.isfinite():
        raise ValueError(f"start and target must be floating-point and finite, got {start.dtype} and {target.dtype}")
    if not norm > 0:
        raise ValueError("start and target are the same weights; the expert must have moved between them")
    step_size = torch.as_tensor(step_size, dtype=start.dtype, device=start.device).detach()
    if step_size.ndim:
        raise ValueError(f"step_size must be one number, got a tensor {tuple(step_size.shape)}")
    inputs = [part.detach() for part in inputs]
    with torch.enable_grad():
        path = [start]
        for part, label in zip(inputs, labels, strict=True):
            weights = path[-1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(weights, part, label), weights)
            path.append(path[-1] - step_size * gradient)
        difference = path[-1] - target
        slope = 2 * difference / norm
        found: list[Tensor] = []
        step_slope = torch.zeros_like(step_size)
        for part, label, here in zip(inputs[::-1], list(labels)[::-1], path[-2::-1], strict=True):
            weights, part = here.clone().requires_grad_(), part.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(weights, part, label), weights, create_graph=True)
            step_slope -= (slope * gradient.detach()).sum()
            wanted = [part, weights] if exact else [part]
            parts = torch.autograd.grad(gradient, wanted, slope)
            found.append(-step_size * parts[0])
            if exact:
                slope = slope - step_size * parts[1]
    return TrajectoryMatch(difference.square().sum() / norm, found[::-1], step_slope, path[-1])


class ExpertTrajectories:
    """Weights of networks in training on the real images, one row after each epoch.

    Args:
        weights: flat, epoch 0 before training.

    Shape:
        - weights: ``(E, T + 1, P)``, E experts, T epochs, P parameters

    Raises:
        ValueError: for another shape.

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 4, 4), torch.arange(2).repeat(10))
        >>> factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> experts = ExpertTrajectories.record(factory, pool, num_experts=2, epochs=3)
        >>> experts.weights.shape
        torch.Size([2, 4, 34])
    """

    @check_types
    def __init__(self, weights: Tensor) -> None:
        if weights.ndim != 3 or weights.shape[1] < 2 or not len(weights):
            raise ValueError(
                f"weights (experts, epochs + 1, P) with one epoch or more were expected, got {tuple(weights.shape)}"
            )
        self.weights = weights.detach()

    @classmethod
    @check_types
    def record(
        cls,
        factory: NetFactory,
        pool: ClassPool,
        *,
        num_experts: int = 5,
        epochs: int = 10,
        learning_rate: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        batch_size: int = 256,
        augmentation: SiameseAugmentation | None = None,
        seed: int = 0,
    ) -> ExpertTrajectories:
        """Train experts and keep their weights, see :func:`.train_expert_`; the learning rate stays as it is.

        The published buffers hold 100 experts of 50 epochs, and cost more than the distillation.

        Args:
            factory: makes a network without buffers.
            pool: the real images; the weights are on its device.
            num_experts: E, at least 1.
            epochs: T, at least 1.
            learning_rate: of SGD.
            momentum: of SGD.
            weight_decay: of SGD.
            batch_size: of SGD.
            augmentation: draws for every image; None for none.
            seed: of weights and orders.

        Raises:
            ValueError: if a number is out of range, or the network has buffers.
        """
        if num_experts < 1 or epochs < 1:
            raise ValueError(f"num_experts and epochs must be at least 1, got {num_experts!r} and {epochs!r}")
        seeds = PrivateGenerator(seed, "trajectories").on("cpu")
        rows = []
        for _ in range(num_experts):
            weights_seed, order_seed = torch.randint(2**31, (2,), generator=seeds).tolist()
            net = untrained_net(factory, seed=weights_seed, device=pool.device)
            path = [_flat(net)]
            train_expert_(
                net,
                pool,
                epochs=epochs,
                learning_rate=learning_rate,
                momentum=momentum,
                weight_decay=weight_decay,
                batch_size=batch_size,
                augmentation=augmentation,
                lower_learning_rate=False,
                on_epoch=lambda epoch, net=net, path=path: path.append(_flat(net)),  # type: ignore[misc]
                seed=order_seed,
            )
            rows.append(torch.stack(path))
        return cls(torch.stack(rows))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, in hexadecimal."""
        digest = hashlib.sha256(f"{tuple(self.weights.shape)}".encode())
        digest.update(self.weights.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def draw(self, generator: torch.Generator, *, max_start: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Draw an expert and an epoch below ``max_start``; return its weights then and ``ahead`` epochs later."""
        expert = int(torch.randint(len(self.weights), (), generator=generator))
        epoch = int(torch.randint(max_start, (), generator=generator))
        return self.weights[expert, epoch], self.weights[expert, epoch + ahead]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights to a safetensors file, whole or not at all."""
        content = safetensors.torch.save(
            {"weights": self.weights.cpu().contiguous()}, {FORMAT: json.dumps({"fingerprint": self.fingerprint})}
        )
        return write_atomically(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> ExpertTrajectories:
        """Read what :meth:`save` wrote; nothing in the file is run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or foreign.
        """
        content, name = Path(path).read_bytes(), os.fspath(path)
        try:
            tensors = safetensors.torch.load(content)
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        except Exception as error:  # safetensors leaves some kinds of damage to whatever its own code stumbles over
            raise ValueError(f"{name!r} is no safetensors file, or a damaged one ({error}); copy it again") from error
        if FORMAT not in metadata or tensors.keys() != {"weights"}:
            raise ValueError(f"{name!r} is a safetensors file, but none that ExpertTrajectories.save wrote")
        found = cls(tensors["weights"].to(device))
        if metadata[FORMAT] != json.dumps({"fingerprint": found.fingerprint}):
            raise ValueError(f"{name!r} is damaged: its fingerprint differs from its weights'; copy it again")
        return found


class TrajectoryMatching(Objective):
    """Match where training leads: after a few steps on the synthetic images, a student is to be where an expert was.

    Experimental: tested against full unrolling, but at no published size, and the experts cost more than the
    distillation. The network of a step gives the architecture alone; its weights come from the experts. The real images
    serve to train those. A call must have all classes, and the loss is spread evenly over them. The learned step size
    is changed by every call of :meth:`loss`, by SGD of its own.

    Students see mini-batches of the decoded images. With a flip union half as many are taken and united with their
    mirror images, so that a step costs the same; the augmentation draws for every image.

    Args:
        experts: the trajectories; None records some when a :class:`.DatasetDistillation` starts.
        num_experts: to record.
        expert_epochs: of each.
        expert_learning_rate: of their SGD.
        num_steps: N, steps of a student, at least 1.
        ahead: M, epochs of the expert that the steps stand for, at least 1.
        max_start: experts are followed from an epoch below this one, at least 1.
        batch_size: decoded images in a step; None for all.
        step_size: of a student at first, above 0.
        step_size_learning_rate: of the step size, at least 0; 0 keeps it.
        exact: see :func:`match_trajectory`.
        augmentation: of the students' images; None for none.
        flip: None for none.
        seed: of experts, starts and batches.

    Attributes:
        step_size: of the students, learned.

    Raises:
        ValueError: if an argument is out of range, or the experts are too short for ``max_start`` and ``ahead``.

    Example:
        >>> from lightning_plugins.models import convnet3
        >>> factory = lambda: convnet3(num_classes=2, in_channels=1, image_size=8, width=4)
        >>> pool = ClassPool(torch.rand(20, 1, 8, 8), torch.arange(2).repeat(10))
        >>> experts = ExpertTrajectories.record(factory, pool, num_experts=1, epochs=2)
        >>> objective = TrajectoryMatching(experts, num_steps=3, ahead=1, max_start=2)
        >>> synthetic = torch.rand(2, 1, 1, 8, 8, requires_grad=True)
        >>> objective.loss(factory(), pool.draw(1), synthetic).total.backward()
        >>> synthetic.grad.abs().sum() > 0
        tensor(True)

    Reference:
        See :func:`match_trajectory`; for the flip union B. Son et al., "FYI: Flip Your Images for Dataset
        Distillation", ECCV 2024, whose released code has the form ``exact=False``.
    """

    needs_all_classes = True

    @check_types
    def __init__(
        self,
        experts: ExpertTrajectories | None = None,
        *,
        num_experts: int = 5,
        expert_epochs: int = 10,
        expert_learning_rate: float = 0.01,
        num_steps: int = 20,
        ahead: int = 3,
        max_start: int = 5,
        batch_size: int | None = None,
        step_size: float = 0.01,
        step_size_learning_rate: float = 1e-5,
        exact: bool = True,
        augmentation: SiameseAugmentation | None = None,
        flip: FlipUnion | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(augmentation=augmentation, flip=flip)
        for name, value in (
            ("num_experts", num_experts),
            ("expert_epochs", expert_epochs),
            ("num_steps", num_steps),
            ("ahead", ahead),
            ("max_start", max_start),
            ("batch_size", batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not (step_size > 0 and step_size_learning_rate >= 0):
            raise ValueError(
                "step_size must be above 0 and step_size_learning_rate at least 0, got "
                f"{step_size!r} and {step_size_learning_rate!r}"
            )
        epochs = expert_epochs if experts is None else experts.weights.shape[1] - 1
        if max_start - 1 + ahead > epochs:
            raise ValueError(
                f"experts of {epochs} epochs are too short to start before epoch {max_start} and look {ahead} ahead; "
                "lower max_start or ahead, or train them for longer"
            )
        self.experts = experts
        self.num_experts, self.expert_epochs, self.expert_learning_rate = (
            num_experts,
            expert_epochs,
            expert_learning_rate,
        )
        self.num_steps, self.ahead, self.max_start, self.batch_size = num_steps, ahead, max_start, batch_size
        self.step_size, self.step_size_learning_rate, self.exact = float(step_size), step_size_learning_rate, exact
        self.seed = seed
        self._momentum = 0.0
        self._generator = PrivateGenerator(seed, "trajectory matching")

    def prepare(self, factory: NetFactory, pool: ClassPool) -> None:
        """Record experts, unless there are some."""
        if self.experts is None:
            with grad_context():
                self.experts = ExpertTrajectories.record(
                    factory,
                    pool,
                    num_experts=self.num_experts,
                    epochs=self.expert_epochs,
                    learning_rate=self.expert_learning_rate,
                    seed=self.seed,
                )

    def draw(self, net: nn.Module, num_classes: int) -> ObjectiveDraw:
        """Draw nothing: a call has all classes, and draws for itself."""
        return ObjectiveDraw()

    def loss(
        self,
        net: nn.Module,
        real: RealBatch,
        synthetic: Tensor,
        *,
        draw: ObjectiveDraw | None = None,
        details: bool = False,
    ) -> ObjectiveLoss:
        """Return the distance to the expert, divided by the number of classes, for each class."""
        self._check(real, synthetic)
        if self.experts is None:
            raise RuntimeError("there are no experts; give them, or call prepare with the real images")
        generator = self._generator.on("cpu")
        start, target = self.experts.draw(generator, max_start=self.max_start, ahead=self.ahead)
        labels = torch.arange(real.classes.start, real.classes.stop, device=synthetic.device)
        labels = labels.repeat_interleave(synthetic.shape[1])
        batches = self._batches(synthetic.flatten(0, 1), labels, generator)
        images = [part for part, _ in batches]
        match = match_trajectory(
            _flat_loss(net, len(start)),
            start.to(synthetic),
            target.to(synthetic),
            images,
            [part for _, part in batches],
            self.step_size,
            exact=self.exact,
        )
        value = match.value
        if synthetic.requires_grad:
            # The gradient is known already: this sum is zero and has it.
            (gradient,) = torch.autograd.grad(images, synthetic, match.inputs)
            value = value + ((synthetic - synthetic.detach()) * gradient).sum()
            self._learn_step_size(float(match.step_size))
        per_class = (value / len(synthetic)).expand(len(synthetic))
        if not details:
            return ObjectiveLoss(per_class)
        moved = (match.end - start).norm() / (target - start).norm()
        return ObjectiveLoss(per_class, {"step_size": synthetic.new_tensor(self.step_size), "distance_moved": moved})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of everything that draws, the step size, and the fingerprint of the experts."""
        state = super().state_dict() | {"step_size": self.step_size, "momentum": self._momentum}
        return state | {"experts": "" if self.experts is None else self.experts.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if the state is of other experts.
        """
        if self.experts is not None and state["experts"] not in ("", self.experts.fingerprint):
            raise ValueError(
                f"the checkpoint was made with the experts {state['experts'][:12]}, these are "
                f"{self.experts.fingerprint[:12]}; load the same, or record them with the same seed and data"
            )
        super().load_state_dict(state)
        self.step_size, self._momentum = float(state["step_size"]), float(state["momentum"])

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"generator": self._generator}

    def _batches(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        flip = self.flip if self.flip is not None and self.flip.mode != "off" else None
        size = len(images) if self.batch_size is None else min(self.batch_size, len(images))
        if flip is not None:
            size = max(1, size // 2)
        batches, rest = [], images.new_empty(0, dtype=torch.int64)
        for _ in range(self.num_steps):
            if len(rest) < size:
                rest = torch.randperm(len(images), generator=generator).to(images.device)
            rows, rest = rest[:size], rest[size:]
            x, y = images[rows], labels[rows]
            if flip is not None:
                x, y = flip(x, y)
            if self.augmentation is not None:
                x = self.augmentation(x)
            batches.append((x, y))
        return batches

    def _learn_step_size(self, gradient: float) -> None:
        self._momentum = 0.5 * self._momentum + gradient
        # A step size below zero would climb.
        self.step_size = max(self.step_size - self.step_size_learning_rate * self._momentum, 1e-6)


def _flat(net: nn.Module) -> Tensor:
    if any(True for _ in net.buffers()):
        raise ValueError(
            f"{type(net).__name__} has buffers, which a trajectory of weights leaves out; use another norm"
        )
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def _flat_loss(net: nn.Module, count: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    shapes = {name: value.shape for name, value in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    if sum(sizes) != count:
        raise ValueError(
            f"the experts have {count} weights, {type(net).__name__} has {sum(sizes)}; use one architecture"
        )

    def loss(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = torch.split(weights, sizes)
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(net, named, (images,)), labels)

    return loss
