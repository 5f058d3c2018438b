r"""How fast temperature scaling and ECE are, as ratios to the least work that anything of the kind must do.

    python benchmarks/speed/calibration.py --classes 100 1000 --json benchmarks/results/speed_calibration.json \
        --markdown docs/results/speed_calibration.md

Contenders run in turn, in an order that rotates from round to round. Two ratios are printed for each: best wall time
over the floor's best wall time, and median CPU time over the floor's. Floors: for the fit, one cross-entropy pass
without gradients; for ECE, one softmax and maximum. Peers (netcal, probmetrics, scikit-learn, torch-uncertainty) take
part where they are installed: ``pip install lightning-plugins[bench]``. On a busy machine threads that wait for each
other spoil both ratios; the JSON holds the load.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Contender, add_peer, environment, measure, write
from tables import calibration as markdown
from torch import Tensor, nn
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


def fits(logits: Tensor, labels: Tensor) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the floor first, then all that can fit a temperature, and the peers left out.

    A contender returns the temperature where it can be read.
    """
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
    classes = labels.numpy()

    def sklearn() -> Contender:
        from sklearn.calibration import _TemperatureScaling

        values = logits.numpy()
        return lambda: 1 / float(_TemperatureScaling().fit(values, classes).beta_)

    def probmetrics() -> Contender:
        from probmetrics.calibrators import get_calibrator

        probs = logits.double().softmax(1).numpy()
        return lambda: get_calibrator("temp-scaling").fit(probs, classes)

    def netcal() -> Contender:
        from netcal.scaling import TemperatureScaling as NetcalTemperatureScaling

        probs = logits.double().softmax(1).numpy()
        return lambda: NetcalTemperatureScaling().fit(probs, classes)

    def torch_uncertainty() -> Contender:
        from torch_uncertainty.post_processing import TemperatureScaler

        def fit() -> float:
            scaler = TemperatureScaler(nn.Identity(), device="cpu")
            scaler.fit([(logits, labels)], progress=False)
            return float(1 / scaler.inv_temp)

        return lambda: with_grad(fit)

    left_out = add_peer(contenders, "scikit-learn", ["sklearn"], sklearn)
    left_out |= add_peer(contenders, "probmetrics", ["probmetrics", "numba"], probmetrics)
    left_out |= add_peer(contenders, "netcal, float64", ["netcal"], netcal)
    left_out |= add_peer(contenders, "torch-uncertainty", ["torch_uncertainty"], torch_uncertainty)
    return contenders, left_out


def with_grad(fit: Callable[[], float]) -> float:
    """Run a fit that needs gradients inside a benchmark that has them off."""
    with torch.enable_grad():
        return fit()


def errors(logits: Tensor, labels: Tensor) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the floor first, then all that can compute ECE from probabilities that are ready; the peers left out."""
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

    def netcal() -> Contender:
        from netcal.metrics import ECE

        arrays = probs.numpy(), labels.numpy()
        return lambda: ECE(15).measure(*arrays)

    return contenders, add_peer(contenders, "netcal", ["netcal"], netcal)


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch; one is the steadiest on a shared machine")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "environment": environment(
            "torchmetrics", "scikit-learn", "probmetrics", "netcal", "torch-uncertainty", "numpy"
        ),
        "samples": options.samples,
        "rounds": options.rounds,
        "tables": [],
        "left_out": {},
    }
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for num_classes in options.classes:
        logits, labels = draw(options.samples, num_classes)
        for title, make in (("temperature", fits), ("ece", errors)):
            with torch.no_grad():
                contenders, left_out = make(logits, labels)
                rows = measure(contenders, options.rounds)
            report["left_out"] |= left_out
            report["tables"].append({"what": title, "classes": num_classes, "rows": rows})
            print(f"\n{title}, {options.samples} x {num_classes}, {options.rounds} rounds")
            print(f"{'':38}{'wall':>9}{'wall ms':>10}{'CPU':>9}   result")
            for name, row in rows.items():
                value = "" if row["result"] is None else f"{row['result']:.6g}"
                print(f"{name:38}{row['wall_ratio']:9.2f}{row['wall_ms']:10.1f}{row['cpu_ratio']:9.2f}   {value}")
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
