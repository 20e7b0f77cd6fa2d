"""pipelines.report_data: the page shows the figures of the data."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra [train]")
from asr.errors import Problem
from asr.training.shards import Statistics
from pipelines.report_data import data_report

STATISTICS = Statistics(frames=10, mean=np.linspace(-8, -2, 80), variance=np.full(80, 4.0))


def report(**changed: object) -> dict:
    told = {
        "samples": [16_000] * 30 + [32_000] * 10,
        "text_lengths": [8] * 40,
        "characters": {"a": 30, "<": 10},
        "speakers": {"ann": 16_000 * 40, "": 16_000 * 10},
    }
    return told | changed


def figures(page: str) -> dict[str, str]:
    """The drawings by their captions."""
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", page))


def heights(drawing: str) -> list[float]:
    return [float(height) for height in re.findall(r'<rect [^>]*height="([0-9.]+)"', drawing)]


def test_bars_are_as_high_as_the_counts() -> None:
    drawn = figures(data_report("x", [report()], STATISTICS, []))
    lengths = [h for h in heights(drawn["Length of an utterance, seconds"]) if h]
    assert len(lengths) == 2
    assert lengths[0] == pytest.approx(3 * lengths[1], rel=0.01)
    letters = heights(drawn["Characters"])
    assert letters[0] == pytest.approx(3 * letters[1], rel=0.01)


def test_shards_are_counted_together() -> None:
    page = data_report("x", [report(), report(speakers={"bob": 16_000 * 3_600})], STATISTICS, [])
    assert re.search(r"utterances</th><td[^>]*>80<", page)
    assert re.search(r"hours</th><td[^>]*>0.03<", page)
    assert re.search(r"speakers named</th><td[^>]*>2<", page)


def test_reasons_are_counted_by_kind() -> None:
    skipped = [Problem(f"m.jsonl:{i}", f"/data/{i}.wav: no such file") for i in range(7)]
    skipped += [Problem("m.jsonl:9", "/data/9.wav: 3.20 s of audio, the manifest says 9.00 s")]
    named = [f"/my recordings 1/{name} 2.wav" for name in "abc"]
    skipped += [Problem("m.jsonl:10", f"{name}: not audio; ffmpeg says: file:{name}: Invalid data") for name in named]
    page = data_report("x", [report()], STATISTICS, skipped)
    assert re.search(r"<th>not audio; ffmpeg says: Invalid data</th><td[^>]*>3<", page)
    assert re.search(r"<th>no such file</th><td[^>]*>7<", page)
    assert "# s of audio, the manifest says # s" in page


def test_it_is_well_formed_whatever_is_in_it() -> None:
    class Check(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "rect", "line", "path"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("rect", "line", "path"):
                assert self.open.pop() == tag

    check = Check()
    empty = report(samples=[], text_lengths=[], characters={}, speakers={})
    nothing = Statistics(frames=0, mean=np.zeros(80), variance=np.zeros(80))
    for page in (
        data_report("<script>", [report()], STATISTICS, [Problem("x", "<b>")]),
        data_report("empty", [empty], nothing, []),
    ):
        check.feed(page)
        assert check.open == []
        assert "<script>" not in page
        assert "nan" not in page.lower()
