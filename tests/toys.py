"""Small modules, data and Trainers that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

NUM_CLASSES = 3


def toy_data(n: int = 64, *, seed: int = 0) -> TensorDataset:
    """Three noisy blobs in eight dimensions; no net gets them all right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % NUM_CLASSES
    inputs = torch.randn(n, 8, generator=generator)
    inputs[:, :NUM_CLASSES] += 2.0 * F.one_hot(labels, NUM_CLASSES)
    return TensorDataset(inputs, labels)


class TinyModule(pl.LightningModule):
    """A user's module: two linear layers with dropout-free, fully deterministic training."""

    def __init__(self, *, batch_size: int = 16, n_val: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
        for parameter in self.net.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.batch_size = batch_size
        self.n_val = n_val

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self(inputs), labels))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("test_loss", F.cross_entropy(self(inputs), labels))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(64))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(self.n_val, seed=1))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(32, seed=2))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(32, seed=3))


class ThreeLayers(TinyModule):
    """A net with a layer to convert between the first and the last, and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Hardtanh(), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, NUM_CLASSES)
        )
        for parameter in (p for p in self.net.parameters() if p.ndim == 2):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        for layer in (part for part in self.net if isinstance(part, nn.Linear)):
            layer.bias.data.zero_()


class TinyImages(pl.LightningModule):
    """A user's module on images in [0, 1], with batch normalisation and dropout; class 2 is rare."""

    def __init__(self, *, accumulate: int = 1, normalized: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 3)
            )
        self.normalized, self.batch_size = normalized, 8 // accumulate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def dataset(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]).repeat(4)
        images = torch.rand(32, 1, 6, 6, generator=generator)
        images[torch.arange(32), 0, labels, labels] = 1.0
        if self.normalized:
            images = (images - 0.5) / 0.25
        data = TensorDataset(images, labels)
        data.targets = labels
        return data

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class DictImages(Dataset[dict[str, Any]]):
    """What many users have: a data set of dictionaries."""

    def __init__(self, n: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(n, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": f"image {index}", "image": self.images[index], "label": index % NUM_CLASSES}


class TorchvisionModule(pl.LightningModule):
    """A torchvision network in twenty lines of a user's own, fed by dictionaries, calling the network directly."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v3_small

        self.backbone = mobilenet_v3_small(num_classes=NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def training_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.backbone(batch["image"]), batch["label"])}

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.log("val_loss", F.cross_entropy(self.backbone(batch["image"]), batch["label"]))

    def test_step(self, batch: dict[str, Any]) -> None:
        self.log("test_loss", F.cross_entropy(self(batch["image"]), batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DictImages(), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def image_and_label(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["label"]


def make_trainer(folder: Path, epochs: int = 2, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU that leaves its files in ``folder``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(
    first: nn.Module | dict[str, Tensor], second: nn.Module | dict[str, Tensor], **tolerance: float
) -> None:
    first = first if isinstance(first, dict) else weights(first)
    second = second if isinstance(second, dict) else weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **(tolerance or {"rtol": 0, "atol": 0}))
