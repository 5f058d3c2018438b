r"""What quantization-aware training costs, as ratios to the fp32 training step of the same net.

    python benchmarks/speed/quantization.py --compile --rounds 15 --json benchmarks/results/speed_quantization.json \
        --markdown docs/results/speed_quantization.md
    python benchmarks/speed/quantization.py     # without the compiled nets: a minute

ResNet-20 of width 16 on batches of 128; a step is forward, backward and SGD. Contenders run in turn, in an order that
rotates from round to round. Two ratios are printed for each: best wall time over the fp32 step's best wall time, and
median CPU time over its. Weights and inputs of every convolution and linear layer are quantized. Peers (brevitas,
torchao, NVIDIA ModelOpt) take part where they are installed: ``pip install lightning-plugins[bench]``. The scales of
ModelOpt stay where its calibration puts them, those of torchao follow the data, brevitas' and ours are learned. Peak
memory is that of all live tensors. On a busy machine threads that wait for each other spoil the ratios; the JSON holds
the load.
"""

from __future__ import annotations

import argparse
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Contender, add_peer, environment, measure, write
from tables import quantization as markdown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import convert_, switch_
from lightning_plugins.quantization import quantizers as ours

BITS = (8, 6, 4, 2)


def make_batch(size: int, channels: int, number: int = 128) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, channels, size, size, generator=generator)
    return images, torch.randint(10, (number,), generator=generator)


def trainer_of(
    net: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    batch: tuple[Tensor, Tensor],
    prepare: list[Callable[[], Any]],
) -> Contender:
    """Return a training step: for each of ``prepare``, call it and add that loss's gradients; then step once."""
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        for before in prepare:
            before()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def at(model: nn.Module, bits: int) -> Callable[[], Any]:
    """Return what switches the model, unless it stands there already."""
    return lambda: switch_(model, bits)


def converted(channels: int, batch: tuple[Tensor, Tensor]) -> nn.Module:
    """Our net at all precisions, its scales set."""
    torch.manual_seed(0)
    model = convert_(resnet20(in_channels=channels), BITS, first_last_bits=2)
    with torch.no_grad():
        for bits in BITS:
            switch_(model, bits)(batch[0])
    return model


def plain_operations(step: Contender) -> Contender:
    """Run a step with the same quantizers written as a chain of differentiable operations."""

    class Composed:
        apply = staticmethod(lambda v, s, b, h, signed, exact: ours._composed(v, s, b, h, signed=signed, exact=exact))

    def run() -> None:
        kept = ours._FakeQuantize, ours._needs_composition
        ours._FakeQuantize, ours._needs_composition = Composed, lambda *_: True  # type: ignore[assignment, misc]
        try:
            step()
        finally:
            ours._FakeQuantize, ours._needs_composition = kept  # type: ignore[misc]

    return run


def brevitas_net(channels: int) -> nn.Module:
    """The same net from brevitas' layers: 4-bit weights and 8-bit inputs, learned scales."""
    from brevitas import nn as qnn
    from brevitas.inject.enum import RestrictValueType, ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    class Weight(Int8WeightPerChannelFloat):
        bit_width = 4
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        restrict_scaling_type = RestrictValueType.FP

    class Unsigned(Uint8ActPerTensorFloat):
        collect_stats_steps = 1  # else the first 300 steps measure statistics, at twice the cost

    class Signed(Int8ActPerTensorFloat):
        collect_stats_steps = 1

    torch.manual_seed(0)
    model = resnet20(in_channels=channels)
    for name, module in list(model.named_modules()):
        act = Signed if name == "stem.0" else Unsigned
        if isinstance(module, nn.Conv2d):
            new: nn.Module = qnn.QuantConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                bias=False,
                weight_quant=Weight,
                input_quant=act,
            )
        elif isinstance(module, nn.Linear):
            new = qnn.QuantLinear(
                module.in_features, module.out_features, bias=True, weight_quant=Weight, input_quant=act
            )
        else:
            continue
        new.load_state_dict(module.state_dict(), strict=False)
        model.set_submodule(name, new)
    return model


def torchao_net(batch: tuple[Tensor, Tensor], channels: int) -> nn.Module:
    """The same net through torchao's PT2E flow with its 8-bit quantizer for x86."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    exported = torch.export.export(resnet20(in_channels=channels), (batch[0],)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    model: nn.Module = allow_exported_model_train_eval(prepare_qat_pt2e(exported, quantizer))
    model.train()
    return model


def modelopt_net(batch: tuple[Tensor, Tensor], channels: int) -> nn.Module:
    """The same net through NVIDIA ModelOpt's 8-bit configuration for convolutional nets."""
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    configuration = {
        **mtq.INT8_DEFAULT_CFG,
        "quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], {"quantizer_name": "*pool*", "enable": False}],
    }
    model: nn.Module = mtq.quantize(resnet20(in_channels=channels), configuration, lambda net: net(batch[0]))
    return model.train()


def steps(
    channels: int, batch: tuple[Tensor, Tensor], *, compiled: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the fp32 step first, then all others; and which peers are left out, and why."""
    torch.manual_seed(0)
    fp32 = resnet20(in_channels=channels)

    def make(net: Callable[[Tensor], Tensor], model: nn.Module, *bits: int) -> Contender:
        return trainer_of(net, list(model.parameters()), batch, [at(model, b) for b in bits] or [lambda: None])

    contenders = {"fp32": make(fp32, fp32)}
    for name, bits in {
        "ours, 8 bits": (8,),
        "ours, 4 bits": (4,),
        "ours, 2 bits": (2,),
        "ours, 8+6+4+2 bits": BITS,
    }.items():
        model = converted(channels, batch)
        contenders[name] = make(model, model, *bits)
    model = converted(channels, batch)
    contenders["plain operations, 4 bits"] = plain_operations(make(model, model, 4))
    peers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "brevitas, 4-bit weights, 8-bit inputs": ("brevitas", lambda: brevitas_net(channels)),
        "torchao PT2E, 8 bits": ("torchao", lambda: torchao_net(batch, channels)),
        "ModelOpt, 8 bits, fixed scales": ("modelopt", lambda: modelopt_net(batch, channels)),
    }
    left_out: dict[str, str] = {}
    for name, (package, build) in peers.items():
        left_out |= add_peer(contenders, name, [package], lambda build=build: make(peer := build(), peer))
    if compiled:
        plain = resnet20(in_channels=channels)
        contenders["fp32, compiled"] = make(torch.compile(plain), plain)
        for bits in (8, 4):
            model = converted(channels, batch)
            contenders[f"ours, {bits} bits, compiled"] = make(torch.compile(model), model, bits)
    return contenders, left_out


class LiveTensors(TorchDispatchMode):
    """Follows the bytes of all tensors that are alive, and their peak.

    Not the process's memory: with several passes a step, glibc's heap grows holes for every net, also in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := id(storage := tensor.untyped_storage())) not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, storage.nbytes())
        return output

    def forget(self, key: int, size: int) -> None:
        """Take a tensor's bytes off when it dies."""
        self.known.discard(key)
        self.now -= size


def peak_memory(model: nn.Module, batch: tuple[Tensor, Tensor], bits: tuple[int, ...]) -> float:
    """Return the MiB of live tensors at the peak of a training step, beyond those from before it."""
    step = trainer_of(model, list(model.parameters()), batch, [at(model, b) for b in bits] or [lambda: None])
    step()
    with LiveTensors() as live:
        step()
    return live.peak / 2**20


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also measure the nets under torch.compile")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--markdown", type=Path, help="file to write the documentation's table to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    batch = make_batch(options.size, options.channels, options.batch)
    memory = {"fp32": peak_memory(resnet20(in_channels=options.channels), batch, ())}
    for case, bits in {"one": (8,), "joint": BITS}.items():
        memory[case] = peak_memory(converted(options.channels, batch), batch, bits)
    shape = f"{options.batch} x {options.channels} x {options.size} x {options.size}"
    print(f"peak memory of a step, MiB, {shape}: " + ", ".join(f"{case} {mib:.0f}" for case, mib in memory.items()))
    contenders, left_out = steps(options.channels, batch, compiled=options.compile)
    rows = measure(contenders, options.rounds)
    print(f"\ntraining step, ResNet-20, {shape}, {options.threads} threads, {options.rounds} rounds")
    print(f"{'':40}{'wall':>9}{'wall ms':>10}{'CPU':>9}")
    for name, row in rows.items():
        print(f"{name:40}{row['wall_ratio']:9.2f}{row['wall_ms']:10.0f}{row['cpu_ratio']:9.2f}")
    report = {
        "environment": environment("brevitas", "torchao", "nvidia-modelopt"),
        "batch": shape,
        "rounds": options.rounds,
        "peak_memory_mib": memory,
        "rows": rows,
        "left_out": left_out,
    }
    write(report, markdown(report), options.json, options.markdown)


if __name__ == "__main__":
    main()
