"""Trains a network: `asr train` from a source tree, and what one submits to a Ray cluster."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing was installed

from pipelines.cli import main
from pipelines.memory import keep_memory

if __name__ == "__main__":
    keep_memory()
    main(["train", *sys.argv[1:]])
