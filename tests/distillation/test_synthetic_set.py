"""The synthetic set: first values, views, files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_plugins.distillation import ClassPool, SyntheticSet, decode


def pool(channels: int = 1, side: int = 8) -> ClassPool:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, channels, side, side), dtype=torch.uint8, generator=generator)
    return ClassPool(images, torch.arange(3).repeat(10), class_names=("T-shirt/top", "b", "c"))


def small(**arguments) -> SyntheticSet:
    images = torch.rand(3, 2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return SyntheticSet(images, **arguments)


def same(first: SyntheticSet, second: SyntheticSet) -> bool:
    values = [part.state_dict() for part in (first, second)]
    return values[0].keys() == values[1].keys() and all(
        torch.equal(values[0][name], values[1][name]) for name in values[0]
    )


def test_noise_has_the_published_law():
    pixel = SyntheticSet.initialised("noise", pool(3, 32), 20)
    assert pixel.images.min() == 0
    assert pixel.images.max() == 1
    assert pixel.images.mean().item() == pytest.approx(0.5, abs=0.01)
    normal = SyntheticSet.initialised("noise", pool(3, 32), 20, space="normalised")
    assert normal.images.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("space", ["pixel", "normalised"])
def test_real_images_of_the_class(space):
    reals = pool()
    made = SyntheticSet.initialised("real", reals, 4, space=space, seed=3)
    pixels = made.pixels(made.images)
    for label in range(3):
        of_class = reals.class_images(label) / 255
        for image in pixels[label]:
            assert (of_class - image).abs().amax((1, 2, 3)).min() < 1e-6
    torch.testing.assert_close(made.normalise(made.images), (pixels - reals.mean[0]) / reals.std[0])


def test_mosaics_hold_shrunken_real_images():
    reals = ClassPool(torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 1, 8, 8).contiguous(), torch.arange(2))
    made = SyntheticSet.initialised("mix", reals, 2, rho=2)
    assert made.decode().shape == (2, 8, 1, 8, 8)
    torch.testing.assert_close(made.images[1], torch.full((2, 1, 8, 8), 0.8))


def test_first_values_follow_the_seed():
    first, second, other = (SyntheticSet.initialised("mix", pool(), 1, rho=2, seed=seed) for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def test_decoding_labels_and_logits_belong_together():
    made = small(rho=2, variant="multi", soft_logits=torch.arange(6.0).view(3, 2, 1))
    assert torch.equal(made.decode(), decode(made.images, 2, "multi"))
    assert made.decoded_per_class == 10
    assert made.decoded_labels().tolist() == [[label] * 10 for label in range(3)]
    assert made.decoded_logits()[1, :, 0].tolist() == [2, 3] * 5
    whole = small(rho=2, soft_logits=torch.rand(3, 8, 4))
    assert torch.equal(whole.decoded_logits(), whole.soft_logits)


def test_the_images_are_what_is_trained():
    made = small(rho=2, mean=(0.5,), std=(0.25,))
    assert [name for name, _ in made.named_parameters()] == ["images"]
    made.normalise(made.decode()).square().sum().backward()
    assert made.images.grad.abs().sum() > 0


def test_clamping_is_for_pixels():
    images = torch.linspace(-1, 2, 8).view(1, 2, 1, 2, 2)
    made = SyntheticSet(images)
    assert made.clamp_() is made
    assert torch.equal(made.images, images.clamp(0, 1))
    assert torch.equal(SyntheticSet(images, space="normalised").clamp_().images, images)
    assert images.min() == -1  # the set has a copy


def test_as_a_data_set():
    made = small(rho=2, mean=(0.4,), std=(0.2,), soft_logits=torch.rand(3, 2, 5))
    data = made.as_dataset()
    assert len(data) == 24
    image, label, logits = data[9]
    torch.testing.assert_close(image, (made.decode()[1, 1] - 0.4) / 0.2)
    assert (int(label), image.requires_grad) == (1, False)
    assert torch.equal(logits, made.soft_logits[1, 1])
    torch.testing.assert_close(made.as_dataset(normalise=False)[9][0], made.decode()[1, 1])
    with torch.no_grad():
        made.images.zero_()
    assert data[9][0].abs().max() > 0


@pytest.mark.parametrize("space", ["pixel", "normalised"])
def test_a_file_brings_everything_back(tmp_path, space):
    made = small(
        rho=2, variant="bound", bound=6, space=space, mean=(0.286,), std=(0.353,), class_names=("a/b", "ü", "c"),
        soft_logits=torch.rand(3, 2, 7),
    )  # fmt: skip
    about = {"dataset": "toys", "seeds": (1, 2), "accuracy": {"mean": 0.5}}
    folder = made.save(tmp_path / "set", about=about)
    loaded = SyntheticSet.load(folder)
    assert same(made, loaded)
    assert loaded.about == {"dataset": "toys", "seeds": [1, 2], "accuracy": {"mean": 0.5}}
    for name in ("space", "rho", "variant", "bound", "class_names"):
        assert getattr(loaded, name) == getattr(made, name)
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["images_per_class"], meta["decoded_per_class"], meta["about"]["dataset"]) == (2, 5, "toys")
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "set.safetensors"]


def test_half_precision_is_what_half_precision_can_hold(tmp_path):
    made = small()
    loaded = SyntheticSet.load(made.save(tmp_path, dtype=torch.float16))
    assert torch.equal(loaded.images, made.images.half().float())
    assert loaded.images.dtype == torch.float32


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_the_previous_set_whole(tmp_path, monkeypatch, step, call, old):
    folder = tmp_path / "set"
    folder.mkdir()
    if old:
        small().save(folder, about={"which": "old"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    genuine, calls = getattr(os, step), []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return genuine(*arguments)

    monkeypatch.setattr(os, step, fails_once)
    with pytest.raises(OSError, match="No space left"):
        small(rho=2).save(folder, about={"which": "new"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damage_anywhere_is_noticed(tmp_path):
    path = small().save(tmp_path) / "set.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set\.safetensors"):
            SyntheticSet.load(tmp_path)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged one"):
            SyntheticSet.load(tmp_path)


def test_foreign_files_are_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "set.safetensors"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="no safetensors file"):
        SyntheticSet.load(tmp_path)
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(safetensors.torch.save({"images": torch.rand(1, 1, 1, 2, 2)}))
    with pytest.raises(ValueError, match="none that SyntheticSet.save wrote"):
        SyntheticSet.load(tmp_path)
    path.write_bytes(safetensors.torch.save({}, {"lightning_plugins.distillation.synthetic_set": "{}"}))
    with pytest.raises(ValueError, match="header cannot be read"):
        SyntheticSet.load(tmp_path)
    header = json.dumps({"version": 2, "meta": {}, "checksum": ""})
    path.write_bytes(safetensors.torch.save({}, {"lightning_plugins.distillation.synthetic_set": header}))
    with pytest.raises(ValueError, match="upgrade it"):
        SyntheticSet.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        SyntheticSet.load(tmp_path / "nowhere")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_hold_the_images_to_one_step(tmp_path, channels):
    made = SyntheticSet.initialised("mix", pool(channels), 2, rho=2)
    folder = made.save_png(tmp_path / "png")
    data = ImageFolder(folder)
    assert data.classes == ["0_T-shirt_top", "1_b", "2_c"]
    assert data.targets == made.labels.flatten().tolist()
    for (path, _), image in zip(data.samples, made.images.detach().flatten(0, 1), strict=True):
        stored = torch.from_numpy(np.array(Image.open(path)) / 255).float()
        stored = stored[None] if channels == 1 else stored.permute(2, 0, 1)
        assert (stored - image).abs().max() <= 0.5 / 255 + 1e-6
    assert len(list(made.save_png(tmp_path / "decoded", decoded=True).glob("*/*.png"))) == 24


def test_pictures_of_a_set_that_was_not_clamped(tmp_path):
    made = SyntheticSet(torch.linspace(-2, 2, 8).view(1, 2, 1, 2, 2), space="normalised", mean=(0.5,), std=(0.3,))
    with pytest.raises(ValueError, match="pass rescale=True"):
        made.save_png(tmp_path / "png")
    assert not list(tmp_path.iterdir())
    folder = made.save_png(tmp_path / "png", rescale=True)
    assert np.array(Image.open(folder / "0" / "0.png"))[0, 0] == 0
    assert np.array(Image.open(folder / "0" / "1.png"))[1, 1] == 255


@pytest.mark.parametrize("space", ["pixel", "normalised"])
def test_the_quantised_set_is_what_the_pictures_hold(tmp_path, space):
    made = SyntheticSet(RAND, space=space, mean=[0.3], std=[0.4], rho=2, soft_logits=torch.rand(2, 2, 3))
    rescale = space == "normalised"
    found = made.quantised(rescale=rescale)
    folder = made.save_png(tmp_path / "png", rescale=rescale)
    pictures = [np.array(Image.open(path)) for path in sorted(folder.glob("*/*.png"))]
    assert torch.equal((found.images * 255).round().flatten(0, 2), torch.from_numpy(np.stack(pictures)).float())
    assert (found.space, found.rho, found.mean.item()) == ("pixel", 2, pytest.approx(0.3))
    assert torch.equal(found.soft_logits, made.soft_logits)
    if not rescale:
        assert (found.images - made.images).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="pass rescale=True"):
        SyntheticSet(RAND + 9, space="normalised").quantised()


def test_pictures_are_written_all_or_none(tmp_path, monkeypatch):
    genuine, calls = Image.Image.save, []

    def fails(self, *arguments):
        calls.append(self)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return genuine(self, *arguments)

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        small().save_png(tmp_path / "png")
    assert not list(tmp_path.iterdir())


RAND = torch.rand(2, 2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda folder: SyntheticSet(RAND[0]), ValueError, r"shape \(C, n, channels, H, W\)"),
        (lambda folder: SyntheticSet(RAND, space="rgb"), ValueError, "'pixel' or 'normalised', got 'rgb'"),
        (lambda folder: SyntheticSet(RAND, rho=5), ValueError, "rho must be at least 1"),
        (lambda folder: SyntheticSet(RAND, mean=(0, 0)), ValueError, "must have 1 values"),
        (lambda folder: SyntheticSet(RAND, class_names=("a",)), ValueError, "must have 2 names, got 1"),
        (lambda folder: SyntheticSet(RAND, soft_logits=torch.rand(2, 3, 2)), ValueError, r"\(2, 2 or 2, K\)"),
        (lambda folder: SyntheticSet.initialised("zeros", pool(), 1), ValueError, "'noise', 'real' or 'mix'"),
        (lambda folder: SyntheticSet.initialised("real", pool(), 0), ValueError, "images_per_class must be"),
        (lambda folder: SyntheticSet(RAND).save(folder, dtype=torch.int8), ValueError, "float32 or torch.float16"),
        (lambda folder: SyntheticSet(RAND * torch.nan).save(folder), ValueError, "has training diverged"),
        (lambda folder: SyntheticSet(RAND * 1e6).save(folder, dtype=torch.float16), ValueError, "not finite"),
        (lambda folder: SyntheticSet(RAND).save(folder, about={"a": torch.ones(1)}), TypeError, "about must hold"),
        (lambda folder: SyntheticSet(RAND).save(folder, about={"a": float("nan")}), TypeError, "finite numbers"),
        (lambda folder: SyntheticSet(RAND * torch.nan).save_png(folder / "a"), ValueError, "are not finite"),
        (lambda folder: SyntheticSet(RAND.expand(2, 2, 4, 4, 4)).save_png(folder / "a"), ValueError, "one or three"),
        (lambda folder: SyntheticSet(RAND).save_png(folder.parent), ValueError, "name a new folder"),
    ],
)
def test_errors(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
