r"""What training on mixtures does to the geometry of neural collapse, with a learned and with a fixed head.

    python benchmarks/claims/neural_collapse.py --json benchmarks/results/neural_collapse.json \
        --markdown docs/results/neural_collapse.md

Fashion-MNIST, a net of two convolutions (16, 32 channels) and a layer of 128 features, Adam at 1e-3, batches of 100;
cross-entropy on clean samples (plain) or on mixup of alpha 1, with a learned linear head or one that is a fixed simplex
(rows of length 4). 1,000 images and 40 epochs, far fewer than in papers, to save time: enough for plain
training to come near 100 % on its images. All measures are of training images in eval mode: those of collapse on 500
clean ones, those of mixtures on pairs of them at shares 0, 0.1 ... 1.

Criteria. (i) Plain training with a learned head moves towards collapse: NC1, the angles of NC2, NC3 and NC4 are lower
at the end than after a fifth of the epochs. (ii) Under mixup clean samples collapse less: NC1 is higher than under
plain training, with either head. (iii) Under mixup mixtures of two classes lie nearer to the plane of their two rows
than under plain training, with either head. (iv) Mixtures within a class line up with its row under mixup: cosine above
0.9, with either head. (v) Under mixup mixtures of two classes are no convex combinations: gap above 0.1. (vi) The fixed
head comes nearer to the simplex than the learned one under mixup: lower angles of NC2. Runs that are in the JSON file
are not made again.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F
from fashion import held, measure_all
from mixing import BATCH, CLASSES, network, spread
from torch import Tensor, nn

from lightning_plugins.calibration import SimplexETFClassifier, mixed_collapse, neural_collapse
from lightning_plugins.mixing import mixup

ARMS = {
    "plain, learned head": (False, False),
    "mixup, learned head": (True, False),
    "plain, fixed head": (False, True),
    "mixup, fixed head": (True, True),
}
CLEAN = ("nc1", "nc2_norm", "nc2_angle", "nc3", "nc4")
MIXED = ("alignment", "plane", "gap", "margin")
SHARES = torch.linspace(0, 1, 11)
PAIRS_WITHIN, PAIRS_BETWEEN = 10, 4


def probes(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of pairs of samples ``(M, 2)``, within each class and between all classes, and their classes."""
    members = [(labels == label).nonzero().flatten() for label in range(CLASSES)]
    rows = []
    for i in range(CLASSES):
        for j in range(i, CLASSES):
            number = PAIRS_WITHIN if i == j else PAIRS_BETWEEN
            drawn = [
                group[torch.randint(len(group), (number,), generator=generator)] for group in (members[i], members[j])
            ]
            rows.append(torch.stack(drawn, 1))
    pairs = torch.cat(rows)
    return pairs, labels[pairs]


@torch.no_grad()
def measure(net: nn.Sequential, images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Return all measures of the net on training images."""
    net.eval()
    body, head = net[:-1], net[-1]
    bias = getattr(head, "bias", None)
    features = body(images)
    found = dataclasses.asdict(neural_collapse(features, labels, head.weight, bias))
    pairs, classes = probes(labels.cpu(), torch.Generator().manual_seed(seed))
    shares = SHARES.to(images)
    first, second = images[pairs[:, 0]], images[pairs[:, 1]]
    mixed = torch.stack([body(share * first + (1 - share) * second) for share in shares], 1)
    found |= dataclasses.asdict(mixed_collapse(mixed, classes[:, 0], classes[:, 1], shares, head.weight, bias))
    found["accuracy"] = 100 * (head(features).argmax(1) == labels).double().mean().item()
    net.train()
    return found


def run(arm: str, seed: int, data: dict[str, Any], settings: dict[str, int]) -> dict[str, Any]:
    """Train one arm, measure it after a fifth of the epochs and at the end."""
    start = time.perf_counter()
    mixing, fixed = ARMS[arm]
    images, targets = data["train"]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[: settings["train"]]
    mean, std = images[order].mean(), images[order].std()
    inputs, labels = ((images[order] - mean) / std).to(data["device"]), targets[order].to(data["device"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    if fixed:
        net[-1] = SimplexETFClassifier(128, CLASSES, scale=4.0, seed=seed)
    net = net.to(data["device"]).train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    batches, shares = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    result: dict[str, Any] = {}
    probe = slice(0, settings["probe"])
    for epoch in range(1, settings["epochs"] + 1):
        for rows in torch.randperm(len(labels), generator=batches).split(BATCH):
            batch, wanted = inputs[rows], labels[rows]
            if mixing:
                batch, wanted = mixup(batch, wanted, num_classes=CLASSES, alpha=1.0, generator=shares)
            loss = F.cross_entropy(net(batch), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == max(1, settings["epochs"] // 5):
            result["early"] = measure(net, inputs[probe], labels[probe], seed)
    return (
        measure(net, inputs[probe], labels[probe], seed) | result | {"seconds": round(time.perf_counter() - start, 1)}
    )


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """Say what held."""
    heads = ("learned", "fixed")
    falling = ("nc1", "nc2_angle", "nc3", "nc4")

    def fell(run: dict[str, Any], name: str) -> bool:
        late, early = run[name], run["early"][name]
        return bool(late < early or (name == "nc4" and late <= early))

    fallen = {name: sum(fell(run["plain, learned head"], name) for run in seeds) for name in falling}
    said = {
        "(i) plain training moves towards collapse (" + ", ".join(f"{n} in {k}" for n, k in fallen.items()) + ")": held(
            [all(fell(run["plain, learned head"], name) for name in falling) for run in seeds]
        )
    }
    for words, test in (
        ("(ii) clean samples collapse less under mixup", lambda mixed, plain: mixed["nc1"] > plain["nc1"]),
        (
            "(iii) mixtures of two classes lie nearer to the plane of their rows under mixup",
            lambda mixed, plain: mixed["plane"] < plain["plane"],
        ),
        (
            "(iv) under mixup mixtures within a class line up with its row",
            lambda mixed, plain: mixed["alignment"] > 0.9,
        ),
        ("(v) under mixup mixtures of two classes are no convex combinations", lambda mixed, plain: mixed["gap"] > 0.1),
    ):
        for head in heads:
            said[f"{words}, {head} head"] = held(
                [test(run[f"mixup, {head} head"], run[f"plain, {head} head"]) for run in seeds]
            )
    said["(vi) under mixup the fixed head brings the class means nearer to a simplex"] = held(
        [run["mixup, fixed head"]["nc2_angle"] < run["mixup, learned head"]["nc2_angle"] for run in seeds]
    )
    return said


def table(seeds: list[dict[str, Any]], settings: dict[str, int]) -> list[str]:
    """Return the documentation's table."""
    names = (*CLEAN, *MIXED)
    lines = [
        f"{settings['train']:,} images, {settings['epochs']} epochs; the rows in brackets are after a fifth of them.",
        "",
        "| training | accuracy on them, % | " + " | ".join(f"`{name}`" for name in names) + " |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for arm in ARMS:
        for when in ("early", "end"):
            runs = [run[arm]["early"] if when == "early" else run[arm] for run in seeds]
            cells = [spread([run["accuracy"] for run in runs], 1)]
            cells += [spread([run[name] for run in runs], 3) for name in names]
            lines.append(f"| {f'({arm})' if when == 'early' else arm} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    measure_all(
        __doc__ or "",
        "mixup changes the geometry of neural collapse as published",
        {"train": 1000, "epochs": 40, "probe": 500},
        list(ARMS),
        run,
        verdicts,
        table,
    )
