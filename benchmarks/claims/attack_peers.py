r"""Do our attacks find what others' find? PGD and AutoAttack beside foolbox and torchattacks on one net.

    pip install "lightning-plugins[bench]" && pip install --no-deps --target peers torchattacks
    PYTHONPATH=peers python benchmarks/claims/attack_peers.py --json benchmarks/results/attack_peers.json \
        --markdown docs/results/attack_peers.md

(torchattacks asks for a version of requests from 2021 and would downgrade it; its attacks do without.) A small net is
trained on Fashion-MNIST under PGD, then attacked by PGD of 40 steps of 0.01 in a linf radius of 0.1 from a uniform
start, with three seeds each, and by AutoAttack on fewer images. Robust accuracy counts images that are classified
correctly before and after.

Claims. Robust accuracy under PGD is within 0.3 points of each peer's, as means over the seeds; under AutoAttack within
one image.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from imbalanced_robustness import load, train
from torch import Tensor, nn

from lightning_plugins.robustness import PGDAT, auto_attack, pgd

EPS, STEP, STEPS = 0.1, 0.01, 40
Attack = Callable[[Tensor, Tensor, int], Tensor]


def contenders(net: nn.Module) -> dict[str, Attack]:
    """PGD of each package that is installed."""

    def ours(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pgd(net, images, labels, eps=EPS, step_size=STEP, num_steps=STEPS, generator=generator).adversarial

    found: dict[str, Attack] = {"lightning-plugins": ours}
    if importlib.util.find_spec("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(net, bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, rel_stepsize=None, steps=STEPS, random_start=True)

        def theirs(images: Tensor, labels: Tensor, seed: int) -> Tensor:
            torch.manual_seed(seed)
            _, clipped, _ = attack(model, images, labels, epsilons=EPS)
            result: Tensor = clipped
            return result

        found["foolbox"] = theirs
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        other = torchattacks.PGD(net, eps=EPS, alpha=STEP, steps=STEPS, random_start=True)

        def third(images: Tensor, labels: Tensor, seed: int) -> Tensor:
            torch.manual_seed(seed)
            result: Tensor = other(images, labels)
            return result

        found["torchattacks"] = third
    return found


def auto_attacks(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Robust accuracy in percent under AutoAttack, ours and torchattacks'."""
    with torch.no_grad():
        right = net(images).argmax(1) == labels
    survived = right & ~auto_attack(net, images, labels, eps=EPS).success
    result = {"lightning-plugins": 100 * float(survived.float().mean())}
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        attacked = torchattacks.AutoAttack(net, norm="Linf", eps=EPS, version="standard", n_classes=10, seed=0)(
            images, labels
        )
        with torch.no_grad():
            result["torchattacks"] = 100 * float((right & (net(attacked).argmax(1) == labels)).float().mean())
    return result


def main() -> None:
    """Train, attack, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--train-images", type=int, default=6000)
    parser.add_argument("--images", type=int, default=2000, help="test images for PGD")
    parser.add_argument("--few", type=int, default=128, help="test images for AutoAttack")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = load(options.root)
    images, labels = (part[: options.train_images] for part in sets["train"])
    net = train(images, labels, PGDAT(), seed=0).requires_grad_(False)
    images, labels = (part[: options.images] for part in sets["test"])
    with torch.no_grad():
        right = net(images).argmax(1) == labels
    accuracy: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    attacks = contenders(net)
    for seed in range(3):
        for name, attack in attacks.items():
            start = time.process_time()
            robust = [
                ok & (net(attack(x, y, seed)).argmax(1) == y)
                for x, y, ok in zip(images.split(500), labels.split(500), right.split(500), strict=True)
            ]
            seconds.setdefault(name, []).append(time.process_time() - start)
            accuracy.setdefault(name, []).append(100 * float(torch.cat(robust).float().mean()))
    cascade = auto_attacks(net, images[: options.few], labels[: options.few])
    means = {name: statistics.fmean(values) for name, values in accuracy.items()}
    ours = means["lightning-plugins"]
    verdicts = {
        f"PGD within 0.3 points of {name}": f"{'holds' if abs(value - ours) <= 0.3 else 'does not hold'}: "
        f"{value - ours:+.2f} points"
        for name, value in means.items()
        if name != "lightning-plugins"
    }
    verdicts |= {
        f"AutoAttack within one image of {name}": (
            f"{'holds' if abs(value - cascade['lightning-plugins']) <= 100 / options.few + 1e-9 else 'does not hold'}: "
            f"{value - cascade['lightning-plugins']:+.2f} points"
        )
        for name, value in cascade.items()
        if name != "lightning-plugins"
    }
    lines = [
        f"| attack, radius {EPS}, Fashion-MNIST | PGD-{STEPS}, robust, % | CPU time, of ours | AutoAttack, robust, % |"
    ]
    lines += ["| --- | --- | --- | --- |"]
    own = statistics.median(seconds["lightning-plugins"])
    for name, values in accuracy.items():
        last = f"{cascade[name]:.1f}" if name in cascade else ""
        spread = f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
        lines.append(f"| {name} | {spread} | {statistics.median(seconds[name]) / own:.2f} | {last} |")
    lines += ["", "| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in verdicts.items()]
    versions = {"torch": torch.__version__}
    for name in ("lightning-plugins", "foolbox", "torchattacks"):
        if name in accuracy:
            versions[name] = importlib.metadata.version(name)
    clean = 100 * float(right.float().mean())
    date = datetime.now(UTC).isoformat(timespec="seconds")
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines += [
        "",
        f"*{options.images:,} test images, three seeds, clean accuracy {clean:.1f} %; AutoAttack on {options.few}; "
        f"{platform.machine()} CPU, one thread; {date[:10]}; {packages}.*",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    report: dict[str, Any] = {
        "verdicts": verdicts,
        "pgd": accuracy,
        "auto_attack": cascade,
        "cpu_seconds": seconds,
        "clean": clean,
        "date": date,
        "versions": versions,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
