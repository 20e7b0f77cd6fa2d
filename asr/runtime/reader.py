"""The streaming network reading one segment, block by block, with a way back in its recent past."""

from collections import deque

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Decoder, Hypothesis
from asr.runtime import State, StreamingEngine

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_BLOCK_FRAMES = 4  # of the network: 0.16 s where a frame is 40 ms
_CHECKPOINT_BLOCKS = 6  # a segment that is cut in its past is read again from at most so far back
_Checkpoint = tuple[State, Decoder, int]  # of a reader between two blocks


class SegmentReader:
    """The streaming network reading one segment; the recent past is kept so that it can still end there.

    All calls of the network happen in `_step`.
    """

    def __init__(self, engine: StreamingEngine, decoder: Decoder, lookback: int) -> None:
        self.decoder = decoder
        self._engine = engine
        self._state = engine.initial_state()
        self._void = engine.latency_frames  # output frames still to be dropped
        self._block = _BLOCK_FRAMES * engine.samples_per_frame
        self._kept = -(-lookback // self._block)  # blocks
        self._past: deque[tuple[np.ndarray, _Checkpoint | None]] = deque()  # blocks, what was before
        self._read = 0  # samples in blocks, edge silence included
        self._waiting = _EDGE  # samples that fill no block yet

    def push(self, samples: np.ndarray) -> None:
        """Read float32 (n,) at 16 kHz as far as whole blocks go."""
        samples = np.concatenate([self._waiting, samples])
        whole = len(samples) // self._block * self._block
        for start in range(0, whole, self._block):
            self._read_block(samples[start : start + self._block])
        self._waiting = samples[whole:].copy()

    def rewind(self, length: int) -> np.ndarray:
        """Take back all but the first `length` samples of the segment and return them."""
        end = length + len(_EDGE)
        taken = [self._waiting]
        checkpoint = None
        while self._read > end or (checkpoint is None and len(taken) > 1):
            block, checkpoint = self._past.pop()
            taken.append(block)
            self._read -= self._block
        if checkpoint is not None:
            self._state, self.decoder, self._void = checkpoint
        samples, start = np.concatenate(taken[::-1]), self._read
        self._waiting = samples[:0]
        self.push(samples[: end - start])
        return samples[end - start :]

    def finish(self) -> list[Hypothesis]:
        """End the segment here and return what it may say, the best first; the reader is over then."""
        self.push(_EDGE)
        frame = self._engine.samples_per_frame
        rest = self._waiting[: len(self._waiting) // frame * frame]  # what is left after it is silence
        if len(rest):
            self._step(rest)
        if self._engine.latency_frames:
            self._step(np.zeros(self._engine.latency_frames * frame, np.float32), flush=True)
        return self.decoder.finish()

    def _read_block(self, block: np.ndarray) -> None:
        if self._kept:
            due = len(self._past) % _CHECKPOINT_BLOCKS == 0
            self._past.append((block.copy(), (self._state, self.decoder.copy(), self._void) if due else None))
            while len(self._past) >= self._kept + _CHECKPOINT_BLOCKS:
                for _ in range(_CHECKPOINT_BLOCKS):
                    self._past.popleft()
        self._read += len(block)
        self._step(block)

    def _step(self, audio: np.ndarray, flush: bool = False) -> None:
        log_probs, self._state = self._engine.step(audio[None], self._state, flush)
        void = min(self._void, log_probs.shape[1])
        self._void -= void
        self.decoder.accept(log_probs[0, void:])
