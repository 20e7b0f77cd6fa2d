"""`asr study`: the tasks, the measurements against oracles, verdicts that follow the results, the report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asr.config import NetworkConfig
from asr.decoding.greedy import GreedyDecoder
from asr.errors import ConfigError
from asr.manifest import Utterance
from asr.metrics import ErrorCounts, count_errors
from asr.models import FORMAT_VERSION, Network
from asr.nn import CELLS
from asr.training.data import EDGE_SAMPLES, Corpus
from pipelines.cli import main
from pipelines.conditions import coloured_noise
from pipelines.study import EXPERIMENTS, claims, cost, gradients, memory, speech, study, words
from pipelines.study.baselines import CONTEXT, FeedForward, Transformer
from pipelines.study.plan import Row, Setting, separate
from pipelines.study.runner import run_settings

SPEECH = {"train": 24, "test": 6}  # utterances


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's speech as a machine without recordings has it, and little of it."""
    folder = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "SHARED", folder / "not here")
        patch.setattr(words, "SPOKEN", SPEECH)
        words.make_speech(folder, quick=True)
    return folder


# The tasks


@given(length=st.integers(2, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_adding_problem_marks_a_number_in_each_half(length: int, seed: int) -> None:
    x, wanted = memory.adding(5, length, torch.Generator().manual_seed(seed))
    for row, total in zip(x.numpy(), wanted.numpy(), strict=True):
        first, second = np.flatnonzero(row[:, 1])
        assert first < length // 2 <= second
        assert total == pytest.approx(row[first, 0] + row[second, 0])


@given(length=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_copy_task_shows_symbols_then_nothing_then_the_signal(length: int, seed: int) -> None:
    x, wanted = memory.copying(3, length, torch.Generator().manual_seed(seed))
    said, symbols = x.argmax(-1), memory.SYMBOLS
    assert x.shape == (3, length + 2 * symbols, memory.ALPHABET + 2)
    assert torch.equal(said[:, :symbols], wanted)
    assert (said[:, -symbols] == memory.ALPHABET + 1).all()  # the first answer is due with the signal
    assert int((said[:, symbols:] != memory.ALPHABET).sum()) == 3


def test_climb_says_updates_needed_and_stops_where_it_fails() -> None:
    options: dict[str, Any] = {"task": "adding", "cell": "lstm", "start": "chrono", "seed": 1, "units": 24}
    climbed = memory.run(**options, lengths=(4, 8), rates=(1e-9, 2e-2), updates=200, score=(4,))
    assert all(0 < needed <= 200 for needed in climbed["solved"].values()) and list(climbed["solved"]) == ["4", "8"]
    assert memory.longest(climbed) == 8
    assert climbed["errors"]["4"] < 0.17
    failed = memory.run(**options, lengths=(4, 8), rates=(1e-9,), updates=50)
    assert failed["solved"] == {"4": None} and memory.longest(failed) == 0


# Gradients


def test_gradient_by_lag_is_that_of_small_changes_of_the_state() -> None:
    torch.manual_seed(0)
    cell = CELLS["lstm"](2, 3).double()
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    states = gradients.unroll(cell, x)
    norms = gradients.by_lag(states[-1][0].square().sum(), states)

    def later(state: list[torch.Tensor], start: int) -> float:
        wx = cell.project(x)
        now = tuple(state)
        for t in range(start + 1, 5):
            now = cell(wx[:, t], *now)
        return float(now[0].square().sum().detach())

    for lag, norm in enumerate(norms):
        t, slopes = 4 - lag, []
        parts = [part.detach() for part in states[t]]
        for which, part in enumerate(parts):
            for i in range(part.numel()):
                ends = []
                for change in (1e-6, -1e-6):
                    moved = [p.clone() for p in parts]
                    moved[which].view(-1)[i] += change
                    ends.append(later(moved, t))
                slopes.append((ends[0] - ends[1]) / 2e-6)
        assert norm == pytest.approx(math.hypot(*slopes), rel=1e-5)


def test_large_recurrent_weights_explode_and_clipping_bounds_the_loss() -> None:
    options: dict[str, Any] = {"cell": "rnn", "start": "bias 0", "length": 60, "units": 32, "updates": 10, "rate": 0.05}
    free = gradients.run(**options, seed=1, gain=2.0, clip=False)
    clipped = gradients.run(**options, seed=1, gain=2.0)
    plain = gradients.run(**options, seed=1)
    assert gradients.reach(clipped) > 100 and gradients.reach(plain) < 1
    assert free["norms"][0] == pytest.approx(clipped["norms"][0], rel=1e-5)
    assert max(free["losses"]) > 100 * max(clipped["losses"])


# Cost


def test_kept_for_backward_counts_each_tensor_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert cost.kept_for_backward(lambda: torch.tanh(x)) == 400  # tanh keeps its output
    assert cost.kept_for_backward(lambda: x * x) == 400


def test_cost_measures_every_cell_at_both_sizes() -> None:
    cells = cost.run(what="training", units=16, batch=2, frames=4, rounds=1)["cells"]
    assert {c["cell"] for c in cells} == set(CELLS)
    wanted = 2 * 4 * 16 * 16 + 4 * 16
    for c in cells:
        assert c["kept"] > 0
        assert c["units"] == 16 if c["match"] == "width" else abs(c["weights"] / wanted - 1) < 0.15
    weights = {c["cell"]: c["weights"] for c in cells if c["match"] == "width"}
    assert weights["lstm"] == wanted == 4 * weights["rnn"]


def test_a_transformers_state_grows_with_the_stream_and_an_lstms_does_not() -> None:
    row = cost.run(what="stream", units=8, layers=1, rounds=1)
    state = {name: list(sizes.values()) for name, sizes in row["state"].items()}
    assert state["lstm"] == [2 * 8 * 4] * 2
    assert state["transformer"][1] / state["transformer"][0] == pytest.approx(60, rel=0.01)


# The baselines


def test_transformer_frame_by_frame_equals_the_whole_and_sees_no_future() -> None:
    torch.manual_seed(0)
    layer = Transformer(6, 8, 2, 0.0).double().eval()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    whole, _ = layer(x, torch.tensor([9, 9]))
    cache = [(k.double(), v.double()) for k, v in layer.cache(2, 9)]
    steps = [layer.one(x[:, t : t + 1], cache, t) for t in range(9)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-9)
    changed = x.clone()
    changed[:, 5] += 1
    other, _ = layer(changed, torch.tensor([9, 9]))
    assert torch.allclose(other[:, :5], whole[:, :5], atol=1e-12)
    assert not torch.allclose(other[:, 8], whole[:, 8])


def test_feed_forward_network_sees_its_window_alone() -> None:
    torch.manual_seed(0)
    layer = FeedForward(3, 64, 2, 0.0).eval()
    x = torch.randn(1, 30, 3)
    before, _ = layer(x, torch.tensor([30]))
    x[0, 15] += 1
    after, _ = layer(x, torch.tensor([30]))
    moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(15 - CONTEXT, 15 + CONTEXT + 1))


@pytest.mark.parametrize("kind", [Transformer, FeedForward])
def test_baselines_take_nothing_from_the_padding(kind: type[Transformer] | type[FeedForward]) -> None:
    layer = kind(3, 4, 1, 0.0).eval()
    x = torch.randn(2, 8, 3)
    x[1, 5:] = math.nan
    y, _ = layer(x, torch.tensor([8, 5]))
    alone, _ = layer(x[1:, :5], torch.tensor([5]))
    assert torch.allclose(y[1, :5], alone[0], atol=1e-5)


# Speech


def test_words_are_joined_by_speaker_and_used_once(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(23):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, rng.uniform(-0.5, 0.5, 100 + i), 16_000)
        rows.append(Utterance(id=str(i), audio=str(path), text=f"w{i}", speaker="ab"[i % 2], where=""))
    joined = words.join_words(rows, tmp_path / "out", seed=1)
    assert sorted(" ".join(row["text"] for row in joined).split()) == sorted(f"w{i}" for i in range(23))
    for row in joined:
        numbers = [int(word[1:]) for word in row["text"].split()]
        assert 1 <= len(numbers) <= words.MOST_WORDS
        assert {"ab"[i % 2] for i in numbers} == {row["speaker"]}
        pause = soundfile.info(tmp_path / row["audio_filepath"]).frames - sum(100 + i for i in numbers)
        assert 0 <= pause <= words.PAUSE[1] * 16_000


def test_pink_noise_has_equal_power_in_each_octave() -> None:
    noise = coloured_noise(1 << 17, pink=True, rng=np.random.default_rng(1))
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[n : 2 * n].sum() for n in (256, 1024, 4096, 16384)]
    assert max(octaves) / min(octaves) < 1.3
    white = coloured_noise(1 << 17, pink=False, rng=np.random.default_rng(1))
    flat = np.abs(np.fft.rfft(white)) ** 2
    assert flat[16384:32768].sum() / flat[256:512].sum() == pytest.approx(64, rel=0.2)


def test_noise_is_mixed_in_at_its_level_and_utterances_are_joined_to_length() -> None:
    torch.manual_seed(0)
    clips: list[speech.Spoken] = [(torch.randn(16_000) * 0.1, "one"), (torch.randn(8_000) * 0.1, "two")]
    mixed = speech.noisy(clips, [torch.randn(5_000)], 10)
    for (quiet, text), (noisy, same) in zip(clips, mixed, strict=True):
        assert text == same
        assert 10 * math.log10(quiet.square().mean() / (noisy - quiet).square().mean()) == pytest.approx(10, abs=0.01)
    long = speech.joined(clips, 64_000, count=2)
    assert [text for _, text in long] == ["one two one two one", "two one two one two"]
    assert all(64_000 - 2 * EDGE_SAMPLES <= len(audio) <= 80_000 for audio, _ in long)


def test_all_networks_have_the_weights_of_the_lstm(spoken: Path) -> None:
    config = speech.configuration(spoken / "train", 1, 32)
    corpus = Corpus(config.data.train)
    wanted = speech.weights(speech.build("lstm", config, corpus))
    for name in speech.NETWORKS:
        assert speech.weights(speech.build(name, config, corpus)) == pytest.approx(wanted, rel=0.08), name


def test_words_are_whole_tokens() -> None:
    vocabulary = speech.Words(["one two", "two three"])
    assert len(vocabulary) == 4
    ids = vocabulary.encode("three one two")
    assert vocabulary.decode([0, ids[0], 0, ids[1], ids[2], 0]) == "three one two"


def test_score_counts_what_each_utterance_alone_would_give() -> None:
    torch.manual_seed(0)
    tokenizer = speech.Words(["one two", "three"])
    model = speech.configuration(Path("none"), 1, 8).model
    settings = NetworkConfig(
        format_version=FORMAT_VERSION, features=speech.configuration(Path("none"), 1, 8).features, model=model
    )
    network = Network(settings, tokenizer, torch.zeros(80), torch.ones(80)).eval()
    nn.init.normal_(list(network.layers)[-1].linear.weight)  # type: ignore[union-attr]
    clips = [(torch.randn(n) * 0.1, text) for n, text in ((20_000, "one"), (9_000, "two one"), (30_000, "one two"))]
    total = ErrorCounts()
    for audio, text in clips:
        padded = torch.cat([torch.zeros(EDGE_SAMPLES), audio, torch.zeros(EDGE_SAMPLES)])[None]
        with torch.no_grad():
            log_probs, _ = network(padded, torch.tensor([padded.shape[1]]))
        decoder = GreedyDecoder()
        decoder.accept(log_probs[0].numpy())
        total += count_errors(text, tokenizer.decode([span.token for span in decoder.tokens()]))
    got = speech.score(network, clips)
    assert got["wer"] == pytest.approx(total.wer)
    assert total.insertions or total.substitutions  # it wrote something


def test_a_network_trains_on_spoken_digits_and_is_scored(spoken: Path) -> None:
    options: dict[str, Any] = {"data": "tenth", "seed": 1, "hidden": 16, "lengths": (50,), "folder": str(spoken)}
    row = speech.run(network="lstm", updates=40, equal_time=False, rates=(1e-9, 4e-3), **options)
    losses = [loss for _, loss in row["curve"]]
    assert row["rate"] == 4e-3 and row["updates_done"] == 40
    assert losses[-1] < losses[0] / 2
    assert row["noise"].keys() == {"20", "10", "0"} and row["lengths"].keys() == {"50"}
    timed = speech.run(network="peephole", updates=20, equal_time=True, rates=(4e-3,), **options)
    assert timed["updates_done"] == round(20 / timed["cost"]) < 20  # a loop in Python takes longer


# Verdicts


def test_sides_are_told_apart_only_when_all_seeds_agree() -> None:
    assert separate([1, 2, 3], [4, 5, 6]) == -1
    assert separate([4, 5, 6], [1, 2, 3]) == 1
    assert separate([1, 2, 5], [4, 5, 6]) == 0
    assert separate([1, 2], [4, 5]) == 0  # too few


def heard(network: str, errors: tuple[float, ...], **more: Any) -> list[Row]:
    """Rows of a network with these test WERs."""
    scores = [{"wer": wer, "loss": wer} for wer in errors]
    common = {"network": network, "data": "train", "weights": 1000, "updates_done": 10, "seconds": 1.0} | more
    noise = {str(snr): {"wer": 0.9} for snr in speech.SNRS}
    return [{"noise": noise, **common, "test": s, "train_heard": {"wer": s["wer"] / 2}} for s in scores]


@pytest.mark.parametrize(
    ("lstm", "other", "expected"),
    [
        ((0.30, 0.31, 0.32), (0.20, 0.21, 0.22), "holds"),
        ((0.20, 0.21, 0.22), (0.30, 0.31, 0.32), "does not hold"),
        ((0.30, 0.31, 0.32), (0.29, 0.31, 0.33), "not decided"),
        ((0.80, 0.81, 0.82), (0.60, 0.61, 0.62), "not decided"),  # no ranking where nothing works
        ((0.20, 0.21, 0.22), (1.00, 1.00, 1.00), "not decided"),  # nor against what has not learned yet
        ((1.00, 1.00, 1.00), (0.20, 0.21, 0.22), "holds"),
    ],
)
def test_a_network_helps_where_every_seed_says_so(lstm: Any, other: Any, expected: str) -> None:
    rows = [
        *heard("lstm", lstm),
        *(row for n in ("bilstm", "deep", "peephole", "attention") for row in heard(n, other)),
    ]
    assert {d.verdict for d in claims.read_structure(rows).decisions} == {expected}


def test_beating_by_a_factor_asks_for_the_factor() -> None:
    lstm = heard("lstm", (0.20, 0.20, 0.20))
    for errors, expected in (((0.4, 0.4, 0.4), "holds"), ((0.25, 0.25, 0.25), "does not hold")):
        (decision,) = claims.read_feed_forward([*lstm, *heard("feed-forward", errors)]).decisions
        assert decision.verdict == expected


def test_overfitting_is_the_gap_at_a_tenth_of_the_data() -> None:
    def rows(gru: tuple[float, ...]) -> list[Row]:
        full = heard("lstm", (0.2, 0.2, 0.2)) + heard("gru", (0.2, 0.2, 0.2))
        return [*full, *heard("lstm", (0.4, 0.41, 0.42), data="tenth"), *heard("gru", gru, data="tenth")]

    for gru, expected in (
        ((0.6, 0.6, 0.6), "holds"),
        ((0.3, 0.3, 0.3), "does not hold"),
        ((0.39, 0.41, 0.6), "not decided"),
    ):
        assert claims.read_little_data(rows(gru)).decisions[0].verdict == expected


def climb(task: str, cell: str, start: str, *solved: int, failed: int | None = None) -> Row:
    steps: dict[str, int | None] = {str(n): 100 for n in solved} | ({str(failed): None} if failed else {})
    return {"task": task, "cell": cell, "start": start, "solved": steps, "lengths": (20, 100, 1000), "errors": {}}


def test_memory_verdicts_follow_the_longest_lengths() -> None:
    def verdicts(rnn: tuple[int, ...], lstm: tuple[int, ...]) -> list[str]:
        rows = []
        for task in memory.TASKS:
            rows += [climb(task, "rnn", "", *rnn), climb(task, "lstm", "chrono", *lstm)]
            rows += [climb(task, "lstm", start, 20, failed=100) for start in ("bias 0", "bias 1")]
        return [d.verdict for d in memory.EXPERIMENT.read(rows).decisions]

    assert verdicts((20,), (20, 100, 1000)) == ["holds"] * 6
    assert verdicts((20, 1000), (20, 100, 1000))[:2] == ["not decided"] * 2  # all that was tried was solved
    assert verdicts((20, 100), (20,)) == ["does not hold"] * 4 + ["holds", "does not hold"]


# The whole


def test_finished_settings_are_not_run_again_and_others_are_refused(tmp_path: Path) -> None:
    def setting(updates: int) -> Setting:
        options = {
            "cell": "rnn",
            "start": "bias 0",
            "length": 4,
            "units": 3,
            "updates": updates,
            "rate": 0.1,
            "seed": 1,
        }
        return Setting(name="one", run="gradients", options=options)

    def run(updates: int) -> Row:
        return run_settings([setting(updates)], tmp_path, quick=True, workers=1, address=None)["one"]

    first = run(2)
    kept = tmp_path / "results" / "one.json"
    changed = json.loads(kept.read_text())
    changed["result"]["losses"] = [7.0]
    kept.write_text(json.dumps(changed))
    assert first["losses"] != [7.0] and run(2)["losses"] == [7.0]
    with pytest.raises(ConfigError, match="other options"):
        run(3)
    kept.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        run(2)


def test_report_is_one_file_that_opens_offline_and_the_summary_says_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    def small(quick: bool) -> list[Setting]:
        return [
            Setting(name=s.name, run=s.run, options=s.options | {"length": 20, "units": 4, "updates": 5})
            for s in gradients.EXPERIMENT.settings(quick)
        ]

    experiment = gradients.EXPERIMENT.__class__(**{**vars(gradients.EXPERIMENT), "settings": small})
    monkeypatch.setitem(EXPERIMENTS, "gradients", experiment)
    page = study(["gradients"], tmp_path, quick=True, workers=1, markdown=tmp_path / "docs" / "study.md").read_text()
    summary = (tmp_path / "docs" / "study.md").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and "src=" not in page and "<link" not in page
    assert "](study/gradients.png)" in summary and (tmp_path / "docs" / "study" / "gradients.png").stat().st_size > 5000
    assert summary.count("**holds**") + summary.count("**does not hold**") + summary.count("**not decided**") == 8
    for said in ("the gradient of a plain RNN vanishes", "asr study gradients --quick", "seeds 1, 2, 3"):
        assert said in page and said in summary


def test_every_experiment_names_its_settings_uniquely_and_the_command_its_experiments(capsys: Any) -> None:
    for quick in (True, False):
        known: dict[str, Setting] = {}
        for experiment in EXPERIMENTS.values():
            for setting in experiment.settings(quick):
                assert known.setdefault(setting.name, setting) == setting
                assert "/" not in setting.name and " " not in setting.name
                json.dumps(setting.options)
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in EXPERIMENTS)


def test_unknown_experiment_is_an_error_that_lists_them(capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "memroy", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert "memroy" in (said := capsys.readouterr().err) and "gradients" in said
