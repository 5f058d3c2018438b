"""Learn a small training set that stands for a large one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_plugins.distillation.assembly import build_augmentation, build_objective, fresh_copy
from lightning_plugins.distillation.characteristic_function import SamplingNetwork
from lightning_plugins.distillation.decode import decode
from lightning_plugins.distillation.extractors import ExtractorBank, RandomExtractors
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.memory import free_bytes, step_bytes
from lightning_plugins.distillation.net_training import NetTraining
from lightning_plugins.distillation.objectives import (
    CalibrationTerm,
    CharacteristicFunction,
    GradientMatching,
    Objective,
    ObjectiveDraw,
    ObjectiveLoss,
)
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.distillation.presets import DistillationSettings, PresetName, merged, preset_settings
from lightning_plugins.distillation.stepping import vectorised_constants
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.gradients import grad_context
from lightning_plugins.models import build_model
from lightning_plugins.modules.distillation_data import read_pool, take_over_training_loader
from lightning_plugins.modules.distillation_output import SetExport, image_quantities, show_set

__all__ = ["DatasetDistillation"]

T = TypeVar("T")


class DatasetDistillation(pl.LightningModule):
    """Learn a few synthetic images of each class, so that networks trained on them alone classify real images.

    The real images come from the Trainer's data module: those of its ``train_set``, without augmentation, kept on the
    device. An iteration compares them with the synthetic ones once and changes the synthetic ones; an epoch is
    ``iterations_per_epoch`` of them, and ``trainer.global_step`` counts iterations. What is compared, and every number,
    comes from a preset, and from ``settings`` where they say otherwise; the result is printed and kept in the
    hyper-parameters.

    The networks that look at the images belong neither to the checkpoint nor to the parameters. A resumed run goes on
    bit by bit where its checkpoint was written. With several processes each takes a part of the classes.
    ``32-true`` and ``bf16-mixed`` are supported; gradient matching computes in float32 either way.

    Logged every ``log_every_n_steps`` iterations, with ``distillation/`` before: ``loss`` (mean over classes),
    ``calibration_loss``, quantities of the objective, ``gradient_norm_images``, ``pixel_min``, ``pixel_max``,
    ``pixel_std``, ``pixel_clamped`` (share of values at 0 or 1), ``lr`` and ``iterations_per_second``; pictures
    ``images``, ``images_decoded``, ``images_change`` (difference from the start, around grey) and ``loss_per_class``.
    How good the set is, :class:`.DistilledSetEvaluation` says. ``lightning-plugins run`` exports the set.

    Args:
        model: name of a network, see :func:`.build_model`, or a module whose parts have ``reset_parameters``.
        images_per_class: n, at least 1.
        preset: published or own set of numbers, see :func:`.preset_settings`.
        settings: what is to differ from the preset.
        objective: one of your own in place of the preset's; it brings its own augmentation and flip union.
        model_args: further arguments of a named network.
        iterations_per_epoch: at least 1.
        images_every_n_epochs: how often the pictures are logged, besides before and after training; 0 for never.
        classes_per_group: classes whose synthetic images are in memory at once; None estimates what fits.
        extractors_path: file of the trained networks of an :class:`.ExtractorBank`: read if it is there, else written.
        start_from: folder of a saved set to start from, in place of the preset's initialisation.
        dataset: real images in [0, 1] with their class, in place of a data module's.
        seed: of everything that is drawn.

    Attributes:
        synthetic: the :class:`.SyntheticSet`; None before the first ``fit`` and the loading of a checkpoint.
        config: all settings, resolved; None likewise.
        results: what evaluation found, for the export.

    Raises:
        ValueError: for wrong arguments.
        MisconfigurationException: if there are no real images, or the Trainer's precision or number of processes does
            not fit.

    Example:
        >>> from lightning_plugins.data import DigitsDataModule
        >>> module = DatasetDistillation(
        ...     model_args={"width": 8}, images_per_class=1, preset="dm", iterations_per_epoch=2,
        ...     settings=DistillationSettings(batch_real=16),
        ... )
        >>> trainer = pl.Trainer(
        ...     max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False, limit_val_batches=0,
        ... )
        >>> trainer.fit(module, datamodule=DigitsDataModule())
        >>> module.synthetic.images.shape, trainer.global_step
        (torch.Size([10, 1, 1, 8, 8]), 2)

    Reference:
        See :func:`.preset_settings`; for the flip union B. Son et al., "FYI: Flip Your Images for Dataset
        Distillation", ECCV 2024.
    """

    def __init__(
        self,
        model: nn.Module | str = "convnet3",
        *,
        images_per_class: int = 10,
        preset: PresetName = "house",
        settings: DistillationSettings | dict[str, Any] | None = None,
        objective: Objective | None = None,
        model_args: dict[str, Any] | None = None,
        iterations_per_epoch: int = 100,
        images_every_n_epochs: int = 10,
        classes_per_group: int | None = None,
        extractors_path: str | None = None,
        start_from: str | None = None,
        dataset: Dataset[Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("images_per_class", images_per_class, 1),
            ("iterations_per_epoch", iterations_per_epoch, 1),
            ("images_every_n_epochs", images_every_n_epochs, 0),
            ("classes_per_group", classes_per_group, 1),
            ("seed", seed, 0),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if model_args and not isinstance(model, str):
            raise ValueError(f"model_args={model_args!r} needs a model name; {type(model).__name__} is built already")
        merged(preset_settings(preset, images_per_class=images_per_class), settings)  # refuses what is wrong at once
        self.automatic_optimization = False
        if isinstance(settings, DistillationSettings):
            settings = {name: value for name, value in vars(settings).items() if value is not None}
        kept = ["objective", "dataset", "settings", *([] if isinstance(model, str) else ["model"])]
        self.save_hyperparameters(ignore=kept)
        self.save_hyperparameters({"settings": settings})
        # In a list, as the template is no part of what is learned.
        self._model: list[nn.Module | str] = [model]
        self.model_args = dict(model_args or {})
        self.images_per_class = images_per_class
        self.preset: PresetName = preset
        self.settings = settings
        self.iterations_per_epoch = iterations_per_epoch
        self.images_every_n_epochs = images_every_n_epochs
        self.classes_per_group = classes_per_group
        self.extractors_path = extractors_path
        self.start_from = start_from
        self.dataset = dataset
        self.seed = seed
        self.synthetic: SyntheticSet | None = None
        self.sampling_network: SamplingNetwork | None = None
        self.config: dict[str, Any] | None = None
        self.results: dict[str, Any] = {}
        self.objective = objective
        self._own_objective = objective is not None
        self._own_groups = classes_per_group is not None
        self._pool: ClassPool | None = None
        self._other_pool: ClassPool | None = None
        self._extractors: RandomExtractors | ExtractorBank | None = None
        self._calibration: CalibrationTerm | None = None
        self._net_training: NetTraining | None = None
        self._subset = PrivateGenerator(seed, "synthetic images of a step")
        self._start: Tensor | None = None
        self._data: dict[str, Any] = {}
        self._class_losses: Tensor | None = None
        self._clock = (0.0, 0)
        self._give_back: Callable[[], None] | None = None

    # What is built when the data is known

    def setup(self, stage: str) -> None:
        """Read the real images, and make the synthetic ones and the networks that compare them."""
        if stage != "fit":
            return
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise MisconfigurationException(
                f"DatasetDistillation works in precision '32-true' and 'bf16-mixed', the Trainer has "
                f"{self.trainer.precision!r}; images and their optimizer must stay in float32"
            )
        if self._give_back is None:
            self._give_back = take_over_training_loader(self)
        device = self.trainer.strategy.root_device
        if self._pool is None:
            pool, about = read_pool(self.trainer, self.dataset, seed=self.seed)
            self._pool, self._data = pool, about or self._data
            self.config = self._resolve(pool)
            if self.synthetic is None:
                self.synthetic = self._first_images(pool)
            self._start = self.synthetic.images.detach().cpu().clone()
            self._build_objective(pool)
            self._extractors = self._make_extractors(pool, device)
            self._check_memory(device)
            lines = "\n".join(f"  {name}: {value}" for name, value in self.config.items())
            rank_zero_info(f"distillation with preset {self.preset!r}, resolved:\n{lines}")
            for logger in self.trainer.loggers:
                logger.log_hyperparams({f"distillation/{name}": value for name, value in self.config.items()})
        if self.trainer.world_size > self._pool.num_classes:
            raise MisconfigurationException(
                f"the processes share the {self._pool.num_classes} classes, and there are {self.trainer.world_size} "
                "processes; use at most as many as classes"
            )

    def teardown(self, stage: str) -> None:
        """Give the data module its own loader back."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def train_dataloader(self) -> range:
        """Return the iterations of an epoch: the real images are on the device already."""
        return range(self.iterations_per_epoch)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add what writes the set into the folder of a run."""
        there = any(isinstance(callback, SetExport) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [SetExport()]

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the images, and that of the sampling network, which climbs."""
        config, images = self._config(), self._set().images
        constants: dict[str, Any] = {
            "learning_rate": config["learning_rate"],
            "weight_decay": config["weight_decay"],
        }
        if config["optimizer"] == "sgd":
            constants["momentum"] = config["momentum"]
        if config["class_stepping"] == "vectorised":
            constants = vectorised_constants(config["optimizer"], len(images), **constants)
        else:
            constants["lr"] = constants.pop("learning_rate")
        cls = torch.optim.AdamW if config["optimizer"] == "adamw" else torch.optim.SGD
        optimizers: list[Any] = [cls([images], **constants)]
        if self.sampling_network is not None:
            optimizers.append(
                torch.optim.SGD(
                    self.sampling_network.parameters(),
                    lr=config["sampling_learning_rate"],
                    momentum=config["sampling_momentum"],
                    maximize=True,
                )
            )
        if not config["plateau_patience"]:
            return optimizers
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizers[0], factor=config["plateau_factor"], patience=config["plateau_patience"]
        )
        return optimizers, [plateau]

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make one iteration: compare all classes, step, and with a calibration term step again."""
        config, synthetic, pool, objective = self._config(), self._set(), _ready(self._pool), self._objective()
        extractors = self._nets()
        telling = (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        synthetic.clamp_()
        self._renew_net()
        real = pool.draw(config["batch_real"], first=config["real_batch"] == "first")
        draw = objective.draw(extractors.net, synthetic.num_classes)
        graph = draw.frequencies
        if graph is not None:
            # The frequencies are a leaf for the classes' passes, and what they gather goes through the network once.
            leaf = graph.detach().requires_grad_(graph.requires_grad)
            draw = ObjectiveDraw(draw.augmentation, leaf)
        chosen = self._chosen_images()

        def compare(rows: range, decoded: Tensor) -> ObjectiveLoss:
            if chosen is not None:
                first = torch.arange(len(rows), device=decoded.device)[:, None]
                decoded = decoded[first, chosen[rows.start : rows.stop]]
            return objective.loss(
                extractors.net, real.select(rows.start, rows.stop), decoded, draw=draw, details=telling
            )

        values, quantities = self._pass(compare, counted=self._calibration is None, frequencies=draw.frequencies)
        if graph is not None and graph.requires_grad:
            self._raise_discrepancy(graph, _ready(draw.frequencies).grad)
        calibration_values = None
        if self._calibration is not None:
            term = self._calibration
            extractors.load_trained_()
            draws = () if term.augmentation is None else term.augmentation.draw(synthetic.num_classes)

            def classify(rows: range, decoded: Tensor) -> ObjectiveLoss:
                return term.loss(extractors.net, decoded, classes=rows, draws=draws or None)

            calibration_values, _ = self._pass(classify, counted=True, frequencies=None)
        schedulers = self.lr_schedulers()
        loss = None
        if schedulers is not None or telling:
            self._class_losses = self.trainer.strategy.reduce(values, reduce_op="sum")
            loss = self._class_losses.mean()
        if schedulers is not None:
            cast(Any, schedulers).step(loss)
        if telling:
            self._tell(_ready(loss), calibration_values, quantities)

    def _chosen_images(self) -> Tensor | None:
        """Draw the decoded images of each class that this step compares, ``(C, b)``; None for all."""
        count, most = self._set().decoded_per_class, self._config()["batch_synthetic"]
        if not 0 < most < count:
            return None
        keys = torch.rand(self._set().num_classes, count, generator=self._subset.on("cpu"))
        return keys.argsort(1)[:, :most].to(self.device)

    def _pass(
        self, loss_of: Callable[[range, Tensor], ObjectiveLoss], *, counted: bool, frequencies: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step once, or once for each class; return the losses (zero where other processes have them) and details."""
        classes = self._set().num_classes
        optimizer = self._image_optimizer()
        if self._config()["class_stepping"] == "sequential":
            # Every process goes through all classes, as each step changes what the next one sees.
            values = torch.zeros(classes, device=self.device)
            quantities: dict[str, Tensor] = {}
            for label in range(classes):
                found, parts = self._gradients(loss_of, range(label, label + 1), frequencies)
                values += found
                quantities = {name: quantities.get(name, 0) + value / classes for name, value in parts.items()}
                # Lightning's own optimizer counts its steps; an iteration is to count once.
                last = counted and label == classes - 1
                (optimizer if last else optimizer.optimizer).step()
            return values / self.trainer.world_size, quantities
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shard = range(classes * rank // world, classes * (rank + 1) // world)
        values, quantities = self._gradients(loss_of, shard, frequencies)
        if world > 1:
            gradient = _ready(self._set().images.grad)
            gradient.copy_(self.trainer.strategy.reduce(gradient, reduce_op="sum"))
        (optimizer if counted else optimizer.optimizer).step()
        return values, quantities

    def _gradients(
        self, loss_of: Callable[[range, Tensor], ObjectiveLoss], rows: range, frequencies: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Put the gradient of the loss of some classes into ``images.grad``, group by group."""
        synthetic = self._set()
        size = self.classes_per_group or len(rows)
        gradient = torch.zeros_like(synthetic.images)
        values = torch.zeros(len(gradient), device=gradient.device)
        quantities: dict[str, Tensor] = {}
        for start in range(rows.start, rows.stop, size):
            group = range(start, min(start + size, rows.stop))
            part = synthetic.images.detach()[group.start : group.stop].requires_grad_()
            decoded = decode(part, synthetic.rho, synthetic.variant, bound=synthetic.bound)
            with self._precision():
                found = loss_of(group, synthetic.normalise(decoded))
            inputs = [part] if frequencies is None or not frequencies.requires_grad else [part, frequencies]
            # Not backward: the images' own gradient hooks are DDP's, which would wait for every process in each group.
            gradients = torch.autograd.grad(found.total, inputs)
            gradient[group.start : group.stop] = gradients[0]
            values[group.start : group.stop] = found.per_class.detach()
            if len(gradients) > 1 and frequencies is not None:
                frequencies.grad = gradients[1] if frequencies.grad is None else frequencies.grad + gradients[1]
            for name, value in found.quantities.items():
                share = value * len(group) / len(rows)
                quantities[name] = quantities[name] + share if name in quantities else share
        synthetic.images.grad = gradient
        return values, quantities

    def _raise_discrepancy(self, frequencies: Tensor, gradient: Tensor | None) -> None:
        gradient = _ready(gradient)
        if self.trainer.world_size > 1 and self._config()["class_stepping"] != "sequential":
            gradient = self.trainer.strategy.reduce(gradient, reduce_op="sum")
        network = _ready(self.sampling_network)
        parameters = list(network.parameters())
        for parameter, found in zip(parameters, torch.autograd.grad(frequencies, parameters, gradient), strict=True):
            parameter.grad = found
        cast(Any, self.optimizers())[1].optimizer.step()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Second derivatives are to be in float32."""
        exact = isinstance(self.objective, GradientMatching)
        with torch.autocast(self.device.type, enabled=False) if exact else nullcontext():
            yield

    # The networks

    def net_factory(
        self, model: str | None = None, model_args: dict[str, Any] | None = None
    ) -> Callable[[], nn.Module]:
        """Return what makes a fresh network for the set's images: of the module's own architecture, or a named one."""
        synthetic = self._set()
        template: nn.Module | str = self._model[0] if model is None else model
        arguments = self.model_args if model is None else dict(model_args or {})

        def make() -> nn.Module:
            if isinstance(template, str):
                channels, side = synthetic.images.shape[2:4]
                return build_model(
                    template, num_classes=synthetic.num_classes, in_channels=channels, image_size=side, **arguments
                )
            try:
                return fresh_copy(template)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error

        return make

    def _make_extractors(self, pool: ClassPool, device: torch.device) -> RandomExtractors | ExtractorBank:
        config, factory = self._config(), self.net_factory()
        if config["extractors"] == "random":
            return RandomExtractors(factory, device=device, seed=self.seed)
        trainer = self.trainer
        quick = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        num_pairs, epochs = (1, 1) if quick else (config["num_pairs"], config["pretrain_epochs"])
        path = None if self.extractors_path is None else Path(self.extractors_path)
        if path is None and trainer.world_size > 1:
            path = Path(trainer.default_root_dir, f"extractors-seed{self.seed}.safetensors")
            if trainer.is_global_zero and path.exists():
                path.unlink()  # of an earlier run, maybe with other numbers
        if path is not None and trainer.strategy.broadcast(path.exists()):
            return ExtractorBank.load(path, factory, device=device, seed=self.seed)
        bank = None
        if trainer.is_global_zero:
            rank_zero_info(f"training {num_pairs} networks for {epochs} epochs on {len(pool)} real images")
            with grad_context():
                bank = ExtractorBank.train(
                    factory,
                    pool,
                    num_pairs=num_pairs,
                    epochs=epochs,
                    augmentation=build_augmentation(
                        config, seed=self.seed, purpose=1, cutmix=config["pretrain_cutmix"]
                    ),
                    cutmix=config["pretrain_cutmix"],
                    seed=self.seed,
                )
            if path is not None:
                bank.save(path)
        trainer.strategy.barrier("extractors")
        return bank or ExtractorBank.load(_ready(path), factory, device=device, seed=self.seed)

    def _renew_net(self) -> None:
        """Take fresh networks when it is time, and otherwise train those in use if that is wanted."""
        config, extractors = self._config(), self._nets()
        if self.global_step % config["net_refresh"] == 0:
            extractors.sample_()
            _ready(self._net_training).restart()
        elif config["net_training"] != "none":
            with self._precision():
                _ready(self._net_training).train_(
                    extractors.net, _ready(self._pool), self._set(), self._objective().flip
                )

    # Logging

    def on_train_start(self) -> None:
        """Show the images at the start."""
        self._clock = (time.monotonic(), self.global_step)
        if self.images_every_n_epochs and self.global_step == 0:
            self._show()

    def on_train_epoch_end(self) -> None:
        """Show the images when it is time."""
        if self.images_every_n_epochs and (self.current_epoch + 1) % self.images_every_n_epochs == 0:
            self._show()

    def on_train_end(self) -> None:
        """Clamp the images for good and show them."""
        self._set().clamp_()
        if self.images_every_n_epochs and self.current_epoch % self.images_every_n_epochs:
            self._show()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: :class:`.DistilledSetEvaluation` looks at the batches."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: :class:`.DistilledSetEvaluation` looks at the batches."""

    def _tell(self, loss: Tensor, calibration: Tensor | None, quantities: dict[str, Tensor]) -> None:
        synthetic, strategy = self._set(), self.trainer.strategy
        if not loss.isfinite():
            raise ValueError(
                f"the distillation loss is not finite any more (iteration {self.global_step}); lower learning_rate"
            )
        values = {}
        if calibration is not None:
            values["calibration_loss"] = strategy.reduce(calibration, reduce_op="sum").mean()
        classes, rank, world = synthetic.num_classes, self.trainer.global_rank, self.trainer.world_size
        share = (classes * (rank + 1) // world - classes * rank // world) / classes
        for name, value in quantities.items():
            values[name] = strategy.reduce(value * share, reduce_op="sum")
        values |= image_quantities(synthetic)
        now, before = (time.monotonic(), self.global_step), self._clock
        self._clock = now
        plain = {
            "lr": self._image_optimizer().param_groups[0]["lr"],
            "iterations_per_second": (now[1] - before[1]) / max(now[0] - before[0], 1e-9),
        }
        if self.device.type == "cuda":
            plain["peak_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self.log("distillation/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict({f"distillation/{name}": value for name, value in {**values, **plain}.items()}, batch_size=1)

    def _show(self) -> None:
        if self.trainer.is_global_zero:
            # One loss of all classes, spread over them, is no news.
            losses = None if self._objective().needs_all_classes else self._class_losses
            show_set(self.trainer, self._set(), start=self._start, class_losses=losses)

    def _image_optimizer(self) -> Any:
        optimizers = self.optimizers()
        return optimizers[0] if isinstance(optimizers, list) else optimizers

    # Checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of everything that draws, and what a module without data needs to hold the set."""
        synthetic = self._set()
        state: dict[str, Any] = {
            "set": {
                "shape": list(synthetic.images.shape),
                "space": synthetic.space,
                "mean": synthetic.mean.tolist(),
                "std": synthetic.std.tolist(),
                "rho": synthetic.rho,
                "variant": synthetic.variant,
                "bound": synthetic.bound,
                "class_names": None if synthetic.class_names is None else list(synthetic.class_names),
            },
            "config": dict(self._config()),
            "data": dict(self._data),
            "results": dict(self.results),
        }
        if self._pool is not None:
            state |= {
                "pool": self._pool.state_dict(),
                "objective": self._objective().state_dict(),
                "extractors": self._nets().state_dict(),
                "net_training": _ready(self._net_training).state_dict(),
                "subset": self._subset.state_dict(),
            }
            if self._calibration is not None and self._calibration.augmentation is not None:
                state["calibration"] = self._calibration.augmentation.state_dict()
            if self._config()["net_refresh"] > 1:
                state["net"] = {name: value.clone() for name, value in self._nets().net.state_dict().items()}
        checkpoint["distillation"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the set that the checkpoint holds, and continue all draws."""
        if "distillation" not in checkpoint:
            raise ValueError("the checkpoint is of another module; DatasetDistillation needs one of its own")
        state = checkpoint["distillation"]
        facts = dict(state["set"])
        shape = facts.pop("shape")
        if self.synthetic is None:
            self.synthetic = SyntheticSet(torch.zeros(shape), **facts)
            weights = checkpoint["state_dict"]
            rows = [value for name, value in weights.items() if name == "sampling_network.layers.0.weight"]
            if rows:
                rank = rows[0].shape[0]
                self.sampling_network = SamplingNetwork(rows[0].shape[1], rank=rank)
        elif list(self.synthetic.images.shape) != shape:
            raise ValueError(
                f"the checkpoint holds images {tuple(shape)}, this module makes {tuple(self.synthetic.images.shape)}; "
                "resume with the same data and images_per_class"
            )
        self.config = self.config or dict(state["config"])
        self._data = self._data or dict(state["data"])
        self.results = dict(state["results"])
        if self._pool is None or "pool" not in state:
            return
        if not self._own_groups:  # groups of another size would round differently
            self.classes_per_group = state["config"].get("classes_per_group", self.classes_per_group)
        self._pool.load_state_dict(state["pool"])
        self._objective().load_state_dict(state["objective"])
        self._nets().load_state_dict(state["extractors"])
        self._subset.load_state_dict(state["subset"])
        if self._calibration is not None and self._calibration.augmentation is not None:
            self._calibration.augmentation.load_state_dict(state["calibration"])
        net = self._nets().net
        if "net" in state:
            net.load_state_dict(state["net"])
        _ready(self._net_training).load_state_dict(state["net_training"], net)

    def about(self) -> dict[str, Any]:
        """Return what the exported set says about itself: preset, settings, seed, data, version and results."""
        import lightning_plugins

        facts = {
            "preset": self.preset,
            "objective": type(self.objective).__name__ if self._own_objective else self._config()["objective"],
            "settings": self._config(),
            "model": self._model[0] if isinstance(self._model[0], str) else type(self._model[0]).__name__,
            "model_args": self.model_args,
            "seed": self.seed,
            "data": self._data,
            "lightning_plugins": lightning_plugins.__version__,
            "results": self.results,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
        return plain

    def export_set(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``set.safetensors``, ``meta.json`` and the folder ``png``; return these paths.

        Images of a set in normalised space may leave [0, 1]; their pictures are then scaled, all alike.
        """
        synthetic, folder = self._set(), Path(folder)
        synthetic.clamp_()
        synthetic.save(folder, about=self.about())
        low, high = (float(value) for value in synthetic.pixels(synthetic.images.detach()).aminmax())
        paths = [folder / "set.safetensors", folder / "meta.json"]
        if synthetic.images.shape[2] in (1, 3):
            synthetic.save_png(folder / "png", rescale=low < 0 or high > 1)
            paths.append(folder / "png")
        return paths

    # Small parts

    def real_images(self, trainer: pl.Trainer) -> ClassPool:
        """Return the real training images, read from the Trainer's data module if that has not been done."""
        if self._pool is not None:
            return self._pool
        if self._other_pool is None:
            self._other_pool, about = read_pool(trainer, self.dataset, seed=self.seed)
            self._data = about or self._data
        return self._other_pool

    def _resolve(self, pool: ClassPool) -> dict[str, Any]:
        channels, side, _ = pool.image_shape
        preset = preset_settings(
            self.preset, images_per_class=self.images_per_class, in_channels=channels, image_size=side
        )
        return merged(preset, self.settings)

    def _first_images(self, pool: ClassPool) -> SyntheticSet:
        config = self._config()
        if self.start_from is None:
            return SyntheticSet.initialised(
                config["initialisation"],
                pool,
                self.images_per_class,
                space=config["space"],
                rho=config["rho"],
                variant=config["variant"],
                bound=config["bound"],
                seed=self.seed,
            )
        loaded = SyntheticSet.load(self.start_from)
        if (loaded.num_classes, *loaded.images.shape[2:]) != (pool.num_classes, *pool.image_shape):
            raise ValueError(
                f"the set in {self.start_from!r} has {loaded.num_classes} classes of images "
                f"{tuple(loaded.images.shape[2:])}, the data {pool.num_classes} of {pool.image_shape}; they must agree"
            )
        config |= {name: getattr(loaded, name) for name in ("space", "rho", "variant", "bound")}
        config["initialisation"] = self.start_from
        return loaded

    def _build_objective(self, pool: ClassPool) -> None:
        config = self._config()
        if self.objective is None:
            self.objective = build_objective(config, self.net_factory(), seed=self.seed)
        if isinstance(self.objective, CharacteristicFunction):
            self.sampling_network = self.objective.frequencies.network
        if self.objective.needs_all_classes and (
            self.trainer.world_size > 1 or config["class_stepping"] == "sequential"
        ):
            raise MisconfigurationException(
                f"{type(self.objective).__name__} compares all classes at once; train in one process, and set "
                "class_stepping to 'joint'"
            )
        self.objective.prepare(self.net_factory(), pool)
        flip = self.objective.flip
        if flip is not None and flip.mode == "auto" and flip.detectability is None:
            flip.fit((pool.class_images(label) for label in range(pool.num_classes)), seed=self.seed)
            kept = flip.flipped_classes(pool.num_classes)
            rank_zero_info(f"flip union in the classes {kept} of {pool.num_classes}")
        if config["calibration_weight"]:
            augmentation = build_augmentation(config, seed=self.seed, purpose=2)
            self._calibration = CalibrationTerm(config["calibration_weight"], augmentation=augmentation, flip=flip)
        self._net_training = NetTraining(config, seed=self.seed)

    def _check_memory(self, device: torch.device) -> None:
        """Choose how many classes are in memory at once, and say so if not even one fits."""
        synthetic, config = self._set(), self._config()
        fixed, per_class = step_bytes(config, self._nets().net, synthetic, device)
        free = free_bytes(device)
        local = -(-synthetic.num_classes // self.trainer.world_size)
        if self._objective().needs_all_classes:
            self.classes_per_group = local
        if self.classes_per_group is None:
            fitting = local if free is None else int((free / 2 - fixed) // per_class)
            self.classes_per_group = max(1, min(local, fitting))
        needed = fixed + self.classes_per_group * per_class
        config["classes_per_group"] = self.classes_per_group
        config["memory_estimate_mb"] = round(needed / 2**20, 1)
        if free is not None and needed > free:
            rank_zero_warn(
                f"one step is estimated to need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; lower "
                "classes_per_group, images_per_class, batch_real or the width of the network"
            )

    def _config(self) -> dict[str, Any]:
        return _ready(self.config)

    def _set(self) -> SyntheticSet:
        return _ready(self.synthetic)

    def _nets(self) -> RandomExtractors | ExtractorBank:
        if self._extractors is None:
            raise RuntimeError("there are no networks yet; run trainer.fit")
        return self._extractors

    def _objective(self) -> Objective:
        return _ready(self.objective)


def _ready(value: T | None) -> T:
    if value is None:
        raise RuntimeError("there is no synthetic set yet; run trainer.fit, or load a checkpoint")
    return value
