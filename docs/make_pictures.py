"""Run the Python blocks of pages; keep the picture and what they print.

    python docs/make_pictures.py                  # all pages that make a picture
    python docs/make_pictures.py power_law

A page is one of docs/robustness whose blocks leave a matplotlib figure in ``figure``. It is written to
docs/_static/<page>.png, and what the blocks print to docs/results/<page>.txt, which the page includes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import re
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = ("power_law", "boundary_tilting", "input_gradients", "level_sets", "simplicity_bias")


def make(name: str) -> None:
    """Run one page and write its picture and its output."""
    page = DOCS / "robustness" / f"{name}.md"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in BLOCK.finditer(page.read_text()):
            exec(compile(block.group(1), str(page), "exec"), namespace)
    namespace["figure"].savefig(DOCS / "_static" / f"{name}.png", dpi=150)
    versions = ", ".join(f"{part} {importlib.metadata.version(part)}" for part in ("lightning-plugins", "torch"))
    footer = f"One run (seed 0), {datetime.now(UTC):%Y-%m-%d}, {versions}, one CPU thread."
    (DOCS / "results" / f"{name}.txt").write_text(f"{printed.getvalue()}\n{footer}\n")


def main() -> None:
    """Run the pages that are named, or all."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or PAGES:
        make(name)
        print((DOCS / "results" / f"{name}.txt").read_text())


if __name__ == "__main__":
    main()
