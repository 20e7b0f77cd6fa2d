"""The demo: what it prints, and that the training it shows does learn."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import demo

ROOT = Path(__file__).parent.parent


def test_recognizing_shows_a_batch_and_live_audio(capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / "asr" / "shipped" / "card.json").exists():
        pytest.skip("needs the shipped model (asr/shipped)")
    started = time.perf_counter()
    assert demo.main([]) == 0
    seconds = time.perf_counter() - started
    printed = capsys.readouterr().out
    assert "reference" in printed and "four one nine two zero six" in printed
    assert "synthetic" in printed and "real-time factor" in printed and "WER" in printed
    partials = re.findall(r"^ *(\d+\.\d\d) s  (.+)$", printed, re.MULTILINE)
    assert len(partials) >= 3
    assert seconds > float(partials[-1][0])  # at the pace of speech
    assert "asr transcribe" in printed.split("What to try next")[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_learns_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray (extra [train])")
    pytest.importorskip("espeakng_loader", reason="needs espeakng-loader (extra [train])")
    code = f"from pathlib import Path; from pipelines.demo import *; train_and_recognize(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"dev loss ([\d.]+)", done.stderr)]
    assert losses[-1] < losses[0] / 4
    found = re.search(r"real-time factor .*WER ([\d.]+)%", done.stdout)
    assert found and float(found[1]) < 20
