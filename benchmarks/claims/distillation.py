r"""What is a distilled set worth? Fashion-MNIST in one image a class or more, at a size for CPUs.

    python benchmarks/claims/distillation.py --json benchmarks/results/distillation.json \
        --markdown docs/results/distillation.md

Each method distils a part of the training images, fresh ConvNet-3 are trained on the result alone under one protocol,
and their last accuracy on the test images is reported beside that of random real images under the same protocol.
Nothing is chosen on test images: settings are those of the preset, and for NCFM the smaller ones of the recipe
``distillation/ncfm``. ``--published`` is the size of the published tables, for a GPU: all images, networks of width
128, the iterations and settings of the presets, training for 1,000 epochs by the protocol that DC, DSA and DM have.

Claims. Each method beats random real images at the same budget. NCFM is not below distribution matching (the premise of
its paper), also where each image holds four (rho 2). The flip union (FYI) with classes chosen by its test is not below
NCFM without it, by more than 0.3 points, where networks are trained with random flips, as its paper has it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lightning_plugins import recipes
from lightning_plugins.distillation import preset_settings

MODULE = "model.init_args."
FLIPS = ", trained with flips"  # which the published protocol has for all
RHO_1: dict[str, Any] = {"rho": 1, "initialisation": "real", "flip": "off"}
RHO_2: dict[str, Any] = {"rho": 2, "initialisation": "mix", "flip": "off"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DC": ("dc", {}),
    "DSA": ("dsa", {}),
    "IDC, rho 2": ("idc", RHO_2),
    "DM": ("dm", {}),
    "DM, rho 2": ("dm", RHO_2),
    "NCFM": ("house", RHO_1),
    "NCFM, flip auto": ("house", RHO_1 | {"flip": "auto"}),
    "NCFM, rho 2": ("house", RHO_2),
    f"NCFM{FLIPS}": ("house", RHO_1),
    f"NCFM, flip auto{FLIPS}": ("house", RHO_1 | {"flip": "auto"}),
}
RECIPE = {"batch_real": 64, "num_frequencies": 256, "num_pairs": 3, "pretrain_epochs": 5, "learning_rate": 0.003}
OPERATIONS = ["color", "crop", "cutout", "flip", "scale", "rotate"]
SIZES: dict[bool, dict[str, Any]] = {
    False: {"width": 32, "pool": 6_000, "iterations": 200, "nets": 3, "steps": 500},
    True: {"width": 128, "pool": 60_000, "iterations": None, "nets": 5, "steps": None},
}

SMALLER = " Published tables have width 128, all images and up to 200,000 iterations: these figures do not compare."


def run(method: str, images: int, seed: int, size: dict[str, Any], root: str) -> dict[str, float]:
    """Distil and evaluate; return accuracies in percent."""
    preset, changes = METHODS[method]
    if preset == "house" and not size["published"]:
        changes = RECIPE | changes
    flips = method.endswith(FLIPS)
    own = preset_settings(preset, images_per_class=images, in_channels=1, image_size=28).iterations
    protocol = "protocol=vico" if size["steps"] is None else f"protocol.steps={size['steps']}"
    with tempfile.TemporaryDirectory() as folder:
        built = recipes.build(
            "distillation/ncfm",
            f"seed_everything={seed}",
            "data.class_path=lightning_plugins.data.FashionMNISTDataModule",
            f"data.init_args.root={root}",
            f"data.init_args.val_fraction={1 - size['pool'] / 60_000}",
            f"{MODULE}model_args.width={size['width']}",
            f"{MODULE}images_per_class={images}",
            f"{MODULE}iterations_per_epoch={size['iterations'] or own}",
            f"{MODULE}images_every_n_epochs=null",
            f"{MODULE}preset={preset}",
            f"{MODULE}settings=null",
            f"{MODULE}settings={json.dumps(changes)}",
            f"trainer.callbacks.init_args.num_nets={size['nets']}",
            f"trainer.callbacks.init_args.{protocol}",
            *([f"trainer.callbacks.init_args.protocol.operations={json.dumps(OPERATIONS)}"] if flips else []),
            f"trainer.callbacks.init_args.seed={seed}",
            "trainer.max_epochs=1",
            "trainer.limit_val_batches=0",
            f"trainer.default_root_dir={folder}",
            "trainer.logger=false",
            "trainer.enable_checkpointing=false",
            "trainer.enable_progress_bar=false",
            "trainer.enable_model_summary=false",
        )
        start = time.monotonic()
        built.trainer.fit(built.module, datamodule=built.datamodule)
        built.trainer.test(built.module, datamodule=built.datamodule, verbose=False)
    found = {name.removeprefix("test/"): 100 * float(value) for name, value in built.trainer.callback_metrics.items()}
    kept = {
        name: found[name] for name in ("distilled_acc", "distilled_acc_std", "random_acc", "mix_acc") if name in found
    }
    return kept | {"seconds": round(time.monotonic() - start)}


def values(runs: dict[str, Any], method: str, images: int, key: str) -> list[float]:
    """One figure of each finished seed."""
    return [found[key] for name, found in runs.items() if name.startswith(f"{method}|{images}|") and key in found]


def cell(numbers: list[float]) -> str:
    """Mean and standard deviation."""
    if not numbers:
        return ""
    return f"{statistics.fmean(numbers):.1f}" + (f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else "")


def paired(runs: dict[str, Any], images: int, method: str, other: str) -> list[float]:
    """Points that one method's sets are worth more than another's, by seed."""
    accuracies = [
        {name.split("|")[2]: run["distilled_acc"] for name, run in runs.items() if name.startswith(f"{each}|{images}|")}
        for each in (method, other)
    ]
    return [accuracies[0][seed] - accuracies[1][seed] for seed in accuracies[0].keys() & accuracies[1].keys()]


def verdicts(runs: dict[str, Any], budgets: list[int], *, published: bool) -> dict[str, str]:
    """What the runs say of the claims."""
    result = {}
    for images in budgets:
        gains = {
            name: statistics.fmean(found) - statistics.fmean(values(runs, name, images, "random_acc"))
            for name in METHODS
            if (found := values(runs, name, images, "distilled_acc"))
        }
        if gains:
            worst, best = min(gains, key=lambda name: gains[name]), max(gains, key=lambda name: gains[name])
            result[f"{images} a class: each method beats random images"] = (
                f"{'holds' if gains[worst] > 0 else 'does not hold'}: {worst} by {gains[worst]:.1f} points, {best} by "
                f"{gains[best]:.1f}"
            )
        union = "NCFM, flip auto"
        flips = (union, "NCFM", 0.3) if published else (f"{union}{FLIPS}", f"NCFM{FLIPS}", 0.3)
        pairs = (("NCFM", "DM", 0.0), ("NCFM, rho 2", "DM, rho 2", 0.0), flips)
        for name, other, margin in pairs:
            if found := paired(runs, images, name, other):
                holds = "holds" if statistics.fmean(found) >= -margin else "does not hold"
                result[f"{images} a class: {name} is not below {other}"] = f"{holds}: {cell(found)} points"
    return result


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all")
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--published", action="store_true", help="the size of the published tables, for a GPU")
    parser.add_argument("--width", type=int, help="of the ConvNet-3, for another size")
    parser.add_argument("--pool", type=int, help="training images to distil")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--steps", type=int, help="of each evaluated network")
    parser.add_argument("--nets", type=int)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; runs that it holds are kept")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    methods = options.methods or [name for name in METHODS if not (options.published and name.endswith(FLIPS))]
    size = {"published": options.published} | SIZES[options.published]
    size |= {name: value for name in size if (value := getattr(options, name)) is not None}
    runs: dict[str, Any] = {}
    said: dict[str, str] = {}
    if options.json and options.json.exists():
        old = json.loads(options.json.read_text())
        runs = old["runs"] if old["settings"] == size else {}
    for images in options.images:
        for seed in options.seeds:
            for method in methods:
                key = f"{method}|{images}|{seed}"
                if key not in runs:
                    runs[key] = run(method, images, seed, size, options.root)
                    print(key, runs[key], flush=True)
                said = verdicts(runs, options.images, published=options.published)
                if options.json:
                    found = {"settings": size, "runs": runs, "verdicts": said}
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
    length = f"{size['steps']} steps, augmentation without flips where not said" if size["steps"] else "1,000 epochs"
    lines = ["| images a class | method | distilled, % | random real, % | seeds |", "| --- | --- | --- | --- | --- |"]
    for images in options.images:
        for method in METHODS:
            accuracy = values(runs, method, images, "distilled_acc")
            if accuracy:
                random = values(runs, method, images, "random_acc")
                lines.append(f"| {images} | {method} | {cell(accuracy)} | {cell(random)} | {len(accuracy)} |")
    lines += ["", "| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in said.items()]
    lines += [
        "",
        f"*Fashion-MNIST, {size['pool']:,} training images, ConvNet-3 of width {size['width']}, "
        f"{size['iterations'] or 'as many as the preset has'} iterations; {size['nets']} fresh networks, "
        f"{length}, last accuracy on the 10,000 test images; mean ± standard deviation over seeds."
        f"{'' if size['published'] else SMALLER} {platform.machine()} CPU, one thread; {datetime.now(UTC).date()}; "
        f"torch {torch.__version__}, lightning-plugins {importlib.metadata.version('lightning-plugins')}.*",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
