"""Safetensors files with a described content and a checksum, as three of our formats have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor], described: Any) -> str:
    """Return the digest of tensors and of what is said about them, which must go into JSON."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_sealed(
    content: bytes,
    path: str,
    *,
    form: str,
    version: int,
    writer: str,
    described: Callable[[dict[str, Any]], Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file, once they are known to be what was written.

    Args:
        content: its bytes.
        path: its name, for messages.
        form: name of the format, the key of the header.
        version: the newest that can be read.
        writer: what writes such files, for messages.
        described: takes the header, returns what the checksum covers beside the tensors; a KeyError says that the
            header is damaged.

    Raises:
        ValueError: if the file is damaged, of another format, or of a newer version.
    """
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except Exception as error:  # safetensors leaves some kinds of damage to whatever its own code stumbles over
        raise ValueError(
            f"{path!r} is no safetensors file, or a damaged one ({error}); copy it again, or write it with {writer}"
        ) from error
    if form not in metadata:
        raise ValueError(f"{path!r} is a safetensors file, but none that {writer} wrote")
    try:
        about = json.loads(metadata[form])
        found, expected, covered = about["version"], about["checksum"], described(about)
        newer = found > version
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path!r} is damaged: its header cannot be read ({error!r}); copy it again") from error
    if newer:
        raise ValueError(
            f"{path!r} has version {found} of its format, this lightning_plugins reads {version}; upgrade it"
        )
    if expected != checksum(tensors, covered):
        raise ValueError(f"{path!r} is damaged: its checksum differs from the one that was written; copy it again")
    return about, tensors
