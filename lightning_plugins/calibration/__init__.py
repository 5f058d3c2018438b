"""Calibration: probabilities that can be taken at their word, and measures of how far they are from that."""

from lightning_plugins.calibration.calibrator import CalibratedModule, Calibrator
from lightning_plugins.calibration.metrics import CalibrationError, ReliabilityBins, ece, reliability_bins
from lightning_plugins.calibration.reliability import reliability_diagram
from lightning_plugins.calibration.temperature import TemperatureScaling, fit_temperature

__all__ = [
    "CalibratedModule",
    "CalibrationError",
    "Calibrator",
    "ReliabilityBins",
    "TemperatureScaling",
    "ece",
    "fit_temperature",
    "reliability_bins",
    "reliability_diagram",
]
