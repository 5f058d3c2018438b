"""Gather every goal, every speed comparison and every claim from the committed results into docs/results.md's tables.

    python benchmarks/overview.py

Reads benchmarks/results/*.json, which the scripts beside it wrote, and writes docs/results/goals.md, accuracy_goals.md,
speed.md and claims.md. Nothing in them is typed by hand; a test holds them against the files.
"""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "docs" / "results"
PAGES = {"Callbacks and starting", "Growth"}  # families whose tables are included by themselves
Report = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One figure that a method was to reach.

    Attributes:
        what: the figure in words.
        file: the result that holds it.
        bound: the most it may be, or the least where ``least``.
        read: takes the figure out of the result; a KeyError says that it was not measured.
        page: the documentation that explains it.
        least: whether ``bound`` is a lower one.
    """

    what: str
    file: str
    bound: float
    read: Callable[[Report], float]
    page: str
    least: bool = False


def ratio(row: str, to: str | None = None) -> Callable[[Report], float]:
    """The wall time of a row, of the floor's or of another row's."""
    return lambda report: report["rows"][row]["wall_ratio"] / (report["rows"][to]["wall_ratio"] if to else 1)


def table_ratio(title: str, row: str, to: str | None = None, **where: Any) -> Callable[[Report], float]:
    """The same in a result with several tables."""

    def read(report: Report) -> float:
        for table in report["tables"]:
            if table["what"] == title and all(table[key] == value for key, value in where.items()):
                return float(table["rows"][row]["wall_ratio"] / (table["rows"][to]["wall_ratio"] if to else 1))
        raise KeyError(title)

    return read


def operations(report: Report) -> float:
    """Tensor operations of one matching iteration."""
    return float(report["tables"]["matching iteration"]["ours"]["operations"])


def distillation(row: str, to: str, table: str = "matching iteration") -> Callable[[Report], float]:
    """CPU time of a row of a table about distillation, of another one's."""
    return lambda report: report["tables"][table][row]["cpu_ratio"] / report["tables"][table][to]["cpu_ratio"]


QUANTIZATION, ROBUSTNESS = "quantization/double_rounding", "robustness/adversarial_training"
DISTILLATION, CALIBRATION = "distillation/characteristic_function", "calibration/temperature_scaling"
EVALUATION = "distillation/evaluation"
FLIPS = ", trained with flips"
GOALS = (
    Goal("training step at one precision, of fp32's", "speed_quantization", 1.30, ratio("ours, 4 bits"), QUANTIZATION),
    Goal("joint step at four, of fp32's", "speed_quantization", 5.20, ratio("ours, 8+6+4+2 bits"), QUANTIZATION),
    Goal(
        "compiled, of eager fp32's",
        "speed_quantization",
        0.80,
        ratio("ours, 4 bits, compiled"),
        QUANTIZATION,
    ),
    Goal(
        "compiled, of compiled fp32's",
        "speed_quantization",
        1.10,
        ratio("ours, 4 bits, compiled", "fp32, compiled"),
        QUANTIZATION,
    ),
    Goal(
        "int8 graph in onnxruntime, sums quantized, of fp32's",
        "onnx_export",
        1.0,
        ratio("8 bits, sums quantized"),
        QUANTIZATION,
    ),
    Goal(
        "Hessian traces to 10 %, of PyHessian's loop",
        "speed_hessian",
        1 / 20,
        lambda report: report["ours_over_pyhessian"],
        "quantization/hawq",
    ),
    Goal(
        "their ranking against a long run, Spearman",
        "speed_hessian",
        0.95,
        lambda report: report["spearman_default_against_long"],
        "quantization/hawq",
        least=True,
    ),
    Goal(
        "exact allocation for 200 layers, of scipy's milp (worst budget)",
        "allocation",
        0.50,
        lambda report: max(row["ratio"] for row in report["rows"] if row["layers"] == 200),
        "quantization/hawq",
    ),
    Goal("PGD-10, of ten bare passes", "speed_robustness", 1.03, ratio("ours"), ROBUSTNESS),
    Goal("the same on the folded copy", "speed_robustness", 0.80, ratio("ours, on the copy"), ROBUSTNESS),
    Goal("the same in bfloat16", "speed_robustness", 0.35, ratio("ours, on the copy in bfloat16"), ROBUSTNESS),
    Goal("tensor operations of one NCFM iteration", "speed_distillation", 300, operations, DISTILLATION),
    Goal(
        "NCFM iteration, CPU time, of the published form's",
        "speed_distillation",
        0.85,
        distillation("ours", "published form"),
        DISTILLATION,
    ),
    Goal(
        "the same in bfloat16",
        "speed_distillation",
        0.40,
        distillation("ours, bfloat16", "published form"),
        DISTILLATION,
    ),
    Goal(
        "NCFM iteration, CPU time, of the bare passes",
        "speed_distillation",
        1.2,
        distillation("ours", "bare passes"),
        DISTILLATION,
    ),
    Goal(
        "the same in bfloat16",
        "speed_distillation",
        0.75,
        distillation("ours, bfloat16", "bare passes"),
        DISTILLATION,
    ),
    Goal(
        "five nets evaluated jointly on a CPU, of one after the other",
        "speed_distillation",
        0.6,
        distillation("five nets jointly", "five nets in sequence", "evaluation, width 32, 10 images, 3 steps"),
        EVALUATION,
    ),
    Goal(
        "exact temperature, 50,000 x 100, of a cross-entropy pass",
        "speed_calibration",
        6.0,
        table_ratio("temperature", "ours: fit_temperature", classes=100),
        CALIBRATION,
    ),
    Goal(
        "exact temperature, 50,000 x 1,000, of a cross-entropy pass",
        "speed_calibration",
        2.0,
        table_ratio("temperature", "ours: fit_temperature", classes=1000),
        CALIBRATION,
    ),
    Goal(
        "ECE metric over 100 updates, 100 classes, torchmetrics' time of ours",
        "speed_calibration",
        3.0,
        table_ratio("ece", "torchmetrics metric, batches of 500", "ours: metric, batches of 500", classes=100),
        CALIBRATION,
        least=True,
    ),
    Goal(
        "the same, 1,000 classes",
        "speed_calibration",
        3.0,
        table_ratio("ece", "torchmetrics metric, batches of 500", "ours: metric, batches of 500", classes=1000),
        CALIBRATION,
        least=True,
    ),
    Goal(
        "h-calibration's step, the convolution form's time of ours",
        "speed_h_calibration",
        5.0,
        ratio("convolutions: step of the same map", "ours: step of a piecewise-linear map"),
        "calibration/h_calibration",
        least=True,
    ),
    Goal(
        "the costliest idle callback, µs of CPU time a step",
        "speed_overhead",
        15,
        lambda report: report["worst_idle_cpu_us"],
        "results",
    ),
    Goal(
        "the costliest recording callback, µs of CPU time a step",
        "speed_overhead",
        60,
        lambda report: report["worst_recording_cpu_us"],
        "results",
    ),
)


def published_size(images: int, method: str = "NCFM") -> Callable[[Report], float]:
    """Accuracy of a distilled set where the study ran at the size of the published tables; a KeyError elsewhere."""

    def read(report: Report) -> float:
        if not report["settings"]["published"]:
            raise KeyError("not the published size")
        found = [run["distilled_acc"] for name, run in report["runs"].items() if name.startswith(f"{method}|{images}|")]
        if not found:
            raise KeyError(method)
        return statistics.fmean(found)

    return read


def from_row(images: int, method: str, row: float) -> Callable[[Report], float]:
    """Points between our accuracy at the published size and the published one."""
    return lambda report: abs(published_size(images, method)(report) - row)


def gain(images: int, method: str, other: str) -> Callable[[Report], float]:
    """Points that one method's sets are worth more than another's, over the seeds of both, at whatever size."""

    def read(report: Report) -> float:
        seeds = [name.split("|")[2] for name in report["runs"] if name.startswith(f"{method}|{images}|")]
        both = [seed for seed in seeds if f"{other}|{images}|{seed}" in report["runs"]]
        if not both:
            raise KeyError(method)
        return statistics.fmean(
            report["runs"][f"{method}|{images}|{seed}"]["distilled_acc"]
            - report["runs"][f"{other}|{images}|{seed}"]["distilled_acc"]
            for seed in both
        )

    return read


def gap(report: Report) -> float:
    """The largest difference to a peer over seeds, in points of robust accuracy."""
    ours = report["pgd"]["lightning-plugins"]
    return max(abs(a - b) for peer in report["pgd"].values() for a, b in zip(ours, peer, strict=True))


POST_HOC = "calibration/post_hoc"
ACCURACY_GOALS = (
    Goal("PGD-40, robust accuracy, points from a peer's", "attack_peers", 0.3, gap, ROBUSTNESS),
    Goal(
        "PGD-10 in bfloat16 on the copy, points from fp32's",
        "speed_robustness",
        0.3,
        lambda report: 100 * abs(report["accuracies"]["copy in bfloat16"] - report["accuracies"]["net"]),
        ROBUSTNESS,
    ),
    Goal(
        "ECE after h-calibration, WRN-16-4 on CIFAR-100, %",
        "post_hoc",
        1.9,
        lambda report: report["checks"]["ECE after h-calibration, WideResNet-16-4, CIFAR-100"]["found"],
        POST_HOC,
    ),
    Goal(
        "the same, mean of three other splits, %",
        "h_calibration",
        1.9,
        lambda report: statistics.fmean(
            run["default"]["ece"] for name, run in report["runs"].items() if "wideresnet-16-4" in name
        ),
        "calibration/h_calibration",
    ),
    *(
        Goal(
            f"NCFM, Fashion-MNIST, {images} a class, width 128, %",
            "distillation",
            bound,
            published_size(images),
            DISTILLATION,
            least=True,
        )
        for images, bound in ((1, 81.0), (10, 86.8), (50, 89.1))
    ),
    Goal(
        "IDC, Fashion-MNIST, 1 a class, four to an image (rho 2), width 128, %",
        "distillation",
        79.5,
        published_size(1, "IDC, rho 2"),
        "distillation/gradient_matching",
        least=True,
    ),
    *(
        Goal(
            f"{method}, Fashion-MNIST, {images} a class, width 128, points from the published {row} %",
            "distillation",
            1.5,
            from_row(images, method, row),
            "distillation/gradient_matching",
        )
        for method, rows in (("DC", (70.5, 82.3, 83.6)), ("DSA", (70.6, 84.6, 88.7)))
        for images, row in zip((1, 10, 50), rows, strict=True)
    ),
    *(
        Goal(
            f"{what}, {images} a class, at a CPU's size, points",
            "distillation",
            bound,
            gain(images, method, other),
            page,
            least=True,
        )
        for images in (1, 10)
        for what, method, other, bound, page in (
            ("NCFM above DM, rho 2", "NCFM, rho 2", "DM, rho 2", 0.0, DISTILLATION),
            ("flip auto above off", f"NCFM, flip auto{FLIPS}", f"NCFM{FLIPS}", -0.3, "distillation/flip"),
        )
    ),
)

# The claim studies and the page that has their full tables.
STUDIES = {
    "double_rounding": "quantization/double_rounding",
    "supernet": "quantization/supernet",
    "mixed_precision": "quantization/hawq",
    "biper": "quantization/binary",
    "attack_peers": "robustness/adversarial_training",
    "imbalanced_robustness": "robustness/adversarial_training",
    "disparity": "robustness/disparity",
    "distillation": "distillation/evaluation",
    "flip": "distillation/flip",
    "temperature_scaling": "calibration/temperature_scaling",
    "post_hoc": "calibration/post_hoc",
    "post_hoc_fashion": "calibration/post_hoc",
    "h_calibration": "calibration/h_calibration",
    "mixing": "calibration/mixed_sample_augmentation",
    "ccvr": "calibration/classifier_head_calibration",
    "neural_collapse": "calibration/neural_collapse",
    "threshold_consistency": "calibration/threshold_consistency",
}

# How the verdicts of h-calibration's study read.
SETS = {
    "netcal-lenet-5-cifar-10": "LeNet-5, CIFAR-10",
    "netcal-wideresnet-16-4-cifar-100": "WideResNet-16-4, CIFAR-100",
    "sctl-densenet40-cifar10-lt": "DenseNet-40, CIFAR-10-LT",
    "sctl-wideresnet28-cifar10-lt": "WideResNet-28, CIFAR-10-LT",
}
SIDES = {"lower": "lower than", "higher": "higher than", "neither": "on either side of"}
OTHERS = {"published": "that of the published schedule", "TS": "that of a temperature"}


def load(name: str) -> Report | None:
    """A committed result."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def link(page: str) -> str:
    """A page by the first words of its heading; docs/results.md includes the tables with ``:relative-docs:``."""
    heading = (ROOT / "docs" / f"{page}.md").read_text().splitlines()[0].removeprefix("# ")
    return f"[{heading.split(':')[0].split(',')[0]}](../{page}.md)"


def goals() -> str:
    """The goals of speed and size."""
    return judged(GOALS)


def accuracy_goals() -> str:
    """The goals of accuracy."""
    return judged(ACCURACY_GOALS)


def judged(goals: Iterable[Goal]) -> str:
    """A table of goals and of what was reached."""
    lines = ["| figure | goal | reached | | method |", "| --- | --- | --- | --- | --- |"]
    for goal in goals:
        report, found = load(goal.file), None
        if report is not None:
            try:
                found = goal.read(report)
            except KeyError:
                found = None
        sign = "≥" if goal.least else "≤"
        bound = f"{sign}\N{NO-BREAK SPACE}{goal.bound:.3g}"
        if found is None:
            lines.append(f"| {goal.what} | {bound} | not measured | | {link(goal.page)} |")
            continue
        met = found >= goal.bound if goal.least else found <= goal.bound
        lines.append(f"| {goal.what} | {bound} | {found:.3g} | {'met' if met else 'missed'} | {link(goal.page)} |")
    return "\n".join(lines) + "\n"


def speed() -> str:
    """The tables of all speed scripts, by family."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "speed" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    families = (f"### {title}\n\n{tables.family(RESULTS, title)}" for title in tables.FAMILIES if title not in PAGES)
    return "\n".join(families)


def said(report: Report) -> Iterator[tuple[str, str]]:
    """Each claim of a study with its verdict."""
    if "claim" in report and isinstance(report.get("verdict"), str):
        yield report["claim"], report["verdict"]
    for claim, verdict in report.get("verdicts", {}).items():
        if isinstance(verdict, str):
            yield claim, verdict
        elif OTHERS.keys() <= verdict.keys():  # h-calibration on one network: on which side of others its error lies
            sides = "; ".join(f"{SIDES[verdict[other]]} {than}" for other, than in OTHERS.items())
            yield f"ECE of the default schedule, {SETS.get(claim, claim)}", f"{sides} ({verdict['seeds']} seeds)"
        elif all(key.startswith("(") for key in verdict):  # an experiment with claims of its own
            yield from verdict.items()
        else:
            yield claim, ", ".join(f"{key}: {value}" for key, value in verdict.items())
    checks = report.get("checks", {})
    if checks:
        held = sum(check["holds"] for check in checks.values())
        yield (
            "figures that others found on the same outputs, and promises to keep the predicted class",
            (f"{held} of {len(checks)} checks hold"),
        )


def claims() -> str:
    """A table of claims for each page that has studies."""
    rows: dict[str, list[str]] = {}
    for name, page in STUDIES.items():
        for claim, verdict in said(load(name) or {}):
            words = re.sub(r"^E\d+, ", "", claim)  # the number of an experiment says nothing here
            rows.setdefault(page, []).append(f"| {words} | {verdict} |")
    tables = ("\n".join([f"**{link(page)}**", "", "| claim | found |", "| --- | --- |", *rows[page]]) for page in rows)
    return "\n\n".join(tables) + "\n"


def main() -> None:
    """Write all tables."""
    for name, text in {
        "goals": goals(),
        "accuracy_goals": accuracy_goals(),
        "speed": speed(),
        "claims": claims(),
    }.items():
        (TABLES / f"{name}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
