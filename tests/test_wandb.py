"""What a run leaves behind with the real Weights & Biases client, offline."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from test_logging import FakeRun, read_wandb_records

from lightning_plugins import runner
from lightning_plugins.cli import main
from lightning_plugins.logging import log_artifact
from test_callbacks import CALLBACKS, Row
from toys import TinyModule, make_trainer

ONE_BATCH = [
    *("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
ONE_EPOCH = [*ONE_BATCH, "--trainer.max_epochs=1"]
NARROW = "--model.init_args.model_args.width=2"

# One recipe of each family, at its smallest. All of them: benchmarks/reliability/wandb_recipes.py.
FAMILIES = {
    "calibration/h_calibration": [NARROW],
    "distillation/dm": [
        *(NARROW, "--model.init_args.iterations_per_epoch=1"),
        *("--trainer.callbacks.init_args.num_nets=1", "--trainer.callbacks.init_args.steps=2"),
    ],
    "quantization/hawq": [
        *(NARROW, "--data.batch_size=16"),
        *("--trainer.callbacks.init_args.num_samples=16", "--trainer.callbacks.init_args.num_probes=2"),
    ],
    "robustness/trades": [NARROW, "--data.batch_size=8", "--trainer.callbacks.init_args.num_val_samples=8"],
}


@dataclass
class Seen:
    """What one ``.wandb`` file holds."""

    file: Path
    identity: str = ""
    group: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, list[tuple[str, list[str], dict[str, Any]]]] = field(default_factory=dict)
    definitions: dict[str, Any] = field(default_factory=dict)

    def keys(self, kind: str) -> set[str]:
        """The names under which media of this kind were logged."""
        ends = "/_type"
        return {k.removesuffix(ends) for row in self.history for k, v in row.items() if k.endswith(ends) and v == kind}


def read_run(folder: Path, patience: float = 20.0) -> Seen:
    """Read the one offline run below a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + patience
    records = read_wandb_records(file)
    while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
        time.sleep(0.05)
        records = read_wandb_records(file)  # finish() may return before the last block is on disk
    seen = Seen(file)
    for record in records:
        for item in [*record.run.config.update, *record.config.update]:
            seen.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.summary.update:
            seen.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("run"):
            seen.identity, seen.group = record.run.run_id, record.run.run_group
        if record.HasField("exit"):
            seen.exit_code = record.exit.exit_code
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            seen.history.append(row)
        if record.HasField("artifact"):
            found = record.artifact
            paths = sorted(entry.path for entry in found.manifest.contents)
            metadata = json.loads(found.metadata) if found.metadata else {}
            seen.artifacts.setdefault(found.type, []).append((found.name, paths, metadata))
        if record.HasField("metric"):
            seen.definitions[record.metric.name] = record.metric
    return seen


def check_run(folder: Path, recipe: str) -> Seen:
    """Hold a run's W&B files against the files that it wrote beside them."""
    seen = read_run(folder)
    results = json.loads((folder / "results.json").read_text())
    assert seen.exit_code == 0

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert seen.config["recipe"] == seen.group == recipe
    assert seen.config["config"]["model"]["class_path"] == config["model"]["class_path"]
    for callback in config["trainer"]["callbacks"] or []:
        package, _, name = callback["class_path"].rpartition(".")
        if package.startswith("lightning_plugins") and callback.get("init_args"):
            assert [key for key in seen.config if key.startswith(f"lightning_plugins/{name}/")], name

    tested = {name: value for name, value in results["metrics"].items() if name.startswith("test/")}
    assert tested
    for name, value in tested.items():
        shown = seen.summary[name]
        assert math.isnan(value) or float(shown) == pytest.approx(value), name

    # The CSV logger keeps the same media as files, named after their keys.
    def keys(suffix: str) -> set[str]:
        media = folder / "media"
        return {str(file.relative_to(media)).rpartition("-step_")[0] for file in media.rglob(f"*{suffix}")}

    assert seen.keys("images/separated") == keys(".png")
    assert seen.keys("table-file") == keys(".csv")
    stored = seen.file.parent / "files" / "media"
    assert {f.relative_to(stored / "images").parts[0] for f in stored.glob("images/**/*.png")} == {
        key.split("/")[0] for key in keys(".png")
    }
    assert len(list(stored.glob("table/**/*.table.json"))) >= len(keys(".csv"))

    exports = sorted(str(Path(path).relative_to("exports")) for path in results["exports"])
    kind = "dataset" if "set.safetensors" in exports else "model"
    assert set(seen.artifacts) - {"run_table"} == ({kind} if exports else set())
    if exports:
        ((_, paths, metadata),) = seen.artifacts[kind]
        assert {next(e for e in exports if path == e or path.startswith(f"{e}/")) for path in paths} == set(exports)
        assert metadata

    for row in seen.history:
        assert "trainer/global_step" in row
    assert [row["_step"] for row in seen.history] == list(range(len(seen.history)))
    steps = [row["trainer/global_step"] for row in seen.history]
    # Lightning gives the values of a step that step's number and we those after it the number of steps done.
    assert all(later >= earlier - 1 for earlier, later in pairwise(steps))
    for key in ("val/acc", "val/robust_acc", "val/distilled_acc"):
        definition = seen.definitions[key]
        assert definition.summary.max
        assert any(key in row for row in seen.history) == (key in seen.summary or f"{key}/max" in seen.summary)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_leaves_everything_in_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, *ONE_EPOCH, *FAMILIES[name], "--logger", "wandb"]) == 0
    (folder,) = Path("runs", name).iterdir()
    seen = check_run(folder, name)
    assert seen.keys("table-file") or seen.keys("images/separated")
    assert wandb.run is None
    if name == "distillation/dm":
        ((artifact, _, metadata),) = seen.artifacts["dataset"]
        assert artifact == "distilled-digits-dm-ipc2"
        assert metadata["images_per_class"] == 2
        assert {"preset", "seed", "data"} <= metadata.keys()


def test_a_resumed_run_goes_on_under_its_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RUN_ID": "mine-1", "RESUME": "allow", "RUN_GROUP": "cluster"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    command = ["run", "quickstart", *ONE_BATCH, NARROW, "--trainer.limit_train_batches=2", "--logger", "wandb"]
    assert main([*command, "--trainer.max_epochs=1"]) == 0
    (first,) = Path("runs/quickstart").iterdir()
    assert main([*command, "--trainer.max_epochs=3", "--resume", str(first)]) == 0
    (second,) = (folder for folder in Path("runs/quickstart").iterdir() if folder != first)
    before, after = read_run(first), read_run(second)
    assert before.identity == after.identity == "mine-1"
    assert before.group == after.group == "cluster"
    losses = [[row["trainer/global_step"] for row in seen.history if "train/loss" in row] for seen in (before, after)]
    assert losses == [[0, 1], [2, 3, 4, 5]]
    assert all(row["trainer/global_step"] >= 2 for row in after.history)


def test_a_run_that_fails_is_closed_as_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(runner, "write_report", fail)
    assert main(["run", "quickstart", *ONE_EPOCH, NARROW, "--logger", "wandb"]) == 1
    assert wandb.run is None  # or the next run of this process would go on in it
    (folder,) = Path("runs/quickstart").iterdir()
    assert read_run(folder).exit_code == 1


def test_metadata_that_wandb_would_refuse(tmp_path):
    run = FakeRun()
    trainer = pl.Trainer(logger=WandbLogger(experiment=run), enable_checkpointing=False)
    (tmp_path / "set").write_text("images")
    metadata = {"loss": math.inf, "nested": {"values": [math.nan, 1.5]}}
    log_artifact(trainer, tmp_path / "set", name="set", type="dataset", metadata=metadata)
    assert run.artifacts[0].metadata == {"loss": "inf", "nested": {"values": ["nan", 1.5]}}
    for logger in (trainer.logger, False):
        trainer = pl.Trainer(logger=logger, enable_checkpointing=False)
        with pytest.raises(ValueError, match="takes 100 entries of metadata, got 101; group them"):
            log_artifact(
                trainer, tmp_path / "set", name="set", type="dataset", metadata=dict.fromkeys(map(str, range(101)))
            )


@pytest.mark.parametrize("row", CALLBACKS.values(), ids=CALLBACKS.keys())
def test_no_callback_logs_in_every_step(row: Row, tmp_path, monkeypatch):
    calls: Counter[str] = Counter()
    log = pl.LightningModule.log

    def counting(self: pl.LightningModule, *arguments: Any, **options: Any) -> None:
        calls[str(self._current_fx_name)] += 1
        log(self, *arguments, **options)

    class Silent(TinyModule):
        def training_step(self, batch, batch_idx):
            monkeypatch.setattr(pl.LightningModule, "log", log)
            try:
                return super().training_step(batch, batch_idx)
            finally:
                monkeypatch.setattr(pl.LightningModule, "log", counting)

    monkeypatch.setattr(pl.LightningModule, "log", counting)
    make_trainer(tmp_path, 1, row.make(), log_every_n_steps=1000).fit(Silent())
    each_step = {"training_step", "on_before_zero_grad", "on_before_backward", "on_after_backward"}
    each_step |= {"on_before_optimizer_step", "on_train_batch_start", "on_train_batch_end"}
    assert not each_step & calls.keys()
