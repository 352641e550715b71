"""A training stage kept as it goes: checkpoints, what they hold, how the same command goes on from one, and signals."""

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shearling.data.sampler import SamplerState
from shearling.errors import Stopped
from shearling.mixture.weights import Mixture
from shearling.ranks.ranks import ALONE, Ranks
from shearling.ranks.rows import Rows
from shearling.recipe import Training
from shearling.record import Record, Unwritten, versions
from shearling.stage import IDENTITY_FILE
from shearling.train.checkpoint import Checkpoints, Damaged, Saved, numbers, state_of
from shearling.train.eight_bit import begun, parts
from shearling.train.objective import Losses
from shearling.train.skipping import Skipped
from shearling.train.step import State
from shearling.verbs.sinks import Heard, Sinks

log = logging.getLogger(__name__)

FOLDER, RECORD = "checkpoints", "record.jsonl"
GOING = "going.json"  # in that folder: names of those that go once the stage is finished
SECONDS_BETWEEN = 600  # where nobody says how many steps
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def has_checkpoint(partial: Path) -> bool:
    """Of a stage's `.partial`: whether there is something to go on from."""
    return any((partial / FOLDER).glob("step-*"))


def micro_batches(partial: Path) -> list[int]:
    """Of a stage's `.partial`: the windows at a time that each phase was saved with or, where it is yet to come, was to
    have; none where there is nothing to go on from.

    Of the newest checkpoint whose plain values are as they were written: of the rest nothing is checked yet.
    """
    folder = partial / FOLDER
    for number in sorted(numbers(folder), reverse=True):
        with suppress(Damaged, OSError):
            plain = state_of(folder / f"step-{number}", _run(partial))
            begun = [state["micro_sequences"] for state in plain["states"]]
            return [*begun, *plain["micro_sequences"][len(begun) :]]
    return []


def _run(folder: Path) -> str:
    """What a stage's checkpoints know it by."""
    return sha256((folder / IDENTITY_FILE).read_bytes()).hexdigest()


def tidy(out: Path) -> None:
    """Takes out of a finished stage's folder the checkpoints that whoever finished it left word to take out."""
    with suppress(OSError):  # somebody else may be at it, or those that were asked for are there
        going = json.loads((out / FOLDER / GOING).read_bytes())
        for found in (out / FOLDER).glob("step-*"):
            if found.name in going:
                shutil.rmtree(found, ignore_errors=True)
        (out / FOLDER / GOING).unlink()
        (out / FOLDER).rmdir()


@dataclass(frozen=True)
class Held:
    """What a run changes as it goes, by name: the model's parameters unless they are frozen, the optimizers' state,
    other modules' parameters.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    modules: Mapping[str, nn.Module]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as they are."""
        found: dict[str, Tensor] = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        found |= {f"{key}.{name}": p for key, module in self.modules.items() for name, p in module.named_parameters()}
        for name, (optimizer, parameter) in self._parameters().items():
            for key, value in optimizer.state.get(parameter, {}).items():
                found |= parts(f"{name}.{key}", value)
        return found

    def nbytes(self, ranks: Ranks) -> int:
        """What this rank will have to save of it, AdamW's two moments included."""
        saved = [Rows.of(tensor, ranks) for tensor in self.tensors().values()]
        stepped = [Rows.of(p, ranks) for o in self.optimizers for g in o.param_groups for p in g["params"]]
        moments = [2 * part.local.nbytes for part in stepped if part.mine]
        return sum(part.local.nbytes for part in saved if part.mine) + sum(moments)

    def load(self, saved: Saved, ranks: Ranks) -> None:
        """Takes up all of them from where they were saved."""
        for name, (optimizer, parameter) in self._parameters().items():
            keys = [key.removeprefix(f"{name}.") for key in saved.pieces if key.startswith(f"{name}.")]
            if keys:
                fresh = begun(optimizer, parameter)
                fresh = fresh or {key: self._empty(saved, f"{name}.{key}", parameter) for key in keys}
                optimizer.state[parameter].update(fresh)
        saved.load(self.tensors(), ranks)

    def _empty(self, saved: Saved, name: str, parameter: Tensor) -> Tensor:
        """Where to load what an optimizer has of a parameter: laid out as it is, but for a count of steps."""
        if saved.shape(name) == tuple(parameter.shape):
            return parameter.detach().clone()
        return saved.empty(name).to(parameter.device)

    def _parameters(self) -> dict[str, tuple[Optimizer, nn.Parameter]]:
        return {
            f"optimizer.{number}.{index}": (optimizer, parameter)
            for number, optimizer in enumerate(self.optimizers)
            for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }


class Keeping:
    """The checkpoints of one stage in its `folder`, and its record, which goes on where the checkpoint was.

    A context manager around all of its training, after which the last step is saved too. While it is open the first
    SIGTERM or SIGINT has the run finish its step, save, and end by raising Stopped; a second one ends the process at
    once.
    """

    def __init__(self, folder: Path, asked: Training, *, sinks: Sinks, ranks: Ranks = ALONE):
        self.folder, self.every, self.ranks, self.seed = folder, asked.save_every, ranks, asked.seed
        self.checkpoints = Checkpoints(
            folder / FOLDER, run=_run(folder), ranks=ranks, keep=asked.keep_last, keep_every=asked.keep_every or 0
        )
        self.saved: Saved | None = self.checkpoints.newest()
        ranks.by_the_first(self._clear)
        self.record: Record = Heard(folder / RECORD, sinks) if ranks.first else Unwritten()
        if self.saved:
            self.record.cut(self.saved.plain["record_bytes"])
            before = self.saved.plain["versions"]
            self.record.write("resumed", step=self.saved.number, ranks=ranks.count, versions=versions(), before=before)
            log.info("going on from step %d, as %s has it", self.saved.number, self.saved.folder)
            if changed := [f"{name} {before.get(name)}" for name, now in versions().items() if before.get(name) != now]:
                log.warning("it was saved by %s: the bits may come out other than theirs", ", ".join(changed))
        for note in self.checkpoints.notes:
            self.record.write("checkpoint", note=note)
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._open = ExitStack()
        self._last_save = monotonic()
        self._last_step = 0
        self._unsaved: Callable[[], None] | None = None  # saves the last step, if it isn't saved

    def _clear(self) -> None:
        """Removes what a process that died has left half done: only checkpoints and the record are gone on from."""
        for entry in os.scandir(self.folder):
            if entry.name == IDENTITY_FILE or (self.saved and entry.name in (FOLDER, RECORD)):
                continue
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def __enter__(self) -> "Keeping":
        self._open.enter_context(self.checkpoints)
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._before = {number: signal.signal(number, self._told) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as ended:
            kind, error, at = type(ended), ended, ended.__traceback__
            raise
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._open.__exit__(kind, error, at)

    def _finish(self) -> None:
        """Saves the last step unless there were to be fewer checkpoints than one; ends here if that was asked for."""
        if self._unsaved and (self.every is None or self._last_step >= self.every):
            self._unsaved()
        self.checkpoints.wait()
        (ending,) = self.ranks.any(self._signal is not None)
        if not ending:
            self.ranks.by_the_first(self._leave_word)
            return
        if self._unsaved:
            self._unsaved()
            self.checkpoints.wait()
        goes_on = f"goes on from {self.checkpoints.last}" if has_checkpoint(self.folder) else "begins it again"
        raise Stopped(self._signal or signal.SIGTERM, f"stopped after the last step: the same command {goes_on}")

    def _leave_word(self) -> None:
        """Lists the checkpoints that nobody asked to keep: `tidy` may be called by a command that asks otherwise."""
        folder, every = self.checkpoints.folder, self.checkpoints.keep_every
        if folder.is_dir():
            kept = {f"step-{n}" for n in numbers(folder) if every and n % every == 0}
            going = [path.name for path in folder.glob("step-*") if path.name not in kept]
            (folder / GOING).write_text(json.dumps(going), encoding="utf-8")

    def _told(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            os._exit(128 + number)  # whoever asks twice doesn't want to wait
        self._signal = number
        log.warning("%s: finishing this step and saving; once more leaves at once", signal.Signals(number).name)

    def states(self, device: str) -> list[State]:
        """Of each phase that was begun, the state it ended in or, of the last one, was saved in."""
        if self.saved is None:
            return []
        found = [_state(plain) for plain in self.saved.plain["states"]]
        found[-1] = self._with_tensors(found[-1], device)
        return found

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Of what was saved the tensors under a key, by name."""
        assert self.saved is not None
        names = [name for name in self.saved.pieces if name.startswith(f"{key}.")]
        found = {name: self.saved.empty(name) for name in names}
        self.saved.load(found, self.ranks)
        return {name.removeprefix(f"{key}."): tensor for name, tensor in found.items()}

    def take_up(self, held: Held, steps: int) -> None:
        """Gives what is held the values that were saved, if any. Raises UserError where the checkpoints of a stage of
        so many steps have no room.
        """
        at, every = self.saved.number if self.saved else 0, self.every or 1  # by the clock: one a step at the most
        to_come = [] if steps < every else sorted({*range(at - at % every + every, steps + 1, every), steps} - {at})
        self.checkpoints.check_room(held.nbytes(self.ranks), to_come=to_come, by_clock=self.every is None)
        if self.saved:
            held.load(self.saved, self.ranks)

    def keep(self, held: Held, before: Iterable[State] = (), **plain: Any) -> "Kept":
        """For the loop: saves what is held and the state, with those that phases `before` ended in.

        `plain` are values that whoever goes on would otherwise have to find again, among them the `micro_sequences` of
        all phases.
        """
        return Kept(self, held, tuple(before), plain)

    def due(self, number: int) -> tuple[bool, bool]:
        """Whether to save now, and whether to end: what any rank wants, all do."""
        is_time = monotonic() - self._last_save > SECONDS_BETWEEN if self.every is None else number % self.every == 0
        ending, saving = self.ranks.any(self._signal is not None, is_time, in_step=True)
        return saving or ending, ending

    def passed(self, number: int, save: Callable[[], None]) -> None:
        """After each step: its number, and what would save it."""
        self._last_step, self._unsaved = number, save

    def save(self, number: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Has it written, once the record up to here is on the disk: going on cuts it to that length."""
        self.ranks.by_the_first(self.record.sync)
        with_it = {"record_bytes": self.record.nbytes, "seed": self.seed, "versions": versions()}
        self.checkpoints.save(number, tensors, {**plain, **with_it})
        self._last_save, self._unsaved = monotonic(), None

    def end(self, number: int) -> None:
        """Raises Stopped, once what was saved is whole."""
        self.checkpoints.wait()
        said = f"stopped at step {number}, which is saved: the same command goes on from there"
        self.record.write("stopped", step=number)
        raise Stopped(self._signal or signal.SIGTERM, said)

    def _with_tensors(self, state: State, device: str) -> State:
        found = {name: tensor.to(device) for name, tensor in self.tensors("state").items()}
        sums = {name.removeprefix("sums."): tensor for name, tensor in found.items() if name.startswith("sums.")}
        tally = Losses(found["total"], sums, found["counts"]) if sums else None
        skipped = Skipped(found["skipped.counts"], found["skipped.domains"]) if "skipped.counts" in found else None
        return replace(state, tally=tally, skipped=skipped)


@dataclass(frozen=True)
class Kept:
    """What the loop calls after each step."""

    keeping: Keeping
    held: Held
    before: tuple[State, ...]
    plain: Mapping[str, Any]

    def __call__(self, state: State) -> None:
        number = sum(phase.step for phase in self.before) + state.step
        self.keeping.passed(number, partial(self._save, number, state))
        saving, ending = self.keeping.due(number)
        if saving:
            self._save(number, state)
        if ending:
            self.keeping.end(number)

    def _save(self, number: int, state: State) -> None:
        plain = {**self.plain, "states": [_plain(each) for each in (*self.before, state)]}
        self.keeping.save(number, {**self.held.tensors(), **_tensors(state)}, plain)

    @property
    def last(self) -> str:
        return self.keeping.checkpoints.last


def _plain(state: State) -> dict[str, Any]:
    return {
        "step": state.step,
        "tokens": state.tokens,
        "sampler": asdict(state.sampler),
        "mixture": asdict(state.mixture),
        "micro_sequences": state.micro_sequences,
    }


def _state(plain: Mapping[str, Any]) -> State:
    sampler = SamplerState(**{name: tuple(value) for name, value in plain["sampler"].items()})
    mixture = Mixture(**{**plain["mixture"], "reached": tuple(plain["mixture"]["reached"])})
    micro = plain["micro_sequences"]
    return State(plain["step"], plain["tokens"], sampler, mixture, micro_sequences=micro)


def _tensors(state: State) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if state.skipped is not None:
        found |= {"state.skipped.counts": state.skipped.counts, "state.skipped.domains": state.skipped.domains}
    if state.tally is not None:
        found |= {"state.total": state.tally.total, "state.counts": state.tally.counts}
        found |= {f"state.sums.{name}": value for name, value in state.tally.sums.items()}
    return found
