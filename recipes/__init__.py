"""Ready recipes: one YAML each, in LightningCLI form, the single source of what a run does.

``build(name)`` gives a recipe's Trainer, module and data module to Python; ``lightning-plugins run NAME`` runs it.
"""

from __future__ import annotations

if __name__ != "lightning_plugins.recipes":
    raise ImportError("import lightning_plugins.recipes, not recipes: a second name would load everything twice")

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["BuiltRecipe", "Recipe", "build", "find", "names"]


class Recipe(NamedTuple):
    """A recipe's text and where it came from.

    Attributes:
        name: ``quickstart``, ``calibration/post_hoc``, or the stem of a file.
        text: the YAML.
        source: what :func:`find` was asked for: the name, or the path of a file.
    """

    name: str
    text: str
    source: str

    def header(self) -> dict[str, str]:
        """Return the opening comment: its first paragraph under ``""``, what follows each ``Word:`` under that word."""
        header: dict[str, str] = {}
        key: str | None = ""
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            words = line.removeprefix("#").strip()
            if not words:
                key = None  # a blank line ends what came before it
            start, colon, rest = words.partition(":")
            if colon and start.isidentifier() and start.istitle():
                key, words = start, rest.strip()
            if key is not None:
                header[key] = f"{header.get(key, '')} {words}".strip()
        return header


class BuiltRecipe(NamedTuple):
    """What a recipe is made of, not yet run."""

    trainer: pl.Trainer
    module: pl.LightningModule
    datamodule: pl.LightningDataModule | None


def names() -> list[str]:
    """Return the names of the recipes in the package."""

    def walk(folder: Traversable, prefix: str) -> list[str]:
        found = []
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.name.startswith(("_", ".")):
                found += walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found.append(prefix + entry.name.removesuffix(".yaml"))
        return found

    return sorted(walk(files("lightning_plugins.recipes"), ""))


def find(name_or_file: str) -> Recipe:
    """Return a recipe of the package by name, or any recipe file by path.

    Raises:
        ValueError: for an unknown name (the message lists near ones) or a file that cannot be read.
    """
    if name_or_file in names():
        path = files("lightning_plugins.recipes").joinpath(f"{name_or_file}.yaml")
        return Recipe(name_or_file, path.read_text(encoding="utf-8"), name_or_file)
    if name_or_file.endswith((".yaml", ".yml")):
        try:
            return Recipe(Path(name_or_file).stem, Path(name_or_file).read_text(encoding="utf-8"), name_or_file)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the recipe file {name_or_file!r} cannot be read: {error}") from error
    near = difflib.get_close_matches(name_or_file, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names())}."
    raise ValueError(f"there is no recipe {name_or_file!r}; {hint} A file of your own must end in .yaml")


def build(name_or_file: str, *overrides: str) -> BuiltRecipe:
    """Build a recipe's Trainer, module and data module without running anything.

    Args:
        name_or_file: a recipe's name, or the path of a YAML file.
        *overrides: as on the command line: ``"--trainer.max_epochs=1"`` (the two dashes may be left out).

    Raises:
        ValueError: for an unknown recipe, or an override that the recipe does not accept.

    Example:
        >>> trainer, module, datamodule = build("quickstart", "trainer.max_epochs=1")
        >>> trainer.max_epochs
        1
    """
    from lightning_plugins.runner import RecipeCLI

    arguments = [override if override.startswith("--") else f"--{override}" for override in overrides]
    cli = RecipeCLI(find(name_or_file), arguments)
    return BuiltRecipe(cli.trainer, cli.model, cli.datamodule)
