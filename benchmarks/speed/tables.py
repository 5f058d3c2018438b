"""The tables of the speed scripts, built from their JSON alone: for the terminal and for the documentation.

Needs nothing but Python. Every function takes a report, as one script wrote it, and returns Markdown. A column is left
out if no row has it; older results lack some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def short(value: float) -> str:
    """A number with three digits, or more before the point."""
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def field(key: str, form: Callable[[Any], str] = short) -> Callable[[Row], str]:
    """Read one figure of a row; empty where it has none."""
    return lambda row: "" if row.get(key) is None else form(row[key])


def median(key: str) -> Callable[[Row], str]:
    """Read median and quartiles."""
    return field(key, lambda spread: f"{short(spread['median'])} ({' – '.join(map(short, spread['quartiles']))})")


def table(first: str, columns: Columns, rows: Mapping[str, Row]) -> str:
    """A table with a row's name in its first column."""
    kept = {title: cells for title, read in columns.items() if any(cells := [read(row) for row in rows.values()])}
    lines = [[first, *kept], ["---"] * (1 + len(kept)), *zip(rows, *kept.values(), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ratios(rows: Mapping[str, Row], what: str, floor: str, extra: Columns | None = None) -> str:
    """The table of contenders whose first is the floor."""
    columns = {
        f"time, of {floor}": field("wall_ratio"),
        "median (quartiles)": median("wall_spread"),
        f"CPU time, of {floor}": field("cpu_ratio"),
        **(extra or {}),
        "ms": field("wall_ms"),
        "memory, MiB": field("peak_mib", lambda mib: f"{mib:.0f}"),
    }
    return table(what, columns, rows)


def note(report: Report, *sentences: str) -> str:
    """What a reader needs to judge a table: settings, machine, versions, and who is not in it."""
    where = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    sentences = (
        *sentences,
        *(f"Left out: {name} ({reason})." for name, reason in report.get("left_out", {}).items()),
    )
    if run := report.get("run"):
        memory = "" if run["peak_mib"] is None else f", {run['peak_mib']:,.0f} MiB at the peak"
        sentences = (*sentences, f"The whole process: {run['seconds'] / 60:.1f} minutes{memory}.")
    threads = f"{where['threads']} thread{'s' * (where['threads'] != 1)}"
    return f"\n*{' '.join(sentences)} {where['cpu']}, {threads}, {where['date'][:10]}; {versions}.*\n"


def timing(report: Report) -> str:
    """How the ratios were taken."""
    rounds = f" of {report['rounds']} rounds" if "rounds" in report else ""
    return f"Time: best{rounds}; CPU time: median."


def quantization(report: Report) -> str:
    """Training steps."""
    memory = report["peak_memory_mib"]
    return ratios(report["rows"], "training step", "fp32's") + note(
        report,
        f"ResNet-20 of width 16, batch {report['batch']}, SGD. {timing(report)}",
        f"Live tensors at the peak of a step: fp32 {memory['fp32']:.0f} MiB, one precision {memory['one']:.0f}, "
        f"four precisions {memory['joint']:.0f}.",
    )


def hessian(report: Report) -> str:
    """Traces of all layers."""
    columns = {
        "cost of a probe": field("cost_of_a_probe"),
        "CPU": field("cpu_cost_of_a_probe"),
        "noise of a probe": field("noise_of_a_probe"),
        "cost of 10 %": field("cost_of_10_percent", lambda cost: f"{cost:.1f}"),
        "memory, MiB": field("peak_mib", lambda mib: f"{mib:.0f}"),
    }
    rows = {name: row for name, row in report["rows"].items() if "probes" in row}
    sentences = [
        "Cost in forward and backward passes of the batch; noise: standard deviation over trace; both as medians",
        f"over the {len(report['traces'])} layers of {report['setting']}; best of {report['rounds']} rounds.",
    ]
    if "ours_over_pyhessian" in report:
        sentences.append(f"Ours needs 1/{1 / report['ours_over_pyhessian']:.0f} of PyHessian's time.")
    rank = report["spearman_default_against_long"]
    sentences.append(f"Rank correlation of a default call with one of {report['long']} probes: {rank:.3f}.")
    return table("traces of all layers", columns, rows) + note(report, *sentences)


def allocation(report: Report) -> str:
    """Exact plans of bits."""
    columns = {
        "ours, of scipy's": field("ratio"),
        "quartiles": field("quartiles", lambda pair: " – ".join(map(short, pair))),
        "CPU time": field("cpu_ratio"),
        "worst seed": field("worst_ratio"),
        "ours, ms": field("ours_ms"),
        "scipy, ms": field("scipy_ms"),
        "ours, MiB": field("ours_mib"),
        "scipy, MiB": field("scipy_mib"),
        "difference": field("largest_difference", lambda value: f"{value:.0e}"),
    }
    rows = {f"{row['layers']} layers, {row['budget']:g} bits": row for row in report["rows"]}
    return table("network, average bits", columns, rows) + note(report, f"{report['setting'].capitalize()}.")


def onnx_export(report: Report) -> str:
    """Graphs in onnxruntime."""

    def percent(share: float) -> str:
        return f"{share:.2f} %"

    extra = {
        "argmax as in torch": field("agreement", percent),
        "accuracy": field("accuracy", percent),
        "size, kB": field("kilobytes", lambda size: f"{size:.0f}"),
    }
    return ratios(report["rows"], "graph", "fp32's", extra) + note(report, f"{report['setting']}.")


def robustness(report: Report) -> str:
    """Attacks."""
    lines = ratios(report["rows"], "attack", "ten passes") + note(
        report, f"PGD with 10 steps, ResNet-20 of width 16, batch {report['batch']}. {timing(report)}"
    )
    if accuracies := report["accuracies"]:
        found = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
        lines += f"\nRobust accuracy of a small net on the digits, by what was attacked: {found}.\n"
    return lines


def distillation(report: Report) -> str:
    """Matching and evaluation."""
    tables = (
        ratios(rows, title, next(iter(rows)), {"operations": field("operations", str)})
        for title, rows in report["tables"].items()
    )
    return "\n".join(tables) + note(report, f"{report['setting']}. {timing(report)}")


FLOORS = {"temperature": "a cross-entropy pass", "ece": "softmax and maximum"}


def calibration(report: Report) -> str:
    """Fits of a temperature, and ECE."""
    tables = (
        ratios(
            found["rows"],
            f"{found['what'].replace('ece', 'ECE')}, {report['samples']:,} x {found['classes']:,}",
            FLOORS[found["what"]],
        )
        for found in report["tables"]
    )
    return "\n".join(tables) + note(report, timing(report))


def h_calibration(report: Report) -> str:
    """Losses and steps of h-calibration."""
    return ratios(report["rows"], f"{report['samples']:,} x {report['classes']:,}", "ours") + note(
        report, timing(report)
    )


def overhead(report: Report) -> str:
    """Callbacks in idle steps, and fresh processes."""
    rows = {
        name: row | {f"{kind}_text": f"{row[f'{kind}_above_us']:+.0f}" for kind in ("wall", "cpu")}
        for name, row in report["rows"].items()
    }
    steps: Columns = {
        "µs": field("wall_us", lambda us: f"{us:.0f}"),
        "above none, µs": field("wall_text", str),
        "CPU µs": field("cpu_us", lambda us: f"{us:.0f}"),
        "above none, CPU µs": field("cpu_text", str),
        "quartiles": field("cpu_above_quartiles_us", lambda pair: " – ".join(f"{us:.0f}" for us in pair)),
    }
    starts = report["starts_ms"]
    processes = {
        f"`{name}`": {"ms": best, "python": best / starts["python"], "torch": best / starts["import torch"]}
        | {"median": report.get("starts_median_ms", {}).get(name)}
        for name, best in starts.items()
    }
    times: Columns = {
        "ms": field("ms", lambda ms: f"{ms:.0f}"),
        "median, ms": field("median", lambda ms: f"{ms:.0f}"),
        "of `python -c pass`": field("python"),
        "of `import torch`": field("torch"),
    }
    said = (
        f"The 5th percentile of {report['steps']} steps, median of {report['rounds']} fits in turn; processes: best of "
        f"{report['start_rounds']}.",
        f"The costliest idle callback is {report['worst_idle_cpu_us'] - rows['empty Callback']['cpu_above_us']:.0f} µs "
        "above the empty one, which Lightning itself charges for.",
        "Nothing in a step, and so the cost of the empty Callback: " + ", ".join(report["without_step_hooks"]) + ".",
    )
    return f"{table('training step', steps, rows)}\n{table('fresh process', times, processes)}{note(report, *said)}"


def growth(report: Report) -> str:
    """How costs grow."""
    rows = {}
    for one in report["series"]:
        sizes = " / ".join(f"{size:,}" for size in one["sizes"])
        rows[f"{one['what']}, by {one['grows']}"] = one | {
            "sizes": sizes,
            "floor": one["floor"],
            "ratios": " / ".join(map(short, one["ratios"])),
            "unit": " / ".join(short(1e3 * ms / size) for ms, size in zip(one["ours_ms"], one["sizes"], strict=True)),
            "memory": None if None in one["peak_mib"] else " / ".join(f"{mib:.0f}" for mib in one["peak_mib"]),
        }
    columns: Columns = {
        "sizes": field("sizes", str),
        "floor": field("floor", str),
        "ours, of the floor": field("ratios", str),
        "µs for one": field("unit", str),
        "exponent": field("exponent"),
        "the floor's": field("floor_exponent"),
        "memory, MiB": field("memory", str),
    }
    return table("what grows", columns, rows) + note(report, f"{report['setting']}.")


# Every part: the file of its result, its table, and what its first row or its unit is.
Part = tuple[str, Callable[[Report], str], str]
FAMILIES: dict[str, dict[str, Part]] = {
    "Quantization": {
        "quantization": (
            "speed_quantization",
            quantization,
            "Peers: brevitas, torchao, NVIDIA ModelOpt. The floor is the training step of the same net in fp32.",
        ),
        "hessian": ("speed_hessian", hessian, "Peer: PyHessian. The unit is one forward and backward pass."),
        "allocation": ("allocation", allocation, "Peer and unit: `scipy.optimize.milp` on the same instance."),
        "onnx_export": ("onnx_export", onnx_export, "The unit is the fp32 graph in onnxruntime."),
    },
    "Robustness": {
        "robustness": (
            "speed_robustness",
            robustness,
            "Peers: torchattacks, foolbox, ART. The floor is ten forward passes and input gradients.",
        ),
    },
    "Distillation": {
        "distillation": (
            "speed_distillation",
            distillation,
            "Reference: the published loop over the classes. The floor is the network's passes alone.",
        ),
    },
    "Calibration": {
        "calibration": (
            "speed_calibration",
            calibration,
            "Peers: netcal, probmetrics, scikit-learn, torch-uncertainty, torchmetrics. The floors pass over the same "
            "logits once.",
        ),
        "h_calibration": ("speed_h_calibration", h_calibration, "Reference: the form with convolutions and k-means."),
    },
    "Callbacks and starting": {
        "overhead": ("speed_overhead", overhead, "Microseconds of a step above the Trainer without callbacks."),
    },
    "Growth": {
        "growth": (
            "speed_growth",
            growth,
            "An exponent of 1 is a cost that doubles with the size, 0 one that does not grow; ratios that stay level "
            "say that ours grows as the floor does.",
        ),
    },
}
PARTS = {name: part for parts in FAMILIES.values() for name, part in parts.items()}


def load(folder: Path, name: str) -> Report | None:
    """The result of a part in a folder."""
    path = folder / f"{PARTS[name][0]}.json"
    return json.loads(path.read_text()) if path.exists() else None


def family(folder: Path, title: str, parts: Iterable[str] | None = None) -> str:
    """The tables of a family, of all or of some of its parts, from the results in a folder."""
    blocks = []
    for name in FAMILIES[title] if parts is None else parts:
        _, build, about = PARTS[name]
        report = load(folder, name)
        blocks.append(f"{about}\n\n" + ("*Not measured yet.*\n" if report is None else build(report)))
    return "\n".join(blocks)


def aligned(text: str) -> str:
    """The same Markdown with its columns below each other, for a terminal."""
    lines, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        for cells in block:
            rule = cells[0] == "---"
            padded = ["-" * width if rule else cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        block = []
        lines.append(line)
    return "\n".join(lines)
