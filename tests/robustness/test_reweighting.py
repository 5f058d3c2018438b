from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_plugins.mixing import MixedLabels
from lightning_plugins.robustness.entropy import LowEntropyLoss, low_entropy_loss
from lightning_plugins.robustness.reweighting import (
    BalancedSoftmaxLoss,
    CDTLoss,
    DeferredSchedule,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    WeightedCrossEntropy,
    adjust_logits,
    balanced_softmax_loss,
    cdt_loss,
    effective_number_weights,
    focal_loss,
    inverse_frequency_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    weighted_cross_entropy,
)
from toys import TinyModule, assert_same_weights, make_trainer, weights

COUNTS = [500, 60, 7]
WEIGHT = torch.tensor([0.2, 0.8, 2.0])


def batch(n: int = 12, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(n, 3, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def losses() -> dict[str, object]:
    """Every loss as ``(logits, target, **options)``."""
    return {
        "weighted": lambda o, y, **k: weighted_cross_entropy(o, y, **k),
        "focal": lambda o, y, **k: focal_loss(o, y, 1.5, **k),
        "ldam": lambda o, y, **k: ldam_loss(o, y, ldam_margins(COUNTS), 3.0, **k),
        "adjusted": lambda o, y, **k: logit_adjusted_loss(o, y, COUNTS, 1.3, **k),
        "balanced": lambda o, y, **k: balanced_softmax_loss(o, y, COUNTS, **k),
        "cdt": lambda o, y, **k: cdt_loss(o, y, COUNTS, 0.3, **k),
    }


# --- weights and margins ------------------------------------------------------------------------------------------


def test_effective_numbers_before_rescaling():
    weights = effective_number_weights([5000, 500, 50], rescale="none")
    assert weights.tolist() == pytest.approx([2.541e-4, 2.050e-3, 2.005e-2], rel=3e-4)


def test_effective_numbers_between_their_limits():
    counts = torch.tensor(COUNTS)
    assert effective_number_weights(counts, 0.0).tolist() == [1, 1, 1]
    inverse = inverse_frequency_weights(counts)
    torch.testing.assert_close(effective_number_weights(counts, 1.0), inverse)
    torch.testing.assert_close(effective_number_weights(counts, 1 - 1e-14), inverse)  # 1 - beta**n alone would not
    torch.testing.assert_close(effective_number_weights(counts, 1e-3), torch.ones(3), atol=1e-2, rtol=0)
    huge = effective_number_weights([10**9, 1], 0.9999)
    assert huge.isfinite().all()


@pytest.mark.parametrize("make", [effective_number_weights, inverse_frequency_weights])
def test_weights_are_rescaled_over_classes_or_over_samples(make):
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    plain = make(COUNTS, rescale="none")
    assert make(COUNTS).mean().item() == pytest.approx(1)
    by_prior = make(COUNTS, rescale="prior")
    assert (by_prior * counts / counts.sum()).sum().item() == pytest.approx(1)
    torch.testing.assert_close(by_prior / by_prior[0], plain / plain[0])
    assert (plain.diff() > 0).all()  # the rarer, the heavier


def test_powers_of_frequencies():
    assert inverse_frequency_weights(COUNTS, 0.0).tolist() == [1, 1, 1]
    torch.testing.assert_close(inverse_frequency_weights([4, 1], 0.5, rescale="none"), torch.tensor([0.5, 1.0]))


def test_margins():
    margins = ldam_margins([10_000, 16, 1], 0.5)
    assert margins.tolist() == pytest.approx([0.05, 0.25, 0.5])
    assert ldam_margins(COUNTS, 0.0).tolist() == [0, 0, 0]


# --- losses -------------------------------------------------------------------------------------------------------


def test_weights_as_in_torch():
    logits, target = batch()
    expected = F.cross_entropy(logits, target, WEIGHT)
    torch.testing.assert_close(weighted_cross_entropy(logits, target, WEIGHT, normalise="batch_weight"), expected)
    by_size = F.cross_entropy(logits, target, WEIGHT, reduction="sum") / len(target)
    torch.testing.assert_close(weighted_cross_entropy(logits, target, WEIGHT), by_size)
    torch.testing.assert_close(weighted_cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_each_loss_becomes_cross_entropy():
    logits, target = batch()
    cross_entropy = F.cross_entropy(logits, target)
    torch.testing.assert_close(focal_loss(logits, target, 0.0), cross_entropy)
    torch.testing.assert_close(logit_adjusted_loss(logits, target, COUNTS, 0.0), cross_entropy)
    torch.testing.assert_close(logit_adjusted_loss(logits, target, [9, 9, 9], 2.0), cross_entropy)
    torch.testing.assert_close(cdt_loss(logits, target, COUNTS, 0.0), cross_entropy)
    torch.testing.assert_close(ldam_loss(logits, target, torch.zeros(3), 1.0), cross_entropy)


def test_without_margins_ldam_is_cross_entropy_of_scaled_logits():
    logits, target = batch()
    margins = ldam_margins(COUNTS, max_margin=0.0)
    torch.testing.assert_close(ldam_loss(logits, target, margins, 30.0), F.cross_entropy(30 * logits, target))


def test_balanced_softmax_is_logit_adjustment_at_tau_1_and_adds_log_counts():
    logits, target = batch()
    balanced = balanced_softmax_loss(logits, target, COUNTS)
    torch.testing.assert_close(balanced, logit_adjusted_loss(logits, target, COUNTS, tau=1.0), rtol=0, atol=0)
    torch.testing.assert_close(balanced, F.cross_entropy(logits + torch.tensor(COUNTS).log(), target))


def test_post_hoc_adjustment_undoes_the_adjustment_of_the_loss():
    logits, target = batch()
    adjusted = adjust_logits(logits, COUNTS, tau=1.3)
    torch.testing.assert_close(logit_adjusted_loss(adjusted, target, COUNTS, 1.3), F.cross_entropy(logits, target))
    priors = torch.tensor(COUNTS) / sum(COUNTS)
    torch.testing.assert_close(adjust_logits(priors.log()[None], COUNTS).softmax(1), torch.full((1, 3), 1 / 3))


def test_against_loops():
    logits, target = batch(dtype=torch.float64)
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    reference = {name: [] for name in losses()}
    for row, y in zip(logits, target.tolist(), strict=True):
        p = row.softmax(0)[y]
        margins = 0.5 * counts**-0.25 / (counts**-0.25).max()
        shifted = row.clone()
        shifted[y] -= margins[y]
        reference["weighted"].append(-p.log())
        reference["focal"].append((1 - p) ** 1.5 * -p.log())
        reference["ldam"].append(-(3 * shifted).log_softmax(0)[y])
        reference["adjusted"].append(-(row + 1.3 * (counts / counts.sum()).log()).log_softmax(0)[y])
        reference["balanced"].append(-(row + counts.log()).log_softmax(0)[y])
        reference["cdt"].append(-(row / (counts.max() / counts) ** 0.3).log_softmax(0)[y])
    for name, loss in losses().items():
        # The margins are float32.
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if name == "ldam" else {}
        expected = torch.stack(reference[name])
        torch.testing.assert_close(loss(logits, target, reduction="none"), expected, **tolerance)
        shares = WEIGHT.double()[target]
        weighted = (shares * expected).sum()
        for options, divisor in (
            ({"reduction": "sum"}, 1),
            ({}, len(target)),
            ({"normalise": "batch_weight"}, shares.sum()),
        ):
            value = loss(logits, target, weight=WEIGHT.double(), **options)
            torch.testing.assert_close(value, weighted / divisor, **tolerance)


def test_the_focal_weight_stays_outside_of_the_probability():
    logits, target = batch()
    plain = focal_loss(logits, target, 2.0, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, 2.0, WEIGHT, reduction="none"), WEIGHT[target] * plain)


@pytest.mark.parametrize("name", list(losses()))
def test_gradients(name):
    logits, target = batch(4, dtype=torch.float64)
    loss, weight = losses()[name], WEIGHT.double()
    assert torch.autograd.gradcheck(lambda o: loss(o, target, weight=weight), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradients_stay_finite_on_certain_predictions(gamma):
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0], [20.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0, 0]), gamma).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].abs().sum() > 0


@pytest.mark.parametrize("name", list(losses()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    logits, target = batch()
    logits = logits.to(dtype)
    loss = losses()[name](logits, target, weight=WEIGHT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses()[name](logits.float(), target, weight=WEIGHT))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses()[name](logits, target, weight=WEIGHT), loss)


@pytest.mark.parametrize("name", list(losses()))
def test_logits_and_weights_are_left_alone(name):
    logits, target = batch()
    before, weight = logits.clone(), WEIGHT.clone()
    losses()[name](logits, target, weight=weight)
    assert logits.equal(before)
    assert weight.equal(WEIGHT)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (WeightedCrossEntropy(WEIGHT), lambda o, y, **k: weighted_cross_entropy(o, y, **k)),
        (FocalLoss(1.5, WEIGHT), lambda o, y, **k: focal_loss(o, y, 1.5, **k)),
        (LDAMLoss(COUNTS, 0.4, 5.0, WEIGHT), lambda o, y, **k: ldam_loss(o, y, ldam_margins(COUNTS, 0.4), 5.0, **k)),
        (LogitAdjustedLoss(COUNTS, 1.2, WEIGHT), lambda o, y, **k: logit_adjusted_loss(o, y, COUNTS, 1.2, **k)),
        (BalancedSoftmaxLoss(COUNTS, WEIGHT), lambda o, y, **k: balanced_softmax_loss(o, y, COUNTS, **k)),
        (CDTLoss(COUNTS, 0.3, WEIGHT), lambda o, y, **k: cdt_loss(o, y, COUNTS, 0.3, **k)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_modules_are_their_functions(module, function):
    logits, target = batch()
    torch.testing.assert_close(module(logits, target), function(logits, target, weight=WEIGHT))
    module.normalise = "batch_weight"
    value = function(logits, target, weight=WEIGHT, normalise="batch_weight")
    torch.testing.assert_close(module(logits, target), value)
    module.weight = None
    torch.testing.assert_close(module(logits, target), function(logits, target))
    module.weight = WEIGHT
    assert module.state_dict() == {}
    assert module.double()(logits.double(), target).dtype == torch.float64
    assert "weight" in dict(module.named_buffers())  # moves with the module


# --- micro-batches ------------------------------------------------------------------------------------------------


class Weighted(TinyModule):
    def __init__(self, normalise: str, batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self.criterion = WeightedCrossEntropy(WEIGHT, normalise=normalise)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return self.criterion(self(inputs), labels)


def trained(tmp_path, normalise: str, parts: int):
    module = Weighted(normalise, batch_size=16 // parts)
    make_trainer(tmp_path, 1, accumulate_grad_batches=parts).fit(module)
    return weights(module)


def test_the_same_global_batch_gives_the_same_update(tmp_path):
    whole = trained(tmp_path, "batch_size", 1)
    assert_same_weights(trained(tmp_path, "batch_size", 2), whole, rtol=0, atol=1e-6)
    assert_same_weights(trained(tmp_path, "batch_size", 4), whole, rtol=0, atol=1e-6)


def test_dividing_by_the_weights_of_a_part_changes_the_update(tmp_path):
    whole, parts = (trained(tmp_path, "batch_weight", parts) for parts in (1, 4))
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) > 1e-4


# --- schedule -----------------------------------------------------------------------------------------------------


def test_weights_wait_for_their_epoch():
    schedule = DeferredSchedule(WEIGHT, 3)
    assert [schedule(epoch).tolist() == [1, 1, 1] for epoch in range(5)] == [True, True, True, False, False]
    assert schedule(3).equal(WEIGHT)
    schedule(3).zero_()
    assert schedule(4).equal(WEIGHT)
    assert DeferredSchedule([1.0, 2.0], 0)(0).tolist() == [1, 2]
    for share, epochs, start in ((0.8, 200, 160), (0.29, 100, 29), (1.0, 5, 5), (0.0, 5, 0)):
        assert DeferredSchedule.at(share, num_epochs=epochs, weights=WEIGHT).start == start


LOGITS, TARGET = batch()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_number_weights(COUNTS, 1.1), r"beta must lie in \[0, 1\], got 1.1"),
        (lambda: effective_number_weights([5, 0]), "counts must be at least 1.*leave out classes without samples"),
        (lambda: effective_number_weights([[5, 1]]), "a sequence, each a whole number"),
        (lambda: effective_number_weights(COUNTS, rescale="sum"), "rescale must be one of mean, prior, none"),
        (lambda: inverse_frequency_weights(COUNTS, -1.0), "power must be at least 0"),
        (lambda: ldam_margins(COUNTS, math.nan), "max_margin .*must be a number, got nan"),
        (lambda: weighted_cross_entropy(LOGITS, TARGET, torch.ones(2)), "weight must hold one number for each of 3"),
        (lambda: weighted_cross_entropy(LOGITS, TARGET, normalise="sum"), "normalise must be one of batch_size"),
        (lambda: weighted_cross_entropy(LOGITS, TARGET, reduction="max"), "reduction must be one of mean, sum, none"),
        (lambda: weighted_cross_entropy(LOGITS, TARGET[:3]), r"logits must be \(N, C\) and target integer classes"),
        (lambda: weighted_cross_entropy(LOGITS, TARGET.float()), "target integer classes"),
        (lambda: focal_loss(LOGITS, TARGET, -1.0), "gamma must be at least 0"),
        (lambda: FocalLoss(math.inf), "gamma must be at least 0 and finite"),
        (lambda: ldam_loss(LOGITS, TARGET, torch.zeros(2)), "margins must hold one number for each of 3"),
        (lambda: ldam_loss(LOGITS, TARGET, torch.zeros(3), 0.0), "scale must be above 0"),
        (lambda: LDAMLoss(COUNTS, scale=-1.0), "scale must be above 0"),
        (lambda: logit_adjusted_loss(LOGITS, TARGET, [1, 2]), "counts must hold one number for each of 3 classes"),
        (lambda: logit_adjusted_loss(LOGITS, TARGET, COUNTS, math.inf), "tau must be finite"),
        (lambda: LogitAdjustedLoss(COUNTS, math.nan), "tau must be finite"),
        (lambda: BalancedSoftmaxLoss([1, 0]), "counts must be at least 1"),
        (lambda: cdt_loss(LOGITS, TARGET, COUNTS, -0.1), "gamma must be at least 0"),
        (lambda: CDTLoss(COUNTS, -0.1), "gamma must be at least 0"),
        (lambda: adjust_logits(torch.zeros(3), COUNTS), r"logits must be \(N, C\)"),
        (lambda: WeightedCrossEntropy(normalise="x"), "normalise must be one of"),
        (lambda: DeferredSchedule([1.0, -1.0], 0), "weights must be"),
        (lambda: DeferredSchedule([1.0, 1.0], -1), "start must be an epoch"),
        (lambda: DeferredSchedule.at(1.5, num_epochs=3, weights=WEIGHT), r"share must lie in \[0, 1\]"),
        (lambda: DeferredSchedule.at(0.5, num_epochs=0, weights=WEIGHT), "num_epochs must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: weighted_cross_entropy(z, y, torch.tensor([1.0, 2.0, 3.0])),
        lambda z, y: ldam_loss(z, y, torch.tensor([0.1, 0.2, 0.5]), 2.0),
        lambda z, y: balanced_softmax_loss(z, y, [9, 3, 1]),
        lambda z, y: logit_adjusted_loss(z, y, [9, 3, 1], 0.5),
        lambda z, y: cdt_loss(z, y, [9, 3, 1], 0.3),
        lambda z, y: low_entropy_loss(z, y, 0.3),
    ],
)
def test_losses_of_mixed_labels_are_weighted_sums(loss):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    one, two = torch.arange(6) % 3, torch.arange(6).flip(0) % 3
    mixed = MixedLabels(torch.stack([one, two]), torch.tensor([0.7, 0.3]))
    assert torch.allclose(loss(logits, mixed), 0.7 * loss(logits, one) + 0.3 * loss(logits, two))
    assert mixed.used


def test_low_entropy_is_cross_entropy_plus_the_entropy():
    logits, target = batch(dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(low_entropy_loss(logits, target, 0.3, reduction="none"), cross_entropy + 0.3 * entropy)
    torch.testing.assert_close(LowEntropyLoss(0.3)(logits, target), (cross_entropy + 0.3 * entropy).mean())
    torch.testing.assert_close(low_entropy_loss(logits, target, 0.0), cross_entropy.mean())
    assert torch.autograd.gradcheck(lambda o: low_entropy_loss(o, target, 0.3), logits.requires_grad_())


def test_low_entropy_of_a_class_that_is_ruled_out_is_finite():
    logits = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    loss = low_entropy_loss(logits, torch.tensor([1]), 0.5)
    torch.testing.assert_close(loss, low_entropy_loss(logits[:, :2], torch.tensor([1]), 0.5))
    (gradient,) = torch.autograd.grad(loss, [logits])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("penalty", [-0.1, math.inf])
def test_a_penalty_below_0_is_refused(penalty):
    with pytest.raises(ValueError, match="penalty must be at least 0 and finite"):
        LowEntropyLoss(penalty)
    with pytest.raises(ValueError, match="penalty must be at least 0 and finite"):
        low_entropy_loss(LOGITS, TARGET, penalty)
