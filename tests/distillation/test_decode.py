"""Multi-formation: which tile goes where, and what is left of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_plugins.distillation import decode, decode_index, encode


def reference(images: torch.Tensor, rho: int) -> torch.Tensor:
    """The tiles one by one."""
    height, width = images.shape[-2:]
    h, w = -(-height // rho), -(-width // rho)
    padded = F.pad(images, (0, w * rho - width, 0, h * rho - height), value=0.5)
    tiles = [padded[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w] for i in range(rho) for j in range(rho)]
    return F.interpolate(torch.cat(tiles), size=(height, width), mode="bilinear")


@pytest.mark.parametrize("rho", [1, 2, 3])
@pytest.mark.parametrize("size", [(28, 28), (7, 10)])
def test_it_is_the_loop_over_the_tiles(rho, size):
    images = torch.rand(3, 4, 2, *size, generator=torch.Generator().manual_seed(0))
    decoded = decode(images, rho)
    assert decoded.shape == (3, rho**2 * 4, 2, *size)
    for group, expected in zip(decoded, images, strict=True):
        torch.testing.assert_close(group, reference(expected, rho))


def test_a_factor_of_one_is_the_identity():
    images = torch.rand(2, 1, 4, 4)
    assert decode(images, 1) is images


def test_tiles_of_14_pixels_and_their_order():
    image = torch.zeros(1, 1, 28, 28)
    image[..., :14, 14:] = 1.0
    image[..., 14:, :14] = 2.0
    decoded = decode(image, 2)
    assert decoded.mean((1, 2, 3)).tolist() == [0.0, 1.0, 2.0, 0.0]


def test_an_image_that_does_not_divide_is_padded_with_a_half():
    last = decode(torch.zeros(1, 1, 5, 5), 2)[3, 0]
    assert last[0, 0] == 0.0
    assert last[-1, -1] == 0.5


@pytest.mark.parametrize("rho", [2, 3])
def test_it_is_linear_up_to_the_padding_with_the_right_adjoint(rho):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 7, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    decoded = decode(images, rho)
    weights = torch.rand(decoded.shape, generator=generator, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(decoded, images, weights)
    step = torch.rand(images.shape, generator=generator, dtype=torch.float64)
    moved = ((decode(images + step, rho) - decoded) * weights).sum()
    torch.testing.assert_close((adjoint * step).sum(), moved)


@pytest.mark.parametrize(("variant", "expected"), [("single", 18), ("multi", 2 + 8 + 18), ("bound", 10)])
def test_variants(variant, expected):
    images = torch.rand(2, 1, 9, 9)
    decoded = decode(images, 3, variant, bound=11)
    index = decode_index(2, 3, variant, bound=11)
    assert len(decoded) == len(index) == expected
    if variant == "bound":
        torch.testing.assert_close(decoded, torch.cat([decode(images[:1], 3), decode(images[1:], 1)]))
        assert index.tolist() == [0] * 9 + [1]


def test_a_bound_is_filled_from_the_largest_factor_down():
    index = decode_index(10, 2, "bound", bound=20)
    assert torch.bincount(index).tolist() == [4, 4, 4, 1, 1, 1, 1, 1, 1, 1]


def test_the_index_says_where_each_result_comes_from():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    for variant in ("single", "multi"):
        assert torch.equal(decode(images, 2, variant)[:, 0, 0, 0].long(), decode_index(3, 2, variant))


def test_mosaics_are_decoded_in_the_order_in_which_they_were_made():
    images = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 1, 6, 6)
    torch.testing.assert_close(decode(encode(images, 2), 2), images)
    assert encode(torch.rand(9, 1, 7, 7), 3).shape == (1, 1, 7, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode(torch.rand(1, 4, 4), 2), r"shape \(\.\.\., n, C, H, W\)"),
        (lambda: decode(torch.rand(1, 1, 4, 4), 0), "rho must be at least 1, got 0"),
        (lambda: decode(torch.rand(1, 1, 4, 4), 5), "rho must not exceed the sides"),
        (lambda: decode(torch.rand(1, 1, 4, 4), 2, "double"), "'single', 'multi' or 'bound', got 'double'"),
        (lambda: decode(torch.rand(3, 1, 4, 4), 2, "bound", bound=2), "bound must be at least the 3 stored"),
        (lambda: encode(torch.rand(3, 1, 4, 4), 2), "give a multiple of 4"),
        (lambda: encode(torch.rand(4, 1, 4, 4), 9), "rho must be at least 1 and not exceed"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
