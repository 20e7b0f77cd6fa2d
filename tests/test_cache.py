"""What is made once is kept for the next process, and never in the way."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from asr.cache import kept

BIG = 200_000


class Maker:
    """Makes two arrays, and counts how often."""

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.times = value, 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return {"many": np.full(BIG, self.value), "few": np.array([1, 2])}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streaming-asr"


def test_it_is_made_once_of_the_same_arrays_and_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    of = [np.arange(3), tmp_path / "file"]
    make = Maker(7.0)
    for _ in range(3):
        found = kept("thing", of, make)
        assert found["many"].tolist() == [7.0] * BIG
        assert found["few"].tolist() == [1, 2]
    assert make.times == 1
    (tmp_path / "file").write_text("other")
    others = ([np.arange(3), tmp_path / "file"], [np.arange(3.0), tmp_path / "file"], [np.arange(4), tmp_path / "file"])
    for times, other in enumerate(others, start=2):
        kept("thing", other, make)
        assert make.times == times
    kept("other thing", of, make)
    assert make.times == 5


def test_where_it_cannot_be_kept_it_is_made_each_time(tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    make = Maker()
    assert [len(kept("thing", [np.arange(3)], make)["many"]) for _ in range(2)] == [BIG, BIG]
    assert make.times == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "garbage", "no array", "a folder"])
def test_what_is_damaged_is_made_anew(cache: Path, damage: str) -> None:
    make = Maker(3.0)
    kept("thing", [np.arange(3)], make)
    (file,) = cache.glob("thing-*")
    content = file.read_bytes()
    _, _, rest = content.partition(b"\n")
    damaged = {
        "cut": content[:1000],
        "empty": b"",
        "longer": content + b"more",
        "garbage": b"PK\3\4" + content[4:],
        "no array": json.dumps({"bytes": len(rest)}).encode() + b"\n" + rest,
    }
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes(damaged[damage])
    for _ in range(2):
        assert kept("thing", [np.arange(3)], make)["many"][0] == 3.0
    assert make.times == (3 if damage == "a folder" else 2)


def test_the_oldest_go_and_nothing_half_made_stays(cache: Path) -> None:
    for number in range(10):
        kept("thing", [np.array([number])], Maker(number))
    make = Maker()
    assert kept("thing", [np.array([9])], make)["many"][0] == 9.0
    assert make.times == 0
    assert len(list(cache.iterdir())) == 6


def test_what_a_killed_process_left_goes(cache: Path) -> None:
    cache.mkdir(parents=True)
    for name, hours in ((".thing-1.tmp-9", 2), (".thing-2.tmp-9", 0)):
        (cache / name).touch()
        os.utime(cache / name, (time.time() - 3600 * hours, time.time() - 3600 * hours))
    kept("thing", [np.arange(3)], Maker())
    assert sorted(path.name for path in cache.glob(".*")) == [".thing-2.tmp-9"]


def test_arrays_of_any_shape_come_back_and_cannot_be_written(cache: Path) -> None:
    made = {
        "matrix": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "one": np.array(5),
        "many": np.zeros(BIG),
        "none": np.zeros((0, 4), np.int32),
    }
    kept("thing", [np.arange(3)], lambda: made)
    found = kept("thing", [np.arange(3)], dict)
    for name, array in made.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    with pytest.raises(ValueError, match="read-only"):
        found["matrix"][0, 0] = 1.0


def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")  # as relative paths are to be ignored
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    kept("thing", [np.arange(3)], Maker())
    assert list(tmp_path.iterdir()) == []


def test_what_is_small_is_not_kept(cache: Path) -> None:
    kept("thing", [np.arange(3)], lambda: {"few": np.arange(10)})
    assert not cache.exists()


def test_a_file_that_is_missing_is_told_by_who_reads_it(tmp_path: Path) -> None:
    make = Maker()
    kept("thing", [tmp_path / "nowhere"], make)
    kept("thing", [tmp_path / "nowhere"], make)
    assert make.times == 2
