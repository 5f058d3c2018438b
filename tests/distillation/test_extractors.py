"""The bank of networks: mixing, training, files."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_plugins.distillation import ClassPool, ExtractorBank, RandomExtractors, train_expert_, untrained_net
from lightning_plugins.models import convnet3


def factory() -> nn.Module:
    return convnet3(num_classes=3, in_channels=1, image_size=8, width=4)


def pool() -> ClassPool:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 1, 8, 8, generator=generator) / 2
    images[torch.arange(60), 0, labels] += 0.5
    return ClassPool(images, labels)


def bank(**arguments) -> ExtractorBank:
    return ExtractorBank.train(factory, pool(), num_pairs=2, epochs=1, **arguments)


def test_the_network_is_the_mixture_of_its_pair():
    made = bank()
    made.mix_(1, 0.25)
    first = {name: value.clone() for name, value in made.net.state_dict().items()}
    made.mix_(1, 1.0)
    initial = {name: value.clone() for name, value in made.net.state_dict().items()}
    made.mix_(1, 0.0)
    for name, trained in made.net.state_dict().items():
        torch.testing.assert_close(first[name], 0.25 * initial[name] + 0.75 * trained)
        assert not torch.equal(initial[name], trained)


def test_sampling_changes_values_in_place_and_follows_the_generator():
    made = bank()
    storage = [value.data_ptr() for value in made.net.parameters()]
    state = made.state_dict()
    made.sample_()
    after = made.net.fc.weight.clone()
    made.sample_()
    assert not torch.equal(after, made.net.fc.weight)
    made.load_trained_()
    images = torch.rand(2, 1, 8, 8)
    logits = made.net(images)
    made.mix_(made._last, 0.0)
    assert torch.equal(made.net(images), logits)
    made.load_state_dict(state)
    made.sample_()
    assert torch.equal(after, made.net.fc.weight)
    assert storage == [value.data_ptr() for value in made.net.parameters()]
    assert not any(value.requires_grad for value in made.net.parameters())


def test_buffers_of_a_batch_normalisation_are_part_of_the_weights():
    def with_norm() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))

    made = ExtractorBank.train(with_norm, pool(), num_pairs=1, epochs=1)
    trained = made.net[1].running_mean.clone()
    made.mix_(0, 1.0)
    assert torch.equal(made.net[1].running_mean, torch.zeros(64))
    assert trained.abs().max() > 0.01
    assert not made.net.training


def test_training_learns_and_lowers_the_learning_rate(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def record(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    net = untrained_net(factory, seed=0)
    losses = train_expert_(net, pool(), epochs=12, batch_size=60, learning_rate=0.05)
    assert losses[-1] < 0.9 * losses[0]
    assert rates == pytest.approx([0.05] * 8 + [0.01] * 2 + [0.002] * 2)


def test_cutmix_mixes_the_batches_of_an_expert():
    from lightning_plugins.distillation.generators import PrivateGenerator
    from lightning_plugins.mixing import cutmix

    net, reference = untrained_net(factory, seed=0), untrained_net(factory, seed=0)
    arguments = {"epochs": 1, "batch_size": 10, "momentum": 0.0, "weight_decay": 0.0, "lower_learning_rate": False}
    losses = train_expert_(net, pool(), cutmix=0.5, seed=3, **arguments)
    order = torch.randperm(60, generator=PrivateGenerator(3, "expert").on("cpu"))
    generator = PrivateGenerator(3, "mixing of an expert").on("cpu")
    mixed, total = [], 0.0
    for rows in order.split(10):
        x, y = pool().batch(rows)
        mixed.append(float(torch.rand((), generator=generator)) < 0.5)
        if mixed[-1]:
            x, y = cutmix(x, y, num_classes=3, generator=generator)
        loss = nn.functional.cross_entropy(reference(x), y)
        for value, gradient in zip(
            reference.parameters(), torch.autograd.grad(loss, list(reference.parameters())), strict=True
        ):
            value.data -= 0.01 * gradient
        total += loss.item() / 6
    assert 0 < sum(mixed) < 6
    assert losses == pytest.approx([total])
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    plain = ExtractorBank.train(factory, pool(), num_pairs=1, epochs=1)
    assert ExtractorBank.train(factory, pool(), num_pairs=1, epochs=1, cutmix=1.0).fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="cutmix must lie"):
        train_expert_(net, pool(), epochs=1, cutmix=1.5)


def test_everything_follows_the_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert bank(seed=1).fingerprint == bank(seed=1).fingerprint != bank(seed=2).fingerprint
    first, second = RandomExtractors(factory, seed=1), RandomExtractors(factory, seed=1)
    storage = first.net.fc.weight.data_ptr()
    for extractors in (first, second):
        extractors.sample_()
    assert torch.equal(first.net.fc.weight, second.net.fc.weight)
    state = first.state_dict()
    first.sample_()
    assert not torch.equal(first.net.fc.weight, second.net.fc.weight)
    second.load_state_dict(state)
    second.sample_()
    assert torch.equal(first.net.fc.weight, second.net.fc.weight)
    assert storage == first.net.fc.weight.data_ptr()
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_brings_the_bank_back(tmp_path):
    made = bank()
    loaded = ExtractorBank.load(made.save(tmp_path / "bank.safetensors"), factory)
    assert loaded.fingerprint == made.fingerprint
    for each in (made, loaded):
        each.sample_()
    assert torch.equal(made.net.fc.weight, loaded.net.fc.weight)


def test_files_that_are_refused(tmp_path):
    path = bank().save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="another architecture"):
        ExtractorBank.load(path, lambda: nn.Linear(2, 2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fingerprint differs"):
        ExtractorBank.load(path, factory)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        ExtractorBank.load(path, factory)
    path.write_bytes(safetensors.torch.save({"initial": torch.ones(1)}))
    with pytest.raises(ValueError, match="none that ExtractorBank.save wrote"):
        ExtractorBank.load(path, factory)


def test_errors():
    with pytest.raises(ValueError, match="num_pairs must be at least 1"):
        ExtractorBank.train(factory, pool(), num_pairs=0)
    with pytest.raises(ValueError, match="epochs must be at least 0"):
        train_expert_(factory(), pool(), epochs=-1)
    with pytest.raises(RuntimeError, match="lower learning_rate"):
        train_expert_(factory(), pool(), epochs=3, learning_rate=1e30)
    with pytest.raises(RuntimeError, match="use an ExtractorBank"):
        RandomExtractors(factory).load_trained_()
    with pytest.raises(ValueError, match="the same .J, P."):
        ExtractorBank(factory(), torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="load the same bank"):
        bank(seed=1).load_state_dict(bank(seed=2).state_dict())
