"""The page of `asr evaluate --report`: what it holds, its interval, and that nothing is loaded from elsewhere."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
from toy_model import RATE, ToyOptions, write

from asr.metrics import ErrorCounts
from pipelines.evaluate import Outcome, evaluate
from pipelines.evaluate_report import report_page, wer_interval


def page(folder: Path, rows: list[dict], clips: int = 0, **options: object) -> dict:
    """The data of the page of such rows, each with what is `said` in it."""
    folder.mkdir(exist_ok=True)
    with (folder / "m.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            said = row.pop("said", None)
            name = f"a clip {i}.wav"
            if said is not None:
                write(folder / name, said)
            file.write(json.dumps({"audio_filepath": name, **row}) + "\n")
    outcomes: list[Outcome] = []
    scores, _ = evaluate([folder / "m.jsonl"], ToyOptions(), on_utterance=outcomes.append, **options)  # type: ignore[arg-type]
    text = report_page(outcomes, scores, "toy", folder / "pages", clips)
    assert loaded_by(text) == []
    return data_of(text)


def loaded_by(text: str) -> list[str]:
    """What a page gets from elsewhere, by its tags, styles and scripts."""
    page = _Page()
    page.feed(text)
    page.close()
    return page.found


class _Page(HTMLParser):
    LINKS = ("src", "srcset", "href", "xlink:href", "poster", "data", "action", "formaction", "background")
    LOADING = re.compile(
        r"""https?://(?!www\.w3\.org/)|["'`(]//\w|\burl\((?!["']?(?:data:|\#))|@import|\bimport\b"""
        r"""|\b(?:fetch|importScripts|EventSource|WebSocket|XMLHttpRequest|sendBeacon)\b"""
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # a script of JSON is data, which may hold any text
        self._inside = "" if ("type", "application/json") in attrs else tag
        for name, value in attrs:
            if name in self.LINKS and not (value or "").startswith(("data:", "#")):
                self.found.append(f"{tag} {name}={value}")
            elif name == "style" or name.startswith("on"):
                self.found += self.LOADING.findall(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.found += self.LOADING.findall(data)


@pytest.mark.parametrize(
    "loading",
    [
        '<script src="page.js"></script>',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        '<p style="background: url(a.png)">',
        '<p onclick="fetch(1)">',
        "<style>@import 'a.css';</style>",
        "<style>p { background: url('//example.org/a.png') }</style>",
        "<script>const a = 1;</script><script>fetch('/a')</script>",
        "<script>import('./a.js')</script>",
        "<script>image.src = `//example.org/a.png`</script>",
        "<script>image.src = 'https://example.org/a.png'</script>",
    ],
)
def test_a_page_that_loads_something_would_be_noticed(loading: str) -> None:
    assert loaded_by(f"<!doctype html><body>{loading}</body>") != []


def data_of(text: str) -> dict:
    """What a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_of_three_speakers(tmp_path: Path) -> None:
    data = page(tmp_path, [
        {"said": "the cat sat", "text": "the hat sat", "speaker": "a"},
        {"said": "the cat", "text": "the hat now", "speaker": "a"},
        {"said": "well done old boy", "text": "well done", "speaker": "b"},
        {"text": "all of this is lost", "speaker": "c"},
    ])  # fmt: skip
    total = data["total"]
    assert (total["words"], total["substitutions"], total["deletions"], total["insertions"]) == (13, 2, 6, 2)
    assert total["unreadable"] == 1
    speakers = {group["name"]: group for group in data["speakers"]}
    assert (speakers["a"]["words"], speakers["a"]["substitutions"], speakers["a"]["deletions"]) == (6, 2, 1)
    assert (speakers["c"]["deletions"], speakers["c"]["wer"]) == (5, 1.0)
    assert data["confused"] == [{"said": "hat", "written": "cat", "count": 2, "all": 2}]
    assert {(w["said"], w["count"]) for w in data["missed"]} >= {("now", 1), ("lost", 1)}
    assert {w["written"] for w in data["added"]} == {"old", "boy"}
    assert sum(group["utterances"] for group in data["lengths"]) == 4

    first = data["utterances"][0]
    assert [pair[:2] for pair in first["pairs"]] == [["the", "the"], ["hat", "cat"], ["sat", "sat"]]
    assert first["pairs"][0][2] == pytest.approx(0.9**3, abs=1e-3)
    lost = data["utterances"][3]
    assert lost["problem"] and lost["clip"] is None and lost["errors"] == 5
    assert (tmp_path / "pages" / unquote(first["clip"])).resolve() == (tmp_path / "a clip 0.wav").resolve()
    assert data["confidence"]["words"] == 9


def test_the_worst_recordings_are_put_into_the_page(tmp_path: Path) -> None:
    data = page(tmp_path, [{"said": "good", "text": "good"}, {"said": "one two", "text": "won too"}], clips=1)
    good, bad = data["utterances"]
    assert not good["clip"].startswith("data:")
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(bad["clip"].removeprefix("data:audio/ogg;base64,"))))
    original = soundfile.info(tmp_path / "a clip 1.wav")
    assert len(sound) / rate == pytest.approx(original.frames / RATE, abs=0.1)
    assert np.abs(sound).max() > 0.1


def test_a_part_of_a_recording_is_linked_by_its_times(tmp_path: Path) -> None:
    data = page(tmp_path, [{"said": "one two", "text": "one", "offset": 0.5, "duration": 0.25}])
    assert data["utterances"][0]["clip"].endswith("a%20clip%200.wav#t=0.500,0.750")


def test_speakers_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        page(folder, [{"said": "one", "text": "one", "speaker": "1"}, {"said": "two", "text": "one", "speaker": "2"}])
    manifests = [tmp_path / "a" / "m.jsonl", tmp_path / "b" / "m.jsonl"]
    scores, _ = evaluate(manifests, ToyOptions(), on_utterance=outcomes.append)
    data = data_of(report_page(outcomes, scores, "toy", tmp_path))
    assert [(group["name"], group["utterances"]) for group in data["speakers"]] == [
        (f"{name} ({tmp_path / folder})", 1) for folder in "ab" for name in "12"
    ]
    assert "4 speakers" in data["interval_note"]
    assert {row["speaker"] for row in data["utterances"]} == {group["name"] for group in data["speakers"]}


def test_joined_rows_and_rows_without_errors_or_speakers(tmp_path: Path) -> None:
    rows = [{"said": word, "text": word, "duration": 1.0} for word in ("one", "two")]
    data = page(tmp_path, rows, join_seconds=60.0)
    assert len(data["utterances"]) == 1
    assert data["utterances"][0]["clip"] is None


def test_texts_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    nasty = "</script><img src='https://example.org/a.png'>x"
    data = page(tmp_path, [{"said": "x", "text": nasty, "speaker": nasty}])
    assert data["utterances"][0]["speaker"] == nasty


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        rates = rng.beta(4, 16, 40)  # of speakers; their mean is 20 %
        counts = [ErrorCounts(words=50, substitutions=int(n)) for n in rng.binomial(50, np.repeat(rates, 3))]
        interval = wer_interval(counts, [str(i // 3) for i in range(120)], seed=trial)
        assert interval
        covered += interval[0] <= 0.2 <= interval[1]
    assert 86 <= covered <= 100


def test_speakers_are_drawn_whole() -> None:
    counts = [ErrorCounts(words=10, deletions=10 * (i < 50)) for i in range(100)]
    whole = wer_interval(counts, [str(i // 10) for i in range(100)])
    alone = wer_interval(counts, [None] * 100)
    assert whole and alone
    assert whole[1] - whole[0] > 2 * (alone[1] - alone[0])
    assert wer_interval(counts, ["one"] * 100) is None
    assert wer_interval([ErrorCounts()] * 3, [None] * 3) is None
