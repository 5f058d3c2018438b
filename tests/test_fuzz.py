"""Wrong arguments of every public name: a documented result or a clear refusal, never a silent wrong number."""

from __future__ import annotations

import re

import fuzz_table
import pytest
import torch
from fuzz_table import MODULES, NOT_FUZZED, OPEN, ROWS, rows
from fuzzing import Change, calls, judge
from hypothesis import HealthCheck, Phase, given, settings

from lightning_plugins.calibration import tcm_loss
from lightning_plugins.checks import check_types

QUICK = [name for name in rows() if not name.startswith(("modules.", "hessian."))]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A text in the place of a path becomes a file."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_fuzzed_or_has_a_reason(module):
    fuzzed, others = set(ROWS.get(module, {})), set(NOT_FUZZED.get(module, {}))
    assert fuzzed.isdisjoint(others)
    assert fuzzed | others == set(module.__all__), "add a row to tests/fuzz_table.py"


def test_what_is_open_is_named_by_a_row():
    known = rows()
    for name, arguments in OPEN.items():
        names = known[name].make().keys() | known[name].also().keys()
        assert set(arguments) <= names, name


def test_wrong_arguments_are_refused_or_answered_rightly():
    defects = []

    @settings(
        max_examples=400, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls(QUICK))
    def try_one(call):
        name, changes = call
        outcome = judge(name, changes)
        is_open = any(change.argument in OPEN.get(name, ()) for change in changes)
        if outcome.kind == "defect" and not is_open:
            defects.append(f"{name}({', '.join(map(str, changes))}): {outcome.text}")

    try_one()
    assert not defects, "\n".join(defects)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("calibration.ece", Change("probs", True, "a list"), "must be a tensor of real numbers, got a list"),
        ("losses.focal_loss", Change("gamma", False, float("nan"), value=True), "gamma of focal_loss must be a number"),
        ("losses.focal_loss", Change("target", False, "uint8"), "use target.long"),
        ("losses.focal_loss", Change("target", False, "ignored"), "drop rows of ignored labels"),
        ("calibration.piecewise_linear", Change("stop", False, -1, value=True), "stop above 0"),
        ("robustness.TRADES", Change("targets", True, "too high"), r"must be classes in \[0, 3\)"),
        ("robustness.margin_loss", Change("targets", False, "too high"), "drop rows of ignored labels"),
        ("robustness.dlr_loss", Change("targets", False, "uint8"), "use target.long"),
        ("robustness.targeted_dlr_loss", Change("target_classes", False, "negative"), "must be classes in"),
        ("robustness.kl_loss", Change("reference_logits", False, "one row"), "of one shape"),
        ("robustness.CosineClassifier", Change("input", True, "complex"), "must be a tensor of real numbers"),
        ("robustness.CosineClassifier", Change("in_features", False, 0, value=True), "in_features must be at least 1"),
        ("robustness.TRADES", Change("clean", True, "fewer rows"), "each clean input with the attacked one"),
        ("robustness.separation_loss", Change("temperature", False, 0, value=True), "temperature must be above 0"),
        ("robustness.gaussian_class_errors", Change("covariance", False, "negative"), "positive definite"),
        ("robustness.robust_optimal_classifier", Change("mean", False, "requires grad"), "detach mean"),
        ("robustness.PGDAttack", Change("inputs", True, "a string"), "must be"),
        ("robustness.pgd", Change("generator", False, "a string"), "must be a torch.Generator or None"),
        ("mixing.mixup", Change("generator", False, "a number"), "must be a torch.Generator or None"),
        ("mixing.mixed_accuracy", Change("targets", False, "one row"), r"targets \(N,\) or soft labels"),
        ("mixing.MixedLabels", Change("shares", False, "a list"), "use torch.as_tensor"),
        ("mixing.ForegroundRecombine", Change("targets", True, "negative"), "correct the data"),
        ("grouped.ClassAccuracy", Change("target", True, "negative"), "drop rows of ignored labels"),
        ("grouped.ClassAccuracy", Change("preds", True, "fewer rows"), r"preds must be \(N, C\) or \(N,\)"),
        ("calibration.opis", Change("embeddings", False, "NaN"), "embeddings must be finite"),
        ("calibration.bootstrap_interval", Change("labels", False, "one column more"), "one row for each sample"),
        ("calibration.h_calibration_loss", Change("labels", False, "too high"), "must be classes in"),
        ("calibration.neural_collapse", Change("bias", False, "NaN"), "weight and bias must be finite"),
        ("calibration.mixed_collapse", Change("first", False, "negative"), "first must lie in"),
        ("calibration.mixed_collapse", Change("weight", False, "one column more"), "weight must be"),
        ("calibration.unconstrained_mixup_feature", Change("weight", False, "one column"), "must point apart"),
        ("modules.ImageClassifier", Change("mean", False, "None in it"), "mean of ImageClassifier must be"),
        ("modules.ObjectiveComparison", Change("seed", False, "a string", value=True), "must be a whole number"),
        ("robustness.attack_copy", Change("channels_last", False, float("nan"), value=True), "must be True or False"),
        ("calibration.FeatureStatistics", Change("labels", True, "halves"), "use labels.long"),
        ("calibration.SplineCalibration", Change("new", True, "one column"), "at least 2 classes"),
        ("data.ImageDataset", Change("targets", False, "one row"), r"must be \(M,\)"),
        ("data.ImageDataset", Change("indices", False, "too high"), "indices must lie in"),
        ("distillation.augment", Change("images", True, "flat"), "images must be floating-point"),
        ("distillation.label_robust_score", Change("ior", False, 7, value=True), "give shares, not percent"),
        ("distillation.train_nets", Change("targets", False, "too high"), "must be classes in"),
        ("distillation.match_trajectory", Change("start", False, "one row"), r"must both be \(P,\)"),
        ("distillation.characteristic_sums", Change("features", False, "one column"), r"frequencies \(K, D\)"),
        ("quantization.normalize_samples", Change("eps", False, -1, value=True), "eps must be at least 0"),
        ("quantization.quantize_codes", Change("scale", False, "a number"), "scale of quantize_codes must be a tensor"),
        ("quantization.ProgressiveSelfDistillation", Change("ids", True, "negative"), "ids must lie in"),
    ],
)
def test_a_refusal_says_what_to_do(name, change, words):
    change = Change(change.argument, change.argument not in rows()[name].make(), change.edit, change.value)
    outcome = judge(name, (change,))
    assert outcome.kind == "refused"
    assert re.search(words, outcome.text), outcome.text


def test_the_judge_sees_what_is_wrong(monkeypatch):
    """The fuzzer must find each kind of defect, or its silence says nothing."""

    def faulty(x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "in place":
            total = x.sum(0)
            x.zero_()
            return total
        if kind == "draws":
            torch.rand(1)
        elif kind == "index":
            raise IndexError("deep inside")
        elif kind == "silent":
            return x.nan_to_num().sum(0)
        return x.sum(0) if kind != "nan" else x.sum(0) * torch.nan

    module = fuzz_table.losses
    monkeypatch.setattr(module, "faulty", faulty, raising=False)
    found = {}
    for kind in ("fine", "in place", "draws", "index", "silent", "nan"):
        row = fuzz_table.Row(lambda kind=kind: {"x": torch.ones(3, 2), "kind": kind}, leave=("kind",))
        monkeypatch.setitem(ROWS[module], "faulty", row)
        monkeypatch.setattr("fuzzing.valid_numbers", lambda full: [torch.full((2,), 3.0)])
        found[kind] = judge("losses.faulty", (Change("x", False, "NaN" if kind == "silent" else "float64"),)).text
    assert found["fine"] == ""
    assert "changed its argument x" in found["in place"]
    assert "global generator" in found["draws"]
    assert "IndexError" in found["index"]
    assert "took NaN" in found["silent"]
    assert "NaN from finite" in found["nan"]


def test_nan_reaches_the_loss_of_threshold_consistency():
    embeddings = torch.eye(4)
    embeddings[0, 0] = torch.nan
    assert tcm_loss(embeddings, torch.arange(4) % 2).isnan()


def test_types_are_checked_by_annotations():
    @check_types
    def function(x: torch.Tensor, sizes: tuple[int, ...] = (), share: float | None = None) -> str:
        return "called"

    assert function(torch.ones(1), (1, 2), 3) == "called"
    assert function(torch.ones(1), share=torch.tensor(0.5)) == "called"
    for wrong, error, words in (
        ({"x": [1.0]}, TypeError, "x of function must be a tensor of real numbers, got a list; use torch.as_tensor"),
        ({"x": torch.ones(1) * 1j}, TypeError, "must be a tensor of real numbers, got a tensor"),
        ({"sizes": (1, 0.5)}, TypeError, "a sequence, each a whole number"),
        ({"share": "0.5"}, TypeError, "share of function must be a number or None, got '0.5'"),
        ({"share": float("nan")}, ValueError, "a number or None, got nan"),
    ):
        with pytest.raises(error, match=words):
            function(**{"x": torch.ones(1)} | wrong)


def test_what_a_constructor_says_itself_goes_first():
    class Thing:
        @check_types
        def __init__(self, count: int) -> None:
            if not count > 0:
                raise ValueError("count must be at least 1; drop it for one")

    with pytest.raises(ValueError, match="drop it for one"):
        Thing(-0.5)
    with pytest.raises(TypeError, match="count of Thing must be a whole number, got 0.5"):
        Thing(0.5)
