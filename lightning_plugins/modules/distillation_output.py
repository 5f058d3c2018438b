"""What a distillation shows while it runs, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_plugins.distillation.figures import class_bars, image_grid
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.logging import log_artifact, log_figure, log_image, log_table

__all__ = ["SetExport", "image_quantities", "show_set"]


class SetExport(pl.Callback):
    """Writes the set of a distillation when a run is exported; the runner asks callbacks for that."""

    artifact_type = "dataset"  # logged by `export` itself, with what the set is known by
    _module: Any = None
    _trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose set it is."""
        self._trainer, self._module = trainer, pl_module if hasattr(pl_module, "export_set") else None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the settings as a table, or the images where nothing was distilled and no setting counted."""
        if self._module is None or self._module.config is None or not trainer.loggers:
            return
        if not trainer.global_step:
            if trainer.is_global_zero:
                show_set(trainer, self._module.synthetic, start=None, class_losses=None)
        else:
            rows = [[name, str(value)] for name, value in self._module.config.items()]
            log_table(trainer, "distillation/settings", ["setting", "value"], rows)

    def export(self, directory: Path) -> list[Path]:
        """Write the set into ``directory``; to Weights & Biases it goes as an artifact of type ``dataset``."""
        module, trainer = self._module, self._trainer
        if module is None or trainer is None or module.synthetic is None:
            return []
        paths: list[Path] = module.export_set(directory)
        data = str(module.about()["data"].get("name", "data")).removesuffix("DataModule").lower()
        name = f"distilled-{data}-{module.preset}-ipc{module.synthetic.images_per_class}"
        metadata: Mapping[str, Any] = module.about() | {"images_per_class": module.synthetic.images_per_class}
        log_artifact(trainer, directory, name=name, type="dataset", metadata=metadata)
        return paths


def image_quantities(synthetic: SyntheticSet) -> dict[str, Tensor]:
    """Return what the log says of the images: their gradient, range, spread and share at a bound."""
    pixels = synthetic.pixels(synthetic.images.detach())
    gradient = synthetic.images.grad
    return {
        "gradient_norm_images": pixels.new_zeros(()) if gradient is None else gradient.norm(),
        "pixel_min": pixels.min(),
        "pixel_max": pixels.max(),
        "pixel_std": pixels.std(),
        "pixel_clamped": ((pixels <= 0) | (pixels >= 1)).float().mean(),
    }


@torch.no_grad()
def show_set(
    trainer: pl.Trainer, synthetic: SyntheticSet, *, start: Tensor | None, class_losses: Tensor | None
) -> None:
    """Log the images, decoded where that differs, what changed since ``start``, and the loss of each class."""
    if not trainer.loggers:
        return
    images = synthetic.images.detach()
    log_image(trainer, "distillation/images", image_grid(synthetic.pixels(images)))
    if synthetic.rho > 1:
        log_image(trainer, "distillation/images_decoded", image_grid(synthetic.pixels(synthetic.decode())))
    if start is not None:
        change = (synthetic.pixels(images) - synthetic.pixels(start.to(images))) / 2 + 0.5
        log_image(trainer, "distillation/images_change", image_grid(change))
    if class_losses is not None:
        names = synthetic.class_names or tuple(map(str, range(len(images))))
        figure = class_bars({"loss": class_losses.tolist()}, names, label="loss")
        log_figure(trainer, "distillation/loss_per_class", figure)
