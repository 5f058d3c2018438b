"""Networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_plugins.checks import check_types
from lightning_plugins.models.binary_resnet import binary_resnet20
from lightning_plugins.models.convnet import convnet3
from lightning_plugins.models.resnet import resnet20

__all__ = ["build_model"]

_OWN: dict[str, Callable[..., nn.Module]] = {
    "binary_resnet20": binary_resnet20,
    "convnet3": convnet3,
    "resnet20": resnet20,
}


@check_types
def build_model(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int | None = None, **model_args: Any
) -> nn.Module:
    """Build one of our networks or any torchvision classifier by its name.

    Args:
        name: ``"resnet20"``, ``"convnet3"``, ``"binary_resnet20"``, or a name from
            ``torchvision.models.list_models()``.
        num_classes: number of logits.
        in_channels: channels of the images. A torchvision network made for three gets a new first convolution.
        image_size: height and width of the images in pixels, handed to networks that ask for it (ViT, ConvNet-3).
        **model_args: further arguments of the network, such as ``width=8`` or ``weights="DEFAULT"``.

    Raises:
        ValueError: for an unknown name (the message lists near ones), or if the network has no convolution to adapt.

    Example:
        >>> build_model("resnet20", num_classes=10, in_channels=1, width=8).fc
        Linear(in_features=32, out_features=10, bias=True)
    """
    if name in _OWN:
        factory = _OWN[name]
        model_args["in_channels"] = in_channels
    else:
        from torchvision import models

        if name not in models.list_models(module=models):
            known = [*_OWN, *models.list_models(module=models)]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ValueError(f"unknown model {name!r}; near names are {near or known[:5]}, or pass an nn.Module")
        factory = models.get_model_builder(name)
    if image_size is not None and _takes(factory, "image_size"):
        model_args.setdefault("image_size", image_size)
    model = factory(num_classes=num_classes, **model_args)
    if name not in _OWN and in_channels != 3:
        _replace_first_convolution(model, name, in_channels)
    return model


def _takes(factory: Callable[..., nn.Module], argument: str) -> bool:
    """Whether the factory, or the class that torchvision's factories pass their keywords on to, has the argument."""
    if argument in inspect.signature(factory).parameters:
        return True
    returned = inspect.get_annotations(factory, eval_str=True).get("return")
    return inspect.isclass(returned) and argument in inspect.signature(returned).parameters


def _replace_first_convolution(model: nn.Module, name: str, in_channels: int) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parent = model.get_submodule(path.rpartition(".")[0])
            convolution = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            setattr(parent, path.rpartition(".")[2], convolution)
            return
    raise ValueError(f"{name} has no convolution to adapt to in_channels={in_channels}; pass three-channel images")
