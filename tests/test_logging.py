from __future__ import annotations

import csv
import json
import os
import struct
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from PIL import Image

from lightning_plugins.logging import (
    _check_key,
    _plain,
    define_metric,
    log_artifact,
    log_callback_hyperparameters,
    log_figure,
    log_image,
    log_metrics,
    log_summary,
    log_table,
)


class FakeRun:
    """What WandbLogger and this module use of a W&B run."""

    id = "fake"
    name = "fake"

    def __init__(self):
        self.logged, self.definitions, self.artifacts = [], [], []
        self.summary, self.config = {}, SimpleNamespace(update=self._configure)
        self.configuration = {}

    def _configure(self, params, allow_val_change):
        self.configuration.update(params)

    def log(self, values):  # no `step`: passing one is an error
        self.logged.append(values)

    def define_metric(self, name, **options):
        self.definitions.append((name, options))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(
        pl.Trainer,
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="run")


def at_step(trainer: pl.Trainer, step: int) -> None:
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def call_everything(trainer: pl.Trainer, tmp_path: Path) -> None:
    log_image(trainer, "a/image", torch.zeros(3, 4, 5))
    log_figure(trainer, "a/figure", Figure())
    log_table(trainer, "a/table", ["x"], [[1]])
    log_metrics(trainer, {"a/metric": 1.0})
    log_summary(trainer, {"a/metric": 1.0})
    define_metric(trainer, "a/metric", summary="max")
    log_artifact(trainer, tmp_path, name="folder", type="dataset")
    log_callback_hyperparameters(trainer, pl.callbacks.EarlyStopping("val/loss"))


# Pictures


@pytest.mark.parametrize(
    ("image", "mode", "corner"),
    [
        (torch.full((3, 4, 5), 0.5), "RGB", (128, 128, 128)),
        (torch.full((1, 4, 5), 1.0, dtype=torch.bfloat16), "L", 255),
        (torch.full((4, 5), 1.0004, dtype=torch.float64), "L", 255),  # a rounding error
        (torch.full((4, 5), 7, dtype=torch.uint8), "L", 7),
        (np.full((4, 5, 3), 9, dtype=np.uint8), "RGB", (9, 9, 9)),
        (np.full((4, 5, 1), 0.0, dtype=np.float16), "L", 0),
        (torch.ones(3, 4, 5, requires_grad=True), "RGB", (255, 255, 255)),
    ],
)
def test_image_becomes_a_png_of_the_same_pixels(make_trainer, tmp_path, image, mode, corner):
    log_image(make_trainer(logger=csv_logger(tmp_path)), "calibration/reliability", image)
    with Image.open(tmp_path / "run/media/calibration/reliability-step_00000000.png") as picture:
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == (mode, (5, 4), corner)


def test_channels_and_rows_are_not_swapped(make_trainer, tmp_path):
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    log_image(make_trainer(logger=csv_logger(tmp_path)), "image", image)
    pixels = np.asarray(Image.open(tmp_path / "run/media/image-step_00000000.png"))
    np.testing.assert_array_equal(pixels, (image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("image", "error", "remedy"),
    [
        (torch.zeros(2, 3, 4, 4), ValueError, "make_grid"),
        (torch.zeros(4, 4, 4), ValueError, r"1 or 3 channels, got Tensor \(4, 4, 4\)"),
        (np.zeros((3, 4, 4)), ValueError, r"1 or 3 channels, got ndarray \(3, 4, 4\)"),
        (torch.zeros(3, 0, 4), ValueError, "one picture"),
        (torch.full((3, 4, 4), 1.5), ValueError, "undo the normalization"),
        (torch.full((3, 4, 4), -0.1), ValueError, "found -0.1 to -0.1"),
        (torch.full((3, 4, 4), torch.nan), ValueError, "found nan to nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "uint8, got Tensor .* torch.int64; convert"),
        ([[0.0]], TypeError, "got a list; convert"),
    ],
)
def test_what_is_no_picture_is_refused(make_trainer, tmp_path, image, error, remedy):
    with pytest.raises(error, match=remedy):
        log_image(make_trainer(logger=csv_logger(tmp_path)), "image", image)


def test_a_later_step_is_another_file_and_the_last_name_the_newest(make_trainer, tmp_path):
    trainer = make_trainer(logger=csv_logger(tmp_path))
    for step, grey in [(9, 0), (10, 1), (120, 2), (120, 3)]:
        at_step(trainer, step)
        log_image(trainer, "image", torch.full((2, 2), grey, dtype=torch.uint8))
    names = sorted(path.name for path in (tmp_path / "run/media").iterdir())
    assert names == ["image-step_00000009.png", "image-step_00000010.png", "image-step_00000120.png"]
    assert Image.open(tmp_path / "run/media" / names[-1]).getpixel((0, 0)) == 3


def test_caption_is_kept_in_the_file(make_trainer, tmp_path):
    log_image(make_trainer(logger=csv_logger(tmp_path)), "image", torch.zeros(2, 2), caption="ε = 8/255")
    assert Image.open(tmp_path / "run/media/image-step_00000000.png").info["Description"] == "ε = 8/255"


def test_figure_is_drawn_and_left_open(make_trainer, tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1])
    canvas = figure.canvas
    log_figure(make_trainer(logger=csv_logger(tmp_path)), "figure", figure)
    assert Image.open(tmp_path / "run/media/figure-step_00000000.png").size == (300, 150)
    assert figure.canvas is canvas
    assert figure.dpi == 100


def test_what_is_no_figure_is_refused(make_trainer):
    with pytest.raises(TypeError, match="for Axes pass its .figure"):
        log_figure(make_trainer(logger=False), "figure", Figure().add_subplot())


# Names of files


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "./a", "a/", "a\\b", "C:a", "a\0", "a\nb"]
)
def test_keys_that_leave_the_folder_are_refused(make_trainer, key):
    for log in (
        partial(log_image, image=torch.zeros(2, 2)),
        partial(log_figure, figure=Figure()),
        partial(log_table, columns=[], rows=[]),
    ):
        with pytest.raises(ValueError, match="words joined by '/'"):
            log(make_trainer(logger=False), key)


@given(st.text(max_size=12))
def test_an_accepted_key_stays_below_the_folder(key):
    try:
        _check_key(key)
    except ValueError:
        return
    base = Path("/run/media")
    path = Path(os.path.normpath(base / f"{key}-step_00000000.png"))
    assert base in path.parents
    assert path.name.endswith("-step_00000000.png")


# Tables


def test_table_becomes_csv(make_trainer, tmp_path):
    rows = [["conv, 1", torch.tensor(8)], [None, np.float32(0.5)], ["fc", float("nan")]]
    log_table(make_trainer(logger=csv_logger(tmp_path)), "quantization/layers", ["layer", "bits"], rows)
    with open(tmp_path / "run/media/quantization/layers-step_00000000.csv", newline="") as file:
        assert list(csv.reader(file)) == [["layer", "bits"], ["conv, 1", "8"], ["", "0.5"], ["fc", "nan"]]


def test_ragged_table_is_refused(make_trainer):
    with pytest.raises(ValueError, match="row 1 has 1; fill empty cells with None"):
        log_table(make_trainer(logger=False), "table", ["a", "b"], [[1, 2], [3]])


# Scalars


def test_metrics_reach_the_csv_after_fit(make_trainer, tmp_path):
    class Late(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            log_metrics(trainer, {"calibration/temperature": torch.tensor(1.5), "calibration/ece": float("nan")})

        def teardown(self, trainer, pl_module, stage):
            log_metrics(trainer, {"late/still": 2})

    make_trainer(logger=csv_logger(tmp_path), callbacks=[Late()], max_steps=3, limit_val_batches=0).fit(BoringModel())
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {name: value for name, value in rows[0].items() if value} == {
        "calibration/temperature": "1.5",
        "calibration/ece": "nan",
        "step": "3",
    }
    assert rows[1]["late/still"] == "2.0"


@pytest.mark.parametrize("value", [torch.zeros(2), "high", None, [1.0]])
def test_metrics_that_are_not_one_number_are_refused(make_trainer, value):
    with pytest.raises(ValueError, match="'a/b' is .*; reduce it first"):
        log_metrics(make_trainer(logger=False), {"a/b": value})


def test_summary_choice_is_checked(make_trainer):
    with pytest.raises(ValueError, match="'max', 'min' or 'last', got 'mean'"):
        define_metric(make_trainer(logger=False), "a", summary="mean")


# Hyper-parameters


class Example(pl.Callback):
    def __init__(self, rate=0.1, *, bits=(8, 4), method=None, absent=1, shared=torch.relu, **options):
        self.rate, self.bits, self.method, self.shared = rate, bits, method, shared


def test_callback_arguments_in_hparams_yaml(make_trainer, tmp_path):
    callback = Example(method=torch.nn.Sequential(torch.nn.ReLU()))
    twin = Example(rate=0.2)
    trainer = make_trainer(logger=csv_logger(tmp_path), callbacks=[callback, twin])
    log_callback_hyperparameters(trainer, callback)
    log_callback_hyperparameters(trainer, twin)
    assert yaml.safe_load((tmp_path / "run/hparams.yaml").read_text()) == {  # safe: no Python tags in it
        "lightning_plugins/Example/rate": 0.1,
        "lightning_plugins/Example/bits": [8, 4],
        "lightning_plugins/Example/method": "Sequential()",
        "lightning_plugins/Example/shared": "relu",
        "lightning_plugins/Example_2/rate": 0.2,
        "lightning_plugins/Example_2/bits": [8, 4],
        "lightning_plugins/Example_2/method": None,
        "lightning_plugins/Example_2/shared": "relu",
    }


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (True, True),
        (np.float64(0.5), 0.5),
        (torch.tensor(3), 3),
        ((1, ("a", None)), [1, ["a", None]]),
        ({1: (2,)}, {"1": [2]}),
        (Path("a/b"), "a/b"),
        (torch.float16, "torch.float16"),
        (torch.nn.ReLU, "ReLU"),
        (torch.nn.ReLU(), "ReLU()"),
        (torch.nn.Linear(1, 2), "Linear(in_features=1, out_features=2, bias=True)"),
        (object(), "object()"),
        (np.zeros(2), "array([0., 0.])"),
        (torch.zeros(99), "Tensor()"),
    ],
)
def test_values_are_rendered_plain(value, plain):
    assert _plain(value) == plain
    assert type(_plain(value)) is type(plain)


# TensorBoard


def test_tensorboard_reads_everything_back(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Module(BoringModel):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 4})

    class Logs(Example):
        def setup(self, trainer, pl_module, stage):
            log_callback_hyperparameters(trainer, self)

        def on_train_end(self, trainer, pl_module):
            log_image(trainer, "a/image", torch.zeros(1, 4, 5))
            log_figure(trainer, "a/figure", Figure(figsize=(2, 1)))
            log_table(trainer, "a/table", ["x|y", "z"], [["1\n2", None]])
            log_metrics(trainer, {"a/metric": 2.5})

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    make_trainer(logger=logger, callbacks=[Logs()], max_steps=2, limit_val_batches=0).fit(Module())
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert set(events.Tags()["images"]) == {"a/image", "a/figure"}
    (image,) = events.Images("a/image")
    assert (image.step, image.width, image.height) == (2, 5, 4)
    assert events.Images("a/figure")[0].width == 300
    (table,) = events.Tensors("a/table/text_summary")
    assert table.tensor_proto.string_val[0].decode() == "| x\\|y | z |\n| --- | --- |\n| 1 2 | None |"
    assert [(event.step, event.value) for event in events.Scalars("a/metric")] == [(2, 2.5)]
    assert len(events.Scalars("hp_metric")) == 1  # the module's own
    hparams = yaml.safe_load((tmp_path / "run/hparams.yaml").read_text())
    assert hparams["width"] == 4
    assert hparams["lightning_plugins/Logs/bits"] == [8, 4]
    assert not (tmp_path / "run/media").exists()


# Weights & Biases


def test_wandb_calls(make_trainer, tmp_path):
    import wandb

    run = FakeRun()
    callback = Example()
    trainer = make_trainer(logger=WandbLogger(experiment=run), callbacks=[callback])
    at_step(trainer, 7)
    log_image(trainer, "a/image", torch.zeros(3, 4, 5), caption="black")
    log_figure(trainer, "a/figure", Figure())
    log_table(trainer, "a/table", ["x"], [[1], ["one"]])
    log_metrics(trainer, {"a/metric": torch.tensor(1.5)})
    assert all(values["trainer/global_step"] == 7 for values in run.logged)
    image, figure, table, metric = run.logged
    assert image["a/image"][0]._caption == "black"
    assert image["a/image"][0].image.size == (5, 4)
    assert isinstance(figure["a/figure"][0], wandb.Image)
    assert table["a/table"].data == [[1], ["one"]]
    assert metric["a/metric"] == 1.5

    log_summary(trainer, {"calibration/ece": torch.tensor(0.5), "calibration/method": "temperature"})
    assert run.summary == {"calibration/ece": 0.5, "calibration/method": "temperature"}
    define_metric(trainer, "val/acc", summary="max")
    assert run.definitions == [("val/acc", {"step_metric": "trainer/global_step", "step_sync": True, "summary": "max"})]
    log_callback_hyperparameters(trainer, callback)
    assert run.configuration["lightning_plugins/Example/bits"] == [8, 4]

    (tmp_path / "set").mkdir()
    (tmp_path / "set/images.safetensors").write_bytes(b"12")
    log_artifact(trainer, tmp_path / "set", name="distilled", type="dataset", metadata={"seed": np.int64(3)})
    log_artifact(trainer, tmp_path / "set/images.safetensors", name="file", type="dataset")
    folder, file = run.artifacts
    assert (folder.name, folder.type, folder.metadata) == ("distilled", "dataset", {"seed": 3})
    assert list(folder.manifest.entries) == list(file.manifest.entries) == ["images.safetensors"]
    assert not list(tmp_path.rglob("media"))


def test_wandb_prefix_is_the_same_everywhere(make_trainer):
    run = FakeRun()
    trainer = make_trainer(logger=WandbLogger(experiment=run, prefix="ours"))
    log_metrics(trainer, {"val/acc": 1.0})
    log_summary(trainer, {"val/acc": 1.0})
    define_metric(trainer, "val/acc", summary="max")
    assert "ours-val/acc" in run.logged[0]
    assert list(run.summary) == [run.definitions[0][0]] == ["ours-val/acc"]


def test_artifact_arguments_are_checked_without_wandb_too(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="got 'a/b'; rename"):
        log_artifact(make_trainer(logger=False), tmp_path, name="a/b", type="dataset")
    with pytest.raises(FileNotFoundError, match="write it first"):
        log_artifact(make_trainer(logger=False), tmp_path / "absent", name="a", type="dataset")


def read_wandb_records(path: Path) -> list:
    """Read a .wandb file: records cut into blocks of 32 KiB, each piece behind (checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, piece, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        piece += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(piece))
            piece = b""
    return records


def test_real_wandb_client_offline(make_trainer, tmp_path):
    import wandb

    class Logs(Example):
        def setup(self, trainer, pl_module, stage):
            log_callback_hyperparameters(trainer, self)
            define_metric(trainer, "val/acc", summary="max")

        def on_train_end(self, trainer, pl_module):
            log_image(trainer, "a/image", torch.zeros(3, 4, 5), caption="black")
            log_table(trainer, "a/table", ["layer", "bits"], [["conv", 8], ["fc", None]])
            log_metrics(trainer, {"val/acc": 0.5, "nan": float("nan")})
            log_metrics(trainer, {"val/acc": 0.25})
            log_summary(trainer, {"best": 0.5})
            (tmp_path / "distilled.txt").write_text("images")
            log_artifact(trainer, tmp_path / "distilled.txt", name="distilled", type="dataset", metadata={"seed": 1})

    logger = WandbLogger(save_dir=tmp_path)  # its default "." would go before WANDB_DIR
    try:
        make_trainer(logger=logger, callbacks=[Logs()], max_steps=2, limit_val_batches=0).fit(BoringModel())
    finally:
        wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (image,) = (folder / "files/media/images/a").glob("image_*.png")
    assert Image.open(image).size == (5, 4)
    (table,) = (folder / "files/media/table/a").glob("table_*.table.json")
    assert json.loads(table.read_text())["data"] == [["conv", 8], ["fc", None]]

    (path,) = folder.glob("*.wandb")
    records, patience = [], time.monotonic() + 20
    while not any(record.HasField("exit") for record in records) and time.monotonic() < patience:
        records = read_wandb_records(path)  # finish() may return before the last block is on disk
        time.sleep(0.05)
    config, summary, steps, artifacts = {}, {}, set(), []
    for record in records:
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            if "trainer/global_step" in (item.key, *item.nested_key):
                steps.add(json.loads(item.value_json))
        if record.artifact.type == "dataset":
            artifacts.append((record.artifact.name, json.loads(record.artifact.metadata)))
    assert config["lightning_plugins/Logs/bits"] == [8, 4]
    assert summary["best"] == 0.5
    assert summary["val/acc"] == {"max": 0.5}
    assert steps == {2}
    assert artifacts == [("distilled", {"seed": 1})]


# Any list of loggers, or none


def test_without_logger_nothing_is_written(make_trainer, tmp_path):
    call_everything(make_trainer(logger=False), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_writes_nothing(make_trainer, tmp_path):
    trainer = make_trainer(fast_dev_run=True)
    assert isinstance(trainer.logger, DummyLogger)
    call_everything(trainer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sanity_check_writes_nothing(make_trainer, tmp_path):
    run = FakeRun()
    trainer = make_trainer(logger=[csv_logger(tmp_path), WandbLogger(experiment=run)])
    trainer.sanity_checking = True
    call_everything(trainer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not run.logged


def test_other_ranks_touch_no_logger(make_trainer, tmp_path, monkeypatch):
    class Untouchable(CSVLogger):
        @property
        def experiment(self):
            raise AssertionError("logger.experiment on another rank")

        log_metrics = log_hyperparams = save = experiment

    trainer = make_trainer(logger=Untouchable(tmp_path))
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)
    call_everything(trainer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_loggers_both_get_it(make_trainer, tmp_path):
    run = FakeRun()
    trainer = make_trainer(logger=[csv_logger(tmp_path), WandbLogger(experiment=run)])
    log_image(trainer, "image", torch.zeros(2, 2))
    log_table(trainer, "table", ["x"], [[1]])
    log_metrics(trainer, {"metric": 1.0})
    assert [next(iter(values)) for values in run.logged] == ["image", "table", "metric"]
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        "image-step_00000000.png",
        "table-step_00000000.csv",
        "metrics.csv",
    }


def test_logger_without_folder_uses_the_trainers(make_trainer, tmp_path):
    class Elsewhere(CSVLogger):
        log_dir = None

    log_image(make_trainer(logger=Elsewhere(tmp_path / "unused")), "image", torch.zeros(2, 2))
    assert (tmp_path / "media/image-step_00000000.png").exists()


# Disks


def test_unwritable_folder_costs_a_warning_and_not_the_other_logger(make_trainer, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    run = FakeRun()
    trainer = make_trainer(logger=[csv_logger(tmp_path), WandbLogger(experiment=run)])
    with pytest.warns(UserWarning, match=f"'image' was not stored for CSVLogger: .*{tmp_path}/run") as caught:
        log_image(trainer, "image", torch.zeros(2, 2))
    assert len(caught) == 1
    assert len(run.logged) == 1


def test_remote_folder_costs_a_warning(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote = type("Remote", (CSVLogger,), {"log_dir": "s3://bucket/run"})(tmp_path)
    with pytest.warns(UserWarning, match="need a local folder, not s3://bucket/run"):
        log_table(make_trainer(logger=remote), "table", ["x"], [[1]])
    assert list(tmp_path.iterdir()) == []
