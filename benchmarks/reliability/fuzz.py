r"""Try wrong arguments on every public function and constructor, and count what came of them.

First every single edit of every valid call in ``tests/fuzz_table.py``, then as many calls with one or two edits, and
numbers that hypothesis finds, as ``--examples`` says. ``--no-singles`` leaves the first part out.

    OMP_NUM_THREADS=1 python benchmarks/reliability/fuzz.py --examples 3000 --seed 4 \
        --json benchmarks/results/fuzz.json --markdown docs/results/fuzz.md

A minute on one core; with all single edits ten. Defects are printed as they are found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fuzz_table import NOT_FUZZED, rows
from fuzzing import Change, calls, changes_of, judge

Counts = dict[str, Counter[str]]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="calls that hypothesis makes up")
    parser.add_argument("--names", default="*", help="pattern of the names to try, such as calibration.*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-singles", action="store_true", help="leave out the single edits of every call")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    parser.add_argument("--markdown", type=Path, help="where to write them by family, as a table")
    parser.add_argument("--from-json", type=Path, help="try nothing; write the table of these counts")
    arguments = parser.parse_args()
    here = Path.cwd()
    if arguments.from_json is not None:
        result = json.loads(arguments.from_json.read_text())
    else:
        result = _run(arguments.names, arguments.examples, arguments.seed, singles=not arguments.no_singles)
        print({key: value for key, value in result.items() if key not in ("per_name", "found")})
    if arguments.json is not None:
        (here / arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown is not None:
        (here / arguments.markdown).write_text(_markdown(result))


def _run(pattern: str, examples: int, number: int, *, singles: bool) -> dict[str, Any]:
    """Try the calls and count."""
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(prefix="fuzz"))  # a text in the place of a path becomes a file
    names = [name for name in rows() if fnmatchcase(name, pattern)]
    counts: Counts = defaultdict(Counter)
    defects: dict[str, list[str]] = defaultdict(list)
    start = time.monotonic()

    def take(name: str, changes: Iterable[Change]) -> None:
        outcome = judge(name, tuple(changes))
        counts[name][outcome.kind] += 1
        if outcome.kind == "defect":
            text = f"{', '.join(map(str, changes))}: {outcome.text}"
            if text not in defects[name]:
                defects[name].append(text)
                print(f"{name}({text})", flush=True)

    for name in names if singles else ():
        for change in changes_of(name):
            take(name, (change,))
    single_edits = sum(sum(count.values()) for count in counts.values())

    @seed(number)
    @settings(
        max_examples=max(examples, 1), deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls(names))
    def found_by_hypothesis(call: tuple[str, tuple[Change, ...]]) -> None:
        take(*call)

    if examples:
        found_by_hypothesis()
    total = sum(counts.values(), Counter())
    return {
        "names": len(names),
        "names_without_a_row": sum(map(len, NOT_FUZZED.values())),
        "inputs": sum(total.values()),
        "single_edits": single_edits,
        "answered": total["answered"],
        "refused": total["refused"],
        "edits_that_cannot_be_made": total["skipped"],
        "defects": total["defect"],
        "seconds": round(time.monotonic() - start),
        "seed": number,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": re.sub(r"\+.*", "", torch.__version__),
        "per_name": {name: dict(sorted(count.items())) for name, count in sorted(counts.items())},
        "found": dict(sorted(defects.items())),
    }


def _markdown(result: dict[str, Any]) -> str:
    """Return the counts by family."""
    families: dict[str, Counter[str]] = defaultdict(Counter)
    left: dict[str, list[str]] = defaultdict(list)
    for name, counts in result["per_name"].items():
        family = name.partition(".")[0]
        families[family].update({"functions": 1, **counts})
        if counts.get("defect"):
            left[family].append(f"`{name.partition('.')[2]}` {counts['defect']}")
    lines = [
        "| Family | Names | Inputs tried | Refused with a ValueError or TypeError | Documented result | Defects left |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [*sorted(families.items()), ("all", sum(families.values(), Counter()))]
    for family, count in rows:
        tried = count["answered"] + count["refused"] + count["defect"]
        defects = str(count["defect"]) if not left[family] else f"{count['defect']}: {', '.join(left[family])}"
        numbers = f"{count['functions']} | {tried:,} | {count['refused']:,} | {count['answered']:,}"
        lines.append(f"| {family} | {numbers} | {defects} |")
    found = [f"- `{name}`: {text}" for name, texts in result["found"].items() for text in texts]
    tail = [
        "",
        "Refused also counts errors that a docstring names, what a layer of the network under test says of its input,",
        "and the sentences in which torch refuses a dtype, a device or a seed.",
        "",
        f"*{result['inputs']:,} calls; {result['edits_that_cannot_be_made']:,} edits could not be made (a row less of "
        f"a number) and are not counted above. {result['names_without_a_row']} public names are not tried, each for a "
        f"reason in `tests/fuzz_table.py`. Seed {result['seed']}, torch {result['torch']}, Python {result['python']}, "
        f"{result['date']}.*",
    ]
    if found:
        tail += ["", "<details><summary>The defects left</summary>", "", *found, "", "</details>"]
    return "\n".join(lines + tail) + "\n"


if __name__ == "__main__":
    main()
