"""Training a network at given bits for each layer, found by a score or by the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks.quantization.multi_precision_qat import Bits, MultiPrecisionQAT
from lightning_plugins.callbacks.training_step import TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_figure, log_table
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.allocation import Method as Allocator
from lightning_plugins.quantization.allocation import allocate_bits, pareto_frontier
from lightning_plugins.quantization.alrs import ScalingRule
from lightning_plugins.quantization.convert import check_precisions, quantized_layers, switch_
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.layers import FULL_PRECISION, InputInit
from lightning_plugins.quantization.packed import save_packed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.quantizers import ScaleGrad
from lightning_plugins.quantization.scores import Method as Score
from lightning_plugins.quantization.scores import score_layers
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable
from lightning_plugins.quantization.supernet import tied_layers

__all__ = ["BitPlanQAT"]

BudgetUnit = Literal["average_bits", "average_bits_per_layer", "bytes", "bops"]


class BitPlanQAT(MultiPrecisionQAT):
    """Train a network at bits of its own for each layer: a plan that is given, or found at the start of ``fit``.

    Without a plan the network, best a trained one (``start_from``), is scored on some training samples when ``fit``
    begins, and the plan that loses least within a budget is taken. It is state of this callback, not structure of the
    module: checkpoints of one structure restore whatever plan they were trained at, for resuming and for
    ``test(ckpt_path=...)`` alike. Structure are the layers' precisions, those of ``bits``, of a given plan, and 32.
    Outside of the training step too the module is at the plan, so what it logs itself, such as ``val/acc``, is measured
    there; this callback adds the full-precision figure.

    Logged: ``val/acc_plan`` and ``val/acc_32bit``, the same under ``test/`` (fractions in [0, 1]);
    ``quantization/avg_bits`` (per weight, 32 for layers that are still at full precision),
    ``quantization/layers_quantized`` (share, in [0, 1]), ``quantization/weight_scale``,
    ``quantization/clipped_weights`` (share, mean over layers) and the scales' learning rates
    ``quantization/lambda_4bit`` once an epoch; the figures
    ``quantization/plan``, ``quantization/sensitivity`` and ``quantization/frontier``, the table
    ``quantization/layers``.

    Args:
        plan: layer names and bits, or the path of such a JSON object, as :meth:`.BitPlan.save` writes it. Default:
            found by score and allocator.
        bits: candidates for the layers, 2 to 8.
        score: how the layers are scored; see :func:`.score_layers`.
        allocator: how bits follow from scores; see :func:`.allocate_bits`.
        budget: the most that the plan may cost, in ``unit``. Default, for average bits: halfway between the lowest and
            the highest of ``bits``.
        unit: of the budget.
        order: ``"together"`` quantizes all layers from the start. ``"hawq"`` quantizes one after another, those with
            the largest predicted loss at their bits first, and keeps the others at full precision meanwhile.
        unlock_epochs: epochs after which the last layer is quantized, with ``order="hawq"``. Default: half of the
            Trainer's ``max_epochs``.
        num_samples: training samples, drawn at random, that layers are scored on.
        num_probes: most random probes of a Hessian trace.
        seed: of the samples and probes.
        alrs: learning rate of the scales by the bits of their layer, see :class:`.AdaptiveLearningRateScaling`;
            ``"paper"`` and ``"relative"`` are for several precisions at once and refused.
        start_from: a checkpoint whose weights ``fit`` starts from: of the same module in fp32, or converted for the
            same bits.
        evaluate: measure accuracy at the plan and at full precision in validation and test; needs logits ``(N, C)`` and
            integer labels.
        include: convert only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        first_last_bits: least bits of the first and the last layer; 32 leaves them as they are.
        depthwise_bits: least bits of depthwise convolutions.
        per_channel: one weight scale for each output channel; otherwise one for each layer.
        quantize_inputs: quantize what goes into the layers too, at their bits.
        input_init: how input scales start, ``"percentile"`` or ``"lsq"``.
        scale_grad: gradient of the weight scales, ``"effective"`` or ``"exact"``.
        quantize_residual: also quantize what enters residual sums to 8 bits, which integer runtimes need to be fast.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``. Scores call
            the module itself.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: in ``setup`` or at the start of ``fit``, for a plan that does not fit the module, a
            budget that no plan meets, or a Trainer or module that this cannot work with; at the start of an evaluation
            without a plan.

    Example:
        >>> from lightning_plugins.callbacks import BitPlanQAT
        >>> callback = BitPlanQAT(bits=(8, 4), budget=5)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Dong et al., *HAWQ*, 2019 (order); *HAWQ-V2*, 2020 (scores); Yao et al., *HAWQ-V3*, 2021 (integer programme).
        Here the weight codes below the highest precision come from the highest ones by double rounding, so that all
        plans share one set of scales.
    """

    @check_types
    def __init__(
        self,
        plan: str | Mapping[str, int] | None = None,
        *,
        bits: Sequence[int] = (8, 4),
        score: Score = "hawq-v2",
        allocator: Allocator = "pareto",
        budget: float | None = None,
        unit: BudgetUnit = "average_bits",
        order: Literal["together", "hawq"] = "together",
        unlock_epochs: int | None = None,
        num_samples: int = 1024,
        num_probes: int = 200,
        seed: int = 0,
        alrs: ScalingRule = "eta",
        start_from: str | None = None,
        evaluate: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        first_last_bits: int = FULL_PRECISION,
        depthwise_bits: int = 8,
        per_channel: bool = True,
        quantize_inputs: bool = True,
        input_init: InputInit = "percentile",
        scale_grad: ScaleGrad = "effective",
        quantize_residual: bool = False,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        given = None if plan is None else BitPlan.load(plan) if isinstance(plan, str) else BitPlan(plan)
        candidates = tuple(b for b in check_precisions(bits) if b != FULL_PRECISION)
        super().__init__(
            sorted({*candidates, *(given or {}).values(), FULL_PRECISION}),
            stepping="accumulate",
            alrs="none" if alrs in ("paper", "relative") else alrs,
            start_from=start_from,
            evaluate=evaluate,
            include=include,
            exclude=exclude,
            first_last_bits=first_last_bits,
            depthwise_bits=depthwise_bits,
            per_channel=per_channel,
            quantize_inputs=quantize_inputs,
            input_init=input_init,
            scale_grad=scale_grad,
            batch_norm="shared",
            quantize_residual=quantize_residual,
            batch_fn=batch_fn,
            logits_fn=logits_fn,
        )
        if alrs in ("paper", "relative"):
            raise ValueError(f"alrs={alrs!r} compares the gradients of several precisions, a plan has one; use 'eta'")
        choices = {
            "score": (score, get_args(Score)),
            "allocator": (allocator, get_args(Allocator)),
            "unit": (unit, get_args(BudgetUnit)),
            "order": (order, ("together", "hawq")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        counts = {"num_samples": num_samples, "num_probes": num_probes, "unlock_epochs": unlock_epochs or 1}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count!r}")
        if budget is None and given is None and unit not in ("average_bits", "average_bits_per_layer"):
            raise ValueError(f"unit={unit!r} has no budget by default; give one, such as half of what 8 bits take")
        if budget is not None and given is not None:
            raise ValueError("a plan was given, so there is nothing to allocate; leave out budget, or plan")
        self.plan = plan if plan is None or isinstance(plan, str) else dict(plan)
        self.candidates, self.score, self.allocator = candidates, score, allocator
        self.budget = (candidates[0] + candidates[-1]) / 2 if budget is None and given is None else budget
        self.unit, self.order, self.unlock_epochs = unit, order, unlock_epochs
        self.num_samples, self.num_probes, self.seed = num_samples, num_probes, seed
        self.sensitivities: SensitivityTable | None = None
        self._given = given
        self._plan: BitPlan | None = None
        self._turns: dict[str, int] = {}  # the epoch from which a layer is quantized
        self._epoch = 0
        self._passes = self.scaling.bits[:1]

    @property
    def bit_plan(self) -> BitPlan | None:
        """The plan that is trained; None before it is found."""
        return self._plan

    # Structure and state

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not quantized_layers(pl_module) or self._plan is None:  # a fresh module has no plan yet, or the given one
            self._plan, self._turns, self._epoch, self.sensitivities = self._given, {}, 0, None
        super().setup(trainer, pl_module, stage)
        if self._plan is not None:
            self._check(pl_module)
            self._rest(pl_module)

    def _check(self, pl_module: pl.LightningModule) -> None:
        assert self._plan is not None
        try:
            switch_(pl_module, self._plan)
        except ValueError as error:
            self._plan = None
            message = f"{type(self).__name__}: the plan does not fit the module: {error}"
            raise MisconfigurationException(message) from error

    def state_dict(self) -> dict[str, Any]:
        if self._plan is None:
            return {}
        state = {"plan": dict(self._plan), "turns": dict(self._turns), "epoch": self._epoch}
        return state | ({} if self.sensitivities is None else {"sensitivities": table_state(self.sensitivities)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "plan" not in state_dict:
            return
        plan = BitPlan(state_dict["plan"])
        if self._given is not None and (differences := plan.diff(self._given)):
            name, (theirs, ours) = next(iter(differences.items()))
            raise MisconfigurationException(
                f"the checkpoint was trained at a plan that differs from the given one in {len(differences)} layers, "
                f"first in {name!r} ({theirs} bits there, {ours} here); leave out plan to go on with the checkpoint's"
            )
        self._plan, self._turns, self._epoch = plan, dict(state_dict["turns"]), int(state_dict["epoch"])
        if "sensitivities" in state_dict:
            self.sensitivities = table_from_state(self.score, state_dict["sensitivities"])
        if self._pl_module is not None:
            self._check(self._pl_module)
            self._rest(self._pl_module)

    # Finding the plan

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._plan is not None:
            super().on_fit_start(trainer, pl_module)  # before optimizers get back what a checkpoint holds of them
        else:
            TrainingStepCallback.on_fit_start(self, trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        fresh = self._plan is None
        ordered = self.order == "hawq" and not self._turns
        if fresh or (ordered and self.sensitivities is None):
            self.sensitivities = score_module(
                trainer,
                pl_module,
                self.score,
                bits=self.candidates if fresh else self.scaling.bits,
                num_samples=self.num_samples,
                num_probes=self.num_probes,
                seed=self.seed,
                batch_fn=self.batch_fn,
            )
        if fresh:
            assert self.sensitivities is not None
            assert self.budget is not None
            try:
                self._plan = allocate_bits(
                    self.sensitivities,
                    budget=self.budget,
                    method=self.allocator,
                    unit=self.unit,
                    groups=tied_layers(pl_module),
                )
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            self._take_scales(trainer, pl_module)
        if ordered:
            self._turns = self._make_turns(trainer, pl_module)
        self._rest(pl_module)
        self._draw(trainer, pl_module)

    def _make_turns(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int]:
        assert self._plan is not None
        assert self.sensitivities is not None
        if self.unlock_epochs is None and not (trainer.max_epochs or 0) > 0:
            raise MisconfigurationException(
                f"{type(self).__name__}(order='hawq') needs to know over how many epochs; give unlock_epochs, or the "
                "Trainer max_epochs"
            )
        epochs = self.unlock_epochs or ceil(trainer.max_epochs / 2)  # type: ignore[operator]
        groups = {name: group for group in tied_layers(pl_module) for name in group}
        losses: dict[tuple[str, ...], float] = {}
        for name, layer in self.sensitivities.layers.items():
            if (b := self._plan[name]) != FULL_PRECISION:
                group = groups.get(name, (name,))
                losses[group] = losses.get(group, 0.0) + layer.losses[b]
        order = sorted(losses, key=lambda group: -losses[group])
        return {name: number * epochs // len(order) for number, group in enumerate(order) for name in group}

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            return
        assert self._plan is not None
        log_figure(trainer, "quantization/plan", self._plan.figure())
        if self.sensitivities is None:
            return
        names = [name for name, b in self._plan.items() if b == max(self._plan.values())]
        log_figure(trainer, "quantization/sensitivity", self.sensitivities.figure(highlight=names))
        if all(self._plan[name] in layer.losses for name, layer in self.sensitivities.layers.items()):
            frontier = pareto_frontier(
                self.sensitivities, unit=self.unit, groups=tied_layers(pl_module), resolution=0.001
            )
            log_figure(trainer, "quantization/frontier", frontier.figure(chosen=self._plan))

    # At the plan

    def _bits_at(self, trainer: pl.Trainer, bits: int) -> Bits:
        return self._bits_at_rest()

    def _bits_at_rest(self) -> Bits:
        if self._plan is None:
            return FULL_PRECISION
        waiting = {name for name, turn in self._turns.items() if turn > self._epoch}
        return {name: FULL_PRECISION if name in waiting else b for name, b in self._plan.items()}

    def _evaluated(self) -> dict[str, Bits]:
        plan = {} if self._plan is None else {"plan": self._bits_at_rest()}
        return plan | {"32bit": FULL_PRECISION}

    def _accuracies(self, stage: str) -> dict[str, Tensor]:
        return self._each_accuracy(stage)

    def _scale_groups(self, pl_module: pl.LightningModule) -> dict[int | None, list[nn.Parameter]]:
        assert self._plan is not None
        groups = super()._scale_groups(pl_module)
        at = {layer.weight_scale: self._plan[name] for name, layer in quantized_layers(pl_module).items()}
        for scale, b in at.items():
            if b != FULL_PRECISION:
                groups.setdefault(b, []).append(scale)
        return groups | {None: [scale for scale in groups[None] if at.get(scale, FULL_PRECISION) == FULL_PRECISION]}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self._rest(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._refuse_no_plan()
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_no_plan()
        super().on_test_start(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_no_plan()

    def _refuse_no_plan(self) -> None:
        if self._plan is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no plan yet; fit first, pass ckpt_path, or construct it with a plan"
            )

    # Logging

    def _scale_metrics(self, pl_module: pl.LightningModule) -> dict[str, float | Tensor]:
        layers = quantized_layers(pl_module)
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        quantized = [layer for layer in layers.values() if layer.num_bits != FULL_PRECISION]
        total = sum(layer.num_bits * sizes[name] for name, layer in layers.items())
        assert self._plan is not None
        metrics: dict[str, float | Tensor] = {
            "quantization/avg_bits": total / sum(sizes.values()),
            "quantization/layers_quantized": len(quantized) / len(layers),
            "quantization/weight_scale": torch.stack([s.weight_scale.detach().mean() for s in layers.values()]).mean(),
        }
        if quantized:
            shares = [layer.clipped_weight_share(layer.num_bits) for layer in quantized]
            metrics["quantization/clipped_weights"] = torch.stack(shares).mean()
        used = set(self._plan.values())
        return metrics | {f"quantization/lambda_{b}bit": lr for b, lr in self._lambdas.items() if b in used}

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass  # two accuracies are no curve

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.loggers:
            rows = self._layer_rows(pl_module)
            log_table(trainer, "quantization/layers", list(rows[0]), [list(row.values()) for row in rows])

    def _layer_rows(self, pl_module: pl.LightningModule) -> list[dict[str, Any]]:
        assert self._plan is not None
        rows = []
        for name, layer in quantized_layers(pl_module).items():
            b = self._plan[name]
            row: dict[str, Any] = {"layer": name, "bits": b, "weights": layer.weight.numel()}
            row["weight_scale"] = layer.weight_scale.detach().mean()
            row["clipped_weights"] = layer.clipped_weight_share(b) if b != FULL_PRECISION else None
            row["clipped_inputs"] = self._clipped.get(name, {}).get(b)
            if self.sensitivities is not None:
                row["importance"] = self.sensitivities.layers[name].importance
                row["predicted_loss"] = self.sensitivities.layers[name].losses.get(b)
            rows.append(row)
        return rows

    def export(self, directory: Path) -> list[Path]:
        """Write what came out of the run.

        ``plan.json``, which this callback and :meth:`.BitPlan.load` take; ``sensitivity.json`` if layers were scored;
        ``packed.safetensors``, which :func:`.load_packed` reads, for the plan alone, and ``cost.txt``, both only once
        all layers have been trained at the plan and if it leaves none at 32 bits.
        """
        if self._pl_module is None or self._plan is None:
            return []
        paths = [self._plan.save(directory / "plan.json")]
        if self.sensitivities is not None:
            paths.append(self.sensitivities.save(directory / "sensitivity.json"))
        if FULL_PRECISION not in self._plan.values() and self._is_initialized(self._pl_module, self._plan):
            paths += [
                save_packed(self._pl_module, directory / "packed.safetensors", plan=self._plan),
                write_atomically(directory / "cost.txt", str(cost(self._pl_module, self._plan)).encode()),
            ]
        return paths


def score_module(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    method: Score,
    *,
    bits: Sequence[int],
    num_samples: int,
    num_probes: int,
    seed: int,
    batch_fn: BatchFn,
) -> SensitivityTable:
    """Score a converted module's layers on training samples; all processes get the same table."""
    pairs = list(first_pairs(trainer, trainer.train_dataloader, num_samples, seed=seed, batch_fn=batch_fn))
    try:
        net: nn.Module = pl_module
        if pl_module.dtype not in (torch.float32, torch.float64):  # too coarse for second derivatives
            net = copy_network(pl_module).float()
            pairs = [(x.float() if x.is_floating_point() else x, y) for x, y in pairs]
        table = score_layers(net, method, pairs, bits=bits, seed=seed, num_probes=num_probes)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(
            f"the layers could not be scored by {method!r}: {error}. Scores such as 'loss-increase' need no derivatives"
        ) from error
    return trainer.strategy.broadcast(table)


def first_pairs(
    trainer: pl.Trainer, loaders: Any, num_samples: int, *, seed: int, batch_fn: BatchFn
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and targets from a loader's data set, the same in every process.

    Samples are drawn at random, since some data sets are sorted by class; a data set that can only be iterated gives
    its first ones.
    """
    loader = next(iter(CombinedLoader(loaders).flattened), None)
    dataset = getattr(loader, "dataset", None)
    with isolate_rng():  # data sets augment by the global generator
        torch.manual_seed(seed)
        count = 0
        for batch in _some(loader, num_samples) if _is_indexable(dataset) else _or_nothing(loader):
            batch = trainer.precision_plugin.convert_input(batch)
            inputs, targets = batch_fn(trainer.strategy.batch_to_device(batch))
            yield inputs, targets
            count += len(inputs)
            if count >= num_samples:
                break


def _is_indexable(dataset: Any) -> bool:
    return all(hasattr(dataset, name) for name in ("__getitem__", "__len__")) and len(dataset) > 0


def _or_nothing(loader: Any) -> Any:
    return () if loader is None else loader  # whether one without a length is empty nobody can ask


def _some(loader: Any, num_samples: int) -> Iterator[Any]:
    indices, size = torch.randperm(len(loader.dataset))[:num_samples].tolist(), loader.batch_size or 64
    for start in range(0, len(indices), size):
        yield loader.collate_fn([loader.dataset[i] for i in indices[start : start + size]])


def table_state(table: SensitivityTable) -> dict[str, Any]:
    """Return the numbers of a table, as a checkpoint holds them."""
    rows = {name: asdict(layer) for name, layer in table.layers.items()}
    return {name: {key: value for key, value in row.items() if value is not None} for name, row in rows.items()}


def table_from_state(method: str, state: Mapping[str, Any]) -> SensitivityTable:
    """Return the table of such numbers."""
    return SensitivityTable(method, {name: LayerSensitivity(**row) for name, row in state.items()})
