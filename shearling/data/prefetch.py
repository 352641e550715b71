"""Batches read ahead of the training step, by threads: the same batches in the same order with any number of them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from shearling.data.batch import Batch
from shearling.data.sampler import Position, SamplerState

Next = Callable[[SamplerState, Mapping[str, float]], tuple[Sequence[Position], SamplerState]]


@dataclass(frozen=True)
class Ahead:
    """A batch on its way: what was asked for, and the state after it."""

    state: SamplerState
    weights: Mapping[str, float]
    batch: "Future[Batch] | None"
    after: SamplerState


class Prefetch:
    """Draws batches, the next `depth` of them being read meanwhile; a context manager, as its threads have to end.

    What is read ahead is a guess that the weights stay. Anything else that is asked for throws the guesses away, so
    that new weights take effect at exactly their step. With no workers nothing is read ahead. Threads and not
    processes, because reading is copying and waiting, which Python's lock isn't held for, and threads neither hang on
    to shared memory nor die alone.
    """

    def __init__(self, following: Next, read: Callable[[Sequence[Position]], Batch], *, workers: int, depth: int = 2):
        self._following, self._read = following, read
        self._depth = max(depth, workers) if workers else 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="shearling-data") if workers else None
        self._ahead: deque[Ahead] = deque()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._forget()
        if self._pool:
            self._pool.shutdown()

    def draw(self, state: SamplerState, weights: Mapping[str, float]) -> tuple[Batch | None, SamplerState]:
        """The next batch and the state after it; None once the data has ended."""
        if self._ahead and (self._ahead[0].state, self._ahead[0].weights) != (state, weights):
            self._forget()
        self._fill(state, weights, 1)
        found = self._ahead.popleft()
        if found.batch is None:
            return None, found.after
        self._fill(found.after, weights, self._depth)
        return found.batch.result(), found.after

    def _fill(self, state: SamplerState, weights: Mapping[str, float], count: int) -> None:
        while len(self._ahead) < count:
            if self._ahead:
                if self._ahead[-1].batch is None:
                    return
                state = self._ahead[-1].after
            positions, after = self._following(state, weights)
            self._ahead.append(Ahead(state, weights, self._submit(positions) if positions else None, after))

    def _submit(self, positions: Sequence[Position]) -> "Future[Batch]":
        if self._pool:
            return self._pool.submit(self._read, positions)
        done: Future[Batch] = Future()
        done.set_result(self._read(positions))
        return done

    def _forget(self) -> None:
        for ahead in self._ahead:
            if ahead.batch:
                ahead.batch.cancel()
        self._ahead.clear()
