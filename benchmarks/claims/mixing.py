r"""Training on mixtures, and losses, against calibration afterwards: four experiments on Fashion-MNIST.

    python benchmarks/claims/mixing.py --experiments E1 E2 E4 E8 --seeds 3 \
        --json benchmarks/results/mixing.json --markdown docs/results/mixing.md

A small net (convolutions of 16 and 32 channels with pooling, a layer of 128, 207k parameters), Adam at 1e-3, batches of
100, 5,000 training images held out for temperature (TS) and vector scaling (VS), the 10,000 test images for measuring.
Where labels are noisy, training, held-out and test labels come from one distribution. Mixup has alpha 1; K=3 mixes
three samples. Arms of a seed start from the same weights.

E1, classes that overlap (1 and 3, 7 and 9 swap labels with probability 1/2; six classes are clean); 5,000 images, 60
epochs. (i) TS brings the ECE of plain training from above 20 % to below 6 %, and that of the overlapping classes stays
above 12 %. (ii) K=3 without any calibration has a lower NLL than plain training with TS. (iii) The NLL after VS falls
from plain training to mixup to K=3.

E2, noise in all classes (a fixed other class with probability 0.3); 5,000 images, 60 epochs. (i) TS halves the NLL of
plain training at least. (ii) The lowest NLL of all is one of K=3.

E4, clean labels, 10,000 images, 15 epochs: plain, mixup, mixup up to 60 % of the epochs, FMix. (i) Mixup and FMix lower
the NLL before TS. (ii) TS shrinks the differences in NLL.

E8, clean labels, 4,000 images, 30 epochs: losses. (i) Focal (gamma 3), FLSD-53, dual focal (gamma 2) and MMCE
(strength 2) have a lower ECE than cross-entropy before TS. (ii) After TS their ECE is within 1 percentage point of it.

Images and epochs are what three seeds of all four can do in 45 minutes of one core; --train and --epochs set others. A
criterion holds if it does for every seed. Runs that are in the JSON file are not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.calibration import (
    DualFocalLoss,
    FLSD53Loss,
    FocalLoss,
    MMCELoss,
    TemperatureScaling,
    VectorScaling,
    brier,
    ece,
    group_ece,
    l1_to_posterior,
)
from lightning_plugins.data import FashionMNISTDataModule, class_overlap
from lightning_plugins.mixing import fmix, mixup

BATCH, CLASSES = 100, 10
PAIRS = ((1, 3), (7, 9))
NOISE = 0.3
Loss = Callable[[Tensor, Tensor], Tensor]
Mix = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Arm:
    """One way of training: a loss, and a mixing of batches up to a share of the epochs."""

    loss: Callable[[], Loss] = nn.CrossEntropyLoss
    mix: Mix | None = None
    until: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """Arms on one kind of labels."""

    title: str
    arms: dict[str, Arm]
    labels: str
    num_train: int
    epochs: int


MIXUP, THREE = Arm(mix=mixup), Arm(mix=partial(mixup, num_points=3))
EXPERIMENTS = {
    "E1": Experiment(
        "classes that overlap", {"plain": Arm(), "mixup": MIXUP, "K=3": THREE}, "overlap", num_train=5000, epochs=60
    ),
    "E2": Experiment(
        "noise in all classes", {"plain": Arm(), "mixup": MIXUP, "K=3": THREE}, "noise", num_train=5000, epochs=60
    ),
    "E4": Experiment(
        "mixing on clean labels",
        {"plain": Arm(), "mixup": MIXUP, "mixup, stopped": Arm(mix=mixup, until=0.6), "FMix": Arm(mix=fmix)},
        "clean",
        num_train=10_000,
        epochs=15,
    ),
    "E8": Experiment(
        "losses",
        {
            "cross-entropy": Arm(),
            "focal": Arm(partial(FocalLoss, 3.0)),
            "FLSD-53": Arm(FLSD53Loss),
            "dual focal": Arm(partial(DualFocalLoss, 2.0)),
            "MMCE": Arm(partial(MMCELoss, 2.0)),
        },
        "clean",
        num_train=4000,
        epochs=30,
    ),
}
MAPS = ("none", "TS", "VS")
SCALE = {"nll": 1, "ece": 100, "brier": 1, "accuracy": 100, "l1": 1, "ece_overlap": 100, "ece_clean": 100}
TITLES = {
    "nll": "NLL, nats",
    "ece": "ECE, %",
    "brier": "Brier",
    "accuracy": "accuracy, %",
    "l1": "L1 to posterior",
    "ece_overlap": "ECE overlapping, %",
    "ece_clean": "ECE clean, %",
}


def network() -> nn.Sequential:
    """Return the net, of 206,922 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def relabelled(targets: Tensor, kind: str, seed: int, split: int) -> tuple[Tensor, Tensor]:
    """Return drawn labels and the true posterior ``(N, C)``; the map of the noise is that of the seed alone."""
    posterior = F.one_hot(targets, CLASSES).double()
    draws = torch.Generator().manual_seed(10 * seed + split)
    if kind == "overlap":
        targets_of_pair = class_overlap(targets, PAIRS, seed=10 * seed + split)
        both = class_overlap(targets, PAIRS, probability=1.0)
        return targets_of_pair, (posterior + F.one_hot(both, CLASSES)) / 2
    if kind == "noise":
        shift = torch.randint(1, CLASSES, (CLASSES,), generator=torch.Generator().manual_seed(seed))
        other = (torch.arange(CLASSES) + shift) % CLASSES
        flipped = torch.rand(len(targets), generator=draws) < NOISE
        wrong = other[targets]
        return torch.where(flipped, wrong, targets), (1 - NOISE) * posterior + NOISE * F.one_hot(wrong, CLASSES)
    return targets, posterior


def train(arm: Arm, images: Tensor, labels: Tensor, epochs: int, seed: int, device: torch.device) -> nn.Module:
    """Train a net from the seed's first weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    net = net.to(device).train()
    loss_fn, optimizer = arm.loss(), torch.optim.Adam(net.parameters(), lr=1e-3)
    order, shares = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    images, labels = images.to(device), labels.to(device)
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(BATCH):
            inputs, targets = images[rows.to(device)], labels[rows.to(device)]
            if arm.mix is not None and epoch < round(arm.until * epochs):
                inputs, targets = arm.mix(inputs, targets, num_classes=CLASSES, alpha=1.0, generator=shares)
            loss = loss_fn(net(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return logits in float64, on the CPU."""
    return torch.cat([net(part.to(device)).cpu() for part in images.split(1000)]).double()


def measure(logits: Tensor, labels: Tensor, posterior: Tensor, groups: Tensor | None) -> dict[str, float]:
    """Return all measures of logits or log-probabilities."""
    values = {
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": ece(logits, labels, input="logits").item(),
        "brier": brier(logits, labels, input="logits").item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "l1": l1_to_posterior(logits, posterior, input="logits").item(),
    }
    if groups is not None:
        clean, overlap = group_ece(logits, labels, groups, reduction="none", num_groups=2, input="logits").tolist()
        values |= {"ece_overlap": overlap, "ece_clean": clean}
    return {name: SCALE[name] * value for name, value in values.items()}


def run(experiment: Experiment, arm: str, seed: int, data: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Train one arm with one seed and measure it without calibration, with TS and with VS."""
    start = time.perf_counter()
    num_train = settings["train"] or experiment.num_train
    epochs = settings["epochs"] or experiment.epochs
    device = data["device"]
    images, targets = data["train"]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    held_out, chosen = order[: settings["held_out"]], order[settings["held_out"] :][:num_train]
    labels, _ = relabelled(targets, experiment.labels, seed, split=0)
    test_images, clean = (part[: settings["test"]] for part in data["test"])
    test_labels, posterior = relabelled(clean, experiment.labels, seed, split=1)
    groups = torch.isin(clean, torch.tensor(PAIRS).flatten()).long() if experiment.labels == "overlap" else None

    mean, std = images[chosen].mean(), images[chosen].std()
    net = train(experiment.arms[arm], (images[chosen] - mean) / std, labels[chosen], epochs, seed, device)
    held = logits_of(net, (images[held_out] - mean) / std, device)
    test = logits_of(net, (test_images - mean) / std, device)
    scaling = TemperatureScaling().fit(held, labels[held_out])
    vector = VectorScaling().fit(held, labels[held_out])
    outputs = {"none": test, "TS": scaling(test), "VS": vector(test)}
    return {
        "temperature": scaling.temperature,
        "seconds": round(time.perf_counter() - start, 1),
        **{name: measure(output, test_labels, posterior, groups) for name, output in outputs.items()},
    }


# Verdicts


Get = Callable[[str, str, str], float]


def criteria(name: str, get: Get) -> dict[str, bool]:
    """Return what must hold for one seed; ``get(arm, map, metric)`` gives a number."""
    if name == "E1":
        return {
            "(i) TS repairs the global ECE of plain training and not that of the overlapping classes": get(
                "plain", "none", "ece"
            )
            > 20
            and get("plain", "TS", "ece") < 6
            and get("plain", "TS", "ece_overlap") > 12,
            "(ii) K=3 without calibration has a lower NLL than plain training with TS": get("K=3", "none", "nll")
            < get("plain", "TS", "nll"),
            "(iii) the NLL after VS falls from plain training to mixup to K=3": get("K=3", "VS", "nll")
            < get("mixup", "VS", "nll")
            < get("plain", "VS", "nll"),
        }
    if name == "E2":
        lowest = {arm: min(get(arm, map, "nll") for map in MAPS) for arm in EXPERIMENTS[name].arms}
        return {
            "(i) TS halves the NLL of plain training at least": get("plain", "none", "nll")
            > 2 * get("plain", "TS", "nll"),
            "(ii) the lowest NLL of all is one of K=3": min(lowest, key=lambda arm: lowest[arm]) == "K=3",
        }
    if name == "E4":
        before, after = ([get(arm, map, "nll") for arm in EXPERIMENTS[name].arms] for map in ("none", "TS"))
        return {
            "(i) mixup and FMix lower the NLL before TS": max(get("mixup", "none", "nll"), get("FMix", "none", "nll"))
            < get("plain", "none", "nll"),
            "(ii) TS shrinks the differences in NLL": max(after) - min(after) < max(before) - min(before),
        }
    others = [arm for arm in EXPERIMENTS[name].arms if arm != "cross-entropy"]
    after_ce = get("cross-entropy", "TS", "ece")
    return {
        "(i) all four losses have a lower ECE than cross-entropy before TS": max(
            get(arm, "none", "ece") for arm in others
        )
        < get("cross-entropy", "none", "ece"),
        "(ii) after TS their ECE is within 1 percentage point of it": max(
            abs(get(arm, "TS", "ece") - after_ce) for arm in others
        )
        <= 1,
    }


def number(runs: dict[str, Any], name: str, seed: int, arm: str, map: str, metric: str) -> float:
    """Return one measured number."""
    return float(runs[f"{name}/{arm}/{seed}"][map][metric])


def complete_seeds(runs: dict[str, Any], name: str) -> list[int]:
    """Return the seeds of which every arm is there."""
    arms = EXPERIMENTS[name].arms
    seeds = {int(key.split("/")[2]) for key in runs if key.startswith(f"{name}/")}
    return sorted(seed for seed in seeds if all(f"{name}/{arm}/{seed}" in runs for arm in arms))


def verdicts(runs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Say in words what held, for each experiment with a complete seed."""
    said: dict[str, dict[str, str]] = {}
    for name in EXPERIMENTS:
        seeds = complete_seeds(runs, name)
        if not seeds:
            continue
        by_seed = [criteria(name, partial(number, runs, name, seed)) for seed in seeds]
        said[name] = {}
        for criterion in by_seed[0]:
            held = sum(outcome[criterion] for outcome in by_seed)
            verdict = "holds" if held == len(seeds) else "does not hold"
            said[name][criterion] = f"{verdict}: {held} of {len(seeds)} seeds"
    return said


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    lines: list[str] = []
    runs = report["runs"]
    for name, experiment in EXPERIMENTS.items():
        seeds = complete_seeds(runs, name)
        if not seeds:
            continue
        metrics = [
            metric for metric in TITLES if metric in runs[f"{name}/{next(iter(experiment.arms))}/{seeds[0]}"]["TS"]
        ]
        num_train = report["settings"]["train"] or experiment.num_train
        epochs = report["settings"]["epochs"] or experiment.epochs
        lines += [
            f"**{name}, {experiment.title}**: {num_train:,} images, {epochs} epochs, {len(seeds)} seeds.",
            "",
            "| arm | T | " + " | ".join(TITLES[metric] for metric in metrics) + " |",
            "| --- |" + " --- |" * (len(metrics) + 1),
        ]
        for arm in experiment.arms:
            of_arm = [runs[f"{name}/{arm}/{seed}"] for seed in seeds]
            for map in MAPS:
                temperature = f"{statistics.fmean(run['temperature'] for run in of_arm):.2f}" if map == "TS" else ""
                cells = [
                    spread([run[map][metric] for run in of_arm], 1 if SCALE[metric] == 100 else 3) for metric in metrics
                ]
                label = arm if map == "none" else f"{arm} + {map}"
                lines.append(f"| {label} | {temperature} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"- {criterion}: **{verdict}**" for criterion, verdict in report["verdicts"][name].items()]
        lines.append("")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines.append(
        f"*Mean ± standard deviation over the seeds; {report['date'][:10]}; {versions}; {report['hardware']}. "
        "A criterion holds if it does for every seed.*"
    )
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Return mean ± standard deviation; without the latter for one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def load(root: str, device: torch.device) -> dict[str, Any]:
    """Return the images ``(N, 1, 28, 28)`` in [0, 1] and labels of both splits."""
    source = FashionMNISTDataModule(root=root)
    source.prepare_data()
    data: dict[str, Any] = {"device": device}
    for split in ("train", "test"):
        images, targets = source.load(split)  # type: ignore[misc, arg-type]
        data[split] = images.float() / 255, targets
    return data


def hardware(device: torch.device, threads: int) -> str:
    """Return what the runs were made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return f"{named.group(1) if named else platform.machine()}, {threads} threads"


def main() -> None:
    """Run what is missing, print tables and verdicts, write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="which")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--epochs", type=int, help="instead of each experiment's own, to try the script out")
    parser.add_argument("--train", type=int, help="training images, likewise")
    parser.add_argument("--held-out", type=int, default=5000, help="training images held out for TS and VS")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, and to go on from")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    if min(options.seeds, options.held_out, options.test) < 1:
        parser.error("--seeds, --held-out and --test must be at least 1")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in ("epochs", "train", "held_out", "test")}
    report: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
        if report["settings"] != settings:
            parser.error(f"{options.json} was made with {report['settings']}; delete it or use the same options")
    data = load(options.data, device)
    for name in options.experiments:
        for seed in range(options.seeds):
            for arm in EXPERIMENTS[name].arms:
                if (key := f"{name}/{arm}/{seed}") in report["runs"]:
                    continue
                result = report["runs"][key] = run(EXPERIMENTS[name], arm, seed, data, settings)
                shown = ", ".join(f"{map} {result[map]['nll']:.3f}/{result[map]['ece']:.1f}" for map in MAPS)
                print(f"{key:24} NLL/ECE {shown}; T {result['temperature']:.2f}; {result['seconds']} s", flush=True)
                packages = ("lightning-plugins", "torch")
                report |= {
                    "claim": "what training on mixtures and calibrating losses give beside calibration afterwards",
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": {package: importlib.metadata.version(package) for package in packages},
                    "hardware": hardware(device, options.threads),
                    "verdicts": verdicts(report["runs"]),
                }
                write(options.json, json.dumps(report, indent=2) + "\n")
                write(options.markdown, markdown(report))
    write(options.markdown, markdown(report))
    print(markdown(report))
    for name, outcome in report["verdicts"].items():
        for criterion, verdict in outcome.items():
            print(f"{name} {criterion}: {verdict}")


def write(path: Path | None, text: str) -> None:
    """Write a file, and its folder if need be."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
