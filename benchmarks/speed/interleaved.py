"""Comparing contenders in one run: in turn, in an order that rotates from round to round."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Contender = Callable[[], Any]


def add_peer(
    contenders: dict[str, Contender], name: str, modules: Sequence[str], make: Callable[[], Contender]
) -> dict[str, str]:
    """Add another library's contender if it is installed and works.

    Args:
        contenders: where it is added.
        name: its name in the table.
        modules: what must be installed for it.
        make: imports the library and returns the contender; it is also called once, as a trial.

    Returns:
        Nothing, or the peer's name and why it is left out, which is printed too.
    """
    if missing := [module for module in modules if not importlib.util.find_spec(module)]:
        reason = f"{' and '.join(missing)} not installed"
    else:
        try:
            contender = make()
            contender()
        except Exception as error:  # a peer that breaks must not take the others' figures with it
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        else:
            contenders[name] = contender
            return {}
    print(f"left out: {name}: {reason}", flush=True)
    return {name: reason}


def peak_memory(contender: Contender) -> float | None:
    """Return the MiB by which the process grows at the peak of a call; Linux can tell, others give None.

    Beyond what is held before the call: data, weights, whatever a library keeps. Freed pages are given back first, so
    that a contender does not live on what another one has left.
    """

    def mebibytes(field: str) -> float:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found.group(1)) / 1024

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (AttributeError, OSError, TypeError):
        return None
    before = mebibytes("VmRSS")
    contender()
    return max(mebibytes("VmHWM") - before, 0.0)


def spread(values: Sequence[float], floor: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles of the ratios of two contenders, round by round."""
    ratios = [value / base for value, base in zip(values, floor, strict=True)]
    first, median, third = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median, "quartiles": [first, third]}


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Run all contenders ``rounds`` times in rotating order after one warm-up, and compare them with the first.

    Returns:
        By name: ``wall_ms``, the best wall time, and both medians; ``wall_ratio``, best wall time over the first one's;
        ``cpu_ratio``, median CPU time over the first one's; ``wall_spread`` and ``cpu_spread``, median and quartiles of
        the ratios within a round; ``peak_mib``, the growth of the process in one more call, or None; ``result``, if it
        is a number.
    """
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
            "wall_median_ms": 1e3 * statistics.median(wall[name]),
            "cpu_median_ms": 1e3 * statistics.median(cpu[name]),
            "wall_ratio": min(wall[name]) / best,
            "cpu_ratio": statistics.median(cpu[name]) / median,
            "wall_spread": spread(wall[name], wall[names[0]]),
            "cpu_spread": spread(cpu[name], cpu[names[0]]),
            "peak_mib": peak_memory(contenders[name]),
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


def write(report: dict[str, Any], table: str, json_file: Path | None, markdown_file: Path | None) -> None:
    """Write a report and its table to the files that were asked for."""
    for path, text in ((json_file, json.dumps(report, indent=2) + "\n"), (markdown_file, table)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written to {path}", file=sys.stderr)
