"""Parameter groups of their own for the scales of a quantized module, in an optimizer that is made already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

# What torch's schedulers keep for each parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def give_groups(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    groups: Mapping[int | None, Sequence[nn.Parameter]],
    *,
    owner: str,
) -> None:
    """Move parameters to groups of their own, named ``"quant_scales"``, without weight decay; schedulers go on.

    Args:
        trainer: with one optimizer.
        pl_module: whose parameters they are.
        groups: by the bits at which they are used, None for all; kept in the group as ``"bits"``.
        owner: the callback's name, for the message.

    Raises:
        MisconfigurationException: for an optimizer that takes one group only.
    """
    (optimizer,) = trainer.optimizers
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"{owner} gives the scales a parameter group of their own, which LBFGS does not support; use another "
            "optimizer"
        )
    if any(group.get("name") == "quant_scales" for group in optimizer.param_groups):
        return  # the module keeps one optimizer for several fits
    moved = {parameter for parameters in groups.values() for parameter in parameters}
    names = {parameter: name for name, parameter in pl_module.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in moved]
        if "param_names" in group:
            group["param_names"] = [names.get(parameter, "") for parameter in group["params"]]
    home = optimizer.param_groups[0]
    count = len(optimizer.param_groups)
    for bits, parameters in groups.items():
        named = [(names[parameter], parameter) for parameter in parameters]
        own: dict[str, Any] = {
            "params": named if "param_names" in home else list(parameters),
            "name": "quant_scales",
            "bits": bits,
        }
        if "weight_decay" in home:
            own["weight_decay"] = 0.0
        optimizer.add_param_group({k: v for k, v in home.items() if k not in ("params", "param_names")} | own)
    for config in trainer.lr_scheduler_configs:
        _extend_per_group_lists(config.scheduler, count, len(optimizer.param_groups))


def _extend_per_group_lists(scheduler: Any, count: int, wanted: int) -> None:
    """Let a scheduler, made for ``count`` parameter groups, go on; the further ones get the values of the first."""
    for inner in getattr(scheduler, "_schedulers", []):
        _extend_per_group_lists(inner, count, wanted)
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == count:
            values.extend(values[:1] * (wanted - count))
