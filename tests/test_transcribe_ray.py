"""`asr transcribe --workers`: the same text in the same order as in one process, whatever is killed on the way."""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs ray, of the extra [train]")
import jobs
from test_predictions import WORDS, manifest_of, predictions
from toy_model import TOKENIZER, ToyEngine, ToyOptions, write

from asr.errors import AsrError, ModelError
from asr.recognizer import Network, Recognizer
from pipelines.transcribe import RecognizerOptions, Result, transcribe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

JOB = """
import sys
from pathlib import Path
from pipelines.transcribe import RecognizerOptions, transcribe
from test_transcribe_ray import SlowOptions
options = SlowOptions() if sys.argv[3] == "toy" else RecognizerOptions()
list(transcribe([Path(sys.argv[1])], options, output_dir=Path(sys.argv[2]), workers=2))
"""


class SlowOptions(ToyOptions):
    """A toy that takes its time, so that a job can be caught at work."""

    def load(self, *, endpoint: bool = True) -> Recognizer:
        class Engine(ToyEngine):
            def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
                time.sleep(0.02)
                return super().log_probs(batch)

        return Recognizer({"offline": Network(TOKENIZER, Engine)}, name="toy")


class DeadlyOptions(ToyOptions):
    """A toy that ends its process where it hears a z."""

    def load(self, *, endpoint: bool = True) -> Recognizer:
        class Engine(ToyEngine):
            def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
                if max(float(samples.max()) for samples in batch) > 0.88:
                    os.kill(os.getpid(), signal.SIGSEGV)
                return super().log_probs(batch)

        return Recognizer({"offline": Network(TOKENIZER, Engine)}, name="toy")


class MissingOptions(ToyOptions):
    """A model that only one process has: the one whose number is its name."""

    def load(self, *, endpoint: bool = True) -> Recognizer:
        if str(self.model) != str(os.getpid()):
            raise ModelError("m: not on this node")
        return super().load(endpoint=endpoint)


@pytest.fixture(autouse=True)
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the actors must find the toys
    with jobs.ray_folder() as folder:
        yield folder


def texts(results: Iterator[Result]) -> list[str]:
    return [json.loads(result.text)["pred_text"] for result in results]


def test_workers_give_the_same_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(["one", "two", "three", "four"]):
        write(tmp_path / "in" / f"{i}.wav", text)
    (tmp_path / "in" / "2b.wav").write_bytes(b"broken")
    manifest_of(tmp_path, 300)
    audio = [Path("in"), Path("test.jsonl")]
    alone = list(transcribe(audio, ToyOptions()))
    assert [r.text.split("\t")[-1] for r in alone[:5] if r.text] == ["one\n", "two\n", "three\n", "four\n"]
    assert texts(r for r in alone[5:]) == [WORDS[i % 5] for i in range(300)]
    assert list(transcribe(audio, ToyOptions(), workers=2)) == alone


def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path, ray_folder: Path) -> None:
    manifest = manifest_of(tmp_path, 6000)
    out = tmp_path / "out"
    with jobs.job(JOB, manifest, out, "toy") as started:
        jobs.wait_until(lambda: any(out.glob(".*.part-*")), "a batch is written")
        jobs.wait_until(lambda: jobs.workers_of(ray_folder, "_Actor"), "a worker is up")
        os.kill(jobs.workers_of(ray_folder, "_Actor")[0], signal.SIGKILL)
        assert not (out / "test.pred.jsonl").exists()
        assert started.wait(timeout=200) == 0
    made = predictions(out / "test.pred.jsonl")
    assert [row["pred_text"] for row in made] == [WORDS[i % 5] for i in range(6000)]
    assert [row["number"] for row in made] == list(range(6000))


def test_a_killed_driver_is_taken_up(tmp_path: Path, ray_folder: Path) -> None:
    manifest = manifest_of(tmp_path, 6000)
    out = tmp_path / "out"
    with jobs.job(JOB, manifest, out, "toy"):
        jobs.wait_until(lambda: any(out.glob(".*.part-*")), "a batch is written")
    assert not (out / "test.pred.jsonl").exists()
    results = list(transcribe([manifest], SlowOptions(), output_dir=out, workers=2))
    kept = sum(result.kept is not None for result in results)
    assert 0 < kept < 6000
    made = predictions(out / "test.pred.jsonl")
    assert [row["pred_text"] for row in made] == [WORDS[i % 5] for i in range(6000)]
    assert [row["number"] for row in made] == list(range(6000))
    assert not list(ray_folder.glob("asr-ray-*"))  # what the killed job could not remove is gone too


def test_what_kills_its_worker_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "zap.wav", "zap")
    manifest = manifest_of(tmp_path, 130)
    rows = predictions(manifest)
    rows[70]["audio_filepath"] = "audio/zap.wav"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = list(transcribe([tmp_path / "audio" / "zap.wav", manifest], DeadlyOptions(), workers=2))
    recording, *of_rows = results
    assert recording.problem is not None and "ended its worker" in recording.problem.reason
    assert [i for i, result in enumerate(of_rows) if result.problem] == [70]
    assert "ended its worker" in str(of_rows[70].problem)
    assert texts(iter(of_rows)) == [WORDS[i % 5] if i != 70 else "" for i in range(130)]


def test_a_model_that_is_missing_on_a_node_is_told(tmp_path: Path) -> None:
    with pytest.raises(AsrError, match="not on this node"):
        list(transcribe([manifest_of(tmp_path, 130)], MissingOptions(model=Path(str(os.getpid()))), workers=2))


def test_real_speech_over_killed_workers_and_a_killed_driver(
    tmp_path: Path, ray_folder: Path, shared_speech: Path
) -> None:
    """Byte for byte what one process writes, although int8 text depends on which rows are read together."""
    folder = shared_speech / "speech_commands"
    clips = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    rows = [{**clip, "audio_filepath": str(folder / clip["audio_filepath"])} for clip in clips * 6]
    manifest = tmp_path / "test.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    list(transcribe([manifest], RecognizerOptions(), output_dir=tmp_path / "undisturbed"))
    out = tmp_path / "out"
    with jobs.job(JOB, manifest, out, "real"):
        jobs.wait_until(lambda: any(out.glob(".*.part-*")), "a batch is written")
    with jobs.job(JOB, manifest, out, "real") as started:
        jobs.wait_until(lambda: jobs.workers_of(ray_folder, "_Actor"), "a worker is up")
        os.kill(jobs.workers_of(ray_folder, "_Actor")[0], signal.SIGKILL)
        assert started.wait(timeout=200) == 0
    assert (out / "test.pred.jsonl").read_bytes() == (tmp_path / "undisturbed" / "test.pred.jsonl").read_bytes()
