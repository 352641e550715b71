"""Jobs done by processes of their own, which end with the one that started them, however that one ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path

from shearling.data.jobs import Finished, Job, do
from shearling.data.tokenise import Encoder, Pipeline
from shearling.errors import UserError

# A process takes a second to start, in which it could have tokenised so much.
WORTH_BYTES = 1 << 24


def do_all(jobs: Sequence[Job], pipeline: Pipeline, out: Path, *, processes: int) -> Iterator[tuple[Job, Finished]]:
    """Does jobs into `out` and gives each with its result as it is finished; one process does them itself, in order.

    Raises the first UserError of any job, and UserError when a process is killed; all of them have ended by then.
    """
    if min(processes, len(jobs)) <= 1:
        encoder = Encoder(pipeline)
        yield from ((job, do(job, encoder, out)) for job in jobs)
        return
    # Spawned, because a fork would inherit tokenizers' threads and whatever locks they hold.
    context = multiprocessing.get_context("spawn")
    alive, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_start, initargs=(pipeline, out, alive))
    try:
        started = {pool.submit(_do, job): job for job in jobs}
        for future in as_completed(started):
            yield started[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "preparation",
            found="a process that was killed while it tokenised",
            expected="enough memory for each",
            change="run the same command again, it goes on where it was; fewer --processes need less memory",
        ) from error
    finally:
        ours.close()  # ends those that still work; idle ones end in the shutdown
        pool.shutdown(cancel_futures=True)
        alive.close()


def default_processes(jobs: Sequence[Job]) -> int:
    """As many as there are cores, but no more than are worth their start."""
    total = sum(source.num_bytes for job in jobs for source in job.sources)
    return max(1, min(_cores(), total // WORTH_BYTES))


def _cores() -> int:
    # What this process may use: fewer than the machine has under a batch system or in a container with a CPU set.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Here:
    """What a worker process was started with."""

    encoder: Encoder
    out: Path


def _start(pipeline: Pipeline, out: Path, alive: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _Here.encoder, _Here.out = Encoder(pipeline), out


def _end_with(alive: Connection) -> None:
    # Nothing is ever sent: the pipe gets readable when its other end is closed, by intent or by the kernel.
    wait([alive])
    os._exit(1)


def _do(job: Job) -> Finished:
    return do(job, _Here.encoder, _Here.out)
