"""Run every recipe for a batch with the real W&B client, offline, and hold its files against those of the run.

    OMP_NUM_THREADS=1 python benchmarks/reliability/wandb_recipes.py

About five minutes on one core. ``tests/test_wandb.py`` does the same with one recipe of each family.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from test_wandb import NARROW, ONE_BATCH, check_run

from lightning_plugins import recipes
from lightning_plugins.cli import main as command_line

LAST = "--trainer.callbacks.init_args"  # of the last callback of the list
SMALLER = {
    "DistilledSetEvaluation": [f"{LAST}.num_nets=1", f"{LAST}.steps=2"],
    "PostTrainingQuantization": [f"{LAST}.num_steps=2", f"{LAST}.num_samples=32"],
    "RobustnessEvaluation": ["--data.batch_size=16"],
    "iterations_per_epoch:": ["--model.init_args.iterations_per_epoch=1"],
    "pretrain_epochs:": ["--model.init_args.settings.pretrain_epochs=1"],
    "width:": [NARROW],
    "CIFAR10": ["--data.class_path=lightning_plugins.data.DigitsDataModule"],
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="*", help="pattern of the recipes to run, such as calibration/*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning_plugins"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    names = [name for name in recipes.names() if fnmatchcase(name, arguments.names)]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        os.environ |= {f"WANDB_{name}_DIR": f"{folder}/{name.lower()}" for name in ("DATA", "CACHE", "CONFIG")}
        os.chdir(folder)
        for name in names:
            text, start, heard = recipes.find(name).text, time.monotonic(), io.StringIO()
            overrides = [option for word, options in SMALLER.items() if word in text for option in options]
            epochs = [] if "max_epochs: 0" in text else ["--trainer.max_epochs=1"]
            try:
                with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                    code = command_line(["run", name, *ONE_BATCH, *epochs, *overrides, "--logger", "wandb"])
                if code:
                    raise RuntimeError(heard.getvalue()[-500:])
                (run,) = Path("runs", name).iterdir()
                seen = check_run(run, name)
                found = [f"{sum(map(len, seen.artifacts.values()))} artifacts", f"{len(seen.summary)} summary values"]
                found += [f"{len(seen.keys('images/separated'))} pictures", f"{len(seen.keys('table-file'))} tables"]
                outcome = ", ".join(found)
            except Exception:
                wrong += 1
                outcome = "WRONG\n" + traceback.format_exc(limit=-2)
            print(f"{name:36}{time.monotonic() - start:6.1f} s   {outcome}", flush=True)
    print(f"{len(names) - wrong} of {len(names)} recipes leave everything in their folder")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
