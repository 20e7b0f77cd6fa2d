"""The processes that train together: what they exchange, and the name of the one that the others wait for."""

import os
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import mean, median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asr.errors import AsrError
from asr.nn.convolution import MaskedBatchNorm

_SLOW = 2.0  # times the others' work on an utterance makes a rank a straggler
_WINDOW = 50  # steps that it is judged by
_ANSWER = timedelta(seconds=10)  # for the store to tell who has arrived


class RankError(AsrError):
    """A rank died, kept the others waiting for too long, or still holds the run's folder: a new start may mend it."""


class Ranks:
    """One rank among `world`; alone, nothing is exchanged.

    Where ranks meet, each one leaves a count of its meetings in torch.distributed's store. When a meeting fails (a
    rank died, or the time limit of the process group has passed), those with a lower count are named; where all had
    come, those that do not notice that it failed.

    Args:
        rank: from 0.
        world: number of ranks; above 1, torch.distributed must be initialised.
        device: where tensors to exchange must lie.
        limit: the time limit of the process group, in seconds, for the message.
    """

    def __init__(self, rank: int, world: int, device: torch.device, limit: float) -> None:
        self.rank, self.world, self.device, self.limit = rank, world, device, limit
        own = f"rank {rank} on {platform.node()} (process {os.getpid()})"
        self.names = [own] * world
        self._meetings = 0
        if world > 1:
            self._store = dist.distributed_c10d._get_default_store()  # what init_process_group met in
            self._store.set(f"asr/meetings/{rank}", "0")
            dist.all_gather_object(self.names, own)

    @contextmanager
    def meet(self) -> Iterator[None]:
        """Around whatever exchanges tensors with the other ranks.

        Raises:
            RankError: it failed, and some ranks have not come here, or died or hang here.
        """
        if self.world == 1:
            yield
            return
        self._meetings += 1
        self._store.set(f"asr/meetings/{self.rank}", str(self._meetings))
        try:
            yield
        except RuntimeError as error:
            missing = self._missing() if _is_of_the_exchange(error) else []
            if not missing:
                raise
            raise RankError(
                f"{', '.join(missing)}: died, or did not come for {self.limit:.0f} s (training.hang_seconds) while "
                f"{self.names[self.rank]} waited ({str(error).splitlines()[0]})"
            ) from error

    def gather(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, in the order of the ranks."""
        if self.world == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.meet():
            rows = [torch.empty_like(own) for _ in range(self.world)]
            dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def gather_bytes(self, own: Tensor) -> list[Tensor]:
        """The tensor (bytes,) of every rank, on the CPU."""
        if self.world == 1:
            return [own]
        with self.meet():
            rows = [torch.empty_like(own, device=self.device) for _ in range(self.world)]
            dist.all_gather(rows, own.to(self.device))
        return [row.cpu() for row in rows]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values that rank 0 has, in place."""
        if self.world > 1:
            with self.meet():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.gather([0.0])  # a tensor without elements would not be sent

    def _missing(self) -> list[str]:
        """Names of the ranks that have met less often than this one, else of those that hang in the same meeting."""
        failed = f"asr/failed/{self._meetings}"
        self._store.set_timeout(_ANSWER)
        try:
            self._store.set(f"{failed}/{self.rank}", "seen")
            counts = [int(self._store.get(f"asr/meetings/{rank}")) for rank in range(self.world)]
        except RuntimeError:  # rank 0 keeps the store: it is frozen or gone
            return [self.names[0]]
        behind = [name for name, count in zip(self.names, counts, strict=True) if count < self._meetings]
        here = [rank for rank, count in enumerate(counts) if count == self._meetings]
        return behind or [self.names[rank] for rank in here if not self._comes(f"{failed}/{rank}")]

    def _comes(self, key: str) -> bool:
        """Whether the store has the key, soon at least."""
        try:
            self._store.get(key)  # waits for it
        except RuntimeError:
            return False
        return True


def _is_of_the_exchange(error: RuntimeError) -> bool:
    """Whether an error comes from what exchanges tensors. Gloo's have no type of their own, but name its sources."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Stragglers:
    """Finds the rank that works longer on its utterances than the others, over the last steps.

    A rank's work is loading its share of a batch and the forward pass, without what it waits for others inside
    batch normalisation. (On a GPU the forward pass runs on by itself; there it is loading and launching.)
    """

    def __init__(self, network: nn.Module) -> None:
        self._waited = 0.0
        self._work: deque[list[float]] = deque(maxlen=_WINDOW)
        for module in network.modules():
            if isinstance(module, MaskedBatchNorm):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, *_: object) -> None:
        self._waited -= time.perf_counter() if module.training else 0.0

    def _after(self, module: nn.Module, *_: object) -> None:
        self._waited += time.perf_counter() if module.training else 0.0

    def waited(self) -> float:
        """Seconds spent inside batch normalisation since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def find(self, work: list[float]) -> tuple[int, float] | None:
        """Add a step, `work` in seconds an utterance by rank; gives a straggler and how many times longer it takes."""
        self._work.append(work)
        if len(work) < 2 or len(self._work) < _WINDOW:
            return None
        means = [mean(of_rank) for of_rank in zip(*self._work, strict=True)]
        slowest = max(range(len(means)), key=means.__getitem__)
        times = means[slowest] / max(median(means[:slowest] + means[slowest + 1 :]), 1e-9)
        if times < _SLOW:
            return None
        self._work.clear()
        return slowest, times
