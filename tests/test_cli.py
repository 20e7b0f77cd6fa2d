"""The command: its help, its arguments, its exit status."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_architecture import TRAINING, WEB

from asr.errors import ConfigError, ModelError, Problem
from asr.runtime.folder import shipped_model
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "transcribe", "stream", "serve", "evaluate", "bench", "prepare", "align", "train", "train-lm", "export", "inspect",
    "study", "generate",
)  # fmt: skip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return int(ended.value.code or 0)


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))  # type: ignore[arg-type]


def test_help_names_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert command in shown
    assert "asr transcribe interview.mp3" in shown
    assert "Exit status" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "-h") == 0
    assert f"Usage: asr {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["transcribe", "stream", "evaluate"])
def test_whatever_recognizes_takes_the_same_choices(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, "-h")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--model", "--decoding", "--engine", "--precision", "--threads"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("asr ")


def test_recognizing_commands_load_nothing_of_training() -> None:
    code = (
        "import sys, pipelines.cli\n"
        "assert not {'numpy', 'onnxruntime'} & set(sys.modules), 'help must be quick'\n"
        "import pipelines.transcribe, pipelines.stream, pipelines.evaluate\n"
        "from asr.recognizer import Recognizer\n"
        f"heavy = {TRAINING | WEB} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("transcribe",),
        ("sing",),
        ("transcribe", "a.wav", "--format", "doc"),
        ("transcribe", "a.wav", "--decoding", "greedy", "--beam", "9"),
        ("stream", "a.wav", "--decoding", "greedy", "--lm-weight", "0.5"),
        ("transcribe", "a.wav", "--decoding", "beam", "--nbest", "3"),
        ("transcribe", "a.wav", "--threads", "0"),
        ("transcribe", "a.jsonl", "--format", "srt"),
        ("evaluate", "a.jsonl", "--clips", "3"),
        ("evaluate", "a.jsonl", "--clips", "3", "--report", "r.html", "--latency"),
        ("evaluate", "a.jsonl", "--rule", "max_segment=9"),
        ("export", "-o", "m", "--to", "onnx", "--small"),
        ("inspect", "a.wav", "--duration", "0"),
        ("transcribe", "a.wav", "--rule", "vad=none"),
        ("transcribe", "a.wav", "--decoding", "beam", "--word-score", "inf"),
        ("stream", "-", "--realtime"),
        ("stream", "a.wav", "--rate", "8000"),
        ("stream", "--realtime"),
        ("stream", "a.wav", "--device", "1"),
        ("prepare", "a.jsonl"),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2


def test_settings_of_the_beam_search_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stand_in(
        monkeypatch, "pipelines.transcribe", transcribe=lambda *a, **_: seen.append(a[1]) or [], RecognizerOptions=dict
    )
    chosen = ("--beam", 9, "--lm-weight", 0.5, "--word-score", -1, "--nbest", 3)
    assert run("transcribe", "a.wav", "-f", "json", "--decoding", "beam", *chosen) == 0
    assert seen[0]["decoding"] == "beam"
    assert seen[0]["search"] == {"beam": 9, "lm_weight": 0.5, "word_score": -1.0, "nbest": 3}


@pytest.mark.parametrize("command", ["transcribe", "stream", "evaluate"])
def test_a_missing_model_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, tmp_path / "a", "--model", tmp_path / "none") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(tmp_path / "none") in err
    assert err.count("\n") == 1


def test_ctrl_c_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.transcribe.transcribe", interrupted)
    assert run("transcribe", "a.wav") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_prepare_hands_over_and_names_what_was_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def prepare(manifests: list[str], out: str, **chosen: Any) -> SimpleNamespace:
        seen.update(chosen, manifests=manifests, out=out)
        skipped = (Problem("m.jsonl:3", "not JSON"),)
        return SimpleNamespace(out=out, utterances=9, seconds=7200.0, shards=2, reused=1, skipped=skipped)

    stand_in(monkeypatch, "pipelines.prepare", prepare=prepare)
    assert run("prepare", "m.jsonl", "--out", "p", "--workers", 2, "--lexicon", "cmudict") == 1
    chosen = {"workers": 2, "store": "audio", "lexicon": "cmudict", "max_errors": None, "address": None}
    assert seen == {"manifests": ["m.jsonl"], "out": "p"} | chosen
    out, err = capsys.readouterr()
    assert "9 utterances, 2.00 hours" in out
    assert err == "error: m.jsonl:3: not JSON\n"


def test_train_hands_over_the_config_with_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(config: object, out: Path, **chosen: Any) -> Path:
        seen.update(chosen, config=config, out=out)
        return out / "model"

    stand_in(monkeypatch, "pipelines.train", train=train)
    monkeypatch.setattr("asr.config.load_config", lambda path, overrides: (path, tuple(overrides)))
    assert (
        run(
            "train", "configs/x.toml", "--set", "training.epochs=2", "--set", "a.b=c", "--workers", 0, "--device", "cpu"
        )
        == 0
    )
    expected = (Path("configs/x.toml"), ("training.epochs=2", "a.b=c"))
    chosen = {"workers": 0, "min_workers": None, "address": None, "device": "cpu"}
    assert seen == {"config": expected, "out": Path("runs/x")} | chosen


def test_train_names_a_missing_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "pipelines.train", train=None)
    assert run("train", "none.toml") == 2
    assert capsys.readouterr().err.startswith("error: none.toml: ")


def test_export_hands_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    heard = {Path("a.wav"): np.ones(3, np.float32), Path("b.wav"): np.zeros(3, np.float32)}
    monkeypatch.setattr("asr.audio.read_audio", heard.__getitem__)
    stand_in(
        monkeypatch, "asr.runtime.export", export_model=lambda *args, small, speech: seen.append((*args, small, speech))
    )
    assert run("export", "runs/a", "runs/b", "-o", "m", "--to", "onnx-int8") == 0
    assert run("export", "-o", "m", "--small", "--speech", "a.wav") == 0
    assert seen == [
        ([Path("runs/a"), Path("runs/b")], Path("m"), "onnx-int8", False, None),
        ([shipped_model()], Path("m"), "model", True, [heard[Path("a.wav")]]),
    ]
    assert run("export", "-o", "m", "--speech", "a.wav", "--speech", "b.wav") == 1
    assert capsys.readouterr().err.startswith("error: b.wav: silent")
    assert len(seen) == 2


def test_errors_for_the_reader_end_with_status_1_and_those_of_usage_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [ModelError("m: nothing to export"), ConfigError("m: nothing to export")]

    def export_model(*_: object, **__: object) -> None:
        raise errors.pop(0)

    stand_in(monkeypatch, "asr.runtime.export", export_model=export_model)
    for status in (1, 2):
        assert run("export", "runs/a", "-o", "m") == status
        assert capsys.readouterr().err == "error: m: nothing to export\n"


@pytest.mark.parametrize(
    ("script", "command"), [("transcribe", "transcribe"), ("stream_microphone", "stream"), ("train", "train")]
)
def test_scripts_are_doors_to_the_command(script: str, command: str, tmp_path: Path) -> None:
    door = ROOT / "scripts" / f"{script}.py"
    done = subprocess.run([sys.executable, str(door), "-h"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: asr {command}" in done.stdout


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("pipelines.transcribe.transcribe", never)
    monkeypatch.setattr("pipelines.evaluate.evaluate", never)
    (tmp_path / "file").touch()
    assert run("transcribe", "a.wav", "-o", tmp_path / "file") == 1
    assert "skipped.jsonl: cannot be written" in capsys.readouterr().err
    for option in ("--json", "--report"):
        for target, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "Not a directory")):
            assert run("evaluate", "a.jsonl", option, target) == 1
            assert f"{target}: cannot be written ({reason})" in capsys.readouterr().err


def test_nothing_is_sent_or_kept_for_the_maker_of_the_runtime(tmp_path: Path) -> None:
    """ONNX Runtime would keep a device's number and a queue of reports in the user's cache."""
    sample = Path(__file__).parents[1] / "scripts" / "samples" / "audio" / "00000.flac"
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "pipelines.cli", "transcribe", "--decoding", "greedy", str(sample)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=home, capture_output=True, text=True, check=True)
    assert done.stdout
    assert not list(tmp_path.rglob("*onnxruntime*"))
