"""The command line, as its user meets it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from test_logging import read_wandb_records

from lightning_plugins import recipes, runner
from lightning_plugins.cli import main
from lightning_plugins.data import DigitsDataModule
from lightning_plugins.modules import ImageClassifier
from toys import TinyModule

SMALL = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--model.init_args.model_args.width=2"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folders(name: str = "quickstart", root: str = "runs") -> list[Path]:
    return sorted(path for path in Path(root, name).glob("*"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run and return the one sentence that it fails with."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, error
    assert error.rstrip().endswith(sentences[0]), error  # nothing follows it
    assert "Namespace(" not in sentences[0]
    assert len(sentences[0]) < 600
    return sentences[0]


@pytest.mark.processes
def test_help_and_list_answer_without_torch():
    code = (
        "import sys\nfrom lightning_plugins.cli import main\nmain(['list'])\n"
        "try:\n    main(['--help'])\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0
    assert "{list,show,copy,run}" in process.stdout
    assert process.stderr == "False\n"


def test_list_names_every_recipe_with_what_it_says_about_itself(capsys):
    files = Path(recipes.__file__).parent.rglob("*.yaml")
    assert main(["list"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for file in files:
        name = file.relative_to(Path(recipes.__file__).parent).with_suffix("").as_posix()
        assert name in shown
        assert recipes.find(name).header()[""].split()[0] in shown


def test_show_prints_the_file(capsys):
    assert main(["show", "quickstart"]) == 0
    assert capsys.readouterr().out == (Path(recipes.__file__).parent / "quickstart.yaml").read_text()


def test_copy_hands_over_a_recipe_once(capsys):
    assert main(["copy", "quickstart", "mine.yaml"]) == 0
    assert "lightning-plugins run mine.yaml" in capsys.readouterr().out
    assert Path("mine.yaml").read_text() == recipes.find("quickstart").text
    Path("mine.yaml").write_text("changed")
    assert "mine.yaml exists already; choose another name" in fails(capsys, "copy", "quickstart", "mine.yaml")
    assert Path("mine.yaml").read_text() == "changed"
    assert "No such file or directory" in fails(capsys, "copy", "quickstart", "absent/mine.yaml")


@pytest.mark.parametrize("command", [["show", "quickstrat"], ["copy", "quickstrat", "x"], ["run", "quickstrat"]])
def test_an_unknown_recipe_is_answered_with_near_ones(capsys, command):
    assert "there is no recipe 'quickstrat'; did you mean quickstart?" in fails(capsys, *command)


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["list", "--nothing"], ["run", "quickstart", "--logger", "mlflow"]]
)
def test_wrong_use_has_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: lightning-plugins" in capsys.readouterr().err


def test_a_run_leaves_everything_behind_and_the_next_one_leaves_it_alone(capsys):
    assert main(["run", "quickstart", *SMALL]) == 0
    (first,) = run_folders()
    expected = ["config.yaml", "checkpoints/last.ckpt", "metrics.csv", "results.json", "report.html"]
    expected += ["exports/calibrator.safetensors", "exports/calibration.json"]
    assert [name for name in expected if not (first / name).is_file()] == []
    assert list((first / "media").rglob("*.png"))
    assert not [path for path in first.rglob(".*")]
    results = json.loads((first / "results.json").read_text())
    assert shlex.split(results["command"])[:3] == ["lightning-plugins", "run", "quickstart"]
    assert results["seed"] == 0
    assert results["checkpoints"] == ["checkpoints/last.ckpt"]
    loaded = ImageClassifier.load_from_checkpoint(first / "checkpoints" / "last.ckpt", weights_only=True)
    assert (loaded.num_classes, loaded.model.stem[0].in_channels) == (
        10,
        1,
    )  # taken from the data, kept with the weights
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1
    assert config["trainer"]["limit_test_batches"] == 1
    out = capsys.readouterr().out
    assert f"{results['metrics']['test/acc']:.4f}" in out
    assert f"report: {first}/report.html" in out

    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert main(["run", "quickstart", *SMALL]) == 0
    assert len(run_folders()) == 2
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    again = json.loads((run_folders()[1] / "results.json").read_text())
    assert again["metrics"] == results["metrics"]  # the seed fixes everything


class Stopped(datetime):
    """A clock on which all runs start in one second."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2030, 1, 2, 3, 4, 5)


def test_runs_within_one_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr(runner, "datetime", Stopped)
    for _ in range(3):
        assert main(["run", "quickstart", *SMALL, "--trainer.fast_dev_run=true"]) == 0
    names = [path.name for path in run_folders()]
    assert names == ["2030-01-02_03-04-05", "2030-01-02_03-04-05-2", "2030-01-02_03-04-05-3"]


WRONG_OVERRIDES = [
    (["--nonsense", "3"], "the override --nonsense 3 names no key"),
    (["--trainer.max_epoch=3"], "--trainer.max_epoch=3 names no key"),
    (["--trainer.max_epochs", "many"], "trainer.max_epochs must be int, got many"),
    (["--trainer.max_epochs"], "--trainer.max_epochs: expected one argument"),
    (["--seed_everything=x"], "seed_everything must be bool or int, got x"),
    (["--model.widht=3"], "model.widht is no argument of lightning_plugins.modules.ImageClassifier"),
    (["--model.init_args.num_classes=many"], "model.num_classes must be int, got many"),
    (["--model.init_args.optimizer.init_args.lr=high"], "model.optimizer.lr must be float, got high"),
    (["--model.optimizer.lrr=1"], "model.optimizer.lrr is no argument"),
    (["--model.lr_scheduler=foo"], "model.lr_scheduler must be the path of a class, such as package.Class, got foo"),
    (["--model.model=resnet2"], "unknown model 'resnet2'; near names are ['resnet20'"),
    (["--model.model_args.widht=2"], "unexpected keyword argument 'widht'"),
    (["--data.init_args.batchsize=3"], "data.batchsize is no argument of lightning_plugins.data.DigitsDataModule"),
    (["--data.init_args.batch_size", "big"], "data.batch_size must be int, got big"),
    (["--data.batch_size=-1"], "error: batch_size must be an integer of at least 1, got -1"),
    (["--data.class_path=lightning_plugins.data.Nothing"], "'lightning_plugins.data' has no attribute 'Nothing'"),
    (["--data.transforms=[3]"], "data.transforms: Not a valid subclass of TargetTransform"),
    (["--data.class_path=lightning_plugins.data.ImageFolderDataModule"], "error: data/train with one folder of images"),
    (["--trainer.callbacks.num_bin=3"], "trainer.callbacks.num_bin is no argument of lightning_plugins.callbacks.Post"),
    (["--trainer.callbacks.num_bins=x"], "trainer.callbacks.num_bins must be int, got x"),
    (["--trainer.callbacks.num_bins=0"], "error: num_bins must be at least 1, got 0"),
    (["--trainer.callbacks.calibrator=Foo"], "trainer.callbacks.calibrator must be the path of a class"),
    (["--trainer.accelerator=tpuu"], "invalid accelerator name: `accelerator='tpuu'`"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_OVERRIDES, ids=[case[0][0] for case in WRONG_OVERRIDES])
def test_a_wrong_override_is_named_in_one_sentence(capsys, overrides, message):
    assert message in fails(capsys, "run", "quickstart", *overrides)
    assert run_folders() == []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("from_folder", [True, False], ids=["folder", "file"])
def test_resuming_equals_a_straight_run(from_folder):
    four = [*SMALL, "--trainer.max_epochs=4"]
    assert main(["run", "quickstart", *four, "--root=straight"]) == 0
    assert main(["run", "quickstart", *SMALL, "--trainer.max_epochs=2", "--root=half"]) == 0
    (half,) = run_folders(root="half")
    checkpoint = half if from_folder else half / "checkpoints" / "last.ckpt"
    kept = (half / "checkpoints" / "last.ckpt").read_bytes()
    assert main(["run", "quickstart", *four, "--root=resumed", "--resume", str(checkpoint)]) == 0
    (straight,), (resumed,) = run_folders(root="straight"), run_folders(root="resumed")
    torch.testing.assert_close(weights(straight), weights(resumed), rtol=0, atol=0)
    assert not torch.equal(weights(half)["model.fc.weight"], weights(resumed)["model.fc.weight"])
    assert (half / "checkpoints" / "last.ckpt").read_bytes() == kept


def test_another_recipe_tests_the_weights_of_a_run_without_training(capsys):
    assert main(["run", "quickstart", *SMALL, "--seed_everything=5"]) == 0
    (trained,) = run_folders()
    small = [argument for argument in SMALL if "model" not in argument]
    folder = ["run", "robustness/evaluate", *small, "--trainer.callbacks=[]", "--checkpoint"]
    assert main([*folder, str(trained)]) == 0
    assert main([*folder, str(trained / "checkpoints" / "last.ckpt"), "--data.init_args.batch_size=100"]) == 0
    first, second = (json.loads((run / "results.json").read_text()) for run in run_folders("robustness/evaluate"))
    # The module is that of the run, of width 2, where the recipe has 8; the calibrator of the quickstart is not there.
    assert first["metrics"]["test/acc"] == json.loads((trained / "results.json").read_text())["metrics"]["test/acc"]
    assert set(first["seconds"]) == {"test"}
    assert first["weights_tested"].endswith("last.ckpt")
    assert "--checkpoint" in first["command"]
    assert second["metrics"].keys() == first["metrics"].keys()
    assert not (run_folders("robustness/evaluate")[0] / "checkpoints").exists()
    assert "only tests; pass one of them" in fails(capsys, *folder, str(trained), "--resume", str(trained))


def test_what_cannot_be_resumed_from_is_refused_before_a_folder_is_made(capsys):
    Path("empty").mkdir()
    Path("text.ckpt").write_text("not a checkpoint")
    torch.save({"weight": torch.zeros(1)}, "other.ckpt")
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(TinyModule())
    trainer.save_checkpoint("whole.ckpt")
    whole = Path("whole.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    for path, message in {
        "absent": "there is no checkpoint 'absent'; pass a .ckpt file or the folder of a run",
        "empty": "there is no checkpoint (*.ckpt) in the folder 'empty'; name a run that saved one",
        "text.ckpt": "'text.ckpt' is damaged or is no Lightning checkpoint; resume from another one",
        "other.ckpt": "'other.ckpt' is damaged or is no Lightning checkpoint; resume from another one",
        "half.ckpt": "'half.ckpt' is damaged or is no Lightning checkpoint; resume from another one",
    }.items():
        assert message in fails(capsys, "run", "quickstart", *SMALL, "--resume", path)
    assert run_folders() == []


def test_a_run_folder_that_cannot_be_made(capsys):
    Path("taken").write_text("a file")
    assert "cannot be made: " in (error := fails(capsys, "run", "quickstart", "--root=taken"))
    assert "choose another --root" in error
    assert Path("taken").read_text() == "a file"


@pytest.mark.processes
def test_runs_at_once_in_one_folder_do_not_mix(monkeypatch):
    """A recipe, another one, and two runs that go on from the same third, each in a process of its own."""
    monkeypatch.setattr(runner, "datetime", Stopped)
    assert main(["run", "quickstart", *SMALL, "--root=alone"]) == 0
    (alone,) = run_folders(root="alone")
    logged = ["quickstart", "--seed_everything=1", *["--logger=tensorboard"] * bool(find_spec("tensorboard"))]
    resumed = ["quickstart", "--trainer.max_epochs=2", f"--resume={alone}"]
    commands = [logged, ["robustness/fast"], resumed, resumed]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(commands))

    def start(command):
        barrier.wait(60)
        sys.exit(main(["run", command[0], *SMALL, *command[1:]]))

    processes = [context.Process(target=start, args=(command,)) for command in commands]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    folders = run_folders("robustness/fast") + run_folders()
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert len(folders) == 4
    for folder, result in zip(folders, results, strict=True):
        command = shlex.split(result["command"])
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert command[2] == result["recipe"] == folder.parent.relative_to("runs").as_posix()
        assert config["seed_everything"] == result["seed"] == ("--seed_everything=1" in command)
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["epoch"] == config["trainer"]["max_epochs"]
        steps = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
        assert {len(row) for row in steps} == {len(steps[0])}
        writers = {path.name.split(".")[-2] for path in folder.rglob("events.out.*")}  # process numbers
        assert len(writers) == ("--logger" in command)
        assert (folder / "report.html").exists()
    heads = [weights(folder)["model.fc.weight"] for folder in (alone, *folders[1:])]
    same = [[torch.equal(one, other) for other in heads].count(True) for one in heads]
    assert sorted(same) == [1, 1, 2, 2]  # the two that went on have trained the same


class PressCtrlC(pl.Callback):
    """Stands in for somebody at the keyboard."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [0, 1])
def test_ctrl_c_says_what_is_left(capsys, epoch):
    arguments = [*SMALL, "--trainer.max_epochs=3"]
    press = ["--trainer.callbacks+=test_cli.PressCtrlC", f"--trainer.callbacks.epoch={epoch}"]
    assert main(["run", "quickstart", *arguments, *press]) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (folder,) = run_folders()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if epoch == 0:
        assert f"nothing is left to resume in {folder}" in error
        assert not checkpoint.exists()
        return
    command = shlex.split(error.splitlines()[-1])
    assert command[:3] == ["lightning-plugins", "run", "quickstart"]
    assert command[-2:] == ["--resume", str(checkpoint)]
    assert main([argument for argument in command[1:] if argument not in press]) == 0
    assert run_folders()[1].joinpath("results.json").exists()


class Interrupt(pl.Callback):
    """Stands in for a cluster whose time is over, or for somebody at the keyboard, at any moment of a run."""

    def __init__(self, moment: str, name: str) -> None:
        self.moment, self.signal = moment, signal.Signals[name]

    def setup(self, trainer, pl_module, stage):
        if self.moment == "setup of the test" and stage == "test":
            os.kill(os.getpid(), self.signal)

    def on_train_epoch_start(self, trainer, pl_module):
        if self.moment == "fit" and trainer.current_epoch == 1:
            os.kill(os.getpid(), self.signal)

    def on_test_start(self, trainer, pl_module):
        if self.moment == "test":
            os.kill(os.getpid(), self.signal)

    def export(self, folder):
        if self.moment == "export":
            os.kill(os.getpid(), self.signal)
        return []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("moment", ["fit", "setup of the test", "test", "export"])
def test_a_signal_at_any_moment_says_how_to_go_on(capsys, moment, name, status):
    press = ["--trainer.callbacks+=test_cli.Interrupt", f"--trainer.callbacks.moment={moment}"]
    press += [f"--trainer.callbacks.name={name}"]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background start without it
    try:
        assert main(["run", "quickstart", *SMALL, "--trainer.max_epochs=2", *press]) == status
        assert signal.getsignal(signal.SIGTERM) == handlers[0]
    finally:
        signal.signal(signal.SIGINT, handlers[1])  # Lightning leaves it ignored
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (folder,) = run_folders()
    assert shlex.split(error.splitlines()[-1])[-2:] == ["--resume", str(folder / "checkpoints" / "last.ckpt")]
    assert not (folder / "results.json").exists()


def test_resuming_a_run_whose_training_was_done(tmp_path):
    assert main(["run", "quickstart", *SMALL]) == 0
    (first,) = run_folders()
    assert main(["run", "quickstart", *SMALL, "--resume", str(first)]) == 0
    second = next(folder for folder in run_folders() if folder != first)
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (first, second)]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    metrics = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (first, second)]
    assert {k: v for k, v in metrics[0].items() if k.startswith("test/")} == {
        k: v for k, v in metrics[1].items() if k.startswith("test/")
    }


def test_wandb_gets_config_history_pictures_and_summary():
    assert main(["run", "quickstart", *SMALL, "--logger", "wandb"]) == 0
    (folder,) = run_folders()
    (file,) = folder.rglob("*.wandb")
    records, patience = [], time.monotonic() + 20
    while not any(record.HasField("exit") for record in records) and time.monotonic() < patience:
        records = read_wandb_records(file)  # finish() may return before the last block is on disk
        time.sleep(0.05)
    config, history, summary = {}, set(), {}
    for record in records:
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        history |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert config["recipe"] == "quickstart"
    assert json.dumps(config).count('"resnet20"')
    assert config["lightning_plugins/PostHocCalibration/num_bins"] == 15
    assert history >= {"train/loss", "val/acc", "test/acc", "calibration/temperature"}
    assert 0 <= summary["test/acc"] <= 1
    assert list(file.parent.glob("files/media/images/**/reliability*.png"))


def test_tensorboard_writes_event_files():
    pytest.importorskip("tensorboard")
    assert main(["run", "quickstart", *SMALL, "--logger=tensorboard"]) == 0
    (folder,) = run_folders()
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "metrics.csv").exists()


class WrongLabels(DigitsDataModule):
    def setup(self, stage=None):
        super().setup(stage)
        if self.train_set is not None:
            self.train_set.targets[:] = 10


class LoadsWrongLabels(DigitsDataModule):
    def load(self, split):
        loaded = super().load(split)
        return None if loaded is None else (loaded[0], loaded[1] + 1)


class NotFinite(DigitsDataModule):
    def load(self, split):
        loaded = super().load(split)
        return None if loaded is None else (loaded[0] * torch.nan, loaded[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.class_path=test_cli.WrongLabels"], "labels must lie in [0, 10), got 10"),
        (["--data.class_path=test_cli.LoadsWrongLabels"], "check the label files"),
        (["--data.class_path=test_cli.NotFinite"], "images that are not finite"),
        (["--data.val_fraction=0"], "PostHocCalibration fits on validation data"),
        (["--trainer.limit_val_batches=0"], "PostHocCalibration fits on validation data"),
        (
            ["--data.class_path=lightning_plugins.data.ImageFolderDataModule", "--data.root=absent"],
            "absent/train with one folder of images per class was not found",
        ),
    ],
)
def test_faulty_data_is_one_sentence(capsys, overrides, message):
    assert message in fails(capsys, "run", "quickstart", *SMALL, *overrides)


def test_missing_files_and_no_network(capsys, monkeypatch):
    import urllib.request

    from lightning_plugins.data import fashion_mnist

    def offline(*arguments, **keywords):
        raise urllib.request.URLError("no network")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", Path("absent"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    error = fails(
        capsys, "run", "quickstart", *SMALL, "--data.class_path=lightning_plugins.data.FashionMNISTDataModule"
    )
    assert "Fashion-MNIST is in none of data, data/FashionMNIST/raw, absent; put " in error
    assert "train-images-idx3-ubyte.gz" in error


def test_a_file_of_ones_own_runs_by_path():
    Path("own.yaml").write_text(
        textwrap.dedent("""\
            # Mine.
            model: toys.TinyModule
            trainer: {max_epochs: 1, enable_progress_bar: false, enable_model_summary: false, accelerator: cpu}
            """)
    )
    assert main(["run", "own.yaml"]) == 0
    assert run_folders("own")[0].joinpath("results.json").exists()
