"""Dataset distillation: small synthetic training sets, and what is matched to learn them."""

from lightning_plugins.distillation.augmentation import AugmentationDraw, SiameseAugmentation, augment
from lightning_plugins.distillation.characteristic_function import (
    FrequencySampler,
    SamplingNetwork,
    characteristic_function_discrepancy,
    characteristic_sums,
    discrepancy_per_class,
    unit_rows,
)
from lightning_plugins.distillation.decode import decode, decode_index, encode
from lightning_plugins.distillation.extractors import ExtractorBank, RandomExtractors, train_expert_, untrained_net
from lightning_plugins.distillation.flip import FlipUnion, flip_detectability, flip_union
from lightning_plugins.distillation.objectives import (
    CalibrationTerm,
    CharacteristicFunction,
    DistributionMatching,
    GradientMatching,
    Objective,
    ObjectiveDraw,
    ObjectiveLoss,
    images_per_tile,
)
from lightning_plugins.distillation.pool import ClassPool, RealBatch
from lightning_plugins.distillation.stepping import vectorised_constants
from lightning_plugins.distillation.synthetic_set import SyntheticSet

__all__ = [
    "AugmentationDraw",
    "CalibrationTerm",
    "CharacteristicFunction",
    "ClassPool",
    "DistributionMatching",
    "ExtractorBank",
    "FlipUnion",
    "FrequencySampler",
    "GradientMatching",
    "Objective",
    "ObjectiveDraw",
    "ObjectiveLoss",
    "RandomExtractors",
    "RealBatch",
    "SamplingNetwork",
    "SiameseAugmentation",
    "SyntheticSet",
    "augment",
    "characteristic_function_discrepancy",
    "characteristic_sums",
    "decode",
    "decode_index",
    "discrepancy_per_class",
    "encode",
    "flip_detectability",
    "flip_union",
    "images_per_tile",
    "train_expert_",
    "unit_rows",
    "untrained_net",
    "vectorised_constants",
]
