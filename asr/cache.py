"""What a process made and the next one wants as well: arrays in the user's cache, read from there as they are used."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from asr.files import left_behind, replacing

_KEPT = 2  # to be raised where other arrays are made of the same
_MOST_KEPT = 6  # of each kind there
_WORTH_KEEPING = 1 << 20  # bytes; less is made in no time
_ALIGNED = 64  # bytes
_keeping = threading.Lock()


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
    folder = _cache()
    if folder is None:
        return make()
    place = folder / f"{name}-{digest.hexdigest()}"
    with _keeping:  # two networks of a model may want the same
        with suppress(Exception):  # whatever a damaged file brings about
            return _mapped(place)
        made = make()
        if sum(array.nbytes for array in made.values()) < _WORTH_KEEPING:
            return made
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _write_mappable(place, made)
            there = sorted(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
            for old in [*there[:-_MOST_KEPT], *filter(left_behind, folder.glob(".*"))]:
                old.unlink(missing_ok=True)
        return made


def _cache() -> Path | None:
    """The folder of what is kept; None: there is no home to keep it in."""
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), f"{os.path.expanduser('~')}/.cache"):
        if os.path.isabs(folder):
            return Path(folder) / "streaming-asr"
    return None


def _write_mappable(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays so that `_mapped` finds each where it lies: what they are, as a line of JSON, and all bytes."""
    about, end = {}, 0
    for name, array in arrays.items():
        start = -(-end // _ALIGNED) * _ALIGNED
        about[name] = [array.dtype.str, array.shape, start]
        end = start + array.nbytes
    head = json.dumps({"bytes": end, "arrays": about}).encode()
    head += b" " * (-(len(head) + 1) % _ALIGNED) + b"\n"
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(head)
        for name, array in arrays.items():
            file.seek(len(head) + about[name][2])
            file.write(array.tobytes())
        file.truncate(len(head) + end)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """What `_write_mappable` wrote, read from the disk as it is used.

    Raises:
        Exception: it is not there, or not whole.
    """
    with path.open("rb") as file:
        head = file.readline()
    told, content = json.loads(head), np.memmap(path, np.uint8, "r", len(head))
    if len(content) != told["bytes"]:
        raise ValueError("not whole")
    return {
        name: np.frombuffer(content, kind, math.prod(shape), start).reshape(shape)
        for name, (kind, shape, start) in told["arrays"].items()
    }
