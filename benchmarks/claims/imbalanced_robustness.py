r"""Which objective keeps rare classes robust? Adversarial training on imbalanced Fashion-MNIST.

    python benchmarks/claims/imbalanced_robustness.py --json benchmarks/results/imbalanced_robustness.json \
        --markdown docs/results/imbalanced_robustness.md

A small net (two convolutions, two linear layers, no batch normalisation) is trained for 12 epochs under PGD of 7 steps
in a radius of 0.1, by SGD with learning rate 0.05, divided by 10 at epochs 9 and 11, weight decay 5e-4, batches of 128.
The largest class has 3,000 images; the others fall geometrically (``exp``) or in one step at the half (``step``) by the
ratio. The classes are ordered so that each rare one has a frequent one that it can be taken for. The balanced 10,000
test images are attacked by PGD of 20 steps of 0.01; the tail are the five rarest classes. All objectives of one seed
start from the same weights and see the same batches, so differences within a seed are paired. Sixteen test images of
each class also meet APGD-T, which alone nearly equals AutoAttack.

Claims, on ``exp`` at ratio 100. (i) Plain adversarial training leaves the tail at 18 to 32 % under attack. (ii) The
best of deferred reweighting, LDAM-DRW and AT-BSL gains at least 18 points there. (iii) AT-BSL gains at least 8 points
of clean accuracy. (iv) PGD overestimates robustness against APGD-T by less than 4 points. SRAT: its separating term
gains over deferred reweighting alone (the paper's claim). That training under a radius of 0 is plain training is a test
of the suite, tests/robustness/test_training_callbacks.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.data import FashionMNISTDataModule, make_imbalanced
from lightning_plugins.robustness import (
    LDAM,
    PGDAT,
    REAT,
    SRAT,
    TAET,
    BalancedSoftmax,
    ClassBalanced,
    Objective,
    apgd,
    pgd,
)

ORDER = (1, 0, 4, 7, 8, 3, 5, 9, 2, 6)
EPS, EPOCHS, BATCH = 0.1, 12, 128
DEFERRED = 9 / EPOCHS
FEATURES = "4"  # the layer before the last ReLU

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "CE (PGD-AT)": PGDAT,
    "class-balanced": lambda: ClassBalanced(0.9999),
    "deferred (DRCB)": lambda: ClassBalanced(0.9999, start=DEFERRED),
    "LDAM-DRW": lambda: LDAM(5.0, start=DEFERRED),
    "AT-BSL": BalancedSoftmax,
    "SRAT 0.3, 0.1": lambda: SRAT(separation=0.3, temperature=0.1, start=DEFERRED, features_from=FEATURES),
    "REAT, as released": lambda: REAT("official"),
    "REAT, pairwise": lambda: REAT("pairwise"),
    "TAET": TAET,
    "SRAT 0.1, 0.1": lambda: SRAT(separation=0.1, temperature=0.1, start=DEFERRED, features_from=FEATURES),
    "SRAT 1, 0.1": lambda: SRAT(separation=1.0, temperature=0.1, start=DEFERRED, features_from=FEATURES),
    "SRAT 0.3, 0.5": lambda: SRAT(separation=0.3, temperature=0.5, start=DEFERRED, features_from=FEATURES),
    "SRAT 0.3, 0.1, focal": lambda: SRAT(
        "focal", separation=0.3, temperature=0.1, start=DEFERRED, features_from=FEATURES
    ),
    "SRAT 0.3, 0.1, LDAM": lambda: SRAT(
        "ldam", separation=0.3, temperature=0.1, start=DEFERRED, features_from=FEATURES, max_margin=5.0
    ),
}
SETTINGS = {"exp-100": ("exp", 100), "step-100": ("step", 100), "exp-10": ("exp", 10), "step-10": ("step", 10)}


def network() -> nn.Sequential:
    """The net of the study: 106 thousand weights."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        nn.Flatten(),
        nn.Identity(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def load(root: str) -> dict[str, tuple[Tensor, Tensor]]:
    """All training and test images in [0, 1], with their labels."""
    data = FashionMNISTDataModule(root=root, batch_size=1000, val_fraction=0.0, augmentation=False)
    data.setup("fit")
    data.setup("test")
    sets = {}
    for name, loader in {"train": data.train_dataloader(), "test": data.test_dataloader()}.items():
        batches = [batch[:2] for batch in loader]
        sets[name] = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return sets


def train(images: Tensor, labels: Tensor, objective: Objective, seed: int) -> nn.Module:
    """Train under attack, as the module docstring says."""
    torch.manual_seed(seed)
    net = network()
    if objective.needs_counts:
        objective.set_class_counts(labels.bincount(minlength=10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9, 11])
    order = torch.Generator().manual_seed(1000 + seed)
    attack = torch.Generator().manual_seed(2000 + seed)
    starts = range(0, len(labels) - BATCH + 1, BATCH)
    for epoch in range(EPOCHS):
        permutation = torch.randperm(len(labels), generator=order)
        for number, start in enumerate(starts):
            index = permutation[start : start + BATCH]
            x, y = images[index], labels[index]
            objective.set_progress((epoch + number / len(starts)) / EPOCHS)
            attacked = pgd(
                net, x, y, eps=EPS, step_size=0.025, num_steps=7, start=objective.attack_start, generator=attack
            ).adversarial
            optimizer.zero_grad()
            objective(net, x, attacked, y).backward()
            optimizer.step()
        scheduler.step()
    return net.eval()


def evaluate(net: nn.Module, images: Tensor, labels: Tensor, tail: list[int]) -> dict[str, Any]:
    """Accuracies in percent; robust is right without the attack and under it."""
    clean, robust = [], []
    generator = torch.Generator().manual_seed(0)
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        with torch.no_grad():
            right = net(x).argmax(1) == y
        clean.append(right)
        attacked = pgd(net, x, y, eps=EPS, step_size=0.01, num_steps=20, generator=generator)
        robust.append(right & ~attacked.success)
    per_class = {
        name: torch.stack([100 * torch.cat(rights)[labels == c].float().mean() for c in range(10)])
        for name, rights in {"clean": clean, "robust": robust}.items()
    }
    few = torch.cat([(labels == c).nonzero().flatten()[:16] for c in range(10)])
    x, y = images[few], labels[few]
    by_pgd = torch.cat(robust)[few].float().mean()
    by_apgd = 1 - apgd(net, x, y, eps=EPS, loss="dlr_targeted", num_steps=50).success.float().mean()
    return {
        "clean": float(per_class["clean"].mean()),
        "clean_tail": float(per_class["clean"][tail].mean()),
        "robust": float(per_class["robust"].mean()),
        "robust_tail": float(per_class["robust"][tail].mean()),
        "robust_worst": float(per_class["robust"].min()),
        "few_pgd": 100 * float(by_pgd),
        "few_apgd_t": 100 * float(by_apgd),
    }


def values(runs: dict[str, Any], setting: str, objective: str, key: str) -> list[float]:
    """One figure for each finished seed."""
    return [run[key] for name, run in runs.items() if name.startswith(f"{setting}|{objective}|")]


def verdicts(runs: dict[str, Any]) -> dict[str, str]:
    """What the runs say of the claims; only seeds that have what a claim compares count."""
    mean = {
        (objective, key): statistics.fmean(found)
        for objective in OBJECTIVES
        for key in ("clean", "robust_tail", "few_pgd", "few_apgd_t")
        if (found := values(runs, "exp-100", objective, key))
    }
    result = {}

    def say(claim: str, holds: bool, words: str) -> None:
        result[claim] = f"{'holds' if holds else 'does not hold'}: {words}"

    plain, bsl = "CE (PGD-AT)", "AT-BSL"
    if (plain, "clean") in mean:
        tail = mean[plain, "robust_tail"]
        say("(i) plain adversarial training leaves the tail at 18 to 32 %", 18 <= tail <= 32, f"{tail:.1f} %")
        three = {name: mean.get((name, "robust_tail")) for name in ("deferred (DRCB)", "LDAM-DRW", bsl)}
        known = {name: value for name, value in three.items() if value is not None}
        if len(known) == 3:
            best = max(known, key=lambda name: known[name])
            gain = known[best] - tail
            say("(ii) the best reweighting gains 18 points in the tail", gain >= 18, f"{best}, {gain:+.1f} points")
        if (bsl, "clean") in mean:
            gain = mean[bsl, "clean"] - mean[plain, "clean"]
            say("(iii) AT-BSL gains 8 points of clean accuracy", gain >= 8, f"{gain:+.1f} points")
    gaps = [mean[name, "few_pgd"] - mean[name, "few_apgd_t"] for name in OBJECTIVES if (name, "few_pgd") in mean]
    if gaps:
        words = f"{min(gaps):.1f} to {max(gaps):.1f} points, on 160 images"
        say("(iv) PGD is above APGD-T by less than 4 points", min(gaps) > -0.01 and max(gaps) < 4, words)
    for setting in SETTINGS:
        reached = {
            name: statistics.fmean(found)
            for name in OBJECTIVES
            if (found := values(runs, setting, name, "robust_tail"))
        }
        if plain in reached and len(reached) > 2 and setting != "exp-100":
            best = max(reached, key=lambda name: reached[name])
            gain = reached[best] - reached[plain]
            say(f"{setting}: reweighting gains in the tail", best != plain, f"{best} most, {gain:+.1f} points")
        drcb = values(runs, setting, "deferred (DRCB)", "robust_tail")
        for name in OBJECTIVES:
            srat = values(runs, setting, name, "robust_tail")
            if name.startswith("SRAT") and len(srat) == len(drcb) > 1:
                gains = [a - b for a, b in zip(srat, drcb, strict=True)]
                words = f"{statistics.fmean(gains):+.1f} ± {statistics.stdev(gains):.1f} points in the tail"
                holds = statistics.fmean(gains) > statistics.stdev(gains)
                say(f"{setting}: {name} gains over deferred reweighting", holds, words)
    return result


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    runs, lines = report["runs"], []
    keys = ("clean", "clean_tail", "robust", "robust_tail", "robust_worst")
    for setting in SETTINGS:
        done = [name for name in OBJECTIVES if len(values(runs, setting, name, "clean")) > 1]
        if not done:
            continue
        seeds = min(len(values(runs, setting, name, "clean")) for name in done)
        lines += [f"**{setting}**, accuracy in percent, mean and deviation over {seeds} seeds or more:", ""]
        lines += ["| objective | clean | clean, tail | PGD-20 | PGD-20, tail | PGD-20, worst class |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for name in done:
            cells = []
            for key in keys:
                found = values(runs, setting, name, key)
                cells.append(f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in report["verdicts"].items()]
    lines += ["", "*SRAT: weight of the separating term, temperature, loss on the logits if it is not cross-entropy. "]
    lines[-1] += f"{report['setting']}; {report['date'][:10]}; {report['machine']}.*"
    return "\n".join(lines) + "\n"


def write(options: argparse.Namespace, runs: dict[str, Any]) -> dict[str, Any]:
    """Write the files with all runs that are done, and return what is in the JSON."""
    if options.json and options.json.exists():
        runs = json.loads(options.json.read_text())["runs"] | runs
    packages = ("lightning-plugins", "torch")
    report = {
        "verdicts": verdicts(runs),
        "runs": runs,
        "setting": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, one thread",
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(report))
    return report


def main() -> None:
    """Run what is missing, print the verdicts, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write the numbers to; runs that it holds are kept")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = load(options.root)
    runs: dict[str, Any] = {}
    if options.json and options.json.exists():
        runs = json.loads(options.json.read_text())["runs"]
    for setting in options.settings:
        kind, ratio = SETTINGS[setting]
        for name in options.objectives:
            for seed in options.seeds:
                key = f"{setting}|{name}|{seed}"
                if key in runs:
                    continue
                images, labels = sets["train"]
                kept = make_imbalanced(labels, kind, ratio, max_per_class=3000, class_order=ORDER, seed=seed)
                start = time.monotonic()
                net = train(images[kept], labels[kept], OBJECTIVES[name](), seed)
                runs[key] = evaluate(net, *sets["test"], tail=list(ORDER[5:]))
                runs[key]["seconds"] = round(time.monotonic() - start)
                print(key, runs[key], flush=True)
                write(options, runs)
    for claim, verdict in write(options, runs)["verdicts"].items():
        print(f"{claim}: {verdict}")


if __name__ == "__main__":
    main()
