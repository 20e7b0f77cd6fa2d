"""What `scripts/demo` shows: the shipped model at work, or with --train, a small one trained on the spot."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asr.audio import SAMPLE_RATE, read_audio
from asr.errors import AsrError
from asr.manifest import Utterance, read_manifest
from asr.metrics import ErrorCounts, count_errors
from asr.recognizer import Recognizer

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "scripts" / "samples" / "samples.jsonl"
LIVE_SAMPLE = 3  # a row of SAMPLES, long enough for partial text to grow
BLOCK = SAMPLE_RATE * 16 // 100  # what a microphone would deliver at a time: 160 ms

console = Console(highlight=False)


def recognize() -> None:
    """Transcribe the samples as a batch, then one of them as live audio."""
    utterances, _ = read_manifest(SAMPLES)
    started = time.perf_counter()
    recognizer = Recognizer.load(decoding="beam")
    for network in recognizer.networks:
        recognizer.transcribe_batch([np.zeros(SAMPLE_RATE, np.float32)], network=network)  # opens it
    console.print(f"The shipped model with its language model, loaded in {time.perf_counter() - started:.1f} s.")

    console.rule("A batch of recordings")
    show_batch(recognizer, utterances, network="offline")
    console.print(
        "The samples are synthetic: espeak-ng speaks them. Their error rate shows that the installation "
        "works; it is not the accuracy on people, which the README gives for real recordings."
    )
    console.rule("Live audio")
    show_live(recognizer, utterances[LIVE_SAMPLE])

    console.rule("What to try next")
    console.print(
        "  .venv/bin/asr transcribe FILE...    your own recordings\n"
        "  .venv/bin/asr stream                your microphone (needs the extra [mic])\n"
        "  bash scripts/demo --train           the other main job: preparing, training\n"
        "  .venv/bin/asr --help                everything else",
        markup=False,
    )


def show_batch(recognizer: Recognizer, utterances: Sequence[Utterance], *, network: str, rows: int = 20) -> None:
    """Print reference and hypothesis of the first `rows` utterances, and the figures of all."""
    audio = [read_audio(utterance.audio) for utterance in utterances]
    started = time.perf_counter()
    transcripts = recognizer.transcribe_batch(audio, network=network)
    elapsed = time.perf_counter() - started

    table = Table("reference", "hypothesis", "WER", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.columns[2].justify = "right"
    total = ErrorCounts()
    for i, (utterance, transcript) in enumerate(zip(utterances, transcripts, strict=True)):
        counts = count_errors(utterance.text or "", transcript.text)
        total += counts
        if i < rows:
            style = "" if counts.wer == 0 else "yellow"
            table.add_row(utterance.text or "", transcript.text, Text(f"{counts.wer:.0%}", style=style))
    console.print(table)
    seconds = sum(map(len, audio)) / SAMPLE_RATE
    console.print(
        f"{len(audio)} utterances, {seconds:.1f} s in {elapsed:.2f} s: "
        f"real-time factor {elapsed / seconds:.3f}, WER {total.wer:.1%}, CER {total.cer:.1%}"
    )


def show_live(recognizer: Recognizer, utterance: Utterance) -> None:
    """Feed one recording at the pace of speech, and print the text as it grows."""
    samples = read_audio(utterance.audio)
    session = recognizer.stream(sample_rate=SAMPLE_RATE)
    console.print(f"{Path(utterance.audio).name}, in blocks of {BLOCK * 1000 // SAMPLE_RATE} ms at the pace of speech:")
    busy, shown, finished = 0.0, "", ""
    started = time.perf_counter()
    for end in range(BLOCK, len(samples) + BLOCK, BLOCK):
        time.sleep(max(0.0, started + min(end, len(samples)) / SAMPLE_RATE - time.perf_counter()))
        before = time.perf_counter()
        update = session.feed(samples[end - BLOCK : end])
        busy += time.perf_counter() - before
        finished = " ".join([finished, *(segment.text for segment in update.final)]).strip()
        text = f"{finished} {update.partial}".strip()
        if text != shown:
            shown = text
            console.print(f"{end / SAMPLE_RATE:5.2f} s  {text}", style="dim", markup=False)
    before = time.perf_counter()
    transcript = session.finish()
    final = time.perf_counter() - before
    seconds = len(samples) / SAMPLE_RATE
    wer = count_errors(utterance.text or "", transcript.text).wer
    console.print(f" final   {transcript.text}", style="bold", markup=False)
    console.print(f" said    {utterance.text}", markup=False)
    console.print(
        f"real-time factor {(busy + final) / seconds:.3f}, "
        f"last words {final * 1000:.0f} ms after the last sample, WER {wer:.1%}"
    )


def train_and_recognize(run: Path) -> None:
    """Make speech, prepare it, train on it, and recognize with the result; all of it in the folder `run`."""
    from asr.config import load_config
    from pipelines.prepare import prepare
    from pipelines.synthesize import spoken_digits, synthesize
    from pipelines.train import train

    shutil.rmtree(run, ignore_errors=True)
    console.rule("1. Speech made on the spot: espeak-ng says digits")
    manifests = {
        name: synthesize(spoken_digits(count, seed=seed), run / f"speech-{name}", seed=seed)
        for name, count, seed in (("train", 480, 1), ("dev", 40, 2))
    }
    for name, manifest in manifests.items():
        rows = [json.loads(line) for line in manifest.open(encoding="utf-8")]
        minutes = sum(row["duration"] for row in rows) / 60
        console.print(f"{name}: {len(rows)} utterances, {minutes:.1f} minutes, such as {rows[0]['text']!r}")

    console.rule("2. Prepared by Ray Data: checked, decoded once, written as shards")
    for name, manifest in manifests.items():
        # Ray shares out the larger one, in shards small enough that both workers get some.
        summary = prepare([manifest], run / name, workers=2 if name == "train" else 0, shard_seconds=150)
        skipped = len(summary.skipped)
        console.print(f"{name}: {summary.utterances} utterances, {summary.shards} shards, {skipped} skipped")

    console.rule("3. Trained by two Ray Train workers: watch the loss fall")
    overrides = [f"data.{name}={json.dumps([str(run / name)])}" for name in manifests]
    config = load_config(ROOT / "configs" / "demo.toml", overrides)
    console.print("Ray starts; the first figures come in about half a minute.")
    model = train(config, run / "run", workers=2, device="cpu")

    console.rule("4. Evaluated and transcribed")
    recognizer = Recognizer.load(model)
    utterances, _ = read_manifest(manifests["dev"])
    show_batch(recognizer, utterances, network=config.model.kind, rows=8)
    console.print(
        f"A model of ten digits, from minutes of synthetic speech: {os.path.relpath(model)}\n"
        "Your own recordings go the same way: .venv/bin/asr prepare, .venv/bin/asr train"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/demo", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train a small model instead, by Ray")
    args = parser.parse_args(arguments)
    try:
        if args.train:
            train_and_recognize(ROOT / "runs" / "demo")
        else:
            recognize()
    except AsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
