"""Training one network whose layers may have any bits: a supernet, from which plans are searched without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks.quantization.bit_plan_qat import (
    first_pairs,
    score_module,
    table_from_state,
    table_state,
)
from lightning_plugins.callbacks.quantization.multi_precision_qat import Bits, MultiPrecisionQAT, SampleIdsFn
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_figure, log_metrics, log_table
from lightning_plugins.quantization.alrs import ScalingRule
from lightning_plugins.quantization.convert import BatchNorms, quantized_layers, shortcut_layers
from lightning_plugins.quantization.layers import FULL_PRECISION, InputInit
from lightning_plugins.quantization.quantizers import ScaleGrad
from lightning_plugins.quantization.scores import Method as Score
from lightning_plugins.quantization.sensitivity import SensitivityTable
from lightning_plugins.quantization.supernet import (
    EvaluatedPlan,
    PlanSearch,
    draw_bits,
    search_plans,
    sensitive_layers,
    switching_probability,
    weigh_perturbations,
)

__all__ = ["MixedPrecisionQAT"]

UNIFORM = "uniform"


class MixedPrecisionQAT(MultiPrecisionQAT):
    """Train one network for every assignment of bits to its layers, then search the best ones without training.

    :class:`MultiPrecisionQAT` with Hessian-aware stochastic bit switching: after a warm-up, in the pass for b bits each
    layer leaves b with a probability that grows over the epochs, and spins a roulette wheel for bits of its own; on the
    wheel of a sensitive layer high bits are wider. Batch normalisations are transitional, one for each pair of the bits
    of two successive layers. When training ends, plans for some average bits are proposed by an integer programme on
    the sensitivities, evaluated on validation samples, and the best one within each budget is kept; ``test`` then
    measures these too.

    All draws of a pass are made at once from a generator that is seeded with the seed, ``global_step`` and the pass, so
    processes agree and resumed runs go on as they would have. A shortcut takes the draw of its block's first
    convolution (see :func:`.shortcut_layers`). Weight scales have the learning rate of the pass, input scales that of
    their own bits. A compiled network runs eagerly in passes with drawn bits.

    Logged beside what :class:`MultiPrecisionQAT` logs: ``quantization/sigma`` once an epoch; the figure
    ``quantization/sensitivity`` with the sensitive layers marked; after training the figure ``quantization/frontier``,
    the table ``quantization/plans`` and, on the validation samples, ``quantization/acc_plan_4`` for a budget of 4 and
    so on; ``test/acc_plan_4`` and so on. Accuracies are fractions in [0, 1].

    Args:
        bits: the precisions, 2 to 8, and 32 for full precision beside them. Only those below 32 are drawn.
        sensitivity: by layer name, or the path of a saved :class:`.SensitivityTable`, whose importance counts, or the
            name of a score (see :func:`.score_layers`) of the network as it is when ``fit`` begins, best a trained one
            (``start_from``); ``"uniform"`` for none, so that every layer draws all precisions alike. Default:
            ``"hawq-v2"``, average Hessian traces.
        sigma: probability of leaving the precision of the pass in the last epoch, in [0, 1].
        warmup_epochs: first epochs, without draws.
        num_epochs: epochs in which the probability reaches ``sigma``. Default: the Trainer's ``max_epochs``.
        budgets: average bits per weight to search plans for; ``()`` for no search. Default: every whole number between
            the lowest and the highest precision.
        num_candidates: most plans to evaluate for a budget.
        num_samples: training samples that layers are scored on, and validation samples that plans are evaluated on,
            drawn at random.
        num_probes: most random probes of a Hessian trace.
        seed: of draws, samples and probes.
        stepping: see :class:`MultiPrecisionQAT`, as for all that follows.
        alrs: learning rate of the scales.
        self_distillation: share of the previous epoch's prediction in the last epoch's targets.
        sample_ids_fn: takes the batch, returns the samples' indices.
        start_from: a checkpoint whose weights ``fit`` starts from: of the same module in fp32, or one of
            :class:`MultiPrecisionQAT` for the same bits, as in the paper.
        evaluate: measure accuracy at every uniform precision, and in ``test`` under the plans.
        include: convert only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        first_last_bits: least bits of the first and the last layer; 32 leaves them as they are.
        depthwise_bits: least bits of depthwise convolutions.
        per_channel: one weight scale for each output channel; otherwise one for each layer.
        quantize_inputs: quantize what goes into the layers too, at their bits.
        input_init: how input scales start, ``"percentile"`` or ``"lsq"``.
        scale_grad: gradient of the weight scales, ``"effective"`` or ``"exact"``.
        batch_norm: ``"transitional"``, ``"per_precision"`` or ``"shared"``.
        quantize_residual: also quantize what enters residual sums to 8 bits.
        batch_fn: takes the batch, returns ``(inputs, targets)``.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``. Scores and the search call the module itself.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: in ``setup`` or at the start of ``fit``, for sensitivities that do not fit the
            module, or a Trainer or module that this cannot work with.

    Example:
        >>> from lightning_plugins.callbacks import MixedPrecisionQAT
        >>> callback = MixedPrecisionQAT((8, 4, 2), warmup_epochs=2)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, algorithms 1, 2 and A.3. The paper prints the
        search as a minimum, which would give the most sensitive layers the fewest bits; here HAWQ's predicted loss is
        minimised.
    """

    @check_types
    def __init__(
        self,
        bits: Sequence[int] = (8, 6, 4, 2),
        *,
        sensitivity: str | Mapping[str, float] | None = None,
        sigma: float = 0.5,
        warmup_epochs: int = 10,
        num_epochs: int | None = None,
        budgets: Sequence[float] | None = None,
        num_candidates: int = 8,
        num_samples: int = 1024,
        num_probes: int = 200,
        seed: int = 0,
        stepping: Literal["accumulate", "sequential"] | None = None,
        alrs: ScalingRule = "eta",
        self_distillation: float = 0.0,
        sample_ids_fn: SampleIdsFn | None = None,
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
        batch_norm: BatchNorms = "transitional",
        quantize_residual: bool = False,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(
            bits,
            stepping=stepping,
            alrs=alrs,
            self_distillation=self_distillation,
            sample_ids_fn=sample_ids_fn,
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
            batch_norm=batch_norm,
            quantize_residual=quantize_residual,
            batch_fn=batch_fn,
            logits_fn=logits_fn,
        )
        if not 0 <= sigma <= 1:
            raise ValueError(f"sigma must lie in [0, 1], got {sigma!r}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs!r}")
        counts = {"num_candidates": num_candidates, "num_samples": num_samples, "num_probes": num_probes}
        for name, count in (counts | {"num_epochs": 1 if num_epochs is None else num_epochs}).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count!r}")
        lowest, highest = self.scaling.bits[-1], self.scaling.bits[0]
        wrong = [budget for budget in budgets or () if not lowest <= budget <= highest]
        if wrong:
            raise ValueError(f"budgets are average bits, {lowest} to {highest}, got {wrong[0]!r}")
        self.sensitivity = sensitivity if sensitivity is None or isinstance(sensitivity, str) else dict(sensitivity)
        self.sigma, self.warmup_epochs, self.num_epochs = sigma, warmup_epochs, num_epochs
        self.budgets = tuple(range(lowest + 1, highest)) if budgets is None else tuple(budgets)
        self.num_candidates, self.num_samples = num_candidates, num_samples
        self.num_probes, self.seed = num_probes, seed
        self.sensitivities: SensitivityTable | None = None
        self.plans: dict[float, EvaluatedPlan] = {}
        self._score: Score = next((name for name in get_args(Score) if name == sensitivity), "hawq-v2")
        self._sensitive: tuple[str, ...] = ()
        self._ties: dict[str, str] = {}
        self._testing = False

    @property
    def sensitive(self) -> tuple[str, ...]:
        """The layers whose roulette wheels prefer high bits."""
        return self._sensitive

    # Structure and state

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not quantized_layers(pl_module):
            self.sensitivities, self._sensitive, self.plans = None, (), {}
        super().setup(trainer, pl_module, stage)
        self._ties = shortcut_layers(pl_module)
        if stage != "fit":
            return
        if isinstance(self.sensitivity, Mapping) or self.sensitivity == UNIFORM:
            self._take(self._given_table(pl_module))
        elif self.sensitivity is not None and self._score != self.sensitivity:
            self._take(self._read_table(pl_module, self.sensitivity))
        if self.num_epochs is None and not (trainer.max_epochs or 0) > 0 and self.sigma:
            raise MisconfigurationException(
                f"{type(self).__name__} draws more often from epoch to epoch and needs to know over how many; give "
                "num_epochs, or the Trainer max_epochs"
            )
        if self.sigma and self.warmup_epochs >= (self.num_epochs or trainer.max_epochs or 0):
            rank_zero_warn(
                f"{type(self).__name__} will draw no bits: warmup_epochs={self.warmup_epochs} covers the whole "
                "training. Lower it, or use MultiPrecisionQAT."
            )

    def _given_table(self, pl_module: pl.LightningModule) -> SensitivityTable:
        uniform = dict.fromkeys(quantized_layers(pl_module), 1.0)
        given = self.sensitivity if isinstance(self.sensitivity, Mapping) else uniform
        negative = [name for name, value in given.items() if value < 0]
        if negative:
            rank_zero_warn(f"the sensitivities of {', '.join(negative)} are negative and taken as 0")
        try:
            return weigh_perturbations(pl_module, {name: max(value, 0.0) for name, value in given.items()})
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def _read_table(self, pl_module: pl.LightningModule, path: str) -> SensitivityTable:
        try:
            table = SensitivityTable.load(path)
            rows = {name: table.layers[name] for name in quantized_layers(pl_module)}
        except (OSError, ValueError) as error:
            raise MisconfigurationException(f"{type(self).__name__}(sensitivity={path!r}): {error}") from error
        except KeyError as error:
            raise MisconfigurationException(
                f"{type(self).__name__}(sensitivity={path!r}): the table lacks the layer {error}; score this network "
                "anew with score_layers"
            ) from error
        return SensitivityTable(table.method, rows, table.details)

    def _take(self, table: SensitivityTable) -> None:
        self.sensitivities = table
        if self.sensitivity != UNIFORM:
            self._sensitive = sensitive_layers({name: layer.importance for name, layer in table.layers.items()})

    def state_dict(self) -> dict[str, Any]:
        table = {} if self.sensitivities is None else {"sensitivities": table_state(self.sensitivities)}
        return super().state_dict() | table

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = dict(state_dict)
        if "sensitivities" in own:
            method = self._score if self.sensitivities is None else self.sensitivities.method
            self._take(table_from_state(method, own.pop("sensitivities")))
        super().load_state_dict(own)

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.sensitivities is None:
            self._take(
                score_module(
                    trainer,
                    pl_module,
                    self._score,
                    bits=self.scaling.bits,
                    num_samples=self.num_samples,
                    num_probes=self.num_probes,
                    seed=self.seed,
                    batch_fn=self.batch_fn,
                )
            )
        if trainer.loggers and self.sensitivities is not None:
            log_figure(trainer, "quantization/sensitivity", self.sensitivities.figure(highlight=self._sensitive))

    def _bits_at(self, trainer: pl.Trainer, bits: int) -> Bits:
        sigma = self._switching_probability(trainer)
        if not sigma or bits == FULL_PRECISION:
            return bits
        seed = int(np.random.SeedSequence([self.seed, trainer.global_step, bits]).generate_state(1)[0])
        return draw_bits(
            {name: layer.bits for name, layer in quantized_layers(trainer.lightning_module).items()},
            bits,
            sigma=sigma,
            sensitive=self._sensitive,
            generator=torch.Generator().manual_seed(seed),
            ties=self._ties,
        )

    def _switching_probability(self, trainer: pl.Trainer) -> float:
        epochs = self.num_epochs or trainer.max_epochs or 1
        return switching_probability(trainer.current_epoch, epochs, sigma=self.sigma, warmup_epochs=self.warmup_epochs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log("quantization/sigma", self._switching_probability(trainer))

    # Search

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.budgets and self.evaluate:
            self._search(trainer, pl_module)

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.sensitivities is not None
        loaders = trainer.val_dataloaders
        pairs = (
            []
            if loaders is None
            else list(first_pairs(trainer, loaders, self.num_samples, seed=self.seed, batch_fn=self.batch_fn))
        )
        if not pairs:
            rank_zero_warn(
                f"{type(self).__name__} searched no plans, for want of validation data; give some, or budgets=() to "
                "train alone"
            )
            return
        with trainer.precision_plugin.forward_context():
            search = search_plans(
                pl_module,
                self.sensitivities,
                pairs,
                budgets=self.budgets,
                num_candidates=self.num_candidates,
            )
        search = trainer.strategy.broadcast(search)
        self.plans = {budget: search.best(budget) for budget in self.budgets}
        self._report(trainer, search)

    def _report(self, trainer: pl.Trainer, search: PlanSearch) -> None:
        if not trainer.loggers:
            return
        log_figure(trainer, "quantization/frontier", search.figure())
        log_metrics(trainer, {f"quantization/acc_plan_{b:g}": plan.accuracy for b, plan in self.plans.items()})
        columns = ["budget", "average_bits", "accuracy", "loss", *next(iter(self.plans.values())).plan]
        rows = [[b, p.cost, p.accuracy, p.loss, *p.plan.values()] for b, p in self.plans.items()]
        log_table(trainer, "quantization/plans", columns, rows)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._testing = False
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._testing = True
        super().on_test_start(trainer, pl_module)

    def _evaluated(self) -> dict[str, Bits]:
        # The plans were chosen on the validation samples, where they flatter themselves.
        plans = {f"plan_{b:g}": evaluated.plan for b, evaluated in self.plans.items()} if self._testing else {}
        return super()._evaluated() | plans

    def export(self, directory: Path) -> list[Path]:
        """Write ``packed.safetensors`` for all precisions, ``cost.txt``, ``sensitivity.json`` and the plans found.

        There is one, ``plan_4.json`` and so on, for each budget of the search. :meth:`.BitPlan.load` reads it, and
        ``BitPlanQAT`` trains it.
        """
        paths = super().export(directory)
        if self.sensitivities is not None:
            paths.append(self.sensitivities.save(directory / "sensitivity.json"))
        return paths + [
            evaluated.plan.save(directory / f"plan_{budget:g}.json") for budget, evaluated in self.plans.items()
        ]
