r"""What a registered callback costs in a step where it has nothing to do, and what importing the package costs.

    python benchmarks/speed/overhead.py --json benchmarks/results/speed_overhead.json \
        --markdown docs/results/speed_overhead.md

A linear layer of four weights on one sample, so that a step is almost nothing but Lightning. Every contender is a fit
of its own, whose time is the 5th percentile of those between two training steps: on a shared machine the mean and even
the median of a fit move by more than a callback costs. Contenders run in turn, in an order that rotates from round to
round. A callback's cost is the median over rounds of its time less that of the same round's Trainer without callbacks.
CPU time is the figure to read on a busy machine. Callbacks that override no hook of a training step cost what the empty
one does, by construction; the table names them. About three minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from interleaved import environment, write
from tables import overhead as markdown
from torch import Tensor, nn

from lightning_plugins import callbacks as ours
from lightning_plugins.robustness import PGDAttack

IDLE_GOAL, RECORDING_GOAL = 15.0, 60.0  # microseconds
BASELINE, EMPTY = "Trainer without callbacks", "empty Callback"
WARM_UP = 50
STEP_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "around_training_step"),
)


class Done(Exception):
    """The time is taken; what callbacks do at the end of a fit is not looked at."""


class Tiny(pl.LightningModule):
    """Four weights, and a clock."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2, bias=False))
        self.last = num_steps - 1
        self.clock: list[tuple[int, int]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take the time and return the loss."""
        self.clock.append((time.perf_counter_ns(), time.process_time_ns()))
        if batch_idx == self.last:
            raise Done
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing; some callbacks want validation to exist."""

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def microseconds(self) -> tuple[float, float]:
        """Return wall and CPU time of an undisturbed step."""
        wall, cpu = torch.tensor(self.clock[WARM_UP:]).diff(dim=0).double().quantile(0.05, dim=0).tolist()
        return wall / 1000, cpu / 1000


class JustCalls(ours.TrainingStepCallback):
    """The least that a callback around the training step can do."""

    def around_training_step(self, trainer: Any, pl_module: Any, step: Any, batch: Any, batch_idx: int) -> Any:
        """Run the step."""
        return step(batch, batch_idx)


class Logs(pl.Callback):
    """One ``log`` for each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        pl_module.log("loss", outputs["loss"])


class Loader:
    """The same sample again and again; a list would be several loaders to Lightning."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.tensor([[0.2, 0.8]]), torch.tensor([1]))] * self.num_steps)


def fit(callbacks: Sequence[pl.Callback], num_steps: int) -> tuple[float, float]:
    """Return wall and CPU microseconds of a step under a Trainer."""
    module = Tiny(num_steps)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    with contextlib.suppress(Done):
        trainer.fit(module, Loader(num_steps), Loader(1))
    return module.microseconds()


def raw(num_steps: int) -> tuple[float, float]:
    """Return the same of a loop in plain torch."""
    module = Tiny(num_steps)
    optimizer = module.configure_optimizers()
    with contextlib.suppress(Done):
        for index, batch in enumerate(Loader(num_steps)):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
    return module.microseconds()


# Each has nothing to do in a training step; what makes it so is in its arguments.
PIXELS = {"mean": [0.0], "std": [1.0]}
IDLE: dict[str, Callable[[], pl.Callback]] = {
    "TrainingStepCallback that calls the step": JustCalls,
    "AdversarialWeightPerturbation, before its start": lambda: ours.AdversarialWeightPerturbation(warmup_epochs=9),
    "CatastrophicOverfittingGuard, after the first batch": lambda: ours.CatastrophicOverfittingGuard(
        PGDAttack(0.1, num_steps=1), **PIXELS
    ),
    "PostHocCalibration": ours.PostHocCalibration,
    "PostHocCalibration at the end of the fit": lambda: ours.PostHocCalibration(when="fit_end"),
    "CalibrationMonitor": lambda: ours.CalibrationMonitor(["nll"]),
    "RobustnessEvaluation": lambda: ours.RobustnessEvaluation(PGDAttack(0.1, num_steps=1), **PIXELS),
}
# Each writes something down in every step.
RECORDING: dict[str, Callable[[], pl.Callback]] = {
    "MixedSampleAugmentation, after its end": lambda: ours.MixedSampleAugmentation(stop_epoch=0),
}


def without_step_hooks() -> list[str]:
    """Name our callbacks that override nothing that Lightning calls in a training step."""

    def idle(callback: type[pl.Callback]) -> bool:
        return all(getattr(callback, hook, None) is getattr(pl.Callback, hook, None) for hook in STEP_HOOKS)

    return [name for name in ours.__all__ if idle(getattr(ours, name))]


def measure_steps(num_steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds of a step, and what is above the Trainer without callbacks, by contender."""
    fits = {BASELINE: [], EMPTY: [pl.Callback], "one self.log": [Logs]}
    fits |= {name: [make] for name, make in {**IDLE, **RECORDING}.items()}
    runs: dict[str, Callable[[], tuple[float, float]]] = {"raw loop": lambda: raw(num_steps)}
    for name, makes in fits.items():
        runs[name] = lambda makes=makes: fit([make() for make in makes], num_steps)  # type: ignore[misc]
    names = list(runs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        runs[name]()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            gc.disable()
            try:
                times[name].append(runs[name]())
            finally:
                gc.enable()
    rows = {}
    for name, taken in times.items():
        rows[name] = {}
        for which, kind in enumerate(("wall", "cpu")):
            above = [one[which] - base[which] for one, base in zip(taken, times[BASELINE], strict=True)]
            rows[name] |= {
                f"{kind}_us": statistics.median(one[which] for one in taken),
                f"{kind}_above_us": statistics.median(above),
                f"{kind}_above_spread_us": max(above) - min(above),
                f"{kind}_above_quartiles_us": quartiles(above),
            }
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third one."""
    first, _, third = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return [first, third]


def measure_starts(rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of fresh processes, started in turn."""
    program = [sys.executable, "-c"]
    commands = {
        "python": [*program, "pass"],
        "import torch": [*program, "import torch"],
        "import lightning.pytorch": [*program, "import lightning.pytorch"],
        "import lightning_plugins": [*program, "import lightning_plugins"],
        "import lightning_plugins.callbacks": [*program, "import lightning_plugins.callbacks"],
        "lightning-plugins --help": [str(Path(sys.executable).with_name("lightning-plugins")), "--help"],
        "lightning-plugins list": [str(Path(sys.executable).with_name("lightning-plugins")), "list"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def main() -> None:
    """Measure, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each fit")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--start-rounds", type=int, default=3, help="of the fresh processes")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's tables to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = measure_steps(options.steps, options.rounds)
    starts = measure_starts(options.start_rounds)
    report = {
        "environment": environment("lightning"),
        "steps": options.steps,
        "rounds": options.rounds,
        "start_rounds": options.start_rounds,
        "goals_us": {"idle": IDLE_GOAL, "recording": RECORDING_GOAL},
        "worst_idle_cpu_us": max(rows[name]["cpu_above_us"] for name in IDLE),
        "worst_recording_cpu_us": max(rows[name]["cpu_above_us"] for name in RECORDING),
        "without_step_hooks": without_step_hooks(),
        "rows": rows,
        "starts_ms": {name: min(taken) for name, taken in starts.items()},
        "starts_median_ms": {name: statistics.median(taken) for name, taken in starts.items()},
    }
    print(markdown(report))
    for kind, goal in (("idle", IDLE_GOAL), ("recording", RECORDING_GOAL)):
        print(f"{kind}: at most {report[f'worst_{kind}_cpu_us']:.1f} us of CPU a step; the goal is {goal:.0f}")
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
