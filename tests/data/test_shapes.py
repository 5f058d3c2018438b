"""Generated shapes, and what the flip union makes of them."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_plugins.data import DistilledDataModule, ShapesDataModule, draw_shapes
from lightning_plugins.data.shapes import SHAPES
from lightning_plugins.distillation import ClassPool, FlipUnion, SyntheticSet, flip_detectability

ASYMMETRIC = range(8)


def by_class(images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    return [images[labels == label] for label in range(10)]


def test_exactly_half_of_each_class_is_mirrored():
    # What is drawn does not depend on the share: only the mirrored images differ.
    facing, labels = draw_shapes(40, mirrored=0, seed=3)
    for share, count in ((0.5, 20), (0.25, 10), (1.0, 40)):
        images, _ = draw_shapes(40, mirrored=share, seed=3)
        same = (images == facing).flatten(1).all(1)
        turned = (images == facing.flip(-1)).flatten(1).all(1)
        assert (same ^ turned).all()
        assert [int(rows.sum()) for rows in by_class(turned, labels)] == [count] * 10


def test_shapes_are_told_from_their_mirror_images_where_they_face_one_way_and_only_there():
    images, labels = draw_shapes(200, mirrored=0)
    one_way = flip_detectability(by_class(images, labels))
    both_ways = flip_detectability(by_class(draw_shapes(200)[0], labels))
    assert one_way[:8].min() > 0.9
    assert one_way[8:].max() < 0.75
    assert both_ways.max() < 0.75
    assert FlipUnion("auto").fit(by_class(images, labels)).flipped_classes(10) == (8, 9)
    assert len(FlipUnion("auto").fit(by_class(draw_shapes(200)[0], labels)).flipped_classes(10)) == 10


def test_no_shape_is_another_or_its_mirror_image():
    images, labels = draw_shapes(200, mirrored=0)
    means = torch.stack([rows.double().mean(0) for rows in by_class(images, labels)]).flatten(1)
    mirrored = torch.stack([rows.double().mean(0).flip(-1) for rows in by_class(images, labels)]).flatten(1)
    alone, turned = torch.cdist(means, means), torch.cdist(means, mirrored)
    different = ~torch.eye(10, dtype=torch.bool)
    noise = 255 / 200**0.5
    assert alone[different].min() > 3 * noise
    assert turned[different].min() > 3 * noise
    assert turned.diag()[:8].min() > 3 * noise


def test_images_follow_the_seed_and_the_test_images_do_not():
    before = torch.get_rng_state()
    first, again, second = (ShapesDataModule(train_per_class=20, seed=seed) for seed in (1, 1, 2))
    for data in (first, again, second):
        data.setup()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.train_set.images, again.train_set.images)
    assert not torch.equal(first.train_set.images, second.train_set.images)
    assert torch.equal(first.test_set.images, second.test_set.images)
    train = {image.numpy().tobytes() for image in first.train_set.images}
    assert not train & {image.numpy().tobytes() for image in first.test_set.images}
    assert (len(first.train_set), len(first.val_set), len(first.test_set)) == (180, 20, 1000)


def test_statistics_and_names():
    images = draw_shapes(200)[0] / 255
    assert images.mean().item() == pytest.approx(ShapesDataModule.mean[0], abs=2e-3)
    assert images.std().item() == pytest.approx(ShapesDataModule.std[0], abs=2e-3)
    assert ShapesDataModule.class_names == tuple(SHAPES)
    assert images.dtype == torch.float32


def test_a_set_distilled_from_shapes_finds_its_data_again(tmp_path):
    data = ShapesDataModule(train_per_class=20, mirrored=0.0, seed=4)
    data.setup()
    about = {"data": {"name": "ShapesDataModule", "seed": 4, "train_per_class": 20, "mirrored": 0.0, "root": "/"}}
    SyntheticSet.initialised("real", ClassPool.from_dataset(data.train_set), 1).save(tmp_path, about=about)
    found = DistilledDataModule(tmp_path)
    found.setup()
    assert torch.equal(found.val_set[3][0], data.val_set[3][0])
    assert torch.equal(found.test_set[3][0], data.test_set[3][0])


def test_the_command_line_takes_it():
    parser = ArgumentParser()
    parser.add_class_arguments(ShapesDataModule, "data")
    built = parser.instantiate_classes(parser.parse_args(["--data.mirrored=0", "--data.image_size=32"])).data
    built.setup()
    assert built.train_set[0][0].shape == (1, 32, 32)


def test_errors():
    with pytest.raises(ValueError, match="train_per_class must be an integer of at least 1"):
        ShapesDataModule(train_per_class=0)
    with pytest.raises(ValueError, match=r"mirrored must lie in \[0, 1\]"):
        ShapesDataModule(mirrored=1.5)
    with pytest.raises(ValueError, match="per_class must be an integer"):
        draw_shapes(0)
