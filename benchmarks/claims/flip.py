r"""Does the flip union help where its premise holds, and what does ``auto`` do where it does not?

    python benchmarks/claims/flip.py --json benchmarks/results/flip.json --markdown docs/results/flip.md

The shapes of ``ShapesDataModule`` are distilled into one image per class with and without the flip union (FYI), and
fresh ConvNet-3 are trained on the images under the house protocol, with random flips in it and without. The seeds of
the images, the networks and the training are the same for all modes, so the differences are paired. A second set of
shapes faces one way only. What ``auto`` decides is a matter of the data alone: its figure is printed for both sets and,
where the files are at hand, for the training images of Fashion-MNIST.

Claim. Where each class faces both ways equally often, the union on the synthetic side helps by more than its spread:
the mean of the paired differences is above their standard deviation over the seeds, in training with flips.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
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
from lightning_plugins.data import FashionMNISTDataModule, ShapesDataModule
from lightning_plugins.distillation import PROTOCOLS, ClassPool, FlipUnion, Protocol, evaluate_set
from lightning_plugins.distillation.evaluation import baseline_sets

MODULE = "model.init_args."
METHODS: dict[str, tuple[str, ...]] = {
    "DM": (),
    "NCFM": (
        f"{MODULE}preset=house",
        f"{MODULE}settings.rho=1",
        f"{MODULE}settings.initialisation=real",
        f"{MODULE}settings.num_frequencies=256",
        f"{MODULE}settings.num_pairs=3",
        f"{MODULE}settings.pretrain_epochs=5",
        f"{MODULE}settings.learning_rate=0.003",
    ),
}
MODES = ("off", "synthetic", "both")
SETS = {"both ways": 0.5, "one way": 0.0}  # share of mirrored images
# On shapes that face one way there is nothing to find out about more than one method.
RUNS = [("both ways", method, mode) for method in METHODS for mode in MODES]
RUNS += [("one way", "DM", mode) for mode in ("off", "synthetic")]


def protocols(steps: int) -> dict[str, Protocol]:
    """The house protocol, and the same without flips."""
    flips = PROTOCOLS["house"].resized(steps=steps)
    operations = tuple(name for name in flips.operations if name != "flip")
    return {"flips": flips, "no flips": Protocol("house, no flips", steps=steps, operations=operations)}


def run(which: str, method: str, mode: str, seed: int, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Distil and evaluate; return accuracies in percent. The modes share the trained networks in ``cache``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        built = recipes.build(
            "distillation/flip",
            f"seed_everything={seed}",
            f"data.init_args.mirrored={SETS[which]}",
            f"{MODULE}model_args.width={options.width}",
            f"{MODULE}iterations_per_epoch={options.iterations}",
            f"{MODULE}images_every_n_epochs=0",
            f"{MODULE}seed={seed}",
            f"{MODULE}extractors_path={cache / f'extractors-{seed}.safetensors'}",
            *METHODS[method],
            f"{MODULE}settings.flip={mode}",
            "trainer.callbacks=null",
            "trainer.max_epochs=1",
            "trainer.limit_val_batches=0",
            f"trainer.default_root_dir={folder}",
            "trainer.logger=false",
            "trainer.enable_checkpointing=false",
            "trainer.enable_progress_bar=false",
            "trainer.enable_model_summary=false",
        )
        built.trainer.fit(built.module, datamodule=built.datamodule)
    module: Any = built.module
    data: Any = built.datamodule
    data.setup("test")
    test = ClassPool.from_dataset(data.test_set)
    distilled = module.synthetic.clamp_()
    sets = {"distilled": distilled}
    if (method, mode) == ("DM", "off"):  # all others would start from the same real images
        sets |= baseline_sets(distilled, module.real_images(built.trainer), seed=seed)
    found: dict[str, Any] = {}
    for name, protocol in protocols(options.steps).items():
        for source, images in sets.items():
            result = evaluate_set(
                images, test, module.net_factory(), protocol=protocol, num_nets=options.nets, seed=seed
            ).distilled
            found[f"{source}, {name}"] = 100 * result.mean
            found[f"{source}, {name}, per class"] = [round(100 * value, 1) for value in result.per_class]
    return found | {"seconds": round(time.monotonic() - start)}


def values(runs: dict[str, Any], which: str, method: str, mode: str, key: str) -> list[float]:
    """One figure of each finished seed, in the order of the seeds."""
    prefix = f"{which}|{method}|{mode}|"
    names = sorted((name for name in runs if name.startswith(prefix)), key=lambda name: int(name.split("|")[3]))
    return [runs[name][key] for name in names]


def gains(runs: dict[str, Any], which: str, method: str, mode: str, protocol: str) -> list[float]:
    """Paired differences to the mode off, over the seeds that have both."""
    key = f"distilled, {protocol}"
    result = []
    for name, found in runs.items():
        kind, how, flip, seed = name.split("|")
        other = runs.get(f"{which}|{method}|off|{seed}")
        if (kind, how, flip) == (which, method, mode) and other is not None:
            result.append(found[key] - other[key])
    return result


def spread(numbers: list[float]) -> str:
    """Mean and standard deviation."""
    if not numbers:
        return ""
    return f"{statistics.fmean(numbers):.1f}" + (f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else "")


def verdicts(runs: dict[str, Any]) -> dict[str, str]:
    """What the runs say of the claim, and of its negative."""
    result = {}
    for which, method, mode in RUNS:
        found = gains(runs, which, method, mode, "flips")
        if mode == "off" or len(found) < 2:
            continue
        mean, deviation = statistics.fmean(found), statistics.stdev(found)
        words = f"{mean:+.1f} ± {deviation:.1f} points over {len(found)} seeds, with flips in training"
        if which == "both ways":
            name = f"shapes facing both ways, {method}: flip {mode} helps by more than its spread"
            result[name] = ("holds: " if mean > deviation else "does not hold: ") + words
        else:
            name = f"shapes facing one way, {method}: flip {mode} does no harm beyond its spread"
            result[name] = ("holds: " if mean > -deviation else "does not hold: ") + words
    return result


def decisions(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Detectability of a mirror image in each class, and the classes that ``auto`` leaves out."""
    data: dict[str, Any] = {
        f"shapes, {which}": ShapesDataModule(val_fraction=0, mirrored=share) for which, share in SETS.items()
    }
    data["Fashion-MNIST"] = FashionMNISTDataModule(root=options.root, val_fraction=0)
    found = {}
    for name, module in data.items():
        try:
            images, labels = module.load("train")
        except FileNotFoundError:
            print(f"{name} is not at hand and left out", flush=True)
            continue
        pool = ClassPool(images, labels, mean=module.mean, std=module.std)
        flip = FlipUnion("auto").fit(pool.class_images(label) for label in range(pool.num_classes))
        assert flip.detectability is not None
        flipped = flip.flipped_classes(pool.num_classes)
        found[name] = {
            "classes": list(module.class_names),
            "detectability": [round(value, 3) for value in flip.detectability.tolist()],
            "left out": [label for label in range(pool.num_classes) if label not in flipped],
        }
    return found


def table(runs: dict[str, Any], decided: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Everything as markdown."""
    lines = [
        "| shapes | method | flip | trained with flips, % | gain | trained without, % | gain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for which in SETS:
        random = [spread(values(runs, which, "DM", "off", f"random, {name}")) for name in protocols(options.steps)]
        lines.append(f"| {which} | random real images |  | {random[0]} |  | {random[1]} |  |")
        for kind, method, mode in RUNS:
            if kind != which:
                continue
            cells = []
            for protocol in protocols(options.steps):
                found = gains(runs, which, method, mode, protocol)
                cells.append(spread(values(runs, which, method, mode, f"distilled, {protocol}")))
                cells.append("" if mode == "off" or not found else f"+{spread(found)}".replace("+-", "-"))
            lines.append(f"| {which} | {method} | {mode} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | verdict |", "| --- | --- |"]
    lines += [f"| {claim} | {verdict} |" for claim, verdict in verdicts(runs).items()]
    lines += [
        "",
        "| data | how often a mirror image can be told, by class | left out by `auto` |",
        "| --- | --- | --- |",
    ]
    for name, found in decided.items():
        pairs = zip(found["classes"], found["detectability"], strict=True)
        shares = ", ".join(f"{label} {share:.2f}" for label, share in pairs)
        out = ", ".join(found["classes"][label] for label in found["left out"]) or "none"
        lines.append(f"| {name} | {shares} | {out} |")
    lines += [
        "",
        f"*Ten shapes of 16x16 pixels, 1,800 training images, one image a class, ConvNet-3 of width {options.width}, "
        f"{options.iterations} iterations; {options.nets} fresh networks, {options.steps} steps, last accuracy on "
        f"1,000 test images; {len(options.seeds)} seeds, mean ± standard deviation, gains paired by seed. `auto` is "
        f"`synthetic` where it leaves no class out. {datetime.now(UTC).date()}; "
        f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, lightning-plugins "
        f"{importlib.metadata.version('lightning-plugins')}.*",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST; Debian's package is found by itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--steps", type=int, default=200, help="of each evaluated network")
    parser.add_argument("--nets", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the numbers to; runs that it holds are kept")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {name: getattr(options, name) for name in ("width", "iterations", "steps", "nets")}
    runs: dict[str, Any] = {}
    if options.json and options.json.exists():
        old = json.loads(options.json.read_text())
        runs = old["runs"] if old["settings"] == settings else {}
    decided = decisions(options)
    with tempfile.TemporaryDirectory() as cache:
        for seed, (which, method, mode) in itertools.product(options.seeds, RUNS):
            key = f"{which}|{method}|{mode}|{seed}"
            if key not in runs:
                runs[key] = run(which, method, mode, seed, Path(cache), options)
                print(key, {name: v for name, v in runs[key].items() if "per class" not in name}, flush=True)
            if options.json:
                found = {"settings": settings, "runs": runs, "auto": decided, "verdicts": verdicts(runs)}
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    text = table(runs, decided, options)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
