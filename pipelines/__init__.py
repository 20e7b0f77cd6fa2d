"""Whole jobs: prepare, train, transcribe, evaluate, and the command."""
