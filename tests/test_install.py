"""The installation for recognizing alone: small, and it recognizes."""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000


def size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installation_without_extras_is_below_250_mb_and_recognizes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("asr", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True)
    before = size(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = subprocess.run([python, "-m", "pip", "install", "-q", source], capture_output=True, text=True, check=False)
    if pip.returncode and "No matching distribution" in pip.stderr:
        pytest.skip("no package registry is within reach")
    assert pip.returncode == 0, pip.stderr
    assert size(tmp_path / "venv") - before < 250 * MEGABYTE
    sample = ROOT / "scripts" / "samples" / "audio" / "00008.flac"
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [tmp_path / "venv" / "bin" / "asr", "transcribe", sample]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) > 3
