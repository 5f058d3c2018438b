"""What the files of the repository promise each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OLDEST = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE))


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_package_list_is_complete():
    places = {"lightning_plugins": "lightning_plugins"}
    places |= {name: f"lightning_plugins/{name}" for name in ("callbacks", "recipes")}
    found = {
        ".".join((target, *init.parent.relative_to(ROOT / folder).parts)).replace("/", ".")
        for folder, target in places.items()
        for init in (ROOT / folder).rglob("__init__.py")
        if not init.parent.is_relative_to(ROOT / "lightning_plugins" / "callbacks")
        and not init.parent.is_relative_to(ROOT / "lightning_plugins" / "recipes")
    }
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(found) == sorted(listed)


def test_every_folder_with_python_files_is_a_package():
    for folder in ("lightning_plugins", "callbacks", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} needs an __init__.py to be installed"


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_the_links_lead_to_the_folders_beside_the_package(name):
    link = ROOT / "lightning_plugins" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.samefile(ROOT / name)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_a_bare_import_is_refused_with_the_reason(name):
    process = python(f"import {name}")
    assert process.returncode == 1
    assert re.search(rf"ImportError: import lightning_plugins.{name}, not {name}: .* twice", process.stderr)


# torchmetrics imports matplotlib and torchvision where it finds them: the last row asks for what our own modules add.
@pytest.mark.processes
@pytest.mark.parametrize(
    ("before", "module", "absent"),
    [
        ("", "lightning_plugins", {"torch", "lightning", "wandb", "matplotlib", "torchvision", "yaml"}),
        ("", "lightning_plugins.cli", {"torch", "lightning", "wandb", "matplotlib", "torchvision", "rich"}),
        ("", "lightning_plugins.recipes", {"torch", "lightning"}),
        (
            "lightning.pytorch, torchmetrics",
            "lightning_plugins.calibration, lightning_plugins.callbacks",
            {"wandb", "kornia", "matplotlib", "sklearn"},
        ),
    ],
)
def test_imports_stay_quick(tmp_path, before, module, absent):
    start = f"import {before}" if before else ""
    process = python(
        f"import sys; {start}\nbefore = set(sys.modules)\nimport {module}\nprint(*(set(sys.modules) - before))",
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert not absent & set(process.stdout.split())


def lower_bounds() -> dict[str, str]:
    bounds = {}
    for requirement in PYPROJECT["project"]["dependencies"]:
        name, bound = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement).groups()
        bounds[name] = bound
    return bounds


def minor(version: str) -> tuple[str, ...]:
    return tuple([*version.split("."), "0"][:2])


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = lower_bounds()
    assert bounds.keys() == OLDEST.keys()
    for name, bound in bounds.items():
        assert minor(bound) == minor(OLDEST[name]), f"{name}: pyproject.toml says {bound}, oldest.txt {OLDEST[name]}"


def test_the_compatibility_table_has_the_oldest_versions():
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## Compatibility")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| *`?([\w-]+)`? *\| *([\d.]+)", section, re.MULTILINE))
    assert f">={rows.pop('Python')}" == PYPROJECT["project"]["requires-python"]
    assert rows.keys() >= {"lightning", "torch", "torchvision", "torchmetrics", "kornia", "wandb"}
    assert rows == {name: OLDEST[name] for name in rows}


def test_the_version_is_the_same_everywhere():
    import lightning_plugins

    assert lightning_plugins.__version__ == PYPROJECT["project"]["version"]
