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
from lightning_plugins.distillation.evaluation import NetAccuracies, SetEvaluation, evaluate_set
from lightning_plugins.distillation.extractors import ExtractorBank, RandomExtractors, train_expert_, untrained_net
from lightning_plugins.distillation.figures import class_bars, image_grid
from lightning_plugins.distillation.flip import FlipUnion, flip_detectability, flip_union
from lightning_plugins.distillation.fresh_nets import TrainedNets, train_nets
from lightning_plugins.distillation.memory import images_per_tile
from lightning_plugins.distillation.objectives import (
    CalibrationTerm,
    CharacteristicFunction,
    DistributionMatching,
    GradientMatching,
    Objective,
    ObjectiveDraw,
    ObjectiveLoss,
)
from lightning_plugins.distillation.pool import ClassPool, RealBatch
from lightning_plugins.distillation.presets import PRESETS, DistillationSettings, preset_settings
from lightning_plugins.distillation.protocol import PROTOCOLS, Protocol
from lightning_plugins.distillation.ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from lightning_plugins.distillation.stepping import vectorised_constants
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.distillation.trajectory import ExpertTrajectories, TrajectoryMatching, match_trajectory

__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "AugmentationDraw",
    "CalibrationTerm",
    "CharacteristicFunction",
    "ClassPool",
    "DistillationSettings",
    "DistributionMatching",
    "ExpertTrajectories",
    "ExtractorBank",
    "FlipUnion",
    "FrequencySampler",
    "GradientMatching",
    "NetAccuracies",
    "Objective",
    "ObjectiveDraw",
    "ObjectiveLoss",
    "Protocol",
    "RandomExtractors",
    "RealBatch",
    "SamplingNetwork",
    "SetEvaluation",
    "SiameseAugmentation",
    "SyntheticSet",
    "TrainedNets",
    "TrajectoryMatching",
    "augment",
    "augmentation_robust_score",
    "characteristic_function_discrepancy",
    "characteristic_sums",
    "class_bars",
    "decode",
    "decode_index",
    "discrepancy_per_class",
    "encode",
    "evaluate_set",
    "flip_detectability",
    "flip_union",
    "hard_label_recovery",
    "image_grid",
    "images_per_tile",
    "improvement_over_random",
    "label_robust_score",
    "match_trajectory",
    "preset_settings",
    "train_expert_",
    "train_nets",
    "unit_rows",
    "untrained_net",
    "vectorised_constants",
]
