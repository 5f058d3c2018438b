r"""Do scores find the right bits? Scores, post-training stages and accuracy budgets on Fashion-MNIST.

    python benchmarks/claims/mixed_precision.py --json benchmarks/results/mixed_precision.json \
        --markdown docs/results/mixed_precision.md

For each net (ResNet-20 of width 8 and torchvision's ResNet-18) and seed a net is trained in fp32 and left alone. Then,
without any training, on calibration images of the training set and with test images for the report:

* ``plans``: each score's plan of at most 4 bits a weight out of {8, 4, 2}, the exact optimum of its table, against
  uniform 4 bits, the plans of ten random tables and the inverted order. Scales are set from data and batch
  normalisations re-estimated, alike for all.
* ``ranking``: Spearman correlation of a score's predicted losses at 2 bits with the rise of the test loss when that
  layer alone goes to 2 bits.
* ``stages``: weights and activations at 4 bits, naive and after AdaQuant, batch norms and biases; the same with a plan
  of 4 bits on average by the integer programme.
* ``budgets``: the fewest bits of {32, 8, 4, 2} within 99 % and 99.9 % of the fp32 accuracy by bisection. One half of
  6,000 test images decides, asking for a confidence of 95 %; the other half reports.

Claims. E6: every score's plan beats the mean of the random plans, and the inverted one is worst. E7: the stages rise.
E8: the targets are met on the held-out half, with at most ceil(log2 L) + 2 evaluations for each of the three steps.
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
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.models import build_model
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import (
    BitPlan,
    SensitivityTable,
    allocate_bits,
    calibrate_scales_,
    convert_,
    evaluate_plan,
    inverted,
    plan_within_accuracy,
    post_training_quantize,
    quantized_layers,
    reestimate_batch_norms_,
    score_layers,
    switch_,
)
from lightning_plugins.quantization.copying import copy_network

BITS = (8, 4, 2)
BUDGET = 4.0
CONFIDENCE = 0.95
SCORES = ("hawq-v1", "hawq-v2", "loss-increase", "pairwise", "lim", "zd")
NETS: dict[str, dict[str, Any]] = {"resnet20": {"width": 8}, "resnet18": {}}
Batches = list[tuple[Tensor, Tensor]]


class Study:
    """One net and seed."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        self.options, self.seed, self.name = options, seed, name
        pl.seed_everything(seed, verbose=False)
        data = FashionMNISTDataModule(
            root=options.root, batch_size=128, val_fraction=1 - options.train_share, seed=seed, augmentation=False
        )
        module = ImageClassifier(
            build_model(name, num_classes=10, in_channels=1, **NETS[name]),
            num_classes=10,
            mean=data.mean,
            std=data.std,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3, weight_decay=5e-5),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
        )
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            accelerator="cpu",
        )
        trainer.fit(module, data)
        self.net: nn.Module = copy_network(module).eval()
        data.setup("test")
        self.calibration = take(data.train_dataloader(), options.calibration)
        self.test = take(data.test_dataloader(), options.test_images)
        self.many = take(data.test_dataloader(), options.budget_images)

    def converted(self) -> nn.Module:
        """A fresh copy that can compute at all candidates; the first and the last layer at 8 bits."""
        return convert_(copy_network(self.net), (*BITS, 32), first_last_bits=8, batch_norm="shared").eval()

    def realised(self, plan: BitPlan | int) -> tuple[float, float]:
        """Loss and accuracy in percent of a plan on the test images, scales and batch norms set from data."""
        model = self.converted()
        calibrate_scales_(model, self.calibration, plan)
        switch_(model, plan)
        reestimate_batch_norms_(model, self.calibration)
        loss, accuracy = evaluate_plan(model, plan, self.test)
        return loss, 100 * accuracy

    def score(self, method: str, seed: int = 0) -> SensitivityTable:
        """A table for all candidates; eigenvalues, which take twenty passes an iteration, on 64 images."""
        images = self.calibration
        if method == "hawq-v1":
            images = [(x[:64], y[:64]) for x, y in images[:1]]
        table: SensitivityTable = score_layers(
            self.net, method, images, bits=BITS, first_last_bits=8, seed=seed, num_probes=100
        )
        return table

    def run(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        plain = self.converted()
        fp32 = evaluate_plan(plain, 32, self.test)
        result: dict[str, Any] = {"fp32": [fp32[0], 100 * fp32[1]], "layers": len(quantized_layers(plain))}
        tables = {method: self.score(method) for method in SCORES}
        tables["inverted"] = inverted(tables["hawq-v2"])
        plans = {name: self.plan(table) for name, table in tables.items()}
        result["plans"] = {"uniform": self.realised(4)} | {name: self.realised(plan) for name, plan in plans.items()}
        result["random"] = [self.realised(self.plan(self.score("random", seed))) for seed in range(10)]
        self.report("plans", result["plans"])
        result["ranking"] = self.ranking(tables, plain, fp32[0])
        self.report("ranking", result["ranking"])
        result["stages"] = {"uniform": self.stages(plan=4), "plan": self.stages(budget=BUDGET)}
        self.report("stages", result["stages"])
        result["budgets"] = self.budgets(tables["pairwise"])
        return result

    def budgets(self, table: SensitivityTable) -> dict[str, Any]:
        """The plans within both accuracies."""
        found = {str(ratio): self.within(ratio, table) for ratio in (0.99, 0.999)}
        self.report("budgets", found)
        return found

    @staticmethod
    def plan(table: SensitivityTable) -> BitPlan:
        """The table's optimum."""
        return allocate_bits(table, budget=BUDGET)

    def ranking(self, tables: dict[str, SensitivityTable], plain: nn.Module, fp32: float) -> dict[str, float]:
        """Correlation of predicted with measured losses over the layers that can take 2 bits."""
        layers = [name for name, layer in quantized_layers(plain).items() if 2 in layer.bits]
        measured = []
        for name in layers:
            plan = BitPlan(dict.fromkeys(quantized_layers(plain), 32)).edit({name: 2})
            calibrate_scales_(plain, self.calibration, plan)
            measured.append(evaluate_plan(plain, plan, self.test)[0] - fp32)
        return {
            method: float(spearmanr([table.layers[name].losses[2] for name in layers], measured).statistic)
            for method, table in tables.items()
        }

    def stages(self, **arguments: Any) -> dict[str, float]:
        """Accuracy in percent after each stage."""
        report = post_training_quantize(
            self.converted(),
            self.calibration,
            evaluation=self.test,
            num_steps=self.options.steps,
            seed=self.seed,
            **arguments,
        )
        return {name: 100 * stage.accuracy for name, stage in report.stages.items()}

    def within(self, ratio: float, table: SensitivityTable) -> dict[str, float]:
        """The plan within an accuracy, as measured on the deciding half and on the other."""
        deciding, other = self.many[: len(self.many) // 2], self.many[len(self.many) // 2 :]
        model = self.converted()
        result = plan_within_accuracy(
            model, table, self.calibration, ratio=ratio, bits=(32, *BITS), evaluation=deciding, confidence=CONFIDENCE
        )
        calibrate_scales_(model, self.calibration, result.plan)
        held_out = evaluate_plan(model, result.plan, other)[1] / evaluate_plan(self.converted(), 32, other)[1]
        weights = {name: layer.weight.numel() for name, layer in quantized_layers(model).items()}
        bits = sum(weights[name] * b for name, b in result.plan.items()) / sum(weights.values())
        return {
            "bits": bits,
            "decided": result.metric / result.baseline,
            "held_out": held_out,
            "evaluations": result.evaluations,
        }

    def report(self, what: str, value: Any) -> None:
        """Say what is done."""
        print(f"{self.name} seed {self.seed} {what}: {value}", flush=True)


def take(loader: Any, count: int) -> Batches:
    """The first ``count`` samples in batches of 128."""
    images, labels, seen = [], [], 0
    for batch in loader:
        images.append(batch[0])
        labels.append(batch[1])
        seen += len(batch[0])
        if seen >= count:
            break
    return list(zip(torch.cat(images)[:count].split(128), torch.cat(labels)[:count].split(128), strict=True))


def verdicts(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the runs say of the claims."""
    better = {score: 0 for score in SCORES}
    worst = cheap = 0
    met = {"0.99": 0, "0.999": 0}
    rises = {"adaquant": 0, "biases": 0}
    for run in runs.values():
        randoms = statistics.fmean(accuracy for _, accuracy in run["random"])
        for score in SCORES:
            better[score] += run["plans"][score][1] > randoms
        worst += run["plans"]["inverted"][1] <= min(run["plans"][score][1] for score in SCORES)
        stages = run["stages"]["uniform"]
        for stage in rises:
            rises[stage] += stages[stage] > stages["naive"]
        for ratio, budget in run["budgets"].items():
            met[ratio] += budget["held_out"] >= float(ratio)
        most = 1 + 3 * (math.ceil(math.log2(run["layers"])) + 2)
        cheap += all(budget["evaluations"] <= most for budget in run["budgets"].values())
    total = len(runs)
    return {
        "E6, each score's plan beats the mean of ten random ones": ", ".join(
            f"{score} in {count} of {total}" for score, count in better.items()
        ),
        "E6, the inverted order is worst": f"in {worst} of {total}",
        "E7, stages beat naive rounding at 4 bits": ", ".join(f"{s} in {n} of {total}" for s, n in rises.items()),
        "E8, the target is met on the held-out half": ", ".join(
            f"{100 * float(ratio):g} % in {count} of {total}" for ratio, count in met.items()
        ),
        "E8, evaluations within the bound": f"in {cheap} of {total}",
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    lines = []
    for net in NETS:
        runs = [run for key, run in report["runs"].items() if key.startswith(net)]
        if len(runs) < 2:
            continue

        def cell(values: list[float], digits: int = 1) -> str:
            return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

        lines += [f"**{net}**, fp32 {cell([run['fp32'][1] for run in runs])} %, at most 4 bits a weight:", ""]
        lines += ["| plan by | accuracy, % | loss | Spearman with the measured loss |", "| --- | --- | --- | --- |"]
        rows = {"uniform 4 bits": [run["plans"]["uniform"] for run in runs]}
        rows |= {score: [run["plans"][score] for run in runs] for score in (*SCORES, "inverted")}
        rows["random, mean of ten"] = [
            [statistics.fmean(loss for loss, _ in run["random"]), statistics.fmean(a for _, a in run["random"])]
            for run in runs
        ]
        for name, values in rows.items():
            ranks = [run["ranking"][name] for run in runs if name in run["ranking"]]
            rank = cell(ranks, 2) if ranks else ""
            lines.append(
                f"| {name} | {cell([a for _, a in values])} | {cell([loss for loss, _ in values], 2)} | {rank} |"
            )
        lines += ["", "| stage, 4 bits for weights and activations | accuracy, % |", "| --- | --- |"]
        for kind, words in {"uniform": "", "plan": " (plan)"}.items():
            for stage in runs[0]["stages"][kind]:
                lines.append(f"| {stage}{words} | {cell([run['stages'][kind][stage] for run in runs])} |")
        lines += ["", "| accuracy budget | bits | left on the deciding half | on the other half | evaluations |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for ratio in runs[0]["budgets"]:
            found = [run["budgets"][ratio] for run in runs]
            lines.append(
                f"| {100 * float(ratio):g} % | {cell([b['bits'] for b in found], 2)} | "
                f"{cell([100 * b['decided'] for b in found], 2)} % | "
                f"{cell([100 * b['held_out'] for b in found], 2)} % | "
                f"{max(b['evaluations'] for b in found)} at most |"
            )
        lines.append("")
    lines += ["| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in report["verdicts"].items()]
    lines += ["", f"*{report['setting']}; {report['date'][:10]}; {report['machine']}.*"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all nets and seeds, print the verdicts, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-share", type=float, default=0.1, help="share of the training images that is used")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=192, help="training images without labels of their own")
    parser.add_argument("--test-images", type=int, default=1024)
    parser.add_argument("--budget-images", type=int, default=6000, help="test images for the accuracy budgets")
    parser.add_argument("--steps", type=int, default=60, help="of AdaQuant, for each layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; runs that it holds are kept")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    skip = ("seeds", "nets", "json", "markdown", "root")
    settings = {name: value for name, value in vars(options).items() if name not in skip}
    runs: dict[str, Any] = {}
    for net in options.nets:
        for seed in options.seeds:
            # Another process may have added to the file; what was finished under the same options is kept.
            if options.json and options.json.exists():
                old = json.loads(options.json.read_text())
                if old["options"] == settings:
                    runs = old["runs"] | runs
            if (key := f"{net}-{seed}") not in runs:
                runs[key] = Study(net, seed, options).run()
                write(options, settings, runs)
    for claim, verdict in write(options, settings, runs)["verdicts"].items():
        print(f"{claim}: {verdict}")


def write(options: argparse.Namespace, settings: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """Write the files with all runs that are done, and return what is in the JSON."""
    if options.json and options.json.exists() and (old := json.loads(options.json.read_text()))["options"] == settings:
        runs = dict(sorted((old["runs"] | runs).items()))
    report = {
        "setting": f"{round(60_000 * options.train_share):,} training images, {options.epochs} epochs; "
        f"{options.calibration} calibration images; {options.test_images:,} test images, "
        f"{options.budget_images:,} for the accuracy budgets; mean ± standard deviation "
        "over the seeds",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} CPU, {options.threads} thread{'s' if options.threads > 1 else ''}, torch "
        f"{torch.__version__}, lightning-plugins {importlib.metadata.version('lightning-plugins')}",
        "verdicts": verdicts(runs),
        "options": settings,
        "runs": runs,
    }
    for path, text in {
        options.json: json.dumps(report, indent=2) + "\n",
        options.markdown: markdown(report),
    }.items():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return report


if __name__ == "__main__":
    main()
