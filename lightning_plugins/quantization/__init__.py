"""Quantization: one network at every precision."""

from lightning_plugins.quantization.accounting import Cost, cost
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
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    binary_activation,
    binary_layers,
    convert_binary_,
    export_binary_onnx,
    load_binary,
    load_binary_checkpoint,
    normalize_samples,
    periodic_binary,
    periodic_regularizer,
    quantization_error,
    restore_binary_,
    save_binary,
    set_frequency_,
    set_stage_,
    sign_ste,
    to_deploy_binary,
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
from lightning_plugins.quantization.quantizers import (
    double_rounding,
    fake_quantize,
    quantize_codes,
    switch_codes,
)
from lightning_plugins.quantization.scores import evaluate_plan, inverted, score_layers
from lightning_plugins.quantization.self_distillation import ProgressiveSelfDistillation
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable
from lightning_plugins.quantization.supernet import PlanSearch, search_plans

__all__ = [
    "AdaptiveLearningRateScaling",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "BisectionResult",
    "BitPlan",
    "Cost",
    "Frontier",
    "InputQuantizer",
    "LayerSensitivity",
    "MultiPrecisionBatchNorm",
    "PlanSearch",
    "ProgressiveSelfDistillation",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "ResidualQuantizer",
    "SensitivityTable",
    "active_plan",
    "allocate_bits",
    "binary_activation",
    "binary_layers",
    "bisect_bits",
    "clamp_scales_",
    "convert_",
    "convert_binary_",
    "cost",
    "diverse_plans",
    "double_rounding",
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
    "predicted_loss",
    "quantization_error",
    "quantize_codes",
    "quantized_layers",
    "restore_",
    "restore_binary_",
    "save_binary",
    "save_latency",
    "save_packed",
    "score_layers",
    "search_plans",
    "set_frequency_",
    "set_stage_",
    "sign_ste",
    "switch_",
    "switch_codes",
    "to_deploy",
    "to_deploy_binary",
]
