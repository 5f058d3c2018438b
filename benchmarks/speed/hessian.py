r"""What the Hessian traces of all layers cost, as ratios to one forward and backward pass of the same batch.

    python benchmarks/speed/hessian.py --json benchmarks/results/speed_hessian.json \
        --markdown docs/results/speed_hessian.md

ResNet-20, trained for a moment on Fashion-MNIST; one batch of training images; evaluation mode; gradients by the
weights of the convolutions and the linear layer. Contenders run in turn, in an order that rotates from round to round;
a probe's cost is that of a call with several probes, all its preparations included, over their number. The noise of one
probe is the median over the layers of standard deviation over trace, from a long run of ours and from all the probes
that the peer drew. Cost times squared noise, over 0.1 squared, is the cost of a median standard error of 10 %: the
figure to compare. The peer is PyHessian's loop over layers (``pip install lightning-plugins[bench]``), each layer with
a Hessian of its own. On a busy machine the ratios drift; the JSON holds the load.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import add_peer, environment, measure, write
from scipy.stats import spearmanr
from tables import hessian as markdown
from torch import Tensor, nn

from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.hessian import Estimate, hessian_trace, top_eigenvalue
from lightning_plugins.models import resnet20

Batch = tuple[Tensor, Tensor]

GOAL = 1 / 20


def load(root: str) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST's training images, standardised, and labels."""
    data = FashionMNISTDataModule(root=root)
    data.prepare_data()
    images, labels = data.load("train") or (torch.empty(0), torch.empty(0))
    return (images.float() / 255 - data.mean[0]) / data.std[0], labels


def train(images: Tensor, labels: Tensor, *, width: int, steps: int) -> nn.Module:
    """Return a briefly trained net in evaluation mode."""
    torch.manual_seed(0)
    net = resnet20(in_channels=1, width=width)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return net.eval()


def weights_of(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that every contender looks at."""
    modules = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    return {name: module.weight for name, module in modules.items()}


def pyhessian_loop(net: nn.Module, batch: Batch, probes: int, seen: dict[str, list[float]]) -> Callable[[], None]:
    """Return PyHessian's trace for one layer after the other; each call adds its probes to ``seen``."""
    from pyhessian import hessian

    def run() -> None:
        for name, weight in weights_of(net).items():
            net.requires_grad_(False)
            weight.requires_grad_(True)
            whole = hessian(net, nn.CrossEntropyLoss(), data=batch, cuda=False)
            seen.setdefault(name, []).extend(whole.trace(maxIter=probes, tol=0))  # 0: no chance agreement stops it
            weight.grad = None  # it holds a graph, and the graph holds it
        net.requires_grad_(True)
        gc.collect()

    return run


def noise_of(estimates: dict[str, Estimate]) -> float:
    """Return the median over the layers of one probe's standard deviation over the trace."""
    return statistics.median(e.error * e.num_probes**0.5 / abs(e.value) for e in estimates.values())


def compare(net: nn.Module, batch: Batch, options: argparse.Namespace) -> dict[str, Any]:
    """Measure costs and noises, and return the report's figures."""
    weights = list(weights_of(net).values())
    seeds = iter(range(10**6))

    def trace(probes: int, **arguments: Any) -> dict[str, Estimate]:
        return hessian_trace(
            net, F.cross_entropy, [batch], num_probes=probes, tolerance=0, seed=next(seeds), progress=False, **arguments
        )

    many, few = options.probes, options.slow_probes
    contenders: dict[str, Callable[[], Any]] = {
        "forward + backward": lambda: torch.autograd.grad(F.cross_entropy(net(batch[0]), batch[1]), weights)
    }
    probes: dict[str, int] = {}
    noises: dict[str, float] = {}

    def add(name: str, count: int, run: Callable[[], Any]) -> None:
        contenders[name], probes[name] = run, count

    add("ours", many, lambda: trace(many))
    add("ours, batch in one piece", many, lambda: trace(many, chunk_size=len(batch[1])))
    add("ours, second derivatives", few, lambda: trace(few, curvature="hessian"))
    seen: dict[str, list[float]] = {}
    peer = "PyHessian, layer by layer"
    left_out = add_peer(contenders, peer, ["pyhessian"], lambda: pyhessian_loop(net, batch, few, seen))
    if peer in contenders:
        probes[peer] = few
    contenders["ours, an iteration of all top eigenvalues"] = lambda: top_eigenvalue(
        net, F.cross_entropy, [batch], num_iterations=1, progress=False
    )
    contenders["ours, until all are at 10 %"] = lambda: hessian_trace(
        net, F.cross_entropy, [batch], tolerance=0.1, seed=next(seeds), progress=False
    )
    rows = measure(contenders, options.rounds)

    long = trace(options.long)
    noises["ours"] = noise_of(long)
    noises["ours, batch in one piece"] = noise_of(trace(options.long, chunk_size=len(batch[1])))
    noises["ours, second derivatives"] = noise_of(trace(4 * few, curvature="hessian"))
    values = {name: estimate.value for name, estimate in long.items()}
    if seen:
        # Both estimate the same traces; the long run's are the better ones to divide by.
        noises[peer] = statistics.median(statistics.stdev(found) / abs(values[name]) for name, found in seen.items())
    table = {}
    for name, row in rows.items():
        table[name] = {key: value for key, value in row.items() if key != "result"}
        if name in probes:
            cost = row["wall_ratio"] / probes[name]
            table[name] |= {
                "probes": probes[name],
                "cost_of_a_probe": cost,
                "cpu_cost_of_a_probe": row["cpu_ratio"] / probes[name],
                "noise_of_a_probe": noises[name],
                "cost_of_10_percent": cost * (noises[name] / 0.1) ** 2,
            }

    def agreement(others: dict[str, float]) -> float:
        return float(spearmanr(list(values.values()), [others[name] for name in values]).statistic)

    default = hessian_trace(net, F.cross_entropy, [batch], seed=next(seeds), progress=False)
    report = {
        "rows": table,
        "curvatures": {name: estimate.curvature for name, estimate in long.items()},
        "traces": {name: [estimate.value, estimate.error] for name, estimate in long.items()},
        "left_out": left_out,
        "spearman_default_against_long": agreement({name: estimate.value for name, estimate in default.items()}),
    }
    if seen:
        report["ours_over_pyhessian"] = table["ours"]["cost_of_10_percent"] / table[peer]["cost_of_10_percent"]
        means = {name: statistics.fmean(found) for name, found in seen.items()}
        report["spearman_pyhessian_against_long"] = agreement(means)
        # About 1 if both estimate the same: root mean square of the differences in standard errors.
        deviations = [
            (means[name] - values[name]) / (statistics.variance(found) / len(found) + long[name].error ** 2) ** 0.5
            for name, found in seen.items()
        ]
        report["difference_in_standard_errors"] = statistics.fmean(d * d for d in deviations) ** 0.5
    return report


def main() -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="channels of the net's first stage")
    parser.add_argument("--batch", type=int, default=128, help="images in the batch")
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--probes", type=int, default=20, help="probes in a timed call of ours")
    parser.add_argument("--slow-probes", type=int, default=8, help="probes in a timed call of a loop over layers")
    parser.add_argument("--long", type=int, default=400, help="probes of the run that the others are held against")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    images, labels = load(options.data)
    net = train(images, labels, width=options.width, steps=options.train_steps)
    batch = images[: options.batch], labels[: options.batch]
    with torch.no_grad():
        loss = float(F.cross_entropy(net(batch[0]), batch[1]))
    setting = (
        f"ResNet-20 of width {options.width}, trained for {options.train_steps} steps (loss {loss:.2f}), "
        f"{options.batch} x 1 x 28 x 28, {options.threads} threads"
    )
    report = {
        "environment": environment("pyhessian"),
        "setting": setting,
        "rounds": options.rounds,
        "long": options.long,
        **compare(net, batch, options),
    }
    print(f"{setting}, {options.rounds} rounds\n")
    print(f"{'':44}{'wall':>8}{'CPU':>8}{'a probe':>9}{'noise':>8}{'to 10 %':>9}")
    for name, row in report["rows"].items():
        print(f"{name:44}{row['wall_ratio']:8.2f}{row['cpu_ratio']:8.2f}", end="")
        if "probes" in row:
            print(
                f"{row['cost_of_a_probe']:9.2f}{row['noise_of_a_probe']:8.2f}{row['cost_of_10_percent']:9.1f}", end=""
            )
        print()
    print(f"\nrank correlation, default call with long run: {report['spearman_default_against_long']:.3f}")
    if "ours_over_pyhessian" in report:
        ratio = report["ours_over_pyhessian"]
        print(f"ours / PyHessian for equal accuracy: 1/{1 / ratio:.1f} (goal 1/{1 / GOAL:.0f})")
        print(f"difference of both in standard errors: {report['difference_in_standard_errors']:.2f}")
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
