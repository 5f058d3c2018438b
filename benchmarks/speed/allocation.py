r"""How long the exact allocation of bits takes, as a ratio to scipy.optimize.milp on the same instances.

    python benchmarks/speed/allocation.py --json benchmarks/results/allocation.json \
        --markdown docs/results/allocation.md

Layers of sizes drawn log-uniform from 400 to 2.4 million, losses near importance x 4^-bits, four candidates (8, 6, 4,
2), budgets of average bits. Ours is the whole ``allocate_bits(table, budget=...)``; scipy's is the solver's call alone,
on arrays that were made before, with gap 0 and losses scaled so that its absolute tolerance is far below the optimum.
Contenders run in turn, in an order that rotates from round to round. A row has the ratios of the medians over all seeds
and rounds, of wall and of CPU time, the quartiles of the single ratios, and the worst ratio
of wall time for one seed. The largest relative difference
between the two optima is reported. HiGHS, inside of scipy, writes some lines of its own to the output.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import environment, peak_memory, spread, write
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from tables import allocation as markdown

from lightning_plugins.quantization.allocation import allocate_bits, predicted_loss
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

BITS = (8, 6, 4, 2)


def draw(num_layers: int, seed: int) -> SensitivityTable:
    """A network with layers of very different sizes and sensitivities."""
    rng = np.random.default_rng(seed)
    layers = {}
    for i in range(num_layers):
        trace = math.exp(rng.normal(0, 2))
        losses = {b: trace * 4.0**-b * math.exp(rng.normal(0, 0.1)) for b in BITS}
        size = int(math.exp(rng.uniform(math.log(400), math.log(2.4e6))))
        layers[f"layer.{i}"] = LayerSensitivity(trace, losses, size)
    return SensitivityTable("random", layers)


def scipy_solver(table: SensitivityTable, budget: float, optimum: float) -> Callable[[], float]:
    """Return the call of scipy's solver; it gives the predicted loss of the plan that was found."""
    names, choices = list(table.layers), len(BITS)
    losses = np.array([[table.layers[name].losses[b] for b in BITS] for name in names])
    costs = np.array([[table.layers[name].num_weights * b for b in BITS] for name in names], dtype=float)
    rows = np.repeat(np.arange(len(names)), choices)
    one_each = csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    limit = budget * sum(layer.num_weights for layer in table.layers.values()) * (1 + 1e-12)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(costs.reshape(1, -1), -np.inf, limit)]
    objective = losses.ravel() * (1e4 / optimum)

    def solve() -> float:
        result = milp(
            objective,
            constraints=constraints,
            integrality=np.ones(objective.size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        chosen = result.x.reshape(-1, choices).argmax(1)
        return math.fsum(losses[np.arange(len(names)), chosen])

    return solve


def compare(num_layers: int, budget: float, seeds: int, rounds: int) -> dict[str, Any]:
    """Time both on every seed, in turn."""
    wall: dict[str, list[float]] = {"ours": [], "scipy": []}
    cpu: dict[str, list[float]] = {"ours": [], "scipy": []}
    ratios, differences = [], []
    for seed in range(seeds):
        table = draw(num_layers, seed)

        def ours(table: SensitivityTable = table) -> float:
            return predicted_loss(table, allocate_bits(table, budget=budget))

        contenders = {"ours": ours, "scipy": scipy_solver(table, budget, ours())}
        results = {name: solve() for name, solve in contenders.items()}
        differences.append(results["ours"] / results["scipy"] - 1)
        taken: dict[str, list[float]] = {"ours": [], "scipy": []}
        for turn in range(rounds):
            for name in sorted(contenders, reverse=bool(turn % 2)):
                started, started_cpu = time.perf_counter(), time.process_time()
                contenders[name]()
                taken[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
        ratios.append(statistics.median(taken["ours"]) / statistics.median(taken["scipy"]))
        for name, values in taken.items():
            wall[name] += values
    memory = {name: peak_memory(solve) for name, solve in contenders.items()}  # of the last seed
    medians = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "layers": num_layers,
        "budget": budget,
        "ours_ms": 1e3 * medians["ours"],
        "scipy_ms": 1e3 * medians["scipy"],
        "ratio": medians["ours"] / medians["scipy"],
        "cpu_ratio": statistics.median(cpu["ours"]) / statistics.median(cpu["scipy"]),
        "worst_ratio": max(ratios),
        "quartiles": spread(wall["ours"], wall["scipy"])["quartiles"],
        "ours_mib": memory["ours"],
        "scipy_mib": memory["scipy"],
        "largest_difference": max(differences, key=abs),
    }


def main() -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 4.0, 5.0, 6.0, 7.0], help="average bits")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    rows = []
    for num_layers in options.layers:
        for budget in options.budgets:
            rows.append(row := compare(num_layers, budget, options.seeds, options.rounds))
            print(
                f"{num_layers:4} layers, {budget:g} bits: ratio {row['ratio']:.2f} (CPU {row['cpu_ratio']:.2f}), "
                f"worst seed {row['worst_ratio']:.2f}, ours {row['ours_ms']:.1f} ms, scipy {row['scipy_ms']:.1f} ms, "
                f"optima differ by {row['largest_difference']:.0e}",
                flush=True,
            )
    report = {
        "environment": environment("numpy", "scipy"),
        "setting": f"four candidates per layer; medians over {options.seeds} seeds and {options.rounds} rounds",
        "rows": rows,
    }
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
