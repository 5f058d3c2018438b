r"""Does robustness widen the gap between classes? Adversarial against standard training, paired by seed.

    python benchmarks/claims/disparity.py --seeds 4 --json benchmarks/results/disparity.json \
        --markdown docs/results/disparity.md

Net: the small one of ``imbalanced_robustness.py`` and its training (SGD at 0.05, 12 epochs, batches of 128, PGD of 7
steps in a radius of 0.1 or none) on 600 Fashion-MNIST images of each class. Accuracies are of the clean 10,000 test
images, of each class; their gaps are best minus worst class, and the standard deviation over classes. Both trainings of
a seed start from the same weights and see the same batches.

Pairs: linear classifiers of two Fashion-MNIST classes, as in the paper. Each pair is trained with 1,000 images of the
first class and as many or a tenth of the second, by 300 full-batch steps of Adam at 0.01, on clean images or on those
of FGSM in the paper's smallest radius (0.1444), the worst ones for a linear classifier. The disparity is the accuracy
of the first class minus that of the second, on 1,000 test images of each, averaged over five pairs that have every
class once.

Gaussian: `robust_optimal_classifier` and `gaussian_class_errors` against samples that the library's own attack moves: 2
norms, 3 forms of the covariance, budgets 0, 0.2 and 0.4, a majority ten times as frequent; 100,000 samples of a class.

Claims. (i) Adversarial training widens the gap between classes, best minus worst, on balanced data; (ii) as a standard
deviation. (iii) It lowers the accuracy of every class. (iv) It widens the disparity of imbalanced pairs, 10 to 1; (v)
by more than that of balanced ones. (vi) Measured Gaussian errors are the closed ones: no difference of more than 4
standard errors. (i) to (v) hold if the 95 % interval (Student's t over seeds) of the difference lies on the right side
of 0, and do not hold if it lies on the other; otherwise they are undecided.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from fashion import measure_all
from imbalanced_robustness import BATCH, EPOCHS, EPS, network
from mixing import CLASSES, spread
from scipy.stats import t as student
from torch import Tensor, nn

from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.robustness import (
    AccuracyDisparity,
    accuracy_disparity,
    fgsm,
    gap_of_disparity,
    gaussian_class_errors,
    pgd,
    robust_optimal_classifier,
)

PAIRS = ((0, 6), (2, 4), (7, 9), (1, 3), (5, 8))
PAIR_EPS = 0.1444
RATIOS = (1, 10)
NAMES = FashionMNISTDataModule.class_names


def train(images: Tensor, labels: Tensor, seed: int, epochs: int, *, adversarial: bool) -> nn.Module:
    """Train the net with or without an attack, as ``imbalanced_robustness.py`` does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network().to(images.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    milestones = [round(epochs * share / EPOCHS) for share in (9, 11)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    order, starts = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(2000 + seed)
    for _ in range(epochs):
        permutation = torch.randperm(len(labels), generator=order).to(images.device)
        for rows in permutation[: len(labels) // BATCH * BATCH].split(BATCH):
            x, y = images[rows], labels[rows]
            if adversarial:
                x = pgd(net, x, y, eps=EPS, step_size=0.025, num_steps=7, generator=starts).adversarial
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        scheduler.step()
    return net.eval()


def nets(seed: int, data: dict[str, Any], settings: dict[str, int], *, adversarial: bool) -> dict[str, Any]:
    """Accuracies of each class after one training on balanced data, in percent, and their gaps in points."""
    images, labels = (part.to(data["device"]) for part in data["train"])
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    kept = torch.cat([shuffled[labels[shuffled] == k][: settings["per_class"]] for k in range(CLASSES)])
    net = train(images[kept], labels[kept], seed, settings["epochs"], adversarial=adversarial)
    gaps = {"range": AccuracyDisparity(CLASSES), "std": AccuracyDisparity(CLASSES, "std")}
    robust = []
    attack = torch.Generator().manual_seed(0)
    x, y = (part.to(data["device"]) for part in data["test"])
    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in x.split(500)])
    right = (predicted == y).double()
    for name, gap in gaps.items():
        gap.to(y.device).update(predicted, predicted, y)
        gaps[name] = gap.compute()["clean"]
    for part, truth in zip(x[: settings["attacked"]].split(500), y[: settings["attacked"]].split(500), strict=True):
        result = pgd(net, part, truth, eps=EPS, step_size=0.02, num_steps=10, generator=attack)
        robust.append(~result.success)
    return {
        "accuracy": 100 * float(right.mean()),
        "robust": 100 * float(torch.cat(robust).double().mean()),
        "range": 100 * float(gaps["range"]),
        "std": 100 * float(gaps["std"]),
        "classes": [100 * float(right[y == k].mean()) for k in range(CLASSES)],
    }


def pairs(seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Disparities of linear classifiers of two classes, and how much wider training under attack makes them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (part.to(data["device"]) for part in data["train"])
    test, truth = (part.to(data["device"]) for part in data["test"])
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        accuracies: dict[bool, list[Tensor]] = {False: [], True: []}
        for majority, minority in PAIRS:
            counts = {majority: 1000, minority: 1000 // ratio}
            rows = []
            for k, count in counts.items():
                members = (y == k).nonzero().flatten()
                rows.append(members[torch.randperm(len(members), generator=generator)[:count].to(members.device)])
            images, targets = x[torch.cat(rows)], (y[torch.cat(rows)] == minority).long()
            for adversarial, results in accuracies.items():
                net = nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).to(x.device)
                for parameter in net.parameters():
                    nn.init.normal_(parameter, std=1e-3, generator=torch.Generator().manual_seed(seed))
                optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
                for _ in range(300):
                    inputs = fgsm(net, images, targets, eps=PAIR_EPS).adversarial if adversarial else images
                    optimizer.zero_grad()
                    F.cross_entropy(net(inputs), targets).backward()
                    optimizer.step()
                with torch.no_grad():
                    right = [(net(test[truth == k]).argmax(1) == c).double().mean() for c, k in enumerate(counts)]
                results.append(torch.stack(right))
        standard, adversarial_ = (100 * torch.stack(results) for results in accuracies.values())
        found[f"standard_{ratio}"] = float(accuracy_disparity(standard).mean())
        found[f"adversarial_{ratio}"] = float(accuracy_disparity(adversarial_).mean())
        found[f"gap_{ratio}"] = float(gap_of_disparity(adversarial_, standard).mean())
        found[f"gaps_{ratio}"] = gap_of_disparity(adversarial_, standard).tolist()
    return found


def gaussian(seed: int) -> dict[str, Any]:
    """Errors of the robust-optimal classifier on samples, minus the closed ones, in standard errors."""
    generator = torch.Generator().manual_seed(seed)
    dim, number = 8, 100_000
    largest, points = 0.0, 0.0
    rows = []
    for norm, p in (("l2", 2.0), ("linf", math.inf)):
        for form in ("isotropic", "diagonal", "full"):
            mean = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.3
            root = torch.eye(dim, dtype=torch.float64)
            if form == "diagonal":
                root = torch.diag(torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5)
            elif form == "full":
                root = root + 0.3 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
            covariance = {"isotropic": 1.0, "diagonal": root.square().diagonal(), "full": root @ root.T}[form]
            for eps in (0.0, 0.2, 0.4):
                best = robust_optimal_classifier(mean, covariance, eps=eps, ratio=10.0, p=p)
                closed = gaussian_class_errors(best.weight, best.bias, mean, covariance, eps=eps, p=p)
                natural = gaussian_class_errors(best.weight, best.bias, mean, covariance)

                def logits(x: Tensor, weight: Tensor = best.weight, bias: Tensor = best.bias) -> Tensor:
                    answer = x @ weight + bias
                    return torch.stack([answer, -answer], 1)

                for k, sign in enumerate((1.0, -1.0)):
                    noise = torch.randn(number, dim, generator=generator, dtype=torch.float64)
                    x, y = sign * mean + noise @ root.T, torch.full((number,), k)
                    wrong = fgsm(logits, x, y, eps=eps, norm=norm, bounds=None).success.double().mean()
                    unmoved = (logits(x).argmax(1) != y).double().mean()
                    for seen, expected in ((wrong, closed[k]), (unmoved, natural[k])):
                        error = (expected * (1 - expected) / number).sqrt()
                        largest = max(largest, abs(float((seen - expected) / error)))
                        points = max(points, 100 * abs(float(seen - expected)))
                rows.append([norm, form, eps, *(100 * natural).tolist(), *(100 * closed).tolist()])
    return {"standard_errors": largest, "points": points, "rows": rows}


def run(arm: str, seed: int, data: dict[str, Any], settings: dict[str, int]) -> dict[str, Any]:
    """Measure one part for one seed."""
    start = time.process_time()
    if arm == "pairs":
        found = pairs(seed, data)
    elif arm == "gaussian":
        found = gaussian(seed)
    else:
        found = nets(seed, data, settings, adversarial=arm == "adversarial")
    return found | {"cpu_seconds": round(time.process_time() - start, 1)}


def effect(differences: list[float], unit: str = "points") -> tuple[float, float, str]:
    """Return the ends of the 95 % interval of the mean difference, and a sentence."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return -math.inf, math.inf, f"{mean:+.1f} {unit}, one seed"
    half = float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    words = f"{mean:+.1f} {unit}, 95 % interval {mean - half:+.1f} to {mean + half:+.1f} ({count} seeds)"
    return mean - half, mean + half, words


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """Say what held."""

    def judged(differences: list[float]) -> str:
        low, high, words = effect(differences)
        return f"{'holds' if low > 0 else 'does not hold' if high < 0 else 'undecided'}: {words}"

    def widening(key: str) -> list[float]:
        return [run["adversarial"][key] - run["standard"][key] for run in seeds]

    said = {
        "(i) adversarial training widens the gap between best and worst class, balanced data": judged(
            widening("range")
        ),
        "(ii) and the standard deviation over classes": judged(widening("std")),
    }
    losses = [
        [run["standard"]["classes"][k] - run["adversarial"]["classes"][k] for run in seeds] for k in range(CLASSES)
    ]
    lost = sum(effect(loss)[0] > 0 for loss in losses)
    gained = [NAMES[k] for k, loss in enumerate(losses) if effect(loss)[1] < 0]
    least, most = (f"{pick(statistics.fmean(loss) for loss in losses):.1f}" for pick in (min, max))
    words = f"{lost} of {CLASSES} classes lose accuracy by their intervals; {least} to {most} points"
    said["(iii) it lowers the accuracy of every class"] = (
        f"{'holds' if lost == CLASSES else 'does not hold' if gained else 'undecided'}: {words}"
    )
    said["(iv) it widens the disparity of imbalanced pairs, 10 to 1"] = judged(
        [run["pairs"]["gap_10"] for run in seeds]
    )
    said["(v) by more than that of balanced pairs"] = judged(
        [run["pairs"]["gap_10"] - run["pairs"]["gap_1"] for run in seeds]
    )
    worst = max(run["gaussian"]["standard_errors"] for run in seeds)
    points = max(run["gaussian"]["points"] for run in seeds)
    said["(vi) measured errors of Gaussian classes are the closed ones"] = (
        f"{'holds' if worst <= 4 else 'does not hold'}: at most {worst:.1f} standard errors apart ({points:.2f} points)"
    )
    return said


def table(seeds: list[dict[str, Any]], settings: dict[str, int]) -> list[str]:
    """Return the documentation's tables."""
    number = CLASSES * settings["per_class"]
    lines = [
        f"Net on {number:,} balanced images, {settings['epochs']} epochs; percent and points, on clean test images but "
        f"for PGD-10 in a radius of {EPS} (on {settings['attacked']:,}):",
        "",
        "| training | accuracy | best - worst class | deviation over classes | worst class | PGD-10 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ("standard", "adversarial"):
        runs = [run[arm] for run in seeds]
        cells = [spread([run[key] for run in runs], 1) for key in ("accuracy", "range", "std")]
        cells += [spread([min(run["classes"]) for run in runs], 1), spread([run["robust"] for run in runs], 1)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| class | standard | adversarial | change |", "| --- | --- | --- | --- |"]
    for k, name in enumerate(NAMES):
        both = {arm: [run[arm]["classes"][k] for run in seeds] for arm in ("standard", "adversarial")}
        change = [b - a for a, b in zip(*both.values(), strict=True)]
        lines.append(f"| {name} | {' | '.join(spread(part, 1) for part in (*both.values(), change))} |")
    lines += [
        "",
        f"Linear classifiers of pairs, disparity in points under a training radius of {PAIR_EPS}:",
        "",
        "| majority to minority | standard | adversarial | wider by |",
        "| --- | --- | --- | --- |",
    ]
    for ratio in RATIOS:
        keys = (f"standard_{ratio}", f"adversarial_{ratio}", f"gap_{ratio}")
        lines.append(
            f"| {ratio} to 1 | {' | '.join(spread([run['pairs'][key] for run in seeds], 1) for key in keys)} |"
        )
    return lines


if __name__ == "__main__":
    measure_all(
        __doc__ or "",
        "adversarial training widens the gap between the accuracies of classes",
        {"per_class": 600, "epochs": EPOCHS, "attacked": 2000},
        ("standard", "adversarial", "pairs", "gaussian"),
        run,
        verdicts,
        table,
        rule="Intervals are Student's, over seeds.",
    )
