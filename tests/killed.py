"""A verb in a process of its own that is killed while it runs, and what it leaves when it gets to its end."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from shearling.record import read

Verb = Callable[..., Any]  # of (watch=)
OF_THE_MACHINE = ("time", "tokens_per_second", "data_wait_share", "mfu", "memory_bytes")


def apart(work: Callable[[], Any]) -> int:
    """The exit code of a forked process that does this work, negative if a signal ended it."""

    def forked() -> None:
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of a fork don't find the pool that torch had
        work()

    process = multiprocessing.get_context("fork").Process(target=forked)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def killed_at(step: int, number: int = signal.SIGKILL, *, saved_in: Path | None = None) -> Callable[..., Any]:
    """A `watch` that sends this very process a signal at a step, counted over all that is watched.

    With `saved_in`, once a checkpoint that it has begun is whole in that folder.
    """
    seen = 0
    before = _checkpoints(saved_in)

    def watch(title: str, steps: int) -> Callable[[int, Mapping[str, float], Mapping[str, float]], None]:
        def on_step(at: int, figures: Mapping[str, float], excess: Mapping[str, float]) -> None:
            nonlocal seen
            seen += 1
            if seen == step:
                until = monotonic() + 60
                while saved_in and _checkpoints(saved_in) <= before:
                    assert monotonic() < until, "no checkpoint"
                os.kill(os.getpid(), number)

        return on_step

    return watch


def _checkpoints(folder: Path | None) -> set[str]:
    return {path.name for path in folder.glob("checkpoints/step-*") if path.suffix == ""} if folder else set()


def weights(out: Path) -> str:
    """The sha256 of a result's weights."""
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def losses(out: Path) -> list[tuple[Any, ...]]:
    """Every loss and every mixture of a record, to the bit, but for times and for what is said of resuming."""
    found = []
    for event in read(out / "record.jsonl"):
        if event["event"] in ("step", "held_out", "mixture", "masks", "used_up"):
            kept = {k: v for k, v in event.items() if k not in OF_THE_MACHINE}
            found.append(tuple(sorted((key, _hex(value)) for key, value in kept.items())))
    return found


def _hex(value: Any) -> str:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return str({key: _hex(inner) for key, inner in sorted(value.items())})
    return str([_hex(inner) for inner in value]) if isinstance(value, list) else str(value)
