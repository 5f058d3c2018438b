"""Files of logits: what is read, and what is refused with which words."""

from __future__ import annotations

import io

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lightning_plugins.cli import main
from lightning_plugins.data import LogitsDataModule, read_logits
from lightning_plugins.modules import LogitsModule
from toys import make_trainer

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(10, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, 10)
PROBS = torch.from_numpy(LOGITS).softmax(1).numpy()


def npz(folder, **arrays):
    path = folder / "net.npz"
    np.savez(path, **arrays)
    return str(path)


def csv_of(table, header=None):
    text = io.StringIO()
    np.savetxt(text, table, delimiter=",")
    return (header + "\n" if header else "") + text.getvalue()


def test_every_form_of_file_gives_the_same(tmp_path):
    table = np.concatenate([LOGITS, LABELS[:, None].astype(np.float32)], 1)
    np.save(tmp_path / "net.npy", table)
    save_file({"logits": LOGITS, "targets": LABELS}, tmp_path / "net.safetensors")
    (tmp_path / "plain.csv").write_text(csv_of(table))
    (tmp_path / "named.csv").write_text(csv_of(table[:, [3, 0, 1, 2]], "label,a,b,c"))
    npz(tmp_path, predictions=LOGITS, ground_truth=LABELS[:, None])
    for name in ("net.npy", "net.safetensors", "plain.csv", "named.csv", "net.npz"):
        logits, labels = read_logits(tmp_path / name)["all"]
        np.testing.assert_allclose(logits.numpy(), LOGITS, rtol=1e-6)
        assert labels.tolist() == LABELS.tolist()
        assert labels.dtype == torch.int64


def test_bfloat16_and_half_become_float32(tmp_path):
    from safetensors.torch import save_file as save_tensors

    logits = torch.from_numpy(LOGITS)
    for dtype in (torch.bfloat16, torch.float16):
        save_tensors({"logits": logits.to(dtype), "labels": torch.from_numpy(LABELS)}, tmp_path / "net.safetensors")
        read = read_logits(tmp_path / "net.safetensors")["all"][0]
        torch.testing.assert_close(read, logits.to(dtype).float(), rtol=0, atol=0)


def test_the_draw_is_the_permutation_of_the_seed(tmp_path):
    data = LogitsDataModule(npz(tmp_path, logits=LOGITS, labels=LABELS), calibration_fraction=0.3, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    data.setup()
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(data.val_set.tensors[0], torch.from_numpy(LOGITS)[order[:3]])
    torch.testing.assert_close(data.test_set.tensors[1], torch.from_numpy(LABELS)[order[3:]])


def test_parts_of_the_file_are_kept(tmp_path):
    path = npz(tmp_path, logits_val=LOGITS[:4], labels_val=LABELS[:4], test_logits=LOGITS[4:], test_labels=LABELS[4:])
    data = LogitsDataModule(path, calibration_fraction=0.9, batch_size=4)
    assert data.num_classes == 3
    assert [len(batch[1]) for batch in data.val_dataloader()] == [4]
    assert [len(batch[1]) for batch in data.test_dataloader()] == [4, 2]
    lines = [f"{a},{b},{c},{y},{'val' if i < 4 else 'test'}" for i, ((a, b, c), y) in enumerate(zip(LOGITS, LABELS))]  # noqa: B905
    (tmp_path / "net.csv").write_text("\n".join(["a,b,c,label,split", *lines]))
    parts = read_logits(tmp_path / "net.csv")
    torch.testing.assert_close(parts["test"][0], data.test_set.tensors[0])
    torch.testing.assert_close(parts["val"][1], data.val_set.tensors[1])


def test_probabilities_become_their_logarithms_and_zeros_stay_finite(tmp_path):
    probs = PROBS.copy()
    probs[0] = [0, 0, 1]
    logits = read_logits(npz(tmp_path, probs=probs, labels=LABELS), input="probs")["all"][0]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1), torch.from_numpy(probs))
    with np.errstate(divide="ignore"):
        path = npz(tmp_path, log_probs=np.log(probs), labels=LABELS)
    torch.testing.assert_close(read_logits(path, input="log_probs")["all"][0], logits)


def arrays_that_are_wrong():
    return [
        ({"logits": LOGITS}, "must have arrays 'logits' and 'labels'.*found 'logits'; rename"),
        ({"a": LOGITS, "b": LABELS}, "found 'a', 'b'; rename"),
        ({"logits_val": LOGITS, "labels_val": LABELS}, "or 'logits_val'.*rename"),
        ({"logits": LOGITS, "scores": LOGITS, "labels": LABELS}, "two arrays of scores.*leave only one"),
        ({"probs": PROBS, "labels": LABELS}, "say what the scores are by input='probs'"),
        ({"logits": PROBS, "labels": LABELS}, "looks like probabilities.*pass input='probs'"),
        ({"logits": LOGITS[0], "labels": LABELS}, r"scores \(N, C\)"),
        ({"logits": LOGITS.astype(int), "labels": LABELS}, r"floating-point scores \(N, C\)"),
        ({"logits": LOGITS, "labels": LABELS[:9]}, r"each of the 10 rows.*found labels \(9,\)"),
        ({"logits": LOGITS, "labels": np.eye(3)[LABELS]}, "class indices, not one-hot"),
        ({"logits": LOGITS, "labels": LABELS + 1}, "integers from 0 to 2, found 3; .*number the classes from 0"),
        ({"logits": LOGITS, "labels": LABELS + 0.5}, "integers from 0 to 2"),
        ({"logits": LOGITS, "labels": np.array(["a"] * 10)}, "integers from 0 to 2, found a"),
        ({"logits": LOGITS * np.nan, "labels": LABELS}, "NaN or infinity; drop"),
        ({"logits": LOGITS, "labels": np.array([None] * 10)}, "pickled Python objects.*plain arrays"),
        (
            {"logits_val": LOGITS, "labels_val": LABELS, "logits_test": LOGITS[:, :2], "labels_test": LABELS % 2},
            r"\[2, 3\] classes in its two parts",
        ),
    ]


@pytest.mark.parametrize(("arrays", "words"), arrays_that_are_wrong())
def test_wrong_arrays_are_refused(tmp_path, arrays, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_logits(npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("a,b,c\n1,2,0\n", "one column called 'label'"),
        ("a,b,label\n1,2,0\n1,2\n", "line 3 .* has 2 cells"),
        ("a,b,label\n1,x,0\n", "line 2 .* no number"),
        ("a,b,label,split\n1,2,0,train\n", "the split 'train'; write val or test"),
        ("a,b,label,split\n1,2,0,val\n", "has val samples; it needs"),
        ("1,2,0\n1,2,7\n", "integers from 0 to 1, found 7"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, content, words):
    (tmp_path / "net.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_logits(tmp_path / "net.csv")


def test_wrong_files_and_arguments_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        LogitsDataModule(str(tmp_path / "absent.npz")).setup()
    with pytest.raises(ValueError, match="ends in .npz"):
        read_logits(tmp_path / "net.pkl")
    for name in ("net.npz", "net.safetensors", "net.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of use")
        with pytest.raises(ValueError, match="damaged|pickled"):
            read_logits(tmp_path / name)
    np.save(tmp_path / "net.npy", LABELS)
    with pytest.raises(ValueError, match=r"\(N, C \+ 1\)"):
        read_logits(tmp_path / "net.npy")
    with pytest.raises(ValueError, match="sum to 1.*pass input='logits'"):
        read_logits(npz(tmp_path, predictions=LOGITS, labels=LABELS), input="probs")
    with pytest.raises(ValueError, match="leaves no validation data"):
        LogitsDataModule(npz(tmp_path, logits=LOGITS, labels=LABELS), calibration_fraction=0.01).setup()
    for arguments, words in (
        ({"input": "guess"}, "input must be one of"),
        ({"calibration_fraction": 1.0}, r"calibration_fraction must lie in \(0, 1\)"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            LogitsDataModule(**arguments)
    with pytest.raises(RuntimeError, match="call setup"):
        LogitsDataModule().val_dataloader()


def test_the_example_is_an_overconfident_net_and_the_same_each_time():
    from lightning_plugins.calibration import fit_temperature

    data = LogitsDataModule()
    data.setup()
    assert (data.num_classes, len(data.val_set) + len(data.test_set)) == (10, 1597)
    assert fit_temperature(*data.val_set.tensors) > 1.2
    again = LogitsDataModule()
    again.setup("validate")
    torch.testing.assert_close(again.val_set.tensors[0], data.val_set.tensors[0], rtol=0, atol=0)


def test_the_module_passes_logits_on_and_trains_nothing(tmp_path):
    data = LogitsDataModule(npz(tmp_path, logits=LOGITS, labels=LABELS))
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(LogitsModule(), datamodule=data)
    trainer.test(LogitsModule(), datamodule=data, verbose=False)
    logits, labels = data.test_set.tensors
    assert trainer.callback_metrics["test/nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels))
    assert torch.equal(torch.cat(trainer.predict(LogitsModule(), data.test_dataloader())), logits)
    assert isinstance(LogitsModule(), pl.LightningModule)


def test_a_wrong_file_is_one_line_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "calibration/compare", "--data.logits", "absent.npz"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: there is no file 'absent.npz'")
