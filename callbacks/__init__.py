"""How each method meets a Trainer: one file per callback, no mathematics."""

if __name__ != "lightning_plugins.callbacks":
    raise ImportError("import lightning_plugins.callbacks, not callbacks: a second name would load every class twice")

from lightning_plugins.callbacks.calibration.post_hoc import PostHocCalibration
from lightning_plugins.callbacks.quantization.multi_precision_qat import MultiPrecisionQAT
from lightning_plugins.callbacks.training_step import TrainingStepCallback

__all__ = ["MultiPrecisionQAT", "PostHocCalibration", "TrainingStepCallback"]
