"""AutoAttack: the cascade, its warnings, and evaluations that are interrupted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.robustness import apgd, auto_attack, auto_attack_dataset, pgd
from lightning_plugins.robustness import auto_attack as package_attribute
from lightning_plugins.robustness.auto_attack import _Cascade

FEW = {"num_steps": 6, "num_queries": 12}


def small_net(classes: int = 5, *, scale: float = 1.0, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, classes))
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return nn.Sequential(net, LogitScale(scale))


class LogitScale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def images(number: int, *, seed: int = 0) -> Tensor:
    return torch.rand(number, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def labelled(net: nn.Module, number: int) -> tuple[Tensor, Tensor]:
    """Images with the net's own predictions, one of them changed."""
    inputs = images(number)
    with torch.no_grad():
        targets = net(inputs).argmax(1)
    targets[0] = (targets[0] + 1) % 5
    return inputs, targets


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("version", ["standard", "plus", "quick"])
@pytest.mark.filterwarnings("ignore:Square, which")
def test_the_cascade_is_what_survives_every_part(version, norm):
    net = small_net()
    inputs, targets = labelled(net, 20)
    eps = 0.02 if norm == "linf" else 0.12
    result = auto_attack(net, inputs, targets, eps=eps, norm=norm, version=version, **FEW)
    assert (
        result.components
        == {
            "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
            "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
            "quick": ("apgd-t",),
        }[version]
    )
    assert result.broken_by[0] == 0
    assert (result.broken_by == 0).sum() == 1
    assert torch.equal(result.success, result.broken_by >= 0)
    assert 0.1 < result.success.float().mean() < 0.95
    accuracies = list(result.accuracies.values())
    assert list(result.accuracies) == ["clean", *result.components]
    assert accuracies[0] == pytest.approx(0.95)
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == pytest.approx(1 - result.success.float().mean().item())
    assert torch.equal(result.adversarial[~result.success], inputs[~result.success])
    with torch.no_grad():
        assert torch.equal(net(result.adversarial).argmax(1) != targets, result.success)


def test_weaker_attacks_leave_at_least_as_many():
    net = small_net()
    inputs, targets = labelled(net, 40)
    eps = 0.02
    found = auto_attack(net, inputs, targets, eps=eps, num_steps=20, num_queries=20).success
    weaker = pgd(net, inputs, targets, eps=eps, step_size=eps / 4, num_steps=10).success
    assert found.sum() >= weaker.sum()
    assert (found >= apgd(net, inputs, targets, eps=eps, num_steps=20).success).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.filterwarnings("ignore:Square, which")
def test_few_classes_are_attacked_by_the_margin(classes):
    net, inputs = small_net(classes), images(8)
    with torch.no_grad():
        targets = net(inputs).argmax(1)
    for version in ("standard", "plus"):
        assert auto_attack(net, inputs, targets, eps=0.3, version=version, **FEW).success.all()


def test_saturated_logits_hide_from_the_cross_entropy_only():
    net, saturated = small_net(), small_net(scale=1e3)
    inputs, targets = labelled(net, 24)
    arguments: dict[str, Any] = {"eps": 0.05, "num_steps": 20}
    with pytest.warns(UserWarning, match="exactly zero"):
        fooled = apgd(saturated, inputs, targets, **arguments)
    plain = apgd(net, inputs, targets, **arguments)
    assert fooled.success.sum() < 0.7 * plain.success.sum()
    for loss in ("dlr", "dlr_targeted"):
        hidden = apgd(saturated, inputs, targets, loss=loss, **arguments)
        assert torch.equal(hidden.success, apgd(net, inputs, targets, loss=loss, **arguments).success)
        assert hidden.success.sum() >= plain.success.sum()
    with pytest.warns(UserWarning, match="the logits are saturated, and attacks on the cross-entropy alone overstate"):
        auto_attack(saturated, inputs, targets, eps=0.05, **FEW)


class Noisy(nn.Module):
    """A random defence with a generator of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.generator = net, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn(x.shape, generator=self.generator))


def test_random_networks_get_the_version_made_for_them():
    net = small_net()
    inputs, targets = labelled(net, 6)
    with pytest.warns(UserWarning, match='the network is random; attack it with version="rand"'):
        auto_attack(Noisy(net), inputs, targets, eps=0.1, version="quick", num_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = auto_attack(Noisy(net), inputs, targets, eps=0.1, version="rand", num_steps=3)
    assert result.components == ("apgd-ce", "apgd-dlr")
    assert result.success.float().mean() > 0.5
    with pytest.raises(ValueError, match='these do not; use "standard"'):
        auto_attack(net, inputs, targets, eps=0.1, version="rand")


def test_probabilities_gradients_inside_and_masking_are_named():
    net = small_net()
    inputs, targets = labelled(net, 12)
    with pytest.warns(UserWarning, match="look like probabilities"):
        auto_attack(lambda x: net(x).softmax(1), inputs, targets, eps=0.01, version="quick", num_steps=2)

    def purify(x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(net(moved).sum(), moved)
        return net(x - 0.001 * gradient)

    with pytest.warns(UserWarning, match="computes gradients inside its forward pass"):
        auto_attack(purify, inputs, targets, eps=0.01, version="quick", num_steps=2)

    class Rounded(torch.autograd.Function):
        """A step whose gradient says nothing."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient)

    with pytest.warns(UserWarning, match="the network probably masks its gradients"):
        auto_attack(lambda x: net(Rounded.apply(x)), inputs, targets, eps=0.06, num_steps=4, num_queries=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto_attack(purify, inputs, targets, eps=0.01, version="quick", num_steps=2, sanity_checks=False)


def test_a_sound_network_gets_no_warning():
    net = small_net()
    inputs, targets = labelled(net, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto_attack(net, inputs, targets, eps=0.02, num_steps=20, num_queries=20)


def test_the_name_of_the_function_hides_the_module():
    assert package_attribute is auto_attack


# Over a data set


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:Square, which")
@pytest.mark.parametrize("stop_after", range(1, 9))
def test_an_interrupted_run_ends_in_the_same_result(tmp_path, monkeypatch, stop_after):
    net = small_net()
    data = labelled(net, 9)
    arguments: dict[str, Any] = {"eps": 0.02, "batch_size": 5, "progress": False, "num_steps": 2, "num_queries": 4}
    straight = auto_attack_dataset(net, data, **arguments)
    path = tmp_path / "states" / "state.safetensors"
    attack, calls = _Cascade._attack, []

    def stopping(self: _Cascade, component: str, generator: torch.Generator) -> None:
        if len(calls) == stop_after:
            raise Interrupted
        calls.append(component)
        attack(self, component, generator)

    monkeypatch.setattr(_Cascade, "_attack", stopping)
    if stop_after < 8:
        with pytest.raises(Interrupted):
            auto_attack_dataset(net, data, state_path=path, **arguments)
    else:
        auto_attack_dataset(net, data, state_path=path, **arguments)
    assert path.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(_Cascade, "_attack", attack)

    resumed = auto_attack_dataset(net, data, state_path=path, **arguments)
    assert torch.equal(resumed.broken_by, straight.broken_by)
    assert (resumed.num_gradients, resumed.num_forwards) == (straight.num_gradients, straight.num_forwards)
    assert resumed.accuracies == straight.accuracies

    def never(self: _Cascade, component: str, generator: torch.Generator) -> None:
        raise AssertionError("a finished file needs no attack")

    monkeypatch.setattr(_Cascade, "_attack", never)
    assert torch.equal(auto_attack_dataset(net, data, state_path=path, **arguments).broken_by, straight.broken_by)


@pytest.mark.filterwarnings("ignore:Square, which")
def test_loaders_tensors_and_single_batches_agree(capsys):
    net = small_net()
    inputs, targets = labelled(net, 7)
    by_tensors = auto_attack_dataset(net, (inputs, targets), eps=0.02, batch_size=4, progress=False, **FEW)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    by_loader = auto_attack_dataset(net, loader, eps=0.02, **FEW)
    assert "AutoAttack" in capsys.readouterr().err
    assert torch.equal(by_loader.broken_by, by_tensors.broken_by)
    dictionaries = [{"image": inputs[:4], "label": targets[:4]}, {"image": inputs[4:], "label": targets[4:]}]
    by_dictionaries = auto_attack_dataset(
        net, dictionaries, eps=0.02, batch_fn=lambda batch: (batch["image"], batch["label"]), progress=False, **FEW
    )
    assert torch.equal(by_dictionaries.broken_by, by_tensors.broken_by)
    assert by_tensors.robust_accuracy == pytest.approx(1 - by_tensors.success.float().mean().item())
    assert by_tensors.accuracies["clean"] == pytest.approx(6 / 7)


def test_state_of_another_run_is_refused(tmp_path):
    net = small_net()
    inputs, targets = labelled(net, 6)
    path = tmp_path / "state.safetensors"

    def run(net: nn.Module = net, data: Any = (inputs, targets), **changes: Any) -> Any:
        arguments = {"eps": 0.02, "version": "quick", "num_steps": 2, "batch_size": 3, "progress": False}
        return auto_attack_dataset(net, data, state_path=path, **(arguments | changes))

    run()
    with pytest.raises(ValueError, match=r"run with other eps, seed; delete it"):
        run(eps=0.03, seed=1)
    with pytest.raises(ValueError, match="run with other network"):
        run(small_net(seed=1))
    with pytest.raises(ValueError, match=r"batch 1 differs.*fixed order"):
        run(data=(torch.cat([inputs[:3], inputs[3:].flip(0)]), targets))
    with pytest.raises(ValueError, match="batch 0 differs"):
        run(data=(inputs, targets.flip(0)))
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not hold the state of an attack"):
        run()
    with pytest.raises(ValueError, match="data holds no images"):
        auto_attack_dataset(net, [], eps=0.1, progress=False)
    with pytest.raises(ValueError, match="6 images and 5 classes"):
        auto_attack_dataset(net, (inputs, targets[:5]), eps=0.1, progress=False)
    assert Path(path).read_bytes() == b"something else"
