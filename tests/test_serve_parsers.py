"""Whatever a client sends, every parser reads it or refuses it in words; how bytes were cut does not matter."""

import io
import json
import re
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import Served, begin, dial, finished, s16, serving
from toy_model import spell
from websockets.exceptions import ConnectionClosed

from asr.endpoint import EndpointConfig
from asr.errors import AudioError
from pipelines.serve.access import Access
from pipelines.serve.limits import Refused
from pipelines.serve.native import Start, parse_endpoint, parse_start
from pipelines.serve.pcm import Format, PcmReader, WavReader
from pipelines.serve.sherpa import SherpaReader, parse_rate
from pipelines.serve.transcriptions import Order, parse_order
from pipelines.serve.vosk import parse

fuzz = settings(max_examples=60, deadline=None)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
CUTS = st.lists(st.integers(0, 60), max_size=12)


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects whose keys are mostly those that matter."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=6), JSON, max_size=6)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


@fuzz
@given(
    st.text() | st.binary() | objects("type", "sample_rate", "format", "endpoint", "two_pass", "token").map(json.dumps)
)
@example('{"type": "start"}')
@example("[" * 100_000)
@example('{"type": "start", "sample_rate": 1' + "0" * 5000 + "}")
def test_any_start_is_read_or_refused(message: str | bytes) -> None:
    try:
        start = parse_start(message)
    except Refused as error:
        assert error.close in (1007, 1008) and 0 < len(str(error)) < 400
    else:
        assert isinstance(start, Start)
        assert json.loads(message)["type"] == "start"


@fuzz
@given(objects("trailing_silence", "leading_silence", "max_segment", "vad") | JSON)
def test_any_endpoint_is_read_or_refused(given_: Any) -> None:
    try:
        assert isinstance(parse_endpoint(given_, EndpointConfig()), EndpointConfig)
    except Refused as error:
        assert len(str(error)) < 400


@fuzz
@given(st.text() | st.binary() | objects("config", "eof", "reset").map(json.dumps))
@example(b'{"eof" : 1}')
@example('{"config": {"sample_rate": Infinity}}')
@example('{"config": {"max_alternatives": 1%s}}' % ("0" * 400))
def test_any_vosk_message_is_read_or_refused(message: str | bytes) -> None:
    try:
        said = parse(message)
    except Refused:
        assert isinstance(message, str) or b'"config"' in message
    else:
        assert isinstance(said, dict) or said in ("eof", "reset") or said == message
        assert not (isinstance(message, str) and isinstance(said, bytes)), "no text is audio"


@fuzz
@given(st.binary(max_size=300), CUTS)
def test_sherpa_bytes_are_samples_or_refused_however_they_are_cut(data: bytes, sizes: list[int]) -> None:
    def read(pieces: Iterator[bytes]) -> bytes | str:
        reader = SherpaReader()
        try:
            return b"".join(reader.read(piece).tobytes() for piece in pieces)
        except AudioError as error:
            return str(error)

    whole = read(iter([data]))
    assert read(cut(data, sizes)) == whole
    if data[:4] != b"RIFF":
        assert whole == data[: len(data) // 4 * 4]


@fuzz
@given(st.binary(max_size=200), CUTS)
def test_what_follows_riff_is_samples_or_refused(data: bytes, sizes: list[int]) -> None:
    reader = WavReader()
    try:
        for piece in cut(b"RIFF\0\0\0\0WAVE" + data, sizes):
            assert reader.read(piece).dtype in (np.int16, np.float32)
    except AudioError as error:
        assert len(str(error)) < 200


@fuzz
@given(
    st.lists(st.integers(-32768, 32767), max_size=50),
    st.sampled_from([8_000, 16_000, 44_100]),
    st.integers(1, 3),
    st.sampled_from(["PCM_16", "FLOAT"]),
    st.lists(st.binary(max_size=9), max_size=3),
    CUTS,
)
def test_a_wav_file_gives_its_samples(
    values: list[int], rate: int, channels: int, subtype: str, chunks: list[bytes], sizes: list[int]
) -> None:
    """Written by soundfile; with other chunks before the audio, as editors leave them."""
    samples = np.repeat(np.array(values, np.int16)[:, None], channels, axis=1)
    written = io.BytesIO()
    soundfile.write(written, samples, rate, format="WAV", subtype=subtype)
    data = written.getvalue()
    extra = b"".join(b"LIST" + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for c in chunks)
    reader = WavReader()
    read = [reader.read(piece) for piece in cut(data[:12] + extra + data[12:], sizes)]
    assert reader.sample_rate == rate
    found = np.concatenate([part.reshape(-1, channels) for part in read if part.size] or [samples[:0]])
    expected, _ = soundfile.read(io.BytesIO(data), dtype="int16" if subtype == "PCM_16" else "float32", always_2d=True)
    np.testing.assert_array_equal(found, expected)


@fuzz
@given(st.binary(max_size=100), CUTS, st.sampled_from(["s16le", "f32le"]), st.integers(1, 3))
def test_pcm_does_not_depend_on_how_it_is_cut(data: bytes, sizes: list[int], format: Format, channels: int) -> None:
    reader = PcmReader(format, channels)
    width = (2 if format == "s16le" else 4) * channels
    read = b"".join(reader.read(piece).tobytes() for piece in cut(data, sizes))
    assert read == data[: len(data) // width * width]


FIELDS = ("model", "response_format", "stream", "timestamp_granularities[]", "language", "prompt", "file")
VALUES = st.sampled_from(["json", "text", "srt", "verbose_json", "true", "false", "word", "asr-offline"]) | st.text()


@fuzz
@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=5))
def test_any_form_is_read_or_refused(fields: list[tuple[str, str]]) -> None:
    try:
        order = parse_order(fields, ("offline", "streaming"))
    except Refused as error:
        assert error.status in (400, 404)
    else:
        assert isinstance(order, Order)
        assert order.network in ("offline", "streaming")


@fuzz
@given(
    st.binary(max_size=40) | (st.integers().map(str) | st.text(max_size=9)).map(lambda r: f"sample_rate={r}".encode())
)
@example(b"sample_rate=8000")
@example(b"a=1&sample_rate=-8000")
def test_any_query_has_a_rate_or_is_refused(query: bytes) -> None:
    given_ = parse_qs(query.decode("latin-1")).get("sample_rate", ["16000"])[0]
    try:
        rate = parse_rate(query)
    except Refused as error:
        assert error.code == "bad_message"
        assert not re.fullmatch("[0-9]{1,7}", given_)
    else:
        assert rate == int(given_) >= 0


@fuzz
@given(st.text(max_size=40), st.text(max_size=40))
@example("http://localhost:8000", "localhost:8000")
@example("http://[::1", "[::1")
def test_any_origin_and_host_are_judged(origin: str, host: str) -> None:
    access = Access()
    if access.allows_origin(origin, host):
        assert origin.lower().endswith(host.lower())
    if access.allows_host(host):
        assert host.lower().startswith(("localhost", "127.0.0.1", "[::1]"))


@pytest.mark.parametrize("port", ["", ":8000"])
def test_hosts_and_origins_are_known_by_their_whole_names(port: str) -> None:
    here = ["localhost", "LocalHost", "127.0.0.1", "[::1]"]
    names = [*here, "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost", "[::2]"]
    for name in names:
        assert Access().allows_host(name + port) == (name in here), name
        allowed = [other for other in names if Access().allows_origin(f"http://{other}{port}", name + port)]
        assert allowed == [other for other in names if other.lower() == name.lower()]


@fuzz
@given(st.text(max_size=20))
@example("correct horse")
@example("\ud800")
def test_only_the_token_is_the_token(given_: str) -> None:
    assert Access(token="correct horse").knows(given_) == (given_ == "correct horse")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["native", "vosk", "sherpa"]),
    st.lists(
        st.text(max_size=30) | st.binary(max_size=300) | objects("type", "config", "eof").map(json.dumps), max_size=6
    ),
)
def test_no_conversation_hurts_the_server(server: Served, protocol: str, messages: list[str | bytes]) -> None:
    """Every one ends with an error in JSON, a result or a closing frame, and the next client is served."""
    with dial(getattr(server, protocol)) as socket:
        try:
            for message in messages:
                socket.send(message)
            socket.close()
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code in (1000, 1007, 1008)
    socket = begin(server.native)
    socket.send(s16(spell("still here")))
    assert [final["text"] for final in finished(socket)] == ["still here"]
