"""TCM loss and OPIS: values by hand, slow references, invariants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import OPIS, opis, tcm_loss


def embeddings(n: int = 24, classes: int = 4, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(6)[labels]
    return centres + spread * torch.randn(n, 6, generator=generator), labels


def slow_tcm(rows: Tensor, labels: Tensor, high: float, low: float) -> float:
    positive, negative = [], []
    for i in range(len(rows)):
        for j in range(len(rows)):
            s = F.cosine_similarity(rows[i], rows[j], dim=0).item()
            if i != j and labels[i] == labels[j] and s <= high:
                positive.append(high - s)
            if labels[i] != labels[j] and s >= low:
                negative.append(s - low)
    return sum(sum(part) / len(part) for part in (positive, negative) if part)


@pytest.mark.parametrize(("high", "low"), [(0.9, 0.5), (0.7, 0.0), (-0.5, 0.99)])
def test_loss_equals_the_loop_over_pairs(high, low):
    rows, labels = embeddings()
    loss = tcm_loss(rows, labels, positive_margin=high, negative_margin=low)
    assert loss.item() == pytest.approx(slow_tcm(rows, labels, high, low), abs=1e-6)
    torch.testing.assert_close(tcm_loss(5 * rows, labels, positive_margin=high, negative_margin=low), loss)


def test_loss_is_zero_without_violations_and_its_gradient_finite():
    rows = (torch.eye(4)[torch.arange(8) % 4] + 0.01).requires_grad_()
    loss = tcm_loss(rows, torch.arange(8) % 4)
    loss.backward()
    assert loss.item() == 0
    assert not rows.grad.any()
    assert tcm_loss(rows, torch.arange(8)) > 0  # now they are pairs of two classes
    assert tcm_loss(rows[:1], torch.tensor([0])) == 0


def test_only_violating_pairs_have_a_gradient():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    tcm_loss(rows, torch.tensor([0, 0, 1])).backward()
    assert rows.grad[:2].abs().sum() > 0
    assert not rows.grad[2].any()


def test_weights_and_gradcheck():
    rows, labels = embeddings(8)
    parts = [tcm_loss(rows, labels, positive_weight=a, negative_weight=b) for a, b in ((2, 0), (0, 3), (2, 3))]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    assert torch.autograd.gradcheck(lambda x: tcm_loss(x, labels), rows.double().requires_grad_())


def test_half_precision_is_computed_in_float32():
    rows, labels = embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tcm_loss(rows, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, tcm_loss(rows, labels))


def slow_opis(rows: Tensor, labels: Tensor, thresholds: list[float]) -> float:
    rows = F.normalize(rows, dim=1)
    utilities = []
    for label in labels.unique():
        line = []
        for d in thresholds:
            within = [
                1 - rows[i] @ rows[j] <= d
                for i in range(len(rows))
                for j in range(i)
                if labels[i] == label and labels[j] == label
            ]
            across = [
                1 - rows[i] @ rows[j] > d
                for i in range(len(rows))
                for j in range(len(rows))
                if labels[i] == label and labels[j] != label
            ]
            phi, psi = sum(within) / len(within), sum(across) / len(across)
            line.append(2 * phi * psi / (phi + psi) if phi + psi else 0.0)
        utilities.append(torch.tensor(line))
    utility = torch.stack(utilities)
    return (utility - utility.mean(0)).square().mean().item()


def test_opis_equals_the_loop_over_pairs():
    rows, labels = (part.double() if part.is_floating_point() else part for part in embeddings(20, 3))
    unit = F.normalize(rows, dim=1)
    pairs = sorted((1 - unit[i] @ unit[j]).item() for i in range(20) for j in range(i) if labels[i] != labels[j])
    low, high = pairs[round(0.05 * len(pairs)) - 1], pairs[round(0.4 * len(pairs)) - 1]
    # Away from the observed distances, where rounding cannot decide.
    thresholds = torch.linspace(low, high, 7).tolist()
    ours = opis(rows, labels, far_range=(0.05, 0.4), num_thresholds=7).item()
    nudged = [d + 1e-9 for d in thresholds]
    assert ours == pytest.approx(slow_opis(rows, labels, nudged), abs=1e-5)


def test_opis_is_zero_for_classes_of_one_shape_and_grows_with_a_wider_one():
    generator = torch.Generator().manual_seed(0)
    shape = 0.3 * torch.randn(40, 2, generator=generator, dtype=torch.float64)

    def build(scale: float) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(120, 9, dtype=torch.float64)
        for label in range(3):  # three orthogonal copies of one shape
            rows[40 * label : 40 * label + 40, 3 * label] = 1
            rows[40 * label : 40 * label + 40, 3 * label + 1 : 3 * label + 3] = shape * (scale if label == 0 else 1)
        return rows + 0.05, torch.arange(3).repeat_interleave(40)

    values = [opis(*build(scale)).item() for scale in (1.0, 4.0, 8.0)]
    assert values[0] < 1e-12
    assert 1e-4 < values[1] < values[2]


def test_opis_ignores_order_scale_and_single_samples():
    rows, labels = embeddings(60, 3, seed=1)
    value = opis(rows, labels)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(opis(3 * rows[order], labels[order]), value, rtol=1e-3, atol=1e-6)
    alone = torch.cat([rows, -rows[:1]]), torch.cat([labels, torch.tensor([9])])
    assert opis(*alone).isfinite()


def test_the_worst_classes_alone():
    rows, labels = embeddings(90, 3, seed=2)
    rows[labels == 0] += torch.randn(30, 6, generator=torch.Generator().manual_seed(3))
    assert opis(rows, labels, worst_share=0.34) > opis(rows, labels)
    assert opis(rows, labels, worst_share=1e-9) == opis(rows, labels, worst_share=0.34)  # at least one


def test_the_metric_is_the_function_of_all_batches():
    rows, labels = embeddings(60, 3)
    metric = OPIS(far_range=(0.02, 0.2), num_thresholds=11)
    for part in torch.arange(60).split(17):
        metric.update(rows[part], labels[part])
    torch.testing.assert_close(metric.compute(), opis(rows, labels, far_range=(0.02, 0.2), num_thresholds=11))
    metric.reset()
    metric.update(rows[:30], labels[:30])
    torch.testing.assert_close(metric.compute(), opis(rows[:30], labels[:30], far_range=(0.02, 0.2), num_thresholds=11))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tcm_loss(torch.ones(2, 3), torch.tensor([0, 1]), positive_margin=2), "is a cosine"),
        (
            lambda: tcm_loss(torch.ones(2, 3), torch.tensor([0, 1]), negative_weight=-1),
            "negative_weight must be at least",
        ),
        (lambda: tcm_loss(torch.ones(2, 3), torch.tensor([0.0, 1])), "labels be N integers"),
        (lambda: opis(torch.ones(2, 3), torch.tensor([0, 1])), "pass more samples"),
        (lambda: opis(torch.ones(2, 3), torch.tensor([0, 1]), far_range=(0.1, 0.01)), "two rising rates"),
        (lambda: OPIS(num_thresholds=1), "num_thresholds must be at least 2"),
        (lambda: OPIS(worst_share=0), "1 for all classes"),
    ],
)
def test_wrong_use(call, words):
    with pytest.raises(ValueError, match=words):
        call()
