"""What every callback promises. A new one joins by adding a row to CALLBACKS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import DemoModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_plugins.calibration import TemperatureScaling, VectorScaling
from lightning_plugins.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    BinaryQAT,
    BitPlanQAT,
    CalibrationMonitor,
    CalibrationRegularizer,
    CalibratorComparison,
    CatastrophicOverfittingGuard,
    ClassifierHeadCalibration,
    DeferredReweighting,
    FreeAdversarialTraining,
    MixedPrecisionQAT,
    MixedSampleAugmentation,
    MultiPrecisionQAT,
    NeuralCollapseMonitor,
    PlainTwin,
    PostHocCalibration,
    PostTrainingQuantization,
    RobustnessEvaluation,
    TrainingStepCallback,
    VariantComparison,
)
from lightning_plugins.quantization import (
    load_binary_checkpoint,
    load_converted,
    restore_,
    restore_binary_,
)
from lightning_plugins.robustness import TRADES, FGSMAttack, PGDAttack
from toys import (
    TinyModule,
    TorchvisionModule,
    assert_same_weights,
    image_and_label,
    make_trainer,
    weights,
)


class InputNoise(TrainingStepCallback):
    """The smallest honest user of the training-step mechanism; its noise depends on the step alone."""

    changes_batch = True

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        inputs, _ = self.batch_fn(batch)
        generator = torch.Generator().manual_seed(trainer.global_step)
        noise = torch.randn(inputs.shape, generator=generator).to(inputs)
        return step(self.replace(batch, inputs, inputs + 0.1 * noise), batch_idx)


@dataclass(frozen=True)
class Row:
    """One callback with small valid arguments.

    Attributes:
        make: builds it; takes ``batch_fn`` and such.
        needs_validation: a run without validation data is refused.
        changes_training: the trained weights differ from those of a run without it.
        changes_structure: the module is another one afterwards, and its checkpoints say so to a plain module.
        needs_whole_weights: strategies that shard weights are refused; so are they by what changes the structure.
        refuses: the Trainer flags, by their names below, that it cannot work with.
        restore: undoes the change of structure.
        load: converts a plain module as a checkpoint says, and loads it.
        argument: one that reaches the loggers; ``batch_fn`` where it reads batches.
        paired: further arguments beside another callback, on :class:`.ThreeLayers`.
    """

    make: Callable[..., pl.Callback]
    needs_validation: bool = False
    changes_training: bool = False
    changes_structure: bool = False
    needs_whole_weights: bool = False
    refuses: tuple[str, ...] = ()
    restore: Callable[..., Any] = restore_
    load: Callable[..., Any] = load_converted
    argument: str = "batch_fn"
    paired: Mapping[str, Any] = field(default_factory=dict)


# What retrains the last layer needs it in full precision; alone, these rows convert it.
HEAD_AS_IT_IS = {"exclude": ("net.5",)}
# The toys' inputs are no images; this maps them into [0, 1].
PIXELS = {"mean": [0.5], "std": [1 / 16]}
ATTACK = PGDAttack(eps=0.02, num_steps=2)


def trades(**arguments: Any) -> AdversarialTraining:
    return AdversarialTraining(ATTACK, TRADES(beta=1.0), **PIXELS, **arguments)


CALLBACKS = {
    "AdversarialTraining": Row(partial(AdversarialTraining, ATTACK, **PIXELS), changes_training=True),
    "AdversarialTraining, TRADES": Row(trades, changes_training=True),
    "AdversarialWeightPerturbation": Row(
        AdversarialWeightPerturbation, changes_training=True, needs_whole_weights=True, argument="gamma"
    ),
    "BinaryQAT": Row(
        partial(BinaryQAT, stage_split=1, keep_real=()),
        changes_training=True,
        changes_structure=True,
        restore=restore_binary_,
        load=load_binary_checkpoint,
        paired={"keep_real": ("last",)},
    ),
    "BitPlanQAT": Row(
        partial(BitPlanQAT, bits=(8, 4), first_last_bits=2, order="hawq", unlock_epochs=2, score="zd"),
        changes_training=True,
        changes_structure=True,
        paired=HEAD_AS_IT_IS,
    ),
    "CalibrationMonitor": Row(partial(CalibrationMonitor, ["ece", "nll", "ks"], groups="label")),
    "CalibratorComparison": Row(
        partial(CalibratorComparison, [TemperatureScaling(), VectorScaling()], num_bootstrap=2)
    ),
    "CatastrophicOverfittingGuard": Row(
        partial(CatastrophicOverfittingGuard, ATTACK, drop=1.0, **PIXELS), needs_whole_weights=True
    ),
    "FreeAdversarialTraining": Row(
        partial(FreeAdversarialTraining, 0.02, num_replays=2, **PIXELS),
        changes_training=True,
        refuses=("accumulate",),
    ),
    "CalibrationRegularizer": Row(CalibrationRegularizer, changes_training=True),
    "DeferredReweighting": Row(partial(DeferredReweighting, counts=[40, 20, 4], start=0.0), changes_training=True),
    "InputNoise": Row(InputNoise, changes_training=True),
    "MixedPrecisionQAT": Row(
        partial(
            MixedPrecisionQAT,
            (8, 4, 2),
            first_last_bits=2,
            warmup_epochs=0,
            num_epochs=4,
            sensitivity="uniform",
            budgets=(5,),
        ),
        changes_training=True,
        changes_structure=True,
        paired=HEAD_AS_IT_IS,
    ),
    "MixedSampleAugmentation": Row(MixedSampleAugmentation, changes_training=True),
    "MultiPrecisionQAT": Row(
        partial(MultiPrecisionQAT, (8, 4, 2), first_last_bits=2, stepping="sequential"),
        changes_training=True,
        changes_structure=True,
        refuses=("accumulate",),
        paired=HEAD_AS_IT_IS,
    ),
    "MultiPrecisionQAT, accumulate": Row(
        partial(MultiPrecisionQAT, (8, 4, 2), first_last_bits=2, stepping="accumulate"),
        changes_training=True,
        changes_structure=True,
        paired=HEAD_AS_IT_IS,
    ),
    "ClassifierHeadCalibration": Row(
        partial(ClassifierHeadCalibration, 20, num_epochs=2), changes_training=True, needs_whole_weights=True
    ),
    "NeuralCollapseMonitor": Row(partial(NeuralCollapseMonitor, num_samples=30, mixed=True), needs_whole_weights=True),
    "PlainTwin": Row(PlainTwin, needs_whole_weights=True, argument="name"),
    "PostHocCalibration": Row(PostHocCalibration, needs_validation=True),
    "PostTrainingQuantization": Row(
        partial(PostTrainingQuantization, num_samples=16, num_steps=4, batch_size=8),
        needs_whole_weights=True,
        paired={"pipeline": "light"},
    ),
    "RobustnessEvaluation": Row(
        partial(RobustnessEvaluation, ATTACK, {"fgsm": FGSMAttack(0.02)}, eps_grid=[0.01], **PIXELS)
    ),
    "VariantComparison": Row(VariantComparison, argument="quantities"),
}


# Callbacks that work with one module of ours alone, and where their promises are tested.
WITH_A_MODULE_OF_THEIR_OWN = {
    "DeploymentCheck": "test_edge.py",
    "DistilledSetEvaluation": "distillation/test_evaluation.py",
}


@pytest.fixture(params=CALLBACKS.values(), ids=CALLBACKS.keys())
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


FLAGS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True},
    "accumulate": {"accumulate_grad_batches": 2},
    "clip": {"gradient_clip_val": 0.1},
    "limit_batches": {"limit_train_batches": 2, "limit_val_batches": 1},
    "val_check_interval": {"val_check_interval": 2},
    "val_every_2": {"check_val_every_n_epoch": 2},
    "overfit": {"overfit_batches": 1},
    "sanity": {"num_sanity_val_steps": 2},
    "max_steps": {"max_steps": 3},
    "csv_logger": {"logger": True},
}


@pytest.mark.parametrize("flag", FLAGS)
def test_trainer_flags(tmp_path, row, flag):
    module = TinyModule()
    trainer = make_trainer(tmp_path, 2, row.make(), **FLAGS[flag])
    if flag in row.refuses:
        with pytest.raises(MisconfigurationException):
            trainer.fit(module)
        return
    trainer.fit(module)
    assert trainer.global_step > 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_all_stages_work_after_fit(tmp_path, row):
    module = TinyModule()
    trainer = make_trainer(tmp_path, 1, row.make())
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    assert all(output.shape[1] == 3 for output in trainer.predict(module))


def test_runs_without_validation_data(tmp_path, row):
    trainer = make_trainer(tmp_path, 1, row.make(), limit_val_batches=0)
    if row.needs_validation:
        with pytest.raises(MisconfigurationException, match="limit_val_batches"):
            trainer.fit(TinyModule())
    else:
        trainer.fit(TinyModule())


def test_resume_equals_a_straight_run(tmp_path, row):
    straight, halves = row.make(), row.make()
    one, two = TinyModule(), TinyModule()
    make_trainer(tmp_path, 4, straight).fit(one)
    first = make_trainer(tmp_path, 2, row.make())
    first.fit(TinyModule())
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, 4, halves).fit(two, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_weights(one, two)
    torch.testing.assert_close(straight.state_dict(), halves.state_dict(), rtol=0, atol=0)


def test_it_changes_the_weights_just_when_it_says_so(tmp_path, row):
    plain, treated = TinyModule(), TinyModule()
    make_trainer(tmp_path, 1).fit(plain)
    make_trainer(tmp_path, 1, row.make()).fit(treated)
    same = all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(treated).values(), strict=True))
    assert same is not row.changes_training


def test_removal_leaves_no_trace(tmp_path, row):
    """Fitted with the callback and then without it, a module is what it would be had the first fit been a plain one."""
    module, plain = TinyModule(), TinyModule()
    make_trainer(tmp_path, 1).fit(plain)
    trainer = make_trainer(tmp_path, 1, row.make())
    trainer.fit(module)
    trainer.test(module, verbose=False)
    trainer.predict(module)
    make_trainer(tmp_path, 1).fit(module)
    assert set(vars(module)) == set(vars(plain))
    if row.changes_structure:
        row.restore(module)
        assert module.state_dict().keys() == plain.state_dict().keys()
        assert [type(part) for part in module.modules()] == [type(part) for part in plain.modules()]
    assert not module._forward_hooks
    assert all(parameter.requires_grad for parameter in module.parameters())
    if not row.changes_training:
        make_trainer(tmp_path, 1).fit(plain)
        assert_same_weights(plain, module)


def test_module_modes_and_random_state_are_left_alone(tmp_path, row):
    class Frozen(TinyModule):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()  # a user's frozen part must stay frozen

        def on_train_end(self) -> None:
            self.modes = [part.training for part in self.net]

    outcomes = []
    for callbacks in [], [row.make()]:
        module = Frozen()
        torch.manual_seed(7)
        make_trainer(tmp_path, 1, *callbacks, limit_train_batches=3, val_check_interval=2).fit(module)
        outcomes.append((torch.rand(3).tolist(), module.modes))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, row, precision):
    module = TinyModule()
    trainer = make_trainer(tmp_path, 1, row.make(), precision=precision)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_checkpoints_load_everywhere(tmp_path, row):
    callback, module = row.make(), TinyModule()
    checkpoint = ModelCheckpoint(tmp_path, filename="model")
    make_trainer(tmp_path, 1, callback, checkpoint, enable_checkpointing=True).fit(module)
    path = checkpoint.best_model_path
    if row.changes_structure:
        with pytest.raises(RuntimeError, match=row.load.__name__):
            TinyModule.load_from_checkpoint(path, weights_only=True)
        assert_same_weights(module, row.load(TinyModule(), path))
    else:
        assert_same_weights(module, TinyModule.load_from_checkpoint(path, weights_only=True))
    for other in (row.make(), None):  # with the callback and without
        fresh = TinyModule()
        trainer = make_trainer(tmp_path, 1, *([other] if other else []))
        if row.changes_structure and not other:
            with pytest.raises(RuntimeError, match="give the Trainer"):
                trainer.test(fresh, ckpt_path=path, weights_only=True, verbose=False)
            continue
        trainer.test(fresh, ckpt_path=path, weights_only=True, verbose=False)
        assert_same_weights(module, fresh)
        if other:
            torch.testing.assert_close(other.state_dict(), callback.state_dict(), rtol=0, atol=0)


def test_a_torchvision_net_in_a_users_module_with_dictionary_batches(tmp_path, row):
    arguments = {"batch_fn": image_and_label} if row.argument == "batch_fn" else {}
    trainer = make_trainer(tmp_path, 1, row.make(**arguments))
    module = TorchvisionModule()
    trainer.fit(module)
    trainer.test(module, verbose=False)


class DemoWithLabels(DemoModel):
    """Lightning's own demo model; its data loader gives tuples of inputs and labels."""

    def __init__(self) -> None:
        super().__init__(out_dim=3)

    def forward(self, x):
        return super().forward(x)

    def training_step(self, batch, batch_nb):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_nb):
        x, y = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self(x), y))

    test_step = validation_step

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.rand(16, 32), torch.arange(16) % 3)
        return torch.utils.data.DataLoader(data, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def test_lightnings_demo_model(tmp_path, row):
    module = DemoWithLabels()
    trainer = make_trainer(tmp_path, 1, row.make())
    trainer.fit(module)
    trainer.test(module, verbose=False)


class WritesState(pl.Callback):
    """Brings weights and callback states of each process back to the test; attributes do not survive the fork."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        states = {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks}
        torch.save((weights(pl_module), states), f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_agree(tmp_path, row):
    trainer = make_trainer(tmp_path, 2, row.make(), WritesState(), strategy="ddp_fork", devices=2)
    trainer.fit(TinyModule(batch_size=8))
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_weights(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)


class Sharded(TinyModule):
    """Shards each layer over the processes where the strategy has a mesh of them, by torch's FSDP2."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _fit_in_two_processes(rank: int, port: int, folder: Path, make: Callable[[], pl.Callback]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    outcomes = []
    for strategy in ModelParallelStrategy(2, 1, process_group_backend="gloo"), "ddp":
        module, callback = Sharded(batch_size=8), make()
        trainer = make_trainer(folder, 1, callback, strategy=strategy, devices=2, limit_train_batches=3)
        trainer.fit(module)
        measured = trainer.test(module, verbose=False)[0]
        whole = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in weights(module).items()
        }
        outcomes.append((whole, callback.state_dict(), measured))
    torch.save(outcomes, folder / f"rank-{rank}.pt")


@pytest.mark.processes
def test_sharded_weights_train_to_the_same_or_are_refused(tmp_path, row):
    """FSDP2 on two processes, the one sharded strategy that starts without a GPU."""
    if row.changes_structure or row.needs_whole_weights:
        for strategy in FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy:
            callback, module = row.make(), TinyModule()
            trainer = make_trainer(tmp_path, 1, callback)
            trainer._accelerator_connector.strategy = strategy.__new__(strategy)  # a real one wants a GPU
            with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} shards; use strategy='ddp'"):
                callback.setup(trainer, module, "fit")
            assert module.state_dict().keys() == TinyModule().state_dict().keys()
        return
    arguments = (find_free_network_port(), tmp_path, row.make)
    torch.multiprocessing.start_processes(_fit_in_two_processes, arguments, nprocs=2, start_method="fork")
    for rank in (0, 1):
        sharded, whole = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(sharded, whole)


def test_hyper_parameters_reach_the_loggers(tmp_path, row):
    trainer = make_trainer(tmp_path, 1, row.make(), logger=True, limit_train_batches=1)
    trainer.fit(TinyModule())
    name = type(row.make()).__name__
    text = "".join(path.read_text() for path in tmp_path.rglob("hparams.yaml"))
    assert f"lightning_plugins/{name}/{row.argument}" in text


def test_every_public_callback_has_a_row():
    import lightning_plugins.callbacks as public

    concrete = set(public.__all__) - {"TrainingStepCallback"} - WITH_A_MODULE_OF_THEIR_OWN.keys()
    assert concrete <= {type(row.make()).__name__ for row in CALLBACKS.values()}
