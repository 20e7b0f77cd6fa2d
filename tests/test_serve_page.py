"""The page in headless Chromium: a recording and the microphone become the text that the command writes."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from serving import TALK, Served, dial, recording, serving

from asr.audio import read_audio
from asr.metrics import count_errors
from asr.recognizer import Recognizer
from pipelines.serve.access import Access
from pipelines.serve.limits import Limits

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")


class Browser:
    """A page in headless Chromium, driven through its DevTools protocol."""

    def __init__(self, folder: Path, *options: str) -> None:
        assert CHROMIUM
        arguments = [CHROMIUM, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        arguments += ["--no-proxy-server", "--disable-gpu", "--mute-audio", "--no-first-run", *options]
        if os.getuid() == 0:
            arguments.append("--no-sandbox")
        self._process = subprocess.Popen([*arguments, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        found = None
        for line in self._process.stderr:
            if found := re.search(rb"DevTools listening on (ws://\S+)", line):
                break
        assert found, "Chromium did not start"
        self._socket = dial(found[1].decode())
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._page = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._ask("Browser.close")
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method for the page."""
        return self._ask(method, self._page, **parameters)

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message if session is None else message | {"sessionId": session}))
        while True:
            reply = json.loads(self._socket.recv(60))
            if reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(reply["params"]))
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, script: str) -> Any:
        """The value of a script, awaited."""
        given = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)
        assert self.until("document.readyState === 'complete' && document.getElementById('wave').height > 0")

    def until(self, condition: str, seconds: float = 60.0) -> bool:
        end = time.monotonic() + seconds
        while not (true := self.run(condition)) and time.monotonic() < end:
            time.sleep(0.05)
        return bool(true)

    def press(self, key: str, code: int) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def drop(self, name: str, data: bytes) -> None:
        """Drop a file on the page."""
        self.run(
            f"""{{
              const bytes = Uint8Array.from(atob("{base64.b64encode(data).decode()}"), (c) => c.charCodeAt(0));
              const dropped = new DataTransfer();
              dropped.items.add(new File([bytes], "{name}"));
              document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer: dropped, bubbles: true }}));
            }}"""
        )

    def done(self) -> bool:
        return self.until("document.getElementById('status').textContent.startsWith('Done')")

    def texts(self) -> list[str]:
        return self.run("[...document.querySelectorAll('#finals span')].map((e) => e.textContent)")

    def status(self) -> str:
        return self.run("document.getElementById('status').textContent")

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browsing(folder: Path, *options: str) -> Iterator[Browser]:
    browser = Browser(folder, *options)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(Recognizer.load(decoding="greedy")) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def command_texts(path: Path) -> list[str]:
    """The segments that `asr transcribe --streaming` writes."""
    recognizer = Recognizer.load(decoding="greedy")
    return [segment.text for segment in recognizer.transcribe(path, network="streaming").segments]


def test_a_dropped_recording_becomes_the_text_of_the_command(server: Served, browser: Browser, tmp_path: Path) -> None:
    """Mono and stereo WAV, FLAC, 16, 44.1 and 48 kHz; each decoded by the browser, and sent at its rate in 16 bits.

    Of mono files nothing is lost on the way, and the text is the same. The mean of two channels is rounded, which may
    turn a letter that the network is in doubt about.
    """
    browser.open(server.http)
    for name, rate, channels in (("a.wav", 16_000, 1), ("b.flac", 44_100, 1), ("c.wav", 48_000, 2)):
        path = tmp_path / name
        samples = read_audio(SAMPLES / "00003.flac", sample_rate=rate)
        samples = np.concatenate([samples, np.zeros(rate, np.float32), samples[: 2 * rate]])
        soundfile.write(path, np.stack([samples, 0.5 * samples][:channels], axis=1), rate)
        before = browser.texts()
        browser.drop(name, path.read_bytes())
        assert browser.done(), browser.status()
        assert browser.texts()[: len(before)] == before, "what was said before stays"
        texts, expected = browser.texts()[len(before) :], command_texts(path)
        assert len(texts) == len(expected) == 2
        errors = count_errors(" ".join(expected), " ".join(texts))
        assert texts == expected or (channels == 2 and errors.cer < 0.1), name
        assert browser.run("document.getElementById('heard').textContent") == f"{len(samples) / rate:.1f} s"
        assert browser.run("/^\\d+ ms$/.test(document.getElementById('lag').textContent)")
        assert browser.run("document.getElementById('count').textContent") == str(len(before) + 2)
    browser.run("document.getElementById('clear').click(), document.getElementById('pause').value = '3'")
    assert browser.texts() == []
    browser.drop(name, path.read_bytes())
    assert browser.done(), browser.status()
    assert len(browser.texts()) == 1
    browser.drop("none.wav", b"no audio")
    assert browser.until("document.getElementById('status').dataset.kind === 'error'")
    assert "cannot read none.wav" in browser.status()
    assert browser.complaints == [], "the page broke its own rules"


def test_the_microphone_by_keyboard_alone(server: Served, tmp_path: Path) -> None:
    """Chromium plays the file into its fake microphone at a rate of its own, and starts somewhere in it: the words
    are the same but for at most one in five characters; the exact equality is the recording's, above.
    """
    path = tmp_path / "spoken.wav"
    spoken = read_audio(SAMPLES / "00003.flac")
    samples = np.concatenate([np.zeros(8_000, np.float32), spoken, np.zeros(24_000, np.float32)])
    soundfile.write(path, samples, 16_000)
    expected = command_texts(path)
    assert len(expected) == 1
    options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with browsing(tmp_path / "p", *options, f"--use-file-for-fake-audio-capture={path}%noloop") as browser:
        browser.open(server.http)
        browser.press("Tab", 9)
        assert browser.run("document.activeElement.id") == "talk"
        browser.press("Enter", 13)
        assert browser.until("document.getElementById('talk').textContent === 'Stop'")
        assert browser.until("document.getElementById('partial').textContent.length > 3"), "no partial text"
        assert browser.until("document.getElementById('level').value > -50"), "no level"
        assert browser.until("document.getElementById('finals').childElementCount >= 1"), browser.status()
        browser.press("Enter", 13)  # the focus is still there
        assert browser.done(), browser.status()
        errors = count_errors(" ".join(expected), " ".join(browser.texts()))
        assert errors.cer <= 0.2, (expected, browser.texts())
        assert browser.run("document.getElementById('talk').textContent") == "Start listening"
        assert browser.complaints == []


def test_why_the_server_ended_a_session_is_told_and_the_text_stays(tmp_path: Path) -> None:
    """A recording that is longer than a session may be, of which much is still to be sent; then the microphone."""
    options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    ended = "document.getElementById('status').dataset.kind === 'error'"
    with serving(limits=Limits(audio_seconds=2.0)) as served, browsing(tmp_path, *options) as browser:
        browser.open(served.http)
        browser.drop("long.wav", recording(np.concatenate([TALK[:32_000], np.zeros(60 * 16_000, np.float32)])))
        assert browser.until(ended, 20), browser.status()
        assert browser.status() == "a session ends after 2 s"
        assert browser.texts() == ["one two"]
        browser.run("document.getElementById('talk').click()")
        assert browser.until("document.getElementById('status').textContent.startsWith('Listening')")
        assert browser.until(ended, 20), browser.status()
        assert browser.status() == "a session ends after 2 s"
        assert browser.texts()[0] == "one two"
        assert browser.complaints == []


def test_everything_has_a_name_and_finished_text_is_spoken(server: Served, browser: Browser) -> None:
    """What a screen reader is told, from Chromium's accessibility tree; and the order of the Tab key."""
    browser.open(server.http)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    told = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")}
    assert {("button", "Start listening"), ("meter", "Level"), ("heading", "Talk to it"), ("status", "")} <= told
    assert any(role == "image" and "Waveform" in name for role, name in told)
    assert [role for role, name in told if role in ("button", "spinbutton", "checkbox", "meter") and not name] == []
    assert browser.run("document.getElementById('finals').getAttribute('aria-live')") == "polite"
    assert browser.run("document.getElementById('partial').getAttribute('aria-live')") == "off"
    reached = []
    for _ in range(3):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["talk", "file", "SUMMARY"]


def test_the_page_asks_for_the_token(browser: Browser) -> None:
    path = SAMPLES / "00003.flac"
    with serving(Recognizer.load(decoding="greedy"), access=Access(token="correct horse")) as served:
        browser.open(served.http)
        browser.drop("a.flac", path.read_bytes())
        assert browser.until("!document.getElementById('login').hidden")
        assert browser.run("document.activeElement.id") == "token"
        browser.ask("Input.insertText", text="correct horse")
        browser.press("Enter", 13)
        browser.drop("a.flac", path.read_bytes())
        assert browser.done(), browser.status()
        assert browser.texts() == command_texts(path)
