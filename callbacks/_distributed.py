"""What the processes of one run know together."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor


def gather_rows(trainer: pl.Trainer, rows: Tensor) -> Tensor:
    """Return the rows of all processes, on the CPU, in the order in which a distributed sampler dealt them out.

    Processes may hold different numbers of rows.

    Args:
        trainer: a Trainer inside one of its runs.
        rows: ``(n, ...)`` on any device; ``n`` may differ between processes.
    """
    if trainer.world_size == 1:
        return rows.cpu()
    strategy = trainer.strategy
    rows = rows.to(strategy.root_device)
    counts = strategy.all_gather(torch.tensor(len(rows), device=rows.device))
    padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    everything = strategy.all_gather(padded)  # (processes, largest n, ...)
    present = torch.arange(padded.shape[0], device=rows.device) < counts[:, None]
    return everything.transpose(0, 1)[present.T].cpu()
