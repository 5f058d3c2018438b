from __future__ import annotations

import os

import pytest

from lightning_plugins.files import write_atomically


def test_it_writes_and_replaces_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b.bin"
    assert write_atomically(str(path), b"old") == path
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_midway_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = write_atomically(tmp_path / "a", b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
