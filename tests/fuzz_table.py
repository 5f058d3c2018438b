"""Valid calls of every public name, from which the fuzzer makes invalid ones. A new public name joins by one row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_plugins import (
    batches,
    calibration,
    callbacks,
    data,
    distillation,
    features,
    files,
    gradients,
    grouped,
    hessian,
    logging,
    losses,
    mixing,
    models,
    modules,
    quantization,
    report,
    robustness,
)
from toys import TinyModule

N, C = 24, 3
MODULES: tuple[ModuleType, ...] = (
    batches,
    calibration,
    callbacks,
    data,
    distillation,
    features,
    files,
    gradients,
    grouped,
    hessian,
    logging,
    losses,
    mixing,
    models,
    modules,
    quantization,
    report,
    robustness,
)

Arguments = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """How to call one public name.

    Attributes:
        make: fresh valid arguments. A fuzzed call differs from them in one or two.
        then: what is done with the result, with the arguments of ``also``: a metric is updated and computed.
        also: fresh valid arguments of ``then``.
        leave: arguments that are not changed: callables of the user, and what the object was made for.
        in_place: the call changes these arguments, as its name says.
        draws: it draws from the global generator, as every constructor of a network in torch does.
        skips_nan: arguments of which NaN does not reach the result, and why that is right.
        unused: arguments that any value will do for, since this object does not look at them.
        gives_nan: why NaN is the documented answer to some finite arguments.
        also_raises: errors beside ValueError and TypeError that the documentation names.
    """

    make: Arguments
    then: Callable[..., Any] | None = None
    also: Arguments = dict
    leave: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    draws: bool = False
    skips_nan: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    gives_nan: str = ""
    also_raises: tuple[type[Exception], ...] = ()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % C


def logits(n: int = N, *, seed: int = 0) -> Tensor:
    return randn(n, C, seed=seed) + F.one_hot(labels(n), C)


def probs(n: int = N) -> Tensor:
    return logits(n).softmax(1)


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Let a function build the same network each time and leave the global generator alone."""

    @wraps(build)
    def quietly() -> nn.Module:
        with torch.random.fork_rng(()):
            torch.manual_seed(0)
            return build()

    return quietly


@seeded
def net() -> nn.Module:
    """From images (N, 1, 4, 4) to logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, C)).eval()


@seeded
def head() -> nn.Module:
    return nn.Linear(4, C)


@seeded
def conv_net() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, C))


def images(n: int = 6) -> Tensor:
    return rand(n, 1, 4, 4)


def batch(n: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(images(n), labels(n))]


def converted(bits: tuple[int, ...] = (8, 4), **arguments: Any) -> nn.Module:
    model = quantization.convert_(conv_net(), bits, **({"first_last_bits": 8} | arguments))
    for b in bits:
        quantization.switch_(model.train(), b)(images())
    return quantization.switch_(model, bits[0])


def binary_net(stage: int = 2) -> nn.Module:
    return quantization.convert_binary_(conv_net(), stage=stage, keep_real=())


def table() -> quantization.SensitivityTable:
    layer = quantization.LayerSensitivity
    return quantization.SensitivityTable(
        "by hand",
        {
            "0": layer(0.5, {8: 0.0, 4: 0.2}, num_weights=36, macs=100),
            "3": layer(0.1, {8: 0.0, 4: 0.1}, num_weights=144, macs=400),
            "6": layer(0.3, {8: 0.0, 4: 0.3}, num_weights=192, macs=200),
        },
    )


def pool() -> distillation.ClassPool:
    return distillation.ClassPool(rand(12, 1, 8, 8), torch.arange(2).repeat(6))


@seeded
def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


@seeded
def convnet() -> nn.Module:
    return models.convnet3(num_classes=2, in_channels=1, image_size=8, width=4)


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz"))


def packed_file() -> Path:
    return quantization.save_packed(converted(), folder() / "net.safetensors")


def binary_file() -> Path:
    return quantization.save_binary(binary_net(), folder() / "net.safetensors")


def latency_file() -> Path:
    return quantization.save_latency(folder() / "latency.json", {"0": {8: 1.0, 4: 0.5}})


def logits_file() -> Path:
    import numpy as np

    path = folder() / "net.npz"
    np.savez(path, logits=logits().numpy(), labels=labels().numpy())
    return path


def distilled_folder() -> Path:
    return distillation.SyntheticSet(rand(10, 3, 1, 8, 8)).save(folder())


def image_folder() -> Path:
    from PIL import Image

    root = folder()
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (root / place).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (9, 9), (40 * index, 90, 10)).save(root / place / f"{index}.png")
    return root


def statistics() -> calibration.FeatureStatistics:
    return calibration.FeatureStatistics(C, 4).update(randn(N, 4), labels())


def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)


# What is done with an object that a row has made


def updated(metric: Any, **arguments: Any) -> Any:
    metric.update(**arguments)
    return metric.compute()


def fitted(calibrator: Any, *, logits: Any, labels: Any, new: Any) -> Any:
    calibrator.fit(logits, labels)
    return calibrator(new)


def called(thing: Any, **arguments: Any) -> Any:
    return thing(*arguments.values())


def with_keywords(thing: Any, **arguments: Any) -> Any:
    return thing(**arguments)


def attacked(attack: Any, *, inputs: Any, targets: Any) -> Any:
    return attack(net(), inputs, targets)


def entered(context: Any) -> Any:
    with context:
        return None


def objective_loss(objective: Any, *, clean: Any, adversarial: Any, targets: Any) -> Any:
    return objective(net(), clean, adversarial, targets)


def matched(objective: Any, *, real: Any, synthetic: Any) -> Any:
    return objective.loss(convnet(), real, synthetic).total


def set_up(module: Any) -> Any:
    module.setup("fit")
    return next(iter(module.train_dataloader()))[0].shape[1:]


SCORES: Arguments = lambda: {"probs": probs(), "labels": labels()}  # noqa: E731
FIT: Arguments = lambda: {"logits": logits(40), "labels": labels(40), "new": logits(6, seed=1)}  # noqa: E731
CLASSES: Arguments = lambda: {"logits": logits(), "target": labels()}  # noqa: E731
ATTACK: Arguments = lambda: {"logits_fn": net(), "inputs": images(), "targets": labels(6)}  # noqa: E731
BATCH: Arguments = lambda: {"inputs": images(), "targets": labels(6)}  # noqa: E731
OUTCOMES: Arguments = lambda: {  # noqa: E731
    "pred_clean": labels(),
    "pred_adv": labels().roll(1) * (torch.arange(N) % 2),
    "target": labels(),
}
TRAINING: Arguments = lambda: BATCH() and {"clean": images(), "adversarial": images(), "targets": labels(6)}  # noqa: E731


def replaced() -> dict[str, Any]:
    old = images()
    return {"batch": {"image": old, "label": labels(6)}, "old": old, "new": 1 - old}


def mixed_pairs() -> dict[str, Any]:
    pairs = torch.tensor([(0, 0), (1, 1), (2, 2), (0, 1), (1, 2)])
    first, second = pairs.T.contiguous()
    return {
        "features": randn(5, 4, 4), "first": first, "second": second, "lambdas": rand(4), "weight": randn(C, 4),
        "bias": randn(C),
    }  # fmt: skip


def scores(**more: Any) -> Row:
    return Row(lambda: SCORES() | {"input": "probs"} | more)


def metric(also: Arguments = SCORES, gives_nan: str = "", **arguments: Any) -> Row:
    return Row(lambda: dict(arguments), updated, also, gives_nan=gives_nan)


def calibrator(**arguments: Any) -> Row:
    return Row(lambda: dict(arguments), fitted, FIT)


def class_loss(**more: Any) -> Row:
    return Row(lambda: CLASSES() | more)


def loss_module(make: Arguments = dict, **arguments: Any) -> Row:
    return Row(lambda: arguments | make(), called, CLASSES)


def weighted(**more: Any) -> Row:
    extra = {"normalise": "batch_size", "reduction": "mean"}
    return Row(lambda: CLASSES() | more | {"weight": rand(C) + 0.5} | extra)


def attack(**more: Any) -> Row:
    rest = {"eps": 0.1, "norm": "linf", "bounds": (0.0, 1.0)} | more
    return Row(lambda: ATTACK() | rest | {"generator": generator()})


def attack_class(**arguments: Any) -> Row:
    return Row(lambda: {"eps": 0.1, "norm": "linf"} | arguments, attacked, BATCH)


def objective(unused: tuple[str, ...] = (), **arguments: Any) -> Row:
    return Row(lambda: dict(arguments), objective_loss, TRAINING, unused=unused)


def counted(**arguments: Any) -> Row:
    """An objective that knows the class counts, and does not look at the clean inputs."""
    return objective(("clean",), **arguments, counts=(30, 20, 10))


def callback(leave: tuple[str, ...] = (), **arguments: Any) -> Row:
    return Row(lambda: dict(arguments), leave=leave)


def mixing_module(**arguments: Any) -> Row:
    make = lambda: {"num_classes": C, "generator": generator()} | arguments  # noqa: E731
    return Row(make, called, BATCH)


def sizes(**arguments: Any) -> Row:
    """A network, which draws its weights from the global generator as all in torch do."""
    return Row(lambda: {"num_classes": C, "in_channels": 1} | arguments, called, lambda: {"x": rand(2, 1, 16, 16)},
               draws=True, gives_nan=OVERFLOW)  # fmt: skip


def curvature(**more: Any) -> Row:
    rest = {"layers": ["1", "3"], "curvature": "auto", "tolerance": 0.5, "seed": 0, "progress": False} | more
    return Row(lambda: {"model": net(), "loss_fn": F.cross_entropy, "batches": batch()} | rest)


MIXED = "mixed labels are made in training, where looking at values would make the device wait"
OVERFLOW = "the variance of 1e30 is infinite in the normalisation of the network"
NO_SAMPLES = "a class or group without samples has no accuracy"
PREDICTED = "an argmax of NaN is a class like any other; the attack that gave it refuses NaN"

ROWS: dict[ModuleType, dict[str, Row]] = {
    batches: {
        "forward_logits": Row(lambda: {"pl_module": TinyModule(), "inputs": randn(4, 8)}),
        "inputs_and_targets": Row(
            lambda: {"batch": [randn(4, 8), labels(4), "names"]}, skips_nan={"batch": "what follows is not read"}
        ),
        "replace_tensor": Row(replaced),
    },
    calibration: {
        "AURC": metric(excess=True, input="probs"),
        "BayesianBinning": calibrator(strength=2.0),
        "BrierScore": metric(input="probs"),
        "CalibratedModule": Row(
            lambda: {"module": nn.Identity(), "calibrator": calibration.TemperatureScaling().fit(logits(), labels())},
            called,
            lambda: {"logits": logits()},
        ),
        "CalibrationError": metric(num_bins=5, norm="l1", input="probs"),
        "CalibratorSelection": Row(
            lambda: {
                "calibrators": [calibration.TemperatureScaling(), calibration.VectorScaling()],
                "num_folds": 2,
                "criterion": "nll",
                "seed": 0,
            },
            fitted,
            FIT,
            in_place=("calibrators",),
        ),
        "ClasswiseCalibrationError": metric(num_classes=C, reduction="mean", threshold=None, num_bins=5, input="probs"),
        "DebiasedCalibrationError": metric(num_bins=4, input="probs"),
        "DirichletCalibration": calibrator(
            cross_validate=False,
            off_diagonal_penalty=1.0,
            bias_penalty=1.0,
            off_diagonal_grid=(0.1, 1.0),
            bias_grid=(0.1,),
            num_folds=2,
            seed=0,
            max_iterations=5,
        ),
        "DualFocalLoss": loss_module(gamma=2.0),
        "EnsembleTemperatureScaling": calibrator(loss="nll"),
        "EqualMassCalibrationError": metric(num_bins=4, input="probs"),
        "FLSD53Loss": loss_module(),
        "FeatureStatistics": Row(
            lambda: {"num_classes": C, "num_features": 4, "power": 1.0, "device": None},
            lambda made, **a: made.update(**a).covariance(),
            lambda: {"features": rand(N, 4), "labels": labels()},
            gives_nan="a class with fewer than two samples has no covariance",
        ),
        "FocalLoss": loss_module(lambda: {"weight": rand(C)}, gamma=2.0, normalise="batch_size"),
        "GroupCalibrationError": metric(
            lambda: SCORES() | {"groups": labels()}, num_groups=3, reduction="max", num_bins=5, input="probs"
        ),
        "HCalibration": calibrator(
            map="piecewise_linear",
            size=5,
            select_by="debiased_ece",
            window=4,
            leave_one_class_out=False,
            learning_rate=0.01,
            max_epochs=2,
            patience=2,
            batch_size=30,
            seed=0,
            progress=False,
        ),
        "HistogramBinning": calibrator(num_bins=4, binning="width"),
        "IntegralMap": Row(
            lambda: {"hidden": 3, "num_segments": 20}, called, lambda: {"log_probs": probs().log()}, draws=True
        ),
        "IntraOrderPreserving": calibrator(
            variant="diagonal", hidden=3, max_epochs=2, learning_rate=0.01, batch_size=16, seed=0, progress=False
        ),
        "IsotonicCalibration": calibrator(mode="one_vs_rest"),
        "KDECalibrationError": metric(power=1.0, input="probs"),
        "KSError": metric(input="probs"),
        "MMCELoss": loss_module(strength=2.0, weighted=False, bandwidth=0.4),
        "MatrixScaling": calibrator(
            off_diagonal_penalty=1.0,
            bias_penalty=1.0,
            cross_validate=False,
            off_diagonal_grid=(0.1, 1.0),
            bias_grid=(0.1,),
            num_folds=2,
            seed=0,
            max_iterations=5,
        ),
        "NegativeLogLikelihood": metric(input="probs"),
        "OPIS": metric(
            lambda: {"embeddings": randn(N, 4), "labels": labels()},
            far_range=(0.1, 0.9),
            num_thresholds=11,
            worst_share=1.0,
        ),
        "PiecewiseLinearMap": Row(
            lambda: {"num_segments": 20}, called, lambda: {"log_probs": probs().log()}, draws=True
        ),
        "PlattBinning": calibrator(num_bins=4, scaling="temperature"),
        "PriorCorrectedTemperature": calibrator(target_prior=(0.5, 0.3, 0.2)),
        "SimplexETFClassifier": Row(
            lambda: {"num_features": 4, "num_classes": C, "scale": 1.0, "seed": 0},
            called,
            lambda: {"features": randn(5, 4)},
        ),
        "SmoothCalibrationError": metric(input="probs"),
        "SoftBinnedECELoss": loss_module(strength=1.0, num_bins=5, temperature=0.1, p=2.0),
        "SplineCalibration": calibrator(num_knots=4),
        "SweepCalibrationError": metric(input="probs"),
        "TemperatureEnsemble": Row(
            lambda: {"num_members": 4}, called, lambda: {"log_probs": probs().log()}, draws=True
        ),
        "TemperatureScaling": calibrator(loss="nll", smooth=False),
        "TopLabelHistogramBinning": calibrator(points_per_bin=5),
        "VectorScaling": calibrator(bias=True, max_iterations=5),
        "aurc": scores(),
        "average_calibration_error": scores(num_bins=5),
        "bootstrap_interval": Row(
            lambda: {"metric_fn": calibration.ece} | SCORES() | {"num_samples": 5, "level": 0.9, "seed": 0}
        ),
        "brier": scores(),
        "brier_decomposition": scores(num_bins=5),
        "calibrate_head_": Row(
            lambda: {
                "head": head(),
                "statistics": statistics(),
                "samples_per_class": 8,
                "balance": True,
                "learning_rate": 0.1,
                "num_epochs": 1,
                "batch_size": 8,
                "shrinkage": 0.1,
                "non_negative": False,
                "seed": 0,
            },
            in_place=("head",),
        ),
        "calibration_refinement_nll": scores(num_folds=2),
        "calibration_report": scores(num_bins=5, num_bootstrap=3, level=0.9, seed=0),
        "classwise_ece": scores(reduction="mean", binning="width", threshold=None, num_bins=5),
        "collapse_curves": Row(lambda: {"epochs": [0, 1], "curves": {"nc1": [0.1, 0.2]}}),
        "debiased_ece": scores(num_bins=4),
        "dual_focal_loss": class_loss(gamma=2.0, reduction="mean"),
        "eaurc": scores(),
        "ece": scores(num_bins=5, norm="l1"),
        "ece_kde": scores(kind="canonical", bandwidth=0.1, power=1.0, max_samples=20, seed=0),
        "equal_mass_ece": scores(num_bins=4),
        "fit_temperature": Row(lambda: {"logits": logits(), "labels": labels(), "loss": "nll"}),
        "fit_temperature_by_ece": Row(
            lambda: {"logits": logits(), "labels": labels(), "temperatures": (0.5, 1.0, 2.0), "num_bins": 5}
        ),
        "flsd53": class_loss(reduction="mean"),
        "focal_loss": weighted(gamma=2.0),
        "group_ece": Row(
            lambda: (
                SCORES() | {"groups": labels(), "reduction": "max", "num_groups": 3, "num_bins": 5, "input": "probs"}
            )
        ),
        "h_calibration_loss": Row(
            lambda: SCORES() | {"window": 4, "num_clusters": 4, "tolerance": 1e-20, "leave_one_class_out": False}
        ),
        "kde_ece": scores(power=1.0),
        "ks_error": scores(),
        "l1_to_posterior": Row(lambda: {"probs": probs(), "posterior": probs().flip(0), "input": "probs"}),
        "mce": scores(num_bins=5, min_count=1),
        "mixed_collapse": Row(mixed_pairs),
        "mmce": class_loss(bandwidth=0.4),
        "neural_collapse": Row(
            lambda: {"features": randn(N, 4), "labels": labels(), "weight": randn(C, 4), "bias": randn(C)}
        ),
        "nll": scores(),
        "opis": Row(
            lambda: {
                "embeddings": randn(N, 4),
                "labels": labels(),
                "far_range": (0.1, 0.9),
                "num_thresholds": 11,
                "worst_share": 1.0,
            }
        ),
        "piecewise_linear": Row(lambda: {"inputs": -probs().log(), "slopes": rand(10), "stop": 5.0}),
        "reliability_bins": scores(num_bins=5),
        "reliability_diagram": Row(
            lambda: {
                "bins": calibration.reliability_bins(probs(), labels(), num_bins=4),
                "after": None,
                "title": "t",
                "labels": ("a", "b"),
            }
        ),
        "root_mean_square_calibration_error": scores(num_bins=5, debias=False),
        "sample_virtual_features": Row(
            lambda: {
                "statistics": statistics(),
                "samples_per_class": 5,
                "shrinkage": 0.1,
                "jitter": 1e-6,
                "non_negative": False,
                "seed": 0,
            }
        ),
        "simplex_etf": Row(lambda: {"num_classes": C, "num_features": 4, "seed": 0}),
        "smooth_ece": scores(width=0.1),
        "soft_binned_ece": class_loss(num_bins=5, temperature=0.1, p=2.0),
        "sweep_ece": scores(),
        "tcm_loss": Row(
            lambda: {
                "embeddings": randn(N, 4),
                "labels": labels(),
                "positive_margin": 0.9,
                "negative_margin": 0.5,
                "positive_weight": 1.0,
                "negative_weight": 1.0,
            }
        ),
        "unconstrained_mixup_feature": Row(
            lambda: {"weight": calibration.simplex_etf(C, 4), "first": 0, "second": 1, "share": 0.3, "decay": 0.01}
        ),
        "weighted_mmce": class_loss(bandwidth=0.4),
    },
    callbacks: {
        "AdversarialTraining": callback(
            attack=robustness.PGDAttack(),
            objective=None,
            attack_mode="eval",
            warmup_epochs=0.5,
            class_budget_alpha=0.3,
            counts=(3, 2, 1),
            mean=(0.5,),
            std=(0.5,),
            seed=0,
            batch_fn=None,
            logits_fn=None,
        ),
        "AdversarialWeightPerturbation": callback(gamma=0.01, warmup_epochs=1),
        "BinaryQAT": callback(
            frequency=20.0,
            stage_split=0.5,
            frequency_start=10.0,
            regularizer=0.1,
            stage2_regularizer=0.1,
            regularizer_sign=1,
            stage2_lr_factor=0.5,
            stage2_weight_decay=0.1,
            start_from=None,
            estimator="periodic",
            include=("*",),
            exclude=(),
            keep_real=("first",),
            seed=0,
        ),
        "BitPlanQAT": callback(
            plan=None,
            bits=(8, 4),
            score="hawq-v2",
            allocator="pareto",
            budget=6.0,
            unit="average_bits",
            order="together",
            unlock_epochs=None,
            num_samples=10,
            num_probes=5,
            seed=0,
            alrs="eta",
            start_from=None,
            evaluate=True,
            include=("*",),
            exclude=(),
            first_last_bits=8,
            depthwise_bits=8,
            per_channel=True,
            quantize_inputs=True,
            input_init="percentile",
            scale_grad="effective",
            quantize_residual=False,
        ),
        "CalibrationMonitor": callback(
            metrics=("ece", "nll"), num_bins=5, groups="label", min_group_size=1, bands="binomial", dataloader_idx=0
        ),
        "CalibrationRegularizer": callback(term="mmce", strength=1.0, batch_fn=None, logits_fn=None),
        "CalibratorComparison": callback(
            calibrators=[calibration.TemperatureScaling()],
            metrics=("ece", "nll"),
            num_bins=5,
            num_bootstrap=3,
            dataloader_idx=0,
            seed=0,
        ),
        "CatastrophicOverfittingGuard": callback(
            attack=robustness.PGDAttack(), drop=0.2, action="stop", mean=(0.5,), std=(0.5,), seed=0
        ),
        "ClassifierHeadCalibration": callback(
            samples_per_class=5,
            balance=True,
            learning_rate=0.1,
            num_epochs=1,
            batch_size=8,
            shrinkage=0.1,
            power=1.0,
            non_negative=False,
            statistics=None,
            use_training_data=None,
            head=None,
            num_bins=5,
            dataloader_idx=0,
            seed=0,
        ),
        "DeploymentCheck": callback(bits=(8, 4), batch_fn=None),
        "DeferredReweighting": callback(
            loss="ce",
            weights="effective_number",
            start=0.8,
            beta=0.99,
            gamma=1.0,
            max_margin=0.5,
            scale=1.0,
            counts=(3, 2, 1),
        ),
        "DistilledSetEvaluation": callback(
            protocol="house",
            num_nets=2,
            every_n_epochs=1,
            baselines=True,
            architectures=("resnet20",),
            epochs=None,
            steps=3,
            labels="hard",
            joint=None,
            seed=0,
        ),
        "FreeAdversarialTraining": callback(eps=0.1, num_replays=2, mean=(0.5,), std=(0.5,)),
        "MixedPrecisionQAT": callback(
            bits=(8, 4),
            sensitivity=None,
            sigma=0.5,
            warmup_epochs=1,
            num_epochs=3,
            budgets=(6.0,),
            num_candidates=2,
            num_samples=10,
            num_probes=5,
            seed=0,
            stepping=None,
            alrs="eta",
            self_distillation=0.1,
            start_from=None,
            evaluate=True,
            include=("*",),
            exclude=(),
            first_last_bits=8,
            depthwise_bits=8,
            per_channel=True,
            quantize_inputs=True,
            input_init="percentile",
            scale_grad="effective",
            batch_norm="transitional",
            quantize_residual=False,
        ),
        "MixedSampleAugmentation": callback(
            policy="mixup",
            alpha=1.0,
            prob=0.5,
            stop_epoch=2,
            label_lambda="same",
            per_sample=False,
            num_points=2,
            decay=3.0,
            max_soft=0.0,
            soft_targets=False,
            num_classes=C,
            seed=0,
        ),
        "MultiPrecisionQAT": callback(
            bits=(8, 4),
            stepping=None,
            alrs="eta",
            self_distillation=0.1,
            start_from=None,
            evaluate=True,
            include=("*",),
            exclude=(),
            first_last_bits=8,
            depthwise_bits=8,
            per_channel=True,
            quantize_inputs=True,
            input_init="percentile",
            scale_grad="effective",
            batch_norm="per_precision",
            quantize_residual=False,
        ),
        "NeuralCollapseMonitor": callback(every_n_epochs=1, num_samples=10, mixed=False, head=None, seed=0),
        "PlainTwin": callback(name="fp32"),
        "PostHocCalibration": callback(
            calibrator=calibration.TemperatureScaling(),
            when="validation",
            num_bins=5,
            dataloader_idx=0,
            calibrate_outputs=True,
        ),
        "PostTrainingQuantization": callback(
            plan=None,
            bits=(8, 4),
            budget=6.0,
            unit="average_bits",
            accuracy_ratio=None,
            score="pairwise",
            pipeline="full",
            mode="sequential",
            num_samples=10,
            num_steps=3,
            batch_size=5,
            learning_rates=quantization.LearningRates(),
            seed=0,
            memory_limit=10**9,
            include=("*",),
            exclude=(),
            first_last_bits=8,
            depthwise_bits=8,
            per_channel=True,
            quantize_inputs=True,
            batch_norm="shared",
            quantize_residual=False,
        ),
        "RobustnessEvaluation": callback(
            val_attack=robustness.PGDAttack(),
            test_attacks={"pgd": robustness.PGDAttack()},
            num_val_samples=10,
            every_n_epochs=1,
            eps_grid=(0.1, 0.5),
            tail=(1, 2),
            counts=(3, 2, 1),
            mean=(0.5,),
            std=(0.5,),
            seed=0,
        ),
        "TrainingStepCallback": callback(batch_fn=None, logits_fn=None),
        "VariantComparison": callback(quantities=("acc", "ece"), key="test/variants"),
    },
    data: {
        "ClassOverlap": Row(
            lambda: {"pairs": [(0, 1)], "probability": 0.5},
            lambda made, **a: made.apply(**a),
            lambda: {"targets": labels(), "num_classes": C, "seed": 0},
        ),
        "DigitsDataModule": Row(
            lambda: {
                "batch_size": 32,
                "num_workers": 0,
                "val_fraction": 0.1,
                "image_size": 8,
                "augmentation": False,
                "transforms": (),
                "transform_validation": True,
                "with_index": False,
                "seed": 0,
            },
            set_up,
        ),
        "DistilledDataModule": Row(
            lambda: {
                "path": distilled_folder(),
                "real": data.DigitsDataModule(),
                "repeats": 1,
                "root": "data",
                "batch_size": 2,
                "num_workers": 0,
                "augmentation": False,
                "with_index": False,
                "seed": 0,
            },
            set_up,
        ),
        "DistilledDataset": Row(
            lambda: {"path": distilled_folder(), "normalise": False},
            lambda made, index: made[index],
            lambda: {"index": 1},
            leave=("index",),
        ),
        "ImageDataset": Row(
            lambda: {
                "images": images(),
                "targets": labels(2),
                "indices": torch.tensor([0, 2]),
                "image_size": 4,
                "augment": None,
                "with_index": True,
            },
            lambda made: made[1],
            skips_nan={"images": "only the item that is asked for is read"},
        ),
        "ImageFolderDataModule": Row(
            lambda: {
                "root": str(image_folder()),
                "batch_size": 4,
                "num_workers": 0,
                "val_fraction": 0.1,
                "image_size": 8,
                "augmentation": True,
                "transforms": (),
                "transform_validation": True,
                "with_index": False,
                "seed": 0,
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
            }
        ),
        "Imbalance": Row(
            lambda: {"kind": "exp", "ratio": 4.0},
            lambda made, **a: made.apply(**a),
            lambda: {"targets": labels(), "num_classes": C, "seed": 0},
        ),
        "LabelNoise": Row(
            lambda: {"rate": 0.5},
            lambda made, **a: made.apply(**a),
            lambda: {"targets": labels(), "num_classes": C, "seed": 0},
        ),
        "LogitsDataModule": Row(
            lambda: {
                "logits": str(logits_file()),
                "input": "logits",
                "calibration_fraction": 0.5,
                "batch_size": 5,
                "seed": 0,
            },
            lambda made: [made.setup(), next(iter(made.val_dataloader()))][1],
        ),
        "ShapesDataModule": Row(
            lambda: {
                "train_per_class": 3,
                "mirrored": 0.5,
                "batch_size": 5,
                "num_workers": 0,
                "val_fraction": 0.4,
                "image_size": 16,
                "augmentation": False,
                "transforms": (),
                "transform_validation": True,
                "with_index": False,
                "seed": 0,
            },
            set_up,
        ),
        "class_overlap": Row(lambda: {"targets": labels(), "pairs": [(0, 1)], "probability": 0.5, "seed": 0}),
        "draw_shapes": Row(lambda: {"per_class": 2, "mirrored": 0.5, "seed": 0, "purpose": "train"}),
        "make_imbalanced": Row(
            lambda: {
                "targets": labels(),
                "kind": "exp",
                "ratio": 4.0,
                "max_per_class": 6,
                "class_order": (0, 1, 2),
                "seed": 0,
            }
        ),
        "read_logits": Row(lambda: {"path": logits_file(), "input": "logits"}),
        "stratified_split": Row(lambda: {"targets": labels(), "fraction": 0.25, "seed": 0}),
        "symmetric_label_noise": Row(lambda: {"targets": labels(), "rate": 0.5, "num_classes": C, "seed": 0}),
        "without_augmentation": Row(
            lambda: {"dataset": data.ImageDataset(images(), labels(6), image_size=4, augment=nn.Identity())}
        ),
    },
    distillation: {
        "AugmentationDraw": Row(
            lambda: {"operations": ("flip", "crop"), "numbers": {"flip": 0.2, "crop_x": 0.3, "crop_y": 0.4}},
            lambda made, images: distillation.augment(images, made),
            lambda: {"images": rand(4, 1, 8, 8)},
            skips_nan={"images": "a shift may move the pixel out"},
        ),
        "CalibrationTerm": Row(
            lambda: {"weight": 1.0, "augmentation": None, "flip": None},
            lambda made, synthetic: made.loss(convnet(), synthetic).per_class,
            lambda: {"synthetic": rand(2, 3, 1, 8, 8)},
            gives_nan=OVERFLOW,
        ),
        "CharacteristicFunction": Row(
            lambda: {
                "frequencies": distillation.FrequencySampler(16),
                "alpha": 0.5,
                "beta": 0.5,
                "factor": 300.0,
                "augmentation": None,
                "flip": None,
                "tile_size": 4,
            },
            matched,
            lambda: {"real": distillation.RealBatch.of(rand(2, 5, 1, 8, 8)), "synthetic": rand(2, 3, 1, 8, 8)},
            gives_nan="a network overflows somewhere",
        ),
        "ClassPool": Row(
            lambda: {
                "images": rand(12, 1, 8, 8),
                "labels": torch.arange(2).repeat(6),
                "num_classes": 2,
                "mean": (0.5,),
                "std": (0.5,),
                "class_names": ("a", "b"),
                "device": "cpu",
                "seed": 0,
            },
            lambda made, batch_size: made.draw(batch_size).images(),
            lambda: {"batch_size": 4},
        ),
        "DistillationSettings": Row(lambda: {"objective": "gradient", "iterations": 3, "rho": 2, "alpha": 0.5}),
        "DistributionMatching": Row(
            lambda: {"augmentation": None, "flip": None, "tile_size": 4},
            matched,
            lambda: {"real": distillation.RealBatch.of(rand(2, 5, 1, 8, 8)), "synthetic": rand(2, 3, 1, 8, 8)},
            gives_nan=OVERFLOW,
        ),
        "ExtractorBank": Row(
            lambda: {"net": small_net(), "initial": rand(2, 130), "trained": rand(2, 130), "seed": 0},
            lambda made: [made.sample_(), made.net(rand(2, 1, 8, 8))][1],
            in_place=("net",),
        ),
        "FlipUnion": Row(
            lambda: {"mode": "auto", "threshold": 0.85},
            lambda made, real, seed, images: made.fit(real, seed=seed).per_class(images),
            lambda: {"real": [rand(8, 1, 4, 4), rand(8, 1, 4, 4)], "seed": 0, "images": rand(2, 3, 1, 4, 4)},
        ),
        "FrequencySampler": Row(
            lambda: {"num_frequencies": 8, "scale": 1.0, "network": None, "seed": 0},
            lambda made, dim: made.draw(dim, "cpu"),
            lambda: {"dim": 6},
        ),
        "GradientMatching": Row(
            lambda: {"distance": "cosine", "vectorised": None, "augmentation": None, "flip": None, "tile_size": 4},
            matched,
            lambda: {"real": distillation.RealBatch.of(rand(2, 5, 1, 8, 8)), "synthetic": rand(2, 3, 1, 8, 8)},
            gives_nan="a network overflows somewhere",
        ),
        "Protocol": Row(
            lambda: {
                "name": "own",
                "epochs": None,
                "steps": 3,
                "batch_size": 4,
                "optimizer": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 0.0,
                "schedule": "cosine",
                "milestones": (),
                "factor": 0.5,
                "new_optimizer": False,
                "operations": ("flip",),
                "variant": "idc",
                "cutmix": 0.0,
            }
        ),
        "RandomExtractors": Row(
            lambda: {"factory": small_net, "device": "cpu", "seed": 0}, lambda made: [made.sample_(), 1][1]
        ),
        "RealBatch": Row(
            lambda: {
                "source": rand(6, 1, 4, 4),
                "indices": torch.arange(6).view(2, 3),
                "classes": range(2),
                "scale": torch.ones(1, 1, 1),
                "shift": torch.zeros(1, 1, 1),
            },
            lambda made: made.images(),
            leave=("source", "indices", "classes", "scale", "shift"),
        ),
        "SamplingNetwork": Row(lambda: {"dim": 6, "rank": 2}, called, lambda: {"noise": randn(4, 6)}, draws=True),
        "SiameseAugmentation": Row(
            lambda: {"operations": ("color", "crop"), "variant": "idc", "scope": "batch", "seed": 0},
            lambda made, images, num_classes: made.apply(images, made.draw(num_classes)),
            lambda: {"images": rand(2, 3, 1, 8, 8), "num_classes": 2},
        ),
        "SyntheticSet": Row(
            lambda: {
                "images": rand(2, 3, 1, 8, 8),
                "space": "pixel",
                "mean": (0.5,),
                "std": (0.5,),
                "rho": 2,
                "variant": "single",
                "bound": 16,
                "class_names": ("a", "b"),
                "soft_logits": rand(2, 12, 2),
            },
            lambda made: made.decode(),
            skips_nan={"soft_logits": "the images do not depend on them"},
        ),
        "augment": Row(
            lambda: {
                "images": rand(4, 1, 8, 8),
                "draw": distillation.AugmentationDraw(
                    ("flip", "cutout"), {"flip": 0.2, "cutout_x": 0.3, "cutout_y": 0.4}
                ),
            }
        ),
        "augmentation_robust_score": Row(lambda: {"gain_augmented": 0.5, "gain_plain": 0.2, "weight": 0.5}),
        "characteristic_function_discrepancy": Row(
            lambda: {
                "real": randn(5, 6),
                "synthetic": randn(4, 6),
                "frequencies": randn(7, 6),
                "alpha": 0.5,
                "beta": 0.5,
            }
        ),
        "characteristic_sums": Row(lambda: {"features": randn(3, 5, 2), "frequencies": randn(4, 2)}),
        "class_bars": Row(
            lambda: {"values": {"x": [0.9, 0.8]}, "class_names": ["a", "b"], "label": "accuracy", "percent": True}
        ),
        "decode": Row(lambda: {"images": rand(2, 1, 4, 4), "rho": 2, "variant": "single", "bound": 16}),
        "decode_index": Row(lambda: {"num_images": 2, "rho": 2, "variant": "single", "bound": 16}),
        "discrepancy_per_class": Row(
            lambda: {"real": randn(2, 3, 4), "synthetic": randn(2, 3, 4, seed=1), "alpha": 0.5, "beta": 0.5}
        ),
        "ExpertTrajectories": Row(lambda: {"weights": rand(2, 3, 5)}, lambda made: made.weights),
        "TrajectoryMatching": Row(
            lambda: {
                "experts": None,
                "num_experts": 2,
                "expert_epochs": 2,
                "expert_learning_rate": 0.1,
                "num_steps": 2,
                "ahead": 1,
                "max_start": 1,
                "batch_size": None,
                "step_size": 0.1,
                "step_size_learning_rate": 1e-5,
                "exact": True,
                "augmentation": None,
            }
        ),
        "match_trajectory": Row(
            lambda: {
                "loss_of": lambda weights, inputs, label: (inputs @ weights - label).square().mean(),
                "start": randn(3),
                "target": randn(3, seed=1),
                "inputs": [randn(4, 3)],
                "labels": [randn(4)],
                "step_size": 0.1,
                "exact": True,
            },
            leave=("loss_of",),
        ),
        "encode": Row(lambda: {"images": rand(3, 8, 1, 6, 6), "rho": 2}),
        "evaluate_set": Row(
            lambda: {
                "synthetic": distillation.SyntheticSet(rand(2, 3, 1, 8, 8)),
                "test": pool(),
                "factory": small_net,
                "protocol": distillation.Protocol(steps=2),
                "num_nets": 1,
                "train": None,
                "architectures": None,
                "labels": "hard",
                "seed": 0,
                "joint": None,
            }
        ),
        "flip_detectability": Row(lambda: {"real": [rand(8, 1, 4, 4), rand(8, 1, 4, 4)], "seed": 0}),
        "flip_union": Row(lambda: {"images": images(), "labels": labels(6)}),
        "hard_label_recovery": Row(lambda: {"accuracy_full": 0.9, "accuracy_hard": 0.5}),
        "image_grid": Row(lambda: {"images": rand(3, 2, 1, 8, 8), "enlarge": 2, "columns": 2}),
        "images_per_tile": Row(lambda: {"net": convnet(), "image_shape": (1, 8, 8), "device": "cpu"}),
        "improvement_over_random": Row(lambda: {"accuracy": 0.9, "accuracy_random": 0.5}),
        "label_robust_score": Row(lambda: {"ior": 0.5, "hlr": 0.5, "weight": 0.5}),
        "preset_settings": Row(lambda: {"name": "dsa", "images_per_class": 10, "in_channels": 3, "image_size": 32}),
        "train_expert_": Row(
            lambda: {
                "net": small_net(),
                "pool": pool(),
                "epochs": 1,
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 0.0,
                "batch_size": 4,
                "augmentation": None,
                "seed": 0,
            },
            in_place=("net",),
            also_raises=(RuntimeError,),
        ),
        "train_nets": Row(
            lambda: {
                "factory": small_net,
                "images": rand(6, 1, 8, 8),
                "targets": torch.arange(2).repeat(3),
                "num_classes": 2,
                "protocol": distillation.Protocol(steps=2, operations=()),
                "seeds": (0,),
                "joint": None,
            },
            lambda made: made.logits(rand(2, 1, 8, 8)),
            also_raises=(RuntimeError,),
        ),
        "unit_rows": Row(lambda: {"features": randn(4, 3)}),
        "untrained_net": Row(
            lambda: {"factory": small_net, "seed": 0, "device": "cpu"}, lambda made: made(rand(2, 1, 8, 8))
        ),
        "vectorised_constants": Row(
            lambda: {
                "optimizer": "adamw",
                "num_classes": 10,
                "learning_rate": 0.1,
                "betas": (0.9, 0.99),
                "momentum": 0.0,
                "weight_decay": 0.0,
            }
        ),
    },
    features: {
        "PenultimateFeatures": Row(lambda: {"model": net(), "output_of": None}, entered),
        "classifier_layer": Row(lambda: {"model": net()}, lambda made: 1),
    },
    files: {"write_atomically": Row(lambda: {"path": folder() / "file", "content": b"text"})},
    gradients: {
        "grad_context": Row(dict, entered),
        "ordinary": Row(lambda: {"tensor": images()}),
    },
    grouped: {"ClassAccuracy": metric(lambda: {"preds": labels(), "target": labels()}, num_classes=C)},
    hessian: {
        "hessian_trace": curvature(num_probes=4, chunk_size=2),
        "hessian_vector_product": Row(
            lambda: {
                "model": net(),
                "loss_fn": F.cross_entropy,
                "batches": batch(),
                "vector": {"3": rand(C, 8)},
                "layers": ["3"],
            }
        ),
        "hessian_vector_products": Row(
            lambda: {
                "model": net(),
                "loss_fn": F.cross_entropy,
                "batches": batch(),
                "vectors": [{"3": rand(C, 8)}],
                "layers": ["3"],
            }
        ),
        "leading_eigenvalues": curvature(num_eigenvalues=2),
        "top_eigenvalue": curvature(num_iterations=5),
    },
    losses: {
        "FocalLoss": loss_module(lambda: {"weight": rand(C)}, gamma=2.0, normalise="batch_size"),
        "focal_loss": weighted(gamma=2.0),
    },
    mixing: {
        "CutMix": mixing_module(alpha=1.0),
        "FMix": mixing_module(alpha=1.0, decay=3.0, max_soft=0.1, per_sample=False),
        "ForegroundRecombine": mixing_module(
            mask_fn=lambda x: (x > 0.5).float(), p=0.5, degrees=10.0, scale=0.1, translate=0.1
        ),
        "MixedLabels": Row(
            lambda: {
                "components": torch.stack([labels(), labels().roll(1)]),
                "shares": torch.stack([rand(N), 1 - rand(N)]),
            },
            lambda made: made.soft(C),
        ),
        "Mixup": mixing_module(alpha=1.0, label_lambda="same", same_side=True, per_sample=False, num_points=2),
        "cutmix": Row(lambda: BATCH() | {"num_classes": C, "alpha": 1.0, "generator": generator()}),
        "fmix": Row(
            lambda: (
                BATCH()
                | {
                    "num_classes": C,
                    "alpha": 1.0,
                    "decay": 3.0,
                    "max_soft": 0.1,
                    "per_sample": False,
                    "generator": generator(),
                }
            )
        ),
        "fmix_mask": Row(
            lambda: {"size": (4, 6), "lam": 0.25, "decay": 3.0, "max_soft": 0.1, "generator": generator()}
        ),
        "mixed_accuracy": Row(lambda: {"logits": logits(), "targets": labels()}, skips_nan={"logits": PREDICTED}),
        "mixup": Row(
            lambda: (
                BATCH()
                | {
                    "num_classes": C,
                    "alpha": 1.0,
                    "label_lambda": "same",
                    "same_side": True,
                    "per_sample": False,
                    "num_points": 2,
                    "generator": generator(),
                }
            )
        ),
        "takes_mixed_labels": Row(
            lambda: {"loss": F.cross_entropy},
            called,
            lambda: {"logits": logits(), "target": labels()},
            leave=("logits", "target"),
        ),
    },
    models: {
        "BinaryResNet": sizes(convolutions_per_stage=2, width=4),
        "CifarResNet": sizes(blocks_per_stage=1, width=4),
        "ConvNet3": sizes(image_size=16, width=4),
        "binary_resnet20": sizes(width=4),
        "build_model": sizes(name="convnet3", image_size=16, width=4),
        "convnet3": sizes(image_size=16, width=4),
        "resnet20": sizes(width=4),
    },
    modules: {
        "DatasetDistillation": Row(
            lambda: {
                "model": "convnet3",
                "images_per_class": 1,
                "preset": "dm",
                "settings": None,
                "objective": None,
                "model_args": {"width": 4},
                "iterations_per_epoch": 2,
                "images_every_n_epochs": 1,
                "classes_per_group": None,
                "extractors_path": None,
                "start_from": None,
                "dataset": None,
                "seed": 0,
            },
            draws=True,
            skips_nan={"model_args": "networks are made, and refuse it, when training starts"},
        ),
        "ImageClassifier": Row(
            lambda: {
                "model": "convnet3",
                "num_classes": C,
                "in_channels": 1,
                "image_size": 16,
                "model_args": {"width": 4},
                "mean": (0.5,),
                "std": (0.5,),
                "criterion": None,
                "lr_scheduler_interval": "epoch",
            },
            called,
            lambda: {"images": rand(2, 1, 16, 16)},
            draws=True,
            gives_nan="a network overflows somewhere",
        ),
        "LogitsModule": Row(dict, called, lambda: {"logits": logits()}),
        "ObjectiveComparison": Row(
            lambda: {
                "model": "convnet3",
                "objectives": {"plain": robustness.PGDAT()},
                "attack": robustness.PGDAttack(),
                "test_attacks": {"pgd": robustness.PGDAttack()},
                "num_classes": C,
                "in_channels": 1,
                "image_size": 16,
                "model_args": {"width": 4},
                "mean": (0.5,),
                "std": (0.5,),
                "seed": 0,
            },
            called,
            lambda: {"images": rand(2, 1, 16, 16)},
            draws=True,
            gives_nan="a network overflows somewhere",
        ),
    },
    quantization: {
        "AdaptiveLearningRateScaling": Row(
            lambda: {"rule": "eta", "bits": (8, 4)},
            lambda made, lr, bits: made.learning_rate(lr, bits),
            lambda: {"lr": 0.1, "bits": 4},
        ),
        "BinaryConv1d": Row(
            lambda: {"in_channels": 2, "out_channels": 3, "kernel_size": 3},
            lambda made: 1,
            draws=True,
            leave=("in_channels", "out_channels", "kernel_size"),
        ),
        "BinaryConv2d": Row(
            lambda: {"in_channels": 2, "out_channels": 3, "kernel_size": 3},
            lambda made: 1,
            draws=True,
            leave=("in_channels", "out_channels", "kernel_size"),
        ),
        "BinaryLinear": Row(
            lambda: {"in_features": 2, "out_features": 3},
            lambda made: 1,
            draws=True,
            leave=("in_features", "out_features"),
        ),
        "BitPlan": Row(
            lambda: {"bits": {"a": 8, "b": 4}},
            lambda made, pattern, other: [made.edit(pattern), made.diff(other), str(made)],
            lambda: {"pattern": {"*": 4}, "other": {"a": 8}},
        ),
        "InputQuantizer": Row(
            lambda: {"bits": (8, 4), "init": "percentile"}, called, lambda: {"inputs": rand(2, 30), "num_bits": 4}
        ),
        "LayerSensitivity": Row(
            lambda: {"importance": 0.5, "losses": {8: 0.0, 4: 0.2}, "num_weights": 10, "macs": 10, "error": 0.1},
            lambda made: quantization.allocate_bits(quantization.SensitivityTable("t", {"a": made}), budget=8),
        ),
        "LearningRates": Row(lambda: {"weight": 0.1, "bias": 0.1, "weight_scale": 0.1, "input_scale": 0.1}),
        "MultiPrecisionBatchNorm": Row(
            lambda: {"norm": nn.BatchNorm2d(3), "bits": (8, 4), "follows": None, "previous": None},
            called,
            lambda: {"inputs": rand(2, 3, 5, 5)},
        ),
        "ProgressiveSelfDistillation": Row(
            lambda: {"num_samples": 4, "num_classes": 2, "num_epochs": 2, "alpha": 0.5},
            lambda made, ids, logits, labels, epoch: [
                made.remember(ids, logits),
                made.next_epoch(),
                made.soft_targets(ids, labels, epoch=epoch),
            ],
            lambda: {"ids": torch.tensor([2, 1]), "logits": randn(2, 2), "labels": torch.tensor([1, 0]), "epoch": 1},
            skips_nan={"logits": "count as not seen"},
        ),
        "ResidualQuantizer": Row(
            lambda: {"init": "percentile", "to_output": False}, called, lambda: {"inputs": rand(2, 30)}
        ),
        "SensitivityTable": Row(
            lambda: {"method": "hand", "layers": dict(table().layers), "details": {}},
            lambda made: [made.order(), made.bits, str(made)],
            skips_nan={"details": "is any JSON, which the table does not read"},
        ),
        "active_plan": Row(lambda: {"model": converted()}),
        "adaquant_": Row(
            lambda: {
                "model": converted((8, 4, 32)),
                "batches": batch(),
                "plan": 4,
                "mode": "parallel",
                "num_steps": 2,
                "batch_size": 4,
                "learning_rates": None,
                "seed": 0,
                "memory_limit": 10**9,
                "reference": None,
                "forward": None,
                "progress": False,
            },
            in_place=("model",),
        ),
        "allocate_bits": Row(
            lambda: {
                "table": table(),
                "budget": 7.0,
                "method": "pareto",
                "unit": "average_bits",
                "activation_bits": None,
                "latency": None,
                "groups": (("0", "3"),),
                "pins": {"6": 4},
                "bits": (8, 4),
            }
        ),
        "binary_activation": Row(lambda: {"inputs": randn(4, 3)}),
        "binary_layers": Row(lambda: {"model": binary_net()}, lambda made: list(made)),
        "bisect_bits": Row(
            lambda: {
                "order": ["a", "b"],
                "evaluate": lambda plan: sum(plan.values()) / 16,
                "bits": (8, 4),
                "target": 0.7,
                "ratio": None,
                "baseline": None,
                "start": None,
                "candidates": None,
                "num_samples": 10,
            },
            leave=("evaluate",),
        ),
        "calibrate_scales_": Row(
            lambda: {"model": converted((8, 4, 32)), "batches": batch(), "plan": 4, "forward": None},
            lambda made: 1,
            in_place=("model",),
        ),
        "clamp_scales_": Row(lambda: {"model": converted()}, in_place=("model",)),
        "convert_": Row(
            lambda: {
                "model": conv_net(),
                "bits": (8, 4),
                "include": ("*",),
                "exclude": (),
                "first_last_bits": 8,
                "depthwise_bits": 8,
                "per_channel": True,
                "quantize_inputs": True,
                "input_init": "percentile",
                "scale_grad": "effective",
                "batch_norm": "per_precision",
                "quantize_residual": False,
            },
            lambda made: made(images()),
            in_place=("model",),
        ),
        "convert_binary_": Row(
            lambda: {
                "model": conv_net(),
                "frequency": 20.0,
                "stage": 1,
                "estimator": "periodic",
                "include": ("*",),
                "exclude": (),
                "keep_real": ("first",),
                "seed": 0,
            },
            lambda made: made(images()),
            in_place=("model",),
        ),
        "cost": Row(
            lambda: {"model": converted(), "bits": 4, "example_input": images()},
            lambda made: str(made),
            skips_nan={"example_input": "only its shape counts"},
        ),
        "diverse_plans": Row(
            lambda: {
                "table": table(),
                "budget": 7.0,
                "method": "pareto",
                "unit": "average_bits",
                "activation_bits": None,
                "latency": None,
                "groups": (),
                "pins": {"6": 4},
                "bits": (8, 4),
            }
        ),
        "double_rounding": Row(
            lambda: {
                "weight": randn(3, 4),
                "scale": rand(3) + 0.1,
                "bits": 4,
                "high_bits": 8,
                "scale_grad": "effective",
            }
        ),
        "draw_bits": Row(
            lambda: {
                "layers": {"a": (8, 4), "b": (8,)},
                "bits": 4,
                "sigma": 0.5,
                "sensitive": ("a",),
                "generator": generator(),
                "ties": None,
            },
            skips_nan={"sensitive": "is no name of a layer"},
        ),
        "evaluate_plan": Row(
            lambda: {"model": converted(), "plan": 4, "batches": batch(), "loss_fn": F.cross_entropy, "batch_fn": None}
        ),
        "fake_quantize": Row(lambda: {"inputs": randn(3, 4), "scale": torch.tensor(0.1), "bits": 4, "signed": True}),
        "inverted": Row(lambda: {"table": table()}),
        "load_binary": Row(
            lambda: {"path": binary_file(), "module": conv_net()}, lambda made: made(images()), in_place=("module",)
        ),
        "load_binary_checkpoint": Row(
            lambda: {"model": conv_net(), "checkpoint": binary_net().state_dict()},
            lambda made: made.eval()(images()),
            in_place=("model",),
            also_raises=(RuntimeError,),
        ),
        "load_converted": Row(
            lambda: {"model": conv_net(), "checkpoint": converted().state_dict()},
            lambda made: made.eval()(images()),
            in_place=("model",),
            also_raises=(RuntimeError,),
        ),
        "load_latency": Row(lambda: {"path": latency_file()}),
        "load_packed": Row(
            lambda: {"path": packed_file(), "module": conv_net()}, lambda made: made(images()), in_place=("module",)
        ),
        "normalize_samples": Row(lambda: {"inputs": randn(4, 3), "eps": 1e-5}),
        "pareto_frontier": Row(
            lambda: {
                "table": table(),
                "unit": "average_bits",
                "activation_bits": None,
                "latency": None,
                "groups": (),
                "pins": {"6": 4},
                "bits": (8, 4),
                "resolution": None,
            },
            lambda made, budget: [made.points, made.plan(budget)],
            lambda: {"budget": 7.0},
        ),
        "periodic_binary": Row(lambda: {"weight": randn(4, 3), "frequency": 20.0, "stage": 2}),
        "periodic_regularizer": Row(lambda: {"weight": randn(4, 3), "frequency": 20.0, "sign": 1}),
        "plan_cost": Row(
            lambda: {
                "table": table(),
                "plan": {"0": 8, "3": 4, "6": 8},
                "unit": "average_bits",
                "activation_bits": None,
                "latency": None,
            }
        ),
        "plan_within_accuracy": Row(
            lambda: {
                "model": converted((8, 4, 32)),
                "table": table(),
                "batches": batch(),
                "ratio": 0.9,
                "evaluation": None,
                "forward": None,
            },
            in_place=("model",),
        ),
        "post_training_quantize": Row(
            lambda: {
                "model": converted((8, 4, 32)).eval(),
                "batches": batch(),
                "plan": 4,
                "budget": None,
                "unit": "average_bits",
                "pipeline": "light",
                "mode": "sequential",
                "num_steps": 2,
                "batch_size": 4,
                "learning_rates": None,
                "seed": 0,
                "memory_limit": 10**9,
                "evaluation": None,
                "loss_fn": None,
                "forward": None,
                "progress": False,
            },
            in_place=("model",),
        ),
        "predicted_loss": Row(lambda: {"table": table(), "plan": {"0": 8, "3": 4, "6": 8}}),
        "quantization_error": Row(lambda: {"weight": randn(4, 3), "frequency": 20.0}),
        "quantize_codes": Row(lambda: {"weight": randn(3, 4), "scale": rand(3) + 0.1, "bits": 4, "high_bits": 8}),
        "quantized_layers": Row(lambda: {"model": converted()}, lambda made: list(made)),
        "reestimate_batch_norms_": Row(
            lambda: {"model": conv_net().eval(), "batches": batch(), "forward": None},
            lambda made: made(images()),
            in_place=("model",),
        ),
        "restore_": Row(lambda: {"model": converted()}, lambda made: made(images()), in_place=("model",)),
        "restore_binary_": Row(lambda: {"model": binary_net()}, lambda made: made(images()), in_place=("model",)),
        "save_binary": Row(lambda: {"model": binary_net(), "path": folder() / "net"}, lambda made: 1),
        "save_latency": Row(lambda: {"path": folder() / "latency", "latency": {"a": {8: 1.0}}}, lambda made: 1),
        "save_packed": Row(lambda: {"model": converted(), "path": folder() / "net", "plan": None}, lambda made: 1),
        "score_layers": Row(
            lambda: {
                "model": conv_net(),
                "method": "hawq-v2",
                "batches": batch(),
                "bits": (8, 4),
                "loss_fn": F.cross_entropy,
                "batch_fn": None,
                "seed": 0,
                "num_probes": 2,
                "tolerance": 0.5,
                "kappa": 1.0,
                "estimator": "hvp",
                "measure": "loss",
                "blocks": None,
                "centered": False,
                "two_sided": True,
                "include": ("*",),
                "exclude": (),
                "first_last_bits": 8,
                "depthwise_bits": 8,
                "per_channel": True,
                "quantize_inputs": True,
            },
            lambda made: [layer.importance for layer in made.layers.values()],
        ),
        "search_plans": Row(
            lambda: {
                "model": converted(batch_norm="transitional", first_last_bits=4),
                "table": table(),
                "batches": batch(),
                "budgets": (7.0,),
                "unit": "average_bits",
                "num_candidates": 2,
                "reestimate_on": None,
                "loss_fn": None,
                "batch_fn": None,
            },
            lambda made: made.best(7.0).cost,
        ),
        "sensitive_layers": Row(lambda: {"importance": {"a": 0.5, "b": 0.1, "c": 0.2}}),
        "set_frequency_": Row(
            lambda: {"model": binary_net(), "frequency": 10.0}, lambda made: made(images()), in_place=("model",)
        ),
        "set_stage_": Row(
            lambda: {"model": binary_net(), "stage": 1}, lambda made: made(images()), in_place=("model",)
        ),
        "sign_ste": Row(lambda: {"weight": randn(4, 3)}),
        "switch_": Row(lambda: {"model": converted(), "bits": 4}, lambda made: made(images()), in_place=("model",)),
        "switch_codes": Row(
            lambda: {"codes": torch.tensor([-128, -24, 8, 127], dtype=torch.int8), "high_bits": 8, "bits": 4}
        ),
        "tied_layers": Row(lambda: {"model": converted()}),
        "to_deploy": Row(lambda: {"model": converted(), "bits": 4}, lambda made: made(images())),
        "to_deploy_binary": Row(lambda: {"model": binary_net()}, lambda made: made(images())),
        "tune_biases_": Row(
            lambda: {
                "model": net(),
                "batches": [images()],
                "reference_logits": randn(6, C),
                "num_steps": 2,
                "batch_size": 4,
                "learning_rate": 0.1,
                "seed": 0,
                "forward": None,
            },
            in_place=("model",),
        ),
        "weigh_perturbations": Row(
            lambda: {
                "model": converted(batch_norm="transitional"),
                "importance": dict.fromkeys(quantization.quantized_layers(converted()), 1.0),
            }
        ),
    },
    report: {},
    logging: {},
    robustness: {
        "APGDAttack": attack_class(loss="ce", num_steps=3, num_restarts=1, num_targets=2),
        "AccuracyDisparity": metric(OUTCOMES, num_classes=C, mode="range", require_clean=True),
        "AdversarialPowerLaw": metric(
            lambda: {"pred_clean": labels(), "pred_adv": torch.stack([labels(), labels().roll(1)]), "target": labels()},
            eps_grid=(0.1, 0.2),
            error_range=(0.1, 1.0),
        ),
        "AttackSuccessRate": metric(OUTCOMES, num_classes=C, average="micro"),
        "AutoAttack": attack_class(version="quick", num_steps=3, num_queries=5),
        "BalancedRobustAccuracy": metric(OUTCOMES, num_classes=C, require_clean=True),
        "BalancedSoftmax": counted(),
        "BalancedSoftmaxLoss": loss_module(lambda: {"weight": rand(C)}, counts=(30, 20, 10), normalise="batch_size"),
        "BlockDataset": Row(
            lambda: {
                "base": TensorDataset(rand(4, 1, 8, 8), labels(4)),
                "null": "box",
                "position": "random",
                "seed": 0,
            },
            lambda made: made[1][0],
        ),
        "BoundaryTilting": metric(
            lambda: {"inputs": randn(N, 4), "logits": logits(), "jacobian": randn(N, C, 4), "target": labels()},
            num_classes=C,
            num_features=4,
            reduction="mean",
            gives_nan="classes with one mean or without gradients have no angle",
        ),
        "CDT": counted(gamma=0.3),
        "CDTLoss": loss_module(lambda: {"weight": rand(C)}, counts=(30, 20, 10), gamma=0.3, normalise="batch_size"),
        "ClassBalanced": counted(beta=0.99, focal_gamma=0.5, start=0.0),
        "CosineClassifier": Row(
            lambda: {"in_features": 4, "out_features": C, "gamma": 0.1},
            called,
            lambda: {"input": randn(5, 4)},
            draws=True,
        ),
        "DeferredSchedule": Row(lambda: {"weights": rand(C), "start": 2}, called, lambda: {"epoch": 3}),
        "FABAttack": attack_class(num_steps=3, num_targets=2),
        "FGSMAttack": attack_class(),
        "FocalLoss": loss_module(lambda: {"weight": rand(C)}, gamma=2.0, normalise="batch_size"),
        "GradientMaskingCheck": Row(
            lambda: {
                "tolerance": 0.02,
                "max_restart_gain": 0.05,
                "max_large_eps_accuracy": 0.01,
                "max_zero_gradients": 0.01,
            },
            with_keywords,
            lambda: {
                "fgsm": 0.5,
                "pgd": 0.4,
                "pgd_restarts": 0.4,
                "targeted": 0.4,
                "black_box": 0.5,
                "by_eps": {0.1: 0.4, 0.5: 0.0},
                "by_steps": {10: 0.4, 20: 0.4},
                "zero_gradients": 0.0,
            },
        ),
        "LDAM": counted(max_margin=0.5, scale=1.0, beta=0.99, start=0.8),
        "LDAMLoss": loss_module(
            lambda: {"weight": rand(C)}, counts=(30, 20, 10), max_margin=0.5, scale=3.0, normalise="batch_size"
        ),
        "LogitAdjustedLoss": loss_module(
            lambda: {"weight": rand(C)}, counts=(30, 20, 10), tau=1.0, normalise="batch_size"
        ),
        "LogitAdjustment": counted(tau=1.0),
        "LogitMargin": metric(lambda: {"logits": logits()}, max_margin=5.0, num_bins=16, rank=2),
        "LowEntropyLoss": loss_module(penalty=0.1),
        "MART": objective(beta=5.0),
        "MinimalPerturbation": metric(lambda: {"eps_hat": rand(N)}, max_eps=1.0, num_bins=8),
        "PGDAT": objective(("clean",)),
        "PGDAttack": attack_class(step_size=0.05, num_steps=2, num_restarts=1, random_start=True, loss="ce"),
        "PerturbationNorm": metric(lambda: {"x": images(), "x_adv": images().flip(0)}, p=2, eps=5.0, tol=1e-6),
        "PerturbationSet": Row(
            lambda: {"inputs": images(), "eps": 0.1, "norm": "linf", "bounds": (0.0, 1.0), "luminance_only": False},
            lambda made: [made.draw(generator()).shape, made.project(made.inputs + 0.3)],
        ),
        "REAT": counted(variant="official", weight=1.0, tail_share=0.34, features_from=None),
        "RoBal": Row(
            lambda: {
                "scale": 10.0,
                "margin": 0.1,
                "margin_tau": 0.0,
                "prior_tau": 1.2,
                "kl_weight": 6.0,
                "posthoc_tau": 0.1,
                "counts": (30, 20, 10),
            },
            lambda made, **a: made(robal_net(), *a.values()),
            TRAINING,
        ),
        "RobustAccuracy": metric(OUTCOMES, num_classes=C, average="micro", require_clean=True),
        "RobustErrorDecomposition": metric(OUTCOMES, num_classes=C, average="micro"),
        "SRAT": counted(
            base="ce",
            separation=0.3,
            temperature=0.1,
            normalize=True,
            features_from=None,
            beta=0.99,
            start=0.8,
            ramp=0.15,
            focal_gamma=1.0,
            max_margin=0.5,
        ),
        "SquareAttack": attack_class(num_queries=5),
        "TAET": objective(("adversarial",), switch=0.4, first_stage="clean", present_only=False),
        "TRADES": objective(beta=6.0, detach_target=False),
        "TailRobustAccuracy": metric(
            OUTCOMES, num_classes=C, groups={"head": (0,), "tail": (1, 2)}, require_clean=True, gives_nan=NO_SAMPLES
        ),
        "WeightedCrossEntropy": loss_module(lambda: {"weight": rand(C)}, normalise="batch_size"),
        "WorstClassRobustAccuracy": metric(OUTCOMES, num_classes=C, require_clean=True),
        "accuracy_disparity": Row(lambda: {"class_accuracies": rand(2)}),
        "adjust_logits": Row(lambda: {"logits": logits(), "counts": (30, 20, 10), "tau": 1.0}),
        "adversarial_strength": Row(
            lambda: {"weight": randn(4), "bias": 0.5, "positive_mean": randn(4), "negative_mean": randn(4, seed=1)}
        ),
        "apgd": attack(loss="ce", num_steps=3, num_restarts=1, num_targets=2, num_samples=1, luminance_only=False),
        "attack_copy": Row(
            lambda: {"model": conv_net().eval(), "dtype": None, "channels_last": True, "example": images()},
            lambda made: made(images()),
            skips_nan={"example": "it only tells whether folding changed the net, and a warning follows"},
        ),
        "auto_attack": attack(version="quick", num_steps=3, num_queries=5, luminance_only=False, sanity_checks=False),
        "auto_attack_dataset": Row(
            lambda: {
                "logits_fn": net(),
                "data": (images(), labels(6)),
                "eps": 0.1,
                "norm": "linf",
                "version": "quick",
                "num_steps": 3,
                "num_queries": 5,
                "bounds": (0.0, 1.0),
                "luminance_only": False,
                "seed": 0,
                "batch_size": 4,
                "batch_fn": None,
                "device": None,
                "state_path": None,
                "progress": False,
            }
        ),
        "balanced_softmax_loss": weighted(counts=(30, 20, 10)),
        "cdt_loss": weighted(counts=(30, 20, 10), gamma=0.3),
        "class_budgets": Row(lambda: {"counts": (30, 20, 10), "alpha": 0.3}),
        "concat_pair": Row(
            lambda: {
                "base_simple": (rand(4, 1, 8, 8), labels(4) % 2),
                "base_complex": (rand(4, 3, 12, 12), labels(4) % 2),
                "generator": generator(),
            }
        ),
        "deviation_angle": Row(
            lambda: {"weight": randn(4), "positive_mean": randn(4), "negative_mean": randn(4, seed=1)},
            gives_nan="a weight or difference of 0 has no direction",
        ),
        "diff_roar": Row(
            lambda: {
                "train": (randn(12, 4), labels(12)),
                "test": (randn(12, 4), labels(12)),
                "attribution": torch.ones_like,
                "shares": (0.25, 0.5),
                "make_model": None,
                "fit": lambda model, inputs, targets: None,
                "fill": 0.0,
                "num_repeats": 1,
                "generator": generator(),
            },
            lambda made: made.difference,
        ),
        "dlr_loss": Row(lambda: {"logits": logits(), "targets": labels()}),
        "effective_number_weights": Row(lambda: {"counts": (30, 20, 10), "beta": 0.99, "rescale": "mean"}),
        "extreme_simplicity": Row(
            lambda: {
                "logits_fn": lambda x: x[:, :3],
                "inputs": randn(N, 4),
                "targets": labels() % 2,
                "coordinates": [0],
                "rotation": None,
                "batch_size": 8,
                "generator": generator(),
            },
            leave=("logits_fn",),
            gives_nan="one class has no ranking",
        ),
        "fab": attack(num_targets=2, num_steps=3, num_restarts=1, luminance_only=False),
        "fgsm": Row(
            lambda: (
                ATTACK()
                | {
                    "eps": 0.1,
                    "norm": "linf",
                    "loss": "ce",
                    "target_classes": None,
                    "bounds": (0.0, 1.0),
                    "luminance_only": False,
                }
            )
        ),
        "fgsm_rs": attack(step_size=0.1, luminance_only=False),
        "fit_power_law": Row(
            lambda: {"eps": [0.01, 0.02, 0.04], "error": [0.02, 0.04, 0.08], "error_range": (0.003, 0.3)},
            gives_nan="fewer than two points in the range have no slope",
        ),
        "focal_loss": weighted(gamma=2.0),
        "gap_of_disparity": Row(lambda: {"adversarial": rand(2), "standard": rand(2, seed=1)}),
        "gap_of_standard_accuracy": Row(lambda: {"adversarial": rand(2), "standard": rand(2, seed=1), "ratio": 3.0}),
        "gaussian_class_errors": Row(
            lambda: {
                "weight": randn(3),
                "bias": 0.5,
                "mean": randn(3),
                "covariance": torch.eye(3),
                "eps": 0.1,
                "p": float("inf"),
            }
        ),
        "gradient_leakage": Row(
            lambda: {
                "gradients": randn(4, 6),
                "null_mask": torch.arange(6).expand(4, 6) > 2,
                "share": 0.5,
                "generator": generator(),
            },
            gives_nan="a gradient of 0 has no shares",
        ),
        "groups_by_count": Row(lambda: {"counts": (300, 50, 10), "few": 20, "many": 100}),
        "halves_by_count": Row(lambda: {"counts": (300, 50, 10)}),
        "input_gradients": Row(
            lambda: ATTACK() | {"of": "logit"}, skips_nan={"inputs": "the gradient of a ReLU at NaN is 0"}
        ),
        "inverse_frequency_weights": Row(lambda: {"counts": (30, 20, 10), "power": 1.0, "rescale": "mean"}),
        "kl_loss": Row(lambda: {"logits": logits(), "reference_logits": logits(seed=1)}),
        "ldam_loss": weighted(margins=torch.tensor([0.1, 0.2, 0.3]), scale=3.0),
        "ldam_margins": Row(lambda: {"counts": (30, 20, 10), "max_margin": 0.5}),
        "level_set_traversal": Row(
            lambda: {
                "logits_fn": net(),
                "source": images(2),
                "target": images(2).flip(0),
                "classes": None,
                "num_steps": 3,
                "step_size": 0.05,
                "threshold": 0.05,
                "counter_step": 0.01,
                "jitter": 0.01,
                "bounds": (0.0, 1.0),
                "generator": generator(),
            }
        ),
        "linearised_minimal_eps": Row(lambda: {"logits": logits(), "jacobian": randn(N, C, 4), "p": float("inf")}),
        "lms_dataset": Row(
            lambda: {
                "k": 3,
                "num_samples": 20,
                "dim": 4,
                "width": 1.0,
                "margin": 0.1,
                "noise": 0.1,
                "rotate": True,
                "generator": generator(),
            }
        ),
        "logit_adjusted_loss": weighted(counts=(30, 20, 10), tau=1.0),
        "low_entropy_loss": class_loss(penalty=0.1, reduction="mean"),
        "margin_loss": Row(lambda: {"logits": logits(), "targets": labels()}),
        "pgd": attack(
            step_size=0.05,
            num_steps=2,
            loss="ce",
            target_classes=None,
            reference_logits=None,
            random_start=True,
            start="uniform",
            num_restarts=1,
            batched_restarts=False,
            luminance_only=False,
        ),
        "robust_optimal_classifier": Row(
            lambda: {"mean": rand(3) + 1, "covariance": torch.eye(3), "eps": 0.1, "ratio": 2.0, "p": float("inf")}
        ),
        "separation_loss": Row(
            lambda: {"features": randn(N, 4), "targets": labels(), "temperature": 0.1, "normalize": True}
        ),
        "slab_dataset": Row(
            lambda: {
                "num_slabs": (1, 3),
                "num_samples": 20,
                "width": 1.0,
                "margin": 0.1,
                "noise": 0.1,
                "rotate": True,
                "generator": generator(),
            }
        ),
        "square": attack(num_queries=5, initial_share=0.5, shared_windows=True, luminance_only=False),
        "stable_class_errors": Row(
            lambda: {
                "weight": randn(3),
                "bias": 0.5,
                "mean": randn(3),
                "alpha": 1.0,
                "scale": 1.0,
                "eps": 0.1,
                "p": float("inf"),
            }
        ),
        "targeted_dlr_loss": Row(
            lambda: {
                "logits": torch.cat([logits(), randn(N, 2)], 1),
                "targets": labels(),
                "target_classes": labels() + 1,
            }
        ),
        "tilting_type": Row(
            lambda: {"angle": 90 * rand(5), "error": rand(5), "weak": 30.0, "strong": 75.0, "max_error": 0.25},
            skips_nan={"angle": "is type -1", "error": "is type -1"},
        ),
        "triangle_confidences": Row(
            lambda: {
                "logits_fn": net(),
                "source": images(2),
                "first": images(2).flip(0),
                "second": 1 - images(2),
                "classes": None,
                "num_points": 3,
            }
        ),
        "unmask": Row(
            lambda: {
                "inputs": randn(3, 6),
                "ranking": randn(3, 6, seed=1),
                "share": 0.5,
                "keep": "top",
                "fill": 0.0,
                "generator": generator(),
            }
        ),
        "weighted_cross_entropy": weighted(),
    },
}

MADE = "a record of results that other functions return; nobody has to make one"
ABSTRACT = "abstract: its subclasses have rows"
TYPE = "a type alias"
NOT_FUZZED: dict[ModuleType, dict[str, str]] = {
    batches: {"BatchFn": TYPE, "LogitsFn": TYPE},
    calibration: {
        "BrierDecomposition": MADE,
        "Calibrator": ABSTRACT,
        "Estimate": MADE,
        "HeadCalibration": MADE,
        "MixedCollapse": MADE,
        "MonotoneMap": ABSTRACT,
        "NeuralCollapse": MADE,
        "NllDecomposition": MADE,
        "ReliabilityBins": MADE,
    },
    callbacks: {},
    data: {
        "CIFAR10DataModule": "its arguments are those of DigitsDataModule, and its files are not here",
        "CIFAR100DataModule": "its arguments are those of DigitsDataModule, and its files are not here",
        "FashionMNISTDataModule": "its arguments are those of DigitsDataModule, and its files need not be here",
        "ImageDataModule": ABSTRACT,
        "ResumableLoader": "a torch DataLoader with a state; torch checks its arguments",
        "SeededSampler": "a torch DistributedSampler; torch checks its arguments",
        "TargetTransform": ABSTRACT,
    },
    distillation: {
        "NetAccuracies": MADE,
        "Objective": ABSTRACT,
        "ObjectiveDraw": MADE,
        "ObjectiveLoss": MADE,
        "PRESETS": "a constant",
        "PROTOCOLS": "a constant",
        "SetEvaluation": MADE,
        "TrainedNets": MADE,
    },
    hessian: {"Estimate": MADE},
    logging: {name: "needs a Trainer with loggers; tests/test_logging.py tries them" for name in logging.__all__},
    losses: {"Normalise": TYPE, "Reduction": TYPE},
    mixing: {"BatchMixing": ABSTRACT, "LabelLambda": TYPE},
    quantization: {
        "BisectionResult": MADE,
        "Cost": MADE,
        "EvaluatedPlan": MADE,
        "Frontier": MADE,
        "PlanSearch": MADE,
        "PostTrainingReport": MADE,
        "QuantConv1d": "convert_ makes it from torch's layer by changing its class",
        "QuantConv2d": "convert_ makes it from torch's layer by changing its class",
        "QuantLinear": "convert_ makes it from torch's layer by changing its class",
        "StageResult": MADE,
        "export_binary_onnx": "takes seconds a call; tests/quantization/test_binary.py tries wrong arguments",
        "export_onnx": "takes seconds a call; tests/quantization/test_onnx.py tries wrong arguments",
    },
    report: {"write_report": "reads a folder; tests/test_damaged_files.py damages it"},
    robustness: {
        "Attack": ABSTRACT,
        "AttackResult": MADE,
        "AutoAttackResult": MADE,
        "AutoAttackSummary": MADE,
        "ConcatPair": MADE,
        "DiffROAR": MADE,
        "FeatureScores": MADE,
        "FeatureUse": MADE,
        "LevelSetPath": MADE,
        "MaskingVerdict": MADE,
        "Objective": ABSTRACT,
        "PowerLaw": MADE,
        "RobustClassifier": MADE,
        "SlabData": MADE,
        "TriangleConfidences": MADE,
    },
}


OPEN: dict[str, tuple[str, ...]] = {}
"""Arguments of which some wrong values still end in an error from deep inside, or are taken."""


@seeded
def robal_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), robustness.CosineClassifier(8, C))


def rows() -> dict[str, Row]:
    """All rows, by ``module.name``."""
    return {
        f"{module.__name__.removeprefix('lightning_plugins.')}.{name}": row
        for module, named in ROWS.items()
        for name, row in named.items()
    }


def thing_named(full: str) -> Callable[..., Any]:
    """The public thing that a row calls."""
    where, _, name = full.rpartition(".")
    module = next(module for module in ROWS if module.__name__ == f"lightning_plugins.{where}")
    thing: Callable[..., Any] = getattr(module, name)
    return thing
