r"""Does the threshold-consistent margin loss make one threshold serve all classes, at no cost in retrieval?

    python benchmarks/claims/threshold_consistency.py --json benchmarks/results/threshold_consistency.json \
        --markdown docs/results/threshold_consistency.md

Fashion-MNIST: embeddings of 32 dimensions are learned on five of the ten classes (drawn anew for each seed) by a
softmax over cosines with one proxy for each class, scale 16, and TCM of strength 0, 0.1, 0.3 or 1 beside it; net of two
convolutions (16, 32 channels) and a layer of 128, Adam at 1e-3, batches of 100. Measured on test images of the five
other classes, which the net never saw, and of the five it knows: OPIS (false acceptance rates 1 % to 10 %, 101
thresholds) and Recall@1.

Criteria, each for the best case of the claim, any one strength above 0. On the classes never seen: (i) OPIS is lower
than without TCM for every seed; (ii) so, and Recall@1 is within half a percentage point or higher. (iii), (iv): the
same on the classes of the training. Runs that are in the JSON file are not made again.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from fashion import measure_all
from mixing import BATCH, CLASSES, network, spread
from torch import Tensor, nn

from lightning_plugins.calibration import opis, tcm_loss

STRENGTHS = (0.0, 0.1, 0.3, 1.0)
ARMS = {f"TCM x {strength:g}": strength for strength in STRENGTHS}
PLAIN = "TCM x 0"
PARTS = ("unseen", "seen")
WIDTH, SCALE, KNOWN = 32, 16.0, 5


def recall_at_1(embeddings: Tensor, labels: Tensor) -> float:
    """Return the percentage of samples whose nearest other sample has their class."""
    directions = F.normalize(embeddings, dim=1)
    nearest = (directions @ directions.T).fill_diagonal_(-2).argmax(1)
    return 100 * (labels[nearest] == labels).double().mean().item()


def run(arm: str, seed: int, data: dict[str, Any], settings: dict[str, int]) -> dict[str, Any]:
    """Learn an embedding and measure it on both kinds of classes."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    known = torch.randperm(CLASSES, generator=generator)[:KNOWN].sort().values
    images, targets = data["train"]
    order = torch.randperm(len(targets), generator=generator)
    rows = order[torch.isin(targets[order], known)][: settings["train"]]
    mean, std = images[rows].mean(), images[rows].std()
    inputs, labels = ((images[rows] - mean) / std).to(data["device"]), targets[rows].to(data["device"])
    classes = torch.searchsorted(known.to(labels.device), labels)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
        net[-1] = nn.Linear(128, WIDTH)
        proxies = nn.Parameter(torch.randn(KNOWN, WIDTH).to(data["device"]))
    net = net.to(data["device"]).train()
    optimizer = torch.optim.Adam([*net.parameters(), proxies], lr=1e-3)
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            embeddings, wanted = net(inputs[batch]), classes[batch]
            cosines = F.normalize(embeddings, dim=1) @ F.normalize(proxies, dim=1).T
            loss = F.cross_entropy(SCALE * cosines, wanted)
            if ARMS[arm]:
                loss = loss + ARMS[arm] * tcm_loss(embeddings, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    net.eval()
    test_images, test_labels = data["test"]
    seen = torch.isin(test_labels, known)
    result: dict[str, Any] = {}
    for part, chosen in (("unseen", ~seen), ("seen", seen)):
        taken = chosen.nonzero().flatten()[: settings["test"]]
        with torch.no_grad():
            embeddings = net(((test_images[taken] - mean) / std).to(data["device"])).cpu()
        result[f"opis_{part}"] = opis(embeddings, test_labels[taken]).item()
        result[f"recall_{part}"] = recall_at_1(embeddings, test_labels[taken])
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """Say what held, and with which strengths."""
    said = {}
    for part, numbers, words in (
        ("unseen", ("(i)", "(ii)"), "never seen"),
        ("seen", ("(iii)", "(iv)"), "of the training"),
    ):

        def lower(arm: str, run: dict[str, Any], part: str = part) -> bool:
            return bool(run[arm][f"opis_{part}"] < run[PLAIN][f"opis_{part}"])

        def kept(arm: str, run: dict[str, Any], part: str = part) -> bool:
            return bool(run[arm][f"recall_{part}"] >= run[PLAIN][f"recall_{part}"] - 0.5)

        others = [arm for arm in ARMS if arm != PLAIN]
        falls = [arm for arm in others if all(lower(arm, run) for run in seeds)]
        both = [arm for arm in falls if all(kept(arm, run) for run in seeds)]
        for number, arms, claim in (
            (numbers[0], falls, "OPIS falls"),
            (numbers[1], both, "OPIS falls and Recall@1 stays"),
        ):
            verdict = f"holds for {', '.join(arms)}" if arms else "does not hold for any strength"
            said[f"{number} on classes {words} {claim}"] = verdict
    return said


def table(seeds: list[dict[str, Any]], settings: dict[str, int]) -> list[str]:
    """Return the documentation's table."""
    lines = [
        f"{settings['train']:,} training images of five classes, {settings['epochs']} epochs, {settings['test']:,} "
        "test images of each kind.",
        "",
        "| strength of TCM | OPIS, unseen classes | Recall@1, % | OPIS, classes of the training | Recall@1, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, strength in ARMS.items():
        cells = []
        for part in PARTS:
            cells.append(spread([run[arm][f"opis_{part}"] for run in seeds], 4))
            cells.append(spread([run[arm][f"recall_{part}"] for run in seeds], 1))
        lines.append(f"| {strength:g} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    measure_all(
        __doc__ or "",
        "TCM lowers OPIS at the same Recall@1",
        {"train": 4000, "epochs": 3, "test": 2000},
        list(ARMS),
        run,
        verdicts,
        table,
    )
