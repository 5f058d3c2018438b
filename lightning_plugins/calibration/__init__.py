"""Calibration: probabilities that can be taken at their word, and measures of how far they are from that."""

from lightning_plugins.calibration.binned import (
    ClasswiseCalibrationError,
    average_calibration_error,
    classwise_ece,
    mce,
    root_mean_square_calibration_error,
)
from lightning_plugins.calibration.binning import (
    BayesianBinning,
    HistogramBinning,
    PlattBinning,
    TopLabelHistogramBinning,
)
from lightning_plugins.calibration.bootstrap import (
    Estimate,
    bootstrap_interval,
    calibration_report,
)
from lightning_plugins.calibration.calibrator import CalibratedModule, Calibrator
from lightning_plugins.calibration.ensemble_temperature import EnsembleTemperatureScaling
from lightning_plugins.calibration.groups import (
    GroupCalibrationError,
    group_ece,
)
from lightning_plugins.calibration.h_calibration import HCalibration, h_calibration_loss
from lightning_plugins.calibration.intra_order_preserving import IntraOrderPreserving
from lightning_plugins.calibration.isotonic import IsotonicCalibration
from lightning_plugins.calibration.kernel_density import (
    ece_kde,
)
from lightning_plugins.calibration.label_shift import PriorCorrectedTemperature
from lightning_plugins.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling
from lightning_plugins.calibration.losses import (
    DualFocalLoss,
    FLSD53Loss,
    FocalLoss,
    MMCELoss,
    SoftBinnedECELoss,
    dual_focal_loss,
    flsd53,
    focal_loss,
    mmce,
    soft_binned_ece,
    weighted_mmce,
)
from lightning_plugins.calibration.metrics import CalibrationError, ReliabilityBins, ece, reliability_bins
from lightning_plugins.calibration.monotone_maps import (
    IntegralMap,
    MonotoneMap,
    PiecewiseLinearMap,
    TemperatureEnsemble,
    piecewise_linear,
)
from lightning_plugins.calibration.neural_collapse import (
    MixedCollapse,
    NeuralCollapse,
    SimplexETFClassifier,
    collapse_curves,
    mixed_collapse,
    neural_collapse,
    simplex_etf,
    unconstrained_mixup_feature,
)
from lightning_plugins.calibration.ranked import (
    aurc,
    debiased_ece,
    eaurc,
    equal_mass_ece,
    ks_error,
    sweep_ece,
)
from lightning_plugins.calibration.ranked_metrics import (
    AURC,
    DebiasedCalibrationError,
    EqualMassCalibrationError,
    KDECalibrationError,
    KSError,
    SmoothCalibrationError,
    SweepCalibrationError,
)
from lightning_plugins.calibration.reliability import reliability_diagram
from lightning_plugins.calibration.scoring import (
    BrierDecomposition,
    BrierScore,
    NegativeLogLikelihood,
    NllDecomposition,
    brier,
    brier_decomposition,
    calibration_refinement_nll,
    l1_to_posterior,
    nll,
)
from lightning_plugins.calibration.selection import CalibratorSelection
from lightning_plugins.calibration.smooth import (
    kde_ece,
    smooth_ece,
)
from lightning_plugins.calibration.spline import SplineCalibration
from lightning_plugins.calibration.temperature import TemperatureScaling, fit_temperature, fit_temperature_by_ece
from lightning_plugins.calibration.threshold_consistency import OPIS, opis, tcm_loss
from lightning_plugins.calibration.virtual_representations import (
    FeatureStatistics,
    HeadCalibration,
    calibrate_head_,
    sample_virtual_features,
)

__all__ = [
    "FeatureStatistics",
    "HeadCalibration",
    "MixedCollapse",
    "NeuralCollapse",
    "OPIS",
    "SimplexETFClassifier",
    "calibrate_head_",
    "collapse_curves",
    "mixed_collapse",
    "neural_collapse",
    "opis",
    "sample_virtual_features",
    "simplex_etf",
    "tcm_loss",
    "unconstrained_mixup_feature",
    "ClasswiseCalibrationError",
    "average_calibration_error",
    "classwise_ece",
    "mce",
    "root_mean_square_calibration_error",
    "Estimate",
    "bootstrap_interval",
    "calibration_report",
    "GroupCalibrationError",
    "group_ece",
    "ece_kde",
    "aurc",
    "debiased_ece",
    "eaurc",
    "equal_mass_ece",
    "ks_error",
    "sweep_ece",
    "AURC",
    "DebiasedCalibrationError",
    "EqualMassCalibrationError",
    "KDECalibrationError",
    "KSError",
    "SmoothCalibrationError",
    "SweepCalibrationError",
    "BrierDecomposition",
    "BrierScore",
    "NegativeLogLikelihood",
    "NllDecomposition",
    "brier",
    "brier_decomposition",
    "calibration_refinement_nll",
    "l1_to_posterior",
    "nll",
    "kde_ece",
    "smooth_ece",
    "BayesianBinning",
    "HistogramBinning",
    "PlattBinning",
    "TopLabelHistogramBinning",
    "EnsembleTemperatureScaling",
    "IsotonicCalibration",
    "PriorCorrectedTemperature",
    "DirichletCalibration",
    "MatrixScaling",
    "VectorScaling",
    "SplineCalibration",
    "fit_temperature_by_ece",
    "DualFocalLoss",
    "FLSD53Loss",
    "FocalLoss",
    "MMCELoss",
    "SoftBinnedECELoss",
    "dual_focal_loss",
    "flsd53",
    "focal_loss",
    "mmce",
    "soft_binned_ece",
    "weighted_mmce",
    "CalibratedModule",
    "CalibrationError",
    "Calibrator",
    "CalibratorSelection",
    "HCalibration",
    "IntegralMap",
    "IntraOrderPreserving",
    "MonotoneMap",
    "PiecewiseLinearMap",
    "ReliabilityBins",
    "TemperatureEnsemble",
    "TemperatureScaling",
    "ece",
    "fit_temperature",
    "h_calibration_loss",
    "piecewise_linear",
    "reliability_bins",
    "reliability_diagram",
]
