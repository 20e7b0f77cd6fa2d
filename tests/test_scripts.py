"""The shell scripts: they parse, set up once, and say what is wrong. Nothing is installed here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    "scripts/demo", "scripts/test", "scripts/mini_librispeech", "scripts/soak", "scripts/calibrate",
    "scripts/_environment.sh", ".ci/run",
)  # fmt: skip
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")

TOOLS = ("dirname", "df", "awk", "cksum", "sed", "sort", "xargs", "echo", "mkdir", "rm", "tail", "grep")

# A stand-in for .venv/bin/python: notes each installation, and fails where $PIP_FAILS says how.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"pip install"*)
        echo "$*" >>"$CALLS"
        [ -z "$PIP_FAILS" ] || { echo "$PIP_FAILS"; exit 1; }
        ;;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the scripts need, without a .venv, in a folder with a space in its name."""
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", clone / "scripts", ignore=shutil.ignore_patterns("samples", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", clone)
    return clone


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash in `/`, without HOME and with no variables but those given."""
    assert BASH
    variables = {"PATH": os.environ["PATH"], **environment}
    command = [BASH, script, *arguments]
    return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_parse_it(script: str) -> None:
    done = run("-n", str(ROOT / script))
    assert done.returncode == 0, done.stderr


def only_these(folder: Path, **programs: str) -> str:
    """A PATH that holds the usual tools and `programs`, and no other Python."""
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        folder.mkdir(exist_ok=True)
        (folder / tool).symlink_to(found)
    for name, text in programs.items():
        (folder / name).unlink(missing_ok=True)
        write_program(folder / name, text)
    return str(folder)


@pytest.mark.parametrize("script", ["demo", "test"])
def test_a_python_that_is_too_old_is_named(clone: Path, tmp_path: Path, script: str) -> None:
    path = only_these(tmp_path / "bin", python3="#!/bin/sh\necho 3.9.2\n")
    done = run(f"{clone}/scripts/{script}", PATH=path)
    assert done.returncode == 1
    assert "Python 3.11 or 3.12 is needed; found: python3 is 3.9.2" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_python_at_all(clone: Path, tmp_path: Path) -> None:
    done = run(f"{clone}/scripts/demo", PATH=only_these(tmp_path / "bin"))
    assert done.returncode == 1
    assert "found: none" in done.stderr


def test_a_full_disk_is_named_before_anything_is_written(clone: Path, tmp_path: Path) -> None:
    full = "#!/bin/sh\necho header\necho /dev/vda 100000000 99990000 10240 99% /\n"
    done = run(f"{clone}/scripts/demo", PATH=only_these(tmp_path / "bin", df=full), PYTHON=sys.executable)
    assert done.returncode == 1
    assert "the disk is too full" in done.stderr and "10 MiB free" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_disk_that_fills_up_during_installation_is_named(clone: Path, tmp_path: Path) -> None:
    write_program(clone / ".venv/bin/python", FAKE_PYTHON)
    error = "OSError: [Errno 28] No space left on device"
    done = run(f"{clone}/scripts/demo", CALLS=str(tmp_path / "calls"), PIP_FAILS=error)
    assert done.returncode == 1
    assert "the disk became full" in done.stderr and error in done.stderr
    assert not (clone / ".venv/.installed").exists()


def test_setting_up_is_done_once_and_extras_stay(clone: Path, tmp_path: Path) -> None:
    write_program(clone / ".venv/bin/python", FAKE_PYTHON)
    calls = tmp_path / "calls"
    calls.touch()

    def prepare(*extras: str) -> list[str]:
        """Set up with `extras`; returns the installations that this took."""
        before = calls.read_text().splitlines()
        words = ["-c", 'set -euo pipefail; source "$1"; shift; prepare_environment "$@"', "-"]
        done = run(*words, f"{clone}/scripts/_environment.sh", *extras, CALLS=str(calls))
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()[len(before) :]

    assert len(prepare()) == 1
    assert prepare() == []
    assert "[test,train]" in prepare("train", "test")[0]
    assert prepare("train") == prepare("test", "train") == prepare() == []
    with (clone / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    assert "[test,train]" in prepare()[0]
    assert prepare() == []


def test_an_unknown_argument_of_the_demo_is_a_usage_error(clone: Path) -> None:
    done = run(f"{clone}/scripts/demo", "--fast")
    assert done.returncode == 2
    assert "--fast" in done.stderr
