r"""Kill every recipe at random moments, go on from what it left, and compare with the run that was left alone.

    python benchmarks/reliability/crash.py --kills 2 --json benchmarks/results/crash.json \
        --markdown docs/results/crash.md

For each recipe, shortened to a few epochs of a few batches: one run from start to end; then, for each kill, the same
run in a process that gets SIGKILL after a random share of that time, and one that goes on from the folder of the
killed one (``lightning-plugins run NAME --resume FOLDER``), or starts again where no epoch was saved yet. Weights,
optimizer and callback states of the last checkpoint and all test metrics must be equal bit by bit, and no file that the
killed run left may be damaged. ``--signals`` does the same with SIGTERM and SIGINT (Ctrl-C), after which the process
must end by itself and say how to go on.

Processes are forked after the imports, so a kill costs a run and not the start of Python. Finished recipes are kept in
the JSON file and not run again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import safe_open

from lightning_plugins import cli, recipes, runner  # noqa: F401  (before the fork)

SHORT = ("trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


def overrides(name: str, epochs: int) -> list[str]:
    """What makes a recipe short."""
    own = yaml.safe_load(recipes.find(name).text)["trainer"].get("max_epochs") or epochs
    return [f"--trainer.max_epochs={min(own, epochs)}", *(f"--{part}" for part in SHORT)]


def work(arguments: list[str], log: Path) -> None:
    """What a forked process does: run the command line."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(arguments))


def start(arguments: list[str], log: Path) -> multiprocessing.Process:
    """Start a run in a process of its own."""
    os.environ.pop("LIGHTNING_PLUGINS_RUN_DIR", None)
    process = multiprocessing.get_context("fork").Process(target=work, args=(arguments, log))
    process.start()
    return process  # type: ignore[return-value]


def run_dir(root: Path) -> Path | None:
    """The one run in a folder."""
    found = [path.parent for path in root.rglob("config.yaml")] or [path.parent for path in root.rglob("metrics.csv")]
    return found[0] if found else None


def damaged(folder: Path) -> list[str]:
    """The files that cannot be read; temporary ones that a kill left beside them do not count."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.suffix in (".tmp", ".part"):
            continue
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=True, map_location="cpu")
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".yaml", ".yml"):
                yaml.safe_load(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).verify()
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    file.keys()
        except Exception as error:
            wrong.append(f"{path.relative_to(folder)}: {type(error).__name__}")
    return wrong


def state(folder: Path) -> dict[str, Any]:
    """What two runs must agree on."""
    results = json.loads((folder / "results.json").read_text())
    test = {name: value for name, value in results["metrics"].items() if name.startswith("test/")}
    path = folder / "checkpoints" / "last.ckpt"
    if not path.exists():  # a recipe that trains nothing
        return {"test": test}
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    callbacks = {name: value for name, value in checkpoint["callbacks"].items() if "ModelCheckpoint" not in name}
    return {
        "weights": checkpoint["state_dict"],
        "optimizers": checkpoint["optimizer_states"],
        "schedulers": checkpoint["lr_schedulers"],
        "callbacks": callbacks,
        "step": checkpoint["global_step"],
        "test": test,
    }


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The places where two states differ."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [name]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [name]
        return [place for key in one for place in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, (list, tuple)):
        if not isinstance(other, (list, tuple)) or len(one) != len(other):
            return [name]
        return [
            place for k, pair in enumerate(zip(one, other, strict=True)) for place in differences(*pair, f"{name}/{k}")
        ]
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return []
    return [] if one == other else [name]


def trial(name: str, options: argparse.Namespace, folder: Path, rng: random.Random) -> dict[str, Any]:
    """One recipe: the straight run, and one for each signal."""
    short = overrides(name, options.epochs)

    def finish(root: Path, *more: str) -> Path:
        process = start(["run", name, *short, "--root", str(root), *more], root.with_suffix(".log"))
        process.join()
        found = run_dir(root)
        if process.exitcode or found is None:
            raise RuntimeError(f"{name}: exit {process.exitcode}\n{root.with_suffix('.log').read_text()[-2000:]}")
        return found

    began = time.monotonic()
    straight = finish(folder / "straight")
    seconds = time.monotonic() - began
    expected, found = state(straight), []
    for number, kind in enumerate([kind for kind in options.signals for _ in range(options.kills)]):
        root = folder / f"killed-{number}"
        process = start(["run", name, *short, "--root", str(root)], root.with_suffix(".log"))
        moment = rng.uniform(0, seconds)
        process.join(moment)
        ended = process.exitcode is not None
        if not ended:
            os.kill(process.pid, SIGNALS[kind])  # type: ignore[arg-type]
            process.join(120)
        row: dict[str, Any] = {"signal": kind, "at": round(moment / seconds, 3), "exit": process.exitcode}
        row["too late"] = ended or process.exitcode == 0
        row["hung"] = process.exitcode is None
        if row["hung"]:
            process.kill()
            process.join()
        left = run_dir(root)
        row["damaged"] = damaged(root) if root.exists() else []
        row["resumed"] = left is not None and any(left.glob("checkpoints/*.ckpt"))
        if not ended and kind != "SIGKILL" and row["resumed"] and not re.search("--resume", read(root)):
            row["damaged"].append("the message does not say how to go on")
        again = finish(folder / f"resumed-{number}", *(["--resume", str(left)] if row["resumed"] else []))
        row["different"] = differences(expected, state(again))[:5]
        found.append(row)
        print(name, row, flush=True)
    return {"seconds": round(seconds, 1), "kills": found}


def read(root: Path) -> str:
    """What the process that ran in a folder printed."""
    return root.with_suffix(".log").read_text(errors="replace")


def markdown(report: dict[str, Any]) -> str:
    """Return the documentation's table."""
    lines = [
        "| recipe | signals sent | before the first epoch was saved | resumed | hung | damaged files | different from "
        "the straight run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    total = [0] * 6
    for name, row in sorted(report["recipes"].items()):
        kills = [kill for kill in row["kills"] if not kill["too late"]]
        counts = [
            len(kills),
            sum(not kill["resumed"] for kill in kills),
            sum(kill["resumed"] for kill in kills),
            sum(kill["hung"] for kill in kills),
            sum(len(kill["damaged"]) for kill in kills),
            sum(bool(kill["different"]) for kill in kills),
        ]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(map(str, counts))} |")
    lines += [f"| **all** | {' | '.join(f'**{count}**' for count in total)} |", ""]
    lines.append(f"*{report['setting']}; {report['date'][:10]}; {report['machine']}.*")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=recipes.names())
    parser.add_argument("--kills", type=int, default=2, help="of each recipe with each signal")
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"], choices=list(SIGNALS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file to write the numbers to; recipes that it holds are kept")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = (
        f"{options.kills} random moments for each of {', '.join(options.signals)}; recipes shortened to at most "
        f"{options.epochs} epochs of 4 batches"
    )
    report: dict[str, Any] = {"setting": setting, "recipes": {}}
    if options.json and options.json.exists() and (old := json.loads(options.json.read_text()))["setting"] == setting:
        report["recipes"] = old["recipes"]
    for name in options.recipes:
        if name in report["recipes"] or "CIFAR" in str(yaml.safe_load(recipes.find(name).text).get("data")):
            continue  # done, or of data that must be downloaded
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(f"{options.seed} {name}")
            report["recipes"][name] = trial(name, options, Path(folder), rng)
        report |= {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()} CPU, one thread; torch {torch.__version__}, lightning "
            f"{importlib.metadata.version('lightning')}, lightning-plugins "
            f"{importlib.metadata.version('lightning-plugins')}",
        }
        for path, text in {
            options.json: json.dumps(report, indent=1) + "\n",
            options.markdown: markdown(report),
        }.items():
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    print(markdown(report))


if __name__ == "__main__":
    main()
