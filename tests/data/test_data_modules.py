from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision import datasets

from lightning_plugins.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    ClassOverlap,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    Imbalance,
    LabelNoise,
    fashion_mnist,
)

# --- the base, through the digits and a small data set with a validation split of its own


class TwoClasses(ImageDataModule):
    """Image i holds the value i / 200, so that an item tells which image it is; label 0 for even i."""

    num_classes, in_channels, native_size = 2, 1, 4
    mean, std, class_names = (0.5,), (0.3,), ("even", "odd")
    own_val = False
    number = 200
    highest = 1

    def load(self, split):
        if split == "val" and not self.own_val:
            return None
        number = self.number if split == "train" else 20
        images = (torch.arange(number) / self.number).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return images, (torch.arange(number) % 2) * self.highest


def ready(module: ImageDataModule) -> ImageDataModule:
    module.prepare_data()
    module.setup()
    return module


def test_digits_without_a_trainer():
    data = DigitsDataModule(batch_size=100, seed=4)
    assert (data.num_classes, data.in_channels, data.image_size, len(data.class_names)) == (10, 1, 8, 10)
    ready(data)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (100, 1, 8, 8)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert torch.equal(images * 16, (images * 16).round())
    assert 0 <= images.min() <= images.max() == 1
    assert isinstance(data.train_set[0][1], int)
    assert data.class_counts.tolist() == torch.bincount(data.train_set.targets).tolist()


def test_digits_statistics_are_those_of_the_training_images():
    images = ready(DigitsDataModule(val_fraction=0)).train_set.images
    assert images.mean().item() == pytest.approx(DigitsDataModule.mean[0], abs=1e-4)
    assert images.std().item() == pytest.approx(DigitsDataModule.std[0], abs=1e-4)


def test_splits_are_disjoint_stratified_and_seeded_and_the_digits_test_set_is_fixed():
    first, second = (ready(DigitsDataModule(seed=seed, val_fraction=0.2)) for seed in (0, 1))
    train, val = first.train_set, first.val_set
    assert torch.equal(torch.cat([train.indices, val.indices]).sort().values, torch.arange(1346))
    share = torch.bincount(val.targets) / (torch.bincount(val.targets) + torch.bincount(train.targets))
    assert (share - 0.2).abs().max() < 0.005
    assert not torch.equal(val.indices, second.val_set.indices)
    assert torch.equal(first.test_set.images, second.test_set.images)
    overlap = {image.numpy().tobytes() for image in first.test_set.images} & {
        image.numpy().tobytes() for image in train.images
    }
    assert not overlap


def test_no_validation_split():
    data = ready(DigitsDataModule(val_fraction=0))
    assert data.val_dataloader() == []
    assert len(data.train_set) == 1346


def test_evaluation_order_is_fixed_and_complete():
    data = ready(DigitsDataModule(batch_size=64))
    for loader, dataset in ((data.val_dataloader(), data.val_set), (data.test_dataloader(), data.test_set)):
        assert torch.equal(torch.cat([targets for _, targets in loader]), dataset.targets)


@pytest.mark.parametrize("transform_validation", [True, False])
def test_transforms_leave_the_test_set_alone_and_validation_on_request(transform_validation):
    clean = ready(TwoClasses(val_fraction=0.25))
    noisy = ready(
        TwoClasses(val_fraction=0.25, transforms=[LabelNoise(0.4)], transform_validation=transform_validation)
    )
    assert torch.equal(noisy.test_set.targets, clean.test_set.targets)
    assert torch.equal(noisy.test_set.indices, clean.test_set.indices)

    def wrong(dataset):
        return (dataset.targets != dataset.indices % 2).float().mean().item()

    assert 0.2 < wrong(noisy.train_set) < 0.6
    assert (wrong(noisy.val_set) > 0.2) == transform_validation
    assert wrong(clean.train_set) == wrong(clean.val_set) == 0


def test_transforms_apply_in_order_and_show_in_the_counts():
    data = ready(TwoClasses(val_fraction=0, transforms=[Imbalance("step", 10), ClassOverlap([(0, 1)], 1.0)]))
    assert data.class_counts.tolist() == [10, 100]  # 100 and 10, then exchanged
    assert (data.train_set.targets != data.train_set.indices % 2).all()


def test_two_equal_transforms_draw_anew():
    once = ready(TwoClasses(val_fraction=0, transforms=[ClassOverlap([(0, 1)])])).train_set.targets
    twice = ready(TwoClasses(val_fraction=0, transforms=[ClassOverlap([(0, 1)])] * 2)).train_set.targets
    assert not torch.equal(twice, torch.arange(200) % 2)  # the same draw twice would undo itself
    assert not torch.equal(once, twice)


def test_imbalance_then_split_keeps_one_distribution():
    data = ready(TwoClasses(val_fraction=0.2, transforms=[Imbalance("exp", 10)]))
    assert data.class_counts.tolist() == [80, 8]
    assert torch.bincount(data.val_set.targets).tolist() == [20, 2]


def test_a_validation_split_of_its_own_is_left_alone():
    class Own(TwoClasses):
        own_val = True

    data = ready(Own(transforms=[LabelNoise(1.0)]))
    assert len(data.train_set) == 200
    assert torch.equal(data.val_set.targets, torch.arange(20) % 2)


def test_image_size_resizes_and_stays_in_range():
    data = ready(DigitsDataModule(image_size=12))
    image = data.train_set[3][0]
    assert data.image_size == 12
    assert image.shape == (1, 12, 12)
    assert image.min() >= 0
    assert image.max() <= 1


def test_own_augmentation_acts_on_training_images_only():
    data = ready(TwoClasses(augmentation=lambda image: torch.ones_like(image)))
    assert data.train_set[0][0].min() == 1
    assert data.val_set[0][0].max() < 1
    assert data.test_set[0][0].max() < 1


def test_augmentation_in_place_does_not_reach_the_data():
    data = ready(TwoClasses(augmentation=lambda image: image.fill_(1), val_fraction=0))
    data.train_set[0]
    assert data.train_set.images[0].max() == 0


@pytest.mark.parametrize(
    ("augmentation", "found"),
    [
        (lambda image: image * 2 + 1, "got values from 1.* to 1"),
        (lambda image: image * float("nan"), "got values from nan"),
        (lambda image: image[0], r"got shape \(4, 4\)"),
        (lambda image: (255 * image).to(torch.uint8), "type torch.uint8"),
        (lambda image: image.numpy(), "got a ndarray"),
    ],
)
def test_augmentation_that_leaves_the_unit_range(augmentation, found):
    data = ready(TwoClasses(augmentation=augmentation))
    with pytest.raises(ValueError, match=f"augmentation must return .* {found}.*leave normalisation to the model"):
        data.train_set[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be an integer of at least 0"),
        ({"image_size": 0}, ValueError, "image_size must be an integer of at least 1"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must lie in \[0, 1\), 0 for no validation"),
        ({"val_fraction": float("nan")}, ValueError, "val_fraction must lie in"),
        ({"augmentation": "flip"}, TypeError, "True, False or a callable"),
        ({"transforms": [lambda image: image]}, TypeError, "give transforms of images as augmentation"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DigitsDataModule(**arguments)


def test_val_fraction_that_empties_a_side():
    with pytest.raises(ValueError, match=r"val_fraction=0.001 does not fit the data: .* nearer to 0.5"):
        ready(TwoClasses(val_fraction=0.001))
    with pytest.raises(ValueError, match="or set transform_validation=False"):
        ready(TwoClasses(transforms=[Imbalance("step", 50)]))
    assert ready(TwoClasses(transforms=[Imbalance("step", 50)], transform_validation=False)).val_set is not None


def test_wrong_data():
    class Wrong(TwoClasses):
        highest = 2

    with pytest.raises(ValueError, match=r"labels from 0 to 2, and Wrong has labels in 0 \.\. 1; check the label"):
        ready(Wrong())

    class NoTest(TwoClasses):
        def load(self, split):
            return super().load(split) if split == "train" else None

    with pytest.raises(ValueError, match="only 'val' may be missing"):
        ready(NoTest())

    class Uneven(TwoClasses):
        def load(self, split):
            loaded = super().load(split)
            return loaded and (loaded[0], loaded[1][1:])

    with pytest.raises(ValueError, match="200 images and 199 labels; .* check the files"):
        ready(Uneven())
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\('fit'\) first"):
        TwoClasses().train_dataloader()
    with pytest.raises(RuntimeError, match=r"setup\('fit'\) first"):
        TwoClasses().class_counts  # noqa: B018
    with pytest.raises(RuntimeError, match=r"setup\('test'\) first"):
        TwoClasses().test_dataloader()


def test_setup_reads_only_what_the_stage_needs():
    data = TwoClasses()
    data.setup("fit")
    assert data.test_set is None
    train = data.train_set
    data.setup("test")
    data.setup("validate")
    assert data.train_set is train


def test_command_line():
    parser = ArgumentParser()
    parser.add_argument("--data", type=ImageDataModule)
    transforms = """[
        {"class_path": "lightning_plugins.data.Imbalance", "init_args": {"kind": "exp", "ratio": 10}},
        {"class_path": "LabelNoise", "init_args": {"rate": 0.1, "seed": 3}},
        {"class_path": "lightning_plugins.data.ClassOverlap", "init_args": {"pairs": [[1, 3], [7, 9]]}}]"""
    flip = '{"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 1.0}}'
    chosen = ["--data=lightning_plugins.data.DigitsDataModule", "--data.batch_size=7"]
    config = parser.parse_args([*chosen, f"--data.transforms={transforms}", f"--data.augmentation={flip}"])
    data = getattr(parser, "instantiate", parser.instantiate_classes)(config).data
    assert isinstance(data, DigitsDataModule)
    assert data.transforms == (Imbalance("exp", 10.0), LabelNoise(0.1, seed=3), ClassOverlap(((1, 3), (7, 9))))
    assert data.augmentation.p == 1.0
    assert data.batch_size == 7


# --- Fashion-MNIST


def write_idx(path: Path, array: np.ndarray, *, zipped: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion(folder: Path, *, zipped: bool = True, value: int = 51) -> None:
    for prefix, number in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.full((number, 28, 28), value), zipped=zipped)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(number) % 10, zipped=zipped)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_present_files(tmp_path, no_network, zipped, place):
    write_fashion(tmp_path / place, zipped=zipped)
    data = ready(FashionMNISTDataModule(root=str(tmp_path), augmentation=False, val_fraction=0.25))
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (30, 10, 20)
    image, _ = data.train_set[0]
    assert image.shape == (1, 28, 28)
    assert torch.equal(image, torch.full_like(image, 51 / 255))
    assert data.test_set.targets.tolist() == [*range(10), *range(10)]


def test_fashion_mnist_takes_the_first_folder_that_has_all_four(tmp_path, no_network):
    root = tmp_path / "root"
    write_fashion(tmp_path / "debian", value=1)
    write_fashion(root, value=2)
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    assert FashionMNISTDataModule(root=str(root)).load("test")[0].max() == 1
    write_fashion(root / "FashionMNIST" / "raw", value=3)
    assert FashionMNISTDataModule(root=str(root)).load("test")[0].max() == 3
    write_fashion(root, value=2)
    assert FashionMNISTDataModule(root=str(root)).load("test")[0].max() == 2


def test_fashion_mnist_that_is_nowhere(tmp_path, no_network):
    data = FashionMNISTDataModule(root=str(tmp_path))
    files = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte"
    with pytest.raises(FileNotFoundError, match=f"put {files}.* into {tmp_path}.*no network in tests"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"or call prepare_data\(\) to download"):
        data.setup("fit")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"\1\2" + content[2:], lambda _: b""])
def test_damaged_idx_files_are_named(tmp_path, no_network, zipped, damage):
    write_fashion(tmp_path, zipped=zipped)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is damaged.*get it again"):
        FashionMNISTDataModule(root=str(tmp_path)).setup("fit")


def test_idx_files_of_another_data_set(tmp_path, no_network):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((40, 32, 32)), zipped=True)
    with pytest.raises(ValueError, match="replace them by Fashion-MNIST's"):
        FashionMNISTDataModule(root=str(tmp_path)).setup("fit")
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.full(40, 17), zipped=True)
    with pytest.raises(ValueError, match="labels from 17 to 17"):
        FashionMNISTDataModule(root=str(tmp_path)).setup("fit")


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist(tmp_path):
    data = ready(FashionMNISTDataModule(root=str(tmp_path)))
    assert data.class_counts.tolist() == [5400] * 10
    assert torch.bincount(data.test_set.targets).tolist() == [1000] * 10
    pixels = data.train_set.images.float() / 255
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=1e-4)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (128, 1, 28, 28)
    assert images.max() == 1
    assert data.class_names[data.test_set[0][1]] == "Ankle boot"


# --- CIFAR


def write_cifar(root: Path, monkeypatch, source, label_key: str, num_classes: int) -> None:
    """Write small pickled batches in the real layout, and let torchvision expect their checksums."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        entries = []
        for number, (name, _) in enumerate(getattr(source, attribute)):
            data = np.zeros((2 * num_classes, 3, 32, 32), np.uint8)
            data[:, 0], data[:, 1, 0] = 255, 51 * (number + 1)  # red, and a first row of green
            content = {"data": data.reshape(len(data), -1), label_key: list(range(num_classes)) * 2}
            entries.append([name, write(name, content)])
        monkeypatch.setattr(source, attribute, entries)
    names = {source.meta["key"]: [str(label) for label in range(num_classes)]}
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": write(source.meta["filename"], names)})


CIFAR = [
    (CIFAR10DataModule, datasets.CIFAR10, "labels", 10, 100),
    (CIFAR100DataModule, datasets.CIFAR100, "fine_labels", 100, 200),
]


@pytest.mark.parametrize(("module", "source", "label_key", "num_classes", "number"), CIFAR)
def test_cifar(tmp_path, monkeypatch, no_network, module, source, label_key, num_classes, number):
    write_cifar(tmp_path, monkeypatch, source, label_key, num_classes)
    data = ready(module(root=str(tmp_path), augmentation=False, val_fraction=0))
    assert (data.num_classes, len(data.class_names), len(set(data.class_names))) == (num_classes,) * 3
    assert len(data.train_set) == number
    assert data.class_counts.tolist() == [number // num_classes] * num_classes
    image, target = data.train_set[1]
    assert target == 1
    assert image.shape == (3, 32, 32)
    assert image[0].min() == 1
    assert torch.allclose(image[1, 0], torch.tensor(0.2))
    assert image[1, 1:].max() == image[2].max() == 0


@pytest.mark.parametrize(("module", "source", "label_key", "num_classes", "number"), CIFAR)
def test_cifar_that_is_missing_or_damaged(
    tmp_path, monkeypatch, no_network, module, source, label_key, num_classes, number
):
    data = module(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"put {source.filename} there.*no network in tests"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"or call prepare_data\(\) to download"):
        data.setup("fit")
    write_cifar(tmp_path, monkeypatch, source, label_key, num_classes)
    path = tmp_path / source.base_folder / source.train_list[0][0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileNotFoundError, match=f"a file is damaged; .* {path.name}.* into {path.parent}"):
        data.setup("fit")


def test_cifar_augmentation_moves_and_flips(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels", 10)
    data = ready(CIFAR10DataModule(root=str(tmp_path), val_fraction=0))
    reds = torch.stack([data.train_set[index][0][0] for index in range(50)])
    assert reds.shape == (50, 32, 32)
    assert reds.flatten(1).mean(1).unique().numel() > 5  # padding of differing width came in


# --- image folders


def write_folder(root: Path, split: str, names: tuple[str, ...] = ("cat", "dog"), number: int = 10, size=(12, 9)):
    for value, name in enumerate(names):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            Image.new("RGB", size, (255 * value, index, 0)).save(root / split / name / f"{index:02}.png")


def test_image_folder(tmp_path):
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "test", number=3)
    data = ImageFolderDataModule(root=str(tmp_path), image_size=8, val_fraction=0.2, batch_size=4, augmentation=False)
    assert (data.num_classes, data.class_names) == (2, ("cat", "dog"))
    ready(data)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (16, 4, 6)
    for images, targets in [*data.train_dataloader(), *data.test_dataloader()]:
        assert images.shape[1:] == (3, 8, 8)
        assert torch.equal(images[:, 0, 0, 0], targets.float())


def test_image_folder_with_validation_images_and_the_usual_augmentation(tmp_path):
    for split in ("train", "val", "test"):
        write_folder(tmp_path, split, number=4, size=(16, 16))
    data = ready(ImageFolderDataModule(root=str(tmp_path), image_size=16, transforms=[LabelNoise(1.0)]))
    assert (len(data.train_set), len(data.val_set)) == (8, 8)
    image, target = data.val_set[7]
    assert target == 1
    assert torch.equal(image[1], torch.full((16, 16), 3 / 255))  # already of the right size: as on disk
    assert data.train_set[0][0].shape == (3, 16, 16)
    assert data.train_set[0][1] == 1


def test_image_folder_statistics(tmp_path):
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "test")
    assert ImageFolderDataModule(root=str(tmp_path)).mean == (0.485, 0.456, 0.406)
    assert ImageFolderDataModule(root=str(tmp_path), mean=[0, 0, 0], std=[1, 1, 1]).std == (1, 1, 1)
    with pytest.raises(ValueError, match="need 3 finite numbers each, std positive"):
        ImageFolderDataModule(root=str(tmp_path), std=(0, 1, 1))


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/train with one folder .* arrange the images as"):
        ImageFolderDataModule(root=str(tmp_path))
    write_folder(tmp_path, "train", ("ant", "cat", "dog"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/test with one folder"):
        ImageFolderDataModule(root=str(tmp_path))
    write_folder(tmp_path, "test", ("cat", "dog"))
    with pytest.raises(ValueError, match=r"the same class folders; \['ant'\] are in one"):
        ImageFolderDataModule(root=str(tmp_path))
    (tmp_path / "test" / "ant").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images; add some or remove it"):
        ImageFolderDataModule(root=str(tmp_path)).setup("test")
    damaged = tmp_path / "train" / "ant" / "00.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    data = ImageFolderDataModule(root=str(tmp_path), val_fraction=0, image_size=8)
    data.setup("fit")
    with pytest.raises(ValueError, match=f"the image {damaged} cannot be read.*replace or remove"):
        data.train_set[0]
