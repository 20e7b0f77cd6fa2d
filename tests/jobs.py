"""What tests of jobs share that are killed on the way: where Ray may work, and which processes a job started."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.decoder import stop_decoder

REPOSITORY = Path(__file__).resolve().parents[1]


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets and logs, also those of killed jobs; gone afterwards, and no process with it."""
    folder = Path(tempfile.mkdtemp(prefix="asr-test-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            yield folder
            stop_decoder()
            wait_until(lambda: not processes_of(folder), "Ray's processes have ended", seconds=60)
        finally:  # also where a test failed
            for process in processes_of(folder):
                os.kill(process, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """The processes whose environment names `folder`, this one aside."""
    wanted = f"RAY_TMPDIR={folder}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        number = int(environment.parent.name)
        try:
            if number != os.getpid() and wanted in environment.read_bytes().split(b"\0"):
                found.append(number)
        except OSError:  # it ended meanwhile
            continue
    return found


def workers_of(folder: Path, name: str) -> list[int]:
    """The Ray workers of the cluster in `folder` whose title contains `name`."""
    found = []
    for number in processes_of(folder):
        try:
            title = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::") and name in title:
            found.append(number)
    return found


@contextmanager
def job(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Python code in a process of its own, from the repository's folder; killed with SIGKILL when the block ends."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'tests'}"}
    started = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = 120.0) -> None:
    """Look every few milliseconds, until something is true; fail where that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s not yet: {what}"
        time.sleep(0.01)
