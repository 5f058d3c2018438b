"""The copy for attacks: the same logits, nothing shared, nothing normalised."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.models import resnet20
from lightning_plugins.robustness import attack_copy, pgd
from toys import assert_same_weights, weights


def settled(net: nn.Module) -> nn.Module:
    """A net whose batch normalisations have seen data."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.bias.data.copy_(0.1 * torch.randn(module.num_features, generator=generator))
    return net


def images(number: int = 4) -> Tensor:
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits_of(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(inputs)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_copy_gives_the_same_logits_without_normalisations(channels_last):
    net = settled(resnet20(width=4))
    before, modes = weights(net), [module.training for module in net.modules()]
    quick = attack_copy(net, channels_last=channels_last, example=images())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    torch.testing.assert_close(quick(images()), logits_of(net, images()), rtol=1e-4, atol=1e-5)
    assert_same_weights(net, before)
    assert [module.training for module in net.modules()] == modes
    assert not any(parameter.requires_grad for parameter in quick.parameters())
    ours = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    assert not ours & {tensor.untyped_storage().data_ptr() for tensor in quick.state_dict().values()}
    assert not any(module.training for module in quick.train().modules())


def test_bfloat16_network_and_float32_perturbation():
    net = settled(resnet20(width=4))
    quick = attack_copy(net, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in quick.parameters()} == {torch.bfloat16}
    inputs, targets = images(), torch.arange(4)
    result = pgd(quick, inputs, targets, eps=0.03, step_size=0.01, num_steps=3)
    assert result.adversarial.dtype == result.logits.dtype == torch.float32
    assert ((result.adversarial - inputs).abs() <= 0.03 + 1e-6).all()
    torch.testing.assert_close(quick(inputs), logits_of(net, inputs), rtol=0.1, atol=0.1)


def test_attacks_on_the_copy_are_those_on_the_network():
    net = settled(resnet20(width=4)).double()
    inputs, targets = images().double(), torch.arange(4)
    results = [
        pgd(target, inputs, targets, eps=0.03, step_size=0.01, num_steps=3) for target in (net, attack_copy(net))
    ]
    torch.testing.assert_close(results[0].adversarial, results[1].adversarial, rtol=0, atol=1e-9)


class Undecided(nn.Module):
    """Control flow that tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return (x if x.sum() > 0 else -x).mean((2, 3))


class Specialised(Undecided):
    """Traced, it would keep the numbers of the first batch... here: of no batch at all."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if isinstance(x, Tensor) else 5.0  # a stand-in is no tensor
        return scale * self.norm(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("kind", [Undecided, Specialised])
def test_what_cannot_be_folded_is_copied_as_it_is(kind):
    net = settled(kind())
    with pytest.warns(UserWarning, match=f"{kind.__name__} keeps its batch normalisations"):
        quick = attack_copy(net, example=images())
    torch.testing.assert_close(quick(images()), logits_of(net, images()))
    assert not any(parameter.requires_grad for parameter in quick.parameters())


class Shared(nn.Module):
    """What must not be folded: outputs read twice, layers called twice, subclasses, hooks, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.called_twice, self.norm2, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.hooked, self.norm4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.subclass, self.norm5 = type("Own", (nn.Conv2d,), {})(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.stateless = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.folded, self.norm6 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        x = self.norm1(y) + y
        x = self.norm3(self.called_twice(self.norm2(self.called_twice(x))))
        x = self.norm5(self.subclass(self.norm4(self.hooked(x))))
        return self.norm6(self.folded(self.stateless(self.conv(x)))).mean((2, 3))


def test_only_what_is_safe_is_folded():
    net = Shared().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean += 0.3
            module.running_var *= 2
    quick = attack_copy(net)
    inputs = images().double()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in quick.modules()) == 6
    torch.testing.assert_close(quick(inputs), logits_of(net, inputs))


def test_lightning_modules_and_inference_mode():
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = settled(resnet20(width=4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Module()
    with torch.inference_mode():
        quick = attack_copy(module, example=images())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in quick.modules())
    pgd(quick, images(), torch.arange(4), eps=0.1, step_size=0.1, num_steps=1)


def test_refuses_functions_and_integer_types():
    with pytest.raises(TypeError, match=r"needs an nn.Module, found function; wrap"):
        attack_copy(lambda x: x)
    with pytest.raises(ValueError, match=r"such as torch.bfloat16, got torch.int8"):
        attack_copy(nn.Linear(1, 1), dtype=torch.int8)
