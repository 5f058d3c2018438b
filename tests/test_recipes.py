from __future__ import annotations

import textwrap

import pytest
import torch

from lightning_plugins import recipes
from lightning_plugins.cli import main
from lightning_plugins.modules import ImageClassifier
from toys import TinyModule

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false")


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Data that cannot be had here give way to the digits.
    digits = ["data.class_path=lightning_plugins.data.DigitsDataModule"] if "CIFAR10" in recipes.find(name).text else []
    built = recipes.build(name, "trainer.fast_dev_run=1", *digits, *QUIET)
    built.trainer.fit(built.module, datamodule=built.datamodule)
    built.trainer.test(built.module, datamodule=built.datamodule, verbose=False)
    assert all(value.isfinite() for value in built.trainer.callback_metrics.values())


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_says_what_to_expect(name):
    header = recipes.find(name).header()
    assert header.keys() == {"", "Needs", "Gives", "Takes"}
    assert all(len(text) > 10 and "TBD" not in text for text in header.values())
    assert f"lightning-plugins run {name}" in recipes.find(name).text
    assert "seed_everything:" in recipes.find(name).text


def test_a_header_ends_at_the_first_line_of_yaml_and_paragraphs_end_at_blank_lines():
    text = "# One\n# two.\n#\n#   command\n#\n# Needs: a\n#   b.\n# Takes: 3 s.\n#\n# More.\nkey: 1\n# Gives: no\n"
    assert recipes.Recipe("x", text, "x").header() == {"": "One two.", "Needs": "a b.", "Takes": "3 s."}


def test_overrides_with_and_without_dashes():
    built = recipes.build("quickstart", "trainer.max_epochs=3", "--data.batch_size=7", *QUIET)
    assert built.trainer.max_epochs == 3
    assert built.datamodule.batch_size == 7


def test_a_recipe_takes_its_optimizer_as_it_is_written():
    # a default of another optimizer must not show through: SGD would keep AdamW's weight decay
    group = recipes.build("quickstart", *QUIET).module.configure_optimizers()["optimizer"].param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0)


def test_find(tmp_path):
    file = tmp_path / "own.yml"
    file.write_text("# Own.\nmodel: {}\n")
    assert recipes.find(str(file)) == ("own", file.read_text(), str(file))
    assert recipes.find("quickstart").text.startswith("# Train a small ResNet")
    with pytest.raises(ValueError, match="did you mean quickstart.*must end in .yaml"):
        recipes.find("quikstart")
    with pytest.raises(ValueError, match="there are: .*quickstart"):
        recipes.find("#")
    with pytest.raises(ValueError, match="cannot be read: .*No such file"):
        recipes.find(str(tmp_path / "absent.yaml"))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="own.yml' cannot be read"):
        recipes.find(str(file))


def test_the_model_learns_from_the_data_what_the_recipe_leaves_out():
    module = recipes.build("quickstart", "data.class_path=lightning_plugins.data.CIFAR100DataModule", *QUIET).module
    assert isinstance(module, ImageClassifier)
    assert module.num_classes == module.model.fc.out_features == 100
    assert module.model.stem[0].in_channels == 3
    torch.testing.assert_close(module.mean.flatten(), torch.tensor([0.5071, 0.4865, 0.4409]))
    torch.testing.assert_close(module.std.flatten(), torch.tensor([0.2673, 0.2564, 0.2762]))
    assert module.hparams.image_size == 32


def test_what_the_recipe_says_wins_over_the_data():
    module = recipes.build("quickstart", "model.num_classes=12", "model.mean=[0.5]", "model.std=[0.25]", *QUIET).module
    assert module.num_classes == 12
    assert module.mean.item() == 0.5
    assert module.std.item() == 0.25


def test_a_module_that_asks_for_nothing_and_brings_its_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text(
        textwrap.dedent("""\
            # Own.
            model:
              class_path: toys.TinyModule
              init_args: {batch_size: 4}
            trainer: {fast_dev_run: true, enable_progress_bar: false, enable_model_summary: false, accelerator: cpu}
            """)
    )
    built = recipes.build(str(file))
    assert isinstance(built.module, TinyModule)
    assert built.datamodule is None
    assert main(["run", str(file)]) == 0
