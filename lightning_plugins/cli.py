"""``lightning-plugins {list, show, copy, run}``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning_plugins import __version__

__all__ = ["main"]


# What is said about every recipe and nobody can act on: small data sets need no workers, ImageClassifier looks at
# batches before they move to the device, and Lightning calls a deprecated function of torch.
_NOISE = (
    "The '.*_dataloader' does not have many workers",
    "You have overridden `on_before_batch_transfer` in `LightningModule`",
    ".*isinstance.treespec, LeafSpec.. is deprecated",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return int(arguments.function(arguments, overrides))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-plugins",
        description="Training methods from the literature as parts that snap onto a PyTorch Lightning Trainer.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-plugins {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,show,copy,run}")

    command = commands.add_parser("list", help="list the recipes", allow_abbrev=False)
    command.set_defaults(function=_list)

    command = commands.add_parser("show", help="print a recipe", allow_abbrev=False)
    command.add_argument("name", help="a recipe's name")
    command.set_defaults(function=_show)

    command = commands.add_parser("copy", help="hand a recipe over as a file of your own", allow_abbrev=False)
    command.add_argument("name", help="a recipe's name")
    command.add_argument("file", type=Path, help="where to write it; must not exist yet")
    command.set_defaults(function=_copy)

    command = commands.add_parser(
        "run",
        help="train, test, export and report",
        description="Train, test, export and report into ROOT/<recipe>/<time>/.",
        epilog="Everything else overrides the recipe, in LightningCLI form: --trainer.max_epochs 3, "
        "--data.class_path lightning_plugins.data.FashionMNISTDataModule, --model.init_args.model_args.width 16.",
        allow_abbrev=False,
    )
    command.add_argument("name", metavar="NAME_OR_FILE", help="a recipe's name, or a YAML file")
    command.add_argument(
        "--logger",
        choices=("csv", "tensorboard", "wandb"),
        default="csv",
        help="where metrics and pictures go besides the run's folder (default: nowhere else)",
    )
    command.add_argument(
        "--resume", metavar="PATH", help="go on from a checkpoint, or from the last one of a run's folder"
    )
    command.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="train nothing: test these weights, a checkpoint or the last one of a run's folder, whose module and data "
        "then take the place of the recipe's",
    )
    command.add_argument("--root", default="runs", help="folder of all runs (default: %(default)s)")
    command.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    command.set_defaults(function=_run)
    return parser


def _list(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from lightning_plugins import recipes

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe", "what it does", "needs", "takes"):
        table.add_column(column, no_wrap=column == "recipe", overflow="fold")
    for name in recipes.names():
        header = recipes.find(name).header()
        table.add_row(name, header.get("", ""), header.get("Needs", ""), header.get("Takes", ""))
    Console().print(table)
    return 0


def _show(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from lightning_plugins import recipes

    try:
        sys.stdout.write(recipes.find(arguments.name).text)
    except ValueError as error:
        return _fail(error)
    return 0


def _copy(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from lightning_plugins import recipes

    try:
        text = recipes.find(arguments.name).text
        with arguments.file.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return _fail(f"{arguments.file} exists already; choose another name")
    except (ValueError, OSError) as error:
        return _fail(error)
    print(f"wrote {arguments.file}; run it with: lightning-plugins run {arguments.file}")
    return 0


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from lightning_plugins import recipes

    try:
        recipe = recipes.find(arguments.name)  # before torch is imported: a typing error is answered at once
    except ValueError as error:
        return _fail(error)
    from rich.console import Console

    with Console(stderr=True).status("loading torch and Lightning"):  # many seconds; a log file gets nothing of it
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from lightning_plugins.runner import RunInterrupted, run

    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message)
            run_dir = run(
                recipe,
                overrides,
                logger=arguments.logger,
                resume=arguments.resume,
                weights=arguments.checkpoint,
                root=arguments.root,
            )
    except RunInterrupted as interruption:
        print(f"\n{interruption}", file=sys.stderr)
        return interruption.code
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        if arguments.traceback:
            raise
        return _fail(error)
    _print_results(run_dir)
    return 0


def _print_results(run_dir: Path) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    file = run_dir / "results.json"
    if not file.exists():  # a further process of a distributed run
        return
    results = json.loads(file.read_text())
    metrics = {name: value for name, value in results["metrics"].items() if name.startswith("test/")}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("test metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4f}")
    console = Console()
    console.print(table)
    console.print(f"\nreport: {run_dir / 'report.html'}", soft_wrap=True)


def _fail(error: Exception | str) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)  # some libraries' messages span lines
    return 1
