"""Run a recipe: train, test, export, report. The part of the command line that needs torch."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_plugins.files import write_atomically
from lightning_plugins.logging import define_metric, log_artifact, log_summary
from lightning_plugins.recipes import Recipe
from lightning_plugins.report import write_report

__all__ = ["LoggerName", "RecipeCLI", "RunInterrupted", "run"]

LoggerName = Literal["csv", "tensorboard", "wandb"]

_FROM_DATA = ("num_classes", "in_channels", "image_size", "mean", "std")
_HEADLINES = ("val/acc", "val/robust_acc", "val/distilled_acc")
_RUN_DIR_VARIABLE = "LIGHTNING_PLUGINS_RUN_DIR"  # tells the further processes of one run where the first one writes


class RunInterrupted(Exception):
    """Somebody pressed Ctrl-C or sent SIGTERM; the message says what is left and how to go on.

    Attributes:
        code: the exit status by convention: 128 and the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LastCheckpoint(Checkpoint):
    """Saves each epoch over the one before; the last epoch once all other callbacks have ended the training.

    Calibrators, searches and quantizers do their work when training ends. A checkpoint of the last epoch that is older
    than that would leave a resumed run with nothing to train and their work undone.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless training ends here."""
        over = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        over = over or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if not over and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _save_checkpoint(trainer, self.path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what training and its end have made."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _save_checkpoint(trainer, self.path)


class RecipeCLI(LightningCLI):
    """Build a recipe's parts by LightningCLI, without its subcommands and without ``sys.argv``.

    Model arguments named ``num_classes``, ``in_channels``, ``image_size``, ``mean`` or ``std`` that the recipe leaves
    at None are taken from the data module where it has an attribute of that name: one override changes the data.

    Args:
        recipe: the recipe.
        overrides: ``--key=value`` strings.
        run_dir: folder of the run; None builds the bare recipe, with the Trainer's own defaults for logs.
        loggers: what the Trainer logs to in a run.
        base: a configuration in YAML that wins over the recipe and yields to ``overrides``.
    """

    def __init__(
        self,
        recipe: Recipe,
        overrides: Sequence[str],
        *,
        run_dir: Path | None = None,
        loggers: Sequence[Logger] = (),
        base: str | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.loggers = list(loggers)
        try:
            super().__init__(
                args=["--config", recipe.text, *([] if base is None else ["--config", base]), *overrides],
                run=False,
                save_config_callback=None if run_dir is None else SaveConfigCallback,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            )
        except (ArgumentError, ValueError) as error:
            # ValueError comes from building the parts: jsonargparse packs what they raise into a report of its own.
            if isinstance(error, ArgumentError) or "\nErrors:\n" in str(error):
                raise ValueError(_explain(str(error))) from error
            raise

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse ``args`` alone; Lightning's own method warns if the program has arguments too."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Fill in what the model wants to know about the data."""
        arguments: Any = self.config.get("model.init_args")
        data: Any = self.config.get("data")
        if arguments is None or data is None:
            return
        wanting = [name for name in _FROM_DATA if arguments.get(name, "") is None]
        if not wanting:
            return
        datamodule = self.parser.instantiate_classes(Namespace(data=data.clone())).data  # type: ignore[no-untyped-call]
        for name in wanting:
            value = getattr(datamodule, name, None)
            arguments[name] = list(value) if isinstance(value, tuple) else value
        # Building the data made Lightning note the configuration as it was, for the checkpoint's hyperparameters.
        self.__dict__.pop("config_dump", None)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer; in a run, with its loggers and a checkpoint of the last epoch inside its folder."""
        if self.run_dir is not None:
            trainer = self.config_init.trainer
            kwargs |= {"default_root_dir": str(self.run_dir), "logger": [*self.loggers, *_as_list(trainer.logger)]}
            callbacks = _as_list(trainer.callbacks)
            if trainer.enable_checkpointing is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
                callbacks.append(LastCheckpoint(self.run_dir / "checkpoints" / "last.ckpt"))
            kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)


def run(
    recipe: Recipe,
    overrides: Sequence[str] = (),
    *,
    logger: LoggerName = "csv",
    resume: str | None = None,
    weights: str | None = None,
    root: str = "runs",
) -> Path:
    """Train, test, export and report; return the run's folder.

    Args:
        recipe: the recipe.
        overrides: ``--key=value`` strings.
        logger: where metrics and pictures go besides the files in the run's folder.
        resume: a checkpoint, or the folder of an earlier run; its weights, optimizer and callbacks go on from there.
        weights: a checkpoint, or the folder of an earlier run, to test instead of training. The module and data of that
            run, where its configuration lies beside the checkpoint, take the place of the recipe's.
        root: folder of all runs; this one becomes ``root/<recipe>/<time>``.

    Raises:
        ValueError: for a wrong override, an unusable checkpoint or a folder that cannot be written.
        RunInterrupted: after Ctrl-C or SIGTERM.
    """
    if resume is not None and weights is not None:
        raise ValueError("--resume trains on and --checkpoint only tests; pass one of them")
    checkpoint = None if resume is None else find_checkpoint(resume)
    tested_weights = None if weights is None else find_checkpoint(weights)
    command = ["lightning-plugins", "run", recipe.source, *overrides]
    command += ["--checkpoint", weights] if weights is not None else []
    command += ["--logger", logger] if logger != "csv" else []
    command += ["--root", root] if root != "runs" else []
    run_dir = _make_run_dir(root, recipe.name)
    with _Interruptions(lambda: _how_to_resume(run_dir, command)) as interruptions:
        try:
            return _run(recipe, overrides, run_dir, command, logger, checkpoint, tested_weights, interruptions)
        except BaseException:
            _close_failed_wandb_run()
            raise


def _run(
    recipe: Recipe,
    overrides: Sequence[str],
    run_dir: Path,
    command: list[str],
    logger: LoggerName,
    checkpoint: str | None,
    tested_weights: str | None,
    interruptions: _Interruptions,
) -> Path:
    try:
        base = None if tested_weights is None else _parts_of_run(tested_weights)
        cli = RecipeCLI(recipe, overrides, run_dir=run_dir, loggers=_loggers(logger, run_dir, recipe.name), base=base)
    except BaseException:
        if not any(run_dir.iterdir()):
            run_dir.rmdir()
        raise
    trainer, module, datamodule = cli.trainer, cli.model, cli.datamodule
    interruptions.trainer = trainer
    for wandb_logger in trainer.loggers:
        if isinstance(wandb_logger, WandbLogger):
            wandb_logger.log_hyperparams({"recipe": recipe.name, "config": _plain_config(cli)})
    for key in _HEADLINES:
        define_metric(trainer, key, summary="max")

    seconds: dict[str, float] = {}
    metrics: dict[str, float] = {}
    if tested_weights is None:
        start = time.monotonic()
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        interruptions.check()
        seconds["fit"] = time.monotonic() - start
        if checkpoint is not None and trainer.checkpoint_callback is not None:
            _keep_checkpoint(trainer, run_dir)
        metrics = _floats(trainer.callback_metrics)
    tested = "last" if tested_weights is None else tested_weights
    if is_overridden("test_step", module) and (datamodule is None or is_overridden("test_dataloader", datamodule)):
        start = time.monotonic()
        checkpoint_callback = trainer.checkpoint_callback
        monitors = getattr(checkpoint_callback, "monitor", None) is not None
        if tested_weights is None and monitors and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            tested = "best"
        trainer.test(
            module,
            datamodule=datamodule,
            ckpt_path=None if tested == "last" else tested,
            weights_only=True,
            verbose=False,
        )
        interruptions.check()
        seconds["test"] = time.monotonic() - start
        metrics |= _floats(trainer.callback_metrics)
    if trainer.is_global_zero:
        _finish(cli, run_dir, recipe, command, metrics, seconds, tested)
    return run_dir


class _Interruptions:
    """Turns Ctrl-C and SIGTERM, at whatever moment of a run, into :class:`RunInterrupted`.

    While batches run, Lightning answers both: it stops behind the batch. Before, between and after, we do.

    Args:
        message: makes what the user reads.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.message = message
        self.trainer: pl.Trainer | None = None
        self.before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals are set nowhere else
            self.before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def check(self) -> None:
        """Stop now if SIGTERM came when Lightning no longer looked."""
        if self.trainer is not None and self.trainer.received_sigterm:
            raise _Terminated

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        # Where Lightning listens, its handler has been called before this one, and stops behind the batch.
        if self.trainer is None or not self.trainer.received_sigterm:
            raise _Terminated

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
        if isinstance(error, (_Terminated, SIGTERMException)):
            raise RunInterrupted(self.message(), 128 + signal.SIGTERM) from error
        # Lightning makes an exit of a KeyboardInterrupt.
        stopped = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        if stopped or isinstance(error, KeyboardInterrupt):
            raise RunInterrupted(self.message(), 128 + signal.SIGINT) from error


class _Terminated(BaseException):
    """SIGTERM came while Lightning did not listen."""


def _keep_checkpoint(trainer: pl.Trainer, run_dir: Path) -> None:
    """Save the checkpoint of a run that was resumed when all its training was done, and so saved none itself."""
    if trainer.strategy.broadcast(not any(run_dir.glob("checkpoints/*.ckpt"))):
        _save_checkpoint(trainer, run_dir / "checkpoints" / "last.ckpt")


def _save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint beside the old one, then put it in its place.

    Lightning writes into the machine's temporary folder first and moves the file from there: from another disk that is
    a copy, which may be cut short by a kill or a full disk when the old file is lost already.
    """
    beside = path.with_name(f".{path.name}.part")
    trainer.save_checkpoint(beside, weights_only=False)  # Lightning prints a line where it has to assume that
    if trainer.is_global_zero:
        if path.is_dir():  # some strategies save a folder
            shutil.rmtree(path)
        os.replace(beside, path)


def find_checkpoint(path: str) -> str:
    """Return the checkpoint at a path, or the newest one of a run's folder, after a look at whether it is whole.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    found = Path(path)
    if found.is_dir():
        candidates = sorted(found.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
        if not candidates:
            raise ValueError(f"there is no checkpoint (*.ckpt) in the folder {path!r}; name a run that saved one")
        found = candidates[-1]
    if not found.exists():
        raise ValueError(f"there is no checkpoint {path!r}; pass a .ckpt file or the folder of a run")
    try:
        whole = "state_dict" in torch.load(found, map_location="meta", weights_only=True)
    except Exception:  # torch raises half a dozen types for a damaged file
        whole = False
    if not whole:
        raise ValueError(
            f"the checkpoint {str(found)!r} is damaged or is no Lightning checkpoint; resume from another one"
        )
    return str(found)


def _parts_of_run(checkpoint: str) -> str | None:
    """Return the module and the data of the run that a checkpoint lies in, as YAML; None if that is unknown."""
    for folder in list(Path(checkpoint).absolute().parents)[:2]:
        file = folder / "config.yaml"
        if file.is_file():
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            return str(yaml.safe_dump({name: config[name] for name in ("model", "data") if config.get(name)}))
    return None


def _make_run_dir(root: str, name: str) -> Path:
    if "LOCAL_RANK" in os.environ and _RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[_RUN_DIR_VARIABLE])
    stem = Path(root) / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    run_dir, attempt = stem, 1
    while True:
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError as error:
            if not run_dir.is_dir():
                raise ValueError(
                    f"the run folder {str(run_dir)!r} cannot be made: {error}; choose another --root"
                ) from error
            attempt += 1
            run_dir = stem.with_name(f"{stem.name}-{attempt}")
        except OSError as error:
            raise ValueError(
                f"the run folder {str(run_dir)!r} cannot be made: {error}; choose another --root"
            ) from error
    os.environ[_RUN_DIR_VARIABLE] = str(run_dir.absolute())
    return run_dir


def _loggers(name: LoggerName, run_dir: Path, recipe: str) -> list[Logger]:
    # The CSV logger comes first: its folder is the Trainer's log_dir, and the report reads its file.
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="")]
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    elif name == "wandb":
        # What is passed to W&B wins over its environment variables, and those it reads once in a process.
        loggers.append(
            WandbLogger(
                name=os.environ.get("WANDB_NAME", f"{recipe} {run_dir.name}"),
                project=os.environ.get("WANDB_PROJECT", "lightning-plugins"),
                group=os.environ.get("WANDB_RUN_GROUP", recipe),
                id=os.environ.get("WANDB_RUN_ID"),  # a run goes on under it
                save_dir=run_dir.absolute(),  # its background process keeps the folder that it was started in
            )
        )
    return loggers


def _finish(
    cli: RecipeCLI,
    run_dir: Path,
    recipe: Recipe,
    command: list[str],
    metrics: dict[str, float],
    seconds: dict[str, float],
    tested: str,
) -> None:
    trainer = cli.trainer
    exports: list[Path] = []
    models: list[Path] = []
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if hasattr(callback, "export"):
            paths = callback.export(run_dir / "exports")
            exports += paths
            # What is no model its callback logs as what it is.
            models += paths if getattr(callback, "artifact_type", "model") == "model" else []
    checkpoints = sorted(run_dir.glob("checkpoints/*.ckpt"))
    results = {
        "recipe": recipe.name,
        "description": recipe.header().get("", ""),
        "command": shlex.join(command),
        "seed": cli.config.get("seed_everything"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "weights_tested": tested,
        "metrics": metrics,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": _hardware(trainer),
        "versions": {name: version(name) for name in ("lightning-plugins", "lightning", "torch", "torchvision")},
        "checkpoints": [str(path.relative_to(run_dir)) for path in checkpoints],
        "exports": [str(path.relative_to(run_dir)) for path in exports],
        "highlights": [key for callback in callbacks for key in getattr(callback, "highlights", ())],
    }
    write_atomically(run_dir / "results.json", json.dumps(results, indent=2).encode())
    write_report(run_dir)
    log_summary(trainer, {name: value for name, value in metrics.items() if name.startswith("test/")})
    if models:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", recipe.name)
        metadata = {"recipe": recipe.name, "metrics": metrics}
        log_artifact(trainer, run_dir / "exports", name=name, type="model", metadata=metadata)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _close_failed_wandb_run() -> None:
    """Keep the next run of this process from going on in it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=1)


def _how_to_resume(run_dir: Path, command: list[str]) -> str:
    try:
        checkpoint = find_checkpoint(str(run_dir))
    except ValueError:
        return f"interrupted before the first epoch was saved; nothing is left to resume in {run_dir}"
    return f"interrupted; the last checkpoint is kept. Go on with:\n  {shlex.join([*command, '--resume', checkpoint])}"


def _explain(message: str) -> str:
    """Say in one sentence which key the parser did not like, and why.

    jsonargparse reports on every member of a union, inside each other; the first one apart from None is what the recipe
    means. Its versions differ in order and wording.
    """
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if unknown:
        return f"the override {unknown.group(1)} names no key of this recipe; `lightning-plugins show NAME` prints them"
    path, choices, text = "", [message], message
    while True:
        head, found, rest = text.partition("Errors:\n")
        path += head
        if not found:
            break
        indent = len(rest) - len(rest.lstrip(" "))
        choices = re.split(rf"^ {{{indent}}}- ", rest, flags=re.MULTILINE)[1:]
        choices = [choice for choice in choices if "Expected a <class 'NoneType'>" not in choice[:32]] or choices
        if choices[0].startswith("Expected a"):
            path += rest
            break
        text = choices[0]
    key = ".".join(re.findall(r'Parser key "([^"]+)"', path))
    option = re.search(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", text)
    if option:
        owner = re.findall(r"class_path '([^']+)':\s*(?:Option|Validation)", path)
        return f"{key}.{option.group(1)} is no argument" + (f" of {owner[-1]}" if owner else "")
    expected = [
        re.sub(r"^<class '(?:builtins\.)?(.*)'>$|^typing\.Literal\[(.*)\]$", r"\1\2", kind)
        for choice in choices
        for kind in re.findall(r"^ *Expected a ([^\n]*?)(?:\. Got value: .*)?$", choice, flags=re.MULTILINE)
    ]
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", path, flags=re.MULTILINE)
    if expected and value:
        class_paths = [kind for kind in expected if kind.startswith("dot import path")]
        # Where a class may be given, a list is a list of such classes.
        also = {*class_paths, "list"} if class_paths else set()
        class_paths_apart = [kind for kind in expected if kind not in also]
        kinds = " or ".join(dict.fromkeys(class_paths_apart or ["the path of a class, such as package.Class"]))
        return f"{key} must be {kinds}, got {value.group(1)}"
    text = re.sub(r"Problem with given class_path '.*':|Parser key \".*\":|Type .* expects a .*?:", "", text)
    text = re.sub(r"[.:]? *(?:Got|Given) value(?: type)?: .*", "", text)
    text = text.partition("Subclass types expect")[0]
    reason = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return f"{key}: {reason}" if key else reason


def _hardware(trainer: pl.Trainer) -> str:
    if torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            named = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())
            device = named.group(1) if named else device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{trainer.world_size} x {device}, {cores} CPU cores"


def _plain_config(cli: RecipeCLI) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    return config


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
