"""The mechanism on which every method that changes the training step stands."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_plugins.callbacks import TrainingStepCallback
from toys import (
    TinyModule,
    TorchvisionModule,
    assert_same_weights,
    image_and_label,
    make_trainer,
    toy_data,
    weights,
)


class Recorder(TrainingStepCallback):
    """Writes down when it is entered and left."""

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self.name, self.events = name, events

    @property
    def state_key(self) -> str:
        return f"Recorder{self.name}"

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        self.events.append(f"{self.name} in")
        output = step(batch, batch_idx)
        self.events.append(f"{self.name} out")
        return output


class Shift(TrainingStepCallback):
    """Adds a constant to the inputs: changes the batch."""

    def __init__(self, amount: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.amount = amount

    @property
    def state_key(self) -> str:
        return f"Shift{self.amount}"

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        inputs, _ = self.batch_fn(batch)
        return step(self.replace(batch, inputs, inputs + self.amount), batch_idx)


class Scale(TrainingStepCallback):
    """Multiplies the inputs: does not commute with Shift."""

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        inputs, _ = self.batch_fn(batch)
        return step(self.replace(batch, inputs, 3 * inputs), batch_idx)


class SeveralLosses(TrainingStepCallback):
    """The sum of the step's losses at several scales of the input, in one graph or one after another."""

    def __init__(self, scales: tuple[float, ...] = (1.0, 0.5, 2.0), *, one_by_one: bool) -> None:
        super().__init__()
        self.scales, self.one_by_one = scales, one_by_one

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        inputs, _ = self.batch_fn(batch)
        losses = []
        for number, scale in enumerate(self.scales, start=1):
            loss = step(self.replace(batch, inputs, scale * inputs), batch_idx)
            if self.one_by_one and number < len(self.scales):
                self.backward(loss)
                loss = loss.detach()
            losses.append(loss)
        return losses[-1] if self.one_by_one else sum(losses)


class Spy(TinyModule):
    """Keeps what its step received."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.received.append((batch, batch_idx))
        return super().training_step(batch, batch_idx)


def test_callbacks_nest_in_list_order_with_the_first_outermost(tmp_path):
    events: list[str] = []
    make_trainer(tmp_path, 1, Recorder("a", events), Recorder("b", events), limit_train_batches=1).fit(TinyModule())
    assert events == ["a in", "b in", "b out", "a out"]


def test_the_module_receives_the_batch_as_the_callbacks_left_it(tmp_path):
    inputs = toy_data()[:16][0]
    for callbacks, expected in ([Shift(1.0), Scale()], 3 * (inputs + 1)), ([Scale(), Shift(1.0)], 3 * inputs + 1):
        module = Spy()
        make_trainer(tmp_path, 1, *callbacks, limit_train_batches=1).fit(module)
        (batch, batch_idx), *_ = module.received
        torch.testing.assert_close(batch[0], expected)
        assert batch_idx == 0
        assert isinstance(batch, list)


def test_a_callback_that_only_passes_on_changes_no_bit(tmp_path):
    plain, wrapped = TinyModule(), TinyModule()
    make_trainer(tmp_path, 2).fit(plain)
    make_trainer(tmp_path, 2, Recorder("a", []), Recorder("b", [])).fit(wrapped)
    assert_same_weights(plain, wrapped)


def test_the_step_may_be_replaced_or_skipped(tmp_path):
    class OwnLoss(TrainingStepCallback):
        def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
            inputs, targets = self.batch_fn(batch)
            return F.cross_entropy(self.logits_fn(pl_module, inputs), targets)

    class Skip(TrainingStepCallback):
        def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
            return None

    plain, own, skipped = Spy(), Spy(), TinyModule()
    make_trainer(tmp_path, 1).fit(plain)
    make_trainer(tmp_path, 1, OwnLoss()).fit(own)
    assert not own.received
    assert_same_weights(plain, own)
    before = weights(skipped)
    make_trainer(tmp_path, 1, Skip()).fit(skipped)
    assert_same_weights(before, skipped)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    ],
    ids=["plain", "accumulate", "clip", "both"],
)
def test_losses_backpropagated_one_by_one_equal_their_sum(tmp_path, arguments):
    together, one_by_one = TinyModule(), TinyModule()
    make_trainer(tmp_path, 3, SeveralLosses(one_by_one=False), **arguments).fit(together)
    make_trainer(tmp_path, 3, SeveralLosses(one_by_one=True), **arguments).fit(one_by_one)
    assert_same_weights(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_backward_holds_for_nested_callbacks_too(tmp_path):
    together, one_by_one = TinyModule(), TinyModule()
    for module, separately in (together, False), (one_by_one, True):
        outer = SeveralLosses((1.0, 2.0), one_by_one=separately)
        make_trainer(tmp_path, 2, outer, Inner(one_by_one=separately), accumulate_grad_batches=2).fit(module)
    assert_same_weights(together, one_by_one, rtol=1e-5, atol=1e-6)


class Inner(SeveralLosses):
    """A second class, since two callbacks of one class would need two state keys."""


def test_gradients_of_a_skipped_step_do_not_reach_the_next_one(tmp_path):
    class SkipFirst(TrainingStepCallback):
        def __init__(self, *, backward: bool) -> None:
            self.use_backward = backward

        def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
            loss = step(batch, batch_idx)
            if batch_idx > 0:
                return loss
            if self.use_backward:
                self.backward(loss)
            return None

    skipped, after_backward = TinyModule(), TinyModule()
    make_trainer(tmp_path, 1, SkipFirst(backward=False)).fit(skipped)
    make_trainer(tmp_path, 1, SkipFirst(backward=True)).fit(after_backward)
    assert_same_weights(skipped, after_backward)


def test_backward_scales_the_loss_like_the_precision_does(tmp_path):
    """A precision that scales by 1024 and unscales before the update, as the fp16 one does on a GPU."""
    from lightning.pytorch.plugins import Precision

    class Scaling(Precision):
        def pre_backward(self, tensor, module):
            return super().pre_backward(1024 * tensor, module)

        def optimizer_step(self, optimizer, model, closure, **kwargs):
            def unscaled():
                loss = closure()
                for parameter in model.parameters():
                    parameter.grad /= 1024
                return loss

            return super().optimizer_step(optimizer, model, unscaled, **kwargs)

    together, one_by_one = TinyModule(), TinyModule()
    make_trainer(tmp_path, 2, SeveralLosses(one_by_one=False)).fit(together)
    make_trainer(tmp_path, 2, SeveralLosses(one_by_one=True), plugins=[Scaling()]).fit(one_by_one)
    assert_same_weights(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_backward_outside_of_a_step_says_where_it_belongs():
    with pytest.raises(RuntimeError, match="inside around_training_step"):
        Shift(1.0).backward(torch.zeros(()))


def test_everything_runs_under_the_trainers_precision(tmp_path):
    seen = []

    class Look(TrainingStepCallback):
        def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
            seen.append((torch.is_autocast_enabled("cpu"), pl_module(batch[0]).dtype))
            return step(batch, batch_idx)

    make_trainer(tmp_path, 1, Look(), precision="bf16-mixed", limit_train_batches=1).fit(TinyModule())
    make_trainer(tmp_path, 1, Look(), limit_train_batches=1).fit(TinyModule())
    assert seen == [(True, torch.bfloat16), (False, torch.float32)]


class Bomb(pl.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str, exception: type[BaseException]) -> None:
        def explode(*args: Any, **kwargs: Any) -> None:
            raise exception("boom")

        setattr(self, hook, explode)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_batch_start", "on_train_batch_end", "on_fit_end"])
@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_the_step_comes_back_after_an_exception(tmp_path, hook, exception):
    module = TinyModule()
    trainer = make_trainer(tmp_path, 1, Shift(1.0), Scale(), Bomb(hook, exception))
    with pytest.raises(SystemExit if exception is KeyboardInterrupt else exception):
        trainer.fit(module)
    assert "training_step" not in vars(module)


def test_the_step_comes_back_after_fit_and_fit_can_be_repeated(tmp_path):
    module, events = TinyModule(), []
    trainer = make_trainer(tmp_path, 1, Recorder("a", events), limit_train_batches=1)
    trainer.fit(module)
    assert "training_step" not in vars(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert events == ["a in", "a out"] * 2
    assert "training_step" not in vars(module)


def test_a_step_that_stood_on_the_instance_comes_back(tmp_path):
    module = TinyModule()
    own = module.training_step
    module.training_step = own
    make_trainer(tmp_path, 1, Shift(1.0)).fit(module)
    assert vars(module)["training_step"] is own


def test_other_stages_leave_the_module_alone(tmp_path):
    module = TinyModule()
    trainer = make_trainer(tmp_path, 1, Shift(1.0))
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    assert "training_step" not in vars(module)


def test_manual_optimization_is_refused_with_the_reason(tmp_path):
    with pytest.raises(MisconfigurationException, match="use automatic optimization"):
        make_trainer(tmp_path, 1, Shift(1.0)).fit(ManualOptimBoringModel())

    class Late(TinyModule):
        def setup(self, stage: str) -> None:
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="use automatic optimization"):
        make_trainer(tmp_path, 1, Shift(1.0)).fit(Late())


def test_a_step_that_takes_the_iterator_is_refused(tmp_path):
    class TakesIterator(TinyModule):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise AssertionError

    with pytest.raises(MisconfigurationException, match="take `batch` instead"):
        make_trainer(tmp_path, 1, Shift(1.0)).fit(TakesIterator())


def test_dictionary_batches_and_steps_without_an_index(tmp_path):
    plain, shifted_by_zero = TorchvisionModule(), TorchvisionModule()
    shifted_by_zero.load_state_dict(plain.state_dict())
    for module, callbacks in (plain, []), (shifted_by_zero, [Shift(0.0, batch_fn=image_and_label)]):
        torch.manual_seed(0)  # the net has dropout
        make_trainer(tmp_path, 1, *callbacks).fit(module)
    assert_same_weights(plain, shifted_by_zero)


def test_an_unknown_batch_form_and_a_computed_tensor_are_answered(tmp_path):
    with pytest.raises(TypeError, match=r"keys \['image', 'label', 'name'\]; pass batch_fn"):
        make_trainer(tmp_path, 1, Shift(1.0)).fit(TorchvisionModule())
    computed = Shift(1.0, batch_fn=lambda batch: (batch[0].double(), batch[1]))
    with pytest.raises(ValueError, match="the batch's own tensors"):
        make_trainer(tmp_path, 1, computed).fit(TinyModule())


def test_a_copy_of_the_module_made_during_fit_is_a_plain_module(tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
            copies.append(deepcopy(pl_module))

    events: list[str] = []
    make_trainer(tmp_path, 1, Recorder("a", events), Copy(), limit_train_batches=1).fit(TinyModule())
    copies[0].trainer = None
    torch.manual_seed(0)
    batch = next(iter(copies[0].train_dataloader()))
    with pytest.warns(UserWarning, match="self.log"):
        copies[0].training_step(batch, 0)
    assert events == ["a in", "a out"]


def test_weight_averaging_beside_it(tmp_path):
    plain, averaged = TinyModule(), TinyModule()
    make_trainer(tmp_path, 1, EMAWeightAveraging(decay=0.9)).fit(plain)
    make_trainer(tmp_path, 1, Recorder("a", []), EMAWeightAveraging(decay=0.9)).fit(averaged)
    assert_same_weights(plain, averaged)


def test_a_compiled_module_trains_the_same(tmp_path):
    plain, compiled = TinyModule(), TinyModule()
    make_trainer(tmp_path, 1, Shift(1.0)).fit(plain)
    make_trainer(tmp_path, 1, Shift(1.0)).fit(torch.compile(compiled, backend="eager"))
    assert_same_weights(plain, compiled, rtol=1e-6, atol=1e-7)


def test_optimizers_that_call_the_step_several_times(tmp_path):
    class Newtonish(TinyModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    together, one_by_one = Newtonish(), Newtonish()
    make_trainer(tmp_path, 1, SeveralLosses(one_by_one=False)).fit(together)
    make_trainer(tmp_path, 1, SeveralLosses(one_by_one=True)).fit(one_by_one)
    assert_same_weights(together, one_by_one, rtol=1e-3, atol=1e-4)


class Dealt(TinyModule):
    """Hands each process every second sample, so that two processes see the batches of one with twice the size."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = toy_data(64)
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, size, rank, shuffle=False)
        return DataLoader(data, batch_size=16 // size, sampler=sampler)

    def on_train_end(self) -> None:
        torch.save(weights(self), f"{self.trainer.default_root_dir}/weights-{self.trainer.global_rank}.pt")


@pytest.mark.processes
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_the_weights_of_one(tmp_path, accumulate):
    one = Dealt()
    callbacks = [Shift(1.0), SeveralLosses(one_by_one=True), Scale()]
    arguments = {"accumulate_grad_batches": accumulate, "precision": "64-true"}
    make_trainer(tmp_path, 2, *callbacks, **arguments).fit(one)
    make_trainer(tmp_path, 2, *callbacks, strategy="ddp_fork", devices=2, **arguments).fit(Dealt())
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_weights(first, second)
    assert_same_weights(first, one, rtol=1e-10, atol=1e-10)
