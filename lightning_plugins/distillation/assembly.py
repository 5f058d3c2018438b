"""From settings to the parts of a distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_plugins.distillation.augmentation import SiameseAugmentation
from lightning_plugins.distillation.characteristic_function import FrequencySampler, SamplingNetwork
from lightning_plugins.distillation.extractors import NetFactory, untrained_net
from lightning_plugins.distillation.flip import FlipUnion
from lightning_plugins.distillation.objectives import (
    CharacteristicFunction,
    DistributionMatching,
    GradientMatching,
    Objective,
)
from lightning_plugins.features import classifier_layer

__all__ = ["build_augmentation", "build_objective", "fresh_copy"]


def build_augmentation(
    config: Mapping[str, Any], *, seed: int, purpose: int, cutmix: float = 0.0
) -> SiameseAugmentation | None:
    """Make the augmentation of the settings; None if they have none.

    Args:
        config: all settings, resolved.
        seed: of the distillation.
        purpose: a number for each use, so that they draw unrelated numbers.
        cutmix: probability of CutMix beside it; cutout is left out then.
    """
    names: Any = tuple(name for name in config["augmentation"].split("_") if name and not (cutmix and name == "cutout"))
    if not names:
        return None
    return SiameseAugmentation(
        names,
        variant=config["augmentation_variant"],
        scope=config["augmentation_scope"],
        seed=seed + 1_000_003 * purpose,
    )


def build_objective(config: Mapping[str, Any], factory: NetFactory, *, seed: int) -> Objective:
    """Make the objective of the settings.

    Args:
        config: all settings, resolved.
        factory: makes a network, whose features a sampling network has to know the size of.
        seed: of everything that the objective draws.
    """
    augmentation = build_augmentation(config, seed=seed, purpose=0)
    flip = None if config["flip"] == "off" else FlipUnion(config["flip"])
    if config["objective"] == "distribution":
        return DistributionMatching(augmentation=augmentation, flip=flip)
    if config["objective"] == "gradient":
        return GradientMatching(config["distance"], augmentation=augmentation, flip=flip)
    network = None
    if config["sampling_network"]:
        size = classifier_layer(untrained_net(factory, seed=0)).in_features
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = SamplingNetwork(size, rank=config["sampling_rank"] or None)
    frequencies = FrequencySampler(
        config["num_frequencies"], scale=config["frequency_scale"], network=network, seed=seed
    )
    return CharacteristicFunction(
        frequencies, alpha=config["alpha"], beta=config["beta"], augmentation=augmentation, flip=flip
    )


def fresh_copy(template: nn.Module) -> nn.Module:
    """Return a trainable copy with new weights from torch's global generator.

    Raises:
        ValueError: if a layer with parameters has no ``reset_parameters``.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> torch.equal(fresh_copy(net).weight, net.weight)
        False
    """
    net = copy.deepcopy(template)
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"fresh networks are needed, and {type(module).__name__} has parameters but no reset_parameters(); "
                "give the model by name, or add that method"
            )
    return net.requires_grad_(True)
