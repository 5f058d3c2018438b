"""Networks that nobody here wrote: scored, allocated, quantized, exported and run."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import nn
from torchvision import models

from lightning_plugins.quantization import (
    allocate_bits,
    convert_,
    export_onnx,
    plan_cost,
    post_training_quantize,
    quantized_layers,
    score_layers,
)


def vision_transformer() -> nn.Module:
    """``vit_b_16`` in all but its size."""
    net = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(net.heads.head.weight, std=0.1)  # torchvision starts it at 0, which gives equal logits
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
    "resnet18": lambda: models.resnet18(num_classes=10),
    "vision transformer": vision_transformer,
}


# Batch normalisations of a net that was never trained leave nothing of its inputs, so they see some data first.
@pytest.mark.filterwarnings("ignore:AdaQuant|the Gauss-Newton matrix stands in")
@pytest.mark.parametrize("name", NETS)
def test_from_scores_to_onnxruntime(tmp_path, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]()
        images, labels = torch.rand(12, 3, 32, 32), torch.arange(12) % 10
        with torch.no_grad():
            for _ in range(20):
                net(images)
    net.eval()
    batches = [(images, labels)]
    tables = {
        method: score_layers(net, method, batches, bits=(8, 4), num_probes=2, tolerance=0)
        for method in ("hawq-v2", "zd")
    }
    net = convert_(net, (8, 4, 32))
    for table in tables.values():
        assert table.layers.keys() == quantized_layers(net).keys()
        plan = allocate_bits(table, budget=6.0)
        assert plan_cost(table, plan) <= 6.0
    report = post_training_quantize(net, batches, plan, pipeline="light")
    assert report.average_bits <= 6.0
    path = export_onnx(net, tmp_path / "net.onnx", bits=plan, example_input=images[:2])
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = net(images)
    assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    assert session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})[0].shape == (1, 10)
