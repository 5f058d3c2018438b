r"""Claims of BiPer, re-measured on Fashion-MNIST with its ResNet-20 of binary weights and activations.

    python benchmarks/claims/biper.py --json benchmarks/results/biper.json --markdown docs/results/biper.md

(Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function", 2024.) For each seed every contender starts
from the same weights, sees the same batches in the same order, and is evaluated once on all 10,000 test images:

* ``fp32``: the same network, unconverted;
* ``frequency 1``, ``5``, ``20``: BiPer, stage 1 then stage 2 in one run;
* ``sign, two stages``: the sign with the straight-through gradient; its stage 1 has weights clipped to [-1, 1];
* ``sign, one stage``: the same, binary from the first step.

Claims. E9a: the quantization error falls with the frequency, and is what the closed form for Laplace weights of the
same mean magnitude says, layer by layer, within 0.05 on average. E9b: each frequency is at least as accurate as the
better of the two baselines of the sign; a verdict for each, from the paired differences.

On a CPU this is a small study: width 8, a part of the training images, few epochs. ``--width 16 --train-share 1.0
--epochs 900 --batch-size 256`` on a GPU is the size that was published, for CIFAR-10.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import platform
import statistics
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_plugins.callbacks.quantization.binary_qat import BinaryQAT
from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.models.binary_resnet import binary_resnet20
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization.binary import quantization_error
from lightning_plugins.quantization.binary_layers import binary_layers

FREQUENCIES = (1.0, 5.0, 20.0)
SIGNS = ("sign, two stages", "sign, one stage")


def contenders() -> dict[str, BinaryQAT | None]:
    """The callbacks by name."""
    made: dict[str, BinaryQAT | None] = {"fp32": None}
    made |= {f"frequency {frequency:g}": BinaryQAT(frequency) for frequency in FREQUENCIES}
    return made | {
        SIGNS[0]: BinaryQAT(estimator="sign"),
        SIGNS[1]: BinaryQAT(estimator="sign", stage_split=0),
    }


def train(callback: BinaryQAT | None, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one net; return its accuracy in percent and, where there is a wave, its quantization errors."""
    pl.seed_everything(seed, verbose=False)
    data = FashionMNISTDataModule(
        root=options.root, batch_size=options.batch_size, val_fraction=1 - options.train_share, seed=seed
    )
    module = ImageClassifier(
        binary_resnet20(in_channels=1, width=options.width),
        num_classes=10,
        mean=data.mean,
        std=data.std,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=options.lr),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
    )
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    (metrics,) = trainer.test(module, data, verbose=False)
    row = {"accuracy": 100 * metrics["test/acc"]}
    if callback is not None and callback.estimator == "periodic":
        layers = binary_layers(module).values()
        with torch.no_grad():
            found = [float(quantization_error(layer.weight, layer.frequency)) for layer in layers]
            expected = [laplace_error(float(layer.weight.abs().mean()), layer.frequency) for layer in layers]
        row["error"] = statistics.fmean(found)
        row["closed_form"] = statistics.fmean(expected)
        row["distance"] = statistics.fmean(abs(a - b) for a, b in zip(found, expected, strict=True))
    return row


def laplace_error(scale: float, frequency: float) -> float:
    """The quantization error of Laplace weights, whose mean magnitude is their scale."""
    s = 1 / (frequency * scale)
    return 1 - s / math.tanh(math.pi * s / 2) / (1 + s**2)


def paired(tables: list[dict[str, dict[str, float]]], first: str, second: str) -> tuple[float, float]:
    """Return mean and standard error of the difference in accuracy over seeds, in points."""
    differences = [table[first]["accuracy"] - table[second]["accuracy"] for table in tables]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def mean(tables: list[dict[str, dict[str, float]]], name: str, key: str) -> float:
    """Return the mean over seeds."""
    return statistics.fmean(table[name][key] for table in tables)


def verdicts(tables: list[dict[str, dict[str, float]]]) -> dict[str, str]:
    """Say of each claim whether it held, with its figures."""

    def said(holds: bool) -> str:
        return "holds" if holds else "does not hold"

    names = [f"frequency {frequency:g}" for frequency in FREQUENCIES]
    errors = [mean(tables, name, "error") for name in names]
    distances = [mean(tables, name, "distance") for name in names]
    best = max(SIGNS, key=lambda name: mean(tables, name, "accuracy"))
    result = {
        "the error falls with the frequency": said(errors == sorted(errors, reverse=True))
        + ": "
        + ", ".join(f"{error:.3f} at {frequency:g}" for error, frequency in zip(errors, FREQUENCIES, strict=True)),
        "the error is that of Laplace weights, within 0.05": said(max(distances) <= 0.05)
        + ": mean distance "
        + ", ".join(f"{value:.3f} at {frequency:g}" for value, frequency in zip(distances, FREQUENCIES, strict=True)),
    }
    for name in names:
        difference, error = paired(tables, name, best)
        verdict = said(difference > 0) if abs(difference) > 2 * error else "undecided"
        result[f"{name} at least as accurate as the best sign"] = (
            f"{verdict}: {difference:+.2f} ± {error:.2f} against {best}"
        )
    return result


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    tables = list(report["seeds"].values())
    lines = ["| training | accuracy | quantization error | closed form |", "| --- | --- | --- | --- |"]
    for name, row in tables[0].items():
        values = [table[name]["accuracy"] for table in tables]
        cells = [f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"]
        cells += [f"{mean(tables, name, key):.3f}" if key in row else "" for key in ("error", "closed_form")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| claim | verdict, paired differences in points ± standard error |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in report["verdicts"].items()]
    lines += ["", f"*{report['setting']}; {report['date'][:10]}; {report['machine']}.*"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds, print the table and the verdicts, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--train-share", type=float, default=0.03, help="share of the training images that is used")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2, help="Adam's learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; contenders that it holds are kept")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # A study takes long; what an interrupted one has finished under the same options is kept.
    done: dict[str, Any] = {}
    settings = {
        name: value for name, value in vars(options).items() if name not in ("seeds", "json", "markdown", "root")
    }
    if options.json and options.json.exists() and (old := json.loads(options.json.read_text()))["options"] == settings:
        done = old["seeds"]
    for seed in options.seeds:
        table = done.setdefault(str(seed), {})
        for name, callback in contenders().items():
            if name not in table:
                table[name] = train(callback, seed, options)
                print(f"seed {seed}  {name:18}", "  ".join(f"{k} {v:.3f}" for k, v in table[name].items()), flush=True)
                write(options, settings, done)
    report = write(options, settings, done)
    for claim, verdict in report["verdicts"].items():
        print(f"{claim}: {verdict}")


def write(options: argparse.Namespace, settings: dict[str, Any], seeds: dict[str, Any]) -> dict[str, Any]:
    """Write the files with all that is done, and return what is in the JSON."""
    tables = [table for table in seeds.values() if table.keys() == contenders().keys()]
    images = round(60_000 * options.train_share)
    gpu = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{platform.machine()} CPU"
    report = {
        "setting": f"binary ResNet-20 of width {options.width}, {images:,} training images of Fashion-MNIST, "
        f"{options.epochs} epochs of Adam at {options.lr:g}; {len(tables)} seeds, mean ± standard "
        "deviation of the accuracy in percent on 10,000 test images",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{gpu}, {options.threads} thread{'s' if options.threads > 1 else ''}, torch "
        f"{torch.__version__}, lightning-plugins {importlib.metadata.version('lightning-plugins')}",
        "verdicts": verdicts(tables) if len(tables) > 1 else {},
        "options": settings,
        "seeds": seeds,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown and len(tables) > 1:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(report | {"seeds": dict(enumerate(tables))}))
    return report


if __name__ == "__main__":
    main()
