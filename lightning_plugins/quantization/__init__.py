"""Quantization: one network at every precision, the right bits for every layer, and one bit for all."""

from lightning_plugins.quantization.accounting import Cost, cost
from lightning_plugins.quantization.accuracy_budget import plan_within_accuracy
from lightning_plugins.quantization.adaquant import LearningRates, adaquant_
from lightning_plugins.quantization.allocation import (
    Frontier,
    allocate_bits,
    diverse_plans,
    load_latency,
    pareto_frontier,
    plan_cost,
    predicted_loss,
    save_latency,
)
from lightning_plugins.quantization.alrs import AdaptiveLearningRateScaling
from lightning_plugins.quantization.binary import (
    binary_activation,
    normalize_samples,
    periodic_binary,
    periodic_regularizer,
    quantization_error,
    sign_ste,
)
from lightning_plugins.quantization.binary_deploy import export_binary_onnx, load_binary, save_binary, to_deploy_binary
from lightning_plugins.quantization.binary_layers import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    binary_layers,
    convert_binary_,
    load_binary_checkpoint,
    restore_binary_,
    set_frequency_,
    set_stage_,
)
from lightning_plugins.quantization.bisection import BisectionResult, bisect_bits
from lightning_plugins.quantization.convert import (
    active_plan,
    clamp_scales_,
    convert_,
    load_converted,
    quantized_layers,
    restore_,
    switch_,
)
from lightning_plugins.quantization.deploy import to_deploy
from lightning_plugins.quantization.layers import (
    InputQuantizer,
    MultiPrecisionBatchNorm,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    ResidualQuantizer,
)
from lightning_plugins.quantization.onnx import export_onnx
from lightning_plugins.quantization.packed import load_packed, save_packed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.post_training import PostTrainingReport, StageResult, post_training_quantize
from lightning_plugins.quantization.quantizers import double_rounding, fake_quantize, quantize_codes, switch_codes
from lightning_plugins.quantization.retuning import reestimate_batch_norms_, tune_biases_
from lightning_plugins.quantization.scale_calibration import calibrate_scales_
from lightning_plugins.quantization.scores import evaluate_plan, inverted, score_layers
from lightning_plugins.quantization.self_distillation import ProgressiveSelfDistillation
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable
from lightning_plugins.quantization.supernet import (
    EvaluatedPlan,
    PlanSearch,
    draw_bits,
    search_plans,
    sensitive_layers,
    tied_layers,
    weigh_perturbations,
)

__all__ = [
    "AdaptiveLearningRateScaling",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "BisectionResult",
    "BitPlan",
    "Cost",
    "EvaluatedPlan",
    "Frontier",
    "InputQuantizer",
    "LayerSensitivity",
    "LearningRates",
    "MultiPrecisionBatchNorm",
    "PlanSearch",
    "PostTrainingReport",
    "ProgressiveSelfDistillation",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "ResidualQuantizer",
    "SensitivityTable",
    "StageResult",
    "active_plan",
    "adaquant_",
    "allocate_bits",
    "binary_activation",
    "binary_layers",
    "bisect_bits",
    "calibrate_scales_",
    "clamp_scales_",
    "convert_",
    "convert_binary_",
    "cost",
    "diverse_plans",
    "double_rounding",
    "draw_bits",
    "evaluate_plan",
    "export_binary_onnx",
    "export_onnx",
    "fake_quantize",
    "inverted",
    "load_binary",
    "load_binary_checkpoint",
    "load_converted",
    "load_latency",
    "load_packed",
    "normalize_samples",
    "pareto_frontier",
    "periodic_binary",
    "periodic_regularizer",
    "plan_cost",
    "plan_within_accuracy",
    "post_training_quantize",
    "predicted_loss",
    "quantization_error",
    "quantize_codes",
    "quantized_layers",
    "reestimate_batch_norms_",
    "restore_",
    "restore_binary_",
    "save_binary",
    "save_latency",
    "save_packed",
    "score_layers",
    "search_plans",
    "sensitive_layers",
    "set_frequency_",
    "set_stage_",
    "sign_ste",
    "switch_",
    "switch_codes",
    "tied_layers",
    "to_deploy",
    "to_deploy_binary",
    "tune_biases_",
    "weigh_perturbations",
]
