"""`asr bench`: figures add up, every section measures what it names, and the search for the most streams finds it."""

import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("onnx", reason="needs the extra [train]")

from asr.errors import ConfigError, ModelError, Overloaded
from asr.models import load_network
from asr.runtime.folder import find_networks, shipped_model
from pipelines.bench import SECTIONS, bench, run_bench
from pipelines.bench.figures import Figure, interleaved, table
from pipelines.bench.limits import Limits, work_of
from pipelines.bench.setting import Setting
from pipelines.bench.streams import Trial, largest, measure

SAMPLES = sorted((Path(__file__).parents[1] / "scripts" / "samples" / "audio").glob("*.flac"))


def setting(**changed: Any) -> Setting:
    return Setting(**{"audio": tuple(SAMPLES[:2]), "model": None, "rounds": 1, "threads": 1, "seconds": 1.0, **changed})


# figures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands unless it is moved."""
    now = [0.0]
    monkeypatch.setattr("pipelines.bench.figures.time.perf_counter", lambda: now[0])
    return now


def test_parts_take_turns_and_figures_are_medians(clock: list[float]) -> None:
    order: list[str] = []
    durations = {"slow": iter([9.0, 4.0, 2.0, 3.0]), "fast": iter([9.0, 1.0, 1.0, 0.5])}  # the first is the warm-up

    def part(name: str) -> None:
        order.append(name)
        clock[0] += next(durations[name])

    parts = {name: lambda name=name: part(name) for name in durations}
    slow, fast = interleaved("s", "x real time", 12.0, parts, 3, ideal={"fast": 0.25})
    assert order == ["slow", "fast"] * 4
    assert (slow.value, slow.low, slow.high, slow.ratio, slow.of_limit) == (4.0, 3.0, 6.0, 1.0, None)
    assert (fast.value, fast.low, fast.high, fast.ratio, fast.of_limit) == (12.0, 12.0, 24.0, 3.0, 0.25)


def test_of_an_even_number_of_rounds_values_and_ratio_say_the_same(clock: list[float]) -> None:
    durations = {"one": iter([9.0, 1.0, 5.0]), "other": iter([9.0, 2.0, 3.0])}

    def part(name: str) -> None:
        clock[0] += next(durations[name])

    one, other = interleaved("s", "x", 6.0, {name: lambda name=name: part(name) for name in durations}, 2)
    assert (one.value, other.value, other.ratio) == (2.0, 2.4, 1.2)


def test_microseconds_a_unit(clock: list[float]) -> None:
    def part() -> None:
        clock[0] += 0.5

    (figure,) = interleaved("s", "us", 1000, {"it": part}, 2, per=True)
    assert figure.value == figure.low == figure.high == 500.0


def test_the_table_shows_all_that_is_known() -> None:
    figures = [
        Figure(section="one", name="first", value=1234.5, low=1.0, high=2000.0, unit="things", ratio=1.0, of_limit=0.5),
        Figure(section="one", name="second", value=0.25, low=0.25, high=0.25, unit="others"),
    ]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 (closed with the test)
    console.print(table(figures))
    shown = console.export_text()
    for expected in ("one", "first", "1,234", "1 to 2,000", "things", "1.00", "50 %", "second", "0.25"):
        assert expected in shown


# what a machine allows


def test_a_network_must_do_two_operations_for_each_weight_and_frame() -> None:
    network = load_network(find_networks(None)["offline"])
    work = work_of(network)
    lstm = sum(p.numel() for name, p in network.named_parameters() if ".weight_" in name)
    once_a_block = sum(p.numel() for name, p in network.named_parameters() if ".weight_ih" in name)
    assert (work.weights, work.inputs) == (lstm - once_a_block, once_a_block)
    assert work.recurrent == 2 * lstm * 25  # frames a second
    limits = Limits(memory=1.0, cache=1e9, fp32=1e9, int8=4e9)
    assert work.seconds(limits, "int8") == pytest.approx(work.recurrent / 4e9 + work.others / 1e9)
    read = 25 * (work.weights + work.inputs / 4) * 4
    assert work.seconds_alone(limits, "fp32", 25, 4) == max(work.seconds(limits, "fp32"), read / 1e9)


# sections


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("machine", {"reading memory", "fp32 products", "int8 products"}),
        ("features", {"ours, whole", "ours, 160 ms blocks of 64 streams", "in the graph, 160 ms blocks of 64 streams"}),
        ("exactness", {"texts that differ, live against file"}),
        ("stream", {"the graph alone, 160 ms blocks", "a session, fed 40 ms at a time"}),
        ("search", {"flashlight-text, the words of the best path", "ours, whole"}),
    ],
)
def test_a_section_measures_what_it_names(section: str, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.bench.features._SECONDS", 11.0)
    monkeypatch.setattr("pipelines.bench.live._SECONDS", 1.0)
    ((*figures,),) = bench(setting(), [section])
    assert names <= {figure.name for figure in figures}
    for figure in figures:
        assert 0 <= figure.low <= figure.value <= figure.high
    if section == "exactness":
        assert figures[-1].value == 0


def test_batch_and_training_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.bench.batch._LEAST_SECONDS", 1.0)
    monkeypatch.setattr("pipelines.bench.training._SECONDS", 1.0)
    batch, training = bench(setting(), ["training", "batch"])
    assert {"decoding FLAC, one thread", "greedy search", "ours", "PyTorch eager fp32"} <= {f.name for f in batch}
    assert {"pack_padded_sequence, fp32", "ours, fp32"} <= {f.name for f in training}


def test_json_holds_the_figures_and_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(setting(), ["exactness"], tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"]["threads"] == 1
    assert [f["name"] for f in written["figures"]][-1] == "texts that differ, live against file"
    assert "texts that differ, live against file" in capsys.readouterr().out


def test_a_section_that_there_is_not_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"only = 'fature': must be one of machine, features, "):
        list(bench(setting(), ["fature"]))
    assert "server" in SECTIONS


def test_a_model_without_the_network_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "streaming").symlink_to(shipped_model() / "streaming")
    with pytest.raises(ModelError, match="no offline network"):
        list(bench(setting(model=tmp_path / "model"), ["search"]))


# many streams


def trial(count: int, most: int, cpu: float = 0.01) -> Trial:
    p95 = 0.1 if count <= most else 3.0
    return Trial(streams=count, p95=p95, median=p95 / 2, waiting=0.0, cpu=cpu)


@pytest.mark.parametrize("most", [1, 3, 39, 40, 41, 150, 171, 900])
@pytest.mark.parametrize("cpu", [0.002, 0.02])
def test_the_most_streams_are_found_to_a_seventh(most: int, cpu: float) -> None:
    found = largest(lambda count: trial(count, most, cpu), cores=2)
    assert found is not None
    assert most / 1.2 - 1 <= found.streams <= most


def test_no_number_of_streams_is_tried_twice() -> None:
    for most in (1, 5, 30, 300):
        tried: list[int] = []
        largest(lambda count, most=most, tried=tried: tried.append(count) or trial(count, most), cores=2)
        assert len(set(tried)) == len(tried) <= 12


def test_a_machine_that_carries_none_is_told() -> None:
    assert largest(lambda count: trial(count, 0), cores=2) is None


class Answering:
    """A stream that answers at once, after some time, never, or not at all."""

    def __init__(self, how: str) -> None:
        self.how, self.fed = how, 0

    def feed(self, samples: np.ndarray) -> "Future[Any]":
        assert samples.shape == (1_600,)
        self.fed += 1
        future: Future[Any] = Future()
        if self.how == "overloaded":
            raise Overloaded("too much")
        if self.how == "slow":
            time.sleep(0.15)
        if self.how != "silent":
            future.set_result(None)
        return future


def test_a_stream_is_fed_in_real_time_and_what_is_late_is_seen() -> None:
    speech = np.zeros(16_000, np.float32)
    opened: list[Answering] = []

    def open_stream(how: str) -> Answering:
        opened.append(Answering(how))
        return opened[-1]

    prompt = measure(lambda: open_stream("prompt"), 3, speech, seconds=0.5, warm_up=0.2)
    assert prompt.waiting == 0
    assert len(opened) == 3 and all(0 < stream.fed <= 7 for stream in opened)
    for how in ("overloaded", "silent"):
        assert not measure(lambda how=how: open_stream(how), 3, speech, seconds=0.5, warm_up=0.2).in_real_time
    assert not measure(lambda: open_stream("slow"), 3, speech, seconds=0.5, warm_up=0.2).in_real_time
