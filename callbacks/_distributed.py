"""What the processes of one run know together."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


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


def num_repeated(trainer: pl.Trainer, loader: Any, gathered: int) -> int:
    """Return how many of the gathered samples, the last ones, repeat the first ones.

    A distributed sampler repeats samples so that all processes get equally many; each of the last processes then holds
    one as its last sample.

    Args:
        trainer: a Trainer inside one of its runs.
        loader: what the samples came from.
        gathered: samples that all processes hold together.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return 0
    repeated = gathered - len(sampler.dataset)  # type: ignore[arg-type]
    # More are left where a limit on batches cut the pass short, fewer where the sampler drops samples.
    return repeated if 0 < repeated < trainer.world_size else 0
