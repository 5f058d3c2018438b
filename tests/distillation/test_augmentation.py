"""Differentiable augmentation: against step-by-step formulas, shared and per image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_plugins.distillation import AugmentationDraw, SiameseAugmentation, augment

NAMES = {
    "flip": ("flip",),
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("crop_x", "crop_y"),
    "cutout": ("cutout_x", "cutout_y"),
    "scale": ("scale_x", "scale_y"),
    "rotate": ("rotate",),
}
IMAGES = torch.randn(5, 3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def per_image(operation: str, seed: int = 0) -> AugmentationDraw:
    generator = torch.Generator().manual_seed(seed)
    return AugmentationDraw(
        (operation,), {name: torch.rand(5, generator=generator, dtype=torch.float64) for name in NAMES[operation]}
    )


def shared(draw: AugmentationDraw, index: int) -> AugmentationDraw:
    return AugmentationDraw(draw.operations, {name: float(value[index]) for name, value in draw.numbers.items()})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("operation", NAMES)
def test_numbers_per_image_do_what_the_same_numbers_do_for_all(operation, seed):
    draw = per_image(operation, seed)
    together = augment(IMAGES, draw)
    for index in range(5):
        torch.testing.assert_close(together[index], augment(IMAGES, shared(draw, index))[index])


@pytest.mark.parametrize("operation", NAMES)
@pytest.mark.parametrize("batched", [True, False])
def test_gradients(operation, batched):
    draw = per_image(operation)
    draw = draw if batched else shared(draw, 0)
    small = IMAGES[:, :, :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, draw), small, fast_mode=True)


def color(images, brightness, saturation, contrast):
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_color_is_brightness_then_saturation_then_contrast(channels):
    draw = AugmentationDraw(("color",), {"brightness": 0.9, "saturation": 0.3, "contrast": 0.8})
    images = IMAGES[:, :channels]
    torch.testing.assert_close(augment(images, draw), color(images, 0.9, 0.3, 0.8))


def test_saturation_of_one_channel_is_the_identity():
    grey = IMAGES[:, :1]
    draw = AugmentationDraw(("color",), {"brightness": 0.5, "saturation": 0.1, "contrast": 0.5})
    torch.testing.assert_close(augment(grey, draw), grey)


@pytest.mark.parametrize(("u", "shift"), [(0.0, -2), (0.5, 0), (0.99, 2)])
def test_crop_shifts_by_an_eighth_at_most_and_fills_with_zeros(u, shift):
    image = torch.arange(1.0, 17).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    row = augment(image, AugmentationDraw(("crop",), {"crop_x": u, "crop_y": 0.5}))[0, 0, 3]
    assert row.tolist() == [value if 1 <= value <= 16 else 0 for value in range(1 + shift, 17 + shift)]


def test_cutout_is_a_box_of_half_the_sides_within_the_image():
    ones = torch.ones(1, 1, 8, 8)
    inside = augment(ones, AugmentationDraw(("cutout",), {"cutout_x": 0.5, "cutout_y": 0.5}))
    assert inside.sum() == 64 - 16
    assert inside[0, 0, 2:6, 2:6].sum() == 0
    corner = augment(ones, AugmentationDraw(("cutout",), {"cutout_x": 0.0, "cutout_y": 0.999}))
    assert corner[0, 0, 6:, :2].sum() == 0
    assert corner.sum() == 60


def test_scale_and_rotation_have_their_constants():
    identity = AugmentationDraw(("scale",), {"scale_x": (1 - 1 / 1.2) / (1.2 - 1 / 1.2)} | {"scale_y": 5 / 11})
    torch.testing.assert_close(augment(IMAGES, identity), IMAGES)
    torch.testing.assert_close(augment(IMAGES, AugmentationDraw(("rotate",), {"rotate": 0.5})), IMAGES)
    angle = math.radians(15)
    theta = torch.tensor(
        [[[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]], dtype=torch.float64
    )
    grid = F.affine_grid(theta, [1, 3, 12, 10], align_corners=False)
    expected = F.grid_sample(IMAGES[:1], grid, align_corners=False)
    torch.testing.assert_close(augment(IMAGES[:1], AugmentationDraw(("rotate",), {"rotate": 1.0})), expected)


@pytest.mark.parametrize("variant", ["vico", "idc"])
def test_equal_images_at_different_places_get_the_same_transform(variant):
    augmentation = SiameseAugmentation(("color", "crop", "cutout", "flip", "scale", "rotate"), variant=variant)
    image = torch.randn(1, 1, 3, 9, 9)
    for _ in range(8):
        draws = augmentation.draw(4)
        real = augmentation.apply(image.expand(4, 2, 3, 9, 9).contiguous(), draws)
        synthetic = augmentation.apply(image.expand(4, 7, 3, 9, 9).contiguous(), draws)
        torch.testing.assert_close(real, real[:1, :1].expand_as(real))
        torch.testing.assert_close(synthetic, real[:1, :1].expand_as(synthetic))


def test_a_draw_for_each_class():
    augmentation = SiameseAugmentation(("color",), scope="class")
    draws = augmentation.draw(3)
    image = torch.randn(1, 1, 3, 4, 4).expand(3, 2, 3, 4, 4).contiguous()
    out = augmentation.apply(image, draws)
    assert len(draws) == 3
    torch.testing.assert_close(out[:, 0], out[:, 1])
    assert not torch.allclose(out[0], out[1])
    torch.testing.assert_close(augmentation.apply(image[1:], draws, classes=range(1, 3)), out[1:])


def test_which_operations_are_applied():
    everything = ("color", "crop", "cutout", "flip", "scale", "rotate")
    idc = {SiameseAugmentation(everything, seed=seed).draw(1)[0].operations for seed in range(40)}
    assert idc == {("flip", "color", "cutout", last) for last in ("crop", "scale", "rotate")}
    vico = {SiameseAugmentation(everything, variant="vico", seed=seed).draw(1)[0].operations for seed in range(60)}
    assert vico == {("flip", last) for last in everything if last != "flip"}
    assert SiameseAugmentation().draw(1)[0].operations == ("color", "cutout", "crop")
    assert SiameseAugmentation(()).draw(1)[0].operations == ()


def test_evaluation_draws_for_every_image():
    images = torch.randn(1, 1, 8, 8).expand(6, 1, 8, 8).contiguous()
    out = SiameseAugmentation(("color",))(images)
    assert len({float(image.std()) for image in out}) == 6


def test_draws_resume_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first = SiameseAugmentation(seed=3)
    first.draw(2)
    state = first.state_dict()
    following = first.draw(2)
    second = SiameseAugmentation(seed=0)
    second.load_state_dict(state)
    assert second.draw(2) == following
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operations": "color_crop"}, "a sequence such as"),
        ({"operations": ("color", "blur")}, "different ones of color, .*'blur'"),
        ({"operations": ("color", "color")}, "different ones"),
        ({"variant": "dsa"}, "'vico' or 'idc', got 'dsa'"),
        ({"scope": "image"}, "'batch' or 'class', got 'image'"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiameseAugmentation(**arguments)
