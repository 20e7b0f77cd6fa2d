"""Recognition: Recognizer for whole files; it opens a Session for live audio."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from asr.audio import SAMPLE_RATE, audio_blocks, to_float
from asr.decoding import Decoder, TokenSpan, Word
from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.calibration import Calibration, load_calibration
from asr.decoding.greedy import GreedyDecoder
from asr.decoding.language_model import Arcs, Automaton
from asr.decoding.next_word import TextScorer
from asr.decoding.ngram_files import read_words
from asr.decoding.sound import levels_of
from asr.decoding.transducer import TransducerSearch
from asr.endpoint import EndpointConfig, Endpointer
from asr.errors import AudioError, ConfigError, ModelError
from asr.lexicon import read_pronunciations
from asr.network import BATCH_ROWS, Alternative, Network, Segment, Transcript, transcript_of
from asr.runtime import check_choice, load_engine
from asr.runtime.folder import (
    NETWORKS,
    WEIGHTS_FILE,
    best_decoding,
    choose_network,
    find_graph,
    find_language_model,
    find_lexicon,
    find_networks,
    find_next_word,
    find_prediction,
    phones_at_output,
    read_priors,
    search_files,
)
from asr.runtime.reader import Work, run_together
from asr.session import Clock, Session, Update
from asr.snapshot import Snapshot
from asr.text import Tokenizer

__all__ = ["Alternative", "Network", "Recognizer", "Segment", "Session", "Transcript", "Update"]

_GATHER_SAMPLES = 300 * SAMPLE_RATE  # a long file's segments wait for so much audio, to be read in batches
_SAVED = {kind.__name__: kind for kind in (TokenSpan, Word, Alternative, Segment)}  # in a session's state


class Recognizer:
    """A model ready to recognize; `Recognizer.load` opens one.

    Args:
        networks: by name, "offline" or "streaming" or both.
        endpoint: where audio is cut into segments; None leaves it uncut, however long.
        name: of the model, for messages.
    """

    def __init__(
        self,
        networks: dict[str, Network],
        *,
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
        name: str = "model",
        unfit: Mapping[str, str] | None = None,
    ) -> None:
        """`unfit`: networks of the model that cannot decode in this way, and why; to ask for one is a ModelError."""
        self._networks, self._endpoint, self._name = networks, endpoint, name
        self._unfit = unfit or {}

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        engine: str = "onnx",
        precision: str | None = None,
        threads: int = 1,
        decoding: str | None = None,
        beam: int | None = None,
        lm_weight: float | None = None,
        word_score: float | None = None,
        nbest: int | None = None,
        hot_words: Mapping[str, float] | None = None,
        endpoint: EndpointConfig | None = EndpointConfig(),  # noqa: B008 (frozen)
        calibrated: bool = True,
    ) -> "Recognizer":
        """Open a model folder; its networks are read when first used.

        Args:
            path: the model folder; None is the model that comes with this package.
            engine: "onnx" or "torch".
            precision: "fp32" or "int8"; None: with onnx int8 where the model has it, with torch fp32.
            threads: for the arithmetic of one network.
            decoding: "beam": with the language model in the folder's lm/; "greedy": without, at next to no cost;
                "transducer": greedy as well, by those networks of the model that have one. None: beam, where there is
                a language model.
            beam, lm_weight, word_score, nbest, hot_words: of the beam search, see asr.decoding.beam.BeamConfig.
            endpoint: where audio is cut into segments; None leaves it uncut, however long.
            calibrated: False: times and confidences of words as the decoder gives them (see asr.decoding.calibration).

        Raises:
            ModelError: the folder is missing, incomplete or of another version, or has no language model or transducer
                where one is asked for.
            ConfigError: an argument that is not allowed.
        """
        check_choice(engine=engine, precision=precision, threads=threads)
        folders = find_networks(path)
        settings = {
            "beam": beam,
            "lm_weight": lm_weight,
            "word_score": word_score,
            "nbest": nbest,
            "hot_words": hot_words or None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        if decoding is None:
            decoding = "beam" if given else best_decoding(path)
        open_search = _search_opener(path, list(folders.values()), decoding, given)
        settings_told = json.dumps(asdict(BeamConfig(**given)), sort_keys=True)
        unfit = _without_transducer(folders) if decoding == "transducer" else {}
        networks = {}
        for name, folder in folders.items():
            if name in unfit:
                continue
            tokenizer = Tokenizer.load(folder / "tokens.txt")
            phones = phones_at_output(folder) if decoding == "beam" and find_lexicon(path) else []
            opened = {"engine": engine, "precision": precision, "threads": threads, "phones": bool(phones)}
            opened["joint"] = decoding == "transducer"
            networks[name] = Network(
                tokenizer,
                lambda folder=folder, opened=opened: load_engine(folder, **opened),
                open_search=lambda folder=folder, tokens=tokenizer.tokens, phones=phones: open_search(
                    folder, tokens, phones
                ),
                where=str(folder),
                weights=find_graph(folder, precision) if engine == "onnx" else folder / WEIGHTS_FILE,
                searched_by=(settings_told, search_files(path, folder, decoding)),
                calibration=load_calibration(folder, decoding) if calibrated else Calibration(),
                phones=len(phones),
            )
        shown = "shipped model" if path is None else f"model {path}"
        return cls(networks, endpoint=endpoint, name=shown, unfit=unfit)

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks that the model has for this decoding."""
        return tuple(self._networks)

    def transcribe(
        self, audio: str | Path | np.ndarray, sample_rate: int | None = None, network: str | None = None
    ) -> Transcript:
        """Recognize a recording of any length; a file is read in constant memory.

        Args:
            audio: a file, or samples: int16, or float32 in [-1, 1], (n,) or (n, channels).
            sample_rate: of samples, Hz; 16000 when it is not given. A file tells its own.
            network: "offline", or "streaming", which writes what live audio would give; None: offline, if it is one of
                `networks`.

        Raises:
            AudioError: the file or the samples cannot be read.
            ModelError: the model has no such network.
        """
        if isinstance(audio, str | Path):
            if sample_rate is not None:
                raise AudioError(f"{audio}: a file tells its own sample rate; leave sample_rate out")
            blocks, rate = audio_blocks(audio), SAMPLE_RATE
        else:
            blocks, rate = iter([audio]), SAMPLE_RATE if sample_rate is None else sample_rate
        network = network or choose_network(self._networks)
        chosen = self._network(network)
        if network == "streaming":
            session = self.stream(rate)
            for block in blocks:
                session.feed(block)
            return session.finish()
        return self._transcribe_offline(chosen, blocks, rate)

    def transcribe_batch(self, batch: Sequence[np.ndarray], network: str | None = None) -> list[Transcript]:
        """Recognize many utterances uncut, each one segment: float32 (n,) at 16 kHz each; `network` as above.

        Raises:
            AudioError: samples that cannot be read.
            ModelError: the model has no such network.
        """
        network = network or choose_network(self._networks)
        chosen = self._network(network)
        audios = [to_float(samples) for samples in batch]
        if network == "streaming":
            works = (_whole(Session(chosen, None, SAMPLE_RATE), samples) for samples in audios)
            return run_together(works, chosen.engine, BATCH_ROWS)
        hypotheses = chosen.read(audios)
        durations = [len(samples) / SAMPLE_RATE for samples in audios]
        return [
            transcript_of([chosen.segment(found, 0.0, duration, levels_of(samples))], duration)
            for found, duration, samples in zip(hypotheses, durations, audios, strict=True)
        ]

    def stream(
        self,
        sample_rate: int = SAMPLE_RATE,
        *,
        endpoint: EndpointConfig | EllipsisType | None = ...,
        two_pass: bool = False,
        keep_segments: bool = True,
        block_frames: int | None = None,
    ) -> Session:
        """Open a session for live audio.

        Args:
            sample_rate: of the audio, Hz.
            endpoint: where it is cut into segments; None leaves it uncut; ... is as the recognizer was told.
            two_pass: a finished segment is read again by the offline network before it is final.
            keep_segments: `Session.finish` tells all of them; False, for sessions that last for days: those alone
                that no Update has told.
            block_frames: of the network, that are read at a time: fewer show text sooner and cost more; None: as many
                as make 160 ms, or nearly.

        Raises:
            AudioError: a rate outside 8 to 192 kHz.
            ModelError: the model has no streaming network, or no offline one for the second pass.
            ConfigError: two passes without endpoints, or less than a frame to a block.
        """
        endpoint = self._endpoint if isinstance(endpoint, EllipsisType) else endpoint
        second = self._network("offline") if two_pass else None
        chosen = {"second": second, "keep_segments": keep_segments, "block_frames": block_frames}
        return Session(self._network("streaming"), endpoint, sample_rate, **chosen)

    def resume(self, data: bytes) -> Session:
        """Go on with what `Session.save` wrote, also in another process: the same text follows.

        Raises:
            ModelError: the data is damaged or of another version, or was saved with another model or decoding.
        """
        snapshot = Snapshot.read(data)
        about = snapshot.about
        with snapshot.reading():
            endpoint = None if about["endpoint"] is None else EndpointConfig(**about["endpoint"])
            session = self.stream(about["sample_rate"], endpoint=endpoint, two_pass=about["two_pass"])
        for what, here in session.about.items():
            if about.get(what) != here:
                raise ModelError(f"a saved session: its {what} was {about.get(what)}; in the {self._name} it is {here}")
        snapshot.restore(session, {**_SAVED, **session.decoders})
        return session

    def _network(self, name: str) -> Network:
        if name not in NETWORKS:
            raise ConfigError(f"network = {name!r}: must be {' or '.join(NETWORKS)}")
        if name in self._unfit:
            raise ModelError(f"{self._unfit[name]}; or take a network that has one: {', '.join(self._networks)}")
        if name not in self._networks:
            raise ModelError(f"the {self._name} has no {name} network (it has: {', '.join(self._networks)})")
        return self._networks[name]

    def _transcribe_offline(self, network: Network, blocks: Iterable[np.ndarray], rate: int) -> Transcript:
        clock = Clock(rate)
        segments: list[Segment | None] = []
        waiting: list[tuple[int, np.ndarray]] = []

        def read_waiting() -> None:
            hypotheses = network.read([samples for _, samples in waiting])
            for (start, samples), found in zip(waiting, hypotheses, strict=True):
                times = clock.seconds(start, start + len(samples))
                segments.append(network.segment(found, *times, levels_of(samples)))
            waiting.clear()

        for start, samples in _cut(clock.resample(blocks), self._endpoint):
            waiting.append((start, samples))
            if start + len(samples) - waiting[0][0] >= _GATHER_SAMPLES:
                read_waiting()
        read_waiting()
        return transcript_of(segments, clock.duration)


def _search_opener(
    path: str | Path | None, folders: Sequence[Path], decoding: str, settings: dict[str, Any]
) -> Callable[[Path, Sequence[str], Sequence[str]], Callable[[], Decoder]]:
    """How to open a search by the network in a folder for tokens, and phones behind them; what it needs is looked for.

    Raises:
        ConfigError: no such decoding, or settings that it does not have.
        ModelError: the model has no language model.
    """
    if decoding not in ("greedy", "beam", "transducer"):
        raise ConfigError(f"decoding = {decoding!r}: must be greedy, beam or transducer")
    if decoding != "beam":
        for name, value in settings.items():
            raise ConfigError(f"{name} = {value!r}: only with decoding = 'beam'")
    if decoding == "greedy":
        return lambda folder, tokens, phones: GreedyDecoder
    if decoding == "transducer":
        return lambda folder, tokens, phones: TransducerSearch.load(find_prediction(folder))
    config = BeamConfig(**settings)
    model, lexicon, next_word = find_language_model(path), find_lexicon(path), find_next_word(path)
    # Read while the network is opened, and once for two networks.
    pool = ThreadPoolExecutor(2, "asr-language-model")
    words = pool.submit(read_words, model)
    arcs = pool.submit(lambda: Arcs.read(model, words.result()))
    ngrams = pool.submit(lambda: Automaton(words.result(), arcs.result))
    said = None
    if lexicon and any(map(phones_at_output, folders)):
        said = pool.submit(lambda: read_pronunciations(lexicon, ngrams.result().lexicon))
    scorer = pool.submit(TextScorer, next_word) if next_word and config.network_share else None
    pool.shutdown(wait=False)

    def open_search(folder: Path, tokens: Sequence[str], phones: Sequence[str]) -> BeamSearch:
        search = BeamSearch(
            ngrams.result(), ngrams.result().lexicon, tokens, config, phones, said.result() if said else None,
            scorer.result() if scorer else None, read_priors(folder),
        )  # fmt: skip
        arcs.result()  # what is wrong with the file is told here
        return search

    return open_search


def _without_transducer(folders: dict[str, Path]) -> dict[str, str]:
    """Those of a model's networks that have no transducer, and what to do about it.

    Raises:
        ModelError: none of them has one.
    """
    without = {}
    for name, folder in folders.items():
        try:
            find_prediction(folder)
        except ModelError as error:
            without[name] = str(error)
    if len(without) == len(folders):
        raise ModelError(next(iter(without.values())))
    return without


def _cut(blocks: Iterable[np.ndarray], endpoint: EndpointConfig | None) -> Iterator[tuple[int, np.ndarray]]:
    """The segments of a recording at 16 kHz with the position of their first sample."""
    if endpoint is None:
        yield 0, np.concatenate([np.zeros(0, np.float32), *blocks])
        return
    endpointer = Endpointer(endpoint)
    start, held = 0, np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        for cut in endpointer.accept(block):
            yield start, held[: cut - start]
            start, held = cut, held[cut - start :]
    yield start, held


def _whole(session: Session, samples: np.ndarray) -> Work[Transcript]:
    work = session.feeding(samples)
    if isinstance(work, Generator):
        yield from work
    return (yield from session.finishing())
