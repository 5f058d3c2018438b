r"""How an exported int8 graph runs in onnxruntime: agreement on 10,000 real images, and time as a ratio to fp32.

    python benchmarks/speed/onnx_export.py --json benchmarks/results/onnx_export.json \
        --markdown docs/results/onnx_export.md

ResNet-20 is trained briefly on Fashion-MNIST at 8 and 4 bits, with and without quantizers of what enters the residual
sums. Each net is exported at both precisions; onnxruntime, with its default optimisation, classifies the 10,000 test
images, and the share on which it agrees with the torch net in evaluation is reported. Then the graphs run in turn
on one thread, in an order that rotates from round to round: best wall time of each over that of the fp32 graph.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import onnxruntime
import torch
from interleaved import Contender, environment, measure, write
from tables import onnx_export as markdown
from torch import Tensor, nn

from lightning_plugins.callbacks import MultiPrecisionQAT
from lightning_plugins.data import FashionMNISTDataModule
from lightning_plugins.models import resnet20
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import export_onnx, switch_

BITS = (8, 4)


def train(options: argparse.Namespace, data: FashionMNISTDataModule, *, residual: bool) -> nn.Module:
    """Return a briefly trained net."""
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier(
        resnet20(in_channels=1, width=options.width),
        num_classes=10,
        mean=data.mean,
        std=data.std,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )
    trainer = pl.Trainer(
        max_steps=options.steps,
        callbacks=[MultiPrecisionQAT(BITS, alrs="frozen", quantize_residual=residual)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return module.eval()


def session(path: Path, threads: int, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """Open a graph with onnxruntime's default optimisation."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def logits(run: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    """Run a graph."""
    (output,) = run.run(None, {run.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)


def agreement(
    module: nn.Module, run: onnxruntime.InferenceSession, data: FashionMNISTDataModule
) -> tuple[float, float]:
    """Return the share of test images on which torch and onnxruntime agree, and onnxruntime's accuracy, in percent."""
    same = right = total = 0
    with torch.no_grad():
        for images, labels in data.test_dataloader():
            found = logits(run, images).argmax(1)
            same += int((found == module(images).argmax(1)).sum())
            right += int((found == labels).sum())
            total += len(labels)
    return 100 * same / total, 100 * right / total


def fp32_graph(options: argparse.Namespace, folder: Path, example: Tensor) -> Path:
    """Export the plain net."""
    path = folder / "fp32.onnx"
    net = resnet20(in_channels=1, width=options.width).eval()
    batch = torch.export.Dim("batch")
    torch.onnx.export(net, (example,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False)
    return path


def main() -> None:
    """Train, export, compare, measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data; Debian's package is found by itself")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = FashionMNISTDataModule(root=options.root, batch_size=128)
    data.setup("test")
    images = torch.rand(options.batch_size, 1, 28, 28)
    contenders: dict[str, Contender] = {}
    details: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = fp32_graph(options, folder, images)
        graphs = {"fp32": session(path, 1)}
        details["fp32"] = {"kilobytes": path.stat().st_size / 1000}
        for residual in (False, True):
            module = train(options, data, residual=residual)
            for bits in BITS:
                title = f"{bits} bits, sums quantized" if residual else f"{bits} bits"
                path = export_onnx(module, folder / f"{title}.onnx", bits=bits, example_input=images)
                optimized = folder / "optimized.onnx"
                graphs[title] = session(path, 1, optimized)
                same, right = agreement(switch_(module, bits), graphs[title], data)
                nodes = Counter(node.op_type for node in onnx.load(optimized).graph.node)
                details[title] = {
                    "agreement": same,
                    "accuracy": right,
                    "kilobytes": path.stat().st_size / 1000,
                    "nodes": dict(nodes),
                }
                print(f"{title:24} agrees on {same:.2f} %, accuracy {right:.2f} %, {dict(nodes)}", flush=True)
        for title, run in graphs.items():
            contenders[title] = lambda run=run: logits(run, images)
        rows = measure(contenders, options.rounds)
    for title, row in rows.items():
        row |= details[title]
        print(f"{title:24}{row['wall_ratio']:7.2f}{row['wall_ms']:9.1f} ms{row['cpu_ratio']:7.2f}")
    report = {
        "environment": environment("onnxruntime", "onnx"),
        "setting": f"ResNet-20 of width {options.width}, {options.batch_size} x 1 x 28 x 28, 1 thread, best of "
        f"{options.rounds} rounds; trained for {options.steps} steps; 10,000 test images of Fashion-MNIST",
        "rows": rows,
    }
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
