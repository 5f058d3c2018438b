"""States of a net: each precision calibrated, attacked and deployed, beside a plain twin; the recipe `edge`."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_plugins.calibration import TemperatureScaling, ece
from lightning_plugins.callbacks import (
    DeploymentCheck,
    MultiPrecisionQAT,
    PlainTwin,
    PostHocCalibration,
    RobustnessEvaluation,
    VariantComparison,
)
from lightning_plugins.cli import main
from lightning_plugins.quantization import switch_
from lightning_plugins.robustness import PGDAttack
from lightning_plugins.variants import variants_figure
from toys import TinyImages, TinyModule, assert_same_weights, make_trainer

BITS = (8, 4, 2)
STATES = ("8bit", "4bit", "2bit")

pytestmark = pytest.mark.filterwarnings("ignore:.*temperature stopped at its bound")


def qat() -> MultiPrecisionQAT:
    return MultiPrecisionQAT(BITS, first_last_bits=2, evaluate=False)


def logits_at(module: pl.LightningModule, bits: int, loader: Any) -> tuple[Tensor, Tensor]:
    """What the net says at one precision, by hand."""
    net = switch_(deepcopy(module), bits).eval()
    with torch.no_grad():
        pairs = [(net(inputs), labels) for inputs, labels in loader]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def state_of(bits: int) -> str:
    return f"{bits}bit"


# Calibration


@pytest.mark.parametrize("when", ["validation", "fit_end"])
def test_each_precision_has_the_temperature_of_its_own_logits(tmp_path, when):
    module, calibration = TinyModule(), PostHocCalibration(when=when)
    trainer = make_trainer(tmp_path, 2, qat(), calibration)
    trainer.fit(module)
    assert tuple(calibration.calibrators) == STATES
    found = {}
    for bits in BITS:
        by_hand = TemperatureScaling().fit(*logits_at(module, bits, module.val_dataloader())).quantities()
        found[bits] = calibration.calibrators[state_of(bits)].quantities()
        assert found[bits] == pytest.approx(by_hand)
    assert found[8] != pytest.approx(found[2])
    assert calibration.calibrator.quantities() == pytest.approx(found[8])  # at rest it is at its highest precision


def test_the_test_measures_each_precision_before_and_after(tmp_path):
    module, calibration = TinyModule(), PostHocCalibration()
    trainer = make_trainer(tmp_path, 2, qat(), calibration)
    trainer.fit(module)
    metrics = trainer.test(module, verbose=False)[0]
    for bits in BITS:
        logits, labels = logits_at(module, bits, module.test_dataloader())
        after = calibration.calibrators[state_of(bits)](logits)
        assert metrics[f"test/ece_before_{bits}bit"] == pytest.approx(float(ece(logits, labels, input="logits")))
        assert metrics[f"test/ece_after_{bits}bit"] == pytest.approx(float(ece(after, labels, input="log_probs")))
        nll = torch.nn.functional.nll_loss(after, labels)
        assert metrics[f"test/nll_after_{bits}bit"] == pytest.approx(float(nll))
    assert "forward" not in vars(module)


def test_forward_is_calibrated_for_the_precision_at_which_somebody_has_the_net(tmp_path):
    class Reads(pl.Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            owner = trainer.callbacks[0]
            self.seen = {}
            for name in owner.variant_names():
                with owner.variant(pl_module, name) as net:
                    self.seen[name] = net(batch[0]), batch[0]
            assert owner.active_variant is None

    module, calibration, reads = TinyModule(), PostHocCalibration(), Reads()
    trainer = make_trainer(tmp_path, 1, qat(), calibration, reads)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    for bits in BITS:
        seen, inputs = (tensor.clone() for tensor in reads.seen[state_of(bits)])
        raw = switch_(deepcopy(module), bits).eval()(inputs).detach()
        torch.testing.assert_close(seen, calibration.calibrators[state_of(bits)](raw))
        torch.testing.assert_close(calibration.calibrated_module(state_of(bits))(inputs).detach(), seen)


def test_calibrators_survive_a_checkpoint(tmp_path):
    module, calibration = TinyModule(), PostHocCalibration()
    trainer = make_trainer(tmp_path, 1, qat(), calibration)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    before = trainer.test(module, verbose=False)[0]
    fresh, loaded = TinyModule(), PostHocCalibration()
    after = make_trainer(tmp_path, 1, qat(), loaded).test(
        fresh, ckpt_path=tmp_path / "model.ckpt", weights_only=True, verbose=False
    )[0]
    assert after == pytest.approx(before)
    for name in STATES:
        assert loaded.calibrators[name].quantities() == calibration.calibrators[name].quantities()
    assert {path.name for path in loaded.export(tmp_path / "exports")} == {
        "calibrator.safetensors",
        "calibration.json",
        *(f"calibrator_{name}.safetensors" for name in STATES),
    }
    info = json.loads((tmp_path / "exports" / "calibration.json").read_text())
    assert info["variants"]["4bit"]["quantities"] == calibration.calibrators["4bit"].quantities()


def test_calibration_of_the_states_can_be_left_out(tmp_path):
    calibration = PostHocCalibration(per_variant=False)
    trainer = make_trainer(tmp_path, 1, qat(), calibration)
    trainer.fit(module := TinyModule())
    assert not calibration.calibrators
    assert not any("bit" in name for name in trainer.test(module, verbose=False)[0])
    with pytest.raises(ValueError, match="one of the calibrated states"):
        calibration.calibrated_module("4bit")


# Robustness


def test_robust_accuracy_at_a_precision_is_that_of_the_switched_net(tmp_path):
    attack = {"pgd": PGDAttack(eps=0.05, num_steps=3)}

    def measure(*callbacks: pl.Callback, module: pl.LightningModule, **arguments: Any) -> dict[str, float]:
        evaluation = RobustnessEvaluation(False, attack, eps_grid=[], **arguments)
        return make_trainer(tmp_path, 1, *callbacks, evaluation).test(module, verbose=False)[0]

    module = TinyImages()
    make_trainer(tmp_path, 2, qat()).fit(module)
    metrics = measure(qat(), module=module, per_variant=True)
    values = set()
    for bits in BITS:
        by_hand = measure(module=switch_(deepcopy(module), bits))
        for name in ("clean_acc", "robust_acc", "robust_acc_balanced", "robust_acc_worst", "robust_acc_pgd"):
            assert metrics[f"test/{name}_{bits}bit"] == by_hand[f"test/{name}"]
        values.add(by_hand["test/robust_acc_balanced"])
    assert len(values) > 1
    assert not any("bit" in name for name in measure(qat(), module=module))


# The plain twin


def test_the_twin_is_what_a_run_without_callbacks_gives(tmp_path):
    plain, module, alone, twin = TinyImages(), TinyImages(), TinyImages(), PlainTwin()
    make_trainer(tmp_path, 2).fit(plain)
    make_trainer(tmp_path, 2, qat()).fit(alone)
    trainer = make_trainer(tmp_path, 2, twin, qat())
    trainer.fit(module)
    with twin.variant(module, "fp32") as net:
        assert_same_weights(plain, net)
    assert_same_weights(alone, module)  # nor does the net of the run notice the twin
    assert twin.variant_bytes(module, "fp32") == sum(v.nbytes for v in plain.state_dict().values())


def test_a_resumed_run_does_not_train_the_twin_again(tmp_path, monkeypatch):
    first = PlainTwin()
    trainer = make_trainer(tmp_path, 2, first, qat())
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trained = []
    monkeypatch.setattr(PlainTwin, "_train", lambda self, trainer: trained.append(trainer.max_epochs))
    twin = PlainTwin()
    make_trainer(tmp_path, 2, twin, qat()).fit(TinyModule(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert not trained
    torch.testing.assert_close(twin.state_dict(), first.state_dict(), rtol=0, atol=0)
    make_trainer(tmp_path, 3, PlainTwin(), qat()).fit(TinyModule(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trained == [3]  # a twin of fewer epochs would be no fair comparison


def test_the_twin_says_where_it_must_stand_and_what_it_needs(tmp_path):
    with pytest.raises(MisconfigurationException, match="must stand before MultiPrecisionQAT"):
        make_trainer(tmp_path, 1, qat(), PlainTwin()).fit(TinyModule())
    with pytest.raises(ValueError, match="without a slash"):
        PlainTwin("a/b")

    class NoData(TinyModule):
        train_dataloader = pl.LightningModule.train_dataloader

    with pytest.raises(MisconfigurationException, match="give the module a train_dataloader"):
        make_trainer(tmp_path, 1, PlainTwin()).fit(NoData(), TinyModule().train_dataloader())
    with pytest.warns(UserWarning, match="no trained net"):
        make_trainer(tmp_path, 1, PlainTwin()).test(TinyModule(), verbose=False)


# Table and files


def test_the_comparison_reads_what_was_measured(tmp_path):
    comparison, calibration = VariantComparison(["ece_after", "absent"]), PostHocCalibration()
    trainer = make_trainer(tmp_path, 1, PlainTwin(), qat(), calibration, comparison, logger=CSVLogger(tmp_path))
    trainer.fit(module := TinyModule())
    metrics = trainer.test(module, verbose=False)[0]
    assert comparison.columns == ["net", "size_kb", "ece_after"]
    assert [row[0] for row in comparison.rows] == ["fp32", *STATES]
    assert [row[2] for row in comparison.rows] == [metrics[f"test/ece_after_{row[0]}"] for row in comparison.rows]
    sizes = [row[1] for row in comparison.rows]
    assert sizes == pytest.approx([metrics[f"test/size_kb_{row[0]}"] for row in comparison.rows])
    assert sizes[1] > sizes[2] > sizes[3]
    assert {path.suffix for path in tmp_path.rglob("media/test/variants*")} == {".csv", ".png"}


def test_the_comparison_says_when_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="a list of names"):
        VariantComparison([])
    with pytest.raises(ValueError, match="pictured must be among"):
        VariantComparison(["ece_after"], pictured=["acc"])
    with pytest.warns(UserWarning, match="add callbacks that measure them"):
        make_trainer(tmp_path, 1, VariantComparison()).test(TinyModule(), verbose=False)
    with pytest.raises(ValueError, match="no quantity was measured"):
        variants_figure({"8bit": {}}, {"8bit": 1.0})


def test_files_agree_with_the_net_and_are_handed_over(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    check, module = DeploymentCheck([4]), TinyImages()
    trainer = make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, first_last_bits=2), PostHocCalibration(), check)
    trainer.fit(module)
    metrics = trainer.test(module, verbose=False)[0]
    assert [metrics[f"test/packed_agreement_{name}"] for name in STATES] == [1, 1, 1]
    assert metrics["test/onnx_agreement_4bit"] >= 0.9
    assert metrics["test/onnx_acc_4bit"] == pytest.approx(metrics["test/acc_4bit"], abs=0.1)
    assert {path.name for path in check.export(tmp_path / "exports")} == {"net_4bit.onnx", "deployment.json"}
    assert "forward" not in vars(module)


def test_what_cannot_be_deployed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no 32 bits"):
        DeploymentCheck([32, 8])
    with pytest.raises(MisconfigurationException, match="add a callback that converts"):
        make_trainer(tmp_path, 1, DeploymentCheck()).fit(TinyModule())
    with pytest.raises(MisconfigurationException, match="among the precisions .* got \\(6,\\)"):
        make_trainer(tmp_path, 1, qat(), DeploymentCheck([6])).test(TinyModule(), verbose=False)


# The recipe


def test_one_epoch_of_the_recipe_fills_the_table(tmp_path, monkeypatch):
    # Its ONNX files are made in tests/test_recipes.py.
    monkeypatch.setattr("lightning_plugins.callbacks.quantization.deployment_check._ONNX", ("absent_package",))
    few = ["--trainer.max_epochs=1", "--trainer.limit_test_batches=1", "--trainer.limit_train_batches=2"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    small = ["--model.init_args.model_args.width=4", "--data.init_args.batch_size=32"]
    with pytest.warns(UserWarning, match="no ONNX files, because absent_package cannot be imported"):
        assert main(["run", "edge", "--root", str(tmp_path), *few, *quiet, *small, "--traceback"]) == 0
    (report,) = tmp_path.rglob("report.html")
    (table,) = report.parent.rglob("media/edge/precisions-*.csv")
    head, *rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[0] for row in rows] == ["fp32", "8bit", "6bit", "4bit", "2bit"]
    assert {"clean_acc", "robust_acc_balanced", "ece_before", "ece_after", "nll_after", "size_kb"} <= set(head)
    for row in rows:
        assert all(0 <= float(cell) < float("inf") for cell in row[1:])
    page = report.read_text()
    assert "robust accuracy balanced (%)" in page
    assert 0 < page.index("<h2>Result</h2>") < page.index("edge / precisions") < page.index("<h2>Pictures</h2>")
    assert (report.parent / "exports" / "packed.safetensors").exists()
