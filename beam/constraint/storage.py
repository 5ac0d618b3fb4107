"""Folders of arrays: ``.npy`` files, which hold no code, and a small JSON file that says what they are."""

import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DESCRIPTION = "flashbeam.json"
_VERSION = 1
Arrays = dict[str, NDArray[Any]]


def write(path: str | os.PathLike[str], kind: str, arrays: Arrays, numbers: dict[str, int]) -> None:
    """Write a new folder, whole or not at all."""
    folder = Path(path)
    if folder.exists():  # whoever has mapped its files would see them change
        raise FileExistsError(f"path: expected a path where nothing is yet, got {folder}")
    description = {
        "format": f"flashbeam.{kind}",
        "version": _VERSION,
        "numbers": numbers,
        "arrays": {
            name: {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": zlib.crc32(array.data)}
            for name, array in arrays.items()
        },
    }
    unfinished = folder.absolute().parent / f".{folder.name}.{uuid.uuid4().hex}"
    unfinished.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
        (unfinished / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read(path: str | os.PathLike[str], kind: str, mmap: bool) -> tuple[Arrays, dict[str, int]]:
    """The arrays and numbers of a folder. Their dtypes, shapes and checksums are as written; no more is known."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path: expected a folder written by fb.{kind}.save, got {folder}")
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        if description["format"] != f"flashbeam.{kind}":
            raise ValueError(f"its format is {description['format']!r}")
        if description["version"] != _VERSION:
            raise ValueError(f"its version is {description['version']!r}, not {_VERSION}")
        arrays = {name: _read_array(folder, name, facts, mmap) for name, facts in description["arrays"].items()}
        numbers = {name: int(number) for name, number in description["numbers"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, kind, error) from None
    return arrays, numbers


def damaged(path: str | os.PathLike[str], kind: str, error: Exception) -> ValueError:
    """What is said of a folder that holds something else."""
    return ValueError(f"path: expected a folder written by fb.{kind}.save, got {path}: {type(error).__name__}: {error}")


def _read_array(folder: Path, name: str, facts: dict[str, Any], mmap: bool) -> NDArray[Any]:
    if not name.isidentifier():
        raise ValueError(f"it names an array {name!r}")
    array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c" if mmap else None, allow_pickle=False)
    if array.dtype.str != facts["dtype"] or list(array.shape) != facts["shape"] or not array.flags.c_contiguous:
        raise ValueError(f"{name}.npy holds {array.dtype} {list(array.shape)}, not {facts['dtype']} {facts['shape']}")
    if zlib.crc32(array.data) != facts["crc32"]:
        raise ValueError(f"{name}.npy is not what was written")
    return array
