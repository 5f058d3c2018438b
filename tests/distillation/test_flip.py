"""The flip union, and the classes that it must leave alone."""

from __future__ import annotations

import pytest
import torch

from lightning_plugins.data import FashionMNISTDataModule, fashion_mnist
from lightning_plugins.distillation import FlipUnion, decode, flip_detectability, flip_union


def wedges(count: int, share_left: float, seed: int) -> torch.Tensor:
    """Noisy triangles; ``share_left`` of them face left."""
    generator = torch.Generator().manual_seed(seed)
    shape = (torch.arange(12)[:, None] > torch.arange(12)).float()
    left = torch.rand(count, generator=generator) < share_left
    images = torch.where(left[:, None, None], shape, shape.flip(-1))
    return (images + 0.3 * torch.randn(images.shape, generator=generator))[:, None]


SHARES = [0.5, 1.0, 0.6, 0.0, 0.45]


def test_detectability_is_that_of_the_definition():
    classes = [wedges(200, share, seed) for seed, share in enumerate(SHARES)]
    found = flip_detectability(classes)
    for images, value in zip(classes, found, strict=True):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        mean, rest = images[order[:100]].mean(0), images[order[100:]]
        near = (rest - mean).square().sum((1, 2, 3)) < (rest - mean.flip(-1)).square().sum((1, 2, 3))
        flipped = rest.flip(-1)
        told = (flipped - mean).square().sum((1, 2, 3)) > (flipped - mean.flip(-1)).square().sum((1, 2, 3))
        assert value == pytest.approx((near.float().mean() + told.float().mean()).item() / 2, abs=1e-6)


def test_auto_leaves_out_exactly_the_classes_that_face_one_way():
    flip = FlipUnion("auto").fit(wedges(200, share, seed) for seed, share in enumerate(SHARES))
    assert flip.flipped_classes(5) == (0, 2, 4)
    images = torch.rand(5, 3, 1, 4, 4)
    united = flip.per_class(images)
    assert torch.equal(united[:, :3], images)
    for label in range(5):
        assert torch.equal(united[label, 3:], images[label].flip(-1) if label in (0, 2, 4) else images[label])
    # a part of the classes, as one call of several has it
    assert torch.equal(flip.per_class(images[1:3], classes=range(1, 3)), united[1:3])
    assert flip.per_class(images, side="real") is images


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_auto_leaves_out_the_shoes_of_fashion_mnist(tmp_path):
    data = FashionMNISTDataModule(root=str(tmp_path), val_fraction=0.0)
    data.setup("fit")
    images, labels = data.train_set.images, data.train_set.targets
    flip = FlipUnion("auto").fit(images[labels == label].view(-1, 1, 28, 28) for label in range(10))
    assert flip.flipped_classes(10) == (0, 1, 2, 3, 4, 6, 8)


def test_a_mixed_batch_gets_the_mirror_images_of_flipped_classes_alone():
    flip = FlipUnion("auto").fit(wedges(200, share, seed) for seed, share in enumerate(SHARES))
    images, labels = torch.rand(4, 1, 2, 3), torch.tensor([1, 4, 3, 0])
    united, doubled = flip(images, labels)
    assert doubled.tolist() == [1, 4, 3, 0, 4, 0]
    assert torch.equal(united[4:], images[[1, 3]].flip(-1))


def test_a_symmetric_class_cannot_be_told_from_its_mirror_image():
    assert flip_detectability([torch.ones(4, 1, 2, 2, dtype=torch.uint8)]).tolist() == [0.5]


def test_a_second_union_changes_no_mean():
    images = torch.rand(2, 3, 1, 4, 5)
    flip = FlipUnion("synthetic")
    once = flip.per_class(images)
    torch.testing.assert_close(flip.per_class(once).mean(1), once.mean(1))


def test_the_gradient_of_a_loss_on_the_union_is_that_of_both_halves():
    images = torch.rand(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 1, 3, 4, dtype=torch.float64)
    united, labels = flip_union(images, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad((united * weights).sum(), images)
    torch.testing.assert_close(gradient, weights[:2] + weights[2:].flip(-1))
    assert labels.tolist() == [0, 1, 0, 1]
    united = flip_union(images, labels[:2])[0]
    (gradient,) = torch.autograd.grad((united.mean(0) * torch.eye(3, 4).add(torch.eye(3, 4).flip(-1))).sum(), images)
    torch.testing.assert_close(gradient, gradient.flip(-1))


def test_it_commutes_with_the_decoding_up_to_the_order():
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    first = decode(images.flip(-1), 2)
    second = decode(images, 2).flip(-1)
    # left and right tiles change places
    torch.testing.assert_close(first.view(2, 2, 2, 1, 8, 8).flip(1), second.view(2, 2, 2, 1, 8, 8))


def test_modes():
    images = torch.rand(2, 3, 1, 4, 4)
    assert FlipUnion("off").per_class(images) is images
    assert FlipUnion("synthetic").per_class(images, side="real") is images
    assert FlipUnion("both").per_class(images, side="real").shape[1] == 6
    batch, labels = images[0], torch.zeros(3, dtype=torch.int64)
    assert FlipUnion("off")(batch, labels)[0] is batch
    assert len(FlipUnion("both")(batch, labels)[0]) == 6


def test_state():
    flip = FlipUnion("auto").fit(wedges(50, share, seed) for seed, share in enumerate(SHARES))
    again = FlipUnion("auto")
    again.load_state_dict(flip.state_dict())
    assert again.flipped_classes(5) == flip.flipped_classes(5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FlipUnion("left"), ValueError, "mode must be .*got 'left'"),
        (lambda: FlipUnion("auto", threshold=0.5), ValueError, "threshold must lie in"),
        (lambda: FlipUnion("auto").per_class(torch.rand(1, 1, 1, 2, 2)), RuntimeError, "call fit with the real"),
        (lambda: FlipUnion("auto")(torch.rand(1, 1, 2, 2), torch.tensor([0])), RuntimeError, "call fit"),
        (lambda: flip_detectability([torch.rand(1, 1, 2, 2)]), ValueError, "class 0 has 1 images"),
        (lambda: flip_union(torch.rand(2, 2, 2), torch.tensor([0, 1])), ValueError, "one label for each"),
        (
            lambda: FlipUnion("auto").fit([torch.rand(4, 1, 2, 2)]).flipped_classes(2),
            ValueError,
            "1 classes were fitted, 2 were",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
