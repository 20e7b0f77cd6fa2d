"""Whole jobs: prepare, train, transcribe, evaluate, and the command."""

import os

# Of cores, streams and trainings have their own use: numpy's products, all of them small, stay in their thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
