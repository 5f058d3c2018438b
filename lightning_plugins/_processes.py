"""What the processes of one run know of each other, where no Trainer says it."""

from __future__ import annotations

import torch
from torch import Tensor


def distributed() -> bool:
    """Return whether there is a group of processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return the number of this process; 0 where it is the only one."""
    return torch.distributed.get_rank() if distributed() else 0


def over_processes(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place, and return it."""
    if distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def numbers_over_processes(*values: float) -> list[float]:
    """Return the sums of some numbers over all processes."""
    if not distributed():
        return list(values)
    # NCCL takes tensors of its device alone, gloo those of the CPU.
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums: list[float] = over_processes(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return sums
