"""Every number of a distillation run, and the published sets of numbers by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import AugmentationVariant
from lightning_plugins.distillation.decode import DecodeVariant
from lightning_plugins.distillation.flip import FlipMode

__all__ = ["PRESETS", "DistillationSettings", "PresetName", "preset_settings"]

PresetName = Literal["house", "ncfm-paper", "ncfm-released", "dm", "dc", "dsa", "idc"]
PRESETS: tuple[PresetName, ...] = ("house", "ncfm-paper", "ncfm-released", "dm", "dc", "dsa", "idc")

# Outer steps and inner epochs of gradient matching by images per class.
_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@check_types
@dataclass(frozen=True)
class DistillationSettings:
    """What a distillation run does; None leaves a value to the preset.

    Attributes:
        objective: ``"characteristic_function"``, ``"distribution"`` (means of features) or ``"gradient"``.
        iterations: how long the published run is; the Trainer decides how long this one is.
        initialisation: ``"noise"``, ``"real"`` or ``"mix"``.
        space: ``"pixel"`` or ``"normalised"``, see :class:`.SyntheticSet`.
        rho: tiles per side of each stored image, see :func:`.decode`.
        variant: of the decoding.
        bound: of the decoding.
        flip: mode of the :class:`.FlipUnion`.
        batch_real: real images of each class in a step.
        batch_synthetic: most decoded images of each class in a step, drawn anew each time; 0 for all.
        real_batch: ``"random"``, or ``"first"`` for the same first images each time.
        augmentation: operations that real and synthetic images share, joined by ``_``; empty for none.
        augmentation_variant: see :class:`.SiameseAugmentation`.
        augmentation_scope: what shares a draw.
        num_frequencies: of the characteristic function.
        frequency_scale: standard deviation of the frequencies.
        alpha: weight of the amplitudes.
        beta: weight of the phases.
        sampling_network: whether a network learns the frequencies; experimental.
        sampling_rank: its width, 0 for that of the features.
        sampling_learning_rate: of its SGD.
        sampling_momentum: of its SGD.
        distance: of gradients, see :class:`.GradientMatching`.
        extractors: ``"random"`` for untrained networks, ``"bank"`` for mixtures with trained ones.
        num_pairs: networks of the bank.
        pretrain_epochs: of each network of the bank.
        pretrain_cutmix: probability of CutMix in that training, which leaves cutout out of the augmentation.
        calibration_weight: of the loss of trained networks, a second pass; 0 for none.
        net_refresh: iterations for which a network is kept.
        net_training: what it is trained on in between: ``"none"``, ``"synthetic"`` or ``"real"``.
        net_epochs: of that training, each time.
        net_images: real images in an epoch of it, 0 for all.
        net_batch_size: of that training.
        net_learning_rate: of its SGD.
        net_momentum: of its SGD.
        net_weight_decay: of its SGD.
        net_cutmix: probability of CutMix in it, which leaves cutout out of the augmentation.
        optimizer: of the images, ``"adamw"`` or ``"sgd"``.
        learning_rate: of the images.
        momentum: of ``"sgd"``.
        weight_decay: of the images.
        class_stepping: ``"joint"``: one step for all classes with these constants; ``"sequential"``: one step for each
            class, as several published codes do; ``"vectorised"``: one step that goes as far as those, see
            :func:`.vectorised_constants`.
        plateau_patience: iterations without a better loss after which the learning rate falls; 0 for never.
        plateau_factor: by which it falls.
    """

    objective: Literal["characteristic_function", "distribution", "gradient"] | None = None
    iterations: int | None = None
    initialisation: Literal["noise", "real", "mix"] | None = None
    space: Literal["pixel", "normalised"] | None = None
    rho: int | None = None
    variant: DecodeVariant | None = None
    bound: int | None = None
    flip: FlipMode | None = None
    batch_real: int | None = None
    batch_synthetic: int | None = None
    real_batch: Literal["random", "first"] | None = None
    augmentation: str | None = None
    augmentation_variant: AugmentationVariant | None = None
    augmentation_scope: Literal["batch", "class"] | None = None
    num_frequencies: int | None = None
    frequency_scale: float | None = None
    alpha: float | None = None
    beta: float | None = None
    sampling_network: bool | None = None
    sampling_rank: int | None = None
    sampling_learning_rate: float | None = None
    sampling_momentum: float | None = None
    distance: Literal["cosine", "l1", "mse"] | None = None
    extractors: Literal["random", "bank"] | None = None
    num_pairs: int | None = None
    pretrain_epochs: int | None = None
    pretrain_cutmix: float | None = None
    calibration_weight: float | None = None
    net_refresh: int | None = None
    net_training: Literal["none", "synthetic", "real"] | None = None
    net_epochs: int | None = None
    net_images: int | None = None
    net_batch_size: int | None = None
    net_learning_rate: float | None = None
    net_momentum: float | None = None
    net_weight_decay: float | None = None
    net_cutmix: float | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    class_stepping: Literal["joint", "vectorised", "sequential"] | None = None
    plateau_patience: int | None = None
    plateau_factor: float | None = None


_NCFM: dict[str, Any] = {
    "objective": "characteristic_function",
    "iterations": 20000,
    "initialisation": "mix",
    "space": "pixel",
    "rho": 2,
    "variant": "single",
    "bound": 128,
    "flip": "off",
    "batch_real": 1024,
    "batch_synthetic": 0,
    "real_batch": "random",
    "augmentation": "color_crop_cutout",
    "augmentation_variant": "idc",
    "augmentation_scope": "batch",
    "num_frequencies": 1024,
    "frequency_scale": 1.0,
    "alpha": 0.5,
    "beta": 0.5,
    "sampling_network": False,
    "sampling_rank": 128,
    "sampling_learning_rate": 1e-3,
    "sampling_momentum": 0.5,
    "distance": "cosine",
    "extractors": "bank",
    "num_pairs": 20,
    "pretrain_epochs": 60,
    "pretrain_cutmix": 0.5,
    "calibration_weight": 0.0,
    "net_refresh": 1,
    "net_training": "none",
    "net_epochs": 0,
    "net_images": 0,
    "net_batch_size": 256,
    "net_learning_rate": 0.01,
    "net_momentum": 0.0,
    "net_weight_decay": 0.0,
    "net_cutmix": 0.0,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "momentum": 0.5,
    "weight_decay": 5e-4,
    "class_stepping": "vectorised",
    "plateau_patience": 500,
    "plateau_factor": 0.5,
}


@check_types
def preset_settings(
    name: PresetName, *, images_per_class: int = 10, in_channels: int = 3, image_size: int = 32
) -> DistillationSettings:
    """Return all settings of a preset; some depend on the set and the data.

    ``house`` is ours. ``ncfm-paper`` is what the paper describes, ``ncfm-released`` what its code does (no sampling
    network, the first real images of each class, a calibration term). ``dm``, ``dc`` and ``dsa`` are those of the
    first authors, ``idc`` its authors'.

    Args:
        name: one of :data:`PRESETS`.
        images_per_class: n.
        in_channels: of the images.
        image_size: height in pixels.

    Raises:
        ValueError: for another name.

    Example:
        >>> settings = preset_settings("dsa", images_per_class=10)
        >>> settings.objective, settings.net_refresh, settings.net_epochs
        ('gradient', 10, 50)

    Reference:
        S. Wang et al., CVPR 2025 (NCFM); B. Zhao, H. Bilen, WACV 2023 (DM), ICML 2021 (DSA); B. Zhao et al., ICLR 2021
        (DC); J.-H. Kim et al., ICML 2022 (IDC); and their released code.
    """
    changes: dict[str, Any]
    if name == "house":
        changes = {
            "rho": 1 if images_per_class >= 50 else 2,
            "batch_real": 256,
            "num_pairs": 5,
            "pretrain_epochs": 20,
            "pretrain_cutmix": 0.0,
            "calibration_weight": 1.0,
            "plateau_patience": 0,
        }
    elif name == "ncfm-paper":
        changes = {"sampling_network": True}
    elif name == "ncfm-released":
        changes = {
            "num_frequencies": 4096,
            "real_batch": "first",
            "augmentation_scope": "class",
            "calibration_weight": 1.0,
        }
    elif name in ("dm", "dc", "dsa"):
        nearest = min(_LOOPS, key=lambda count: abs(count - images_per_class))
        outer, inner = _LOOPS[nearest]
        changes = {
            "objective": "distribution" if name == "dm" else "gradient",
            "iterations": 20000 if name == "dm" else 1000 * outer,
            "initialisation": "noise" if name == "dc" else "real",
            "space": "normalised",
            "rho": 1,
            "batch_real": 256,
            "augmentation": "" if name == "dc" else "color_crop_cutout_flip_scale_rotate",
            "augmentation_variant": "vico",
            "extractors": "random",
            "optimizer": "sgd",
            "learning_rate": (10.0 if images_per_class >= 100 else 1.0) if name == "dm" else 0.1,
            "weight_decay": 0.0,
            "class_stepping": "joint",
            "plateau_patience": 0,
        }
        if name != "dm":
            changes |= {"net_refresh": outer, "net_training": "synthetic" if outer > 1 else "none", "net_epochs": inner}
    elif name == "idc":
        grey = in_channels == 1
        scale = images_per_class / 10 * (image_size / 32) ** 2
        changes = {
            "objective": "gradient",
            "iterations": 200_000,
            "batch_real": 64,
            "batch_synthetic": 128,
            "distance": "l1" if grey else "mse",
            "extractors": "random",
            "net_refresh": 100,
            "net_training": "real",
            "net_epochs": 1,
            "net_images": 500 if grey else 2000,
            "net_momentum": 0.9,
            "net_weight_decay": 5e-4,
            "net_cutmix": 0.5,
            "optimizer": "sgd",
            "learning_rate": (1e-4 if grey else 5e-3) * scale,
            "weight_decay": 0.0,
            "plateau_patience": 0,
        }
    else:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return DistillationSettings(**(_NCFM | changes))


def merged(base: DistillationSettings, changes: DistillationSettings | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all settings as a dictionary: ``base``, with the changes that are not None.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    values = asdict(base)
    given = asdict(changes) if isinstance(changes, DistillationSettings) else dict(changes or {})
    names = [entry.name for entry in fields(DistillationSettings)]
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names[:5]
            raise ValueError(f"there is no setting {name!r}; near names are {', '.join(near)}")
        if value is not None:
            values[name] = value
    for name in ("batch_real", "rho", "num_frequencies", "net_refresh", "net_batch_size", "num_pairs"):
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]!r}")
    not_negative = ("batch_synthetic", "calibration_weight", "plateau_patience")
    for name in (*not_negative, "net_epochs", "net_images", "pretrain_epochs"):
        if values[name] < 0:
            raise ValueError(f"{name} must be at least 0, got {values[name]!r}")
    for name in ("pretrain_cutmix", "net_cutmix"):
        if not 0 <= values[name] <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {values[name]!r}")
    choices = {
        "objective": ("characteristic_function", "distribution", "gradient"),
        "real_batch": ("random", "first"),
        "extractors": ("random", "bank"),
        "net_training": ("none", "synthetic", "real"),
        "optimizer": ("adamw", "sgd"),
        "class_stepping": ("joint", "vectorised", "sequential"),
    }
    for name, known in choices.items():
        if values[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {values[name]!r}")
    if values["calibration_weight"] and (values["extractors"] != "bank" or values["net_refresh"] > 1):
        raise ValueError(
            "calibration_weight needs extractors='bank' and net_refresh=1, got "
            f"{values['extractors']!r} and {values['net_refresh']}; set calibration_weight to 0"
        )
    return values
