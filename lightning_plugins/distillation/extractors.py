"""Networks whose features, losses or gradients the distillation matches."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import SiameseAugmentation
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.files import write_atomically
from lightning_plugins.gradients import grad_context
from lightning_plugins.mixing import cutmix as cutmix_batch

__all__ = ["ExtractorBank", "NetFactory", "RandomExtractors", "train_expert_", "untrained_net"]

FORMAT = "lightning_plugins.distillation.extractors"

NetFactory = Callable[[], nn.Module]
"""Makes a network with fresh weights from torch's global generator, as torch's layers do."""


@check_types
def untrained_net(factory: NetFactory, *, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """Make a network whose weights depend on ``seed`` alone; torch's global generator is left as it was.

    Example:
        >>> first, second = (untrained_net(lambda: nn.Linear(2, 3), seed=5) for _ in range(2))
        >>> torch.equal(first.weight, second.weight)
        True
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        net = factory()
    return net.to(device)


@check_types
def train_expert_(
    net: nn.Module,
    pool: ClassPool,
    *,
    epochs: int,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    augmentation: SiameseAugmentation | None = None,
    cutmix: float = 0.0,
    lower_learning_rate: bool = True,
    on_epoch: Callable[[int], None] | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a network on the real images, in place, with SGD.

    Args:
        net: from images ``(N, channels, H, W)`` to logits ``(N, C)``, on the device of the pool.
        pool: the real images.
        epochs: at least 0.
        learning_rate: above 0.
        momentum: in [0, 1).
        weight_decay: at least 0.
        batch_size: at least 1.
        augmentation: draws for every image; None for none.
        cutmix: probability in [0, 1] that a batch is mixed, see :func:`.cutmix`.
        lower_learning_rate: whether it is multiplied by 0.2 after 2/3 and 5/6 of the epochs.
        on_epoch: called with the number of epochs that are done, to keep or show the network.
        seed: of the order of the images and of the mixing.

    Returns:
        The mean training loss of each epoch.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: if the loss is not finite.

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 4, 4), torch.arange(2).repeat(10))
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> len(train_expert_(net, pool, epochs=3))
        3
    """
    if epochs < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs must be at least 0, batch_size at least 1 and learning_rate above 0, got {epochs!r}, "
            f"{batch_size!r} and {learning_rate!r}"
        )
    if not 0 <= cutmix <= 1:
        raise ValueError(f"cutmix must lie in [0, 1], got {cutmix!r}")
    generator = PrivateGenerator(seed, "expert").on("cpu")
    mixing = PrivateGenerator(seed, "mixing of an expert").on("cpu")
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    losses = []
    with grad_context():
        for epoch in range(epochs):
            if lower_learning_rate and epoch in {-(-2 * epochs // 3), -(-5 * epochs // 6)}:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.2
            total = torch.zeros((), device=pool.device)
            order = torch.randperm(len(pool), generator=generator)
            for start in range(0, len(pool), batch_size):
                images, labels = pool.batch(order[start : start + batch_size])
                if augmentation is not None:
                    images = augmentation(images)
                targets = labels
                if cutmix and float(torch.rand((), generator=mixing)) < cutmix:
                    images, targets = cutmix_batch(images, labels, num_classes=pool.num_classes, generator=mixing)
                loss = F.cross_entropy(net(images), targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(labels)
            losses.append(float(total) / len(pool))
            if not losses[-1] < float("inf"):
                raise RuntimeError(
                    f"the loss of the expert is {losses[-1]} after epoch {epoch + 1}; lower learning_rate "
                    f"({learning_rate})"
                )
            if on_epoch is not None:
                on_epoch(epoch + 1)
    return losses


class RandomExtractors:
    """One frozen network that gets fresh untrained weights at each :meth:`sample_`.

    Args:
        factory: makes the network.
        device: of the network.
        seed: of the weights.

    Attributes:
        net: in evaluation mode, without gradients to its weights, in fixed storage. Keep it out of ``parameters()``
            of the module that uses it.

    Example:
        >>> extractors = RandomExtractors(lambda: nn.Linear(2, 3), seed=1)
        >>> before = extractors.net.weight.clone()
        >>> extractors.sample_()
        >>> torch.equal(before, extractors.net.weight)
        False
    """

    @check_types
    def __init__(self, factory: NetFactory, *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._factory = factory
        self._generator = PrivateGenerator(seed, "untrained networks")
        self.net = untrained_net(factory, seed=self._next_seed(), device=device)
        self._flat = _flatten_(self.net)

    def sample_(self) -> None:
        """Draw new weights."""
        fresh = untrained_net(self._factory, seed=self._next_seed())
        self._flat.copy_(_vector(fresh))

    def load_trained_(self) -> None:
        """Raise, as there are no trained weights.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("RandomExtractors has no trained weights; use an ExtractorBank for the calibration term")

    @property
    def fingerprint(self) -> str:
        """What identifies the extractors: there is nothing to identify."""
        return "random"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws."""
        return {"generator": self._generator.state_dict(), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws where ``state`` was taken.

        Raises:
            ValueError: if the state is of other extractors.
        """
        _check_fingerprint(state, self.fingerprint)
        self._generator.load_state_dict(state["generator"])

    def _next_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self._generator.on("cpu")))


class ExtractorBank:
    """Weights of several networks before and after training; :meth:`sample_` mixes those of one into a frozen network.

    The weights are ``u initial[j] + (1 - u) trained[j]`` with j and u drawn uniformly: one operation, in place, so
    that the storage of the network never changes. All pairs are on the device, side by side.

    Args:
        net: of the architecture; its weights move into storage of the bank, in evaluation mode and without gradients.
        initial: weights before training, as flat rows.
        trained: weights after it.
        seed: of the draws.

    Attributes:
        net: the frozen network. Keep it out of ``parameters()`` of the module that uses it.

    Shape:
        - initial, trained: ``(J, P)``, P the number of parameters and floating buffers of the network

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 4, 4), torch.arange(2).repeat(10))
        >>> factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> bank = ExtractorBank.train(factory, pool, num_pairs=2, epochs=1)
        >>> bank.sample_()
        >>> bank.net(torch.rand(3, 1, 4, 4)).requires_grad
        False

    Reference:
        S. Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025,
        appendix, and its released code.
    """

    @check_types
    def __init__(self, net: nn.Module, initial: Tensor, trained: Tensor, *, seed: int = 0) -> None:
        self.net = net
        self._flat = _flatten_(net)
        if initial.ndim != 2 or not len(initial) or initial.shape != trained.shape:
            raise ValueError(
                f"initial and trained must be the same (J, P), got {tuple(initial.shape)} and {tuple(trained.shape)}"
            )
        if initial.shape[1] != len(self._flat):
            raise ValueError(
                f"the bank is of another architecture: it has {initial.shape[1]} weights, "
                f"{type(net).__name__} has {len(self._flat)}"
            )
        self._initial = initial.detach().to(self._flat)
        self._trained = trained.detach().to(self._flat)
        self._generator = PrivateGenerator(seed, "extractors")
        self._last = 0
        digest = hashlib.sha256()
        for rows in (self._initial, self._trained):
            digest.update(f"{tuple(rows.shape)}".encode())
            digest.update(rows.detach().cpu().contiguous().numpy().data)
        self._fingerprint = digest.hexdigest()
        self.load_trained_()

    @classmethod
    def train(
        cls,
        factory: NetFactory,
        pool: ClassPool,
        *,
        num_pairs: int = 20,
        epochs: int = 60,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 128,
        augmentation: SiameseAugmentation | None = None,
        cutmix: float = 0.0,
        seed: int = 0,
        on_pair: Callable[[int], None] | None = None,
    ) -> ExtractorBank:
        """Make and train the networks, see :func:`train_expert_`.

        Args:
            factory: makes the network.
            pool: the real images; the bank is on its device.
            num_pairs: J, at least 1.
            epochs: of each network.
            learning_rate: of SGD.
            momentum: of SGD.
            weight_decay: of SGD.
            batch_size: of SGD.
            augmentation: draws for every image; None for none.
            cutmix: probability that a batch is mixed.
            seed: of weights, order and draws.
            on_pair: called with the number of networks that are done, for a progress bar.
        """
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {num_pairs!r}")
        seeds = PrivateGenerator(seed, "experts").on("cpu")
        initial, trained = [], []
        for done in range(1, num_pairs + 1):
            weights_seed, order_seed = torch.randint(2**31, (2,), generator=seeds).tolist()
            net = untrained_net(factory, seed=weights_seed, device=pool.device)
            initial.append(_vector(net))
            train_expert_(
                net,
                pool,
                epochs=epochs,
                learning_rate=learning_rate,
                momentum=momentum,
                weight_decay=weight_decay,
                batch_size=batch_size,
                augmentation=augmentation,
                cutmix=cutmix,
                seed=order_seed,
            )
            trained.append(_vector(net))
            if on_pair is not None:
                on_pair(done)
        return cls(net, torch.stack(initial), torch.stack(trained), seed=seed)

    def __len__(self) -> int:
        return len(self._initial)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, in hexadecimal."""
        return self._fingerprint

    def sample_(self) -> None:
        """Draw a pair and a place between its ends, and put these weights into the network."""
        generator = self._generator.on("cpu")
        self._last = int(torch.randint(len(self), (), generator=generator))
        self.mix_(self._last, float(torch.rand((), generator=generator)))

    def mix_(self, index: int, weight: float) -> None:
        """Put ``weight initial[index] + (1 - weight) trained[index]`` into the network."""
        torch.lerp(self._trained[index], self._initial[index], weight, out=self._flat)

    def load_trained_(self) -> None:
        """Put the trained weights of the pair that was drawn last into the network."""
        self._flat.copy_(self._trained[self._last])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights to a safetensors file, whole or not at all, so that further runs need not train them."""
        tensors = {"initial": self._initial.cpu().contiguous(), "trained": self._trained.cpu().contiguous()}
        header = {FORMAT: json.dumps({"fingerprint": self.fingerprint})}
        return write_atomically(path, safetensors.torch.save(tensors, header))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], factory: NetFactory, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> ExtractorBank:
        """Read what :meth:`save` wrote; nothing in the file is run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, or of another architecture.
        """
        content = Path(path).read_bytes()
        name = os.fspath(path)
        try:
            tensors = safetensors.torch.load(content)
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        except Exception as error:  # safetensors leaves some kinds of damage to whatever its own code stumbles over
            raise ValueError(f"{name!r} is no safetensors file, or a damaged one ({error}); copy it again") from error
        if FORMAT not in metadata or tensors.keys() != {"initial", "trained"}:
            raise ValueError(f"{name!r} is a safetensors file, but none that ExtractorBank.save wrote")
        net = untrained_net(factory, seed=0, device=device)
        bank = cls(net, tensors["initial"], tensors["trained"], seed=seed)
        if metadata[FORMAT] != json.dumps({"fingerprint": bank.fingerprint}):
            raise ValueError(f"{name!r} is damaged: its fingerprint differs from its weights'; copy it again")
        return bank

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws and the fingerprint, not the weights."""
        return {"generator": self._generator.state_dict(), "last": self._last, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws where ``state`` was taken.

        Raises:
            ValueError: if the state is of a bank with other weights.
        """
        _check_fingerprint(state, self.fingerprint)
        self._last = int(state["last"])
        self._generator.load_state_dict(state["generator"])


def _check_fingerprint(state: dict[str, Any], fingerprint: str) -> None:
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"the checkpoint was made with the extractors {state['fingerprint'][:12]}, these are {fingerprint[:12]}; "
            "load the same bank, or train it with the same seed and data"
        )


def _tensors(net: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Parameters and floating buffers with their places."""
    for module in net.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value.is_floating_point():
                    yield module, name, value


def _vector(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in _unique(net)])


def _unique(net: nn.Module) -> Sequence[Tensor]:
    return list({id(value): value for _, _, value in _tensors(net)}.values())


def _flatten_(net: nn.Module) -> Tensor:
    """Move all weights into one vector, of which they become views; freeze the network."""
    net.eval().requires_grad_(False)
    flat = _vector(net)
    start = 0
    for value in _unique(net):
        value.data = flat[start : start + value.numel()].view_as(value)
        start += value.numel()
    return flat
