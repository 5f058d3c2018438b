r"""Does Hessian-aware bit switching find better plans than uniform draws? A one-shot supernet on Fashion-MNIST.

    python benchmarks/claims/supernet.py --json benchmarks/results/supernet.json --markdown docs/results/supernet.md

(Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025.) The recipe ``quantization/supernet`` is run twice for
each seed, from the same weights on the same batches: layers of large Hessian trace draw high bits more often, and all
layers draw alike (``sensitivity="uniform"``, for the draws and for the search). Plans for 3 to 7 bits on average are
chosen on validation images and measured on 2,560 test images.

Claim E5: at 70 % of the budgets or more the Hessian-aware frontier is at least as accurate as the uniform one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import statistics
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lightning_plugins import recipes

DRAWS = {"Hessian-aware": "hawq-v2", "uniform": "uniform"}
BUDGETS = (3, 4, 5, 6, 7)


def run(sensitivity: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one supernet; return test accuracies in percent, of the plans and at uniform precisions."""
    with tempfile.TemporaryDirectory() as folder:
        built = recipes.build(
            "quantization/supernet",
            f"seed_everything={seed}",
            "data.class_path=lightning_plugins.data.FashionMNISTDataModule",
            f"data.init_args.root={options.root}",
            "data.init_args.batch_size=64",
            f"data.init_args.val_fraction={1 - options.train_share}",
            f"trainer.max_epochs={options.epochs}",
            f"trainer.callbacks.init_args.sensitivity={sensitivity}",
            "trainer.callbacks.init_args.warmup_epochs=2",
            "trainer.limit_val_batches=8",
            "trainer.limit_test_batches=40",
            f"trainer.default_root_dir={folder}",
            "trainer.logger=false",
            "trainer.enable_checkpointing=false",
            "trainer.enable_progress_bar=false",
            "trainer.enable_model_summary=false",
        )
        built.trainer.fit(built.module, datamodule=built.datamodule)
        built.trainer.test(built.module, datamodule=built.datamodule, verbose=False)
    found = {name.removeprefix("test/"): 100 * float(value) for name, value in built.trainer.callback_metrics.items()}
    return {name: value for name, value in found.items() if name.startswith("acc_")}


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-share", type=float, default=0.04)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; runs that it holds are kept")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {"train_share": options.train_share, "epochs": options.epochs}
    runs: dict[str, Any] = {}
    if options.json and options.json.exists():
        old = json.loads(options.json.read_text())
        runs = old["runs"] if old["settings"] == settings else {}
    for seed in options.seeds:
        for name, sensitivity in DRAWS.items():
            key = f"{name}-{seed}"
            if key not in runs:
                runs[key] = run(sensitivity, seed, options)
                print(key, runs[key], flush=True)
            report = {"settings": settings, "runs": runs}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "| average bits, at most | Hessian-aware, % | uniform draws, % | difference |",
        "| --- | --- | --- | --- |",
    ]
    at_least = clear = 0
    for budget in BUDGETS:
        values = {name: [runs[f"{name}-{seed}"][f"acc_plan_{budget}"] for seed in options.seeds] for name in DRAWS}
        gains = [a - b for a, b in zip(*values.values(), strict=True)]
        at_least += statistics.fmean(gains) >= 0
        clear += len(gains) > 1 and statistics.fmean(gains) > statistics.stdev(gains)
        lines.append(f"| {budget} | {' | '.join(cell(each) for each in values.values())} | {cell(gains)} |")
    verdict = "holds" if at_least >= 0.7 * len(BUDGETS) else "does not hold"
    verdict += f": at {at_least} of {len(BUDGETS)} by the mean; better by more than the spread over seeds at {clear}"
    claim = "E5, Hessian-aware draws are at least as accurate as uniform ones at 70 % of the budgets"
    report["verdicts"] = {claim: verdict}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines += [
        "",
        f"{claim}: {verdict}.",
        "",
        f"*ResNet-20 of width 8, {round(60_000 * options.train_share):,} training images, {options.epochs} epochs, "
        f"{len(options.seeds)} seeds, mean ± standard deviation; {platform.machine()} CPU, one thread; "
        f"{datetime.now(UTC).date()}; torch {torch.__version__}, lightning-plugins "
        f"{importlib.metadata.version('lightning-plugins')}.*",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
