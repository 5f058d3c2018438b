"""The configuration files of the guides are what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lightning_plugins import recipes

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
SWEEPS = sorted((GUIDES / "sweeps").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (GUIDES / "cluster.md").read_text(), re.MULTILINE | re.DOTALL)


def test_one_sweep_for_each_family():
    assert [path.stem for path in SWEEPS] == ["calibration", "distillation", "quantization", "robustness"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_asks_for_what_its_recipe_takes(path, tmp_path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["command"][0] == "${env}"
    assert sweep["command"][-1] == "${args}"
    command = sweep["command"][1:-1]
    assert command[:2] == [sweep["program"], "run"]
    for pick in (0, -1):
        overrides = []
        for key, parameter in sweep["parameters"].items():
            values = parameter.get("values") or [parameter["min"], parameter["max"]]
            overrides.append(f"{key}={values[pick]}")
        built = recipes.build(command[2], *overrides, f"trainer.default_root_dir={tmp_path}")
        assert built.trainer is not None


@pytest.mark.parametrize("name", ["quantization/multi_precision", "robustness/trades"])
def test_the_cluster_guide_changes_a_recipe_as_it_says(name, tmp_path):
    (text,) = blocks("yaml")
    overrides = [f"trainer.{key}={value}" for key, value in yaml.safe_load(text)["trainer"].items()]
    # No GPU here: what is left is that the recipe takes the keys.
    overrides = [o.replace("accelerator=gpu", "accelerator=cpu").replace("devices=4", "devices=2") for o in overrides]
    built = recipes.build(name, *overrides, f"trainer.default_root_dir={tmp_path}")
    assert built.trainer.world_size == 2
    assert built.trainer.precision == "bf16-mixed"


def test_the_shell_blocks_are_valid():
    for block in blocks("bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
