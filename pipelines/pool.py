"""Work in order over Ray actors: lost ones are replaced, and what kills them is found out and left out.

Ray Data's actors would do for work that never kills them: what does, it tries for ever, or drops with its whole block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from asr.errors import AsrError
from pipelines import ray_local

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # batches that a worker is given at a time, so that it never waits for the next
_WINDOW = 32  # batches a worker may be ahead of the one whose results are due: finished ones wait in memory
_DEATHS = 2  # with the same batch in hand: then its items are tried alone
_DEATHS_IN_A_ROW = 50  # of workers, with nothing finished between: the job gives up
_START_SECONDS = 600.0


@dataclass
class _Piece(Generic[Item]):
    """A batch to be worked on, or one item of it: `batch` and `first` say where its results belong."""

    batch: int
    first: int
    items: Sequence[Item]
    deaths: int = 0


@dataclass
class _Worker:
    """An actor, and the pieces that it was given, oldest first. It gets none before `starting` is answered."""

    actor: Any
    starting: Any
    given: dict[Any, _Piece] = field(default_factory=dict)  # by the reference to the answer

    def expected(self) -> list:
        """References to the answers that it owes."""
        return [*self.given] if self.starting is None else [self.starting]


def map_in_order(
    batches: Sequence[Sequence[Item]],
    open_work: Callable[[], Callable[[Sequence[Item]], list[Result]]],
    lost: Callable[[Item, str], Result],
    *,
    workers: int,
    address: str | None = None,
) -> Iterator[list[Result]]:
    """Give the results of each batch, in order; at most `_WINDOW` batches a worker are under way.

    A batch whose worker died is given to a worker again, whole, so that its results don't depend on what
    happened. If that one dies too, its items are worked on one by one, and what kills a worker even then is lost.

    Args:
        batches: what is worked on at a time.
        open_work: called once in each worker; gives the function that makes a batch's results, one for each item.
        lost: the result of an item that cannot be worked on, from the reason.
        workers: actors; each takes one CPU.
        address: a running Ray cluster; None: RAY_ADDRESS, or else a local one.

    Raises:
        AsrError: what the function raised; or no worker can be started, or they die whatever they are given.
    """
    with ray_local.start(address, cpus=workers) as ray:
        remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(_Actor)
        pool = [_Worker(actor := remote.remote(open_work), actor.ready.remote()) for _ in range(workers)]
        waiting: deque[_Piece] = deque()
        made: dict[int, list] = {}  # results of batches under way; None where one is still missing
        following = begun = deaths = 0
        while following < len(batches):
            # hand out
            while (free := _least_busy(pool)) is not None:
                if not waiting and begun < min(len(batches), following + _WINDOW * workers):
                    made[begun] = [None] * len(batches[begun])
                    waiting.append(_Piece(begun, 0, batches[begun]))
                    begun += 1
                if not waiting:
                    break
                piece = waiting.popleft()
                free.given[free.actor.work.remote(piece.items)] = piece
            # collect
            owners = {ref: worker for worker in pool for ref in worker.expected()}
            ready, _ = ray.wait(list(owners), timeout=_START_SECONDS)
            if not ready and all(worker.starting is not None for worker in pool):
                raise AsrError(
                    f"no worker started within {_START_SECONDS / 60:.0f} minutes: the cluster has no free CPU for it "
                    f"({ray.cluster_resources().get('CPU', 0):.0f} in all), or its nodes cannot run it"
                )
            for reference in ready:
                worker = owners[reference]
                try:
                    answer = ray.get(reference)
                except ray.exceptions.RayError as error:
                    deaths += 1
                    if deaths > _DEATHS_IN_A_ROW:
                        raise AsrError(f"{deaths} workers died in a row; the last: {_reason(error)}") from error
                    waiting.extendleft(reversed(_what_is_left(worker, made, lost, _reason(error))))
                    worker.given, worker.starting = {}, worker.actor.ready.remote()
                    continue
                if isinstance(answer, str):
                    raise AsrError(answer)
                if reference is worker.starting:
                    worker.starting = None
                else:
                    deaths = 0
                    piece = worker.given.pop(reference)
                    made[piece.batch][piece.first : piece.first + len(piece.items)] = answer
            # pass on
            while following < begun and not any(result is None for result in made[following]):
                yield made.pop(following)
                following += 1


def _least_busy(pool: list[_Worker]) -> _Worker | None:
    """A worker that can take another piece."""
    up = [worker for worker in pool if worker.starting is None and len(worker.given) < _AHEAD]
    return min(up, key=lambda worker: len(worker.given), default=None)


def _what_is_left(worker: _Worker, made: dict[int, list], lost: Callable[[Any, str], Any], reason: str) -> list[_Piece]:
    """What a worker that died had been given and others must do. It died of the oldest piece, if of any."""
    pieces = list(worker.given.values())
    if not pieces:
        return []
    suspect, *others = pieces
    suspect.deaths += 1
    if suspect.deaths < _DEATHS:
        return pieces
    if len(suspect.items) == 1:
        made[suspect.batch][suspect.first] = lost(suspect.items[0], f"ended its worker, in company and alone: {reason}")
        return others
    alone = [
        _Piece(suspect.batch, suspect.first + i, [item], deaths=_DEATHS - 1) for i, item in enumerate(suspect.items)
    ]
    return alone + others


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # of an exception in the worker the last line tells, after its traceback; of a lost worker the first
    return (lines[-1] if hasattr(error, "traceback_str") else lines[0]) if lines else type(error).__name__


class _Actor:
    """A worker. What its function raises for the reader travels as a string, not as a traceback."""

    def __init__(self, open_work: Callable[[], Callable]) -> None:
        self._work: Callable | None = None
        self._problem = ""
        try:
            self._work = open_work()
        except Exception as error:  # an actor that raises here would be started again and again
            self._problem = str(error) if isinstance(error, AsrError) else f"{type(error).__name__}: {error}"

    def ready(self) -> str | None:
        return self._problem or None

    def work(self, items: Sequence) -> list | str:
        assert self._work is not None
        try:
            return self._work(items)
        except AsrError as error:
            return str(error)
