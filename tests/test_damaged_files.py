"""Every file that is read may be cut, have a bit flipped, or be something else; every write may fail midway."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_table import (
    binary_net,
    conv_net,
    converted,
    images,
    labels,
    logits,
    net,
    pool,
    rand,
    small_net,
    statistics,
    table,
)
from torch import Tensor, nn

from lightning_plugins.calibration import FeatureStatistics
from lightning_plugins.data import read_logits
from lightning_plugins.data.fashion_mnist import read_idx
from lightning_plugins.distillation import ExtractorBank, SyntheticSet
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization import (
    BitPlan,
    SensitivityTable,
    load_binary,
    load_latency,
    load_packed,
    save_binary,
    save_latency,
    save_packed,
)
from lightning_plugins.report import write_report
from lightning_plugins.robustness import auto_attack_dataset
from lightning_plugins.runner import LastCheckpoint, _make_run_dir, find_checkpoint
from toys import TinyModule, make_trainer

PLACES = 64


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        write: makes one in a folder and returns its path.
        read: returns what is in it, to be compared.
        checked: a flipped bit is found, or changes nothing; else the file is one to be written by hand, or not ours.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    checked: bool = True


def write_set(folder: Path) -> Path:
    return SyntheticSet(rand(2, 3, 1, 4, 4), class_names=("a", "b")).save(folder) / "set.safetensors"


def read_set(path: Path) -> Any:
    found = SyntheticSet.load(path.parent)
    return found.images, found.space, found.class_names


def write_logits(folder: Path, kind: str) -> Path:
    from safetensors.torch import save

    path = folder / f"net.{kind}"
    if kind == "npz":
        np.savez(path, logits=logits().numpy(), labels=labels().numpy())
    elif kind == "csv":
        rows = torch.cat([logits(), labels()[:, None]], 1).tolist()
        path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    else:
        path.write_bytes(save({"logits": logits(), "labels": labels()}))
    return path


def write_idx(folder: Path, name: str) -> Path:
    content = bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(80))
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    return path


def write_attack_state(folder: Path) -> Path:
    read_attack_state(folder / "state")
    return folder / "state"


def read_attack_state(path: Path) -> Any:
    data = [(images(3), labels(3)), (images(3).flip(0), labels(3))]
    found = auto_attack_dataset(
        net(), data, eps=0.1, version="quick", num_steps=2, num_queries=2, state_path=path, progress=False
    )
    return found.accuracies


def write_checkpoint(folder: Path) -> Path:
    torch.save({"state_dict": net().state_dict()}, folder / "a.ckpt")
    return folder / "a.ckpt"


def write_results(folder: Path) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"recipe": "a", "metrics": {"test/acc": 0.5}, "seconds": {"fit": 1.0}, "versions": {}}))
    return path


def bank(folder: Path) -> Path:
    return ExtractorBank.train(small_net, pool(), num_pairs=2, epochs=1).save(folder / "bank")


FORMATS = {
    "packed net": Format(lambda f: save_packed(converted(), f / "net"), lambda p: load_packed(p, conv_net())(images())),
    "binary net": Format(
        lambda f: save_binary(binary_net(), f / "net"), lambda p: load_binary(p, conv_net())(images())
    ),
    "distilled set": Format(write_set, read_set),
    "network weights": Format(bank, lambda p: ExtractorBank.load(p, small_net).fingerprint),
    "feature statistics": Format(
        lambda f: statistics().save(f / "client"), lambda p: FeatureStatistics.load(p).covariance()
    ),
    "attack state": Format(write_attack_state, read_attack_state),
    "checkpoint": Format(write_checkpoint, lambda p: find_checkpoint(str(p)) and None, checked=False),
    "bit plan": Format(
        lambda f: BitPlan({"conv1": 8, "conv2": 4}).save(f / "plan.json"),
        lambda p: dict(BitPlan.load(p)),
        checked=False,
    ),
    "sensitivity table": Format(
        lambda f: table().save(f / "table.json"), lambda p: str(SensitivityTable.load(p)), checked=False
    ),
    "latency": Format(lambda f: save_latency(f / "latency.json", {"a": {8: 1.0, 4: 0.5}}), load_latency, checked=False),
    "logits, npz": Format(lambda f: write_logits(f, "npz"), read_logits),
    "logits, safetensors": Format(lambda f: write_logits(f, "safetensors"), read_logits, checked=False),
    "logits, csv": Format(lambda f: write_logits(f, "csv"), read_logits, checked=False),
    "idx": Format(lambda f: write_idx(f, "images"), read_idx, checked=False),
    "idx, gzipped": Format(lambda f: write_idx(f, "images.gz"), read_idx),
    "results": Format(write_results, lambda p: write_report(p.parent).name, checked=False),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(map(equal, a, b))
    return bool(a == b)


def read(kind: Format, path: Path, content: bytes) -> tuple[Any, Exception | None]:
    """Read a file with other content: its value, or a clear refusal."""
    path.write_bytes(content)
    value, refusal = None, None
    try:
        value = kind.read(path)
    except (ValueError, OSError) as error:
        refusal = error
    if refusal is not None:
        assert path.name in str(refusal) or path.parent.name in str(refusal), f"names no file: {refusal}"
        assert len(str(refusal)) < 1000
    return value, refusal


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused(name, tmp_path):
    kind = FORMATS[name]
    path = kind.write(tmp_path)
    content = path.read_bytes()
    whole = kind.read(path)
    for place in range(PLACES):
        part = content[: len(content) * place // PLACES]
        found, error = read(kind, path, part)
        if name == "logits, csv" and part.count(b"\n") > 0:  # lines of text have no end that could be missed
            continue
        assert error is not None or equal(found, whole), f"cut to {len(part)} of {len(content)} bytes"


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_found_where_there_is_a_checksum_and_breaks_nothing_elsewhere(name, tmp_path):
    kind = FORMATS[name]
    path = kind.write(tmp_path)
    content = path.read_bytes()
    whole = kind.read(path)
    for place in range(PLACES):
        flipped = bytearray(content)
        flipped[len(content) * place // PLACES] ^= 1 << (place % 8)
        found, error = read(kind, path, bytes(flipped))
        assert error is not None or not kind.checked or equal(found, whole), f"byte {len(content) * place // PLACES}"


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"text", b"[]", b"{}", b"null", b"\xff\xfe\x00", b"PK\x03\x04"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "results"])
def test_another_file_is_refused(name, content, tmp_path):
    kind = FORMATS[name]
    path = kind.write(tmp_path)
    if name in ("bit plan", "latency") and content == b"{}":
        pytest.skip("an empty one is one")
    _, error = read(kind, path, content)
    assert error is not None


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "results"])
def test_nothing_in_a_file_is_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = FORMATS[name]
    path = kind.write(tmp_path)
    torch.save({"state_dict": {"a": Harm()}, "logits": Harm()}, tmp_path / "pickled.pt")
    _, error = read(kind, path, (tmp_path / "pickled.pt").read_bytes())
    assert error is not None
    if path.suffix == ".npz":
        np.savez(path, logits=np.array([Harm()], dtype=object), labels=labels().numpy())
        with pytest.raises(ValueError, match="would run code"):
            kind.read(path)
    assert not (tmp_path / "harm").exists()


def test_files_without_a_checksum_are_still_read(tmp_path):
    from safetensors.torch import load_file, save_file

    path = statistics().save(tmp_path / "client")
    save_file(load_file(path), path)
    assert equal(FeatureStatistics.load(path).covariance(), statistics().covariance())


# Writing


WRITERS = ["packed net", "binary net", "distilled set", "network weights", "feature statistics", "bit plan",
           "sensitivity table", "latency"]  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_whole(name, tmp_path):
    kind = FORMATS[name]
    path = kind.write(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:

        def full(*arguments):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            kind.write(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    kind.read(path)


def test_a_limit_of_the_system_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    program = f"""
        import resource, signal
        from lightning_plugins.files import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomically({str(path)!r}, bytes(5000))
        except OSError as error:
            print(error.strerror)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "File too large"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_is_one_clear_error(name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file") as info:
        FORMATS[name].write(tmp_path / "file" / "folder")
    assert isinstance(info.value, NotADirectoryError | FileExistsError)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_root_that_cannot_be_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_PLUGINS_RUN_DIR", raising=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="choose another --root"):
        _make_run_dir(str(tmp_path / "file"), "recipe")


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: _make_run_dir(str(tmp_path), "recipe"), range(24)))
    assert len(set(made)) == 24
    assert all(path.is_dir() for path in made)


def test_a_checkpoint_that_is_cut_on_its_way_leaves_the_old_one_whole(tmp_path, monkeypatch):
    """The machine's temporary folder is on another disk, from which Lightning's file arrives piece by piece."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    make_trainer(tmp_path, 1, LastCheckpoint(path), enable_checkpointing=True).fit(TinyModule())
    before = path.read_bytes()

    def cut(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.move", cut)
        with pytest.raises(OSError, match="No space left"):
            make_trainer(tmp_path, 2, LastCheckpoint(path), enable_checkpointing=True).fit(TinyModule())
    assert path.read_bytes() == before
    assert find_checkpoint(str(tmp_path)) == str(path)
    make_trainer(tmp_path, 2, LastCheckpoint(path), enable_checkpointing=True).fit(TinyModule())
    assert path.read_bytes() != before
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_leave_the_whole_file_of_one(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([number]) * 200_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_atomically(path, content), contents * 3))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_on_the_way_is_not_left_half_loaded(tmp_path):
    path = save_packed(converted(), tmp_path / "net")
    path.write_bytes(path.read_bytes()[:-1])
    fresh = conv_net()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="damaged"):
        load_packed(path, fresh)
    assert type(fresh[0]) is nn.Conv2d
    assert equal(dict(fresh.state_dict()), before)
