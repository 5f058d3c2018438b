r"""Networks that nobody here wrote, unchanged: scored, allocated, quantized, packed, exported to ONNX and run.

    python benchmarks/claims/third_party.py --json benchmarks/results/third_party.json \
        --markdown docs/results/third_party.md

torchvision's ``mobilenet_v3_small``, ``resnet18`` and ``vit_b_16`` as they come from the package, at 224 x 224 pixels
and 1,000 classes, with random weights (no trained ones can be downloaded here), so the table says what works and what
it costs and nothing about accuracy. Batch normalisations first see a few batches, without which a random net gives
equal logits for all images. Each net is scored (Hessian traces, ``vit_b_16`` by the data-free ``zd``), given 6 bits a
weight on average out of 8 and 4, quantized after training on a few images, written to a packed file and read into a
fresh net, exported to ONNX and run by onnxruntime, whose classes and logits are held against ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn
from torchvision import models

from lightning_plugins.quantization import (
    allocate_bits,
    convert_,
    export_onnx,
    load_packed,
    post_training_quantize,
    save_packed,
    score_layers,
)

# The plan is made from the first. GELU, softmax and layer normalisation leave no piecewise linear layer, so traces of a
# transformer take a double backward pass for each layer and probe, which is long at this size.
NETS = {"mobilenet_v3_small": ("hawq-v2", "zd"), "resnet18": ("hawq-v2", "zd"), "vit_b_16": ("zd",)}
BITS = (8, 4)


def network(name: str) -> nn.Module:
    """The net as torchvision builds it; the head of ``vit_b_16``, which starts at zero, gets random weights."""
    torch.manual_seed(0)
    net: nn.Module = getattr(models, name)()
    if name == "vit_b_16":
        nn.init.normal_(net.heads.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    return net


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take one net all the way."""
    begun = time.perf_counter()
    net = network(name)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(options.images, 3, 224, 224, generator=generator)
    with torch.no_grad():
        for batch in torch.rand(5, options.images, 3, 224, 224, generator=generator):
            net.train()(batch)
    net.eval()
    batches = [(images, torch.arange(options.images))]
    seconds, tables = {}, {}
    for method in NETS[name]:
        start = time.perf_counter()
        tables[method] = score_layers(net, method, batches, bits=BITS, num_probes=options.probes, tolerance=0)
        seconds[method] = time.perf_counter() - start
    fp32 = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    plan = allocate_bits(next(iter(tables.values())), budget=6.0)
    net = convert_(net, (*BITS, 32))
    report = post_training_quantize(net, batches, plan, pipeline="light")
    net.eval()
    with torch.no_grad():
        expected = net(images)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "net.safetensors")
        save_packed(net, packed, plan=plan)
        loaded = load_packed(packed, network(name))
        with torch.no_grad():
            same = torch.equal(loaded(images), expected)
        path = Path(export_onnx(net, Path(folder, "net.onnx"), bits=plan, example_input=images[:2]))
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        sizes = {"packed": packed.stat().st_size, "onnx": sum(f.stat().st_size for f in path.parent.glob("net.onnx*"))}
    found = torch.from_numpy(logits)
    return {
        "layers": len(tables["zd"].layers),
        "average_bits": report.average_bits,
        "bytes": {"fp32": fp32} | sizes,
        "packed_is_equal": same,
        "onnx_agreement": float((found.argmax(1) == expected.argmax(1)).float().mean()),
        "onnx_difference": float((found - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm()),
        "seconds": seconds | {"all": time.perf_counter() - begun},
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the documentation's table."""
    lines = [
        "| net | layers | bits a weight | fp32, MB | packed, MB | ONNX, MB | packed file gives the same logits | "
        "onnxruntime: same class | logits apart |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in report["nets"].items():
        sizes = " | ".join(f"{row['bytes'][kind] / 1e6:.1f}" for kind in ("fp32", "packed", "onnx"))
        lines.append(
            f"| {name} | {row['layers']} | {row['average_bits']:.2f} | {sizes} | "
            f"{'yes' if row['packed_is_equal'] else 'no'} | {100 * row['onnx_agreement']:.0f} % | "
            f"{100 * row['onnx_difference']:.2f} % |"
        )
    lines += ["", f"*{report['setting']}; {report['date'][:10]}; {report['machine']}.*"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all nets, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--probes", type=int, default=4, help="of the Hessian traces")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nets = {}
    for name in options.nets:
        nets[name] = run(name, options)
        print(name, nets[name], flush=True)
    packages = ("torch", "torchvision", "onnxruntime", "lightning-plugins")
    report = {
        "setting": f"random weights, {options.images} random images of 224 x 224 pixels, {options.probes} probes",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} CPU, one thread; "
        + ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
        "nets": nets,
    }
    print(markdown(report))
    for path, text in {options.json: json.dumps(report, indent=1) + "\n", options.markdown: markdown(report)}.items():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
