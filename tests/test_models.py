from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_plugins.models import CifarResNet, ConvNet3, build_model, convnet3, resnet20


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_of_the_published_nets():
    assert count(resnet20(in_channels=1)) == 272_186
    assert count(convnet3(in_channels=1)) == 317_706
    assert count(convnet3(in_channels=3)) == 320_010


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet20", "convnet3"])
def test_shapes(name, channels, side):
    model = build_model(name, num_classes=7, in_channels=channels, image_size=side, width=4)
    assert model(torch.rand(2, channels, side, side)).shape == (2, 7)


def test_resnet_halves_the_image_twice_and_doubles_the_channels():
    model = resnet20(width=4)
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.rand(1, 3, 32, 32))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules()) == 19


def test_convnet_normalises_each_channel_of_each_image_alone():
    block = convnet3(width=4).eval().features[:2]
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(block(images)[:1], block(images[:1]))
    torch.testing.assert_close(block(images).mean((2, 3)), torch.zeros(3, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_by_name(channels):
    model = build_model("mobilenet_v3_small", num_classes=5, in_channels=channels).eval()
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 5)


def test_image_size_reaches_nets_that_ask_for_it_and_no_others():
    # vit_b_16 has 86 million parameters; on the meta device they cost nothing
    with torch.device("meta"):
        vit = build_model("vit_b_16", num_classes=5, image_size=32)
        build_model("resnet18", num_classes=5, image_size=32)
        grey = build_model("vit_b_16", num_classes=5, in_channels=1, image_size=32)
    assert vit.image_size == 32
    assert vit.encoder.pos_embedding.shape[1] == 1 + 2 * 2
    assert grey.conv_proj.in_channels == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_model("resnet2", num_classes=3), "near names are .*'resnet20'"),
        (lambda: build_model("fasterrcnn_resnet50_fpn", num_classes=3), "unknown model"),
        (lambda: CifarResNet(0), "blocks_per_stage must be at least 1, got 0"),
        (lambda: resnet20(width=0), "width must be at least 1, got 0"),
        (lambda: ConvNet3(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: ConvNet3(image_size=7), "image_size must be at least 8 .*got 7"),
        (lambda: ConvNet3(image_size=3, in_channels=1), "image_size must be at least 4 .*got 3"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
