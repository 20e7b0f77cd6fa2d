"""Files that are whole or not there, also after a power loss: written under a temporary name, synced, then renamed."""

import glob
import io
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_WRITING_SECONDS = 3600  # nothing is written under a temporary name for so long


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block another path to write to; when it ends well, that file takes the place of `path`."""
    told_apart = zlib.crc32(os.fsencode(path.name))  # the name itself may be as long as names may be
    temporary = path.with_name(f".{told_apart:08x}.tmp-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text in UTF-8; what names of files have that is none stays as it is."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


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


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give the block an empty folder to fill; when it ends well, that takes the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if old.exists() and not folder.exists():  # a process of this number was killed between the two renames
        os.replace(old, folder)
    others = folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*")
    for left in (temporary, old, *filter(left_behind, others)):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Hold a file that tells other processes to keep off; the system lets it go when this one dies.

    Where another process has it, `refusal` makes the error to raise, of that process's number.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise refusal(file.read()) from error
        except (ImportError, OSError):  # Windows, or a file system without locks: there it goes without
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def left_behind(path: Path) -> bool:
    """Whether a process that wrote this under a temporary name was killed, by all appearances."""
    try:
        return time.time() - path.stat().st_mtime > _WRITING_SECONDS
    except FileNotFoundError:  # it was renamed just now
        return False


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a new name may get there before the content."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some systems know no such thing for folders
            raise
