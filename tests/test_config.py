"""Configurations: what is read, and what is refused with the value and what is allowed."""

import tomllib
from pathlib import Path

import pytest

from asr.config import TrainConfig, from_dict, load_config, to_toml
from asr.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
SMALL = '[model]\nbidirectional = true\n[data]\ntrain = ["data/x"]\n[training]\nepochs = 3\n'


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_read_and_written_back_unchanged(path: Path) -> None:
    config = load_config(path)
    assert from_dict(TrainConfig, tomllib.loads(to_toml(config)), where="again") == config


def test_overrides_are_toml_values_or_bare_words(config_file: Path) -> None:
    config = load_config(
        config_file, ["training.epochs=7", "data.train=['a', 'b']", "init_from=runs/first", "data.weights.digits=0.5"]
    )
    assert config.training.epochs == 7
    assert config.data.train == ("a", "b")
    assert config.init_from == "runs/first"
    assert config.data.weights == {"digits": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", r"unknown key training\.epoch; did you mean training\.epochs\?"),
        ("training.epochs=0", r"training\.epochs = 0: must be at least 1"),
        ("training.seed=-1", r"training\.seed = -1: must be 0 to 9223372036854775807"),
        ("training.seed=9223372036854775808", r"must be 0 to 9223372036854775807"),
        ("training.curriculum_epochs=-3", r"training\.curriculum_epochs = -3: must be at least 0"),
        ("augment.gain_db=inf", r"augment\.gain_db = inf: must be at least 0, and finite"),
        ("augment.noise_snr_db=[0.0, inf]", r"augment\.noise_snr_db = .* must be \[lowest, highest\]"),
        ("training.epochs='many'", r"training\.epochs = 'many': must be of type int"),
        ("training.crf_weight=1.0", r"training\.crf_weight = 1\.0: must be 0 without model\.phone_output"),
        ("training.precision='fp8'", r"'fp8': must be \"auto\""),
        ("model.dropout=1.0", r"model\.dropout = 1\.0"),
        ("model.look_ahead=4", "bidirectional network"),
        ("model.strides=[4, 2, 2]", r"model\.strides"),
        ("augment.noise_probability=0.5", r"augment\.noise = ''"),
        ("data.train=[]", r"data\.train"),
        ("data.dev_minutes=0", r"data\.dev_minutes = 0"),
        ("augment.band_mask_bands=81", "at most features"),
        ("augment.noise_snr_db=[30, 5]", r"augment\.noise_snr_db"),
        ("augment.time_masks=-1", r"augment\.time_masks = -1"),
        ("training.warmup_steps=-1", r"training\.warmup_steps"),
        ("model.channels=[0, 4]", r"model\.channels"),
        ("model=3", "must be a section"),
        ("training.epochs", "section.key=value"),
    ],
)
def test_what_is_wrong_is_named(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


def test_a_missing_key_file_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with pytest.raises(ConfigError, match=r"c\.toml: cannot be read"):
        load_config(path)
    path.write_text("[model\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.toml: not TOML"):
        load_config(path)
    path.write_text("[model]\nbidirectional = true\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="data is missing"):
        load_config(path)


def test_a_mark_of_utf_8_before_the_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIGS[0].read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_config(path) == load_config(CONFIGS[0])
