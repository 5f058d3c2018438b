"""What the callbacks that attack share: the pixel scale, and generators that differ by step and process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Far apart, so that neighbouring attacks and ranks have unrelated generators.
_STRIDE, _RANK_STRIDE = 1_000_003, 7_368_787


class PixelScale:
    """Between inputs as the module takes them and images in [0, 1].

    Args:
        mean: of each channel, if the inputs are normalised; None if they are images already.
        std: likewise.

    Raises:
        ValueError: for one without the other, or different numbers of channels.
    """

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise ValueError("mean and std go together, with one number for each channel")
        self._values = None if mean is None or std is None else (tuple(mean), tuple(std))

    def images(self, inputs: Tensor) -> Tensor:
        """Return the images that the inputs were made from."""
        if self._values is None:
            return inputs
        mean, std = self._of_channels(inputs)
        return (inputs.float() * std + mean).clamp(0.0, 1.0)

    def inputs(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the module takes for the images; differentiable."""
        if self._values is None:
            return images
        mean, std = self._of_channels(images)
        return ((images - mean) / std).to(dtype)

    def _of_channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self._values is not None
        shape = (1, -1, *[1] * (like.ndim - 2))
        mean, std = (torch.tensor(values, device=like.device).reshape(shape) for values in self._values)
        return mean, std


def generator_for(inputs: Tensor, *, seed: int, number: int, rank: int) -> torch.Generator:
    """Return a generator on the inputs' device for one attack of one process."""
    return torch.Generator(inputs.device).manual_seed(seed + _STRIDE * number + _RANK_STRIDE * rank)
