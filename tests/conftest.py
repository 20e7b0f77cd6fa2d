"""What several test files share: tiny networks, and where real speech lies if it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: oversubscription is slower than one thread

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_speech() -> Path:
    """The folder of real speech; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real speech (../shared/data) is not here")
    return SHARED
