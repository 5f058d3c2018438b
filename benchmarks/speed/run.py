r"""All speed measurements by one command, and at its end a table for each family.

    python benchmarks/speed/run.py                              # everything; about an hour on two quiet cores
    python benchmarks/speed/run.py --only robustness growth     # some parts
    python benchmarks/speed/run.py --skip-done                  # go on where a run of today was interrupted
    python benchmarks/speed/run.py --quick                      # tiny sizes, to see that all works: minutes

The parts run one after another, each in a process of its own. A part's JSON is written to benchmarks/results and its
table to docs/results when it has ended well; benchmarks/overview.py then makes the tables of docs/results.md. With
``--out FOLDER`` both go there instead and the documentation is left alone; ``--quick`` without it takes a temporary
folder. A part that fails does not stop the others. What failed, and which libraries were left out, is said at the end,
and the exit status is then 1.

Peers: ``pip install lightning-plugins[bench]``. torchattacks pins an old ``requests``; keep it apart with
``pip install --no-deps --target peers torchattacks`` and ``PYTHONPATH=peers``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tables

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, DOCUMENTATION = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"

# By part: the arguments of the committed result, and those of a quick look.
ARGUMENTS = {
    "quantization": ("--compile --rounds 30", "--size 8 --batch 8 --rounds 2 --threads 1"),
    "hessian": ("", "--width 4 --batch 16 --train-steps 5 --probes 2 --slow-probes 2 --long 8 --rounds 1"),
    "allocation": ("", "--layers 20 --budgets 4 --seeds 2 --rounds 2"),
    "onnx_export": ("--steps 450", "--width 4 --steps 3 --rounds 2"),
    "robustness": ("--accuracy 30", "--size 8 --batch 8 --rounds 2 --threads 1"),
    "distillation": ("", "--batch 8 --images 4 --width 8 --frequencies 64 --steps 2 --rounds 1 --threads 1"),
    "calibration": ("--classes 100 1000 --rounds 3 --threads 1", "--samples 2000 --classes 10 --rounds 2 --threads 1"),
    "h_calibration": ("--threads 1", "--samples 500 --classes 10 --rounds 2 --threads 1"),
    "overhead": ("", "--steps 80 --rounds 1 --start-rounds 1"),
    "growth": ("", "--rounds 1 --sizes 2"),
}


def is_done(report: dict[str, Any] | None, arguments: list[str], hours: float) -> bool:
    """Whether a result was made by this driver with these arguments, not longer ago than this."""
    if report is None or report.get("run", {}).get("arguments") != arguments:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(report["environment"]["date"]) < timedelta(hours=hours)


def measure(script: Path, arguments: list[str], minutes: float) -> tuple[dict[str, Any] | None, str]:
    """Run a script in a process of its own.

    Returns:
        Its report, with what the process took; or None, and the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        with log.open("w") as output:
            started = time.perf_counter()
            command = [sys.executable, str(script), *arguments, "--json", str(result)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            limit = threading.Timer(60 * minutes, process.kill)
            limit.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:  # interrupted: nothing must go on measuring
                process.kill()
                raise
            finally:
                limit.cancel()
        seconds = time.perf_counter() - started
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code or not result.exists():
            why = f"over {minutes:g} minutes" if seconds >= 60 * minutes else f"exit status {code}"
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-15:]
            return None, "\n".join([why, *last])
        report: dict[str, Any] = json.loads(result.read_text())
    peak = usage.ru_maxrss / 1024 if sys.platform == "linux" else None  # other systems have other units
    return report | {"run": {"arguments": arguments, "seconds": seconds, "peak_mib": peak}}, ""


def main() -> int:
    """Run the parts, print the tables, say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for all files; default: where the documentation reads them")
    parser.add_argument(
        "--skip-done", type=float, nargs="?", const=24.0, metavar="HOURS", help="skip parts that are newer (24)"
    )
    parser.add_argument("--limit", type=float, default=90, metavar="MINUTES", help="of one part")
    options = parser.parse_args()
    committed = options.out is None and not options.quick
    folder = options.out or (RESULTS if committed else Path(tempfile.mkdtemp(prefix="speed-")))
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for part in options.only:
        arguments = ARGUMENTS[part][options.quick].split()
        if options.skip_done is not None and is_done(tables.load(folder, part), arguments, options.skip_done):
            print(f"{part}: done before", flush=True)
            continue
        print(f"{part} {' '.join(arguments)} ...", end=" ", flush=True)
        report, why = measure(HERE / f"{part}.py", arguments, options.limit)
        if report is None:
            problems.append(f"{part} failed: {why.splitlines()[0]}")
            print(f"failed: {why}", flush=True)
            continue
        print(f"{report['run']['seconds'] / 60:.1f} minutes", flush=True)
        name, build, _ = tables.PARTS[part]
        for path, text in (
            (folder / f"{name}.json", json.dumps(report, indent=2) + "\n"),
            ((DOCUMENTATION if committed else folder) / f"{name}.md", build(report)),
        ):
            path.write_text(text)
    for title, parts in tables.FAMILIES.items():
        if chosen := [part for part in parts if part in options.only]:
            print(f"\n{title}\n{'=' * len(title)}\n\n{tables.aligned(tables.family(folder, title, chosen))}")
    for part in options.only:
        left_out = (tables.load(folder, part) or {}).get("left_out", {})
        problems += [f"{part} without {peer}: {reason}" for peer, reason in left_out.items()]
    if committed:
        overview = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "overview.py")], stdout=subprocess.DEVNULL)
        problems += ["benchmarks/overview.py failed"] * (overview.returncode != 0)
    print(f"\nResults in {folder}.", *(problems or ["All parts and all peers are in."]), sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    sys.exit(main())
