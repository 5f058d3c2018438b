"""Intra-order-preserving maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_plugins.calibration import CalibratedModule, IntraOrderPreserving, TemperatureScaling, ece

VARIANTS = ("diagonal", "order_invariant", "order_preserving")


def sample(n: int, num_classes: int = 4, *, factor: float = 2.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return factor * logits, labels


def scrambled(variant: str, num_classes: int = 6) -> IntraOrderPreserving:
    """Fitted, and then given random weights."""
    calibrator = IntraOrderPreserving(variant, max_epochs=1)
    calibrator.fit(*sample(80, num_classes))
    generator = torch.Generator().manual_seed(3)
    for name, buffer in calibrator.named_buffers():
        if "weight" in name or "bias" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        if name == "map.slopes":
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return calibrator


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_weights_keep_the_order_and_the_ties(variant):
    calibrator = scrambled(variant)
    logits, _ = sample(2000, 6, seed=1)
    logits[:50, 2] = logits[:50, 4]
    output = calibrator(logits)
    assert not torch.allclose(output, logits.log_softmax(1), atol=0.1)
    order = logits.log_softmax(1).argsort(dim=1, stable=True)
    assert (output.gather(1, order).diff(dim=1) >= 0).all()
    assert torch.equal(output[:50, 2], output[:50, 4])
    torch.testing.assert_close(calibrator(logits + 7), output, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_first_gap_lost_in_rounding_keeps_the_predicted_class(variant):
    calibrator = scrambled(variant)
    for name in calibrator._sized_by_fit[-2:]:
        calibrator.get_buffer(name).fill_(0)
    calibrator.get_buffer(calibrator._sized_by_fit[-1]).copy_(torch.tensor([-40.0, 5, 5, 5, 5]))
    logits, _ = sample(500, 6, seed=1)
    logits[:10, 2] = logits[:10].amax(1) + 1
    logits[:10, 4] = logits[:10, 2]
    output = calibrator(logits)
    assert torch.equal(output.argmax(1)[10:], logits.argmax(1)[10:])
    assert torch.equal(output[:10, 2], output[:10, 4])


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
@pytest.mark.parametrize("variant", VARIANTS)
def test_relabelling_the_classes_relabels_the_result_unless_classes_are_told_apart(variant):
    calibrator = scrambled(variant)
    logits, _ = sample(200, 6, seed=1)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    same = torch.allclose(calibrator(logits[:, permutation]), calibrator(logits)[:, permutation], atol=1e-3)
    assert same is (variant != "order_preserving")


@pytest.mark.parametrize("variant", VARIANTS)
def test_before_a_fit_it_is_the_identity(variant):
    logits, _ = sample(20)
    torch.testing.assert_close(IntraOrderPreserving(variant)(logits), logits.log_softmax(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_overconfident_net_is_calibrated(variant):
    logits, labels = sample(2000)
    held_out, truth = sample(4000, seed=1)
    before = ece(held_out, truth, input="logits").item()
    scaled = ece(TemperatureScaling().fit(logits, labels)(held_out), truth, input="log_probs").item()
    state = torch.random.get_rng_state()
    calibrator = IntraOrderPreserving(variant, hidden=None if variant != "order_invariant" else 20).fit(logits, labels)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = ece(calibrator(held_out), truth, input="log_probs").item()
    assert after < 0.5 * before
    assert after < scaled + 0.02
    assert calibrator.fit_info["nll_after"] < calibrator.fit_info["nll_before"]
    fresh = IntraOrderPreserving(variant)
    if variant == "order_invariant":
        fresh = IntraOrderPreserving(variant, hidden=20)
    fresh.load_state_dict(calibrator.state_dict())
    torch.testing.assert_close(fresh(held_out), calibrator(held_out), rtol=0, atol=0)
    again = IntraOrderPreserving(variant, hidden=calibrator.hidden).fit(logits, labels)
    assert torch.equal(again(held_out), calibrator(held_out))


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_net_and_its_map_export(variant, tmp_path):
    import onnxruntime

    calibrator = IntraOrderPreserving(variant, max_epochs=2).fit(*sample(200))
    module, inputs = CalibratedModule(torch.nn.Linear(6, 4), calibrator).eval(), torch.randn(5, 6)
    expected = module(inputs)
    torch.testing.assert_close(torch.export.export(module, (inputs,)).module()(inputs), expected)
    torch.onnx.export(module, (inputs,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
def test_wrong_use():
    with pytest.raises(ValueError, match="variant must be one of diagonal"):
        IntraOrderPreserving("sorted")
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        IntraOrderPreserving(hidden=0)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        IntraOrderPreserving(learning_rate=-1.0)
    calibrator = IntraOrderPreserving("order_invariant", max_epochs=1).fit(*sample(50))
    with pytest.raises(ValueError, match="fitted on 4 classes, got logits of 5"):
        calibrator(torch.zeros(2, 5))


@pytest.mark.filterwarnings("ignore:.*IntraOrderPreserving")
@pytest.mark.parametrize("variant", VARIANTS)
def test_types_batches_of_one_and_two_classes(variant):
    logits, labels = sample(100, 2)
    calibrator = IntraOrderPreserving(variant, max_epochs=2).fit(logits.bfloat16(), labels)
    output = calibrator(logits[0].bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(calibrator(logits[:1].bfloat16())[0], output)
