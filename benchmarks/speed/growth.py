r"""How the cost of our parts grows with the size of the task, beside how that of the unavoidable work grows.

    python benchmarks/speed/growth.py --json benchmarks/results/speed_growth.json \
        --markdown docs/results/speed_growth.md

Each part runs at three to five sizes, the floor of the same size in turn with it, in an order that rotates from round
to round, on one thread. A row has the median ratio of CPU times at each size, the CPU time for one unit of the size,
and the exponents of ours and of the floor: the slope of a line through the logarithms of time and size. 1 is a cost
that doubles with the size. Nets and images are small, so that the sizes, not the nets, are what is seen; at the
smallest sizes fixed costs of a call weigh more, and ratios there are above those of large tasks.

Ranks are processes that average their gradients through gloo, each with a batch of its own, so that without any cost
of communication a step would take as long with two as with one. There the times are of the clock, for waiting is the
cost. On a machine with two cores the two processes share caches and memory, and on a busy one also the cores: the ratio
to the fp32 step of the same number of processes says what ours adds, the exponent says more of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from allocation import draw as draw_table
from allocation import scipy_solver
from calibration import draw as draw_logits
from distillation import contenders as matching
from interleaved import Contender, environment, measure, write
from quantization import make_batch, trainer_of
from robustness import ours as attack
from robustness import passes
from tables import growth as markdown
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.calibration import CalibrationError, fit_temperature, h_calibration_loss
from lightning_plugins.hessian import hessian_trace
from lightning_plugins.models import CifarResNet
from lightning_plugins.quantization import convert_, switch_
from lightning_plugins.quantization.allocation import allocate_bits, predicted_loss

SIZE, WIDTH = 16, 8  # of the images and of the nets
BITS = (8, 6, 4, 2)
Pair = tuple[Contender, Contender]  # the floor, and ours


def net_of(depth: int) -> CifarResNet:
    """A small residual net of a depth 6 n + 2."""
    torch.manual_seed(0)
    return CifarResNet((depth - 2) // 6, width=WIDTH)


def converted(net: nn.Module, bits: Sequence[int], images: Tensor) -> nn.Module:
    """The same net at some precisions, its scales set."""
    model = convert_(net, bits, first_last_bits=min(bits))
    with torch.no_grad():
        for one in bits:
            switch_(model, one)(images)
    return model


def attacks(batch: int) -> Pair:
    """PGD with ten steps."""
    images, targets = make_batch(SIZE, 3, batch)
    images, net = images.sigmoid(), net_of(20).eval().requires_grad_(False)
    return lambda: passes(net, images, targets), lambda: attack(net, images, targets)


def training_step(*, batch: int = 32, depth: int = 20, precisions: int = 1) -> Pair:
    """A step at some precisions together, and as many forward and backward passes in fp32."""
    data, bits = make_batch(SIZE, 3, batch), BITS[:precisions]
    plain, model = net_of(depth), converted(net_of(depth), bits, data[0])
    switches: list[Callable[[], Any]] = [lambda one=one: switch_(model, one) for one in bits]  # type: ignore[misc]
    return (
        trainer_of(plain, list(plain.parameters()), data, [lambda: None] * precisions),
        trainer_of(model, list(model.parameters()), data, switches),
    )


def traces(*, batch: int = 32, depth: int = 20) -> Pair:
    """Traces of all layers with four probes, and one forward and backward pass."""
    data, net = make_batch(SIZE, 3, batch), net_of(depth).eval()
    weights = [module.weight for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return (
        lambda: torch.autograd.grad(F.cross_entropy(net(data[0]), data[1]), weights),
        lambda: hessian_trace(net, F.cross_entropy, [data], num_probes=4, tolerance=0, progress=False),
    )


def plans(layers: int) -> Pair:
    """The exact allocation of bits, and scipy's."""
    table = draw_table(layers, 0)

    def ours() -> float:
        return predicted_loss(table, allocate_bits(table, budget=4.0))

    return scipy_solver(table, 4.0, ours()), ours


def iteration(*, classes: int = 10, images: int = 10) -> Pair:
    """Matching by characteristic functions, and the network's passes alone."""
    options = argparse.Namespace(
        size=SIZE, channels=3, classes=classes, width=32, batch=16, images=images, frequencies=256
    )
    found = matching(options)
    return found["bare passes"], found["ours"]


def temperature(*, rows: int = 50_000, classes: int = 100) -> Pair:
    """The exact temperature, and one cross-entropy pass."""
    logits, labels = draw_logits(rows, classes)
    return without_gradients(lambda: F.cross_entropy(logits, labels), lambda: fit_temperature(logits, labels))


def streamed_error(*, rows: int = 50_000, classes: int = 100) -> Pair:
    """ECE over batches of 500 probabilities, and softmax and maximum of all logits."""
    logits, labels = draw_logits(rows, classes)
    batches = list(zip(logits.softmax(1).split(500), labels.split(500), strict=True))
    metric = CalibrationError()

    def ours() -> Tensor:
        metric.reset()
        for batch in batches:
            metric.update(*batch)
        value: Tensor = metric.compute()
        return value

    return without_gradients(lambda: logits.softmax(1).max(1), ours)


def class_events(rows: int) -> Pair:
    """h-calibration's loss and gradient, and one sort of the probabilities."""
    logits, labels = draw_logits(rows, 100)
    probs = logits.softmax(1).requires_grad_()
    return (
        lambda: probs.detach().flatten().sort(),
        lambda: torch.autograd.grad(h_calibration_loss(probs, labels), probs),
    )


def without_gradients(*calls: Contender) -> Pair:
    """The same calls inside ``torch.no_grad()``."""
    floor, ours = (torch.no_grad()(call) for call in calls)
    return floor, ours


# What grows: the part, the floor, the name of the size, its values, and the two calls at one of them.
SERIES: tuple[tuple[str, str, str, tuple[int, ...], Callable[[int], Pair]], ...] = (
    ("PGD-10", "ten bare passes", "images", (16, 32, 64, 128), attacks),
    ("QAT step, 8 bits", "fp32 step", "images", (8, 32, 128, 512), lambda n: training_step(batch=n)),
    ("QAT step, 8 bits", "fp32 step", "layers", (8, 14, 20, 32, 44), lambda n: training_step(depth=n)),
    ("joint QAT step", "as many fp32 passes", "precisions", (1, 2, 3, 4), lambda n: training_step(precisions=n)),
    ("Hessian traces, 4 probes", "forward and backward", "images", (16, 64, 256), lambda n: traces(batch=n)),
    ("Hessian traces, 4 probes", "forward and backward", "layers", (8, 14, 20, 32), lambda n: traces(depth=n)),
    ("exact plan of bits", "scipy's milp", "layers", (25, 50, 100, 200), plans),
    ("NCFM iteration", "bare passes", "classes", (2, 5, 10, 20), lambda n: iteration(classes=n)),
    ("NCFM iteration", "bare passes", "images per class", (5, 10, 20, 40), lambda n: iteration(images=n)),
    ("temperature, 100 classes", "cross-entropy", "rows", (5_000, 15_000, 50_000), lambda n: temperature(rows=n)),
    ("temperature, 50,000 rows", "cross-entropy", "classes", (10, 100, 1_000), lambda n: temperature(classes=n)),
    ("ECE, 100 classes", "softmax and maximum", "rows", (5_000, 15_000, 50_000), lambda n: streamed_error(rows=n)),
    ("ECE, 50,000 rows", "softmax and maximum", "classes", (10, 100, 1_000), lambda n: streamed_error(classes=n)),
    ("h-calibration, 100 classes", "one sort", "rows", (500, 1_500, 5_000), class_events),
)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The slope of the line through the logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, times))).slope


def series(
    what: str, floor: str, grows: str, sizes: Sequence[int], found: Sequence[dict[str, Any]], clock: str
) -> dict[str, Any]:
    """Gather what was measured at all sizes."""
    times = {name: [rows[name][f"{clock}_median_ms"] for rows in found] for name in ("floor", "ours")}
    spreads = [rows["ours"][f"{clock}_spread"] for rows in found]
    return {
        "what": what,
        "grows": grows,
        "floor": floor,
        "clock": clock,
        "sizes": list(sizes),
        "floor_ms": times["floor"],
        "ours_ms": times["ours"],
        "ratios": [spread["median"] for spread in spreads],
        "quartiles": [spread["quartiles"] for spread in spreads],
        "exponent": exponent(sizes, times["ours"]),
        "floor_exponent": exponent(sizes, times["floor"]),
        "peak_mib": [rows["ours"]["peak_mib"] for rows in found],
    }


def rank(index: int, world: int, rounds: int, folder: str) -> None:
    """Measure training steps in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=index, world_size=world)
    data = make_batch(SIZE, 3, 32)
    nets = {"floor": net_of(20), "ours": converted(net_of(20), (8,), data[0])}
    calls = {
        name: trainer_of(DistributedDataParallel(net), list(net.parameters()), data, [lambda: None])
        for name, net in nets.items()
    }
    rows = measure(calls, rounds)
    if index == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def over_ranks(worlds: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Measure the same with different numbers of processes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            mp.spawn(rank, (world, rounds, folder), nprocs=world)
            found.append(json.loads(Path(folder, f"{world}.json").read_text()))
    return found


def main() -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, help="only so many of the smallest sizes, at least 2")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="numbers of processes; none leaves it out")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes' too
    report: dict[str, Any] = {
        "environment": environment("scipy"),
        "setting": f"Medians of {options.rounds} rounds, CPU time (ranks: the clock); nets of width {WIDTH} on images "
        f"of {SIZE} x {SIZE}, ResNet-20 and 32 images where these do not grow; for one: image, layer, row and so on",
        "rounds": options.rounds,
        "series": [],
    }
    for what, floor, grows, all_sizes, pair in SERIES:
        sizes, found = all_sizes[: options.sizes], []
        for size in sizes:
            found.append(measure(dict(zip(("floor", "ours"), pair(size), strict=True)), options.rounds))
        report["series"].append(one := series(what, floor, grows, sizes, found, "cpu"))
        print(
            f"{what}, by {grows} {one['sizes']}: of the floor {', '.join(f'{ratio:.2f}' for ratio in one['ratios'])}; "
            f"exponent {one['exponent']:.2f}, the floor's {one['floor_exponent']:.2f}",
            flush=True,
        )
    if options.ranks:
        found = over_ranks(options.ranks, options.rounds)
        one = series("QAT step under DDP", "fp32 step under DDP", "ranks", options.ranks, found, "wall")
        report["series"].append(one)
        print(f"ranks {options.ranks}: of the floor {', '.join(f'{ratio:.2f}' for ratio in one['ratios'])}")
    print("\n" + markdown(report))
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
