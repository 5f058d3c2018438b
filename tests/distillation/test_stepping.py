"""One step for all classes against a step for each class."""

from __future__ import annotations

import pytest
import torch

from lightning_plugins.distillation import vectorised_constants

CLASSES, PASSES = 10, 200
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def gradients(values: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return values - targets + 0.3 * torch.randn(values.shape, generator=generator)


def run(name: str, constants: dict, *, class_wise: bool) -> torch.Tensor:
    targets = torch.randn(CLASSES, 40, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    values = torch.zeros(CLASSES, 40, requires_grad=True)
    optimizer = OPTIMIZERS[name]([values], **constants)
    path = []
    for _ in range(PASSES):
        gradient = gradients(values.detach(), targets, noise)
        if class_wise:
            for label in range(CLASSES):
                values.grad = torch.zeros_like(values)
                values.grad[label] = gradient[label]
                optimizer.step()
        else:
            values.grad = gradient
            optimizer.step()
        path.append(values.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize(
    ("name", "own", "arguments", "tolerance"),
    [
        ("adamw", {"betas": (0.9, 0.999), "weight_decay": 0.1}, {"weight_decay": 0.1}, 0.02),
        ("adam", {"betas": (0.9, 0.999)}, {}, 0.02),
        ("sgd", {"momentum": 0.5}, {"momentum": 0.5}, 0.004),
        ("sgd", {"momentum": 0.5, "weight_decay": 0.05}, {"momentum": 0.5, "weight_decay": 0.05}, 0.004),
    ],
)
def test_the_images_end_where_class_wise_steps_bring_them(name, own, arguments, tolerance):
    lr = 1e-3 if name.startswith("adam") else 5e-3
    one_by_one = run(name, {"lr": lr, **own}, class_wise=True)
    together = run(name, vectorised_constants(name, CLASSES, learning_rate=lr, **arguments), class_wise=False)
    untransformed = run(name, {"lr": lr, **own}, class_wise=False)
    travel = one_by_one[-1].abs().mean()
    assert travel > 0.2
    assert (together - one_by_one).abs().mean() < tolerance * travel
    assert (untransformed - one_by_one).abs().mean() > 3 * (together - one_by_one).abs().mean()


def test_one_class_changes_nothing():
    constants = vectorised_constants("adamw", 1, learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    assert constants == {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2}
    sgd = vectorised_constants("sgd", 1, learning_rate=0.1, momentum=0.9, weight_decay=0.2)
    assert sgd == pytest.approx({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lion"}, "'adam', 'adamw' or 'sgd', got 'lion'"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"momentum": 1.0}, "must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "use 'adamw'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        vectorised_constants(**{"optimizer": "sgd", "num_classes": 2, "learning_rate": 0.1} | arguments)
