"""Work that takes long shows a bar: on a terminal, beside Lightning's own, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from lightning_plugins import _progress
from lightning_plugins._progress import progress_bar
from lightning_plugins.calibration import TemperatureScaling
from lightning_plugins.callbacks import CalibratorComparison, RobustnessEvaluation
from test_callbacks import ATTACK, PIXELS
from toys import TinyModule, make_trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest puts its own stderr back between those and the test."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_a_bar_stays_on_its_line_beside_that_of_lightning(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    console = Console(file=terminal, force_terminal=True)
    with Progress(auto_refresh=False, console=console) as other:  # as RichProgressBar makes it
        other.add_task("epoch", total=1)
        other.refresh()
        before = len(terminal.getvalue())
        for _ in progress_bar(range(40), title="fitting", delay=0):
            pass
        shown = terminal.getvalue()[before:]
    assert "fitting:   0%" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")  # and leaves nothing behind


def test_short_work_and_log_files_show_no_bar(capfd, monkeypatch):
    captured = sys.stderr
    terminal = on_a_terminal(monkeypatch)
    assert list(progress_bar(range(3), title="short")) == [0, 1, 2]
    assert terminal.getvalue() == ""
    assert list(progress_bar(range(3), title="hidden", show=False, delay=0)) == [0, 1, 2]
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", captured)
    list(progress_bar(range(3), title="file", delay=0))
    assert "file" not in capfd.readouterr().err
    list(progress_bar(range(3), title="asked for", show=True))
    assert "asked for" in capfd.readouterr().err


def test_one_process_of_several_shows_a_bar(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        assert terminal.getvalue() == ""
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        list(progress_bar(range(3), title="shared", show=True))
    assert "shared" in terminal.getvalue()


def test_what_has_no_length_is_not_asked_for_one(monkeypatch):
    class Stream:
        def __iter__(self):
            return iter("ab")

        def __len__(self):
            raise NotImplementedError

    on_a_terminal(monkeypatch)
    assert list(progress_bar(Stream(), title="stream")) == ["a", "b"]


def test_callbacks_that_work_for_long_show_how_far_they_are(tmp_path, monkeypatch):
    """Each bar gets all the way through its work."""
    bars = []
    terminal = on_a_terminal(monkeypatch)

    class Recorded(_progress.tqdm):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **{**keywords, "delay": 0, "mininterval": 0})
            bars.append(self)

    monkeypatch.setattr(_progress, "tqdm", Recorded)
    comparison = CalibratorComparison([TemperatureScaling()], num_bootstrap=2)
    evaluation = RobustnessEvaluation(ATTACK, {"one": ATTACK, "two": ATTACK}, eps_grid=[0.01], **PIXELS)
    trainer = make_trainer(tmp_path, 1, comparison, evaluation, limit_train_batches=1, limit_val_batches=2)
    module = TinyModule()
    trainer.fit(module)
    torch.manual_seed(0)
    trainer.test(module, verbose=False)
    done = {bar.desc.rstrip(": "): (bar.n, bar.total) for bar in bars}
    assert done == {
        "logits": (2, 2),
        "fitting calibrators": (1, 1),
        "measuring calibrators": (2, 2),
        "attacks on a batch": (3, 3),
    }
    passes = [f"{count} passes" for count in range(1, ATTACK.num_steps + 1)]
    assert all(count in terminal.getvalue() for count in passes)  # also within one attack
