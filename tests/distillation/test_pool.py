"""Real images by class: draws, tiles, normalisation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_plugins.data import DigitsDataModule
from lightning_plugins.distillation import ClassPool, RealBatch
from toys import DictImages

LABELS = torch.tensor([2, 0, 1, 2, 2, 0, 2, 1, 2, 0])


def numbered(**arguments) -> ClassPool:
    """Image i has the value i everywhere."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 2, 3, 3).contiguous()
    return ClassPool(images, LABELS, **arguments)


def test_images_lie_by_class_in_their_order():
    pool = numbered()
    assert pool.counts == (3, 2, 5)
    assert pool.images[:, 0, 0, 0].tolist() == [1, 5, 9, 2, 7, 0, 3, 4, 6, 8]
    assert pool.class_images(1)[:, 0, 0, 0].tolist() == [2, 7]
    assert (pool.num_classes, pool.image_shape, len(pool)) == (3, (2, 3, 3), 10)


def test_draws_have_the_right_class_and_no_repeats_while_there_are_enough():
    pool = numbered(mean=(0.0, 0.0), std=(1 / 255, 1 / 255))
    seen = set()
    for _ in range(20):
        numbers = pool.draw(4).images()[:, :, 0, 0, 0].round().long()
        assert numbers.shape == (3, 4)
        for label, row in enumerate(numbers):
            assert set(LABELS[row].tolist()) == {label}
        assert sorted(torch.bincount(numbers[0])[[1, 5, 9]].tolist()) == [1, 1, 2]
        assert torch.bincount(numbers[1])[[2, 7]].tolist() == [2, 2]
        assert len(set(numbers[2].tolist())) == 4
        seen.add(tuple(numbers[2].tolist()))
    assert len(seen) > 10


def test_no_more_than_the_largest_class_is_drawn():
    assert numbered().draw(1000).per_class == 5


def test_the_first_images_as_the_published_code_takes_them():
    numbers = numbered(mean=(0, 0), std=(1, 1)).draw(2, first=True).images()[:, :, 0, 0, 0] * 255
    assert numbers.round().tolist() == [[1, 5], [2, 7], [0, 3]]


def test_images_are_normalised_and_the_statistics_measured():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 4, 4, generator=generator)
    pool = ClassPool(images, torch.arange(2).repeat(25))
    assert pool.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert pool.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), rel=1e-5)
    batch, labels = pool.batch(torch.arange(50))
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3))
    assert labels.tolist() == [0] * 25 + [1] * 25
    assert torch.equal(pool.images[:25], images[::2])  # normalising did not reach the stored images


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 12, 100])
def test_tiles_are_all_images_in_order(size):
    batch = RealBatch.of(torch.rand(4, 5, 1, 2, 2))
    found = [[] for _ in range(4)]
    for rows, images in batch.tiles(size):
        assert images[:, :, 0].numel() // 4 <= size
        for row, part in zip(range(rows.start, rows.stop), images, strict=True):
            found[row].append(part)
    torch.testing.assert_close(torch.stack([torch.cat(parts) for parts in found]), batch.images())


def test_a_part_of_the_classes():
    batch = RealBatch.of(torch.rand(4, 5, 1, 2, 2), first_class=3)
    part = batch.select(1, 3)
    assert part.classes == range(4, 6)
    torch.testing.assert_close(part.images(), batch.images()[1:3])


def test_from_a_data_set():
    data = DigitsDataModule(augmentation=False, val_fraction=0)
    data.setup("fit")
    before = torch.get_rng_state()
    pool = ClassPool.from_dataset(data.train_set, class_names=data.class_names)
    assert torch.equal(before, torch.get_rng_state())
    assert pool.counts == tuple(data.class_counts.tolist())
    assert pool.mean == pytest.approx(data.mean, abs=1e-3)
    assert pool.images.dtype == torch.float32  # sixteenths are no 255ths
    photos = torch.randint(256, (300, 3, 2, 2)) / 255
    stored = ClassPool.from_dataset(TensorDataset(photos, torch.zeros(300, dtype=torch.int64)))
    assert stored.images.dtype == torch.uint8
    assert torch.equal(stored.images / 255, photos)
    photos[-1] = 0.3  # one that is none makes all of them floats
    mixed = ClassPool.from_dataset(TensorDataset(photos, torch.zeros(300, dtype=torch.int64)))
    assert torch.equal(mixed.images, photos)


def test_draws_resume():
    first, second = numbered(seed=1), numbered(seed=2)
    first.draw(2)
    state = first.state_dict()
    following = first.draw(2).indices
    second.load_state_dict(state)
    assert torch.equal(second.draw(2).indices, following)


IMAGES = torch.rand(4, 1, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ClassPool(IMAGES.long(), torch.arange(4)), TypeError, "uint8 or floating"),
        (lambda: ClassPool(IMAGES, torch.rand(4)), TypeError, "class indices"),
        (lambda: ClassPool(IMAGES, torch.arange(3)), ValueError, "one label each"),
        (lambda: ClassPool(IMAGES * 3 - 1, torch.arange(4)), ValueError, "undo the normalisation"),
        (lambda: ClassPool(IMAGES, torch.arange(4), num_classes=2), ValueError, "must lie in 0 .. 1, got 0 .. 3"),
        (lambda: ClassPool(IMAGES, torch.arange(4), num_classes=5), ValueError, "class 4 has no image"),
        (lambda: ClassPool(IMAGES, torch.arange(4), class_names=["a"]), ValueError, "must have 4 names"),
        (lambda: ClassPool(IMAGES, torch.arange(4), mean=(0.1,), std=(0.0,)), ValueError, "std above 0"),
        (lambda: ClassPool(IMAGES, torch.arange(4)).draw(0), ValueError, "batch_size must be at least 1"),
        (lambda: ClassPool.from_dataset(DictImages()), TypeError, "wrap the data set"),
        (lambda: RealBatch.of(IMAGES), ValueError, r"\(classes, B, C, H, W\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
