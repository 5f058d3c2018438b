"""What a test measured in each state of a net, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_plugins.callbacks._variants import variants
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_table
from lightning_plugins.variants import figures_by_variant, variants_figure

__all__ = ["VariantComparison"]

_QUANTITIES = ("clean_acc", "robust_acc_balanced", "ece_before", "ece_after", "nll_before", "nll_after")


class VariantComparison(pl.Callback):
    """Put what a test measured in each state of a net into one table and one picture.

    The states are those of the other callbacks: the precisions of :class:`MultiPrecisionQAT`, the net of
    :class:`PlainTwin`. What :class:`RobustnessEvaluation` (with ``per_variant=True``), :class:`PostHocCalibration` and
    others have logged of them under ``test/<quantity>_<state>`` is read, nothing is measured again. The size is that of
    a file with the state alone: packed for a quantized net, all tensors as they are for a plain one.

    Logged: ``test/size_kb_<state>`` (1 kB is 1000 bytes), and the table and the figure under ``key``.

    Args:
        quantities: the columns, names of test metrics without stage and state; those that nobody logged are left out.
        pictured: those of them that are drawn too; default all.
        key: of table and figure.

    Raises:
        ValueError: for no quantities, or drawn ones that are not among them.

    Warns:
        UserWarning: in ``test``, if the net has no states, or nothing was logged of them.

    Example:
        >>> from lightning_plugins.callbacks import MultiPrecisionQAT, PostHocCalibration, VariantComparison
        >>> callbacks = [MultiPrecisionQAT((8, 4, 2)), PostHocCalibration(), VariantComparison(["ece_after"])]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    @check_types
    def __init__(
        self,
        quantities: Sequence[str] = _QUANTITIES,
        *,
        pictured: Sequence[str] | None = None,
        key: str = "test/variants",
    ) -> None:
        if isinstance(quantities, str) or not quantities:
            raise ValueError(f"quantities must be a list of names such as 'ece_after', got {quantities!r}")
        self.quantities, self.key = tuple(quantities), key
        self.pictured = self.quantities if pictured is None else tuple(pictured)
        if not set(self.pictured) <= set(self.quantities):
            raise ValueError(f"pictured must be among quantities {self.quantities}, got {self.pictured}")
        self.highlights = (key,)  # a report shows them first
        self.columns: list[str] = []
        self.rows: list[list[Any]] = []
        self._sizes: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            log_callback_hyperparameters(trainer, self)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes = {name: owner.variant_bytes(pl_module, name) for name, owner in variants(trainer).items()}
        self._sizes = {name: size / 1000 for name, size in sizes.items() if size is not None}
        pl_module.log_dict({f"test/size_kb_{name}": size for name, size in self._sizes.items()}, sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        owners = variants(trainer)
        figures = figures_by_variant(trainer.callback_metrics, list(owners), self.quantities)  # type: ignore[arg-type]
        found = [q for q in self.quantities if any(q in each for each in figures.values())]
        self.columns = ["net", "size_kb", *found]
        self.rows = [
            [name, self._sizes.get(name), *(each.get(quantity) for quantity in found)] for name, each in figures.items()
        ]
        if not found:
            rank_zero_warn(
                f"VariantComparison found nothing to compare: no test metric is named after one of {self.quantities} "
                f"and one of the states {list(owners)}; add callbacks that measure them, such as PostHocCalibration."
            )
            return
        if not trainer.loggers:
            return
        log_table(trainer, self.key, self.columns, self.rows)
        drawn = figures_by_variant(trainer.callback_metrics, list(self._sizes), self.pictured)  # type: ignore[arg-type]
        if any(drawn.values()):
            apart = [name for name, owner in owners.items() if owner.another_net]
            log_figure(trainer, self.key, variants_figure(drawn, self._sizes, apart=apart))
