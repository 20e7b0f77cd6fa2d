"""Short recordings joined to longer ones, to train on: words said one by one, with pauses between them.

    python -m pipelines.join free_spoken_digits/train.jsonl speech_commands/train.jsonl --out DIR

A network that has heard single words alone, each a recording of its own, expects nothing after the first of a list.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from asr.audio import SAMPLE_RATE
from asr.errors import AsrError, AudioError, Problem
from asr.files import write_atomically
from asr.manifest import Utterance, read_manifest
from asr.text import normalize
from pipelines.evaluate import read_row
from pipelines.evaluate_live import join, lay_out

_PAUSE_SECONDS = (0.05, 1.2)


def join_recordings(
    manifests: Sequence[Path], out: str | Path, *, seconds: float = 4.0, seed: int = 0
) -> tuple[Path, list[Problem]]:
    """Join the recordings of each speaker, in random order, to ones of at least `seconds`, as FLAC files.

    The pauses of 0.05 to 1.2 s sound like the room of the recording before them. Rows that cannot be read are left out
    and told; so are rows without a text.

    Returns:
        The path of the manifest, OUT/manifest.jsonl, and what was left out.

    Raises:
        AsrError: a manifest cannot be read, or no row of it.
    """
    out = Path(out)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rows: list[Utterance] = []
    problems: list[Problem] = []
    for manifest in manifests:
        found, bad = read_manifest(manifest)
        problems += bad
        for row in found:
            text, speaker = normalize(row.text or ""), f"{manifest.parent.name} {row.speaker}"
            if text:
                rows.append(dataclasses.replace(row, text=text, speaker=speaker))
            else:
                problems.append(Problem(row.where, "has no text"))
    random.Random(f"join {seed}").shuffle(rows)
    lines: list[str] = []
    for piece in join(rows, seconds, seed, _PAUSE_SECONDS):
        texts: list[str] = []
        audios: list[tuple[np.ndarray, float]] = []
        for part, pause in zip(piece.parts, piece.pauses, strict=True):
            try:
                audios.append((read_row(part), pause))
            except AudioError as error:
                problems.append(Problem(part.where, str(error)))
            else:
                texts.append(part.text or "")
        if not audios:
            continue
        samples, _ = lay_out(audios)
        name = f"audio/{len(lines):05d}.flac"
        soundfile.write(out / name, samples, SAMPLE_RATE, subtype="PCM_16")
        duration = round(len(samples) / SAMPLE_RATE, 3)
        row = {"audio_filepath": name, "duration": duration, "text": " ".join(texts), "speaker": piece.parts[0].speaker}
        lines.append(json.dumps(row) + "\n")
    if not lines:
        raise AsrError(f"{', '.join(map(str, manifests))}: no row can be joined; the first: {problems[0]}")
    write_atomically(out / "manifest.jsonl", "".join(lines))
    return out / "manifest.jsonl", problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.join", description="Join short recordings of each speaker into OUT/manifest.jsonl."
    )
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    parser.add_argument("--out", type=Path, required=True, help="folder for the audio and manifest.jsonl")
    parser.add_argument("--seconds", type=float, default=4.0, help="each is at least so long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        manifest, problems = join_recordings(args.manifests, args.out, seconds=args.seconds, seed=args.seed)
    except AsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    print(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
