r"""What one matching iteration of dataset distillation costs, against the bare network passes it cannot do without.

    python benchmarks/speed/distillation.py --json benchmarks/results/speed_distillation.json \
        --markdown docs/results/speed_distillation.md
    python benchmarks/speed/distillation.py --rounds 1 --batch 16 --width 16 --frequencies 64 --steps 2   # a quick look

ConvNet-3 on random images, 10 classes unless told otherwise, B real and n synthetic images each. The floor sends the
real images through the network without gradients, in tiles that fit the cache, and the synthetic ones forward and
backward with frozen weights.
The published form handles one class after the other with weights that keep their gradients and two products, one for
the cosine and one for the sine. Contenders run in turn, in an order that rotates from round to round. Beside the times
stands the number of tensor operations in an iteration, views left out: what an accelerator has to launch.

The sizes are those of the released CIFAR-10 settings, with 64 real images a class in place of 1,024: the network's
share, which nobody can save, grows with them. It takes about four minutes of CPU time.

Further tables compare the evaluation of five networks trained jointly with five in sequence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from interleaved import Contender, environment, measure, write
from tables import distillation as markdown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.distillation import (
    CharacteristicFunction,
    ClassPool,
    DistributionMatching,
    FrequencySampler,
    Protocol,
    images_per_tile,
    train_nets,
    unit_rows,
)
from lightning_plugins.features import PenultimateFeatures
from lightning_plugins.models import convnet3


class CountOperations(TorchDispatchMode):
    """Counts what reaches the device, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features."""
    with PenultimateFeatures(net) as seen:
        net(images)
    return seen.last.flatten(1)


def published_loss(real: Tensor, synthetic: Tensor, frequencies: Tensor) -> Tensor:
    """The loss of one class as the released code writes it: two products, phase from a difference."""
    parts = []
    for rows in (real, synthetic):
        parts.append(((rows @ frequencies.T).cos().mean(0), (rows @ frequencies.T).sin().mean(0)))
    (a_r, b_r), (a_s, b_s) = parts
    norms = [(a.square() + b.square()).sqrt() for a, b in parts]
    amplitude = (norms[0] - norms[1]).square()
    phase = 2 * (norms[0] * norms[1] - a_r * a_s - b_r * b_s)
    return 300 * (0.5 * amplitude + 0.5 * phase).clamp_min(1e-12).sqrt().mean()


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """Return the floor first, then all others."""
    side, channels, count = options.size, options.channels, options.images
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.classes * options.batch, channels, side, side, generator=generator)
    labels = torch.arange(options.classes).repeat_interleave(options.batch)
    pool = ClassPool(images, labels, mean=[0.5] * channels, std=[0.25] * channels)
    synthetic = torch.randn(options.classes, count, channels, side, side, generator=generator)
    torch.manual_seed(0)
    net = convnet3(num_classes=options.classes, in_channels=channels, image_size=side, width=options.width)
    frozen = convnet3(num_classes=options.classes, in_channels=channels, image_size=side, width=options.width)
    frozen.load_state_dict(net.state_dict())
    frozen.eval().requires_grad_(False)
    tile = images_per_tile(frozen, (channels, side, side), "cpu")
    real = pool.draw(options.batch, first=True)

    def floor() -> None:
        leaf = synthetic.clone().requires_grad_()
        with torch.no_grad():
            for _, part in real.tiles(tile):
                features(frozen, part.flatten(0, 1))
        torch.autograd.grad(features(frozen, leaf.flatten(0, 1)).sum(), leaf)

    def published() -> float:
        leaf = synthetic.clone().requires_grad_()
        total = torch.zeros(())
        for label in range(options.classes):
            with torch.no_grad():
                target = unit_rows(features(net, real.select(label, label + 1).images()[0]))
            frequencies = torch.randn(options.frequencies, target.shape[1], generator=generator)
            loss = published_loss(target, unit_rows(features(net, leaf[label])), frequencies)
            loss.backward()
            total += loss.detach()
        net.zero_grad()
        return float(total)

    matching = CharacteristicFunction(FrequencySampler(options.frequencies))
    means = DistributionMatching()

    def ours(objective: Any, dtype: torch.dtype | None = None) -> float:
        leaf = synthetic.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = objective.loss(frozen, real, leaf).total
            torch.autograd.grad(loss, leaf)
        return float(loss.detach())

    return {
        "bare passes": floor,
        "published form": published,
        "ours": lambda: ours(matching),
        "ours, bfloat16": lambda: ours(matching, torch.bfloat16),
        "ours, means (DM)": lambda: ours(means),
        "ours, means (DM), bfloat16": lambda: ours(means, torch.bfloat16),
    }


def evaluators(options: argparse.Namespace, width: int, count: int) -> dict[str, Contender]:
    """Return five networks trained in sequence, and five trained jointly, on ``count`` images of each class."""
    classes = options.classes
    generator = torch.Generator().manual_seed(1)
    shape = options.channels, options.size, options.size
    images = torch.randn(classes * count, *shape, generator=generator)
    labels = torch.arange(classes).repeat_interleave(count)
    protocol = Protocol(steps=options.steps)

    def factory() -> nn.Module:
        return convnet3(num_classes=classes, in_channels=options.channels, image_size=options.size, width=width)

    def train(joint: bool) -> None:
        train_nets(factory, images, labels, num_classes=classes, protocol=protocol, seeds=tuple(range(5)), joint=joint)

    return {"five nets in sequence": lambda: train(False), "five nets jointly": lambda: train(True)}


def with_operations(found: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure, and count the operations of one call each."""
    rows = measure(found, rounds)
    for name, call in found.items():
        with CountOperations() as counter:
            call()
        rows[name]["operations"] = counter.count
    return rows


def main() -> None:
    """Measure, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=128, help="of the network")
    parser.add_argument("--batch", type=int, default=64, help="real images of each class")
    parser.add_argument("--images", type=int, default=10, help="decoded synthetic images of each class")
    parser.add_argument("--frequencies", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="of the evaluation's training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = (
        f"{options.classes} classes, {options.batch} real and {options.images} synthetic images "
        f"{options.channels} x {options.size} x {options.size} each, ConvNet-3 of width {options.width}, "
        f"{options.frequencies} frequencies"
    )
    print(f"{setting}; {options.threads} threads, {options.rounds} rounds")
    tables = {"matching iteration": with_operations(contenders(options), options.rounds)}
    narrow = max(1, options.width // 4)
    for width, count in ((narrow, 1), (narrow, options.images), (options.width, 1)):
        title = f"evaluation, width {width}, {count * options.classes} images, {options.steps} steps"
        tables[title] = with_operations(evaluators(options, width, count), options.rounds)
    for title, rows in tables.items():
        print(f"{title:34}{'wall':>8}{'wall ms':>10}{'CPU':>8}{'operations':>12}")
        for name, row in rows.items():
            print(
                f"{name:34}{row['wall_ratio']:8.2f}{row['wall_ms']:10.0f}{row['cpu_ratio']:8.2f}{row['operations']:12}"
            )
    report = {"environment": environment(), "setting": setting, "rounds": options.rounds, "tables": tables}
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
