"""Comparing contenders in one run: in turn, in an order that rotates from round to round."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Contender = Callable[[], Any]


def importable(*modules: str) -> bool:
    """Whether all of these modules are installed."""
    return all(importlib.util.find_spec(module.split(".")[0]) for module in modules)


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Run all contenders ``rounds`` times in rotating order after one warm-up, and compare them with the first."""
    names = list(contenders)
    results = {name: contenders[name]() for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started, started_cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    best, median = min(wall[names[0]]), statistics.median(cpu[names[0]])
    rows = {}
    for name in names:
        result = results[name]
        value = float(result) if isinstance(result, float) or (isinstance(result, Tensor) and not result.ndim) else None
        rows[name] = {
            "wall_ms": 1e3 * min(wall[name]),
            "wall_ratio": min(wall[name]) / best,
            "cpu_ratio": statistics.median(cpu[name]) / median,
            "result": value,
        }
    return rows


def environment(*packages: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers, with the versions of these packages beside ours and torch."""
    versions = {}
    for package in ("lightning-plugins", "torch", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
