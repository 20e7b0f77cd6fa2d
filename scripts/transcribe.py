"""Transcribes recordings: `asr transcribe` from a source tree."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing was installed

from pipelines.cli import main

if __name__ == "__main__":
    main(["transcribe", *sys.argv[1:]])
