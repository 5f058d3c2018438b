r"""Which post-hoc calibrator repairs an overconfident net, over several trainings of it?

    python benchmarks/claims/post_hoc_fashion.py --json benchmarks/results/post_hoc_fashion.json \
        --markdown docs/results/post_hoc_fashion.md

Fashion-MNIST; a net of two convolutions (16 and 32 channels with pooling) and a layer of 128, trained without any
regularisation (Adam at 1e-3, batches of 100) until it is far too sure. Every calibrator of the package, with its
defaults (h-calibration: at most 300 epochs), is fitted on 5,000 training images held out and measured on the 10,000
test images. Each seed draws other training and held-out images and other first weights. To save time the net is
trained on 6,000 images for 25 epochs, not on all 55,000.

Criteria. (i) The net is overconfident: mean confidence above accuracy, ECE above 5 %. (ii) Temperature scaling removes
more than half of the ECE and lowers the NLL. (iii) Calibrators that promise so keep every predicted class. (iv) Some
calibrator has a lower NLL than temperature scaling, the same one for every seed. (v) likewise for the ECE. Each holds
if it does for every seed. Seed 0 has 95 % bootstrap intervals (200 resamples of the test images).

Seeds that are in the JSON file are not run again.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from fashion import held, measure_all
from mixing import Arm, logits_of, spread, train
from post_hoc import DIGITS, METRICS, TITLES, plain, value

from lightning_plugins.calibration._comparison import UNCALIBRATED, all_calibrators, evaluate, fit_all

ARM = "plain"
TEMPERATURE = "TemperatureScaling"
WORDS = {
    "(i)": "the net is overconfident, with an ECE above 5 %",
    "(ii)": "temperature scaling removes more than half of the ECE and lowers the NLL",
    "(iii)": "calibrators that promise so keep every predicted class",
    "(iv)": "one calibrator has a lower NLL than temperature scaling for every seed",
    "(v)": "one calibrator has a lower ECE than temperature scaling for every seed",
}


def run(arm: str, seed: int, data: dict[str, Any], settings: dict[str, int]) -> dict[str, Any]:
    """Train a net, fit and measure all calibrators."""
    start = time.perf_counter()
    images, targets = data["train"]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    held_out = order[: settings["held_out"]]
    chosen = order[settings["held_out"] :][: settings["train"]]
    test_images, test_labels = (part[: settings["test"]] for part in data["test"])
    mean, std = images[chosen].mean(), images[chosen].std()
    device = data["device"]
    net = train(Arm(), (images[chosen] - mean) / std, targets[chosen], settings["epochs"], seed, device)
    held = logits_of(net, (images[held_out] - mean) / std, device).float()
    test = logits_of(net, (test_images - mean) / std, device).float()
    trained = time.perf_counter() - start
    contestants = fit_all(all_calibrators(), held, targets[held_out])
    evaluate(contestants, test, test_labels, METRICS, num_bootstrap=settings["bootstrap"] if seed == 0 else 0)
    return {
        "accuracy": (test.argmax(1) == test_labels).double().mean().item(),
        "confidence": test.softmax(1).amax(1).double().mean().item(),
        "training_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "calibrators": {contestant.name: contestant.plain() for contestant in contestants},
    }


def lower_for_all(runs: list[dict[str, Any]], metric: str) -> list[str]:
    """Return the calibrators that are below temperature scaling for every seed, the best mean first."""
    names = [name for name in runs[0]["calibrators"] if name not in (UNCALIBRATED, TEMPERATURE)]
    better = [name for name in names if all(value(run, name, metric) < value(run, TEMPERATURE, metric) for run in runs)]
    return sorted(better, key=lambda name: statistics.fmean(value(run, name, metric) for run in runs))


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """Say what held."""
    runs = [run[ARM] for run in seeds]

    def kept(run: dict[str, Any]) -> bool:
        reports = run["calibrators"].values()
        return all(
            report["predictions_kept"] == 1
            for report in reports
            if report.get("preserves_ranking") and not report["failure"]
        )

    outcomes = {
        "(i)": [run["confidence"] > run["accuracy"] and value(run, UNCALIBRATED, "ece") > 5 for run in runs],
        "(ii)": [
            value(run, TEMPERATURE, "ece") < value(run, UNCALIBRATED, "ece") / 2
            and value(run, TEMPERATURE, "nll") < value(run, UNCALIBRATED, "nll")
            for run in runs
        ],
        "(iii)": [kept(run) for run in runs],
    }
    said = {f"{key} {WORDS[key]}": held(outcome) for key, outcome in outcomes.items()}
    for key, metric in (("(iv)", "nll"), ("(v)", "ece")):
        better = [plain(name) for name in lower_for_all(runs, metric)]
        said[f"{key} {WORDS[key]}"] = f"holds: {'; '.join(better)}" if better else "does not hold: none"
    return said


def table(seeds: list[dict[str, Any]], settings: dict[str, int]) -> list[str]:
    """Return the documentation's table."""
    runs = [run[ARM] for run in seeds]
    lines = [
        "| calibrator | " + " | ".join(TITLES[metric] for metric in METRICS) + " | NLL − temperature's "
        "| ECE − temperature's | ECE of seed 0, 95 % | fit, s |",
        "| --- |" + " --- |" * (len(METRICS) + 4),
    ]
    for name, first in runs[0]["calibrators"].items():
        if failure := first.get("failure"):
            lines.append(f"| {plain(name)} (not fitted: {failure}) |" + " - |" * (len(METRICS) + 4))
            continue
        cells = [spread([value(run, name, metric) for run in runs], DIGITS[metric]) for metric in METRICS]
        for metric in ("nll", "ece"):
            differences = [value(run, name, metric) - value(run, TEMPERATURE, metric) for run in runs]
            cells.append("" if name == TEMPERATURE else spread(differences, DIGITS[metric]))
        ends = [value(runs[0], name, "ece", part) for part in ("low", "high")]
        cells.append("–".join(f"{end:.2f}" for end in ends))
        seconds = [run["calibrators"][name].get("fit_seconds", 0.0) for run in runs]
        cells.append("" if name == UNCALIBRATED else f"{statistics.fmean(seconds):.1f}")
        lines.append(f"| {plain(name)} | " + " | ".join(cells) + " |")
    accuracy = spread([100 * run["accuracy"] for run in runs], 1)
    confidence = spread([100 * run["confidence"] for run in runs], 1)
    lines += [
        "",
        f"Accuracy of the net {accuracy} %, mean confidence {confidence} %. {settings['train']:,} training images, "
        f"{settings['epochs']} epochs; fitted on {settings['held_out']:,} images, measured on {settings['test']:,}.",
    ]
    return lines


if __name__ == "__main__":
    measure_all(
        __doc__ or "",
        "which post-hoc calibrator repairs an overconfident net on Fashion-MNIST",
        {"train": 6000, "epochs": 25, "held_out": 5000, "test": 10_000, "bootstrap": 200},
        [ARM],
        run,
        verdicts,
        table,
    )
