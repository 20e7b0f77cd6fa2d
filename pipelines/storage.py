"""Files on a disk or in an object store (s3://, gs://, and what fsspec knows), in one way."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from pyarrow import ArrowInvalid, ArrowNotImplementedError, fs

from asr.errors import AsrError, AudioError, ConfigError, ManifestError, Problem
from asr.files import locked, write_atomically
from asr.manifest import Utterance, read_manifest

_DOWNLOADS = 16  # at a time
_LOCK = ".lock"  # of a folder
_BLOCK_BYTES = 1 << 20
# Files of a manifest's folder that are read for the manifest; of the others only the names matter.
_TEXTS = {"", ".txt", ".jsonl", ".json", ".gz", ".csv", ".tsv", ".scp"}


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL."""
    return "://" in str(path)


@cache
def _root(scheme: str, host: str) -> tuple[fs.FileSystem, str]:
    """What serves scheme://host (a bucket, a name node), and where that lies in it; arrow's own, else fsspec's.

    Raises:
        ConfigError: neither knows the scheme, or a package for it is missing.
    """
    url = f"{scheme}://{host}"
    try:
        return fs.FileSystem.from_uri(url)
    except (ArrowInvalid, ArrowNotImplementedError):
        pass
    try:
        import fsspec

        files, root = fsspec.url_to_fs(url)
        return fs.PyFileSystem(fs.FSSpecHandler(files)), root
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: cannot be reached: {error}") from error


def _find(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URL, and the path in it."""
    if not is_remote(path):
        return fs.LocalFileSystem(), os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    host, _, name = rest.partition("/")
    files, root = _root(scheme, host)
    return files, f"{root}/{name}" if name else root


class Store:
    """A folder, whose files are read and written whole, by name.

    Args:
        folder: on a disk, or a URL such as s3://bucket/folder.

    Raises:
        ConfigError: nothing is known that serves such a URL.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/") if is_remote(folder) else os.path.abspath(folder)
        self._files, self._root = _find(self.folder)

    def path(self, name: str) -> str:
        """The path or URL of a file."""
        return f"{self.folder}/{name}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder unless it is there, and keep other jobs off it during the block (a remote one has no locks).

        What a killed job left half written goes.

        Raises:
            AsrError: another job has it.
        """
        self._files.create_dir(self._root, recursive=True)
        lock = nullcontext() if is_remote(self.folder) else locked(Path(self._root, _LOCK), self._taken)
        with lock:
            for name in self.names():
                if ".tmp-" in name:
                    self.remove(name)
            yield

    def _taken(self, owner: str) -> AsrError:
        return AsrError(f"{self.folder}: another `asr prepare` (process {owner}) is writing it; wait for its end")

    def names(self) -> list[str]:
        """The files in it, sorted."""
        found = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(i.base_name for i in found if i.type == fs.FileType.File and i.base_name != _LOCK)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is missing."""
        info = self._files.get_file_info(f"{self._root}/{name}")
        return info.size if info.type == fs.FileType.File else None

    def read(self, name: str) -> str:
        """The text of a file."""
        with self._files.open_input_stream(f"{self._root}/{name}") as file:
            return file.read().decode("utf-8")

    def write(self, name: str, text: str) -> None:
        """Write a text file in one step."""
        if is_remote(self.folder):  # an object appears when it is complete
            with self._files.open_output_stream(f"{self._root}/{name}") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        else:
            write_atomically(Path(self._root, name), text)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give the path of a file for the block to write in one step; when it ends well, the file is here."""
        if not is_remote(self.folder):
            yield Path(self._root, name)
            return
        with tempfile.TemporaryDirectory(prefix="asr-upload-") as folder:
            local = Path(folder, name)
            yield local
            fs.copy_files(str(local), f"{self._root}/{name}", destination_filesystem=self._files)

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        self._files.delete_file(f"{self._root}/{name}")


# ---- recordings


def states(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """(bytes, time in ns) of each file, which tell whether it changed; None where it is missing."""
    found: list[tuple[int, int] | None] = [None if is_remote(path) else _local_state(path) for path in paths]
    by_store: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        if is_remote(path):
            by_store.setdefault("/".join(path.split("/")[:3]), []).append(i)
    for indices in by_store.values():
        try:
            files, _ = _find(paths[indices[0]])
            infos = files.get_file_info([_find(paths[i])[1] for i in indices])  # many at a time
        except (OSError, ConfigError):
            continue
        for i, info in zip(indices, infos, strict=True):
            if info.type == fs.FileType.File:
                found[i] = info.size, info.mtime_ns or 0
    return found


def _local_state(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


@contextmanager
def local_copies(paths: Iterable[str]) -> Iterator[dict[str, str | AudioError]]:
    """Where each recording lies on this machine, or why it cannot: URLs are downloaded for the time of the block."""
    distinct = list(dict.fromkeys(paths))
    urls = [path for path in distinct if is_remote(path)]
    found: dict[str, str | AudioError] = {path: path for path in distinct}
    if not urls:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="asr-fetch-") as folder:
        local = [Path(folder, f"{number}{PurePosixPath(url).suffix}") for number, url in enumerate(urls)]
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            found.update(zip(urls, pool.map(_fetched, urls, local), strict=True))
        yield found


def _fetched(url: str, local: Path) -> str | AudioError:
    try:
        _download(url, local)
    except FileNotFoundError:
        return AudioError(f"{url}: no such file")
    except (OSError, ConfigError) as error:
        return AudioError(f"{url}: cannot be fetched: {error}")
    return str(local)


def _download(url: str, local: Path) -> None:
    """Copy one file, without the look at its folder that copy_files takes first."""
    files, path = _find(url)
    with files.open_input_stream(path) as source, open(local, "wb") as target:
        while block := source.read(_BLOCK_BYTES):
            target.write(block)


# ---- manifests


def read_any_manifest(manifest: str) -> tuple[list[Utterance], list[Problem]]:
    """`asr.manifest.read_manifest`, of a URL too: its rows then name recordings by their URLs.

    Raises:
        ManifestError: the manifest is missing or unreadable, or has no good row.
        ConfigError: nothing is known that serves such a URL.
    """
    if not is_remote(manifest):
        return read_manifest(manifest)
    files, path = _find(manifest.rstrip("/"))
    path = path.lstrip("/")
    base = manifest.rstrip("/").removesuffix(path)  # s3://, or hdfs://host/
    with tempfile.TemporaryDirectory(prefix="asr-manifest-") as root:

        def at_home(text: str) -> str:
            return text.replace(f"{root}/", base)

        try:
            _mirror(files, path, Path(root))
            rows, problems = read_manifest(Path(root, path))
        except OSError as error:
            raise ManifestError(f"{manifest}: cannot be read: {error}") from error
        except ManifestError as error:
            raise ManifestError(at_home(str(error))) from None
    return (
        [replace(row, id=at_home(row.id), audio=at_home(row.audio), where=at_home(row.where)) for row in rows],
        [Problem(at_home(problem.where), at_home(problem.reason)) for problem in problems],
    )


def _mirror(files: fs.FileSystem, path: str, root: Path) -> None:
    """Lay what `read_manifest` looks at below `root`: texts as they are, recordings as empty files."""
    if files.get_file_info(path).type == fs.FileType.Directory:
        found = files.get_file_info(fs.FileSelector(path, recursive=True))
        names = [info.path for info in found if info.type == fs.FileType.File]
        (root / path).mkdir(parents=True)
    else:
        folder, _, name = path.rpartition("/")
        beside = ("segments", "text", "utt2spk") if name == "wav.scp" else (name.replace("supervisions", "recordings"),)
        wanted = dict.fromkeys([path, *(f"{folder}/{other}" for other in beside)])
        names = [info.path for info in files.get_file_info(list(wanted)) if info.type == fs.FileType.File]
    for name in names:
        local = root / name.lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        if local.suffix.lower() in _TEXTS:
            with files.open_input_stream(name) as source:
                local.write_bytes(source.read())
        else:
            local.touch()
