"""Which callbacks work together in one Trainer: every ordered pair, by the function that the tests run.

    python benchmarks/reliability/composition.py --json benchmarks/results/composition.json \
        --markdown docs/results/composition.md

Each pair trains two epochs of two steps on three linear layers, is resumed after the first, and must end with the same
weights and states, other ones than either callback trains alone if both change the training; then it is tested, and
what the callbacks export is read again (``run_pair`` in ``tests/pairs.py``). ``tests/test_composition.py`` runs the
same pairs and holds every cell to what is written here.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from pairs import PAIRS, class_name, run_pair  # noqa: E402
from test_callbacks import CALLBACKS  # noqa: E402


def anonymous(message: str, first: str, second: str) -> str:
    """The reason without the names, so that those of one kind share a note."""
    reason = message.partition(": callbacks=")[0]
    for name, place in ((class_name(first), "the first"), (class_name(second), "the second")):
        reason = re.sub(rf"\b{name}\b", place, reason)
    return reason


def markdown(cells: dict[str, dict[str, str]]) -> str:
    """The table, and its notes."""
    names = list(cells)
    notes: list[str] = []
    lines = [
        "| first ↓, second → | " + " | ".join(str(number) for number in range(1, len(names) + 1)) + " |",
        "| --- |" + " :-: |" * len(names),
    ]
    for number, first in enumerate(names, start=1):
        row = []
        for second in names:
            if class_name(first) == class_name(second):
                row.append("")
            elif message := cells[first][second]:
                note = anonymous(message, first, second)
                if note not in notes:
                    notes.append(note)
                row.append(f"[{notes.index(note) + 1}]")
            else:
                row.append("✓")
        lines.append(f"| {number} {first} | " + " | ".join(row) + " |")
    pairs = [message for row in cells.values() for message in row.values()]
    lines += [
        "",
        f"*{len(pairs)} ordered pairs: {pairs.count('')} work (✓), {len(pairs) - pairs.count('')} are refused ([n]). "
        "Columns have the numbers of the rows. A Trainer takes one callback of a class.*",
        "",
    ]
    return "\n".join(lines + [f"{n}. {note[0].upper()}{note[1:]}." for n, note in enumerate(notes, start=1)]) + "\n"


def main() -> None:
    """Run all pairs, or those of some rows, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CALLBACKS), help="rows; pairs without one of them are left")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    cells: dict[str, dict[str, str]] = {name: {} for name in CALLBACKS}
    if options.json and options.json.exists() and options.only != list(CALLBACKS):
        known = json.loads(options.json.read_text())
        cells |= {name: {other: m for other, m in row.items() if other in cells} for name, row in known.items()}
        cells = {name: cells[name] for name in CALLBACKS}
    broken = 0
    for first, second in PAIRS:
        if not {first, second} & set(options.only):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                cells[first][second] = run_pair(first, second, Path(folder))
        except Exception:
            broken += 1
            print(f"--- {first} before {second} neither works nor is refused", file=sys.stderr)
            print("\n".join(traceback.format_exc().splitlines()[-8:]), file=sys.stderr)
    if broken:
        sys.exit(f"{broken} pairs neither work nor are refused; nothing was written")
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(cells))


if __name__ == "__main__":
    main()
