"""Measuring, during distillation and after it, how well networks learn from the distilled set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.checks import check_types
from lightning_plugins.distillation.evaluation import (
    NetAccuracies,
    SetEvaluation,
    baseline_sets,
    picture_set,
    set_facts,
    training_tensors,
)
from lightning_plugins.distillation.figures import class_bars
from lightning_plugins.distillation.fresh_nets import TrainedNets, net_seeds, train_nets
from lightning_plugins.distillation.protocol import Protocol, protocol_named
from lightning_plugins.distillation.ranking import improvement_over_random
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_table
from lightning_plugins.modules.dataset_distillation import DatasetDistillation

__all__ = ["DistilledSetEvaluation"]


class DistilledSetEvaluation(pl.Callback):
    """Train fresh networks on the distilled set and test them on the validation or test images.

    In ``fit`` this happens in the validation of the last epoch, and in between if wanted; in ``validate`` and ``test``
    always. Random real images at the same budget are evaluated beside the set, once for each stage. Accuracy is that of
    the networks' last epoch: nothing is chosen by it. With several processes each trains a part of the networks and
    tests all of them on its share of the images.

    Logged, with ``val/`` or ``test/`` before: ``distilled_acc`` (mean over networks), ``distilled_acc_std``,
    ``distilled_acc_worst`` (of the worst class), ``random_acc`` and, for rho > 1, ``mix_acc`` (mosaics of real images),
    ``gain_over_random`` (over the better of the two), ``<architecture>_acc``, ``png_acc`` and ``png_drop``; the figure
    ``distilled_classes`` and the table ``distilled``, which says beside each accuracy what it was reached with.

    Args:
        protocol: ``"house"``, ``"vico"``, ``"idc"`` or ``"ncfm"``, or a :class:`.Protocol`.
        num_nets: networks trained on each set, at least 1.
        every_n_epochs: evaluate in the validation of every n-th epoch too; None for the last epoch alone.
        baselines: whether random real images are evaluated.
        architectures: names of further networks to train on the set, see :func:`.build_model`.
        epochs: in place of the protocol's length.
        steps: likewise, in optimizer steps.
        labels: ``"soft"`` trains on the set's soft labels.
        png: whether the set is evaluated as its exported pictures hold it too, by networks of the same seeds:
            ``png_drop`` is what 8 bits (and, for normalised images that leave [0, 1], the scaling) cost.
        joint: whether the networks are trained at once, see :func:`.train_nets`.
        seed: of networks, orders and random images.

    Raises:
        ValueError: for wrong arguments.
        MisconfigurationException: if the module is no :class:`.DatasetDistillation`, or has no set.

    Example:
        >>> from lightning_plugins.callbacks import DistilledSetEvaluation
        >>> callback = DistilledSetEvaluation("house", num_nets=3, steps=500)
    """

    @check_types
    def __init__(
        self,
        protocol: Protocol | str = "house",
        *,
        num_nets: int = 3,
        every_n_epochs: int | None = None,
        baselines: bool = True,
        architectures: Sequence[str] = (),
        epochs: int | None = None,
        steps: int | None = None,
        labels: Literal["hard", "soft"] = "hard",
        png: bool = False,
        joint: bool | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_nets", num_nets), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if labels not in ("hard", "soft"):
            raise ValueError(f"labels must be 'hard' or 'soft', got {labels!r}")
        if isinstance(architectures, str):
            raise ValueError(f"architectures must be a sequence of names, got the string {architectures!r}")
        self.protocol = protocol_named(protocol).resized(epochs=epochs, steps=steps)
        self.num_nets, self.every_n_epochs, self.baselines = num_nets, every_n_epochs, baselines
        self.architectures, self.labels, self.joint, self.seed = tuple(architectures), labels, joint, seed
        self.png = png
        self._nets: dict[str, TrainedNets] = {}
        self._counts: dict[str, Tensor] = {}
        self._known: dict[str, dict[str, NetAccuracies]] = {}
        self._last: dict[str, float] = {}
        self._fresh: SetEvaluation | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, DatasetDistillation):
            raise MisconfigurationException(
                f"DistilledSetEvaluation evaluates the set of a DatasetDistillation, found {type(pl_module).__name__}; "
                "to train a module on a saved set, use DistilledDataModule"
            )
        log_callback_hyperparameters(trainer, self)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._nets = {}
        if not trainer.sanity_checking and self._due(trainer):
            self._train(trainer, pl_module, "val")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._train(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        if not self._last:
            return {}
        known = {
            stage: {name: [list(found.accuracies), list(found.per_class)] for name, found in rows.items()}
            for stage, rows in self._known.items()
        }
        return {"baselines": known, "last": dict(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._known = {
            stage: {name: NetAccuracies(tuple(found[0]), tuple(found[1])) for name, found in rows.items()}
            for stage, rows in state_dict["baselines"].items()
        }
        self._last = dict(state_dict["last"])

    # Mechanism

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn != "fit":
            return True
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        return last or (self.every_n_epochs is not None and epoch % self.every_n_epochs == 0)

    def _train(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        module = self._module(pl_module)
        synthetic = self._set(module)
        sources: dict[str, SyntheticSet] = {"distilled": synthetic}
        if self.baselines and stage not in self._known:
            sources |= baseline_sets(synthetic, module.real_images(trainer), seed=self.seed)
        self._nets = {}
        with isolate_rng():
            jobs: list[tuple[str, SyntheticSet, str | None, bool]]
            jobs = [(name, source, None, name == "distilled") for name, source in sources.items()]
            jobs += [("png", picture_set(synthetic), None, True)] if self.png else []
            jobs += [(name, synthetic, name, True) for name in self.architectures]
            for name, source, model, own in progress_bar(jobs, title="sets to train networks on", delay=0):
                self._nets[name] = self._trained(trainer, module, source, model, own)
        self._counts = {
            name: torch.zeros(len(nets) + 1, synthetic.num_classes, dtype=torch.int64, device=module.device)
            for name, nets in self._nets.items()
        }

    def _trained(
        self, trainer: pl.Trainer, module: DatasetDistillation, source: SyntheticSet, model: str | None, own: bool
    ) -> TrainedNets:
        images, targets = training_tensors(source, soft=own and self.labels == "soft")
        if source.space == "pixel" and own:  # the last step may have left [0, 1], which the exported set does not
            images = source.normalise(source.decode().detach().clamp(0, 1)).flatten(0, 1)
        quick = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        protocol = self.protocol.resized(steps=1) if quick else self.protocol.for_set(source)
        number = 1 if quick else self.num_nets
        share = -(-number // trainer.world_size)
        first = trainer.global_rank * share
        # Dropout in a network draws from the global generator; the caller has set it aside.
        torch.manual_seed(self.seed + first)
        nets = train_nets(
            module.net_factory(model),
            images.to(module.device),
            targets.to(module.device),
            num_classes=source.num_classes,
            protocol=protocol,
            seeds=net_seeds(self.seed, range(first, first + share)),
            joint=False if model is not None else self.joint,
        )
        if trainer.world_size > 1:
            state = {
                name: trainer.strategy.all_gather(value).flatten(0, 1)[:number] for name, value in nets.state.items()
            }
            nets = TrainedNets(nets.net, state)
        return nets

    def _count(self, pl_module: pl.LightningModule, batch: Any) -> None:
        if not self._nets:
            return
        synthetic = self._set(self._module(pl_module))
        images, labels = batch[:2]
        normal = (images.float() - synthetic.mean.view(-1, 1, 1)) / synthetic.std.view(-1, 1, 1)
        with torch.autocast(images.device.type, enabled=False):
            for name, nets in self._nets.items():
                self._counts[name] += nets.counts(normal, labels, synthetic.num_classes)

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        module = self._module(pl_module)
        if self._nets:
            found = {
                name: NetAccuracies.of(trainer.strategy.reduce(counts, reduce_op="sum"))
                for name, counts in self._counts.items()
            }
            others = {name: found.pop(name) for name in self.architectures}
            distilled, png = found.pop("distilled"), found.pop("png", None)
            if found:
                self._known[stage] = found
            baselines = self._known.get(stage, {})
            soft = self.labels == "soft"
            facts = set_facts(self._set(module), soft=soft)
            self._fresh = SetEvaluation(self.protocol, distilled, baselines, others, facts, png)
            module.results[stage] = self._fresh.to_dict()
            values = {
                "distilled_acc": distilled.mean,
                "distilled_acc_std": distilled.std,
                "distilled_acc_worst": min(value for value in distilled.per_class if value == value),
            }
            values |= {f"{name}_acc": row.mean for name, row in {**baselines, **others}.items()}
            if png is not None:
                values |= {"png_acc": png.mean, "png_drop": distilled.mean - png.mean}
            if baselines:
                best = max(row.mean for row in baselines.values())
                values["gain_over_random"] = improvement_over_random(distilled.mean, best)
            self._last = {name: value for name, value in self._last.items() if not name.startswith(f"{stage}/")}
            self._last |= {f"{stage}/{name}": value for name, value in values.items()}
            self._nets = {}
        shown = {name: value for name, value in self._last.items() if name.startswith(f"{stage}/")}
        # The counts were summed over the processes; sync_dist only tells Lightning so.
        module.log_dict(shown, sync_dist=True, batch_size=1)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._fresh is None or not trainer.loggers:
            return
        evaluation, synthetic = self._fresh, self._set(self._module(pl_module))
        self._fresh = None
        rows = {"distilled": evaluation.distilled, **evaluation.baselines, **evaluation.architectures}
        if evaluation.png is not None:
            rows["png"] = evaluation.png
        names = synthetic.class_names or tuple(map(str, range(synthetic.num_classes)))
        bars = {name: row.per_class for name, row in rows.items()}
        log_figure(trainer, f"{stage}/distilled_classes", class_bars(bars, names, label="accuracy", percent=True))
        facts = evaluation.facts
        columns = ["trained on", "accuracy", "std over nets", "nets", "protocol", *facts]
        plain = {"images_per_class": synthetic.images_per_class, "labels": "hard", "selection": facts["selection"]}
        table = []
        for name, row in rows.items():
            about = plain | {"rho": 1, "decoded_per_class": synthetic.images_per_class} if name == "random" else facts
            cells = [about.get(key) for key in facts]
            label = f"distilled, {name}" if name in evaluation.architectures else name
            table.append([label, row.mean, row.std, len(row.accuracies), evaluation.protocol.name, *cells])
        log_table(trainer, f"{stage}/distilled", columns, table)

    @staticmethod
    def _module(pl_module: pl.LightningModule) -> DatasetDistillation:
        if not isinstance(pl_module, DatasetDistillation):
            raise TypeError(f"expected a DatasetDistillation, found {type(pl_module).__name__}")
        return pl_module

    @staticmethod
    def _set(module: DatasetDistillation) -> SyntheticSet:
        if module.synthetic is None:
            raise MisconfigurationException(
                "DistilledSetEvaluation found no set; run trainer.fit before, or pass ckpt_path= of a distillation"
            )
        return module.synthetic
