"""Streaming speech recognition on LSTMs: `asr.load()` gives a Recognizer for files and live audio."""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime sends usage data to its maker unless it is told not to before it is imported. Nothing leaves here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

    __version__: str
    load = Recognizer.load

__all__ = ["Recognizer", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Looked up when asked for: `import asr` itself stays instant.
    if name in ("Recognizer", "load"):
        from asr.recognizer import Recognizer

        return Recognizer if name == "Recognizer" else Recognizer.load
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("streaming-asr")
        except PackageNotFoundError:
            return "0+unknown"  # run from a checkout that is not installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
