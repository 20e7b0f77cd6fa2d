"""How a job gets its Ray: it joins a running cluster, or starts a quiet local one and removes its traces."""

import fcntl
import glob
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO

from asr.errors import AsrError, ConfigError

# Read by Ray's daemons when they start, or by `import ray`: set before either. The user's own values win.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # workers run at nice 15 otherwise: anything else on the machine starves them
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # with the default 2 s a reported checkpoint can be lost
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECT_STORE_BYTES = 200_000_000  # jobs pass file names and small reports through it, no audio


@contextmanager
def start(address: str | None = None, cpus: int | None = None) -> Iterator[ModuleType]:
    """Give the `ray` module, connected; a cluster that was started here ends with the block.

    Args:
        address: a running cluster ("auto", "host:6379"); None: RAY_ADDRESS, or else a local cluster.
        cpus: processor slots of a local cluster; None: as many as the machine has. Says nothing when joining.

    Raises:
        ConfigError: ray is not installed, or nothing answers at `address`.
        AsrError: a local cluster does not start.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:  # Ray's ports listen on all interfaces: without a token, any neighbour may run code
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data  # sets up its own logging when imported, so it is made quiet here, after that
    except ImportError as error:
        raise ConfigError("ray is not installed: pip install 'streaming-asr[train]', or use --workers 0") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # these would warn that there is no progress bar, and that there is a token
    for chatty in ("ray.data._internal.progress", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
    elif address is not None:
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        except Exception as error:  # Ray has many ways to say no
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(f"no Ray cluster can be joined at {address!r}: {reason}") from error
        try:
            if not ray.cluster_resources().get("CPU"):  # nothing else would say why nothing happens
                told = f"the cluster at {address} has no processor for work yet; waiting for nodes (Ctrl-C ends this)"
                print(told, file=sys.stderr, flush=True)
            yield ray
        finally:
            ray.shutdown()
    else:
        # not below TMPDIR, which may be long: the path of a socket has at most 107 bytes
        parent = os.environ.get("RAY_TMPDIR", "/tmp")
        _remove_what_killed_jobs_left(parent)
        folder = tempfile.mkdtemp(prefix="asr-ray-", dir=parent)
        with _lock(folder):
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                    _temp_dir=folder,
                )
            except Exception as error:
                # What of it did start writes there until this process ends: the next job removes the folder.
                reason = str(error).strip().split("\n")[0]
                raise AsrError(
                    f"Ray did not start here: {reason}; the machine may be too busy: try again, or use --workers 0"
                ) from error
            try:
                yield ray
            finally:
                ray.shutdown()
                shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: str) -> IO[bytes]:
    """Mark a folder as one in use, until this process ends, however it does."""
    lock = open(f"{folder}/.lock", "wb")  # noqa: SIM115 (held as long as the cluster lives)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(f"{folder}/.lock", f"{folder}/lock")
    return lock


def _remove_what_killed_jobs_left(parent: str) -> None:
    for path in glob.glob(f"{parent}/asr-ray-*/lock"):
        try:
            with open(path, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or another user's
            continue
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _knock(address: str) -> None:
    """Raise an OSError at once where nobody listens; Ray itself tries for a minute and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
