"""Pictures, tables, late scalars and hyper-parameters, to whichever Lightning loggers a Trainer has.

Every function takes the Trainer first and may be called on every rank: only rank 0 acts. Without a logger, under
``fast_dev_run`` and during the sanity check before training nothing is written, as with ``pl_module.log``.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "define_metric",
    "log_artifact",
    "log_callback_hyperparameters",
    "log_figure",
    "log_image",
    "log_metrics",
    "log_summary",
    "log_table",
]


def log_image(
    trainer: pl.Trainer, key: str, image: Tensor | np.ndarray[Any, Any], *, caption: str | None = None
) -> None:
    """Send one picture to every logger at ``trainer.global_step``.

    Weights & Biases gets an image, TensorBoard too; any other logger gets the file
    ``<run folder>/media/<key>-step_<8 digits>.png``, so that the last name of a key is its newest picture. The caption
    is shown by Weights & Biases and kept in the PNG file (text chunk ``Description``); TensorBoard has no place for it.
    A picture that cannot be stored, because a disk is full for instance, costs a warning and never the training.

    Args:
        trainer: the Trainer whose loggers are served.
        key: name such as ``calibration/reliability``; slashes make folders.
        image: tensor ``(C, H, W)`` or ``(H, W)``, or array ``(H, W, C)`` or ``(H, W)``, with C = 1 (grey) or 3 (RGB);
            floating point in [0, 1] (rounding errors up to 0.001 are clipped) or ``uint8`` in [0, 255].
        caption: one line of text.

    Raises:
        TypeError: for another type of image or of its elements.
        ValueError: for another shape, values out of range or not finite, or a key that leaves the folder.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> log_image(trainer, "distillation/images", torch.rand(3, 32, 32), caption="no logger: goes nowhere")
    """
    _check_key(key)
    loggers = _loggers(trainer)
    if not loggers:
        return
    picture, step = _to_picture(image), trainer.global_step

    def send(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(picture)
            logger.experiment.add_image(key, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")
        else:
            from PIL.PngImagePlugin import PngInfo

            information = PngInfo()
            if caption is not None:
                information.add_text("Description", caption)
            buffer = io.BytesIO()
            picture.save(buffer, format="png", pnginfo=information)
            write_atomically(_media_path(trainer, logger, key, ".png"), buffer.getvalue())

    _send_to_each(loggers, key, send)


def log_figure(trainer: pl.Trainer, key: str, figure: Figure) -> None:
    """Send a matplotlib figure to every logger, as the same picture; see :func:`log_image`.

    The figure is left as it is and not closed; one made by ``matplotlib.figure.Figure()``, without ``pyplot``, needs no
    closing.

    Args:
        trainer: the Trainer whose loggers are served.
        key: name such as ``calibration/reliability``.
        figure: the figure; drawn at its own resolution, at least 150 dots per inch.

    Raises:
        TypeError: if ``figure`` is not a matplotlib ``Figure``.
        ValueError: for a key that leaves the folder.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = Figure()
        >>> line = figure.add_subplot().plot([0, 1], [0, 1])
        >>> log_figure(pl.Trainer(logger=False, enable_checkpointing=False), "calibration/reliability", figure)
    """
    from matplotlib.figure import Figure
    from PIL import Image

    _check_key(key)
    if not isinstance(figure, Figure):
        raise TypeError(
            f"figure must be a matplotlib Figure, got {type(figure).__name__}; for Axes pass its .figure, for pixels "
            "use log_image"
        )
    if not _loggers(trainer):
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=max(figure.dpi, 150))
    log_image(trainer, key, np.asarray(Image.open(buffer).convert("RGB")))


def log_table(trainer: pl.Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table to every logger: a W&B table, text in TensorBoard, otherwise a CSV file under ``media/``.

    Args:
        trainer: the Trainer whose loggers are served.
        key: name such as ``quantization/layers``.
        columns: names of the columns.
        rows: cells by row: numbers, strings, None, scalar tensors; other objects as their ``str``.

    Raises:
        ValueError: if a row has another length than ``columns``, or for a key that leaves the folder.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> log_table(trainer, "quantization/layers", ["layer", "bits"], [["conv1", 8], ["conv2", 4]])
    """
    _check_key(key)
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"every row needs one cell for each of the {len(columns)} columns, but row {number} has {len(row)}; "
                "fill empty cells with None"
            )
    columns, cells, step = list(columns), [[_plain(cell) for cell in row] for row in rows], trainer.global_step

    def send(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            import wandb

            # Not logger.log_table: its table refuses a column that holds both numbers and words.
            table = wandb.Table(columns=[*columns], data=cells, allow_mixed_types=True)
            logger.log_metrics({key: table}, step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown(columns, cells), step)
        else:
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerows([columns, *cells])
            write_atomically(_media_path(trainer, logger, key, ".csv"), buffer.getvalue().encode())

    _send_to_each(_loggers(trainer), key, send)


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Send scalars to every logger at ``trainer.global_step``, from hooks where ``pl_module.log`` is not allowed.

    Those are ``on_fit_end``, ``on_train_end``, ``on_validation_end`` and their like. The values are rank 0's: reduce
    them first where ranks differ. They do not appear in ``trainer.callback_metrics``.

    Args:
        trainer: the Trainer whose loggers are served.
        metrics: numbers or scalar tensors by name; NaN and infinity are passed on.

    Raises:
        ValueError: for a value that is not one number.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> log_metrics(trainer, {"calibration/temperature": torch.tensor(1.7)})
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metrics must hold one number for each name, but {name!r} is {_describe(value)}; reduce it first or "
                "use log_table"
            ) from error
    for logger in _loggers(trainer):
        logger.log_metrics(numbers, step=trainer.global_step)
        logger.save()  # after fit nobody else may come by to flush


def log_summary(trainer: pl.Trainer, metrics: Mapping[str, Any]) -> None:
    """Set headline values in the summary of a Weights & Biases run: what its table of runs shows.

    Other loggers have no summary and are left alone; send the series with ``pl_module.log`` or :func:`log_metrics`.

    Args:
        trainer: the Trainer whose loggers are served.
        metrics: numbers, strings or scalar tensors by name.

    Example:
        >>> log_summary(pl.Trainer(logger=False, enable_checkpointing=False), {"calibration/ece": 0.013})
    """
    for logger in _wandb_loggers(trainer):
        logger.experiment.summary.update({_prefixed(logger, name): _plain(value) for name, value in metrics.items()})


def define_metric(trainer: pl.Trainer, key: str, *, summary: Literal["max", "min", "last"]) -> None:
    """Choose which value of a series a Weights & Biases run shows as its summary; other loggers are left alone.

    Args:
        trainer: the Trainer whose loggers are served.
        key: name of the metric as it is logged, such as ``val/robust_acc``.
        summary: the largest value, the smallest, or the last one (what W&B does by itself).

    Raises:
        ValueError: for another ``summary``.

    Example:
        >>> define_metric(pl.Trainer(logger=False, enable_checkpointing=False), "val/robust_acc", summary="max")
    """
    if summary not in ("max", "min", "last"):
        raise ValueError(f"summary must be 'max', 'min' or 'last', got {summary!r}")
    for logger in _wandb_loggers(trainer):
        # A metric with a definition of its own leaves Lightning's "*", so the axis has to be said again.
        logger.experiment.define_metric(
            _prefixed(logger, key), step_metric="trainer/global_step", step_sync=True, summary=summary
        )


def log_artifact(
    trainer: pl.Trainer, path: str | Path, *, name: str, type: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Hand a file or folder that the run produced to Weights & Biases as an artifact; other loggers are left alone.

    Args:
        trainer: the Trainer whose loggers are served.
        path: the file or folder; copied now, so that later changes do not matter.
        name: letters, digits, dashes, underscores and dots; the same name again makes a new version.
        type: what it is, such as ``dataset`` or ``model``.
        metadata: plain values that W&B shows beside it: method, seed, source. Infinities and NaN become strings.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: for a name that W&B refuses, or more than 100 entries of metadata.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> log_artifact(trainer, ".", name="distilled-digits", type="dataset", metadata={"images_per_class": 10})
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"name may hold letters, digits, dashes, underscores and dots, got {name!r}; rename it")
    if metadata is not None and len(metadata) > 100:
        raise ValueError(f"W&B takes 100 entries of metadata, got {len(metadata)}; group them in dictionaries")
    if not trainer.is_global_zero:  # the other ranks need not see the file
        return
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"nothing to log as artifact {name!r} at {path}; write it first, on rank 0")
    for logger in _wandb_loggers(trainer):
        import wandb

        artifact = wandb.Artifact(name, type=type, metadata=_finite(_plain(dict(metadata or {}))))
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        logger.experiment.log_artifact(artifact)


def log_callback_hyperparameters(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Log a callback's constructor arguments as ``lightning_plugins/<class>/<argument>``; call it in ``setup``.

    An argument is found under its own name on the callback; one that is not kept there is left out. Numbers, strings,
    truth values and None stay as they are, tuples become lists (they keep ``hparams.yaml`` plain YAML), objects a short
    text such as ``TemperatureScaling()``. A second callback of the same class among ``trainer.callbacks`` is logged as
    ``<class>_2``. In TensorBoard the values go to ``hparams.yaml``; the HParams tab and its ``hp_metric`` stay as the
    module wrote them, since TensorBoard shows one set of hyper-parameters per run.

    Args:
        trainer: the Trainer whose loggers are served.
        callback: the callback.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> log_callback_hyperparameters(trainer, EarlyStopping("val/loss", patience=5))
    """
    name = type(callback).__name__
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    same = [other for other in callbacks if type(other) is type(callback)]
    number = next((number for number, other in enumerate(same, 1) if other is callback), 1)
    if number > 1:
        name += f"_{number}"
    params = {
        f"lightning_plugins/{name}/{argument}": _plain(getattr(callback, argument))
        for argument in inspect.signature(type(callback)).parameters
        if hasattr(callback, argument)
    }
    if not params:
        return
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(params, metrics={})
        else:
            logger.log_hyperparams(params)


def _loggers(trainer: pl.Trainer) -> list[Logger]:
    if not trainer.is_global_zero or trainer.sanity_checking:
        return []
    return [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]


def _wandb_loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    return [logger for logger in _loggers(trainer) if isinstance(logger, WandbLogger)]


def _prefixed(logger: WandbLogger, key: str) -> str:
    # The logger prepends its prefix to what goes through log_metrics; summary and definitions bypass that.
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{key}" if logger._prefix else key


def _send_to_each(loggers: Sequence[Logger], key: str, send: Callable[[Logger], None]) -> None:
    for logger in loggers:
        try:
            send(logger)
        except OSError as error:
            rank_zero_warn(
                f"{key!r} was not stored for {type(logger).__name__}: {error}. Training goes on; free space or make "
                "the folder writable to get the next one."
            )


def _check_key(key: str) -> None:
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", key):
        raise ValueError(
            f"key names a file below the run's media folder, got {key!r}; use words joined by '/', such as "
            "'calibration/reliability', without '..', a leading '/', ':' or '\\'"
        )


def _media_path(trainer: pl.Trainer, logger: Logger, key: str, suffix: str) -> Path:
    # Not trainer.log_dir: that is the first logger's, and it is a collective call.
    folder = os.fspath(getattr(logger, "log_dir", None) or trainer.default_root_dir)
    if "://" in folder:
        raise OSError(f"media files need a local folder, not {folder}")
    return Path(folder, "media", f"{key}-step_{trainer.global_step:08d}{suffix}")


def _to_picture(image: Tensor | np.ndarray[Any, Any]) -> Image:
    from PIL import Image

    found = _describe(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.ndim == 3:
            image = image.permute(1, 2, 0)
        pixels = (image.float() if image.is_floating_point() else image).numpy()
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise TypeError(f"image must be a tensor (C, H, W) or an array (H, W, C), got {found}; convert it first")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)) or pixels.size == 0:
        raise ValueError(
            f"image must be one picture, a tensor (H, W) or (C, H, W) or an array (H, W) or (H, W, C) with 1 or 3 "
            f"channels, got {found}; pick one of a batch or tile it with torchvision.utils.make_grid"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = pixels.min(), pixels.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails too
            raise ValueError(
                f"image values must lie in [0, 1], found {low:.4g} to {high:.4g}; undo the normalization or rescale it"
            )
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise TypeError(f"image must be floating point in [0, 1] or uint8, got {found}; convert it first")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else np.ascontiguousarray(pixels))


def _describe(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Return what every logger can store: numbers, strings, None, lists and dictionaries of them."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, (bool, int, float, str)) and type(value).__module__ == "builtins" or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__name__
    text = repr(value)
    # Layers span lines and default representations hold an address that differs in each run.
    return f"{type(value).__name__}()" if "\n" in text or " at 0x" in text or len(text) > 100 else text


def _finite(value: Any) -> Any:
    """Replace what JSON has no numbers for; W&B refuses an artifact that holds it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, dict) else value


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        # A bar would end the cell and a line break the table.
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
