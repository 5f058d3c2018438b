r"""Claims of Double Rounding, re-measured on Fashion-MNIST with ResNet-20 at {8, 6, 4, 2} bits.

    python benchmarks/claims/double_rounding.py --json benchmarks/results/double_rounding.json \
        --markdown docs/results/double_rounding.md

(Huang et al., "Nearly Lossless Adaptive Bit Switching", 2025.) For each seed an fp32 net is trained, and every
contender starts from it, sees the same batches in the same order, and is evaluated once on all 10,000 test images:

* ``fp32``: trained on for as long, unquantized;
* ``separate``: four nets, one for each precision (learned step size quantization);
* ``accumulate``: one net, one step for the sum of the four losses;
* ``sequential``: one net, a step at each precision, with each rule for the scales' learning rate;
* ``distilled``: sequential ``eta`` with progressive self-distillation;
* ``floor``: sequential ``eta`` where the second rounding is a shift;
* ``post hoc``: the separate 8-bit net, its codes shifted to the lower precisions without training.

Claims. E1: a net read from its packed file gives the same logits, bit for bit, switched 8, 4, 8, 2. E2: joint training
costs at most 0.5 points against separate nets at 8, 6, 4 bits and 1.5 at 2; it beats floor at 2 bits; post hoc
collapses there. E3: ``eta`` beats ``none`` at 2 bits by more than two standard errors of the paired difference, and
loses nothing at 8. E4: distillation does not hurt at 2 bits. Each verdict is computed from the paired differences.

On a CPU this is a small study: width 8, a part of the training images, few epochs. ``--width 16 --train-share 1.0
--epochs 30`` on a GPU is the published setting's size.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import platform
import statistics
import tempfile
import warnings
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_plugins.callbacks import MultiPrecisionQAT
from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.models import resnet20
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import convert_, load_packed, quantizers, save_packed, switch_

BITS = (8, 6, 4, 2)
RULES = ("eta", "released", "paper", "relative", "none", "frozen")


def classifier(options: argparse.Namespace, data: FashionMNISTDataModule, epochs: int, lr: float) -> ImageClassifier:
    """A fresh module; Adam and a cosine, as in the paper."""
    return ImageClassifier(
        resnet20(in_channels=1, width=options.width),
        num_classes=10,
        mean=data.mean,
        std=data.std,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, weight_decay=5e-5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
    )


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    """A quiet Trainer that leaves no files."""
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


class Study:
    """One seed: the fp32 net, and every contender that starts from it."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.options, self.seed = options, seed
        pl.seed_everything(seed, verbose=False)
        self.data = self.make_data()
        self.start = classifier(options, self.data, options.pretrain_epochs, 2e-3)
        trainer(options.pretrain_epochs).fit(self.start, self.data)

    def make_data(self, **arguments: Any) -> FashionMNISTDataModule:
        """Only a share of the training images is trained on; the rest, held out, is left alone."""
        return FashionMNISTDataModule(
            root=self.options.root,
            batch_size=self.options.batch_size,
            val_fraction=1 - self.options.train_share,
            seed=self.seed,
            **arguments,
        )

    def train(self, *callbacks: pl.Callback, **data_arguments: Any) -> tuple[ImageClassifier, dict[str, float]]:
        """Train a copy of the fp32 net on and return it with its test metrics."""
        pl.seed_everything(self.seed, verbose=False)
        data = self.make_data(**data_arguments)
        module = classifier(self.options, data, self.options.epochs, 5e-4)
        module.load_state_dict(self.start.state_dict())
        run = trainer(self.options.epochs, *callbacks)
        run.fit(module, data)
        (metrics,) = run.test(module, data, verbose=False)
        return module, metrics

    def accuracies(self, metrics: dict[str, float]) -> dict[int, float]:
        """Percent by bits."""
        return {b: 100 * metrics[f"test/acc_{b}bit"] for b in BITS if f"test/acc_{b}bit" in metrics}

    def run(self) -> dict[str, dict[int, float]]:
        """Train and evaluate all contenders."""
        table: dict[str, dict[int, float]] = {"fp32": {32: 100 * self.train()[1]["test/acc"]}}
        self.report("fp32", table)
        separate: dict[int, float] = {}
        for b in BITS:
            module, metrics = self.train(MultiPrecisionQAT((b,)))
            separate |= self.accuracies(metrics)
            if b == 8:
                table["post hoc"] = self.post_hoc(module)
        table["separate"] = separate
        self.report("separate", table)
        self.report("post hoc", table)
        for alrs in ("eta", "frozen"):
            name = f"accumulate, {alrs}"
            table[name] = self.accuracies(self.train(MultiPrecisionQAT(BITS, stepping="accumulate", alrs=alrs))[1])
            self.report(name, table)
        for alrs in RULES:
            name = f"sequential, {alrs}"
            module, metrics = self.train(MultiPrecisionQAT(BITS, stepping="sequential", alrs=alrs))
            table[name] = self.accuracies(metrics)
            self.report(name, table)
            if alrs == "eta":
                self.packed_equals_trained(module)
        callback = MultiPrecisionQAT(BITS, stepping="sequential", self_distillation=0.7)
        table["sequential, eta, distilled"] = self.accuracies(self.train(callback, with_index=True)[1])
        self.report("sequential, eta, distilled", table)
        rounding, quantizers._round_twice = quantizers._round_twice, shift_down
        try:
            callback = MultiPrecisionQAT(BITS, stepping="sequential")
            table["sequential, eta, floor"] = self.accuracies(self.train(callback)[1])
        finally:
            quantizers._round_twice = rounding
        self.report("sequential, eta, floor", table)
        return table

    def report(self, name: str, table: dict[str, dict[int, float]]) -> None:
        """Show progress."""
        print(f"seed {self.seed}  {name:28}", "  ".join(f"{b}: {v:.2f}" for b, v in table[name].items()), flush=True)

    def post_hoc(self, trained: ImageClassifier) -> dict[int, float]:
        """Evaluate the lower precisions of a net that was trained at 8 bits alone."""
        pl.seed_everything(self.seed, verbose=False)
        net = convert_(resnet20(in_channels=1, width=self.options.width), BITS)
        source, target = trained.model.state_dict(), net.state_dict()
        for name in target:
            if name in source and "ready" not in name:
                target[name] = source[name]
            for b in BITS[1:]:
                if f"norms.{b}." in name:
                    target[name] = source[name.replace(f"norms.{b}.", "norms.8.")]
                elif name.endswith(f"scales.{b}"):  # the same range in fewer steps
                    target[name] = source[name.removesuffix(str(b)) + "8"] * 2.0 ** (8 - b)
            if name.endswith("ready"):
                target[name] = torch.ones_like(target[name])
        net.load_state_dict(target)
        module = deepcopy(trained)
        module.model = net
        metrics = trainer(1, MultiPrecisionQAT(BITS)).test(module, self.make_data(), verbose=False)[0]
        return self.accuracies(metrics)

    def packed_equals_trained(self, module: ImageClassifier) -> None:
        """E1: raise if the packed file gives any other logits."""
        images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        module.eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = save_packed(module.model, Path(folder) / "net.safetensors")
            with torch.device("meta"):
                empty = resnet20(in_channels=1, width=self.options.width)
            loaded = load_packed(path, empty)
            for b in (8, 4, 8, 2):
                if not torch.equal(switch_(loaded, b)(images), switch_(module.model, b)(images)):
                    raise RuntimeError(f"E1 fails: other logits at {b} bits from the packed file")


def shift_down(u: Tensor, bits: int, high_bits: int, *, signed: bool) -> Tensor:
    """The rounding of quantizers that only shift: the second one is a floor."""
    u.round_().clamp_(*quantizers.code_range(high_bits, signed=signed))
    if bits < high_bits:
        u.mul_(2.0 ** (bits - high_bits)).floor_().clamp_(*quantizers.code_range(bits, signed=signed))
    return u


def paired(tables: list[dict[str, dict[int, float]]], first: str, second: str, bits: int) -> tuple[float, float]:
    """Return mean and standard error of the difference over seeds, in points."""
    differences = [table[first][bits] - table[second][bits] for table in tables]
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), spread / math.sqrt(len(differences))


def verdicts(tables: list[dict[str, dict[int, float]]]) -> dict[str, str]:
    """Say of each claim whether it held, with its figures."""

    def compare(first: str, second: str, bits: int) -> str:
        mean, error = paired(tables, first, second, bits)
        return f"{mean:+.2f} ± {error:.2f} at {bits} bits"

    eta = "sequential, eta"
    gaps = {b: paired(tables, eta, "separate", b)[0] for b in BITS}
    near = all(gaps[b] >= (-1.5 if b == 2 else -0.5) for b in BITS)
    floor = paired(tables, eta, "sequential, eta, floor", 2)
    gain, error = paired(tables, eta, "sequential, none", 2)
    loss = paired(tables, eta, "sequential, none", 8)
    frozen = paired(tables, eta, "sequential, frozen", 2)
    distilled = paired(tables, "sequential, eta, distilled", eta, 2)
    post_hoc = statistics.fmean(table["post hoc"][2] for table in tables)

    def said(holds: bool) -> str:
        return "holds" if holds else "does not hold"

    return {
        "E1, packed file gives the same logits": "holds, bit for bit, for every seed",
        "E2, joint near separate": f"{said(near)}: " + ", ".join(compare(eta, "separate", b) for b in BITS),
        "E2, rounding beats floor at 2 bits": f"{said(floor[0] > 2 * floor[1])}: "
        + compare(eta, "sequential, eta, floor", 2),
        "E2, post hoc collapses at 2 bits": f"{said(post_hoc < 50)}: {post_hoc:.1f} % right",
        "E3, eta beats none at 2 bits and loses nothing at 8": f"{said(gain > 2 * error and loss[0] > -2 * loss[1])}: "
        + f"{compare(eta, 'sequential, none', 2)}, {compare(eta, 'sequential, none', 8)}",
        "E3, eta beats frozen scales at 2 bits": f"{said(frozen[0] > 2 * frozen[1])}: "
        + compare(eta, "sequential, frozen", 2),
        "E4, distillation does not hurt at 2 bits": f"{said(distilled[0] > -2 * distilled[1])}: "
        + compare("sequential, eta, distilled", eta, 2),
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    tables = list(report["seeds"].values())
    lines = ["| training | 8 bits | 6 bits | 4 bits | 2 bits |", "| --- | --- | --- | --- | --- |"]
    for name in tables[0]:
        if name != "fp32":
            cells = []
            for b in map(str, BITS):
                values = [table[name][b] for table in tables]
                cells.append(f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    fp32 = [table["fp32"]["32"] for table in tables]
    lines += ["", f"fp32: {statistics.fmean(fp32):.2f} ± {statistics.stdev(fp32):.2f}.", ""]
    lines += ["| claim | verdict, paired differences in points ± standard error |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in report["verdicts"].items()]
    lines += ["", f"*{report['setting']}; {report['date'][:10]}; {report['machine']}.*"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds, print the table and the verdicts, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--train-share", type=float, default=0.07, help="share of the training images that is used")
    parser.add_argument("--pretrain-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; seeds that it holds are kept")
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
        if str(seed) not in done:
            table = Study(seed, options).run()
            done[str(seed)] = {name: {str(b): value for b, value in row.items()} for name, row in table.items()}
            write(options, settings, done)
    report = write(options, settings, done)
    for claim, verdict in report["verdicts"].items():
        print(f"{claim}: {verdict}")


def write(options: argparse.Namespace, settings: dict[str, Any], seeds: dict[str, Any]) -> dict[str, Any]:
    """Write the files with all seeds that are done, and return what is in the JSON."""
    tables = [{name: {int(b): v for b, v in row.items()} for name, row in table.items()} for table in seeds.values()]
    images = round(60_000 * options.train_share)
    gpu = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{platform.machine()} CPU"
    report = {
        "setting": f"ResNet-20 of width {options.width}, {images:,} training images of Fashion-MNIST, "
        f"{options.pretrain_epochs} epochs in fp32, then {options.epochs}; {len(tables)} seeds, mean ± standard "
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
        options.markdown.write_text(markdown(report))
    return report


if __name__ == "__main__":
    main()
