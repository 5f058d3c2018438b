"""Training the network that is matched, between the steps of the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.distillation.assembly import build_augmentation
from lightning_plugins.distillation.flip import FlipUnion
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.mixing import cutmix

__all__ = ["NetTraining"]


class NetTraining:
    """Trains a network a little at a time on the synthetic or the real images, with SGD that keeps its momentum.

    Args:
        config: all settings, resolved; those that begin with ``net_`` count.
        seed: of orders, augmentation and mixing.
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int) -> None:
        self._config = config
        self._order = PrivateGenerator(seed, "training of the networks")
        self._optimizer: torch.optim.Optimizer | None = None
        training = config["net_training"] != "none"
        self._augmentation = (
            build_augmentation(config, seed=seed, purpose=3, cutmix=config["net_cutmix"]) if training else None
        )

    def restart(self) -> None:
        """Forget the momentum: the network has other weights now."""
        self._optimizer = None

    def train_(self, net: nn.Module, pool: ClassPool, synthetic: SyntheticSet, flip: FlipUnion | None) -> None:
        """Train for ``net_epochs``, in place; the network is frozen and in evaluation mode afterwards.

        Args:
            net: on the device of the images.
            pool: the real images.
            synthetic: the set.
            flip: unites mini-batches of synthetic images with their mirror images.
        """
        config, device = self._config, pool.device
        generator = self._order.on("cpu")
        net.requires_grad_(True).train()
        optimizer = self._optimizer = self._optimizer or self._new_optimizer(net)
        real = config["net_training"] == "real"
        if not real:
            with torch.no_grad():
                images = synthetic.normalise(synthetic.decode()).flatten(0, 1)
                labels = synthetic.decoded_labels().flatten()
        count = (config["net_images"] or len(pool)) if real else len(labels)
        for _ in range(config["net_epochs"]):
            order = torch.randperm(len(pool) if real else count, generator=generator)[:count]
            for rows in torch.split(order, config["net_batch_size"]):
                x, y = pool.batch(rows) if real else (images[rows.to(device)], labels[rows.to(device)])
                if flip is not None and not real:
                    x, y = flip(x, y)
                if self._augmentation is not None:
                    x = self._augmentation(x)
                if config["net_cutmix"] and float(torch.rand((), generator=generator)) < config["net_cutmix"]:
                    x, y = cutmix(x, y, num_classes=synthetic.num_classes, generator=generator)
                loss = F.cross_entropy(net(x), y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        optimizer.zero_grad()
        net.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws and of the momentum."""
        state: dict[str, Any] = {"order": self._order.state_dict()}
        if self._augmentation is not None:
            state["augmentation"] = self._augmentation.state_dict()
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], net: nn.Module) -> None:
        """Continue where ``state`` was taken, with the network of that time."""
        self._order.load_state_dict(state["order"])
        if self._augmentation is not None:
            self._augmentation.load_state_dict(state["augmentation"])
        self.restart()
        if "optimizer" in state:
            self._optimizer = self._new_optimizer(net)
            self._optimizer.load_state_dict(state["optimizer"])

    def _new_optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        config = self._config
        return torch.optim.SGD(
            net.parameters(),
            lr=config["net_learning_rate"],
            momentum=config["net_momentum"],
            weight_decay=config["net_weight_decay"],
        )
