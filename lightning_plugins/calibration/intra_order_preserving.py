"""Intra-order-preserving maps: networks of the logits that cannot change the order of the classes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_plugins._progress import progress_bar
from lightning_plugins.calibration.calibrator import Calibrator
from lightning_plugins.calibration.monotone_maps import IntegralMap
from lightning_plugins.checks import check_types

__all__ = ["IntraOrderPreserving", "OrderVariant"]

OrderVariant = Literal["diagonal", "order_invariant", "order_preserving"]
"""One increasing function for every logit; gaps scaled by a network of the sorted logits; of the logits as they are."""

_WEIGHT_DECAY = 5e-4
_LAYERS = tuple(f"{kind}{layer}" for layer in range(3) for kind in ("weight", "bias"))


class IntraOrderPreserving(Calibrator):
    r"""A small network that stretches the gaps between the sorted logits of a sample, fitted by cross-entropy.

    With log-probabilities :math:`s_1 \ge \dots \ge s_C` of a sample in descending order and positive
    :math:`m_1, \dots, m_{C-1}` from a network of two hidden layers, the new logits are
    :math:`o_j = \sum_{l \ge j}^{C-1} (s_l - s_{l+1}) m_l`, put back in place; no choice of weights changes an
    order, and equal logits stay equal. The variants:

    - ``"diagonal"``: one increasing function, an :class:`.IntegralMap`, for every log-probability; L-BFGS in float64.
    - ``"order_invariant"``: the network sees the sorted log-probabilities, so that relabelling the classes relabels
      the result; Adam.
    - ``"order_preserving"``: the network sees the log-probabilities class by class, and can tell classes apart; Adam.

    The paper feeds raw logits; ours are log-probabilities, standardised by one mean and deviation, so that a constant
    added to a row changes nothing. Where the paper averages five folds there is one fit here.

    Args:
        variant: see above.
        hidden: width of the two hidden layers; default 10, 150 and 2 for the three variants.
        max_epochs: of Adam, or iterations of L-BFGS; default 40, or 300.
        learning_rate: of Adam, positive. Weight decay is the paper's 5e-4, with L-BFGS too.
        batch_size: rows of a step of Adam, at least 1.
        seed: of the private generator that draws first weights and batches.
        progress: whether to show a bar; default on terminals, for fits of more than 5 seconds.

    Shape:
        - Input: logits ``(..., C)``; but for ``"diagonal"``, of as many classes as those of the fit.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument, or logits of another number of classes.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(500, 5, generator=generator)
        >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        >>> calibrator = IntraOrderPreserving("order_invariant", hidden=8).fit(3 * logits, labels)
        >>> calibrator.fit_info["nll_after"] < calibrator.fit_info["nll_before"]
        True

    Reference:
        A. Rahimi, A. Shaban, C.-A. Cheng, R. Hartley, B. Boots, "Intra Order-preserving Functions for Calibration of
        Multi-Class Neural Networks", NeurIPS 2020, theorems 1 to 3.
    """

    _looks_up = True
    preserves_ranking = True
    _sized_by_fit = _LAYERS

    center: Tensor
    spread: Tensor

    @check_types
    def __init__(
        self,
        variant: OrderVariant = "diagonal",
        *,
        hidden: int | None = None,
        max_epochs: int | None = None,
        learning_rate: float = 5e-3,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        super().__init__()
        if variant not in get_args(OrderVariant):
            raise ValueError(f"variant must be one of {', '.join(get_args(OrderVariant))}, got {variant!r}")
        for name, value in {"hidden": hidden, "max_epochs": max_epochs, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate!r}; 5e-3 is the paper's")
        self.variant: OrderVariant = variant
        self.hidden = hidden or {"diagonal": 10, "order_invariant": 150, "order_preserving": 2}[variant]
        self.max_epochs = max_epochs or (300 if variant == "diagonal" else 40)
        self.learning_rate, self.batch_size, self.seed, self.progress = learning_rate, batch_size, seed, progress
        if variant == "diagonal":
            self.map = IntegralMap(self.hidden)
        # Empty layers, before a fit has told the number of classes, stand for the identity.
        for name in _LAYERS:
            self.register_buffer(name, torch.empty(0, 0) if name.startswith("weight") else torch.empty(0))
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def extra_repr(self) -> str:
        """Show the variant."""
        return f"variant={self.variant!r}, hidden={self.hidden}"

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.variant == "diagonal":
            return self._fit_diagonal(logits.double().log_softmax(1), labels, generator)
        return self._fit_gaps(logits, labels, generator)

    def _fit_diagonal(
        self, log_probs: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, float | int | bool]:
        leaves = {name: leaf.requires_grad_() for name, leaf in self.map.start(log_probs, generator).items()}
        learned = [leaf for name, leaf in leaves.items() if name != "scale"]
        optimizer = torch.optim.LBFGS(learned, max_iter=self.max_epochs, line_search_fn="strong_wolfe")
        bar = self._bar(None)

        def closure() -> Tensor:
            optimizer.zero_grad()
            # Where every row of the fit is right, the likelihood alone would let the slopes grow for ever.
            penalty = torch.stack([leaf.square().sum() for leaf in learned]).sum()
            loss = F.nll_loss(self.map.evaluate(leaves, log_probs), labels) + _WEIGHT_DECAY / 2 * penalty
            loss.backward()  # type: ignore[no-untyped-call]
            bar.update()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
        bar.close()
        iterations = int(optimizer.state[learned[0]]["n_iter"])
        self.map.store(leaves)
        return {"iterations": iterations, "converged": iterations < self.max_epochs}

    def _fit_gaps(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, float | int | bool]:
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        center, spread = log_probs.mean(), log_probs.std(correction=0).clamp_min(1e-6)
        num_classes = log_probs.shape[1]
        sizes = (num_classes, self.hidden, self.hidden, num_classes - 1)
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            drawn = (2 * torch.rand(fan_out, fan_in + 1, generator=generator) - 1) / math.sqrt(fan_in)
            layers += [drawn[:, :-1].clone(), drawn[:, -1].clone()]
        # At this start every gap is multiplied by softplus(log(e - 1)) = 1.
        layers[-2].zero_()
        layers[-1].fill_(math.log(math.e - 1))
        layers = [layer.to(log_probs).requires_grad_() for layer in layers]
        optimizer = torch.optim.Adam(layers, lr=self.learning_rate, weight_decay=_WEIGHT_DECAY)
        num_batches = math.ceil(len(labels) / self.batch_size)
        epochs = self._bar(self.max_epochs)
        for _ in range(self.max_epochs):
            for rows in torch.randperm(len(labels), generator=generator).to(labels.device).tensor_split(num_batches):
                loss = F.nll_loss(self._stretch(log_probs[rows], layers, center, spread), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            epochs.update()
        epochs.close()
        for name, value in zip((*_LAYERS, "center", "spread"), (*layers, center, spread), strict=True):
            old = self.get_buffer(name)
            setattr(self, name, value.detach().to(dtype=old.dtype, device=old.device))
        return {"iterations": self.max_epochs}

    def _calibrate(self, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        if self.variant == "diagonal":
            mapped: Tensor = self.map(log_probs)
            return mapped
        layers = [self.get_buffer(name).to(log_probs.dtype) for name in _LAYERS]
        if not layers[0].numel():
            return log_probs
        if logits.shape[-1] != layers[0].shape[1]:
            raise ValueError(
                f"the calibrator was fitted on {layers[0].shape[1]} classes, got logits of {logits.shape[-1]}; pass "
                "logits of the same network, or fit again"
            )
        return self._stretch(log_probs, layers, self.center.to(log_probs.dtype), self.spread.to(log_probs.dtype))

    def _stretch(self, log_probs: Tensor, layers: list[Tensor], center: Tensor, spread: Tensor) -> Tensor:
        ordered, order = log_probs.sort(-1, descending=True)
        seen = ordered if self.variant == "order_invariant" else log_probs
        hidden = (seen - center) / spread
        for layer in range(2):
            hidden = F.linear(hidden, layers[2 * layer], layers[2 * layer + 1]).relu()
        factors = F.softplus(F.linear(hidden, layers[4], layers[5]))
        gaps = (ordered[..., :-1] - ordered[..., 1:]) * factors
        # A fit may shrink the first gap below what rounding leaves beside the others: the predicted class would change.
        total = gaps.detach().sum(-1, keepdim=True) + math.log(log_probs.shape[-1]) + 1
        least = torch.where(ordered[..., :1] > ordered[..., 1:2], 4 * torch.finfo(gaps.dtype).eps * total, 0)
        gaps = torch.cat([gaps[..., :1].maximum(least), gaps[..., 1:]], -1)
        raised = F.pad(gaps.flip(-1).cumsum(-1).flip(-1), (0, 1), value=0.0)  # the least likely class stays at 0
        return torch.zeros_like(raised).scatter(-1, order, raised).log_softmax(-1)

    def _bar(self, total: int | None) -> tqdm:
        return progress_bar(title=f"intra-order-preserving map, {self.variant}", total=total, show=self.progress)
