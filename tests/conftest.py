"""What several test files share: tiny networks, and where real speech lies if it is there."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: oversubscription is slower than one thread
# What is kept in the user's cache (asr.cache.kept) is made by the code that is tested, and stays the user's.
_cache = tempfile.TemporaryDirectory(prefix="asr-cache-")
os.environ.setdefault("PIP_CACHE_DIR", os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pip"))
os.environ["XDG_CACHE_HOME"] = _cache.name

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_speech() -> Path:
    """The folder of real speech; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real speech (../shared/data) is not here")
    return SHARED
