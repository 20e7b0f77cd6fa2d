"""What is made once is kept for the next process, and never in the way."""

from pathlib import Path

import numpy as np
import pytest

from asr.files import kept

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


def test_what_is_damaged_is_made_anew(cache: Path) -> None:
    make = Maker(3.0)
    kept("thing", [np.arange(3)], make)
    (damaged,) = cache.glob("thing-*/many.npy")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for _ in range(2):
        assert kept("thing", [np.arange(3)], make)["many"][0] == 3.0
    assert make.times == 2


def test_the_oldest_go_and_nothing_half_made_stays(cache: Path) -> None:
    for number in range(10):
        kept("thing", [np.array([number])], Maker(number))
    make = Maker()
    assert kept("thing", [np.array([9])], make)["many"][0] == 9.0
    assert make.times == 0
    assert len(list(cache.iterdir())) == 6


def test_what_is_small_is_not_kept(cache: Path) -> None:
    kept("thing", [np.arange(3)], lambda: {"few": np.arange(10)})
    assert not cache.exists()


def test_a_file_that_is_missing_is_told_by_who_reads_it(tmp_path: Path) -> None:
    make = Maker()
    kept("thing", [tmp_path / "nowhere"], make)
    kept("thing", [tmp_path / "nowhere"], make)
    assert make.times == 2
