"""Prepared data on disk: Arrow shards of utterances, and the reader that maps them into memory."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from asr.errors import ConfigError
from asr.files import replacing

VERSION = 1
ALIGNMENT_FILE = "alignment.npz"
STATES = 3  # of an aligned phone, left to right: it lasts at least 30 ms
LABEL_SAMPLES = 160  # to a frame of the alignment: 10 ms
ROWS_PER_BATCH = 64
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.large_binary()),  # int16 little-endian, mono, 16 kHz; empty where only features are kept
        ("n_samples", pa.int64()),
        ("features", pa.large_binary()),  # float16 (n_frames, n_mels) row-major, or null
        ("n_frames", pa.int32()),
        ("text", pa.string()),  # normalised
        ("phones", pa.string()),  # space-separated, or null
        ("speaker", pa.string()),
        ("source", pa.string()),
    ]
)


def write_shard(path: str | Path, rows: Iterable[dict]) -> None:
    """Write `rows` (dicts of `SCHEMA`'s fields) as one uncompressed Arrow IPC file, atomically."""
    rows = list(rows)
    with (
        replacing(Path(path)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for start in range(0, len(rows), ROWS_PER_BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + ROWS_PER_BATCH], SCHEMA))


def write_alignment(
    folder: str | Path, phones: Sequence[str], labels: Sequence[np.ndarray], rows: str | None = None
) -> None:
    """Keep the alignment of a prepared folder's rows, atomically.

    Args:
        phones: their names, silence first.
        labels: of each row, (frames,) uint8, empty for a row without.
        rows: the hash of the rows that were aligned (ShardDataset.row_hash); None: those that are there.
    """
    rows = rows or ShardDataset(folder, aligned=False).row_hash
    ends = np.cumsum([len(row) for row in labels])
    with replacing(Path(folder) / ALIGNMENT_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, labels=np.concatenate(labels), ends=ends, phones=np.array(phones), rows=np.array(rows))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the feature frames of a data set: `mean` and `variance` are (n_mels,) float64."""

    frames: int
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def join(cls, parts: "Iterable[Statistics]") -> "Statistics":
        """The statistics of all frames of `parts` together."""
        parts = list(parts)
        frames = sum(p.frames for p in parts)
        mean = np.sum([p.mean * (p.frames / frames) for p in parts], axis=0)
        square = np.sum([(p.variance + p.mean**2) * (p.frames / frames) for p in parts], axis=0)
        return cls(frames=frames, mean=mean, variance=square - mean**2)


class ShardDataset:
    """A prepared folder, memory-mapped; rows are read when asked for.

    Args:
        folder: what `asr prepare` wrote.
        aligned: read what `asr align` found, where it was run.

    Attributes:
        n_samples: (n,) int64, length of each utterance in samples.
        texts: normalised text of each utterance.
        phones: space-separated phones of each utterance, or None.
        info: the contents of dataset.json.
        aligned_phones: names of the phones that `asr align` found in the rows; empty where it was not run.

    Raises:
        ConfigError: the folder is missing, unfinished or of another version, or its alignment is of other rows.
    """

    def __init__(self, folder: str | Path, *, aligned: bool = True) -> None:
        if "://" in str(folder):
            raise ConfigError(f"{folder}: training maps its data from a disk; copy the folder to one, and name that")
        self.folder = Path(folder)
        try:
            self.info = json.loads((self.folder / "dataset.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{folder}: no prepared data (dataset.json is missing); run `asr prepare`") from error
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{folder}/dataset.json: not JSON ({error}); run `asr prepare` again") from error
        if self.info.get("version") != VERSION:
            raise ConfigError(f"{folder}: version {self.info.get('version')}, this program reads {VERSION}")
        tables = []
        for shard in self.info["shards"]:
            path = self.folder / shard["file"]
            try:
                with pa.memory_map(str(path)) as source:
                    tables.append(pa.ipc.open_file(source).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise ConfigError(f"{path}: missing or damaged ({error}); run `asr prepare` again") from error
        self._table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        self.n_samples: np.ndarray = self._table["n_samples"].to_numpy()
        self.texts: list[str] = self._table["text"].to_pylist()
        self.phones: list[str | None] = self._table["phones"].to_pylist()
        self.ids: list[str] = self._table["id"].to_pylist()
        self.speakers: list[str] = self._table["speaker"].to_pylist()
        self.sources: list[str] = self._table["source"].to_pylist()
        self.aligned_phones: tuple[str, ...] = ()
        if aligned and (self.folder / ALIGNMENT_FILE).is_file():
            self._read_alignment(self.folder / ALIGNMENT_FILE)

    def _read_alignment(self, path: Path) -> None:
        with np.load(path) as kept:
            self.aligned_phones = tuple(kept["phones"].tolist())
            self._labels, self._label_ends = kept["labels"], kept["ends"]
            rows = kept["rows"].item() if "rows" in kept else None
        if rows is None:  # written before they were kept: their number and lengths must do
            frames, wanted = np.diff(self._label_ends, prepend=0), self.n_samples // LABEL_SAMPLES
            of_these = len(frames) == len(wanted) and bool(((frames == wanted) | (frames == 0)).all())
        else:
            of_these = rows == self.row_hash
        if not of_these:
            raise ConfigError(f"{path}: of other data; run `asr align {self.folder}` again")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the features of all rows."""
        info = self.info
        return Statistics(frames=info["frames"], mean=np.array(info["mean"]), variance=np.array(info["variance"]))

    @property
    def row_hash(self) -> str:
        """Tells the rows from others: their ids, texts and lengths, in their order."""
        return hashlib.sha256(json.dumps([self.ids, self.texts, self.n_samples.tolist()]).encode()).hexdigest()

    @property
    def alignment_hash(self) -> str:
        """Tells the alignment from another; empty where there is none."""
        if not self.aligned_phones:
            return ""
        parts = [" ".join(self.aligned_phones).encode(), self._label_ends.tobytes(), self._labels.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def audio(self, row: int) -> np.ndarray:
        """Samples of one utterance: (n_samples,) int16, a view of the mapped file."""
        return np.frombuffer(self._table["audio"][row].as_buffer(), dtype="<i2")

    def alignment(self, row: int) -> np.ndarray:
        """The phone state in each 10 ms of one utterance: (frames,) uint8, STATES to a phone; empty where unknown."""
        if not self.aligned_phones:
            return np.zeros(0, np.uint8)
        start = self._label_ends[row - 1] if row else 0
        return self._labels[start : self._label_ends[row]]

    def features(self, row: int) -> np.ndarray | None:
        """Stored features of one utterance: (n_frames, n_mels) float16, or None where there are none."""
        cell = self._table["features"][row]
        if not cell.is_valid:
            return None
        return np.frombuffer(cell.as_buffer(), dtype="<f2").reshape(self._table["n_frames"][row].as_py(), -1)
