"""How much memory images take on their way through a network, what a step needs, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.modes import evaluation_mode

__all__ = ["free_bytes", "images_per_tile", "output_bytes", "step_bytes", "tile_bytes"]

_CACHE_BYTES = 32 * 2**20  # a larger activation on a CPU costs more in fresh memory than the batch saves
_DEVICE_BYTES = 2 * 2**30


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
    per_image = sum(output_bytes(net, shape, device)) * (6 if config["objective"] == "gradient" else 2)
    decoded = min(synthetic.decoded_per_class, config["batch_synthetic"] or synthetic.decoded_per_class)
    decoded *= 1 if config["flip"] == "off" else 2
    per_class = decoded * per_image + 8 * decoded * config["num_frequencies"]
    tile = min(images_per_tile(net, shape, device), config["batch_real"] * synthetic.num_classes)
    return tile * per_image + 4 * config["batch_real"] * config["num_frequencies"], per_class


@check_types
def images_per_tile(net: nn.Module, image_shape: tuple[int, ...], device: torch.device | str) -> int:
    """Return how many images go through a network at once so that its largest output stays in the cache.

    On a CPU that output has about 32 MB, as fresh memory for more costs more time than it saves; on an accelerator it
    may have 2 GB.

    Args:
        net: on ``device``; one image of zeros passes through it in evaluation mode.
        image_shape: channels, height and width.
        device: of the images.

    Raises:
        ValueError: for another shape.

    Example:
        >>> from lightning_plugins.models import convnet3
        >>> images_per_tile(convnet3(), (3, 32, 32), "cpu")
        64
    """
    if not image_shape or min(image_shape) < 1:
        raise ValueError(f"image_shape must be channels, height and width, each at least 1, got {image_shape!r}")
    return max(1, tile_bytes(device) // max(output_bytes(net, image_shape, device), default=1))


def tile_bytes(device: torch.device | str) -> int:
    """Return the bytes that a large intermediate result may have: what fits the cache of a CPU, 2 GB elsewhere."""
    return _CACHE_BYTES if torch.device(device).type == "cpu" else _DEVICE_BYTES


def output_bytes(net: nn.Module, image_shape: tuple[int, ...], device: torch.device | str) -> list[int]:
    """Return the bytes of each layer's output for one image of zeros; layers are modules without parts.

    Example:
        >>> output_bytes(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2), "cpu")
        [16, 12]
    """
    found: list[int] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel() * output.element_size())

    hooks = [layer.register_forward_hook(see) for layer in net.modules() if not list(layer.children())]
    try:
        with evaluation_mode(net), torch.no_grad():
            dtype = next((value.dtype for value in net.parameters()), torch.float32)
            net(torch.zeros(1, *image_shape, device=device, dtype=dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found


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
