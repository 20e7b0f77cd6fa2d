"""Files that are whole or not there: written under a temporary name, then renamed."""

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text in UTF-8."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what np.load reads as .npz, packed well; byte for byte the same each time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            about = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            file.writestr(about, content.getvalue(), zipfile.ZIP_DEFLATED, 9)
    write_atomically(path, packed.getvalue())


def byte_planes(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 up as bytes, (bytes, n), the lowest first: as many as are needed; the high ones pack well."""
    count = (int(numbers.max(initial=0)).bit_length() + 7) // 8
    return (
        np.stack([(numbers >> 8 * i).astype(np.uint8) for i in range(count)])
        if count
        else np.zeros((0, len(numbers)), np.uint8)
    )


def from_byte_planes(planes: np.ndarray) -> np.ndarray:
    """What `byte_planes` made bytes of, int32 (n,)."""
    if not len(planes):
        return np.zeros(planes.shape[1], np.int32)
    numbers = planes[0].astype(np.int32)
    for i, plane in enumerate(planes[1:], start=1):
        numbers |= np.left_shift(plane, 8 * i, dtype=np.int32)
    return numbers


def replace_folder(temporary: Path, folder: Path) -> None:
    """Move a finished folder to its place; what was there before goes."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
