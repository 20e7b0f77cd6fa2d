"""pipelines.pool: order, back-pressure and lost workers, over a make-believe Ray whose workers die on demand."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.errors import AsrError
from pipelines import ray_local
from pipelines.pool import map_in_order

ORDER = "order"  # an item that the work refuses with an error for the reader
DEADLY = "deadly"  # one that kills its worker


class Lost(Exception):
    """What Ray raises for an answer whose worker is gone."""


@dataclass(eq=False)
class Answer:
    """A reference to an answer that is worked out when it is fetched."""

    worker: "Worker"
    life: int
    items: Sequence[str] | None  # None: whether it is up


class Worker:
    """An actor: it answers in the order of the calls; all that were open when it died are lost."""

    def __init__(self, actor: Any, given: list) -> None:
        self.actor, self.life, self.given = actor, 0, given
        self.ready = SimpleNamespace(remote=lambda: Answer(self, self.life, None))
        self.work = SimpleNamespace(remote=self._take)

    def _take(self, items: Sequence[str]) -> Answer:
        self.given.append(items)
        return Answer(self, self.life, items)

    def die(self) -> None:
        self.life += 1
        raise Lost("the worker died unexpectedly\nand more lines")


class Ray:
    """As much of Ray as the pool uses: `choose` picks the next answer, `crashes` tells which calls die for nothing."""

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self, choose: Callable[[list[Answer]], Answer | None], crashes: Sequence[bool] = ()) -> None:
        self.choose, self.crashes = choose, iter(crashes)
        self.given: list[Sequence[str]] = []  # what the workers were given so far

    def remote(self, **_: object) -> Callable:
        return lambda actor: SimpleNamespace(remote=lambda open_work: Worker(actor(open_work), self.given))

    def wait(self, answers: list[Answer], timeout: float) -> tuple[list[Answer], list[Answer]]:
        oldest = {id(answer.worker): answer for answer in reversed(answers)}
        chosen = self.choose(list(oldest.values()))
        return [chosen] if chosen else [], []

    def get(self, answer: Answer) -> Any:
        worker = answer.worker
        if answer.life != worker.life:
            raise Lost("the worker died before")
        if answer.items is None:
            return worker.actor.ready()
        if next(self.crashes, False) or DEADLY in answer.items:
            worker.die()
        return worker.actor.work(answer.items)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}


def shout(items: Sequence[str]) -> list[str]:
    if ORDER in items:
        raise AsrError("no orders")
    return [item.upper() for item in items]


def mapped(ray: Ray, batches: Sequence[Sequence[str]], workers: int) -> Iterator[list[str]]:
    @contextmanager
    def start(address: str | None, cpus: int) -> Iterator[Ray]:
        yield ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_local, "start", start)
        yield from map_in_order(batches, lambda: shout, lambda item, reason: f"lost {item}", workers=workers)


def batches_with(*items: str) -> st.SearchStrategy[list[list[str]]]:
    return st.lists(st.lists(st.sampled_from(items), min_size=1, max_size=5), max_size=40)


@settings(deadline=None)
@given(batches=batches_with("a", "b", DEADLY), workers=st.integers(1, 4), seed=st.integers())
def test_what_kills_its_workers_is_lost_and_nothing_else(batches: list[list[str]], workers: int, seed: int) -> None:
    made = list(mapped(Ray(random.Random(seed).choice), batches, workers))
    assert made == [[f"lost {DEADLY}" if i == DEADLY else i.upper() for i in batch] for batch in batches]


@settings(deadline=None)
@given(
    batches=batches_with("a", "b", "c"),
    workers=st.integers(1, 4),
    seed=st.integers(),
    died=st.sets(st.integers(0, 40), max_size=1),  # two in a row may befall one piece, which is then thought to kill
)
def test_a_worker_that_dies_for_nothing_costs_nothing(
    batches: list[list[str]], workers: int, seed: int, died: set[int]
) -> None:
    ray = Ray(random.Random(seed).choice, [call in died for call in range(41)])
    assert list(mapped(ray, batches, workers)) == [[i.upper() for i in batch] for batch in batches]


def test_the_others_wait_for_a_batch_that_takes_long() -> None:
    """Finished batches wait in memory for the first one: no more than 32 a worker."""

    def all_but_the_first(answers: list[Answer]) -> Answer:
        others = [answer for answer in answers if answer.items != ["0"]]
        return others[0] if others else answers[0]

    ray = Ray(all_but_the_first)
    results = mapped(ray, [[str(i)] for i in range(1000)], workers=2)
    assert next(results) == ["0"]
    assert len(ray.given) == 64
    assert list(results) == [[str(i)] for i in range(1, 1000)]


def test_workers_that_die_whatever_they_are_given_end_the_job() -> None:
    with pytest.raises(AsrError, match=r"51 workers died in a row; the last: the worker died unexpectedly$"):
        list(mapped(Ray(lambda answers: answers[0], [True] * 200), [["a"] * 60], workers=2))


def test_a_cluster_that_starts_no_worker_ends_the_job() -> None:
    with pytest.raises(AsrError, match=r"no worker started within 10 minutes: .* no free CPU for it \(3 in all\)"):
        list(mapped(Ray(lambda answers: None), [["a"]], workers=2))


def test_an_error_for_the_reader_ends_the_job() -> None:
    with pytest.raises(AsrError, match=r"^no orders$"):
        list(mapped(Ray(lambda answers: answers[0]), [["a"], [ORDER]], workers=2))


def test_what_a_ray_that_did_not_start_left_behind_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra [train]")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def init(**given: Any) -> None:
        (Path(given["_temp_dir"]) / "session").mkdir()
        raise TimeoutError("busy")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(AsrError, match="Ray did not start here: busy"), ray_local.start(cpus=1):
        pass
    assert len(list(tmp_path.glob("asr-ray-*/session"))) == 1
    monkeypatch.setattr(ray, "init", lambda **given: None)
    with ray_local.start(cpus=1):
        assert not list(tmp_path.glob("asr-ray-*/session"))
    assert not list(tmp_path.iterdir())
