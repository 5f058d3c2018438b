"""The callback: what it trains, against loops written by hand, and on Trainers of every kind."""

from __future__ import annotations

from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import MultiPrecisionQAT
from lightning_plugins.data import DigitsDataModule
from lightning_plugins.models import resnet20
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import (
    AdaptiveLearningRateScaling,
    MultiPrecisionBatchNorm,
    clamp_scales_,
    convert_,
    load_packed,
    quantized_layers,
    switch_,
)
from toys import TinyModule, assert_same_weights, make_trainer, toy_data, weights

BITS = (8, 6, 4, 2)


class Normed(TinyModule):
    """With a batch normalisation, and whatever optimizer the test wants."""

    def __init__(self, make_optimizer=None, make_scheduler=None) -> None:
        super().__init__()
        self.net = nn.Sequential(self.net[0], nn.BatchNorm1d(16), *self.net[1:])
        self.make_optimizer = make_optimizer or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.make_scheduler = make_scheduler

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def batches():
    return list(DataLoader(toy_data(64), batch_size=16))


def is_scale(name: str) -> bool:
    return "scale" in name


def two_optimizers(module: nn.Module, kind) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The paper's: one for the weights, one for the scales without weight decay."""
    scales = [p for name, p in module.named_parameters() if is_scale(name)]
    others = [p for name, p in module.named_parameters() if not is_scale(name)]
    made = kind(module)
    defaults = {key: made.defaults[key] for key in ("lr", "weight_decay", *(["momentum"] if kind is sgd else []))}
    return type(made)(others, **defaults), type(made)(scales, **defaults | {"weight_decay": 0.0})


@pytest.mark.parametrize("kind", [sgd, adam])
@pytest.mark.parametrize("alrs", ["eta", "released", "paper", "relative", "none", "frozen"])
def test_sequential_is_algorithm_a2(tmp_path, kind, alrs):
    module = Normed(kind)
    callback = MultiPrecisionQAT(BITS, stepping="sequential", alrs=alrs, first_last_bits=2)
    make_trainer(tmp_path, 1, callback, precision="64-true").fit(module)

    reference = convert_(Normed(kind), BITS, first_last_bits=2).double()
    reference.train()
    weights_optimizer, scales_optimizer = two_optimizers(reference, kind)
    bn_and_biases = [
        p for name, p in reference.named_parameters() if not is_scale(name) and ("norms" in name or "bias" in name)
    ]
    if alrs == "released":  # its scales' group holds BN and biases
        others = [p for p in weights_optimizer.param_groups[0]["params"] if all(p is not q for q in bn_and_biases)]
        weights_optimizer.param_groups[0]["params"] = others
        scales_optimizer.param_groups[0]["params"] += bn_and_biases
    scaling = AdaptiveLearningRateScaling(alrs, bits=BITS)
    lr = weights_optimizer.param_groups[0]["lr"]
    for inputs, labels in batches():
        for b in BITS:
            switch_(reference, b)
            F.cross_entropy(reference(inputs.double()), labels).backward()
            gradients = [layer.weight_scale.grad for layer in quantized_layers(reference).values()]
            scales_optimizer.param_groups[0]["lr"] = scaling.learning_rate(lr, b, gradients)
            weights_optimizer.step()
            scales_optimizer.step()
            clamp_scales_(reference)
            weights_optimizer.zero_grad()
            scales_optimizer.zero_grad()
    assert_same_weights(module.net, switch_(reference, 8).net, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alrs", ["eta", "none", "frozen"])
def test_accumulate_is_algorithm_a1(tmp_path, alrs):
    module = Normed(sgd)
    make_trainer(
        tmp_path, 1, MultiPrecisionQAT(BITS, stepping="accumulate", alrs=alrs, first_last_bits=2), precision="64-true"
    ).fit(module)

    reference = convert_(Normed(sgd), BITS, first_last_bits=2).double()
    reference.train()
    weights_optimizer, scales_optimizer = two_optimizers(reference, sgd)
    scales_optimizer.param_groups[0]["lr"] = 0.05
    factors = AdaptiveLearningRateScaling(alrs, bits=BITS)
    for inputs, labels in batches():
        sums: dict[Tensor, Tensor] = {}
        for b in BITS:
            switch_(reference, b)
            F.cross_entropy(reference(inputs.double()), labels).backward()
            for name, parameter in reference.named_parameters():
                if parameter.grad is not None:
                    # For plain SGD, a gradient times a factor is a learning rate times it.
                    factor = factors.factor(b) if is_scale(name) else 1.0
                    sums[parameter] = sums.get(parameter, 0) + factor * parameter.grad
                    parameter.grad = None
        for parameter, gradient in sums.items():
            parameter.grad = gradient
        weights_optimizer.step()
        scales_optimizer.step()
        clamp_scales_(reference)
        for parameter in sums:
            parameter.grad = None
    assert_same_weights(module.net, switch_(reference, 8).net, rtol=1e-9, atol=1e-11)


def test_scales_have_groups_of_their_own(tmp_path):
    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            groups = optimizer.param_groups
            self.home = groups[0]
            self.own = {group["bits"]: group for group in groups[1:]}

    look, module = Look(), Normed(adam)
    make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, stepping="accumulate", first_last_bits=2), look).fit(module)
    assert {group["name"] for group in look.own.values()} == {"quant_scales"}
    assert {group["weight_decay"] for group in look.own.values()} == {0.0}
    assert look.home["lr"] == 0.01
    assert look.home["weight_decay"] == 0.1
    found = {b: group["lr"] for b, group in look.own.items()}
    assert found == pytest.approx({None: 0.01, 8: 0.01, 6: 1e-3, 4: 1e-4, 2: 1e-5})
    counted = [p for group in (look.home, *look.own.values()) for p in group["params"]]
    assert len(counted) == len(set(counted)) == len(list(module.parameters()))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1], 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e9, cooldown=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 1), lr_scheduler.ExponentialLR(o, 0.5)], [1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


@pytest.mark.parametrize("stepping", ["accumulate", "sequential"])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_every_scheduler_goes_on_and_the_scales_follow(tmp_path, make_scheduler, stepping):
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.rates: list[tuple[float, float]] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            groups = optimizer.param_groups
            two_bits = next(group for group in groups if group.get("bits") == 2)
            self.rates.append((groups[0]["lr"], two_bits["lr"]))

    def rates_of_a_plain_run() -> list[float]:
        optimizer = sgd(Normed())
        scheduler, found = make_scheduler(optimizer), []
        for _ in range(3):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        return found

    look = Look()
    callback = MultiPrecisionQAT(BITS, stepping=stepping, first_last_bits=2)
    make_trainer(tmp_path, 3, callback, look).fit(Normed(sgd, make_scheduler))
    steps = look.rates if stepping == "accumulate" else look.rates[3::4]  # those at 2 bits
    assert [home for home, _ in steps][::4] == pytest.approx(rates_of_a_plain_run())
    assert [own for _, own in steps] == pytest.approx([1e-3 * home for home, _ in steps])


@pytest.mark.parametrize("stepping", ["accumulate", "sequential"])
def test_named_parameters_and_own_groups_of_the_user(tmp_path, stepping):
    def named(module):
        return torch.optim.SGD(module.named_parameters(), lr=0.1)

    def split(module):  # a user's habit: no decay for vectors, which the scales are
        vectors = [p for p in module.parameters() if p.ndim < 2]
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        return torch.optim.SGD([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.1)

    for kind in named, split:
        module = Normed(kind)
        make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, stepping=stepping, first_last_bits=2)).fit(module)
        assert all(value.isfinite().all() for value in module.state_dict().values())


def test_by_default_it_steps_at_each_precision_where_that_can_work(tmp_path):
    def run(stepping: str | None, **flags) -> dict[str, Tensor]:
        module = TinyModule()
        make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, stepping=stepping, first_last_bits=2), **flags).fit(module)
        return weights(module)

    assert_same_weights(run(None), run("sequential"))
    with pytest.warns(UserWarning, match="one step for all precisions.*accumulate_grad_batches=2"):
        accumulated = run(None, accumulate_grad_batches=2)
    assert_same_weights(accumulated, run("accumulate", accumulate_grad_batches=2))


def test_fused_clipping_counts_in_every_step(tmp_path):
    """With gradients clipped to almost nothing, no step moves the weights, also not the inner ones."""
    module = Normed(lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    before = module.net[0].weight.detach().clone()
    callback = MultiPrecisionQAT(BITS, stepping="sequential", first_last_bits=2)
    make_trainer(tmp_path, 1, callback, gradient_clip_val=1e-9).fit(module)
    torch.testing.assert_close(module.net[0].weight, before, rtol=0, atol=1e-6)


@pytest.mark.processes
@pytest.mark.parametrize("stepping", ["accumulate", "sequential"])
def test_two_processes_equal_one(tmp_path, stepping):
    class Write(pl.Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save(weights(pl_module), f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")

    def run(batch_size: int, **arguments) -> dict[str, Tensor]:
        module = TinyModule(batch_size=batch_size)
        # Inputs stay as they are: the first scale of an activation depends on which values one process sees.
        callback = MultiPrecisionQAT(BITS, stepping=stepping, first_last_bits=2, quantize_inputs=False)
        make_trainer(tmp_path, 5, callback, Write(), precision="64-true", **arguments).fit(module)
        return torch.load(tmp_path / "rank-0.pt", weights_only=True)

    # All 64 samples make one batch, however they are dealt out, and the loss is a mean.
    alone = run(64)
    together = run(32, strategy="ddp_fork", devices=2)
    assert_same_weights(alone, together, rtol=1e-9, atol=1e-11)
    assert_same_weights(together, torch.load(tmp_path / "rank-1.pt", weights_only=True))


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    def run(batch_size: int, accumulate: int) -> dict[str, Tensor]:
        module = TinyModule(batch_size=batch_size)
        callback = MultiPrecisionQAT(BITS, stepping="accumulate", first_last_bits=2, quantize_inputs=False)
        make_trainer(tmp_path, 2, callback, precision="64-true", accumulate_grad_batches=accumulate).fit(module)
        return weights(module)

    assert_same_weights(run(16, 1), run(8, 2), rtol=1e-9, atol=1e-11)


def test_each_precision_keeps_its_statistics(tmp_path):
    module = Normed()
    make_trainer(tmp_path, 2, MultiPrecisionQAT((8, 2), first_last_bits=2)).fit(module)
    norm = module.net[1]
    assert isinstance(norm, MultiPrecisionBatchNorm)
    assert norm.norms["8"].num_batches_tracked == norm.norms["2"].num_batches_tracked == 8
    assert not torch.equal(norm.norms["8"].running_var, norm.norms["2"].running_var)


def test_full_precision_beside_the_others(tmp_path):
    module = Normed()
    trainer = make_trainer(tmp_path, 1, MultiPrecisionQAT((32, 8, 2), first_last_bits=2))
    trainer.fit(module)
    (metrics,) = trainer.validate(module, verbose=False)
    assert {"val/acc_32bit", "val/acc_8bit", "val/acc_2bit", "val/acc_bits_mean"} <= metrics.keys()
    layer = quantized_layers(module)["net.0"]
    assert torch.equal(layer.quantized_weight(), layer.weight)


def test_accuracy_at_every_precision(tmp_path):
    module = Normed()
    trainer = make_trainer(tmp_path, 3, MultiPrecisionQAT(BITS, first_last_bits=2))
    trainer.fit(module)
    for run, data in (trainer.validate, toy_data(32, seed=1)), (trainer.test, toy_data(32, seed=2)):
        (metrics,) = run(module, verbose=False)
        stage = "val" if run == trainer.validate else "test"
        inputs, labels = data.tensors
        module.eval()
        expected = {b: (switch_(module, b)(inputs).argmax(1) == labels).float().mean().item() for b in BITS}
        switch_(module, 8)
        assert {b: metrics[f"{stage}/acc_{b}bit"] for b in BITS} == pytest.approx(expected)
        assert metrics[f"{stage}/acc_bits_mean"] == pytest.approx(sum(expected.values()) / 4)


def test_what_is_logged_and_drawn(tmp_path):
    module = Normed()
    callback = MultiPrecisionQAT((8, 2), first_last_bits=2)
    trainer = make_trainer(tmp_path, 2, callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    (metrics,) = tmp_path.rglob("metrics.csv")
    text = metrics.read_text()
    for b in (8, 2):
        for name in ("lambda", "input_scale", "clipped_weights", "clipped_inputs"):
            assert f"quantization/{name}_{b}bit" in text
    assert "quantization/weight_scale" in text
    media = {path.name.split("-step")[0] for path in tmp_path.rglob("media/**/*.*")}
    assert {"codes", "layers", "accuracy_over_bits"} <= media


def test_self_distillation_by_hand(tmp_path):
    class Soft(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.targets: list[Tensor] = []
            self.logits: list[Tensor] = []

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.targets.append(batch[1])
            self.logits.append(logits.detach())
            return F.cross_entropy(logits, batch[1])

        def train_dataloader(self):
            inputs, labels = toy_data(32).tensors
            return DataLoader(torch.utils.data.TensorDataset(inputs, labels, torch.arange(32)), batch_size=16)

    module = Soft()
    callback = MultiPrecisionQAT((8, 2), first_last_bits=2, self_distillation=0.7)
    make_trainer(tmp_path, 2, callback, limit_val_batches=0).fit(module)
    labels = toy_data(32).tensors[1]
    onehot = F.one_hot(labels, 3).float()
    # Calls in order: epoch 0: batch 0 at 8 and 2 bits, batch 1 at 8 and 2 bits; epoch 1 the same.
    for call, targets in enumerate(module.targets):
        epoch, batch = call // 4, call % 4 // 2
        rows = slice(16 * batch, 16 * batch + 16)
        if epoch == 0:
            hard = targets if targets.ndim == 1 else targets.argmax(1)
            assert torch.equal(hard, labels[rows])
        else:
            previous = module.logits[2 * batch].softmax(1)  # epoch 0, 8 bits
            torch.testing.assert_close(targets, 0.3 * onehot[rows] + 0.7 * previous)


def test_self_distillation_resumes(tmp_path):
    def parts(epochs: int, **fit) -> ImageClassifier:
        module = ImageClassifier("convnet3", num_classes=10, in_channels=1, image_size=8, model_args={"width": 4})
        data = DigitsDataModule(batch_size=256, with_index=True)
        trainer = make_trainer(
            tmp_path, 4, MultiPrecisionQAT((8, 2), self_distillation=0.7), max_epochs=4, limit_train_batches=2
        )
        trainer.fit_loop.max_epochs = 4
        return module, data, trainer

    torch.manual_seed(0)
    module, data, trainer = parts(4)
    start = deepcopy(module.state_dict())

    class SaveHalfway(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer.callbacks.append(SaveHalfway())
    trainer.fit(module, data)
    other, data, trainer = parts(4)
    other.load_state_dict(start)
    trainer.fit(other, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_weights(module.model, other.model)


def test_self_distillation_says_what_it_needs(tmp_path):
    trainer = make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 2), first_last_bits=2, self_distillation=0.7))
    with pytest.raises(MisconfigurationException, match="with_index=True"):
        trainer.fit(TinyModule())


def test_a_compiled_net_is_compiled_once_for_each_precision(tmp_path):
    class Compiled(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.graphs = 0
            self.compiled = None

        def count(self, graph, example_inputs):
            self.graphs += 1
            return graph.forward

        def training_step(self, batch, batch_idx):
            if self.compiled is None:
                self.compiled = [torch.compile(self.net, backend=self.count)]  # in a list: no second submodule
            return F.cross_entropy(self.compiled[0](batch[0]), batch[1])

    torch.compiler.reset()
    module = Compiled()
    flags = {"limit_val_batches": 0, "max_steps": 3, "precision": "64-true"}
    make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, first_last_bits=2), **flags).fit(module)
    assert module.graphs == len(BITS)
    eager = TinyModule()
    make_trainer(tmp_path, 1, MultiPrecisionQAT(BITS, first_last_bits=2), **flags).fit(eager)
    assert_same_weights(module.net, eager.net, rtol=1e-7, atol=1e-9)


def test_layers_from_configure_model_are_converted(tmp_path):
    class Late(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = self.made

    module = Late()
    make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 4), first_last_bits=2)).fit(module)
    assert quantized_layers(module)


def test_it_starts_from_a_trained_net(tmp_path):
    trained = Normed()
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(trained)
    trainer.save_checkpoint(tmp_path / "fp32.ckpt")
    other = Normed()
    nn.init.zeros_(other.net[0].weight)
    callback = MultiPrecisionQAT((8, 4), first_last_bits=2, start_from=str(tmp_path / "fp32.ckpt"))
    make_trainer(tmp_path, 1, callback, limit_train_batches=0).fit(other)
    assert torch.equal(other.net[0].weight, trained.net[0].weight)
    for path, message in (tmp_path / "none.ckpt", "no such checkpoint"), (tmp_path / "bad.ckpt", "this very module"):
        torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "bad.ckpt")
        trainer = make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 4), start_from=str(path)))
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Normed())


def test_a_second_run_keeps_the_conversion_and_another_precision_is_refused(tmp_path):
    module = Normed()
    make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 4), first_last_bits=2)).fit(module)
    make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 4), first_last_bits=2)).fit(module)
    with pytest.raises(MisconfigurationException, match=r"converted for \(8, 4\) already.*restore_"):
        make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 2), first_last_bits=2)).fit(module)


def test_pruning_holds_through_training(tmp_path):
    from torch.nn.utils import prune

    module = TinyModule()
    prune.l1_unstructured(module.net[0], "weight", amount=0.5)
    make_trainer(tmp_path, 2, MultiPrecisionQAT((8, 4), first_last_bits=2)).fit(module)
    layer = quantized_layers(module)["net.0"]
    module(torch.rand(2, 8))
    assert (layer.quantized_weight()[layer.weight_mask == 0] == 0).all()
    assert (layer.weight_orig[layer.weight_mask == 1] != TinyModule().net[0].weight[layer.weight_mask == 1]).all()


def test_lightnings_own_pruning_callback_on_top(tmp_path):
    from lightning.pytorch.callbacks import ModelPruning

    module = Normed()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.net[0], "weight")], amount=0.5)
    make_trainer(tmp_path, 2, MultiPrecisionQAT((8, 4), first_last_bits=2), pruning).fit(module)
    assert (module.net[0].weight == 0).float().mean() >= 0.5


def test_export_gives_a_file_that_loads(tmp_path):
    module = Normed()
    callback = MultiPrecisionQAT(BITS, first_last_bits=2)
    make_trainer(tmp_path, 1, callback).fit(module)
    paths = callback.export(tmp_path / "exports")
    assert [path.name for path in paths] == ["packed.safetensors", "cost.txt"]
    loaded = load_packed(paths[0], Normed())
    inputs = toy_data(8).tensors[0]
    module.eval()
    for b in (8, 4, 8, 2):
        assert torch.equal(switch_(loaded, b)(inputs), switch_(module, b)(inputs))


def test_a_user_trains_on_real_data_with_two_lines(tmp_path):
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64)
    module = ImageClassifier(
        resnet20(in_channels=1, width=8),
        num_classes=10,
        mean=data.mean,
        std=data.std,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    trainer = make_trainer(tmp_path, 5, MultiPrecisionQAT((8, 4), stepping="sequential"))
    trainer.fit(module, data)
    (metrics,) = trainer.test(module, data, verbose=False)
    assert metrics["test/acc_8bit"] > 0.8
    assert metrics["test/acc_4bit"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": (8, 9)}, "different precisions of 2 to 8"),
        ({"bits": (8, 8)}, "different precisions"),
        ({"bits": (32,)}, "with or without 32 beside them"),
        ({"stepping": "both"}, "'accumulate', 'sequential' or None"),
        ({"alrs": "paper", "stepping": "accumulate"}, "use stepping='sequential'"),
        ({"alrs": "linear"}, "one of eta, released"),
        ({"self_distillation": 1.5}, r"self_distillation must lie in \[0, 1\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiPrecisionQAT(**arguments)


def test_wrong_combinations(tmp_path):
    def refuses(message: str, module: TinyModule, callback: MultiPrecisionQAT, **flags) -> None:
        trainer = make_trainer(tmp_path, 1, callback, **flags)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(module)

    ends = {"first_last_bits": 2}
    refuses("first_last_bits=8 quantizes the ends", TinyModule(), MultiPrecisionQAT((8, 4)))
    sequential = MultiPrecisionQAT((8, 4), stepping="sequential", **ends)
    refuses("use stepping='accumulate'", TinyModule(), sequential, accumulate_grad_batches=2)
    relative = MultiPrecisionQAT((8, 4), alrs="relative", **ends)
    refuses("which alrs='relative' needs", TinyModule(), relative, accumulate_grad_batches=2)
    refuses("LBFGS", Normed(lambda m: torch.optim.LBFGS(m.parameters())), MultiPrecisionQAT((8, 4), **ends))

    class Regression(TinyModule):
        def forward(self, inputs):
            return self.net(inputs)[:, 0]

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx) -> None:
            pass

    refuses("pass evaluate=False", Regression(), MultiPrecisionQAT((8, 4), **ends))
    make_trainer(tmp_path, 1, MultiPrecisionQAT((8, 4), first_last_bits=2, evaluate=False)).fit(Regression())
