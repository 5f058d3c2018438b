r"""Claim: one temperature, fitted on held-out logits, removes most of a modern net's miscalibration.

    python benchmarks/claims/temperature_scaling.py --logits DIR \
        --json benchmarks/results/temperature_scaling.json --markdown docs/results/temperature_scaling.md

(Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.) Measured on the outputs of four public networks.
Sets that come with a validation and a test part keep them, and each seed resamples both parts with replacement; the
others are split at random into halves, anew for each seed. Reported: negative log-likelihood (nats) and ECE (15 bins)
before and after, mean and standard deviation over the seeds, and the paired differences.

It holds on a network if the mean ECE falls to less than half, the likelihood improves for every seed, and the accuracy
stays exactly the same. The widely copied recipe (LBFGS from 1.5, learning rate 0.01, 50 iterations) is run beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import ece, fit_temperature

NETWORKS = {
    "netcal-lenet-5-cifar-10": "LeNet-5, CIFAR-10",
    "netcal-wideresnet-16-4-cifar-100": "WideResNet-16-4, CIFAR-100",
    "sctl-densenet40-cifar10-lt": "DenseNet-40, CIFAR-10-LT",
    "sctl-wideresnet28-cifar10-lt": "WideResNet-28, CIFAR-10-LT",
}


def load(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Return (logits, labels) of the calibration part and of the test part, or of the whole set and None."""
    with np.load(path) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    if "predictions" in data:  # float32 probabilities
        probs = data["predictions"]
        return (probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), data["ground_truth"].flatten().long()), None
    calibration = (data["logits_val"], data["labels_val"].flatten().long())
    return calibration, (data["logits_test"], data["labels_test"].flatten().long())


def split(path: Path, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a calibration and a test part for one seed."""
    generator = torch.Generator().manual_seed(seed)
    (logits, labels), test = load(path)
    if test is None:
        order = torch.randperm(len(labels), generator=generator)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        return (logits[first], labels[first]), (logits[second], labels[second])
    rows = torch.randint(len(labels), (len(labels),), generator=generator)
    test_rows = torch.randint(len(test[1]), (len(test[1]),), generator=generator)
    return (logits[rows], labels[rows]), (test[0][test_rows], test[1][test_rows])


def copied_recipe(logits: Tensor, labels: Tensor) -> float:
    """Fit as the widely copied script does: LBFGS from 1.5, learning rate 0.01, 50 iterations, no line search."""
    temperature = torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return temperature.item()


def quantities(path: Path, seed: int) -> dict[str, float]:
    """Measure one seed on one network."""
    (logits, labels), (test_logits, test_labels) = split(path, seed)
    temperatures = {"before": 1.0, "after": fit_temperature(logits, labels), "copied": copied_recipe(logits, labels)}
    measured: dict[str, float] = {}
    for when, temperature in temperatures.items():
        scaled = test_logits.double() / temperature
        measured[f"temperature_{when}"] = temperature
        measured[f"nll_{when}"] = F.cross_entropy(scaled, test_labels).item()
        measured[f"ece_{when}"] = 100 * ece(scaled, test_labels, input="logits").item()
        measured[f"accuracy_{when}"] = 100 * (scaled.argmax(1) == test_labels).double().mean().item()
    return measured


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation of all quantities, and of the paired differences."""
    table = {name: [run[name] for run in runs] for name in runs[0]}
    for name in ("nll", "ece", "accuracy"):
        table[f"{name}_difference"] = [run[f"{name}_after"] - run[f"{name}_before"] for run in runs]
    statistics_of = {name: [statistics.fmean(v), statistics.stdev(v)] for name, v in table.items()}
    fall = 1 - statistics_of["ece_after"][0] / statistics_of["ece_before"][0]
    return {
        "mean_and_std": statistics_of,
        "share_of_ece_removed": fall,
        "holds": fall > 0.5 and max(table["nll_difference"]) < 0 and set(table["accuracy_difference"]) == {0.0},
    }


def main() -> None:
    """Measure, print the table and the verdict, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True, help="folder with the four npz files")
    parser.add_argument("--seeds", type=int, default=20, help="number of splits, at least 2")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2 for a standard deviation")
    warnings.simplefilter("error")
    results = {}
    print(f"{'':28}{'T':>14}{'NLL':>18}{'ECE %':>24}{'removed':>13}{'accuracy %':>12}{'copied recipe: T, ECE %':>26}")
    for file, network in NETWORKS.items():
        result = summary([quantities(options.logits / f"{file}.npz", seed) for seed in range(options.seeds)])
        results[network] = result
        m = result["mean_and_std"]
        print(
            f"{network:28}{m['temperature_after'][0]:7.3f} ±{m['temperature_after'][1]:5.3f}"
            f"{m['nll_before'][0]:9.4f} -> {m['nll_after'][0]:.4f}"
            f"{m['ece_before'][0]:8.2f} -> {m['ece_after'][0]:5.2f} ± {m['ece_after'][1]:.2f}"
            f"{100 * result['share_of_ece_removed']:11.0f} %{m['accuracy_after'][0]:12.2f}"
            f"{m['temperature_copied'][0]:18.3f}, {m['ece_copied'][0]:6.2f}"
        )
    held = [network for network, result in results.items() if result["holds"]]
    refuted = [network for network in results if network not in held]
    verdict = f"holds on {len(held)} of {len(results)} networks" + (f"; not on {'; '.join(refuted)}" if refuted else "")
    print(f"\nThe claim {verdict}.")
    packages = ("lightning-plugins", "torch", "numpy")
    report = {
        "claim": "one temperature fitted on held-out logits removes more than half of the ECE, improves the NLL "
        "for every seed, and leaves the accuracy unchanged",
        "verdict": verdict,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "seeds": options.seeds,
        "networks": results,
    }
    for path, text in {options.json: json.dumps(report, indent=2) + "\n", options.markdown: markdown(report)}.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the documentation."""
    lines = [
        "| network | T | NLL, nats | ECE, % | ECE removed | copied recipe: T, ECE % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for network, result in report["networks"].items():
        m = {
            name: f"{mean:.{digits}f} ± {std:.{digits}f}"
            for name, (mean, std) in result["mean_and_std"].items()
            for digits in [2 if name.startswith("ece") else 3]
        }
        lines.append(
            f"| {network} | {m['temperature_after']} | {m['nll_before']} → {m['nll_after']} | "
            f"{m['ece_before']} → {m['ece_after']} | {100 * result['share_of_ece_removed']:.0f} % | "
            f"{m['temperature_copied']}, {m['ece_copied']} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"*Claim: {report['claim']}. Verdict: it {report['verdict']}.*",
        "",
        f"*Mean ± standard deviation over {report['seeds']} seeds; {report['date'][:10]}; {versions}.*",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
