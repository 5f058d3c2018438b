"""How each method meets a Trainer: one file per callback, no mathematics."""

if __name__ != "lightning_plugins.callbacks":
    raise ImportError("import lightning_plugins.callbacks, not callbacks: a second name would load every class twice")

from lightning_plugins.callbacks.calibration.calibration_monitor import CalibrationMonitor
from lightning_plugins.callbacks.calibration.calibration_regularizer import CalibrationRegularizer
from lightning_plugins.callbacks.calibration.calibrator_comparison import CalibratorComparison
from lightning_plugins.callbacks.calibration.classifier_head_calibration import ClassifierHeadCalibration
from lightning_plugins.callbacks.calibration.mixed_sample_augmentation import MixedSampleAugmentation
from lightning_plugins.callbacks.calibration.neural_collapse_monitor import NeuralCollapseMonitor
from lightning_plugins.callbacks.calibration.post_hoc import PostHocCalibration
from lightning_plugins.callbacks.distillation.distilled_set_evaluation import DistilledSetEvaluation
from lightning_plugins.callbacks.plain_twin import PlainTwin
from lightning_plugins.callbacks.quantization.binary_qat import BinaryQAT
from lightning_plugins.callbacks.quantization.bit_plan_qat import BitPlanQAT
from lightning_plugins.callbacks.quantization.deployment_check import DeploymentCheck
from lightning_plugins.callbacks.quantization.mixed_precision_qat import MixedPrecisionQAT
from lightning_plugins.callbacks.quantization.multi_precision_qat import MultiPrecisionQAT
from lightning_plugins.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lightning_plugins.callbacks.robustness.adversarial_training import AdversarialTraining
from lightning_plugins.callbacks.robustness.adversarial_weight_perturbation import AdversarialWeightPerturbation
from lightning_plugins.callbacks.robustness.catastrophic_overfitting_guard import CatastrophicOverfittingGuard
from lightning_plugins.callbacks.robustness.deferred_reweighting import DeferredReweighting
from lightning_plugins.callbacks.robustness.free_adversarial_training import FreeAdversarialTraining
from lightning_plugins.callbacks.robustness.robustness_evaluation import RobustnessEvaluation
from lightning_plugins.callbacks.training_step import TrainingStepCallback
from lightning_plugins.callbacks.variant_comparison import VariantComparison

__all__ = [
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "BinaryQAT",
    "BitPlanQAT",
    "CalibrationRegularizer",
    "CalibrationMonitor",
    "CalibratorComparison",
    "CatastrophicOverfittingGuard",
    "ClassifierHeadCalibration",
    "DeferredReweighting",
    "DeploymentCheck",
    "DistilledSetEvaluation",
    "FreeAdversarialTraining",
    "MixedPrecisionQAT",
    "MixedSampleAugmentation",
    "MultiPrecisionQAT",
    "NeuralCollapseMonitor",
    "PlainTwin",
    "PostHocCalibration",
    "PostTrainingQuantization",
    "RobustnessEvaluation",
    "TrainingStepCallback",
    "VariantComparison",
]
