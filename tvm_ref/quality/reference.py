"""Reads reference statistics for FID: mean `mu` and covariance `sigma` of Inception features, from .npz or .pkl."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import safe_pickle
from ..data.npy import read_npy
from ..data.untrusted import open_regular
from .metrics import Moments

MOST_STATISTICS = 512 * 2**20  # bytes of an array; sigma of 2048 features takes 32 MiB


class ReferenceFileError(ValueError):
    """A file of reference statistics cannot be used. The message names the file."""


def load_moments(path: Path) -> Moments:
    """Reads `mu` [d] and `sigma` [d, d] from `path` (.npz, or .pkl with a plain dict of NumPy arrays), as float64.

    No code in the file is executed: npz members must not be pickles, and a pickle may hold plain containers, numbers,
    strings and NumPy arrays only.

    Raises FileNotFoundError; UnsafePickleError naming what is not allowed in a pickle; otherwise ReferenceFileError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {path}: expected an .npz or .pkl file with mu and sigma")
    if path.suffix == ".npz":
        content = _read_npz(path)
    elif path.suffix == ".pkl":
        content = _read_pickle(path)
    else:
        raise ReferenceFileError(f"{path}: expected a file that ends in .npz or .pkl")
    mean, covariance = content.get("mu"), content.get("sigma")
    for name, value, axes in (("mu", mean, 1), ("sigma", covariance, 2)):
        if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64) or value.ndim != axes:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ReferenceFileError(
                f"{path}: expected {name} as a float array with {axes} axes, got {got}; the file holds "
                f"{', '.join(sorted(content))}"
            )
        if not np.isfinite(value).all():
            raise ReferenceFileError(f"{path}: {name} holds values that are not finite")
    assert isinstance(mean, np.ndarray) and isinstance(covariance, np.ndarray)
    if covariance.shape != (len(mean), len(mean)):
        raise ReferenceFileError(f"{path}: mu has {len(mean)} numbers, but sigma has shape {list(covariance.shape)}")
    return Moments(*(torch.from_numpy(value.astype(np.float64)) for value in (mean, covariance)))


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            # Some files also hold the images, which are large.
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {name: _member(archive, name) if name in ("mu", "sigma") else None for name in names}
    except Exception as error:  # damaged bytes make NumPy and zipfile raise errors of many types
        raise ReferenceFileError(f"{path}: not an npz file of plain arrays ({error})") from error


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads an array, which may be compressed. What a member states of its size is not trusted."""
    with archive.open(f"{name}.npy") as stream:
        content = stream.read(MOST_STATISTICS + 1)
    if len(content) > MOST_STATISTICS:
        raise ValueError(f"{name}: expected at most {MOST_STATISTICS} bytes, got more")
    return read_npy(content)


def _read_pickle(path: Path) -> dict[str, Any]:
    content = safe_pickle.load(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ReferenceFileError(f"{path}: expected a dict with mu and sigma, got {type(content).__name__}")
    return content
