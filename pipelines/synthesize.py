"""Synthetic speech: espeak-ng reads lines of text in many voices, into FLAC files with a manifest.

    python -m pipelines.synthesize --digits 700 --commands 500 --text books.txt.xz --count 1400 --out DIR

The library, its data and its voices come with the `espeakng-loader` wheel. Good for a demo and for tests, and
as a little seasoning in training; an error rate measured on it says nothing about people.
"""

import argparse
import ctypes
import json
import lzma
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from asr.audio import SAMPLE_RATE
from asr.errors import AsrError
from asr.files import write_atomically
from asr.text import normalize

# The voices of the shipped samples (scripts/samples). Training never hears them, in any accent.
HELD_OUT_VOICES = ("en-us+f3", "en-gb-x-rp+m4", "en-us+Andy")
TRAINING_VOICES = (
    "en-us", "en-us+f1", "en-us+f2", "en-us+f4", "en-us+m1", "en-us+m3", "en-us+m7", "en-us+Annie",
    "en-us+Michael", "en-us-nyc+m2", "en-gb-x-rp", "en-gb-x-rp+f5", "en-gb-x-rp+m8", "en-029+m6",
)  # fmt: skip
ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-029")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = (
    "up", "down", "left", "right", "yes", "no", "on", "off", "stop", "go", "forward", "backward", "follow",
    "learn", "happy", "house", "bird", "cat", "dog", "tree", "bed", "wow", "visual", "marvin", "sheila",
)  # fmt: skip


def spoken_digits(count: int, *, seed: int = 0, longest: int = 5) -> list[str]:
    """`count` lines of 1 to `longest` digits in words, such as "seven two nine"."""
    rng = random.Random(f"digits {seed}")
    return [" ".join(rng.choices(DIGITS, k=rng.randint(1, longest))) for _ in range(count)]


def spoken_commands(count: int, *, seed: int = 0) -> list[str]:
    """`count` lines of one or two command words, such as "go left"."""
    rng = random.Random(f"commands {seed}")
    return [" ".join(rng.choices(COMMANDS, k=rng.choice((1, 1, 2)))) for _ in range(count)]


def read_lines(path: Path, *, count: int | None = None, seed: int = 0) -> list[str]:
    """The lines of a text file (`.xz` too): all, or `count` drawn at random from those of 3 to 12 words.

    Raises:
        AsrError: the file cannot be read, or has too few such lines.
    """
    try:
        data = path.read_bytes()
        lines = (lzma.decompress(data) if path.suffix == ".xz" else data).decode().splitlines()
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise AsrError(f"{path}: cannot read the text ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if count is None:
        return lines
    fitting = [line for line in lines if 3 <= len(line.split()) <= 12]
    if len(fitting) < count:
        raise AsrError(f"{path}: has {len(fitting)} lines of 3 to 12 words; {count} were asked for")
    return random.Random(f"text {seed}").sample(fitting, count)


def voices() -> list[str]:
    """Every English voice of espeak-ng: an accent alone, or an accent with a variant ("en-gb-x-rp+m2")."""
    folder = Path(_loader().get_data_path()) / "voices" / "!v"
    variants = sorted(path.name for path in folder.iterdir() if " " not in path.name)
    return [accent + suffix for accent in ACCENTS for suffix in ("", *(f"+{variant}" for variant in variants))]


def synthesize(
    lines: Iterable[str],
    out: Path,
    *,
    voices: Sequence[str] = TRAINING_VOICES,
    seed: int = 0,
    rate: tuple[int, int] = (130, 210),
    pitch: tuple[int, int] = (30, 70),
    gap: tuple[int, int] = (0, 8),
    level: tuple[float, float] = (0.2, 0.9),
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Speak every line once, in a voice and manner drawn from `seed`; the same call gives the same bytes.

    Args:
        lines: texts; normalised for the manifest, and skipped where nothing is left of them.
        out: folder that receives audio/00000.flac ... (16 kHz, mono, 16 bit) and, last, manifest.jsonl.
        voices: names as `voices()` lists them.
        rate: words a minute, lowest and highest.
        pitch: espeak-ng's scale of 0 to 99.
        gap: a pause between words, in units of about 10 ms.
        level: the loudest sample, in (0, 1].
        limit: stop after so many utterances.
        progress: called with (done, total) after each utterance.

    Returns:
        The path of the manifest (NeMo's JSON Lines: audio_filepath, duration, text, speaker).

    Raises:
        AsrError: espeakng-loader is not installed, or espeak-ng lacks a voice.
    """
    out = Path(out)
    texts = [text for text in map(normalize, lines) if text][:limit]
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"voices {seed}")
    speaker = Speaker()
    rows = []
    for i, text in enumerate(texts):
        voice = rng.choice(voices)
        manner = {name: rng.randint(*span) for name, span in (("rate", rate), ("pitch", pitch), ("gap", gap))}
        samples = speaker.speak(text, voice, **manner)
        samples *= rng.uniform(*level) / max(float(np.abs(samples).max(initial=0.0)), 1e-6)
        name = f"audio/{i:05d}.flac"
        soundfile.write(out / name, samples, SAMPLE_RATE, subtype="PCM_16")
        duration = round(len(samples) / SAMPLE_RATE, 3)
        rows.append({"audio_filepath": name, "duration": duration, "text": text, "speaker": f"espeak-{voice}"})
        if progress:
            progress(i + 1, len(texts))
    manifest = out / "manifest.jsonl"
    write_atomically(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    return manifest


class Speaker:
    """A private espeak-ng. What it says depends on what it said before, and on nothing else.

    The library keeps its state in static variables (phases, noise), so each speaker loads a copy of its own.

    Raises:
        AsrError: espeakng-loader is not installed, or espeak-ng does not start.
    """

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._known = frozenset(voices())
        # espeak-ng holds a path in 160 characters, and the wheel may lie deeper. It reads when it speaks.
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-")
        copy, data = Path(self._folder.name) / "espeak-ng.so", Path(self._folder.name) / "espeak-ng-data"
        shutil.copyfile(_loader().get_library_path(), copy)
        data.symlink_to(_loader().get_data_path(), target_is_directory=True)
        self._library = ctypes.CDLL(str(copy))
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DO_NOT_EXIT)
        if self._rate <= 0:
            raise AsrError("espeak-ng does not start; install it again: pip install --force-reinstall espeakng-loader")
        self._callback = _CALLBACK(self._collect)  # kept here, for C holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, *, rate: int = 170, pitch: int = 50, gap: int = 0) -> np.ndarray:
        """Speech of one line: float32 (n,) in [-1, 1] at 16 kHz.

        Raises:
            AsrError: espeak-ng lacks the voice.
        """
        # espeak-ng itself ignores a variant that it does not know.
        if voice not in self._known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise AsrError(f"espeak-ng has no voice {voice!r}; `python -m pipelines.synthesize --list-voices` has them")
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._library.espeak_SetParameter(_GAP, gap, 0)
        self._blocks.clear()
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath is noise, seeded by the clock at the start
        spoken = text.encode() + b"\0"
        self._library.espeak_Synth(spoken, len(spoken), 0, 0, 0, _UTF8, None, None)
        samples = np.concatenate([np.zeros(0, np.int16), *self._blocks]).astype(np.float32) / 32768
        return soxr.resample(samples, self._rate, SAMPLE_RATE)

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


# From espeak-ng's speak_lib.h.
_RATE, _PITCH, _GAP = 1, 3, 7
_UTF8, _SYNCHRONOUS, _DO_NOT_EXIT = 1, 2, 0x8000
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise AsrError("synthetic speech needs espeakng-loader: pip install 'streaming-asr[train]'") from error
    return espeakng_loader


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.synthesize", description="Speak text by espeak-ng into OUT/manifest.jsonl."
    )
    parser.add_argument("--out", type=Path, help="folder for the audio and manifest.jsonl")
    parser.add_argument("--text", type=Path, help="a line an utterance; .xz is read too")
    parser.add_argument("--count", type=int, help="draw so many lines of 3 to 12 words from --text (default: all)")
    parser.add_argument("--digits", type=int, default=0, help="so many lines of 1 to 5 digits, besides")
    parser.add_argument("--commands", type=int, default=0, help="so many lines of 1 or 2 command words, besides")
    parser.add_argument("--voices", nargs="+", default=TRAINING_VOICES, metavar="VOICE")
    parser.add_argument("--rate", nargs=2, type=int, default=(130, 210), metavar=("LOW", "HIGH"), help="words a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list-voices", action="store_true")
    args = parser.parse_args(arguments)
    try:
        if args.list_voices:
            print("\n".join(voices()))
            return 0
        if args.out is None:
            parser.error("--out is missing")
        lines = spoken_digits(args.digits, seed=args.seed) + spoken_commands(args.commands, seed=args.seed)
        if args.text:
            lines += read_lines(args.text, count=args.count, seed=args.seed)
        if not lines:
            parser.error("nothing to say: give --text, --digits or --commands")
        print(synthesize(lines, args.out, voices=args.voices, rate=tuple(args.rate), seed=args.seed))
    except AsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
