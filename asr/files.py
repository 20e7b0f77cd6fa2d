"""Files that are whole or not there, also after a power loss: written under a temporary name, synced, then renamed."""

import hashlib
import io
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

_KEPT = 1  # the version of what is kept in the user's cache
_MOST_KEPT = 6  # of each kind there
_WORTH_KEEPING = 1 << 20  # bytes; less is made in no time
_keeping = threading.Lock()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block another path to write to; when it ends well, that file takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


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


def kept(
    name: str, made_of: Iterable[np.ndarray | Path], make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """What `make` gives, from the user's cache (XDG_CACHE_HOME, or ~/.cache) if it was made there before.

    What cannot be kept is made each time. Arrays of the cache are read as they are used, and shared by processes.

    Args:
        name: of what is made.
        made_of: all that it depends on: arrays, and files, which are known by place, size and time.
        make: called where it is not there.
    """
    digest = hashlib.blake2b(f"{_KEPT} {name}".encode(), digest_size=16)
    for part in made_of:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(part.tobytes())
        elif part.exists():
            status = part.stat()
            digest.update(f"{part.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            return make()  # which says so
    place = _cache() / f"{name}-{digest.hexdigest()}"
    with _keeping:  # two networks of a model may want the same
        with suppress(OSError, ValueError):  # damaged
            if arrays := {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in place.glob("*.npy")}:
                return arrays
        made = make()
        if sum(array.nbytes for array in made.values()) < _WORTH_KEEPING:
            return made
        with suppress(OSError):
            with replacing_folder(place) as temporary:
                for part, array in made.items():
                    np.save(temporary / f"{part}.npy", array)
            there = sorted(place.parent.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
            for old in there[:-_MOST_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        return made


def _cache() -> Path:
    home = os.path.expanduser("~")  # "~" itself, where it is not known
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "streaming-asr"


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give the block an empty folder to fill; when it ends well, that takes the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
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
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
