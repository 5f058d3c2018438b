r"""Is h-calibration's default schedule better than the published one on data that it was not chosen on?

    python benchmarks/claims/h_calibration.py --logits DIR \
        --json benchmarks/results/h_calibration.json --markdown docs/results/h_calibration.md

The default (step halved after 40 epochs without a better ECE, stop after 80) was chosen on one split, that of seed 0,
of one of these networks, WideResNet-16-4 on CIFAR-100. Here both schedules fit the piecewise-linear map of 100
segments, selected by debiased ECE, on the outputs of four public networks, with seeds from 1: sets of one part are cut
into random halves anew for each seed; of those with a long-tailed validation and a balanced test part each seed
resamples both with replacement. A seed's two fits see the same rows; temperature scaling and the uncalibrated logits
stand beside them. ECE has 15 equal-width bins, measured on the test part.

The default is better (worse) on a network if its ECE is lower (higher) for every seed. h-calibration beats a
temperature there under the same rule. Fits that are in the JSON file are not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from post_hoc import cpu, write
from temperature_scaling import NETWORKS, split
from torch import Tensor

from lightning_plugins.calibration import HCalibration, TemperatureScaling, ece, nll

TUNED = "netcal-wideresnet-16-4-cifar-100"
SCHEDULES: dict[str, dict[str, int]] = {"default": {}, "published": {"patience": 160, "step_patience": 20}}


def values(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return NLL in nats and ECE in percent."""
    return {
        "nll": nll(log_probs, labels, input="logits").item(),
        "ece": 100 * ece(log_probs, labels, input="logits").item(),
    }


def measure(path: Path, seed: int, max_epochs: int) -> dict[str, Any]:
    """Fit both schedules and a temperature on one split."""
    (logits, labels), (test_logits, test_labels) = split(path, seed)
    logits, test_logits = logits.float(), test_logits.float()
    result: dict[str, Any] = {"none": values(test_logits, test_labels)}
    temperature = TemperatureScaling().fit(logits, labels)
    result["TS"] = values(temperature(test_logits), test_labels)
    for name, schedule in SCHEDULES.items():
        start = time.perf_counter()
        calibrator = HCalibration(max_epochs=max_epochs, progress=False, **schedule).fit(logits, labels)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            result[name] = values(calibrator(test_logits), test_labels)
        result[name] |= {"epochs": calibrator.fit_info["iterations"], "seconds": round(seconds, 1)}
    return result


def side(differences: list[float]) -> str:
    """Say whether all differences are below or above zero."""
    if max(differences) < 0:
        return "lower"
    return "higher" if min(differences) > 0 else "neither"


def verdicts(runs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Say for each network who has the lower ECE for every seed."""
    said = {}
    for name in NETWORKS:
        of_net = [run for key, run in runs.items() if key.startswith(f"{name}/")]
        if of_net:
            against = {
                other: side([run["default"]["ece"] - run[other]["ece"] for run in of_net])
                for other in ("published", "TS")
            }
            said[name] = against | {"seeds": str(len(of_net))}
    return said


def spread(numbers: list[float], digits: int, *, sign: bool = False) -> str:
    """Return mean ± standard deviation."""
    mean = f"{statistics.fmean(numbers):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def markdown(report: dict[str, Any]) -> str:
    """Return the documentation's table."""
    lines = [
        "| network | uncalibrated ECE, % | temperature | default schedule | published schedule | default − published "
        "| NLL: temperature, default, published | epochs: default, published |",
        "| --- |" + " --- |" * 7,
    ]
    for name, title in NETWORKS.items():
        of_net = [run for key, run in report["runs"].items() if key.startswith(f"{name}/")]
        if not of_net:
            continue
        cells = [spread([run[arm]["ece"] for run in of_net], 2) for arm in ("none", "TS", "default", "published")]
        cells.append(spread([run["default"]["ece"] - run["published"]["ece"] for run in of_net], 2, sign=True))
        likelihoods = [statistics.fmean(run[arm]["nll"] for run in of_net) for arm in ("TS", "default", "published")]
        cells.append(", ".join(f"{number:.4f}" for number in likelihoods))
        cells.append(", ".join(f"{statistics.fmean(run[arm]['epochs'] for run in of_net):.0f}" for arm in SCHEDULES))
        lines.append(f"| {title}{' (chosen here)' if name == TUNED else ''} | " + " | ".join(cells) + " |")
    lines.append("")
    names = {
        "lower": "a lower ECE than",
        "higher": "a higher ECE than",
        "neither": "an ECE that is not on one side of",
    }
    for name, said in report["verdicts"].items():
        lines.append(
            f"- {NETWORKS[name]}: over {said['seeds']} seeds the default has **{names[said['published']]}** the "
            f"published schedule, and **{names[said['TS']]}** a temperature."
        )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    seeds = report["settings"]["seeds"]
    lines += [
        "",
        f"*Mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}, none of them the split of the choice; at "
        f"most {report['settings']['max_epochs']} epochs; {report['date'][:10]}; {versions}; {report['hardware']}, one "
        "thread.*",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing, print the table, write the files after each split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True, help="folder with the four npz files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="0 is the split of the choice")
    parser.add_argument("--max-epochs", type=int, default=2000, help="of both schedules")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, and to go on from")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"seeds": options.seeds, "max_epochs": options.max_epochs}
    report: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
        if report["settings"]["max_epochs"] != options.max_epochs:
            parser.error(f"{options.json} was made with {report['settings']}; delete it or use the same options")
        report["settings"] = settings
    for seed in options.seeds:
        for name in NETWORKS:
            key = f"{name}/{seed}"
            if key not in report["runs"]:
                result = report["runs"][key] = measure(options.logits / f"{name}.npz", seed, options.max_epochs)
                print(key, ", ".join(f"{arm} {value['ece']:.2f}" for arm, value in result.items()), flush=True)
            report |= {
                "claim": "h-calibration's default schedule leaves a lower ECE than the published one",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {
                    package: importlib.metadata.version(package) for package in ("lightning-plugins", "torch")
                },
                "hardware": cpu(),
                "verdicts": verdicts(report["runs"]),
            }
            write(options.json, json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    write(options.markdown, text)
    print(text)


if __name__ == "__main__":
    main()
