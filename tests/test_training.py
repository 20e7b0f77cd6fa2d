"""asr.training.loop: runs learn, resume exactly, and refuse what cannot be gone on with."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tones import changed, log_rows, losses, row, tone_config, write_corpus

import asr.training.step
from asr.config import DataConfig, FeatureConfig, TrainConfig, TrainingConfig
from asr.errors import AsrError, ConfigError
from asr.models import Network, load_network, save_network
from asr.nn import LookAhead
from asr.runtime.export import export_model
from asr.runtime.folder import shipped_model
from asr.training.checkpoint import average_weights
from asr.training.data import Batch
from asr.training.dry_run import dry_run
from asr.training.loop import Trainer, run_training


def test_a_network_learns_and_leaves_a_model_folder(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), epochs=40, score_epochs=8, learning_rate=1e-2)
    folder = run_training(config, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < 0.2 * curve[1]
    network = load_network(folder)
    assert network.config.model == config.model
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert min(r["cer"] for r in rows if r["kind"] == "dev") < 0.1
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_a_killed_run_goes_on_step_by_step_as_if_undisturbed(tmp_path: Path) -> None:
    """The same losses to the last bit: data order, weights, moments and random states are all restored."""
    config = tone_config(write_corpus(tmp_path / "d", rows=200), epochs=3)
    run_training(config, tmp_path / "whole")
    program = (
        "import sys; sys.path.insert(0, 'tests');"
        "from tones import *; from asr.training.loop import run_training;"
        f"run_training(tone_config(Path({str(tmp_path / 'd')!r}), epochs=3), Path({str(tmp_path / 'cut')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if log.is_file() and log.read_text().count("\n") > 8:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(losses(tmp_path / "cut")) < len(losses(tmp_path / "whole")), "the child was done before it was killed"
    run_training(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1)
    refused = rf"run: another training \(process {os.getpid()}\) is writing there; wait for it, or give another --out"

    def start_another(metrics: dict) -> None:
        with pytest.raises(AsrError, match=refused):
            run_training(config, tmp_path / "run")

    run_training(config, tmp_path / "run", report=start_another)
    run_training(config, tmp_path / "run")  # the first is done


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    config, run = tone_config(write_corpus(tmp_path / "d", rows=30), checkpoint_steps=1), tmp_path / "run"
    run_training(config, run)
    undisturbed, (before, newest) = losses(run), sorted((run / "checkpoints").iterdir())
    (newest / "progress.json").write_bytes(b"")  # as after a power loss
    run_training(config, run)
    told = log_rows(run, "start")[-1]["text"]
    assert told.endswith(f"; continuing from {before.name}, as {newest.name} cannot be read")
    assert len(log_rows(run, "step")) == len(undisturbed) + 1 and losses(run) == undisturbed
    for path in (before, newest):
        (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(AsrError, match=f"{newest.name}: cannot continue from this checkpoint"):
        run_training(config, run)


def test_what_a_run_goes_on_from_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = set(), os.fsync

    def remember(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    run = tmp_path / "run"
    run_training(tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1), run)
    kept = [path for name in ("checkpoints", "best", "epochs") for path in (run / name).rglob("*")]
    assert len(kept) > 8
    assert all(path.stat().st_ino in synced for path in (*kept, run / "checkpoints", run / "config.toml", run))


def test_a_run_refuses_another_configuration(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    run_training(tone_config(folder, epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"\[training\] differ"):
        run_training(tone_config(folder, epochs=2), tmp_path / "run")


def test_a_run_refuses_to_go_on_with_other_data(tmp_path: Path) -> None:
    """Also where nothing but a text changed, or a recording of the same length."""
    folder = write_corpus(tmp_path / "d", rows=6)
    run_training(tone_config(folder, epochs=1), tmp_path / "run")
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"mean": [-9.1] * 20}))
    with pytest.raises(ConfigError, match="prepared anew"):
        run_training(tone_config(folder, epochs=1), tmp_path / "run")
    shutil.rmtree(folder)
    write_corpus(folder, rows=6, seed=1)
    with pytest.raises(ConfigError, match="prepared anew"):
        run_training(tone_config(folder, epochs=1), tmp_path / "run")
    shutil.rmtree(folder)
    run_training(tone_config(write_corpus(folder, rows=6), epochs=1), tmp_path / "run")


@pytest.mark.parametrize("what", ["phones", "source"])
def test_a_run_refuses_to_go_on_with_other_phones_or_sources(tmp_path: Path, what: str) -> None:
    def spoken(**other: str) -> Path:
        extra = row("new", "low mid", np.zeros(16_000)) | other
        return write_corpus(tmp_path / "d", rows=6, extra=[extra])

    folder, run = spoken(), tmp_path / "run"
    config = changed(tone_config(folder, epochs=1), "data", weights={"tones": 0.9})
    run_training(config, run)
    known = json.loads((run / "data.json").read_text())
    shutil.rmtree(folder)
    spoken(**{what: "M I D"})
    with pytest.raises(ConfigError, match=rf"\({what}s?\): was prepared anew"):
        run_training(config, run)
    (run / "data.json").write_text(json.dumps({str(folder): known[str(folder)]}))
    run_training(config, run)  # started before it was kept


def test_weights_of_a_source_that_is_not_there_are_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=3))
    with pytest.raises(ConfigError, match=r"data\.weights\.tone: .* did you mean tones\?"):
        run_training(changed(config, "data", weights={"tone": 0.5}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data\.weights draws no utterance"):
        run_training(changed(config, "data", weights={"tones": 0.0}), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_tuning_data_without_texts_is_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6))
    extra = [row("a", "", np.zeros(16_000)), row("b", "", np.zeros(16_000))]
    dev = write_corpus(tmp_path / "dev", rows=0, extra=extra)
    with pytest.raises(ConfigError, match=r"data\.dev: none of its 2 utterances has a text"):
        run_training(changed(config, "data", dev=(str(dev),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    config = tone_config(folder, epochs=1)
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(tmp_path / "typo"),)))
    with pytest.raises(ConfigError, match="typo"):
        run_training(missing, tmp_path / "run")
    run_training(config, tmp_path / "run")


def test_without_tuning_data_the_average_is_kept(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dev=()))
    network = load_network(run_training(config, tmp_path / "run"))
    assert network.log_priors is not None and network.log_priors.shape == (len(network.tokenizer),)
    assert np.exp(network.log_priors).sum() == pytest.approx(1.0, abs=1e-3)  # measured at the end
    end = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert end["text"] == "no tuning data (data.dev): the mean of the last 2 epochs is kept"


def test_priors_are_of_the_speech_that_was_trained_on(tmp_path: Path) -> None:
    long = row("long", "low", 0.1 * np.random.default_rng(0).standard_normal(16_000 * 21))
    priors = []
    for name, extra in (("without", []), ("with", [long])):
        config = changed(tone_config(write_corpus(tmp_path / name, rows=6, extra=extra), epochs=1), "data", dev=())
        priors.append(load_network(run_training(config, tmp_path / f"run_{name}")).log_priors)
    np.testing.assert_array_equal(*priors)


def test_data_of_other_features_is_refused(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6))
    other = dataclasses.replace(config, features=dataclasses.replace(config.features, low_hz=100.0))
    with pytest.raises(ConfigError, match="statistics"):
        run_training(other, tmp_path / "run")


def test_init_from_continues_and_refuses_another_shape(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    first = run_training(tone_config(folder, epochs=1), tmp_path / "first")
    config = dataclasses.replace(tone_config(folder, epochs=1), init_from=str(first))
    run_training(config, tmp_path / "second")
    other = dataclasses.replace(tone_config(folder, epochs=1, bidirectional=False), init_from=str(first))
    with pytest.raises(ConfigError, match="do not fit"):
        run_training(other, tmp_path / "third")


@pytest.mark.parametrize("frames", [1, 4])
def test_init_from_takes_a_network_of_another_look_ahead(tmp_path: Path, frames: int) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    config = changed(tone_config(folder, epochs=1, bidirectional=False), "model", look_ahead=2)
    start = load_network(run_training(config, tmp_path / "first"))
    other = dataclasses.replace(changed(config, "model", look_ahead=frames), init_from=str(tmp_path / "first" / "best"))
    network = Trainer(other, tmp_path / "second").network
    (before,), (after,) = ([x.weight for x in n.layers if isinstance(x, LookAhead)] for n in (start, network))
    both = min(len(before), len(after))
    assert len(after) == frames + 1 and torch.equal(after[:both], before[:both]) and not after[both:].any()
    name = "layers.2.convolution.weight"
    assert torch.equal(network.state_dict()[name], start.state_dict()[name])


def test_the_shipped_network_is_tuned_to_new_tokens(tmp_path: Path) -> None:
    """All its weights are taken; the outputs of the new tokens, and of other phones, are new."""
    extra = [row("new", "höhe", np.zeros(16_000), phones="Ö")]
    folder = write_corpus(tmp_path / "d", rows=4, extra=extra)
    info = json.loads((folder / "dataset.json").read_text())
    info |= {"features": dataclasses.asdict(FeatureConfig()), "mean": [-9.0] * 80, "variance": [9.0] * 80}
    (folder / "dataset.json").write_text(json.dumps(info))
    shipped = load_network(shipped_model() / "streaming", dithered=True)
    config = TrainConfig(
        model=shipped.config.model,
        data=DataConfig(train=(str(folder),)),
        training=TrainingConfig(epochs=1, precision="fp32"),
        init_from=str(shipped_model() / "streaming"),
        new_tokens=True,
    )
    network = Trainer(config, tmp_path / "run").network
    known = len(shipped.tokenizer)
    assert network.tokenizer.tokens == (*shipped.tokenizer.tokens, "ö")
    before, after = shipped.state_dict(), network.state_dict()
    kept = {name for name, value in after.items() if name in before and torch.equal(value, before[name])}
    output, joint = f"layers.{len(network.layers) - 1}", {"output", "project", "lstm.lstm", "lstm.norm"}
    assert {name.rpartition(".")[0] for name in after.keys() - kept} <= {
        f"{output}.linear", f"{output}.phones", f"{output}.joint", "phone_output.linear",
        *(f"transducer.{part}" for part in joint),
    }  # fmt: skip
    assert not kept & {f"{output}.phones.weight", "phone_output.linear.weight"}
    for name in (f"{output}.linear.weight", f"{output}.linear.bias"):
        assert torch.equal(after[name][:known], before[name])
    assert load_network(run_training(config, tmp_path / "run")).tokenizer.tokens == network.tokenizer.tokens
    with pytest.raises(ConfigError, match="new_tokens"):
        dataclasses.replace(config, init_from="")


def test_training_stops_when_it_gets_no_better(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=9, learning_rate=1e-9, patience=2)
    for _ in range(2):  # run again, it is still done
        load_network(run_training(config, tmp_path / "run"))
        assert [r["epoch"] for r in log_rows(tmp_path / "run", "dev")] == [0, 1, 2]
        assert "no better CER in the last 2 scorings" in log_rows(tmp_path / "run", "stop")[0]["text"]
    with pytest.raises(ConfigError, match="patience"):
        changed(config, "data", dev=())


def test_a_finished_training_that_is_run_again_leaves_its_model_alone(tmp_path: Path) -> None:
    config, run = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1), tmp_path / "run"
    model = run_training(config, run)
    (model / "calibration.json").write_text("{}")
    for _ in range(2):
        assert run_training(config, run) == model
        assert (model / "calibration.json").exists()
    run_training(changed(config, "training", average=2), run)
    assert not (model / "calibration.json").exists(), "it was of other weights"
    shutil.rmtree(model)
    load_network(run_training(changed(config, "training", average=2), run))


def test_a_dry_run_tells_what_a_run_would_take_and_writes_nothing(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), accumulate=2)
    told = dry_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_training(config, tmp_path / "run")
    steps = log_rows(tmp_path / "run", "step")
    assert told.steps == len(steps)
    audio = told.audio_hours + 2 * 60 * 0.5 / 3600  # and 250 ms on both sides of 60 utterances in 2 epochs
    assert abs(audio - steps[-1]["audio_hours"]) < 1e-3 * audio
    assert 0 < told.hours < 1
    assert 100e6 < told.memory < 100e9
    assert len(told.first) == 3
    assert f"steps: {len(steps)}" in str(told)


def test_the_share_of_clipped_steps_is_logged(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "d", rows=20)
    for clip_norm, rate in ((1e-6, 1.0), (1e6, 0.0)):
        run = tmp_path / str(clip_norm)
        run_training(tone_config(folder, epochs=2, clip_norm=clip_norm, batch_seconds=8.0), run)
        assert {r["clip_rate"] for r in log_rows(run, "step")} == {rate}
        assert min(r["gradient_norm"] for r in log_rows(run, "step")) > 1e-6


def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features_of, calls = asr.training.step.features_of, []

    def once_nothing_but_nan(network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch)
        features, lengths = features_of(network, batch)
        return features * (float("nan") if len(calls) == 2 else 1.0), lengths

    monkeypatch.setattr(asr.training.step, "features_of", once_nothing_but_nan)
    config = tone_config(write_corpus(tmp_path / "d", rows=20), epochs=1, batch_seconds=8.0)
    network = load_network(run_training(config, tmp_path / "run"))
    assert [r["skipped"] for r in log_rows(tmp_path / "run", "step")][:3] == [0, 1, 1]
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies of it
@pytest.mark.parametrize("limit", [2_000, 30_000])  # bytes: the log no longer fits, or the next checkpoint
def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), epochs=3)
    run_training(config, tmp_path / "undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(metrics: dict) -> None:
        if metrics["epoch"] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(AsrError, match=r"run: cannot be written .*; checkpoints/step-\d+ is whole"):
            run_training(config, tmp_path / "run", report=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").rglob("*.tmp*"))
    run_training(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_a_run_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d", rows=3), epochs=1)
    (tmp_path / "file").touch()
    with pytest.raises(AsrError, match="file/run: cannot be written"):
        run_training(config, tmp_path / "file" / "run")


def test_the_mean_of_start_and_end_is_kept_where_it_scores_best(tmp_path: Path, monkeypatch) -> None:
    folder = write_corpus(tmp_path / "d", rows=6)
    first = run_training(tone_config(folder, epochs=1), tmp_path / "first")
    config = dataclasses.replace(tone_config(folder, epochs=1), init_from=str(first))
    scores = iter([0.5, 0.6, 0.4])  # of the epoch, of the mean of epochs, with init_from
    monkeypatch.setattr(Trainer, "_score", lambda self: {"loss": 1.0, "cer": next(scores), "wer": 1.0})
    kept = load_network(run_training(config, tmp_path / "second")).state_dict()
    start, best = load_network(first).state_dict(), load_network(tmp_path / "second" / "best").state_dict()
    name = "layers.2.convolution.weight"
    assert not torch.equal(start[name], best[name])
    torch.testing.assert_close(kept[name], (start[name] + best[name]) / 2)
    end = json.loads((tmp_path / "second" / "log.jsonl").read_text().splitlines()[-1])
    assert end["text"].endswith("of its mean with init_from 40.0%")


def test_averaged_weights_are_the_mean(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for i in range(3):
        save_file({"w": torch.full((2,), float(i))}, tmp_path / f"{i}.safetensors")
    assert average_weights(sorted(tmp_path.glob("*.safetensors")))["w"].tolist() == [1.0, 1.0]


def test_weights_that_were_saved_small_are_averaged_as_what_they_stand_for(tmp_path: Path) -> None:
    made = run_training(tone_config(write_corpus(tmp_path / "d"), epochs=1), tmp_path / "run")
    export_model([tmp_path / "run"], tmp_path / "model", small=True)
    whole, small = (folder / "weights.safetensors" for folder in (made, tmp_path / "model" / "offline"))
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    mean = average_weights([small, whole])
    for name, value in load_network(made).state_dict().items():
        if not name.startswith("state_output."):  # which no small one has
            steps = 250 if "weight_ih" in name or "weight_hh" in name else 400  # 7 bits or 8, half of it
            assert float((mean[name] - value).abs().max()) <= float(value.abs().max()) / steps, name


def test_small_changes_to_a_small_model_reach_the_next_int8_graph(tmp_path: Path) -> None:
    """Its weights are what 7 bits can say; without noise all that moves them by less than half a step is undone."""
    run_training(tone_config(write_corpus(tmp_path / "d"), epochs=1), tmp_path / "run")
    export_model([tmp_path / "run"], tmp_path / "small", small=True)
    before = load_network(tmp_path / "small" / "offline")
    reached = {}
    for dithered in (False, True):
        network = load_network(tmp_path / "small" / "offline", dithered=dithered)
        name = next(name for name in network.state_dict() if "weight_hh" in name)
        step = before.state_dict()[name].abs().amax(1, keepdim=True) / 64
        with torch.no_grad():
            network.get_parameter(name).add_(0.2 * step)
        save_network(network, tmp_path / "changed" / "offline")
        export_model([tmp_path / "changed"], tmp_path / "after", small=True)
        after = load_network(tmp_path / "after" / "offline")
        reached[dithered] = float(((after.state_dict()[name] - before.state_dict()[name]) / step).mean())
    assert abs(reached[False]) < 0.05
    assert reached[True] == pytest.approx(0.2, abs=0.05)


def test_the_tuning_data_is_scored_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), epochs=5, score_epochs=2, average=2)
    run_training(config, tmp_path / "run")
    assert [row["epoch"] for row in log_rows(tmp_path / "run", "dev")] == [1, 3, 4]
    assert len(list((tmp_path / "run" / "epochs").glob("*.safetensors"))) == 2
    run_training(changed(config, "training", score_epochs=1), tmp_path / "run")  # how often may change


def test_steps_that_stay_non_finite_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr.training.loop.learning_rate", lambda *_: float("inf"))
    config = tone_config(write_corpus(tmp_path / "d", rows=200), epochs=10)
    with pytest.raises(AsrError, match="non-finite gradient"):
        run_training(config, tmp_path / "run")
