"""`asr train` starts with a C library that keeps its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOLD = "import sys; from pipelines.memory import keep_memory; keep_memory()"


def started(code: str, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [
        sys.executable,
        "-c",
        f"{code}; import os; print(os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:])",
        "a b",
    ]
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="only where there may be glibc")
def test_the_process_starts_anew_once_with_its_arguments() -> None:
    (line,) = started(TOLD)
    assert "glibc.malloc.hugetlb=1" in line
    assert line.endswith(" a b")


def test_what_the_user_has_set_stays() -> None:
    assert started(TOLD, GLIBC_TUNABLES="glibc.malloc.perturb=0") == ["glibc.malloc.perturb=0 a b"]
