"""The websocket protocols: the native one, and Vosk's and sherpa-onnx's as their own clients speak them."""

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from serving import PAUSE, TALK, Served, begin, dial, finished, in_blocks, s16, serving
from toy_model import RATE, TOKENIZER, ToyEngine, spell, toy_recognizer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from asr.audio import read_audio
from asr.endpoint import EndpointConfig
from asr.errors import ModelError
from asr.recognizer import Network, Recognizer

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def texts_of_file(samples: np.ndarray, rate: int = RATE, endpoint: EndpointConfig | None = None) -> list[str]:
    """What `asr transcribe --streaming` writes for the samples as a 16 bit file."""
    recognizer = toy_recognizer(endpoint=endpoint or EndpointConfig())
    read = np.frombuffer(s16(samples), "<i2")
    return [segment.text for segment in recognizer.transcribe(read, rate, "streaming").segments]


@pytest.fixture(scope="module")
def english() -> Iterator[Served]:
    """The shipped model: the toy reads nothing that was resampled."""
    with serving(Recognizer.load(decoding="greedy")) as served:
        yield served


def spoken(rate: int) -> tuple[np.ndarray, list[str]]:
    """A sample at another rate, float32, and what `asr transcribe --streaming` writes for it as a 16 bit file."""
    samples = read_audio(SAMPLES / "00003.flac", sample_rate=rate)
    samples = np.concatenate([samples, np.zeros(rate, np.float32), samples])
    read = np.frombuffer(s16(samples), "<i2")
    segments = Recognizer.load(decoding="greedy").transcribe(read, rate, "streaming").segments
    assert len(segments) == 2
    return read.astype(np.float32) / 32768, [segment.text for segment in segments]


def refusal(socket: ClientConnection) -> tuple[dict[str, Any], int]:
    """The error that a client is told, and the code that the connection is closed with."""
    with pytest.raises(ConnectionClosed) as closed:
        for _ in range(100):
            told = json.loads(socket.recv(10))
    assert closed.value.rcvd is not None
    return told, closed.value.rcvd.code


# ---- native


def test_native_partials_finals_and_done(server: Served) -> None:
    socket = begin(server.native)
    partials, finals = [], []
    for block in in_blocks(s16(TALK)):
        socket.send(block)
        while (reply := json.loads(socket.recv(10)))["type"] == "final":
            finals.append(reply)
        partials.append(reply)
    finals += finished(socket)
    assert [f["text"] for f in finals] == texts_of_file(TALK) == ["one two", "three"]
    assert [word["word"] for word in finals[0]["words"]] == ["one", "two"]
    assert 0 <= finals[0]["start"] < finals[0]["words"][0]["start"] < finals[0]["end"] <= finals[1]["start"]
    assert {p["text"] for p in partials} >= {"", "one", "one two", "three"}
    assert partials[-1]["time"] == pytest.approx(len(TALK) / RATE, abs=1e-3)


@pytest.mark.parametrize("size", [1, 3, 4099, 1 << 18])
def test_the_text_does_not_depend_on_how_bytes_are_cut(server: Served, size: int) -> None:
    data = s16(TALK)
    if size < 10:  # single bytes of a part: every sample is cut in two
        data = data[: 2 * RATE // 10 * 2]
        expected = texts_of_file(TALK[: RATE // 10 * 2])
    else:
        expected = texts_of_file(TALK)
    socket = begin(server.native)
    for block in in_blocks(data, size if size > 10 else size * 501):
        socket.send(block)
    assert [f["text"] for f in finished(socket)] == expected


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_any_rate_is_resampled_without_seams(english: Served, rate: int) -> None:
    """Equal to the whole file at that rate, however the blocks fall."""
    samples, expected = spoken(rate)
    socket = begin(english.native, sample_rate=rate)
    for block in in_blocks((samples * 32768).astype("<i2").tobytes(), 7777):
        socket.send(block)
    assert [f["text"] for f in finished(socket)] == expected


def test_floats(server: Served) -> None:
    socket = begin(server.native, format="f32le")
    for block in in_blocks(TALK.astype("<f4").tobytes()):
        socket.send(block)
    assert [f["text"] for f in finished(socket)] == ["one two", "three"]


def test_a_session_chooses_its_endpoints(server: Served) -> None:
    socket = begin(server.native, endpoint={"trailing_silence": 2.0})
    for block in in_blocks(s16(TALK)):
        socket.send(block)
    expected = texts_of_file(TALK, endpoint=EndpointConfig(trailing_silence=2.0))
    assert [f["text"] for f in finished(socket)] == expected
    assert len(expected) == 1


def test_what_a_session_leaves_out_of_its_endpoints_is_the_servers() -> None:
    uncut = EndpointConfig(trailing_silence=2.0, blanks=False)
    with serving(toy_recognizer(endpoint=uncut)) as served:
        for asked, segments in (({"leading_silence": 6.0}, 1), ({"trailing_silence": 0.5}, 2), ({}, 1)):
            socket = begin(served.native, endpoint=asked)
            socket.send(s16(TALK))
            assert len(finished(socket)) == segments


def test_the_last_words_are_not_lost(server: Served) -> None:
    socket = begin(server.native)
    socket.send(s16(spell("tail")))
    assert [f["text"] for f in finished(socket)] == ["tail"]


class OneLetterOn(ToyEngine):
    """Reads b for a, c for b ...: an offline network that can be told from the streaming one."""

    def _read(self, samples: np.ndarray) -> np.ndarray:
        log_probs = super()._read(samples)
        log_probs[:, 3:] = log_probs[:, 2:-1].copy()
        return log_probs


def test_two_pass_finals_are_the_offline_networks() -> None:
    networks = {"offline": Network(TOKENIZER, OneLetterOn), "streaming": Network(TOKENIZER, ToyEngine)}
    with serving(Recognizer(networks)) as served:
        for two_pass, said in ((True, "uisff"), (False, "three"), (None, "three")):
            socket = begin(served.native, two_pass=two_pass)
            socket.send(s16(spell("three")))
            assert json.loads(socket.recv(10))["text"].startswith("thr"), "partial text is the streaming network's"
            assert [f["text"] for f in finished(socket)] == [said]
    with serving(Recognizer(networks), two_pass=True) as served:
        socket = begin(served.native)
        socket.send(s16(spell("three")))
        assert [f["text"] for f in finished(socket)] == ["uisff"]


def test_two_pass_without_an_offline_network_is_refused() -> None:
    with serving(toy_recognizer(["streaming"])) as served:
        socket = dial(served.native)
        socket.send(json.dumps({"type": "start", "two_pass": True}))
        told, code = refusal(socket)
    assert told["code"] == "bad_settings"
    assert "offline" in told["message"]
    assert code == 1008
    with pytest.raises(ModelError, match="no offline network"), serving(toy_recognizer(["streaming"]), two_pass=True):
        pass


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ('{"type": "start", "sample_rate": 16000', "not JSON"),
        ("[1, 2]", "object"),
        ('{"type": "begin"}', "start"),
        ('{"type": "start", "sample_rat": 8000}', "'sample_rat'"),
        ('{"type": "start", "sample_rate": "16000"}', "sample_rate"),
        ('{"type": "start", "sample_rate": true}', "sample_rate"),
        ('{"type": "start", "sample_rate": 1234}', "1234"),
        ('{"type": "start", "sample_rate": 1e999}', "sample_rate"),
        ('{"type": "start", "format": "mp3"}', "s16le"),
        ('{"type": "start", "endpoint": {"trailing_silence": NaN}}', "trailing_silence"),
        ('{"type": "start", "endpoint": {"trailing": 1}}', "'trailing'"),
        ('{"type": "start", "endpoint": 7}', "endpoint"),
        ('{"type": "start", "model": "/etc/passwd"}', "'model'"),
    ],
)
def test_a_wrong_start_is_named(server: Served, message: str, named: str) -> None:
    socket = dial(server.native)
    socket.send(message)
    told, code = refusal(socket)
    assert told["type"] == "error"
    assert named in told["message"]
    assert code in (1007, 1008)


def test_a_setting_that_cannot_be_had_is_told_apart_from_a_broken_message(server: Served) -> None:
    socket = dial(server.native)
    socket.send('{"type": "start", "endpoint": {"trailing_silence": -1}}')
    told, code = refusal(socket)
    assert (told["code"], code) == ("bad_settings", 1008)


def test_garbage_as_floats_is_refused_and_nothing_else_suffers(server: Served) -> None:
    other = begin(server.native)
    socket = begin(server.native, format="f32le")
    socket.send(np.full(100, np.nan, "<f4").tobytes())
    told, code = refusal(socket)
    assert (told["code"], code) == ("bad_audio", 1007)
    other.send(s16(spell("fine")))
    assert [f["text"] for f in finished(other)] == ["fine"]


# ---- Vosk: the logic of vosk-server's websocket/test.py


def vosk_client(address: str, wave: bytes, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Config, then blocks of 0.2 s with one reply each, then eof with one final reply."""
    with dial(address) as socket:
        socket.send(json.dumps({"config": config}))
        replies = []
        for block in in_blocks(wave, int(config.get("sample_rate", 8000) * 0.2) * 2):
            socket.send(block)
            replies.append(json.loads(socket.recv(10)))
        socket.send('{"eof" : 1}')
        replies.append(json.loads(socket.recv(10)))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000
    return replies


def test_vosk_client(server: Served) -> None:
    replies = vosk_client(server.vosk, s16(TALK), {"sample_rate": RATE})
    results = [reply for reply in replies if "text" in reply]
    assert all(reply.keys() == {"partial"} for reply in replies if reply not in results)
    assert {reply["partial"] for reply in replies if "partial" in reply} >= {"one", "one two"}
    assert [r["text"] for r in results] == ["one two", "three", ""]
    assert results[-1] == {"text": ""}
    first = results[0]["result"]
    assert [word["word"] for word in first] == ["one", "two"]
    assert all(word.keys() == {"conf", "end", "start", "word"} for word in first)
    assert all(0 < word["conf"] <= 1 and word["start"] < word["end"] for word in first)


def test_vosk_takes_8_khz_when_nothing_is_said(english: Served) -> None:
    samples, expected = spoken(8_000)
    with dial(english.vosk) as socket:
        replies = []
        for block in in_blocks((samples * 32768).astype("<i2").tobytes()):
            socket.send(block)
            replies.append(json.loads(socket.recv(10)))
        socket.send('{"eof":1}')
        replies.append(json.loads(socket.recv(10)))
    assert [r["text"] for r in replies if r.get("text")] == expected


@pytest.mark.parametrize("eof", ['{"eof":1}', '{ "eof" : 1 }', b'{"eof" : 1}', '{"eof": true}\n'])
def test_vosk_eof_in_every_spelling(server: Served, eof: str | bytes) -> None:
    with dial(server.vosk) as socket:
        socket.send('{ "config" : { "sample_rate" : 16000.0 } }')
        socket.send(s16(spell("word")))
        assert "partial" in json.loads(socket.recv(10))
        socket.send(eof)
        assert json.loads(socket.recv(10))["text"] == "word"


def test_vosk_silence_has_an_empty_text(server: Served) -> None:
    replies = vosk_client(server.vosk, s16(PAUSE), {"sample_rate": RATE})
    assert replies[-1] == {"text": ""}
    assert vosk_client(server.vosk, b"", {"sample_rate": RATE}) == [{"text": ""}]


def test_vosk_reset_gives_a_result_and_the_connection_stays(server: Served) -> None:
    with dial(server.vosk) as socket:
        socket.send(json.dumps({"config": {"sample_rate": RATE, "words": 1}}))
        told = []
        for word in ("first", "second"):
            socket.send(s16(spell(word)))
            socket.recv(10)
            socket.send('{"reset" : 1}')
            told.append(json.loads(socket.recv(10)))
        assert [reply["text"] for reply in told] == ["first", "second"]
        assert told[1]["result"][0]["start"] > told[0]["result"][0]["end"], "the clock goes on"


def test_vosk_alternatives_and_no_words(server: Served) -> None:
    replies = vosk_client(server.vosk, s16(TALK), {"sample_rate": RATE, "max_alternatives": 3, "words": False})
    found = [reply["alternatives"] for reply in replies if "alternatives" in reply]
    assert [alternatives[0]["text"] for alternatives in found] == ["one two", "three", ""]
    assert all(alternatives[0].keys() == {"text", "confidence"} for alternatives in found)
    plain = vosk_client(server.vosk, s16(TALK), {"sample_rate": RATE, "words": False})
    assert {"text": "one two"} in plain


def test_vosk_partial_words_are_those_of_the_text_and_become_those_of_the_result(server: Served) -> None:
    config = {"sample_rate": RATE, "partial_words": True}
    with dial(server.vosk) as socket:
        socket.send(json.dumps({"config": config}))
        for reset in range(2):  # after it the clock goes on
            partials = []
            for block in in_blocks(s16(TALK)):
                socket.send(block)
                reply = json.loads(socket.recv(10))
                if "text" in reply:
                    break
                partials.append(reply)
            assert reply["text"] == "one two"
            assert all(said.keys() == {"partial", "partial_result"} for said in partials if said["partial"])
            assert all(said["partial"] or said.keys() == {"partial"} for said in partials)
            for said in partials:
                assert [word["word"] for word in said.get("partial_result", [])] == said["partial"].split()
            last, final = partials[-1]["partial_result"], reply["result"]
            assert [word["start"] for word in last] == [word["start"] for word in final]
            assert all(word["end"] <= known["end"] + 0.1 for word, known in zip(last, final, strict=True))
            assert (final[0]["start"] > len(spell("one")) / RATE) == bool(reset)
            socket.send('{"reset" : 1}')
            socket.recv(10)
    plain = vosk_client(server.vosk, s16(TALK), config | {"partial_words": False})
    assert not any("partial_result" in reply for reply in plain)


def test_vosk_one_reply_also_where_a_message_ends_two_segments(server: Served) -> None:
    with dial(server.vosk) as socket:
        socket.send(json.dumps({"config": {"sample_rate": RATE}}))
        socket.send(s16(np.concatenate([TALK, PAUSE])))
        assert json.loads(socket.recv(10))["text"] == "one two three"
        socket.send('{"eof" : 1}')
        assert json.loads(socket.recv(10)) == {"text": ""}


def test_vosk_ignores_what_would_change_the_server(server: Served) -> None:
    replies = vosk_client(
        server.vosk, s16(spell("same")), {"sample_rate": RATE, "model": "/etc", "phrase_list": ["zero", "one"]}
    )
    assert replies[-1]["text"] == "same"


def test_vosk_a_later_config_changes_what_it_names(server: Served) -> None:
    with dial(server.vosk) as socket:

        def configure(**named: Any) -> None:
            socket.send(json.dumps({"config": named}))

        configure(sample_rate=str(RATE))
        configure(max_alternatives=0.0)
        socket.send(s16(spell("sixteen")))
        assert "partial" in json.loads(socket.recv(10))
        configure(sample_rate=RATE, words=False)
        configure(partial_words=True)
        socket.send('{"reset" : 1}')
        assert json.loads(socket.recv(10)) == {"text": "sixteen"}
        socket.send(s16(spell("thousand")))
        assert "partial_result" in json.loads(socket.recv(10))
        configure(sample_rate=8_000)
        told, code = refusal(socket)
    assert "before audio comes" in told["message"] and (told["code"], code) == ("bad_settings", 1008)


@pytest.mark.parametrize(
    "message",
    [
        "{",
        '{"config": 5}',
        '{"config": {"sample_rate": 3}}',
        '{"config": {"sample_rate": "fast"}}',
        '{"config": {"max_alternatives": [1]}}',
        "hello",
        '{"what": 1}',
    ],
)
def test_vosk_nonsense_is_refused(server: Served, message: str) -> None:
    with dial(server.vosk) as socket:
        socket.send(message)
        socket.send(b"\0" * 3200)
        told, code = refusal(socket)
    assert told["type"] == "error"
    assert code in (1007, 1008)


# ---- sherpa-onnx: the logic of its websocket clients


def sherpa_client(address: str, data: bytes, size: int = 6400) -> tuple[list[dict[str, Any]], str]:
    """Sends audio while it receives, says Done, and returns the JSON messages and the literal after them."""
    with dial(address) as socket:
        for block in in_blocks(data, size):
            socket.send(block)
        socket.send("Done")
        messages = [str(message) for message in socket]  # until the server closes
    return [json.loads(message) for message in messages[:-1]], messages[-1]


def test_sherpa_client(server: Served) -> None:
    messages, last = sherpa_client(server.sherpa, TALK.astype("<f4").tobytes())
    assert last == "Done!"
    assert all(
        message.keys() == {"text", "tokens", "timestamps", "segment", "start_time", "is_final", "is_eof"}
        for message in messages
    )
    finals = [message for message in messages if message["is_final"]]
    assert [message["text"] for message in finals] == ["one two", "three"]
    assert [message["segment"] for message in finals] == [0, 1]
    assert finals[1]["start_time"] >= 0.5
    assert "".join(finals[0]["tokens"]).split() == ["one", "two"]
    assert len(finals[0]["timestamps"]) == 2
    assert finals[0]["timestamps"] == sorted(finals[0]["timestamps"])
    assert {message["text"] for message in messages if not message["is_final"]} >= {"one", "one two"}


def wav(samples: np.ndarray, rate: int, subtype: str, channels: int = 1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.stack([samples] * channels, axis=1), rate, format="WAV", subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("size", [7, 1000, 1 << 19])
@pytest.mark.parametrize(("subtype", "channels"), [("PCM_16", 1), ("FLOAT", 1), ("PCM_16", 2)])
def test_sherpa_users_send_wav_files_as_they_are(server: Served, size: int, subtype: str, channels: int) -> None:
    samples = TALK if size > 10 else spell("a")[: RATE // 5]
    messages, last = sherpa_client(server.sherpa, wav(samples, RATE, subtype, channels), size)
    assert last == "Done!"
    expected = ["one two", "three"] if size > 10 else ["a"]
    assert [message["text"] for message in messages if message["is_final"]] == expected


def test_sherpa_takes_the_rate_of_a_wav_file_or_of_its_address(english: Served) -> None:
    samples, expected = spoken(48_000)
    for address, data in (
        (english.sherpa, wav(samples, 48_000, "FLOAT")),
        (f"{english.sherpa}/?sample_rate=48000", samples.astype("<f4").tobytes()),
    ):
        messages, _ = sherpa_client(address, data, 50_000)
        assert [message["text"] for message in messages if message["is_final"]] == expected


def test_sherpa_silence_and_nothing(server: Served) -> None:
    assert sherpa_client(server.sherpa, PAUSE.astype("<f4").tobytes())[1] == "Done!"
    assert sherpa_client(server.sherpa, b"") == ([], "Done!")


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF" + b"\xff" * 60,
        wav(PAUSE, RATE, "PCM_24"),
        b"RIFF\0\0\0\0WAVE" + struct.pack("<4sI", b"LIST", 1 << 30),
        np.full(500, 1e30, "<f4").tobytes(),
    ],
)
def test_sherpa_refuses_what_is_no_audio(server: Served, data: bytes) -> None:
    with dial(server.sherpa) as socket:
        socket.send(data)
        told, code = refusal(socket)
    assert (told["code"], code) == ("bad_audio", 1007)


def test_many_at_once_disturb_nobody(server: Served) -> None:
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    sockets = [begin(server.native) for _ in words]
    started = time.monotonic()
    blocks = [in_blocks(s16(spell(word)), 1280) for word in words]
    for number in range(max(map(len, blocks))):
        for socket, own in zip(sockets, blocks, strict=True):
            if number < len(own):
                socket.send(own[number])
    assert [finished(socket)[0]["text"] for socket in sockets] == words
    assert time.monotonic() - started < 60
