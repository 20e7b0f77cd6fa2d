"""`asr inspect`: what networks did on one recording, as an interactive page, a picture, or numbers."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import soundfile
from rich.console import Console

from asr.audio import SAMPLE_RATE, read_audio
from asr.errors import AudioError, ConfigError, ModelError
from asr.files import replacing, write_atomically
from asr.inspect import Inspection, Layer, is_gate, loudness_range
from asr.inspect import inspect as inspect_network
from asr.models import load_network
from asr.runtime.folder import choose_network, find_networks
from asr.runtime.reader import usual_block

LONGEST = 60.0  # seconds; a page with more of it is slow to draw, and too wide to read
_PAGE = Path(__file__).with_name("inspect.html")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An inspection with what it is of: the network's `name`, the `recording`, and its `samples` at 16 kHz."""

    name: str
    recording: str
    samples: np.ndarray
    inspection: Inspection


def inspect(
    audio: Path,
    outputs: Sequence[Path],
    models: Sequence[Path | None],
    streaming: bool,
    *,
    layer: int | None = None,
    start: float = 0.0,
    duration: float | None = None,
) -> list[Seen]:
    """Look inside one network of each model while it reads `audio`, and write what was seen to each of `outputs`.

    Args:
        outputs: files whose ending says what to write: .html, .png, .json, .parquet.
        models: model folders, or networks in them; None is the shipped model.
        streaming: of a model folder, its streaming network; such a network is fed in blocks.
        layer: keep this recurrent layer alone, 1 is the first; None keeps all.
        start, duration: the part of the recording to read, in seconds.

    Raises:
        AsrError: the recording, a model or an output is not usable.
    """
    for path in outputs:
        if path.suffix.lower() not in _WRITERS:
            raise ConfigError(f"{path}: must end in {', '.join(_WRITERS)}")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: its folder does not exist")
    folders = [find_network(model, streaming) for model in models]
    if len({folder.name for folder in folders}) > 1:  # compared are networks of one kind, where there are
        with suppress(ModelError):
            folders = [find_network(model, True) for model in models]
    samples = read_audio(audio, offset=start, duration=min(duration or np.inf, LONGEST + 1))
    if len(samples) > LONGEST * SAMPLE_RATE:
        raise AudioError(f"{audio}: longer than {LONGEST:.0f} s; choose a part with --start and --duration")
    seen = []
    with Console(stderr=True).status("listening", spinner="line"):
        for model, folder in zip(models, folders, strict=True):
            network = load_network(folder).requires_grad_(False)
            blocks = None if network.config.model.bidirectional else usual_block(network.stride)
            found = inspect_network(network, samples, block_frames=blocks)
            name = f"shipped model, {folder.name}" if model is None else str(folder)
            seen.append(Seen(name=name, recording=audio.name, samples=samples, inspection=only(found, layer)))
        for path in outputs:
            _WRITERS[path.suffix.lower()](seen, path)
    return seen


def find_network(model: Path | None, streaming: bool) -> Path:
    """The folder of the network to look into: `model` itself where it is one, else one of that model folder's.

    Raises:
        ModelError: there is none.
    """
    if model is not None and (model / "config.toml").is_file():
        return model
    networks = find_networks(model)
    wanted = choose_network(networks, streaming)
    if wanted not in networks:
        raise ModelError(f"{model}: has no streaming network; leave out --streaming")
    return networks[wanted]


def only(found: Inspection, layer: int | None) -> Inspection:
    """The inspection with one recurrent layer alone; all of it where `layer` is None."""
    if layer is None:
        return found
    kept = tuple(one for one in found.layers if one.number == layer)
    if not kept:
        raise ConfigError(f"--layer {layer}: the network has {found.layers[-1].number} recurrent layers")
    followers = tuple(one for one in found.followers if one.layer == layer)
    return Inspection(**{**vars(found), "layers": kept, "followers": followers})


def write_page(seen: Sequence[Seen], path: Path) -> None:
    """One HTML file that needs nothing else: the recording and the signals are in it, these in 256 steps."""
    panels = [_panel(one) for one in seen]
    data = json.dumps({"recording": seen[0].recording, "panels": panels}, ensure_ascii=False).replace("<", "\\u003c")
    sound = io.BytesIO()
    soundfile.write(sound, seen[0].samples, SAMPLE_RATE, format="FLAC")
    page = _PAGE.read_text(encoding="utf-8")
    page = page.replace("__AUDIO__", base64.b64encode(sound.getvalue()).decode()).replace("__DATA__", data)
    write_atomically(path, page)


def _panel(seen: Seen) -> dict[str, Any]:
    """What the page shows of one network."""
    found = seen.inspection
    layers = [
        {
            "number": layer.number,
            "direction": layer.direction,
            "keep": layer.keep,
            "memory_ms": _plain(layer.memory_ms, 1),
            "signals": {name: _quantised_signal(name, values.T) for name, values in layer.signals.items()},
        }
        for layer in found.layers
    ]
    strongest = found.looks.max(axis=1, keepdims=True, initial=1e-30)
    return {
        **_common(seen),
        "features": _quantised(found.features.T, *loudness_range(found.features)),
        "looks": _quantised(found.looks / strongest, 0.0, 1.0),
        "layers": layers,
        "live": [[round(heard, 2), text] for heard, text in found.live],
    }


def _quantised_signal(name: str, values: np.ndarray) -> dict[str, Any]:
    """A gate from 0 to 1; any other signal from -1 to 1 times the largest size of each unit, its "scale"."""
    if is_gate(name):
        return _quantised(values, 0.0, 1.0)
    scale = np.maximum(np.abs(values).max(axis=1), 1e-6).astype(np.float64)
    return _quantised(values / scale[:, None], -1.0, 1.0) | {"scale": scale.round(6).tolist()}


def _quantised(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """Values (rows, columns) as bytes: 0 is `low` and below, 255 `high` and above."""
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    data = base64.b64encode(np.rint(255 * scaled).astype(np.uint8).tobytes()).decode()
    return {"rows": values.shape[0], "columns": values.shape[1], "low": low, "high": high, "data": data}


def _common(seen: Seen) -> dict[str, Any]:
    """What the page and the JSON file both hold, as plain values."""
    found = seen.inspection
    names = ("kind", "cell", "start", "frame", "hop", "duration")
    return {
        "name": seen.name,
        **{name: getattr(found, name) for name in names},
        "words": [asdict(word) for word in found.words],
        "events": {name: _plain(values, 4) for name, values in found.events.items()},
        "followers": [asdict(follower) for follower in found.followers],
    }


def _plain(values: np.ndarray | None, digits: int) -> Any:
    """Rounded numbers in lists; None for nothing and for infinity, which JSON has not."""
    if values is None:
        return None
    rounded = np.round(values.astype(np.float64), digits)
    if np.isfinite(rounded).all():
        return rounded.tolist()
    return [value if np.isfinite(value) else None for value in rounded.tolist()]


def write_json(seen: Sequence[Seen], path: Path) -> None:
    """All numbers, rounded to six decimals."""
    networks = [
        {
            **_common(one),
            "live": [{"heard": heard, "text": text} for heard, text in one.inspection.live],
            "features": _plain(one.inspection.features, 4),
            "looks": _plain(one.inspection.looks, 6),
            "layers": [
                {
                    "number": layer.number,
                    "direction": layer.direction,
                    "keep": layer.keep,
                    "memory_ms": _plain(layer.memory_ms, 3),
                    "signals": {name: _plain(values, 6) for name, values in layer.signals.items()},
                }
                for layer in one.inspection.layers
            ],
        }
        for one in seen
    ]
    content = {"recording": seen[0].recording, "networks": networks}
    write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")


def write_table(seen: Sequence[Seen], path: Path) -> None:
    """A Parquet table, a row for each unit in each frame, float32; words and followers are in the metadata."""
    names = sorted({name for one in seen for layer in one.inspection.layers for name in layer.signals})
    tables = [_table(one, layer, names) for one in seen for layer in one.inspection.layers]
    about = {"recording": seen[0].recording, "networks": [_common(one) for one in seen]}
    table = pa.concat_tables(tables).replace_schema_metadata({"inspection": json.dumps(about, ensure_ascii=False)})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def _table(seen: Seen, layer: Layer, names: list[str]) -> pa.Table:
    """Columns network, layer, direction, unit, memory_ms, frame, time, and the signals, null where there is none."""
    frames = len(next(iter(layer.signals.values())))
    units = max(values.shape[1] for values in layer.signals.values())
    unit, frame = (index.ravel() for index in np.divmod(np.arange(units * frames), frames))

    def column(values: np.ndarray | None) -> pa.Array:
        """(frames, n) with n <= units: a projected h has fewer outputs than units."""
        if values is None:
            return pa.nulls(units * frames, pa.float32())
        missing = pa.nulls((units - values.shape[1]) * frames, pa.float32())
        return pa.concat_arrays([pa.array(values.T.ravel().astype(np.float32)), missing])

    memory = None if layer.memory_ms is None else np.repeat(layer.memory_ms[None], frames, axis=0)
    labels = {"network": seen.name, "direction": layer.direction}
    found = seen.inspection
    return pa.table(
        {
            **{key: pa.repeat(value, units * frames).dictionary_encode() for key, value in labels.items()},
            "layer": pa.array(np.full(units * frames, layer.number, np.int32)),
            "unit": pa.array(unit.astype(np.int32)),
            "memory_ms": column(memory),
            "frame": pa.array(frame.astype(np.int32)),
            "time": pa.array((found.start + frame * found.frame).astype(np.float32)),
            **{name: column(layer.signals.get(name)) for name in names},
        }
    )


def write_picture(seen: Sequence[Seen], path: Path) -> None:
    """A PNG file with everything on one time axis."""
    from pipelines.inspect_picture import draw

    with replacing(path) as temporary:
        draw(seen, temporary)


_WRITERS: dict[str, Callable[[Sequence[Seen], Path], None]] = {
    ".html": write_page,
    ".png": write_picture,
    ".json": write_json,
    ".parquet": write_table,
}
