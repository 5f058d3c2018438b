"""What claims on Fashion-MNIST share: options, a JSON file to go on from, the table's footer. Not run by itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from mixing import hardware, load, write

Runs = dict[str, Any]


def measure_all(
    doc: str,
    claim: str,
    defaults: dict[str, int],
    arms: Sequence[str],
    run: Callable[[str, int, dict[str, Any], dict[str, int]], dict[str, Any]],
    verdicts: Callable[[list[Runs]], dict[str, str]],
    table: Callable[[list[Runs], dict[str, int]], list[str]],
    *,
    rule: str = "A criterion holds if it does for every seed.",
) -> None:
    """Run what is missing, print table and verdicts, write the files after each run.

    Args:
        doc: the script's docstring.
        claim: one line for the JSON.
        defaults: numbers that define the experiment, by name; each becomes an option.
        arms: what is run for each seed.
        run: measures an arm, a seed, the data and the settings.
        verdicts: of the complete seeds, each a dictionary by arm: criterion to what held.
        table: lines of Markdown of the same.
        rule: when a criterion holds, for the table's footer.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    for name, number in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=number, help=f"default {number}")
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, and to go on from")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in defaults}
    report: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
        if report["settings"] != settings:
            parser.error(f"{options.json} was made with {report['settings']}; delete it or use the same options")
    device = torch.device(options.device)
    data = load(options.data, device)
    for seed in range(options.seeds):
        for arm in arms:
            key = f"{arm}/{seed}"
            if key in report["runs"]:
                continue
            report["runs"][key] = run(arm, seed, data, settings)
            print(key, shown(report["runs"][key]), flush=True)
            packages = ("lightning-plugins", "torch")
            report |= {
                "claim": claim,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {package: importlib.metadata.version(package) for package in packages},
                "hardware": hardware(device, options.threads),
            }
            write(options.json, json.dumps(report, indent=2) + "\n")
    seeds = [
        {arm: report["runs"][f"{arm}/{seed}"] for arm in arms}
        for seed in range(options.seeds)
        if all(f"{arm}/{seed}" in report["runs"] for arm in arms)
    ]
    report["verdicts"] = verdicts(seeds)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [*table(seeds, settings), ""]
    lines += [f"- {criterion}: **{verdict}**" for criterion, verdict in report["verdicts"].items()]
    lines += [
        "",
        f"*Mean ± standard deviation over {len(seeds)} seeds; {report['date'][:10]}; {versions}; {report['hardware']}. "
        f"{rule}*",
    ]
    text = "\n".join(lines) + "\n"
    write(options.json, json.dumps(report, indent=2) + "\n")
    write(options.markdown, text)
    print(text)


def held(outcomes: Sequence[bool]) -> str:
    """Return a verdict over seeds."""
    return f"{'holds' if all(outcomes) else 'does not hold'}: {sum(outcomes)} of {len(outcomes)} seeds"


def shown(result: dict[str, Any]) -> str:
    """Return the plain numbers of a run."""
    return ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, int | float))
