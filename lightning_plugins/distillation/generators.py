"""A private source of random numbers that a checkpoint can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["PrivateGenerator"]


class PrivateGenerator:
    """A ``torch.Generator`` of its own for one purpose, made on the device that first asks for it.

    The global random state is neither read nor changed. The purpose enters the seed, so that parts with the same seed
    draw unrelated numbers.

    Args:
        seed: at least 0.
        purpose: what the numbers are for.

    Raises:
        ValueError: if ``seed`` is not an integer of at least 0.

    Example:
        >>> first, second = (PrivateGenerator(0, "crops") for _ in range(2))
        >>> state = first.state_dict()
        >>> a = torch.rand(2, generator=first.on("cpu"))
        >>> second.load_state_dict(state)
        >>> torch.equal(a, torch.rand(2, generator=second.on("cpu")))
        True
    """

    def __init__(self, seed: int, purpose: str) -> None:
        if not (isinstance(seed, int) and seed >= 0):
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        # torch uses 32 bits of a seed, and neighbouring seeds are to be unrelated.
        self.seed = int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])
        self._generator: torch.Generator | None = None

    def on(self, device: torch.device | str) -> torch.Generator:
        """Return the generator on ``device``; asked for another device, it starts afresh there."""
        device = torch.device(device)
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def state_dict(self) -> dict[str, Any]:
        """Return the device type and the state; an empty string and no state before the first draw."""
        if self._generator is None:
            return {"device": "", "state": torch.empty(0, dtype=torch.uint8)}
        return {"device": self._generator.device.type, "state": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._generator = None
        if state["device"]:
            self.on(state["device"]).set_state(state["state"].cpu())
