"""The packed file: what it holds, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import (
    BitPlan,
    active_plan,
    clamp_scales_,
    convert_,
    quantize_codes,
    quantized_layers,
    switch_,
    switch_codes,
)
from lightning_plugins.quantization.packed import FORMAT, load_packed, pack_codes, save_packed, unpack_codes
from toys import TinyModule, TorchvisionModule

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def small_resnet() -> nn.Module:
    return resnet20(width=4)


def mixed_net() -> nn.Module:
    """Convolutions over time, one depthwise, linear layers with biases, and a plain buffer."""
    net = nn.Sequential(
        nn.Unflatten(1, (2, 4)),
        nn.Conv1d(2, 6, 3, padding=1),
        nn.BatchNorm1d(6),
        nn.Hardswish(),
        nn.Conv1d(6, 6, 3, padding="same", groups=6, bias=False),
        nn.Conv1d(6, 5, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    net.register_buffer("mean", torch.arange(3.0))
    return net


def train(net: nn.Module, bits: tuple[int, ...], inputs: Tensor) -> nn.Module:
    """A step at each precision, so that nothing keeps its first value."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net.train()
    for b in bits:
        optimizer.zero_grad()
        F.cross_entropy(switch_(net, b)(inputs), torch.arange(len(inputs)) % 3).backward()
        optimizer.step()
        clamp_scales_(net)
    return net


def trained(bits: tuple[int, ...] = (8, 4, 2), **arguments) -> nn.Module:
    torch.manual_seed(0)
    return train(convert_(small_resnet(), bits, **arguments), bits, IMAGES)


def on_meta(make=small_resnet) -> nn.Module:
    with torch.device("meta"):
        return make()


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **about) -> Path:
    """Change a file as its writer could: other tensors, or other fields of what is said about them."""
    metadata = header_of(path)["__metadata__"]
    fields = json.loads(metadata[FORMAT]) | about
    tensors = safetensors.torch.load(path.read_bytes()) if tensors is None else tensors
    path.write_bytes(safetensors.torch.save(tensors, {FORMAT: json.dumps(fields)}))
    return path


def with_checksum(path: Path, **about) -> Path:
    from lightning_plugins._sealed_files import checksum

    rewrite(path, **about)
    fields = json.loads(header_of(path)["__metadata__"][FORMAT])
    tensors = safetensors.torch.load(path.read_bytes())
    return rewrite(path, checksum=checksum(tensors, [fields["spec"], fields["shapes"]]))


# Codes


def slow_pack(codes: list[int], bits: int) -> list[int]:
    stream = "".join(f"{code % 2**bits:0{bits}b}"[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


@given(bits=st.integers(2, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packing_equals_a_stream_of_bits_and_comes_back(bits, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes.flatten().tolist(), bits)
    assert len(packed) == -(-codes.numel() * bits // 8)
    back = unpack_codes(packed, bits, shape)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


def test_bytes_by_hand():
    assert pack_codes(torch.tensor([1, -1, 0, -2], dtype=torch.int8), 2).tolist() == [0b10_00_11_01]
    # Codes 1, -1, 2 of three bits: 001, 111, 010, least significant bit first, over two bytes.
    assert pack_codes(torch.tensor([1, -1, 2], dtype=torch.int8), 3).tolist() == [0b10_111_001, 0b0]
    assert pack_codes(torch.tensor([-128, 127], dtype=torch.int8), 8).tolist() == [128, 127]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_all_codes_switch_from_the_packed_ones_as_from_the_weights(bits):
    codes = torch.arange(-128, 128).to(torch.int8)
    back = unpack_codes(pack_codes(codes, 8), 8, (256,))
    expected = quantize_codes(codes.float() * 0.25, torch.tensor(0.25), bits=bits)
    assert torch.equal(switch_codes(back, high_bits=8, bits=bits), expected)


def test_codes_in_another_memory_format():
    codes = torch.randint(-8, 8, (4, 3, 2, 2)).to(torch.int8)
    assert torch.equal(pack_codes(codes.to(memory_format=torch.channels_last), 4), pack_codes(codes, 4))


def test_what_is_no_code_is_refused():
    with pytest.raises(ValueError, match="lie in -8..7, got -9..7; switch_codes"):
        pack_codes(torch.tensor([7, -9], dtype=torch.int8), 4)
    with pytest.raises(TypeError, match="must be int8.*quantize_codes"):
        pack_codes(torch.ones(3), 4)
    with pytest.raises(ValueError, match="bits must lie in 2..8"):
        pack_codes(torch.ones(3, dtype=torch.int8), 9)
    with pytest.raises(ValueError, match=r"3 codes of 4 bits are uint8 of shape \(2,\)"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, (3,))
    with pytest.raises(ValueError, match="got torch.int8"):
        unpack_codes(torch.zeros(2, dtype=torch.int8), 4, (3,))


# What comes back


CASES = {
    "all": (small_resnet, (8, 6, 4, 2), {}),
    "uneven": (small_resnet, (4, 3, 2), {}),
    "full": (small_resnet, (32, 8, 4), {}),
    "residual": (small_resnet, (8, 4), {"quantize_residual": True}),
    "weights_only": (small_resnet, (8, 2), {"quantize_inputs": False, "batch_norm": "shared"}),
    "per_tensor": (small_resnet, (7, 5), {"per_channel": False, "first_last_bits": 6, "input_init": "lsq"}),
    "vectors": (mixed_net, (4, 3, 2), {"first_last_bits": 2}),
    "depthwise_residual": (lambda: TorchvisionModule().backbone, (8, 4), {"quantize_residual": True}),
}


@cache
def _trained_case(case: str) -> nn.Module:
    make, bits, arguments = CASES[case]
    torch.manual_seed(0)
    return train(convert_(make(), bits, **arguments), bits, inputs_of(case))


def inputs_of(case: str) -> Tensor:
    return VECTORS if case == "vectors" else IMAGES


def trained_case(case: str) -> nn.Module:
    return deepcopy(_trained_case(case)).eval()


@pytest.mark.parametrize("case", CASES)
def test_switching_from_the_file_alone_gives_the_logits_of_training(case, tmp_path):
    make, bits, _ = CASES[case]
    net, inputs = trained_case(case), inputs_of(case)
    with torch.no_grad():
        expected = {b: switch_(net, b)(inputs) for b in bits if b != 32}
        path = save_packed(net, tmp_path / "net.safetensors")
        del net
        loaded = load_packed(path, on_meta(make))
        high, low = max(expected), min(expected)
        assert torch.equal(loaded(inputs), expected[high])  # comes at its highest precision
        for b in [sorted(expected)[-2], high, low]:
            assert torch.equal(switch_(loaded, b)(inputs), expected[b])
        assert torch.equal(switch_(load_packed(path, make()), low)(inputs), expected[low])


def test_switching_8_4_8_2(tmp_path):
    net = trained((8, 6, 4, 2)).eval()
    loaded = load_packed(save_packed(net, tmp_path / "net"), on_meta())
    for b in (8, 4, 8, 2, 6, 2):
        assert torch.equal(switch_(loaded, b)(IMAGES), switch_(net, b)(IMAGES))  # gradients are on


def mixed_plan(net: nn.Module) -> BitPlan:
    choices = {name: [b for b in layer.bits if b != 32] for name, layer in quantized_layers(net).items()}
    return BitPlan({name: bits[i % len(bits)] for i, (name, bits) in enumerate(choices.items())})


def test_a_loaded_model_takes_plans(tmp_path):
    net = trained((8, 6, 4, 2)).eval()
    loaded = load_packed(save_packed(net, tmp_path / "net"), on_meta())
    plan = mixed_plan(net)
    assert torch.equal(switch_(loaded, plan)(IMAGES), switch_(net, plan)(IMAGES))
    assert active_plan(loaded) == plan
    with pytest.raises(ValueError, match="one of the model's precisions"):
        switch_(loaded, 5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_file_for_a_plan(case, mixed, tmp_path):
    make, bits, _ = CASES[case]
    net, inputs = trained_case(case), inputs_of(case)
    plan = mixed_plan(net) if mixed else bits[-1]
    path = save_packed(net, tmp_path / "plan", plan=plan)
    loaded = load_packed(path, on_meta(make))
    expected = switch_(net, plan)(inputs)
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(switch_(loaded, plan)(inputs), expected)
    assert active_plan(loaded) == active_plan(net)
    assert path.stat().st_size < save_packed(net, tmp_path / "all").stat().st_size
    again = save_packed(loaded, tmp_path / "again")
    assert torch.equal(load_packed(again, on_meta(make))(inputs), expected)
    for b in set(bits) - {bits[-1]}:
        with pytest.raises(ValueError, match="bits must be one of"):
            switch_(loaded, b)


def test_a_plan_of_a_loaded_model_derives_from_the_highest_codes(tmp_path):
    net = trained((8, 4, 2))
    loaded = switch_(load_packed(save_packed(net, tmp_path / "all"), on_meta()), 4)  # 8 to 4 to 2 would be another net
    first, second = (save_packed(model, tmp_path / name, plan=2) for model, name in [(net, "a"), (loaded, "b")])
    assert first.read_bytes() == second.read_bytes()
    tensors = safetensors.torch.load(first.read_bytes())
    for name, layer in quantized_layers(net).items():
        high = quantize_codes(layer.weight, layer.weight_scale, bits=8)
        assert torch.equal(tensors[f"{name}.codes"], pack_codes(switch_codes(high, high_bits=8, bits=2), 2))
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale * 64)


def test_a_loaded_model_only_computes(tmp_path):
    loaded = load_packed(save_packed(trained(), tmp_path / "net"), on_meta().train())
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(
        layer.codes.dtype == torch.int8 and not hasattr(layer, "weight") for layer in quantized_layers(loaded).values()
    )
    expected = switch_(loaded, 2)(IMAGES)
    assert torch.equal(deepcopy(loaded)(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(IMAGES), expected)


def test_a_model_of_half_precision(tmp_path):
    net = trained().to(torch.bfloat16).eval()
    loaded = load_packed(save_packed(net, tmp_path / "net"), on_meta())
    images = IMAGES.to(torch.bfloat16)
    for b in (8, 2):
        assert torch.equal(switch_(loaded, b)(images), switch_(net, b)(images))


def test_a_lightning_module(tmp_path):
    module = convert_(TinyModule(), (8, 3), first_last_bits=3)
    train(module, (8, 3), VECTORS).eval()
    loaded = load_packed(save_packed(module, tmp_path / "net"), on_meta(TinyModule))
    assert isinstance(loaded, TinyModule)
    for b in (8, 3):
        assert torch.equal(switch_(loaded, b)(VECTORS), switch_(module, b)(VECTORS))


# What is in the file


@pytest.mark.parametrize("plan", [None, 4])
def test_the_file_has_no_weights_of_quantized_layers(plan, tmp_path):
    net = trained((32, 8, 4))
    tensors = safetensors.torch.load(save_packed(net, tmp_path / "net", plan=plan).read_bytes())
    for name, layer in quantized_layers(net).items():
        assert f"{name}.weight" not in tensors
        codes = tensors[f"{name}.codes"]
        assert len(codes) == layer.weight.numel() * (8 if plan is None else 4) / 8
    kept = {name: value for name, value in tensors.items() if value.is_floating_point() and value.ndim > 2}
    assert kept.keys() == {"stem.0.weight"}
    assert torch.equal(kept["stem.0.weight"], net.stem[0].weight)


def test_everything_else_comes_back_as_it_was(tmp_path):
    net = trained((8, 4), quantize_residual=True)
    loaded = load_packed(save_packed(net, tmp_path / "net"), on_meta())
    weights = {f"{name}.weight" for name in quantized_layers(net)}
    before, after = net.state_dict(), loaded.state_dict()
    assert after.keys() - before.keys() == {f"{name}.codes" for name in quantized_layers(net)}
    assert before.keys() - after.keys() == weights
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


def test_equal_models_give_equal_files(tmp_path):
    files = [save_packed(trained(), tmp_path / name).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    loaded = load_packed(tmp_path / "a", on_meta())
    assert save_packed(loaded, tmp_path / "c").read_bytes() == files[0]


def test_saving_leaves_the_model_as_it_was(tmp_path):
    net = trained()
    net.stages[0].eval()
    switch_(net, mixed_plan(net))
    modes = [module.training for module in net.modules()]
    state, plan = deepcopy(net.state_dict()), active_plan(net)
    save_packed(net, tmp_path / "net", plan=4)
    with pytest.raises(ValueError, match="precisions"):
        save_packed(net, tmp_path / "net", plan=7)
    assert [module.training for module in net.modules()] == modes
    assert active_plan(net) == plan
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_precision_32_stays_behind(tmp_path):
    net = trained((32, 8, 4))
    loaded = load_packed(save_packed(net, tmp_path / "net"), on_meta())
    with pytest.raises(ValueError, match=r"precisions \(8, 4\), got 32"):
        switch_(loaded, 32)
    for plan in (32, dict.fromkeys(quantized_layers(net), 8) | {"stages.0.0.conv1": 32}):
        with pytest.raises(
            ValueError, match="no fp32 weights: plan must give each layer 2 to 8 bits.*stages.0.0.conv1"
        ):
            save_packed(net, tmp_path / "net", plan=plan)


# Weights that are made from others


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_pruned_weights(tmp_path):
    torch.manual_seed(0)
    net = small_resnet()
    block = net.stages[0][0]
    prune.l1_unstructured(block.conv1, "weight", amount=0.5)
    prune.random_structured(block.conv2, "weight", amount=0.5, dim=0)
    prune.l1_unstructured(block.conv2, "weight", amount=0.2)  # a second time
    prune.l1_unstructured(net.stem[0], "weight", amount=0.5)
    prune.l1_unstructured(net.fc, "bias", amount=0.3)
    train(convert_(net, (8, 4)), (8, 4), IMAGES)
    # What the optimizer has just changed reaches the attribute `weight` with the next forward only.
    path = save_packed(net, tmp_path / "net")
    assert not [name for name in safetensors.torch.load(path.read_bytes()) if name.endswith(("_orig", "_mask"))]
    loaded = load_packed(path, on_meta())
    net.eval()
    for b in (8, 4):
        assert torch.equal(switch_(loaded, b)(IMAGES), switch_(net, b)(IMAGES))
    assert (quantized_layers(loaded)["stages.0.0.conv1"].codes == 0).float().mean() >= 0.5
    pruned = small_resnet()
    prune.identity(pruned.stages[0][0].conv1, "weight")
    assert torch.equal(switch_(load_packed(path, pruned), 4)(IMAGES), net(IMAGES))


def test_parametrized_weights(tmp_path):
    def make() -> nn.Module:
        net = small_resnet()
        parametrizations.weight_norm(net.stages[0][0].conv1)
        parametrizations.spectral_norm(net.stages[0][1].conv2)
        parametrize.register_parametrization(net.stages[1][0].conv2, "weight", Doubled())
        parametrizations.spectral_norm(net.stem[0])
        return net

    torch.manual_seed(0)
    net = train(convert_(make(), (8, 4)), (8, 4), IMAGES)
    state = deepcopy(net.state_dict())
    path = save_packed(net, tmp_path / "net")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())  # no power iteration
    assert not [name for name in safetensors.torch.load(path.read_bytes()) if "parametrizations" in name]
    net.eval()
    for fresh in (on_meta(make), make(), on_meta()):
        loaded = load_packed(path, fresh)
        for b in (8, 4):
            assert torch.equal(switch_(loaded, b)(IMAGES), switch_(net, b)(IMAGES))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_from_other_hooks_are_refused(tmp_path):
    net = small_resnet()
    nn.utils.weight_norm(net.stages[0][0].conv1)
    train(convert_(net, (8, 4)), (8, 4), IMAGES)
    with pytest.raises(ValueError, match="'stages.0.0.conv1' is made by a hook.*parametrizations"):
        save_packed(net, tmp_path / "net")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.again = self.middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.middle(self.first(x)).relu()).relu())


def test_shared_modules_and_weights(tmp_path):
    torch.manual_seed(0)
    net = train(convert_(Tied(), (8, 4)), (8, 4), VECTORS).eval()
    path = save_packed(net, tmp_path / "net")
    assert "last.weight" not in safetensors.torch.load(path.read_bytes())
    loaded = load_packed(path, on_meta(Tied))
    assert loaded.last.weight is loaded.first.weight
    assert loaded.again is loaded.middle
    for b in (8, 4):
        assert torch.equal(switch_(loaded, b)(VECTORS), switch_(net, b)(VECTORS))


# What is refused


def test_models_that_cannot_be_saved(tmp_path):
    path = tmp_path / "net"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="convert_ it first"):
        save_packed(small_resnet(), path)
    net = convert_(small_resnet(), (8, 4))
    switch_(net.train(), 8)(IMAGES)
    with pytest.raises(ValueError, match="'stages.0.0.conv1.input_quantizer' at 4 bits is not set yet; train a step"):
        save_packed(net, path)
    save_packed(net, tmp_path / "at_8", plan=8)  # which needs no other
    residual = convert_(small_resnet(), (8, 4), quantize_residual=True, quantize_inputs=False)
    with pytest.raises(ValueError, match="residual_quantizer' at 8 bits is not set yet"):
        save_packed(residual, path)
    net = trained((8, 4))
    with pytest.raises(ValueError, match="must name exactly the quantized layers"):
        save_packed(net, path, plan={"stem.0": 8})
    with torch.no_grad():
        net.stages[0][0].conv1.weight_scale[0] = 0
    with pytest.raises(ValueError, match="not positive; call clamp_scales_"):
        save_packed(net, path)
    with torch.no_grad():
        net.stages[0][0].conv1.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="weights that are not finite"):
        save_packed(net, path)
    assert path.read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["at_8", "net"]


class WithState(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_state_that_is_no_tensor_is_refused(tmp_path):
    net = trained((8, 4))
    net.pool = WithState()
    with pytest.raises(ValueError, match="'pool' .WithState. has state that is no tensor"):
        save_packed(net, tmp_path / "net")


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory) -> bytes:
    """The bytes of a small file."""
    torch.manual_seed(0)
    net = train(convert_(TinyModule(), (4, 3), first_last_bits=3), (4, 3), VECTORS)
    return save_packed(net, tmp_path_factory.mktemp("packed") / "net").read_bytes()


def test_every_flipped_bit_is_noticed(packed_file, tmp_path):
    path = tmp_path / "net"
    generator = torch.Generator().manual_seed(0)
    places = {*range(0, 8), *torch.randint(8, len(packed_file), (250,), generator=generator).tolist()}
    for place in sorted(places):
        damaged = bytearray(packed_file)
        damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|none that save_packed wrote|upgrade"):
            load_packed(path, on_meta(TinyModule))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(packed_file, length, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(packed_file[:length])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one .*copy it again"):
        load_packed(path, TinyModule())


def test_files_of_others(packed_file, tmp_path):
    path = tmp_path / "net"
    with pytest.raises(FileNotFoundError):
        load_packed(path, TinyModule())
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_packed(path, TinyModule())
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.ones(3)}, path, metadata)
        with pytest.raises(ValueError, match="none that save_packed wrote"):
            load_packed(path, TinyModule())
    safetensors.torch.save_file({"a": torch.ones(3)}, path, {FORMAT: "[1]"})
    with pytest.raises(ValueError, match="its header cannot be read"):
        load_packed(path, TinyModule())
    path.write_bytes(packed_file)
    with pytest.raises(ValueError, match="has version 2 of its format, this lightning_plugins reads 1; upgrade it"):
        load_packed(rewrite(path, version=2), TinyModule())


def test_other_codes_under_the_old_checksum(packed_file, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(packed_file)
    tensors = safetensors.torch.load(packed_file)
    tensors["net.0.codes"][0] ^= 1
    with pytest.raises(ValueError, match="its checksum differs"):
        load_packed(rewrite(path, tensors), TinyModule())


def test_missing_and_misshapen_tensors(packed_file, tmp_path):
    path = tmp_path / "net"
    for change, message in {
        "missing": "lacks a tensor that the module has, 'net.0.bias'",
        "shape": r"'net.0.bias' has shape \(5,\) in the file and \(16,\) in the module",
        "more": "has a tensor that the module lacks, 'net.0.more'",
    }.items():
        path.write_bytes(packed_file)
        tensors = safetensors.torch.load(packed_file)
        if change == "missing":
            del tensors["net.0.bias"]
        else:
            tensors["net.0.bias" if change == "shape" else "net.0.more"] = torch.ones(5)
        with_checksum(path, tensors=tensors)
        with pytest.raises(ValueError, match=f"another architecture.*{message}"):
            load_packed(path, on_meta(TinyModule))


def test_other_architectures(tmp_path):
    path = save_packed(trained((8, 4)), tmp_path / "net")
    shape = r"had shape \(4, 4, 3, 3\), in this CifarResNet it has \(5, 5, 3, 3\)"
    for make, message in (
        (lambda: resnet20(width=5), f"'stages.0.0.conv1' {shape}"),
        (lambda: resnet20(width=4, num_classes=3), r"'fc.weight' has shape \(10, 16\) in the file and \(3, 16\)"),
        (mixed_net, "Sequential has no 'stages.0.0.conv1'"),
    ):
        for fresh in (make(), on_meta(make)):
            with pytest.raises(ValueError, match=f"another architecture.*{message}"):
                load_packed(path, fresh)
    without_norm = small_resnet()
    without_norm.stages[0][0].bn1 = nn.GroupNorm(2, 4)
    with pytest.raises(
        ValueError, match="'stages.0.0.bn1' was a batch normalisation, in this CifarResNet it is a GroupNorm"
    ):
        load_packed(path, without_norm)
    other_layer = small_resnet()
    other_layer.stages[0][0].conv1 = nn.ConvTranspose2d(4, 4, 3)
    with pytest.raises(ValueError, match="'stages.0.0.conv1' was a convolution or linear layer"):
        load_packed(path, other_layer)
    unset = small_resnet()
    unset.stages[0][0].conv1 = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match="it has none"):
        load_packed(path, unset)
    with pytest.raises(ValueError, match="not converted; make a fresh one, or restore_"):
        load_packed(path, convert_(small_resnet(), (8, 4)))


class WithConstant(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(8), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + self.shift)


def test_buffers_that_no_file_holds(tmp_path):
    net = train(convert_(WithConstant(), (8, 4), first_last_bits=4), (8, 4), VECTORS).eval()
    path = save_packed(net, tmp_path / "net")
    loaded = load_packed(path, WithConstant())
    assert torch.equal(loaded(VECTORS), switch_(net, 8)(VECTORS))
    with pytest.raises(ValueError, match="'shift' of WithConstant is on the meta device.*build the module on the CPU"):
        load_packed(path, on_meta(WithConstant))
