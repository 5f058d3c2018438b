"""Quantization: one network at every precision."""

from lightning_plugins.quantization.accounting import Cost, cost
from lightning_plugins.quantization.alrs import AdaptiveLearningRateScaling
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
from lightning_plugins.quantization.self_distillation import ProgressiveSelfDistillation

__all__ = [
    "AdaptiveLearningRateScaling",
    "BitPlan",
    "Cost",
    "InputQuantizer",
    "MultiPrecisionBatchNorm",
    "ProgressiveSelfDistillation",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "ResidualQuantizer",
    "active_plan",
    "clamp_scales_",
    "convert_",
    "cost",
    "double_rounding",
    "export_onnx",
    "fake_quantize",
    "load_converted",
    "load_packed",
    "quantize_codes",
    "quantized_layers",
    "restore_",
    "save_packed",
    "switch_",
    "switch_codes",
    "to_deploy",
]
