"""The server: its page and counters, who is let in, what a client may cost, and how it ends."""

import contextlib
import json
import os
import shutil
import signal
import socket as sockets
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile
from serving import (
    HTTP,
    TALK,
    Served,
    begin,
    dial,
    eventually,
    finished,
    get,
    in_blocks,
    metric,
    post,
    recording,
    s16,
    serving,
    until_done,
    wire,
)
from toy_model import RATE, spell
from websockets.exceptions import ConnectionClosed, InvalidStatus

from asr.errors import ConfigError
from asr.recognizer import Recognizer
from pipelines.cli import main
from pipelines.serve.access import Access
from pipelines.serve.limits import Limits
from pipelines.serve.run import Settings

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"
TOKEN = "correct horse"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def ended(socket: Any) -> tuple[list[dict[str, Any]], int]:
    """All that still comes, and the code that the connection is closed with."""
    messages = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            messages.append(message if (message := socket.recv(15)) == "Done!" else json.loads(message))
    assert closed.value.rcvd is not None
    return messages, closed.value.rcvd.code


# ---- the page, health, metrics, log


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    reply = get(server.http)
    assert reply.status_code == 200
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    files = ["page.js", "audio.js", "stream.js", "wave.js", "capture.js", "style.css", "icon.svg"]
    for text in (reply.text, *(get(f"{server.http}/{name}").raise_for_status().text for name in files)):
        assert "https:" not in text and "http:" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "style=" not in text and "onclick" not in text


@pytest.mark.parametrize(
    "path", ["/../run.py", "/%2e%2e/run.py", "/..%2f..%2fcli.py", "//etc/passwd", "/page/", "/docs"]
)
def test_no_file_of_the_server_is_reached(server: Served, path: str) -> None:
    with wire(server.http) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: raw.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 404")
    assert b"import" not in reply


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_what_is_not_there_is_told_apart_from_what_is_not_for_a_method(server: Served, method: str) -> None:
    def answer(path: str) -> tuple[int, str]:
        reply = httpx.request(method, f"{server.http}{path}", timeout=30)
        return reply.status_code, reply.json()["error"]["code"]

    for nothing in ("/v1/audio/translations", "/v1", "/docs", "/health/", "/page.js/x"):
        assert answer(nothing) == (404, "not_found"), nothing
    there = ["/", "/page.js", "/health", "/metrics", "/v1/models"]
    for wrong in ["/v1/audio/transcriptions"] if method == "GET" else there:
        assert answer(wrong) == (405, "method_not_allowed"), wrong


def test_health_and_metrics_count(server: Served) -> None:
    before = {name: metric(server, name) for name in ("asr_audio_seconds_total", "asr_reply_seconds_count")}
    socket = begin(server.native)
    assert get(f"{server.http}/health").json() == {"status": "ok", "sessions": 1}
    assert metric(server, 'asr_sessions{protocol="native"}') == 1
    for block in in_blocks(s16(TALK)):
        socket.send(block)
    finished(socket)
    assert eventually(lambda: metric(server, 'asr_sessions{protocol="native"}') == 0)
    assert metric(server, "asr_audio_seconds_total") - before["asr_audio_seconds_total"] == pytest.approx(
        len(TALK) / RATE
    )
    assert metric(server, "asr_reply_seconds_count") - before["asr_reply_seconds_count"] == len(in_blocks(s16(TALK)))
    assert metric(server, 'asr_sessions_ended_total{how="done",protocol="native"}') >= 1
    assert metric(server, "asr_real_time_factor") > 0
    assert metric(server, "process_resident_memory_bytes") > 1e6


@pytest.mark.parametrize("log_text", [False, True])
def test_the_log_is_json_and_holds_text_only_where_asked(capsys: pytest.CaptureFixture[str], log_text: bool) -> None:
    with serving(log_text=log_text) as served:
        socket = begin(served.native)
        socket.send(s16(TALK))
        finished(socket)
        post(served.http, recording(spell("spoken")))
        assert eventually(lambda: get(f"{served.http}/health").json()["sessions"] == 0)
    lines = capsys.readouterr().err
    events = [json.loads(line) for line in lines.splitlines()]
    by_name = {event["event"]: event for event in events}
    assert {"started", "session", "upload", "stopped"} <= by_name.keys()
    assert by_name["session"]["how"] == "done"
    assert by_name["session"]["audio_seconds"] == pytest.approx(len(TALK) / RATE, abs=1e-3)
    assert ("three" in lines and "spoken" in lines) == log_text


# ---- who is let in


def test_who_listens_to_others_needs_a_token() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="token"):
            Access(host=host)
        Access(host=host, token=TOKEN)
    with pytest.raises(ConfigError, match="8 characters"):
        Access(token="short")
    for token in ("пароль-123", "pässword", "password\n"):
        with pytest.raises(ConfigError, match="ASCII"):
            Access(token=token)
    with pytest.raises(ConfigError, match="no such address"):
        Access(host="no.such.host.invalid")


def test_the_token_is_asked_for_everywhere_but_on_the_page(tmp_path: Path) -> None:
    with serving(access=Access(token=TOKEN)) as served:
        assert get(served.http).status_code == get(f"{served.http}/health").status_code == 200
        bearer = {"authorization": f"Bearer {TOKEN}"}
        for path in ("/metrics", "/v1/models"):
            assert get(served.http + path).status_code == 401
            assert get(f"{served.http}{path}?token={TOKEN}").status_code == 401, "addresses end up in logs"
            assert get(served.http + path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert get(served.http + path, headers=bearer).status_code == 200
        assert post(served.http, recording()).status_code == 401
        assert post(served.http, recording(), headers=bearer).json() == {"text": "one two three"}

        for start in ({}, {"token": "wrong"}, {"token": TOKEN[:-1]}):
            socket = dial(served.native)
            socket.send(json.dumps({"type": "start", **start}))
            assert ended(socket)[0][-1]["code"] == "unauthorized"
        begin(served.native, token=TOKEN).close()
        begin(f"{served.native}?token=correct%20horse").close()
        for address in (served.vosk, served.sherpa):
            assert ended(dial(address))[0][-1]["code"] == "unauthorized"
            assert ended(dial(f"{address}/?token=wrong"))[0][-1]["code"] == "unauthorized"
            for socket in (dial(f"{address}/?token=correct%20horse"), dial(address, additional_headers=bearer)):
                socket.send("Done" if address == served.sherpa else '{"eof" : 1}')
                assert socket.recv(10)


def test_pages_of_others_are_kept_out() -> None:
    with serving(access=Access(origins=("https://friend.example",))) as served:
        own = served.http
        for origin in ("https://evil.example", "null", "http://localhost:1", f"{own}.evil.example", "friend.example"):
            for address in (served.native, served.vosk, served.sherpa):
                with pytest.raises(InvalidStatus) as refused:
                    dial(address, origin=origin)
                assert refused.value.response.status_code == 403
            assert get(f"{own}/v1/models", headers={"origin": origin}).status_code == 403
            assert post(own, recording(), headers={"origin": origin}).status_code == 403
        for origin in (own, "https://friend.example"):
            dial(served.native, origin=origin).close()
            assert post(own, recording(), headers={"origin": origin}).status_code == 200
        friend = get(f"{own}/v1/models", headers={"origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_page_of_a_friend_may_ask_whether_to_send_the_token() -> None:
    """Browsers ask without it, and then send it."""
    with serving(access=Access(token=TOKEN, origins=("https://friend.example",))) as served:
        address = f"{served.http}/v1/audio/transcriptions"
        names = "authorization, x-stainless-lang"  # as OpenAI's client for JavaScript sends them
        asked = {"access-control-request-method": "POST", "access-control-request-headers": names}
        reply = HTTP.options(address, headers={"origin": "https://friend.example", **asked})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://friend.example"
        assert reply.headers["access-control-allow-headers"] == names
        assert HTTP.options(address, headers={"origin": "https://evil.example", **asked}).status_code == 403
        assert HTTP.options(address, headers={"origin": "https://friend.example"}).status_code == 401
        refused = post(served.http, recording(), headers={"origin": "https://friend.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://friend.example", "so that it can be read"


def test_without_a_token_a_name_from_elsewhere_does_not_lead_here(server: Served) -> None:
    """A page whose name was bound to 127.0.0.1 would have the server as its own origin."""
    port = server.http.rpartition(":")[2]
    rebound = {"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"}
    assert get(f"{server.http}/v1/models", headers=rebound).status_code == 403
    assert get(f"{server.http}/v1/models", headers={"host": f"localhost:{port}"}).status_code == 200


def test_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not here to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    make = [openssl, "req", *options.split(), "-keyout", key, "-out", cert]
    subprocess.run(make, check=True, capture_output=True)
    trust = ssl.create_default_context(cafile=str(cert))
    with serving(tls_cert=cert, tls_key=key) as served:
        assert served.http.startswith("https://")
        assert httpx.get(f"{served.http}/health", verify=trust, trust_env=False).json()["status"] == "ok"
        with dial(served.vosk, ssl=trust) as socket:
            socket.send('{"eof" : 1}')
            assert json.loads(socket.recv(10)) == {"text": ""}
        with pytest.raises(httpx.TransportError):
            get(served.http.replace("https", "http"))


# ---- what a client may cost


def test_a_full_server_refuses_at_once_and_recovers() -> None:
    with serving(limits=Limits(sessions=2)) as served:
        first, second = begin(served.native), dial(served.vosk)
        second.send(b"\0" * 3200)
        second.recv(10)
        started = time.monotonic()
        for address in (served.vosk, served.sherpa, served.native):
            socket = dial(address)
            if address == served.native:
                socket.send('{"type": "start"}')
            messages, code = ended(socket)
            assert (messages[-1]["code"], code) == ("overloaded", 1013)
            assert "try again" in messages[-1]["message"]
        assert time.monotonic() - started < 5
        assert metric(served, 'asr_dropped_total{reason="overloaded"}') == 3
        second.close()
        assert eventually(lambda: get(f"{served.http}/health").json()["sessions"] == 1)
        begin(served.native).close()
        first.send(s16(spell("kept")))
        assert [final["text"] for final in finished(first)] == ["kept"]


def test_a_session_is_bounded_in_messages_and_audio() -> None:
    with serving(limits=Limits(message_bytes=70_000, audio_seconds=2.0)) as served:
        large = begin(served.native)
        large.send(b"\0" * 80_000)
        assert ended(large)[1] == 1009
        long = begin(served.native)
        long.send(s16(spell("words")))
        for _ in range(3):
            long.send(b"\0" * 32_000)
        messages, code = ended(long)
        assert [m["text"] for m in messages if m["type"] == "final"] == ["words"]
        assert messages[-2] == {"type": "done", "duration": 2.0}
        assert (messages[-1]["code"], code) == ("too_long", 1008)


@pytest.mark.parametrize(
    ("protocol", "message"), [("vosk", '{"config": {"sample_rate": 8000}}'), ("sherpa", b""), ("native", b"")]
)
def test_a_session_is_bounded_in_time(protocol: str, message: str | bytes) -> None:
    with serving(limits=Limits(audio_seconds=0.5)) as served:
        socket = begin(served.native) if protocol == "native" else dial(getattr(served, protocol))
        with contextlib.suppress(ConnectionClosed):
            for _ in range(60):  # messages without audio
                socket.send(message)
                time.sleep(0.05)
        messages, code = ended(socket)
        assert (messages[-1]["code"], code) == ("too_long", 1008)


def test_the_silent_get_their_finals_and_are_closed() -> None:
    with serving(limits=Limits(idle_seconds=0.3, start_seconds=0.3)) as served:
        socket = begin(served.native)
        socket.send(s16(spell("last words")))
        messages, code = ended(socket)
        assert [m["text"] for m in messages if m["type"] == "final"] == ["last words"]
        assert (messages[-1]["code"], code) == ("idle", 1008)
        assert metric(served, 'asr_dropped_total{reason="idle"}') == 1
        for address in (served.native, served.vosk, served.sherpa):
            assert ended(dial(address))[1] == 1008


def test_a_head_that_never_comes_is_not_waited_for() -> None:
    with serving(limits=Limits(start_seconds=0.5)) as served:
        for sent in (b"", b"GET / HT"):
            with wire(served.http) as raw, contextlib.suppress(ConnectionResetError):
                raw.sendall(sent)
                assert raw.recv(100) == b""


def test_a_body_that_nobody_reads_is_not_waited_for() -> None:
    with serving(limits=Limits(start_seconds=0.5)) as served, wire(served.http) as raw:
        raw.sendall(b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000000\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 405")
        with pytest.raises(ConnectionError):
            for _ in range(60):
                raw.sendall(b"x")
                time.sleep(0.05)


def test_who_does_not_read_is_cut_off_and_costs_nobody_else() -> None:
    with serving(limits=Limits(send_seconds=0.5)) as served:
        other = begin(served.native)
        raw = sockets.socket()
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(served.vosk.rpartition(":")[2])))
        raw.sendall(
            b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        mask = b"\x00\x00\x00\x00"
        config = json.dumps({"config": {"sample_rate": RATE}}).encode()
        raw.sendall(bytes([0x81, 0x80 | len(config)]) + mask + config)
        speech = s16(spell("a" * 300))
        raw.sendall(bytes([0x82, 0x80 | 127]) + len(speech).to_bytes(8, "big") + mask + speech)
        with raw, pytest.raises(OSError):
            raw.settimeout(30)
            for _ in range(100_000):  # each asks for the partial text of 300 letters
                raw.sendall((bytes([0x82, 0x80]) + mask) * 100)
        assert eventually(lambda: get(f"{served.http}/health").json()["sessions"] == 1)
        other.send(s16(spell("fine")))
        assert [final["text"] for final in finished(other)] == ["fine"]


def test_connections_are_bounded() -> None:
    limits = Limits(sessions=1, start_seconds=30)

    def reply() -> bytes:
        with wire(served.http) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            return raw.recv(1000)
        return b""

    with serving(limits=limits) as served:
        opened = [wire(served.http) for _ in range(limits.connections + 3)]
        assert eventually(lambda: reply().startswith(b"HTTP/1.1 503"))
        for raw in opened:
            raw.close()
        assert eventually(lambda: reply().startswith(b"HTTP/1.1 200"))


# ---- how it ends


def test_a_stop_delivers_finals_and_refuses_the_new() -> None:
    with serving() as served:
        sessions = [begin(served.native) for _ in range(3)]
        vosk = dial(served.vosk)
        vosk.send(json.dumps({"config": {"sample_rate": RATE}}))
        for number, socket in enumerate((*sessions, vosk)):
            socket.send(s16(spell(f"stop {'abcd'[number]}")))
            assert "partial" in str(socket.recv(10))
        served.stop(wait=False)
        for number, socket in enumerate(sessions):
            messages, code = ended(socket)
            assert [m["text"] for m in messages if m["type"] == "final"] == [f"stop {'abcd'[number]}"]
            assert messages[-2]["type"] == "done"
            assert (messages[-1]["code"], code) == ("stopping", 1012)
        assert ended(vosk)[0][0]["text"] == "stop d"
        served.stop()
        with pytest.raises(OSError):
            dial(served.native)


def command(port: int, tmp: Path) -> subprocess.Popen[str]:
    """`asr serve` with the shipped model, once it listens."""
    arguments = [sys.executable, "-m", "pipelines.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp)},
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert "talk to it" in process.stdout.readline()
    return process


def test_sigterm_delivers_finals_and_kill_9_leaves_nothing_behind(tmp_path: Path) -> None:
    samples, rate = soundfile.read(SAMPLES / "00001.flac", dtype="int16")
    expected = Recognizer.load().transcribe(samples, rate, "streaming").text
    with sockets.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for last in (signal.SIGKILL, signal.SIGTERM):
        process = command(port, tmp_path)
        try:
            socket = begin(f"ws://127.0.0.1:{port}/v1/stream")
            for block in in_blocks(samples.tobytes()):
                socket.send(block)
                socket.recv(20)
            with sockets.create_connection(("127.0.0.1", port)) as upload:  # half of a large one, on the disk by now
                upload.sendall(
                    b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4000000\r\n"
                    b"content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\ncontent-disposition: form-data; "
                    b'name="file"; filename="a.wav"\r\n\r\n' + b"\0" * 2_000_000
                )
                process.send_signal(last)
                if last is signal.SIGTERM:
                    finals = until_done(socket)
                    assert " ".join(final["text"] for final in finals) == expected
                assert process.wait(30) == (0 if last is signal.SIGTERM else -signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    assert {file.name for file in tmp_path.iterdir()} <= {".ses"}  # which is ONNX Runtime's


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "named", "status"),
    [
        (["--host", "0.0.0.0"], "--token", 2),
        (["--tls-cert", "cert.pem"], "--tls-key", 2),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "none.pem", 1),
        (["--allow-origin", "example.org"], "https://example.org", 2),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(
    arguments: list[str], named: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--port", "0", *arguments])
    assert left.value.code == status
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and named in told


def test_a_taken_port_is_told(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.http.rpartition(":")[2]
    with pytest.raises(SystemExit) as left:
        main(["serve", "--port", port])
    assert left.value.code == 1
    assert f"port {port}" in capsys.readouterr().err


def test_both_halves_of_tls_or_none() -> None:
    with pytest.raises(ConfigError, match="tls-key"):
        Settings(tls_cert=Path("cert.pem"))
    with pytest.raises(ConfigError, match="sessions"):
        Limits(sessions=0)
    with pytest.raises(ConfigError, match="audio_seconds = inf: must be above 0, and finite"):
        Limits(audio_seconds=float("inf"))
