"""The supernet's callback: what it draws, that resumed runs and processes agree, and the search at its end."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plugins.callbacks import MultiPrecisionQAT
from lightning_plugins.callbacks.quantization.mixed_precision_qat import MixedPrecisionQAT
from lightning_plugins.quantization import BitPlan, active_plan, load_packed, quantized_layers, switch_
from lightning_plugins.quantization.scores import score_layers
from lightning_plugins.quantization.supernet import sensitive_layers
from toys import NUM_CLASSES, TinyModule, assert_same_weights, make_trainer, toy_data, weights

BITS = (8, 4, 2)


class Deep(TinyModule):
    """Three layers with normalisations between them."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, NUM_CLASSES),
        )  # fmt: skip


class Watch(pl.Callback):
    """Writes down at which bits each forward pass of the training runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, int]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        def look(module: nn.Module, args: Any) -> None:
            if trainer.training:
                self.seen.append((trainer.current_epoch, dict(active_plan(pl_module))))

        self.handle = pl_module.net.register_forward_pre_hook(look)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.handle.remove()


def supernet(**options: Any) -> MixedPrecisionQAT:
    defaults = {"first_last_bits": 2, "warmup_epochs": 0, "num_epochs": 4, "sensitivity": "uniform", "budgets": ()}
    return MixedPrecisionQAT(**({"bits": BITS} | defaults | options))


@pytest.mark.parametrize("stepping", ["sequential", "accumulate"])
@pytest.mark.parametrize("alrs", ["eta", "released"])
def test_without_draws_it_is_multi_precision_qat(tmp_path, stepping, alrs):
    mixed, uniform = Deep(), Deep()
    options = {"first_last_bits": 2, "stepping": stepping, "alrs": alrs}
    callback = MixedPrecisionQAT(BITS, **options, sigma=0.0, sensitivity="uniform", budgets=())
    make_trainer(tmp_path, 2, callback).fit(mixed)
    make_trainer(tmp_path, 2, MultiPrecisionQAT(BITS, **options)).fit(uniform)
    found, expected = weights(mixed), weights(uniform)
    for name, value in expected.items():
        if "load_converted" in name:
            continue
        for b in BITS:  # the pair (b, b) is the normalisation of b
            if ".4.norms." in f".{name}":
                name = name.replace(f".norms.{b}.", f".norms.{b}_{b}.")
        assert torch.equal(found[name], value), name


def test_the_warm_up_draws_nothing_and_then_more_and_more(tmp_path):
    watch = Watch()
    callback = supernet(warmup_epochs=2, num_epochs=6, sigma=1.0, evaluate=False)
    make_trainer(tmp_path, 6, callback, watch, limit_val_batches=0).fit(Deep())
    passes = 4 * len(BITS)  # 4 batches an epoch
    off = []
    for epoch in range(6):
        plans = [plan for e, plan in watch.seen if e == epoch]
        assert len(plans) == passes
        off.append(sum(b != BITS[i % 3] for i, plan in enumerate(plans) for b in plan.values()))
    assert off[:2] == [0, 0]
    assert off[2] > 0
    # In the last epoch sigma is 1, and two in three draws are of other bits.
    assert off[-1] == pytest.approx(2 / 3 * passes * 3, abs=4 * (passes * 3 * 2 / 9) ** 0.5)


def test_sensitive_layers_draw_more_bits(tmp_path):
    watch = Watch()
    given = {"net.0": 1.0, "net.3": 0.0, "net.6": 0.0}
    callback = supernet(sensitivity=given, sigma=1.0, num_epochs=1, evaluate=False, stepping="accumulate")
    make_trainer(tmp_path, 12, callback, watch, limit_val_batches=0).fit(Deep())
    assert callback.sensitive == ("net.0",)
    means = {name: sum(plan[name] for _, plan in watch.seen) / len(watch.seen) for name in ("net.0", "net.3", "net.6")}
    assert means["net.0"] == pytest.approx(84 / 14, abs=0.8)  # (64 + 16 + 4) / (8 + 4 + 2)
    assert means["net.3"] == pytest.approx(14 / 3, abs=0.8)
    assert means["net.6"] == pytest.approx(14 / 3, abs=0.8)


def test_a_resumed_run_goes_on_as_the_straight_one(tmp_path):
    def run(epochs: int, folder: str, **fit: Any) -> tuple[Deep, Watch, pl.Trainer, MixedPrecisionQAT]:
        module, watch = Deep(), Watch()
        callback = supernet(sigma=1.0, sensitivity=None, num_probes=10, evaluate=False)
        trainer = make_trainer(tmp_path, epochs, callback, watch, limit_val_batches=0)
        trainer.fit(module, **fit)
        return module, watch, trainer, callback

    straight, all_seen, _, callback = run(4, "straight")
    _, first_seen, trainer, _ = run(2, "first")
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, last_seen, _, other = run(4, "last", ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first_seen.seen + last_seen.seen == all_seen.seen
    assert_same_weights(straight, resumed)
    assert callback.state_dict() == other.state_dict()


def test_another_seed_draws_otherwise(tmp_path):
    plans = []
    for seed in (0, 0, 1):
        watch = Watch()
        make_trainer(tmp_path, 1, supernet(seed=seed), watch).fit(Deep())
        plans.append(watch.seen)
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.processes
def test_processes_draw_alike(tmp_path):
    class Write(Watch):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            states = [callback.state_dict() for callback in trainer.callbacks]
            torch.save((self.seen, weights(pl_module), states), f"{tmp_path}/rank-{trainer.global_rank}.pt")

    callback = supernet(sigma=1.0, sensitivity=None, num_probes=10, budgets=(4,))
    make_trainer(tmp_path, 2, callback, Write(), strategy="ddp_fork", devices=2).fit(Deep(batch_size=8))
    (seen, first, state), (other, second, other_state) = (
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert seen == other
    assert len({tuple(plan.values()) for _, plan in seen}) > 5
    assert_same_weights(first, second)
    assert state == other_state


def test_processes_step_as_one_does(tmp_path):
    """What has no part in a pass does not move in it, momentum included, also where processes exchange zeros for it."""

    class Write(pl.Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.save(weights(pl_module), f"{tmp_path}/{trainer.world_size}-{trainer.global_rank}.pt")

    class Frozen(Deep):
        def on_train_epoch_start(self) -> None:  # the statistics of a batch depend on how it is dealt out
            self.net[1].eval()
            self.net[4].eval()

    for devices in (1, 2):
        module = Frozen(batch_size=64 // devices)
        callback = supernet(sigma=1.0, quantize_inputs=False, alrs="none", stepping="sequential")
        flags = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        make_trainer(tmp_path, 4, callback, Write(), precision="64-true", **flags).fit(module)
    one, two = (torch.load(tmp_path / f"{n}-0.pt", weights_only=True) for n in (1, 2))
    assert_same_weights(one, two, rtol=1e-9, atol=1e-11)


def test_only_the_pair_in_use_takes_part_in_a_step(tmp_path):
    module = Deep()
    make_trainer(tmp_path, 1, supernet(sigma=0.0), limit_train_batches=1).fit(module)
    counts = {key: int(norm.num_batches_tracked) for key, norm in module.net[4].norms.items()}
    assert counts == {f"{p}_{b}": int(p == b) for p in BITS for b in BITS}


def test_sensitivities_are_computed_from_the_weights_that_training_starts_from(tmp_path):
    module = Deep()
    callback = supernet(sensitivity=None, num_probes=50, num_samples=64)
    pairs = [tuple(toy_data(64).tensors)]
    make_trainer(tmp_path, 1, callback, limit_train_batches=1).fit(module)
    expected = score_layers(Deep(), "hawq-v2", pairs, bits=BITS, first_last_bits=2, num_probes=50)
    assert callback.sensitivities is not None
    for name, layer in expected.layers.items():
        found = callback.sensitivities.layers[name]
        assert found.importance == pytest.approx(layer.importance, rel=0.2)
        assert found.losses.keys() == layer.losses.keys()
    importance = {name: layer.importance for name, layer in callback.sensitivities.layers.items()}
    assert callback.sensitive == sensitive_layers(importance)


def test_sensitivities_from_a_file_or_by_name(tmp_path):
    table = score_layers(Deep(), "random", bits=BITS, first_last_bits=2)
    path = str(table.save(tmp_path / "table.json"))
    callback = supernet(sensitivity=path)
    make_trainer(tmp_path, 1, callback).fit(Deep())
    assert callback.sensitivities == table
    by_name = supernet(sensitivity="zd")
    make_trainer(tmp_path, 1, by_name).fit(Deep())
    assert by_name.sensitivities is not None
    assert by_name.sensitivities.method == "zd"
    with pytest.warns(UserWarning, match="net.3 are negative and taken as 0"):
        make_trainer(tmp_path, 1, supernet(sensitivity={"net.0": 1.0, "net.3": -0.1, "net.6": 0.2})).fit(Deep())


def test_the_search_and_what_it_leaves(tmp_path):
    module = Deep()
    callback = supernet(sensitivity=None, num_probes=10, budgets=(3, 6), sigma=1.0)
    trainer = make_trainer(tmp_path, 4, callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module)
    assert callback.plans.keys() == {3, 6}
    inputs, labels = toy_data(32, seed=1).tensors
    for budget, found in callback.plans.items():
        assert found.cost <= budget
        accuracy = (switch_(module.eval(), found.plan)(inputs).argmax(1) == labels).float().mean()
        assert found.accuracy == pytest.approx(accuracy.item())
    switch_(module, 8)
    (metrics,) = trainer.test(module, verbose=False)
    inputs, labels = toy_data(32, seed=2).tensors
    expected = (switch_(module.eval(), callback.plans[3].plan)(inputs).argmax(1) == labels).float().mean()
    assert metrics["test/acc_plan_3"] == pytest.approx(expected.item())
    switch_(module, 8)
    assert metrics["test/acc_bits_mean"] == pytest.approx(sum(metrics[f"test/acc_{b}bit"] for b in BITS) / 3)
    paths = {path.name: path for path in callback.export(tmp_path / "exports")}
    assert list(paths) == ["packed.safetensors", "cost.txt", "sensitivity.json", "plan_3.json", "plan_6.json"]
    plan = BitPlan.load(paths["plan_3.json"])
    loaded = load_packed(paths["packed.safetensors"], Deep())
    assert torch.equal(switch_(loaded, plan)(inputs), switch_(module, plan)(inputs))
    media = {path.name.split("-step")[0] for path in tmp_path.rglob("media/**/*.*")}
    assert {"frontier", "plans", "sensitivity", "codes", "accuracy_over_bits"} <= media
    text = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "quantization/sigma" in text
    assert "quantization/acc_plan_3" in text


def test_a_search_without_validation_data_says_so(tmp_path):
    callback = supernet(budgets=(4,))
    with pytest.warns(UserWarning, match=r"searched no plans.*budgets=\(\)"):
        make_trainer(tmp_path, 1, callback, limit_val_batches=0).fit(Deep())
    assert callback.plans == {}


def test_it_starts_from_a_multi_precision_checkpoint(tmp_path):
    start = Deep()
    trainer = make_trainer(tmp_path, 2, MultiPrecisionQAT(BITS, first_last_bits=2))
    trainer.fit(start)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    module = Deep()
    nn.init.zeros_(module.net[0].weight)
    callback = supernet(start_from=str(tmp_path / "start.ckpt"))
    make_trainer(tmp_path, 1, callback, limit_train_batches=0).fit(module)
    assert torch.equal(module.net[3].weight_scale, start.net[3].weight_scale)
    inputs = toy_data(8).tensors[0]
    for b in BITS:
        assert torch.equal(switch_(module.eval(), b)(inputs), switch_(start.eval(), b)(inputs))
    other = supernet(bits=(8, 4), start_from=str(tmp_path / "start.ckpt"))
    with pytest.raises(MisconfigurationException, match=r"converted for \(8, 4\) bits"):
        make_trainer(tmp_path, 1, other).fit(Deep())


def test_full_precision_beside_the_others_is_never_drawn(tmp_path):
    watch, module = Watch(), Deep()
    make_trainer(tmp_path, 2, supernet(bits=(32, 8, 2), sigma=1.0, num_epochs=1), watch).fit(module)
    for index, (_, plan) in enumerate(watch.seen):
        assert (set(plan.values()) == {32}) == (index % 3 == 0)
    assert set(quantized_layers(module)) == {"net.0", "net.3", "net.6"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 1.5}, r"sigma must lie in \[0, 1\]"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"num_candidates": 0}, "num_candidates must be at least 1"),
        ({"budgets": (9,)}, "budgets are average bits, 2 to 8, got 9"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedPrecisionQAT(BITS, **arguments)


def test_wrong_combinations(tmp_path):
    def refuses(message: str, callback: MixedPrecisionQAT, **flags: Any) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(tmp_path, 1, callback, **flags).fit(Deep())

    refuses("lack the layers", supernet(sensitivity={"net.0": 1.0}))
    refuses("none.json", supernet(sensitivity=str(tmp_path / "none.json")))
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    refuses("not a sensitivity table", supernet(sensitivity=str(tmp_path / "bad.json")))
    table = score_layers(TinyModule(), "zd", bits=BITS, first_last_bits=2)
    path = str(table.save(tmp_path / "other.json"))
    refuses("lacks the layer 'net.3'.*score_layers", supernet(sensitivity=path))
    refuses("give num_epochs", supernet(num_epochs=None), max_epochs=-1, max_steps=2)
    with pytest.warns(UserWarning, match="will draw no bits"):
        make_trainer(tmp_path, 1, supernet(warmup_epochs=4)).fit(Deep())


def state_numbers(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [number for value in state.values() for number in state_numbers(value)]
    return [state]


def test_state_is_plain_numbers(tmp_path):
    callback = supernet(sensitivity=None, num_probes=10)
    make_trainer(tmp_path, 1, callback).fit(Deep())
    assert {type(number) for number in state_numbers(callback.state_dict())} <= {int, float, Tensor}
