"""The transducer: its loss, its training, and its decoder against torch, in blocks, saved and resumed."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the extra [train] to make a network")
pytest.importorskip("onnx", reason="needs the extra [train] to export a network")

from test_endpoint import RATE, noise, speech  # noqa: E402
from tones import log_rows, tone_config, write_corpus  # noqa: E402
from torchaudio.functional import rnnt_loss  # noqa: E402

from asr.config import AugmentConfig, FeatureConfig, ModelConfig, NetworkConfig, TrainConfig  # noqa: E402
from asr.decoding import TokenSpan  # noqa: E402
from asr.decoding.transducer import TransducerDecoder, TransducerSearch  # noqa: E402
from asr.endpoint import EndpointConfig  # noqa: E402
from asr.errors import ConfigError, ModelError  # noqa: E402
from asr.models import Network, load_network, save_network  # noqa: E402
from asr.nn.transducer import Transducer  # noqa: E402
from asr.recognizer import Recognizer  # noqa: E402
from asr.runtime.export import write_graphs  # noqa: E402
from asr.snapshot import Snapshot  # noqa: E402
from asr.streams import Streams  # noqa: E402
from asr.text import Tokenizer  # noqa: E402
from asr.training.data import Corpus, features_of  # noqa: E402
from asr.training.loop import Trainer, run_training  # noqa: E402
from asr.training.step import ctc, rnnt  # noqa: E402

TOKENS, UNITS = 7, 24


def talkative(transducer: Transducer, seed: int) -> Transducer:
    """Random weights, large enough that what is written depends on all of them."""
    torch.manual_seed(seed)
    for parameter in transducer.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return transducer.eval()


def frames_of(count: int, seed: int = 0) -> np.ndarray:
    """What a network may write: log-probabilities of tokens, which do not matter, and the encoder's share."""
    return np.random.default_rng(seed).normal(size=(count, TOKENS + UNITS)).astype(np.float32)


def decoded(search: TransducerSearch, frames: np.ndarray, sizes: list[int]) -> TransducerDecoder:
    decoder, position = search(), 0
    for size in [*sizes, len(frames)]:
        decoder.accept(frames[position : position + size])
        position += size
    return decoder


def greedy(transducer: Transducer, encoder: np.ndarray) -> list[tuple[int, int, float]]:
    """Token, frame and probability of all that is written, the prediction network reading anew from the start."""
    written: list[tuple[int, int, float]] = []
    with torch.no_grad():
        for t, frame in enumerate(torch.from_numpy(encoder)):
            for _ in range(4):
                tokens = torch.tensor([[token for token, _, _ in written]], dtype=torch.long)
                joint = torch.tanh(frame + transducer.predict(tokens)[0, -1])
                probabilities = torch.softmax(transducer.output(joint), -1)
                token = int(probabilities.argmax())
                if not token:
                    break
                written.append((token, t, float(probabilities[token])))
    return written


@pytest.mark.parametrize("seed", range(5))
def test_the_decoder_writes_what_torch_writes(seed: int) -> None:
    transducer, frames = talkative(Transducer(TOKENS, UNITS), seed), frames_of(40, seed)
    spans = decoded(TransducerSearch(transducer.arrays()), frames, []).tokens()
    expected = greedy(transducer, frames[:, TOKENS:])
    assert [(s.token, s.start_frame, s.end_frame) for s in spans] == [(token, t, t + 1) for token, t, _ in expected]
    assert [s.confidence for s in spans] == pytest.approx([p for _, _, p in expected], abs=1e-4)
    assert len({s.token for s in spans}) > 2
    assert max(np.bincount([s.start_frame for s in spans])) > 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.lists(st.integers(0, 7), max_size=12), st.integers(0, 3))
def test_blocks_of_any_size_give_the_same_to_the_last_bit(count: int, sizes: list[int], seed: int) -> None:
    search, frames = TransducerSearch(talkative(Transducer(TOKENS, UNITS), seed).arrays()), frames_of(count, seed)
    assert decoded(search, frames, sizes).finish() == decoded(search, frames, []).finish()


def test_what_is_written_stays_and_a_copy_goes_its_own_way() -> None:
    search, frames = TransducerSearch(talkative(Transducer(TOKENS, UNITS), 1).arrays()), frames_of(20)
    decoder = search()
    decoder.accept(frames[:10])
    written, before = decoder.written, decoder.tokens()
    copy = decoder.copy()
    copy.accept(frames_of(10, seed=5))
    assert decoder.tokens() == before != []
    decoder.accept(frames[10:])
    assert decoder.written is written and written[: len(before)] == before == copy.tokens()[: len(before)]
    assert decoder.finish() == decoded(search, frames, []).finish()


def test_a_frame_of_nothing_is_counted_and_says_nothing() -> None:
    search, frames = TransducerSearch(talkative(Transducer(TOKENS, UNITS), 1).arrays()), frames_of(6)
    silent = frames.copy()
    silent[:, TOKENS:] = np.nan
    decoder = decoded(search, np.concatenate([silent, frames]), [])
    expected = decoded(search, frames, []).tokens()
    assert decoder.tokens() == [
        dataclasses.replace(s, start_frame=s.start_frame + 6, end_frame=s.end_frame + 6) for s in expected
    ]


def test_the_decoder_is_saved_and_restored() -> None:
    search, frames = TransducerSearch(talkative(Transducer(TOKENS, UNITS), 2).arrays()), frames_of(20)
    decoder, other = search(), search()
    decoder.accept(frames[:10])
    Snapshot.read(Snapshot.write(decoder, {})).restore(other, {"TokenSpan": TokenSpan})
    other.accept(frames[10:])
    assert other.finish() == decoded(search, frames, []).finish()


def test_the_loss_is_that_of_the_whole_lattice() -> None:
    """Of values and of gradients; torchaudio computes the same from all tokens of a padded batch."""
    torch.manual_seed(0)
    transducer = Transducer(TOKENS, UNITS)
    frames, lengths = torch.tensor([9, 6, 4, 7]), torch.tensor([5, 6, 0, 2])
    targets = torch.randint(1, TOKENS, (4, 6))
    counts = torch.tensor([True, True, True, False])

    def gradients(loss: Any) -> Any:
        return list(torch.autograd.grad(loss, [encoder, *transducer.parameters()]))

    encoder = torch.randn(4, 9, UNITS, requires_grad=True)
    loss = rnnt(transducer, encoder, frames, targets, lengths, counts)
    logits = transducer.output(torch.tanh(encoder[:, :, None] + transducer.predict(targets)[:, None]))
    whole = rnnt_loss(logits, targets.int(), frames.int(), lengths.int(), blank=0, reduction="none")[:3].sum()
    torch.testing.assert_close(loss, whole)
    for got, expected in zip(gradients(loss), gradients(whole), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def with_transducer(config: TrainConfig, units: int, **training: object) -> TrainConfig:
    changed = dataclasses.replace(config.training, **training)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, prediction=units), training=changed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """To train a small streaming network on tones, without a transducer."""
    folder = write_corpus(tmp_path_factory.mktemp("tones") / "d", rows=24)
    return tone_config(folder, bidirectional=False, epochs=60, learning_rate=1e-2, batch_seconds=6.0)


@pytest.fixture(scope="module")
def start(plain: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That network, trained by CTC."""
    return run_training(plain, tmp_path_factory.mktemp("start") / "run")


def test_a_transducer_is_trained_on_a_network_that_stays_as_it_is(
    plain: TrainConfig, start: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(plain, init_from=str(start))
    config = with_transducer(config, 32, freeze_encoder=True, epochs=24, learning_rate=3e-2)
    folder = run_training(config, tmp_path / "run")
    scores = [row["cer"] for row in log_rows(tmp_path / "run", "dev")]
    assert scores[0] > 0.5
    assert min(scores) < 0.1
    check_frozen(start, folder)
    write_graphs(folder, precisions=("fp32",))
    corpus = Corpus(config.data.train)
    for engine in ("onnx", "torch"):
        model = Recognizer.load(folder.parent, engine=engine, decoding="transducer")
        found = model.transcribe_batch([corpus.audio(i).numpy() for i in range(8)], "streaming")
        assert sum(found[i].text == corpus.text(i) for i in range(8)) >= 6
    # in a training that starts from it all weights are taken, the transducer's as well
    again = dataclasses.replace(with_transducer(config, 32, freeze_encoder=False), init_from=str(folder))
    taken = Trainer(again, tmp_path / "again").network.state_dict()
    for name, value in load_network(folder).state_dict().items():
        assert torch.equal(taken[name], value), name


def check_frozen(start: Path, folder: Path) -> None:
    """Assert that two networks are the same to the last bit but for their transducers."""
    priors, kept = (load_network(f).log_priors for f in (start, folder))
    np.testing.assert_array_equal(np.array(priors), np.array(kept))
    before, after = (load_network(f).state_dict() for f in (start, folder))
    assert {name for name in after if not (name.startswith("transducer.") or ".joint." in name)} == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_a_transducer_learns_beside_ctc(plain: TrainConfig, tmp_path: Path) -> None:
    """A few utterances by heart, each output by its own loss."""
    config = dataclasses.replace(plain, augment=AugmentConfig(speeds=(1.0,), time_masks=0, band_masks=0))
    trainer = Trainer(with_transducer(config, 32), tmp_path / "run")
    plan = trainer.sampler.epoch(0)[0]
    batch, network = trainer.loader.batch(plan, 0), trainer.network

    def losses() -> list[float]:
        assert network.transducer is not None
        network.eval()
        with torch.no_grad():
            by_ctc, frames, auxiliary = network.read_features(*features_of(network, batch))
            wanted = frames, batch.tokens, batch.token_lengths, batch.counts
            both = ctc(by_ctc, *wanted), rnnt(network.transducer, auxiliary["joint"], *wanted)
        return [float(loss) / batch.token_count for loss in both]

    before = losses()
    for _ in range(100):
        trainer.train_on([plan], 0, 1e-2)
    assert min(before) > 1.5
    assert max(losses()) < 0.3


def test_what_teaches_no_transducer_is_refused(plain: TrainConfig, start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.freeze_encoder = True: .*model\.prediction"):
        with_transducer(plain, 0, freeze_encoder=True)
    with pytest.raises(ConfigError, match=r"training\.transducer_weight = 0"):
        with_transducer(plain, 8, transducer_weight=0.0)
    other = dataclasses.replace(plain, init_from=str(start), model=dataclasses.replace(plain.model, layers=3))
    with pytest.raises(ConfigError, match=r"freeze_encoder: .* another \[model\]"):
        run_training(with_transducer(other, 8, freeze_encoder=True), tmp_path / "run")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random networks with transducers; the streaming one looks ahead."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    for bidirectional in (True, False):
        config = ModelConfig(
            bidirectional=bidirectional, channels=(12, 10), hidden=16, layers=1, prediction=UNITS,
            look_ahead=0 if bidirectional else 3,
        )  # fmt: skip
        network = Network(
            NetworkConfig(format_version=1, features=FeatureConfig(bands=20), model=config),
            Tokenizer.characters(["abcde"]), torch.full((20,), -9.0), torch.full((20,), 4.0),
        )  # fmt: skip
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        save_network(network.eval(), folder / config.kind)
        write_graphs(folder / config.kind)
    return folder


AUDIO = np.concatenate([speech(2, seed=1), noise(1.2, -60), speech(3, seed=2)])


@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_both_engines_write_the_same_and_other_than_ctc(model: Path, network: str) -> None:
    onnx, torch_, ctc = (
        Recognizer.load(model, engine=engine, precision=precision, decoding=decoding).transcribe(AUDIO, RATE, network)
        for engine, precision, decoding in (
            ("onnx", "fp32", "transducer"),
            ("torch", None, "transducer"),
            ("onnx", "fp32", "greedy"),
        )
    )
    assert onnx.text == torch_.text != ctc.text
    assert len(onnx.text) > 10


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("reset", [False, True])
def test_live_text_is_that_of_the_file_and_goes_on_where_it_was_saved(model: Path, precision: str, reset: bool) -> None:
    recognizer = Recognizer.load(
        model, precision=precision, decoding="transducer", endpoint=EndpointConfig(reset=reset, blanks=False)
    )  # fmt: skip
    whole = recognizer.transcribe(AUDIO, RATE, "streaming")
    assert len(whole.segments) > 1
    session = recognizer.stream()
    for start in range(0, len(AUDIO), 997):
        session.feed(AUDIO[start : start + 997])
        if start == 997 * 50:
            assert session.feed(AUDIO[:0]).partial
            session = recognizer.resume(session.save())
    assert session.finish() == whole
    with Streams(recognizer) as streams:
        opened = [streams.open() for _ in range(3)]
        for stream in opened:
            stream.feed(AUDIO)
        assert [stream.finish().result(60) for stream in opened] == [whole] * 3


def test_a_model_without_a_transducer_says_what_to_do(model: Path, tmp_path: Path) -> None:
    without = shutil.copytree(model, tmp_path / "model")
    (without / "offline" / "prediction.npz").unlink()
    (without / "streaming" / "prediction.npz").unlink()
    with pytest.raises(ModelError, match=r"has no transducer; choose another decoding .* model.prediction=256"):
        Recognizer.load(without, decoding="transducer")


def test_where_one_network_has_a_transducer_it_alone_decodes(model: Path, tmp_path: Path) -> None:
    partly = shutil.copytree(model, tmp_path / "model")
    (partly / "offline" / "prediction.npz").unlink()
    recognizer = Recognizer.load(partly, decoding="transducer")
    assert recognizer.networks == ("streaming",)
    assert recognizer.transcribe(AUDIO, RATE) == recognizer.transcribe(AUDIO, RATE, "streaming")
    with pytest.raises(ModelError, match=r"offline: this network has no transducer.*one: streaming$"):
        recognizer.transcribe(AUDIO, RATE, "offline")
    with pytest.raises(ModelError, match=r"offline: this network has no transducer"):
        recognizer.stream(two_pass=True)  # told now, and not at the end of the first segment
    (partly / "streaming" / "prediction.npz").write_bytes(b"PK half")
    with pytest.raises(ModelError, match=r"prediction.npz: not a readable prediction network"):
        Recognizer.load(partly, decoding="transducer").stream()
