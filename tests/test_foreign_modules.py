"""Modules, batches and loaders that nobody here has written, under every callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_plugins.callbacks import TrainingStepCallback
from test_callbacks import CALLBACKS, Row
from toys import NUM_CLASSES, TinyModule, make_trainer, toy_data, weights

QUICK = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
TRAINING = [name for name, row in CALLBACKS.items() if row.changes_training]


@pytest.fixture(params=CALLBACKS.values(), ids=CALLBACKS.keys())
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def fit_and_test(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    trainer.fit(module)
    trainer.test(module, verbose=False)
    assert all(value.isfinite().all() for value in module.state_dict().values() if isinstance(value, Tensor))


class NestedBatches(TinyModule):
    """Targets two levels down, and a step that does without ``forward``."""

    def loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        pairs = [{"image": x, "target": {"label": y}, "name": "a"} for x, y in dataset]
        return DataLoader(pairs, batch_size=self.batch_size)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(batch["image"]), batch["target"]["label"])}

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["image"]), batch["target"]["label"]))

    test_step = validation_step


def nested(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["target"]["label"]


def test_nested_batches(tmp_path, row):
    arguments = {"batch_fn": nested} if row.argument == "batch_fn" else {}
    fit_and_test(NestedBatches(), make_trainer(tmp_path, 1, row.make(**arguments), **QUICK))


class Stream(IterableDataset[Any]):
    """Data of which nobody knows the end."""

    def __iter__(self):
        yield from toy_data(64)


class Streaming(TinyModule):
    """Loaders without a length."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def test_loaders_without_a_length(tmp_path, row):
    fit_and_test(Streaming(), make_trainer(tmp_path, 1, row.make()))


class BuildsItselfLate(TinyModule):
    """Has no layers before Lightning asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.net = [self.net], None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.layers.pop()


def test_modules_that_build_their_layers_in_configure_model(tmp_path, row):
    fit_and_test(BuildsItselfLate(), make_trainer(tmp_path, 1, row.make(), **QUICK))


class TwoOptimizers(TinyModule):
    """What has two optimizers has to step them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[2].parameters())]


def test_manual_optimization_with_two_optimizers(tmp_path, row):
    callback, module = row.make(), TwoOptimizers()
    trainer = make_trainer(tmp_path, 1, callback, **QUICK)
    if isinstance(callback, TrainingStepCallback):
        keys = module.state_dict().keys()
        with pytest.raises(MisconfigurationException, match="use automatic optimization, or call the method"):
            trainer.fit(module)
        assert module.state_dict().keys() == keys
    else:
        fit_and_test(module, trainer)


def test_batches_without_targets_are_refused_with_the_remedy(tmp_path, row):
    class Plain(BoringModel):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    trainer = make_trainer(tmp_path, 1, row.make(), **QUICK)
    if row.argument != "batch_fn" or type(row.make()).__name__ == "BinaryQAT":  # they read no targets
        fit_and_test(Plain(), trainer)
        return
    with pytest.raises(TypeError, match="pass batch_fn"):
        fit_and_test(Plain(), trainer)


COMPILED = [
    "AdversarialTraining",
    "AdversarialTraining, TRADES",
    "AdversarialWeightPerturbation",
    "BinaryQAT",
    "DeferredReweighting",
    "FreeAdversarialTraining",
    "MixedSampleAugmentation",
    "MultiPrecisionQAT",
    "PostHocCalibration",
    "RobustnessEvaluation",
]


@pytest.mark.parametrize("whole", [True, False], ids=["module", "net"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_modules(tmp_path, name, whole):
    module = TinyModule()
    if whole:
        module = torch.compile(module, backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    trainer = make_trainer(tmp_path, 1, CALLBACKS[name].make(), **QUICK)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    torch._dynamo.reset()


class Timm(pl.LightningModule):
    """A net of timm in a user's module."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = timm.create_model("test_resnet", pretrained=False, num_classes=NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(images, torch.arange(12) % NUM_CLASSES, strict=True)), batch_size=6)

    val_dataloader = test_dataloader = train_dataloader


def test_a_net_of_timm(tmp_path, row):
    pytest.importorskip("timm")
    fit_and_test(Timm(), make_trainer(tmp_path, 1, row.make(), **QUICK))


@pytest.mark.parametrize("name", TRAINING)
def test_loss_scaling_skips_a_step_that_overflows(tmp_path, name):
    """What ``precision="16-mixed"`` does on a GPU, with torch's own scaler on the CPU."""
    start = 2.0**30
    scaler = torch.amp.GradScaler("cpu", init_scale=start, backoff_factor=2.0**-24)
    trainer = make_trainer(
        tmp_path, 1, CALLBACKS[name].make(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], limit_val_batches=1
    )
    module, before = TinyModule(), weights(TinyModule())
    if name == "MultiPrecisionQAT":
        with pytest.raises(MisconfigurationException, match="stepping='accumulate'"):
            trainer.fit(module)
        return
    trainer.fit(module)
    assert scaler.get_scale() < start
    after = module.state_dict()
    assert all(after[key].isfinite().all() for key in before)
    assert any(not torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "flags", [{"limit_val_batches": 0}, {"limit_train_batches": 0.5, "limit_val_batches": 0.5}, {"max_epochs": -1}]
)
def test_flags(tmp_path, row, flags):
    if row.needs_validation and flags.get("limit_val_batches") == 0:
        pytest.skip("refused, see test_callbacks")
    steps = {"max_steps": 3} if "max_epochs" in flags else {}
    make_trainer(tmp_path, 1, row.make(), **flags, **steps).fit(TinyModule())
