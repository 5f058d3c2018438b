"""How fast temperature scaling and ECE are, as ratios to the least work that anything of the kind must do.

    python benchmarks/speed/calibration.py --classes 100 1000 --json benchmarks/results/speed_calibration.json

Contenders run in turn, in an order that rotates from round to round. Two ratios are printed for each: best wall time
over the floor's best wall time, and median CPU time over the floor's. Floors: for the fit, one cross-entropy pass
without gradients; for ECE, one softmax and maximum. Peers (netcal, probmetrics, scikit-learn) take part where they are
installed: ``pip install lightning-plugins[bench]``. On a busy machine threads that wait for each other spoil both
ratios; the JSON holds the load.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Contender, environment, importable, measure
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_plugins.calibration import CalibrationError, TemperatureScaling, ece, fit_temperature


def draw(num_samples: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Float32 logits that are overconfident by a factor of 2.5, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 2.5 * logits, labels


def lbfgs(
    logits: Tensor, labels: Tensor, *, start: float, learning_rate: float, steps: int, line_search: bool
) -> float:
    """Fit a temperature with torch's LBFGS, as most scripts do."""
    temperature = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [temperature], lr=learning_rate, max_iter=steps, line_search_fn="strong_wolfe" if line_search else None
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return temperature.item()


def fits(logits: Tensor, labels: Tensor) -> dict[str, Contender]:
    """Return the floor first, then all that can fit a temperature; each returns it where it can be read."""
    contenders: dict[str, Contender] = {
        "cross-entropy pass (floor)": lambda: F.cross_entropy(logits, labels),
        "ours: fit_temperature": lambda: fit_temperature(logits, labels),
        "ours: TemperatureScaling.fit": lambda: TemperatureScaling().fit(logits, labels).temperature,
        "torch LBFGS, strong Wolfe": lambda: with_grad(
            lambda: lbfgs(logits, labels, start=1.0, learning_rate=1.0, steps=50, line_search=True)
        ),
        "LBFGS lr 0.01 x 50 from 1.5": lambda: with_grad(
            lambda: lbfgs(logits, labels, start=1.5, learning_rate=0.01, steps=50, line_search=False)
        ),
    }
    if importable("sklearn.calibration"):
        from sklearn import calibration as sklearn_calibration

        if hasattr(sklearn_calibration, "_TemperatureScaling"):
            arrays = logits.numpy(), labels.numpy()
            contenders["scikit-learn"] = lambda: 1 / float(sklearn_calibration._TemperatureScaling().fit(*arrays).beta_)
    if importable("probmetrics", "numba"):
        from probmetrics.calibrators import get_calibrator

        probs, classes = logits.double().softmax(1).numpy(), labels.numpy()
        contenders["probmetrics"] = lambda: get_calibrator("temp-scaling").fit(probs, classes)
    if importable("netcal"):
        from netcal.scaling import TemperatureScaling as NetcalTemperatureScaling

        confidences, truth = logits.double().softmax(1).numpy(), labels.numpy()
        contenders["netcal, float64"] = lambda: NetcalTemperatureScaling().fit(confidences, truth)
    return contenders


def with_grad(fit: Callable[[], float]) -> float:
    """Run a fit that needs gradients inside a benchmark that has them off."""
    with torch.enable_grad():
        return fit()


def errors(logits: Tensor, labels: Tensor) -> dict[str, Contender]:
    """Return the floor first, then all that can compute ECE from probabilities that are ready."""
    probs, num_classes = logits.softmax(1), logits.shape[1]
    batches = list(zip(probs.split(500), labels.split(500), strict=True))

    def stream(metric: Any) -> Tensor:
        metric.reset()
        for batch in batches:
            metric.update(*batch)
        value: Tensor = metric.compute()
        return value

    own, theirs = CalibrationError(), MulticlassCalibrationError(num_classes, n_bins=15)
    contenders: dict[str, Contender] = {
        "softmax and max (floor)": lambda: logits.softmax(1).max(1),
        "ours: ece": lambda: ece(probs, labels),
        "ours: ece from logits": lambda: ece(logits, labels, input="logits"),
        "torchmetrics function": lambda: multiclass_calibration_error(probs, labels, num_classes, n_bins=15),
        "ours: metric, batches of 500": lambda: stream(own),
        "torchmetrics metric, batches of 500": lambda: stream(theirs),
    }
    if importable("netcal"):
        from netcal.metrics import ECE

        arrays = probs.numpy(), labels.numpy()
        contenders["netcal"] = lambda: ECE(15).measure(*arrays)
    return contenders


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch; one is the steadiest on a shared machine")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "environment": environment("torchmetrics", "scikit-learn", "probmetrics", "netcal", "numpy"),
        "samples": options.samples,
        "tables": [],
    }
    warnings.simplefilter("ignore")
    for num_classes in options.classes:
        logits, labels = draw(options.samples, num_classes)
        for title, contenders in (("temperature", fits(logits, labels)), ("ece", errors(logits, labels))):
            with torch.no_grad():
                rows = measure(contenders, options.rounds)
            report["tables"].append({"what": title, "classes": num_classes, "rows": rows})
            print(f"\n{title}, {options.samples} x {num_classes}, {options.rounds} rounds")
            print(f"{'':38}{'wall':>9}{'wall ms':>10}{'CPU':>9}   result")
            for name, row in rows.items():
                value = "" if row["result"] is None else f"{row['result']:.6g}"
                print(f"{name:38}{row['wall_ratio']:9.2f}{row['wall_ms']:10.1f}{row['cpu_ratio']:9.2f}   {value}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
