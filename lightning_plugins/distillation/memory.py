"""How much memory a step of a distillation needs, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.distillation.objectives import images_per_tile
from lightning_plugins.distillation.synthetic_set import SyntheticSet

__all__ = ["activation_bytes", "free_bytes", "step_bytes"]


def step_bytes(
    config: Mapping[str, Any], net: nn.Module, synthetic: SyntheticSet, device: torch.device
) -> tuple[int, int]:
    """Estimate what a step needs for the real images, and for each class of synthetic images that is in memory.

    Args:
        config: all settings, resolved.
        net: on ``device``.
        synthetic: the set.
        device: of the step.
    """
    channels, height, width = synthetic.images.shape[2:]
    shape = channels, height, width
    # Gradients of gradients keep about three times what a training step keeps.
    per_image = activation_bytes(net, shape, device) * (6 if config["objective"] == "gradient" else 2)
    decoded = min(synthetic.decoded_per_class, config["batch_synthetic"] or synthetic.decoded_per_class)
    decoded *= 1 if config["flip"] == "off" else 2
    per_class = decoded * per_image + 8 * decoded * config["num_frequencies"]
    tile = min(images_per_tile(net, shape, device), config["batch_real"] * synthetic.num_classes)
    return tile * per_image + 4 * config["batch_real"] * config["num_frequencies"], per_class


def activation_bytes(net: nn.Module, image_shape: tuple[int, int, int], device: torch.device | str) -> int:
    """Return the bytes of the outputs of all layers for one image of zeros.

    Example:
        >>> activation_bytes(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2), "cpu")
        28
    """
    total = 0

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    hooks = [layer.register_forward_hook(see) for layer in net.modules() if not list(layer.children())]
    try:
        with torch.no_grad():
            net(torch.zeros(1, *image_shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return 1024 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else None
