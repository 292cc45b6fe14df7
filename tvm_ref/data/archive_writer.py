"""Writes data sets in the format that archive.py reads. Equal contents give equal files, byte for byte."""

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .archive import LABEL_FILE

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the date of every member of a zip file, so that files do not depend on the time


def write_archive(
    path: Path, contents: Iterable[tuple[str, bytes]], labels: Sequence[tuple[str, int]] | None, *, zipped: bool
) -> None:
    """Writes files (name, content), and their labels if there are any, as an uncompressed zip file or as a folder.

    labels: (name, class index) of every file; it is read last. Raises FileExistsError if the path exists, or OSError.
    """
    if not zipped:
        path.mkdir()
        for name, content in contents:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        (path / LABEL_FILE).write_bytes(_listing(labels))
        return
    with path.open("xb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, content in contents:
                archive.writestr(zipfile.ZipInfo(name, LONG_AGO), content)
            archive.writestr(zipfile.ZipInfo(LABEL_FILE, LONG_AGO), _listing(labels))
        stream.flush()
        os.fsync(stream.fileno())


def _listing(labels: Sequence[tuple[str, int]] | None) -> bytes:
    return json.dumps({"labels": labels}).encode()
