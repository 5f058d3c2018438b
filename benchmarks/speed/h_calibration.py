r"""How fast a step of h-calibration is, beside the form of the published code: convolutions, and k-means by distances.

    python benchmarks/speed/h_calibration.py --threads 1 --json benchmarks/results/speed_h_calibration.json \
        --markdown docs/results/speed_h_calibration.md

Both are the loss of the same probabilities with its gradient. Contenders run in turn, in an order that rotates from
round to round; the ratios are to ours, the first row, so the last column of the second row is the speed-up. The
convolution form trains its clusters on 256 rows for each of them, as faiss does by default, and then assigns all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Contender, environment, measure, write
from tables import h_calibration as markdown
from torch import Tensor

from lightning_plugins.calibration import HCalibration, PiecewiseLinearMap, h_calibration_loss


def draw(num_samples: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Float32 log-probabilities that are overconfident by a factor of 2.5, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_samples, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return (2.5 * logits).log_softmax(1), labels


def convolution_loss(probs: Tensor, labels: Tensor, window: int = 200, num_clusters: int = 15) -> Tensor:
    """The same loss by two convolutions."""
    hits = F.one_hot(labels, probs.shape[1]).flatten().to(probs.dtype)
    values, order = probs.flatten().sort()
    hits = hits[order]
    kernel = torch.full((1, 1, window + 1), 1 / (window + 1), dtype=probs.dtype)

    def smooth(events: Tensor) -> Tensor:
        return F.conv1d(events[None, None], kernel, padding=window // 2)[0, 0]

    excess = (smooth(values * (1 - hits)) - smooth((1 - values) * hits)).abs()
    with torch.no_grad():
        some = values[torch.randperm(len(values))[: 256 * num_clusters]]
        steps = (torch.arange(num_clusters) + 0.5) / num_clusters
        centres = values[0] + (values[-1] - values[0]) * steps
        for _ in range(25):
            nearest = (some[:, None] - centres).abs().argmin(1)
            sums = torch.zeros(num_clusters).index_add(0, nearest, some)
            sizes = torch.bincount(nearest, minlength=num_clusters)
            centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        nearest = (values[:, None] - centres).abs().argmin(1)
        sizes = torch.bincount(nearest, minlength=num_clusters)
    sums = torch.zeros(num_clusters).index_add(0, nearest, excess)
    return (sums / sizes.clamp_min(1))[sizes > 0].mean()


def steps(log_probs: Tensor, labels: Tensor) -> dict[str, Contender]:
    """Return the losses with their gradients, and the map on top of ours."""
    probs = log_probs.exp()

    def with_gradient(loss: Any) -> float:
        leaf = probs.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        return float(value)

    def whole_step() -> float:
        module = PiecewiseLinearMap(100)
        leaves = {name: leaf.requires_grad_() for name, leaf in module.start(log_probs, torch.Generator()).items()}
        value = h_calibration_loss(module.evaluate(leaves, log_probs).exp(), labels)
        torch.autograd.backward(value)
        return float(value)

    def convolution_step() -> float:
        module = PiecewiseLinearMap(100)
        leaves = {name: leaf.requires_grad_() for name, leaf in module.start(log_probs, torch.Generator()).items()}
        value = convolution_loss(module.evaluate(leaves, log_probs).exp(), labels)
        torch.autograd.backward(value)
        return float(value)

    return {
        "ours: loss and gradient": lambda: with_gradient(h_calibration_loss),
        "convolutions: loss and gradient": lambda: with_gradient(convolution_loss),
        "ours: step of a piecewise-linear map": whole_step,
        "convolutions: step of the same map": convolution_step,
        "ours: epoch of HCalibration": lambda: float(
            HCalibration(max_epochs=1, progress=False).fit(log_probs, labels).fit_info["nll_before"]
        ),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; one is the steadiest on a shared machine")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(steps(*draw(options.samples, options.classes)), options.rounds)
    print(f"{options.samples} x {options.classes}, {options.rounds} rounds")
    print(f"{'':38}{'wall':>9}{'wall ms':>10}{'CPU':>9}   result")
    for name, row in rows.items():
        print(f"{name:38}{row['wall_ratio']:9.2f}{row['wall_ms']:10.1f}{row['cpu_ratio']:9.2f}   {row['result']:.6g}")
    report = {
        "environment": environment("numpy"),
        "samples": options.samples,
        "classes": options.classes,
        "rounds": options.rounds,
        "rows": rows,
    }
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
