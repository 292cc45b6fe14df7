"""Fingerprints of data sets, files and weights: enough to tell at resume that they are those the work began with."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dataset import Dataset
from .untrusted import open_regular, read_settings

Fingerprint = dict[str, Any]
BLOCK = 2**20


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Returns the number, shape and classes of the items and, of an archive, digests of names, sizes and labels.

    Contents are not read: it takes the time of listing the files.
    """
    found: Fingerprint = {
        "items": len(dataset), "shape": list(dataset.shape), "classes": dataset.num_classes,
    }  # fmt: skip
    if (listing := getattr(dataset, "listing", None)) is not None:
        names, sizes, labels = listing()
        found |= {"names": _digest(names), "sizes": _digest(sizes), "labels": _digest(labels)}
    return found


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Lists what differs between two fingerprints: "items: 32 before, 20 now"."""
    return [
        f"{name}: {_shown(before.get(name))} before, {_shown(now.get(name))} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def read_fingerprint(path: Path) -> Fingerprint:
    """Reads the JSON file of a fingerprint. Raises ValueError that names it for anything else."""
    try:
        found = read_settings(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no fingerprint of a data set: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no fingerprint of a data set: expected an object, got {type(found).__name__}")
    return found


def digest_of_files(*paths: Path) -> str:
    """Returns a digest (SHA-256, hexadecimal) of the contents of files. Raises OSError."""
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
        digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else _digest(digests)


def digest_of_weights(module: nn.Module) -> str:
    """Returns a digest (SHA-256, hexadecimal) of the names and values of the parameters and buffers of a network."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _shown(value: Any) -> Any:
    return f"{value[:8]}..." if isinstance(value, str) else value
