"""What every test starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Small tensors gain nothing from threads, and two test runs on one machine would spin against each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path) -> Iterator[None]:
    """W&B stays offline and inside the test's folder; no test leaves an environment variable behind."""
    before = dict(os.environ)
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
    }
    yield
    os.environ.clear()
    os.environ.update(before)
