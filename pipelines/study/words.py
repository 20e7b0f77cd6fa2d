"""The speech of the study: short words joined to utterances, noise to mix in, utterances of a given length.

Words of free_spoken_digits and, in the full study, speech_commands, one to four of a speaker to an utterance. Where
../shared/data is absent, espeak-ng says digits, and the noise is white and pink.
"""

import json
import random
from pathlib import Path

import numpy as np
import soundfile

from asr.audio import SAMPLE_RATE, read_audio
from asr.files import write_atomically
from asr.manifest import Utterance, read_manifest
from pipelines.conditions import coloured_noise
from pipelines.prepare import prepare
from pipelines.synthesize import HELD_OUT_VOICES, TRAINING_VOICES, spoken_digits, synthesize

SHARED = Path(__file__).parents[3] / "shared" / "data"
MOST_WORDS = 4
PAUSE = (0.0, 0.4)  # seconds before the first word, so that it does not come at one time always
NOISES = 24
HEARD = 200  # utterances of the training data that are scored
SPOKEN = {"train": 1600, "test": 160}  # utterances of espeak-ng where there are no recordings


def make_speech(folder: Path, *, quick: bool) -> None:
    """Write what the networks train on and are scored on; what is there stays.

    FOLDER/train and tenth hold features, to train on; train-heard and tenth-heard (part of the same utterances) and
    test hold audio, to be scored; noise/*.flac is mixed into it.
    """
    noise = folder / "noise"
    if not noise.is_dir() or len(list(noise.iterdir())) < NOISES:
        noise.mkdir(parents=True, exist_ok=True)
        _write_noise(noise)
    for part in ("train", "test"):
        manifest = folder / f"{part}.jsonl"
        if not manifest.is_file():
            _write_part(part, folder, manifest, quick=quick)
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    tenth = rows[::10]
    for part, kept in (("tenth", tenth), ("train-heard", rows[:HEARD]), ("tenth-heard", tenth[:HEARD])):
        write_atomically(folder / f"{part}.jsonl", "".join(kept))
    for part in ("train", "tenth", "train-heard", "tenth-heard", "test"):
        store = "features" if part in ("train", "tenth") else "audio"
        prepare([folder / f"{part}.jsonl"], folder / part, workers=0, store=store)


def has_recordings() -> bool:
    """Whether people's voices are there, or espeak-ng's have to do."""
    return (SHARED / "free_spoken_digits").is_dir()


def describe(*, quick: bool) -> str:
    """The speech in a sentence."""
    if not has_recordings():
        return "digits spoken by espeak-ng, one to five to an utterance; voices of the test are not in the training"
    sets = "free_spoken_digits" if quick else "free_spoken_digits and speech_commands"
    return f"words of {sets}, one to {MOST_WORDS} of a speaker joined to an utterance; scored on their test rows"


def join_words(rows: list[Utterance], folder: Path, seed: int) -> list[dict]:
    """Write utterances of a pause and one to MOST_WORDS words of a speaker, each row used once.

    Returns:
        Rows of a manifest that lies beside `folder`.
    """
    rng = random.Random(seed)
    rows = sorted(rng.sample(rows, len(rows)), key=lambda row: row.speaker or "")
    folder.mkdir(parents=True, exist_ok=True)
    joined = []
    while rows:
        count = rng.randint(1, MOST_WORDS)
        words = [row for row in rows[:count] if row.speaker == rows[0].speaker]
        rows = rows[len(words) :]
        pause = np.zeros(int(rng.uniform(*PAUSE) * SAMPLE_RATE), np.float32)
        samples = np.concatenate([pause, *(read_audio(row.audio) for row in words)])
        path = folder / f"{len(joined):05d}.flac"
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        text = " ".join(row.text or "" for row in words)
        duration = round(len(samples) / SAMPLE_RATE, 3)
        joined.append(
            {
                "audio_filepath": f"{folder.name}/{path.name}",
                "duration": duration,
                "text": text,
                "speaker": words[0].speaker,
            }
        )
    return rng.sample(joined, len(joined))


def _write_part(part: str, folder: Path, manifest: Path, *, quick: bool) -> None:
    if has_recordings():
        names = ("free_spoken_digits",) if quick else ("free_spoken_digits", "speech_commands")
        rows = [row for name in names for row in read_manifest(SHARED / name / f"{part}.jsonl")[0]]
        joined = join_words(rows, folder / f"audio-{part}", seed=1)
    else:
        seed, voices = (1, TRAINING_VOICES) if part == "train" else (2, HELD_OUT_VOICES)
        spoken = synthesize(spoken_digits(SPOKEN[part], seed=seed), folder / f"audio-{part}", seed=seed, voices=voices)
        joined = [json.loads(line) for line in spoken.read_text(encoding="utf-8").splitlines()]
        joined = [row | {"audio_filepath": f"{spoken.parent.name}/{row['audio_filepath']}"} for row in joined]
    write_atomically(manifest, "".join(json.dumps(row) + "\n" for row in joined))


def _write_noise(folder: Path) -> None:
    listed = SHARED / "noise_esc10" / "noise.jsonl"
    if listed.is_file():
        rows, _ = read_manifest(listed)
        clips = [read_audio(row.audio) for row in rows[:: max(len(rows) // NOISES, 1)]]
    else:
        rng = np.random.default_rng(0)
        clips = [coloured_noise(5 * SAMPLE_RATE, pink=bool(i % 2), rng=rng) for i in range(NOISES)]
    for i, clip in enumerate(clips):
        soundfile.write(folder / f"{i:02d}.flac", clip, SAMPLE_RATE, subtype="PCM_16")
