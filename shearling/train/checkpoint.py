"""Checkpoints of a training run: whole or absent, known by their sums, written while the run goes on.

    FOLDER/step-120/manifest.json          what run it is of, and the sha256 of every other file; written last
                    state.json             plain values
                    rank-0/*.safetensors   tensors: of each the rows that this rank held

A folder gets that name by one rename, once everything in it is on the disk. No pickle anywhere, and no code is loaded:
but sums say who wrote a file as little as names do, so weights from elsewhere come in as models, never as checkpoints.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.errors import FULL_DISK, UserError
from shearling.ranks.ranks import Ranks
from shearling.ranks.rows import Rows
from shearling.stage import sync
from shearling.weights.header import DTYPES, TensorInfo, read_header
from shearling.weights.writer import DiskFull, Entry, write

log = logging.getLogger(__name__)

FORMAT = {"format": "shearling-checkpoint", "version": 2}
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d+)")
DAMAGED = ".damaged"  # after the name of one that an older one was used instead of
CODES = {getattr(torch, name): code for code, (_, name) in DTYPES.items()}


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose every byte is what was written. `plain`: its plain values; tensors are read when asked for."""

    folder: Path
    number: int
    plain: Mapping[str, Any]
    pieces: Mapping[str, Sequence[tuple[int, TensorInfo]]]  # by tensor: (first row, where they lie)

    def load(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Fills tensors by name, of each what this rank holds of it. Raises UserError where they don't fit."""
        for name, tensor in tensors.items():
            rows = Rows.of(tensor, ranks)
            found = self.shape(name)
            if found != rows.shape:
                raise self._unfit(name, f"shape {found}", f"{rows.shape}")
            with torch.no_grad():
                for first, info in self.pieces[name]:
                    _copy_rows(rows, first, info)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        if name not in self.pieces:
            raise self._unfit(name, "no such tensor", "it")
        infos = [info for _, info in self.pieces[name]]
        if not infos[0].shape:
            return ()
        return (sum(info.shape[0] for info in infos), *infos[0].shape[1:])

    def empty(self, name: str) -> Tensor:
        """A tensor of its shape and dtype, on the CPU."""
        shape = self.shape(name)
        return torch.empty(shape, dtype=getattr(torch, DTYPES[self.pieces[name][0][1].dtype][1]))

    def _unfit(self, name: str, found: str, expected: str) -> UserError:
        change = "start over with another --out: it was saved by a run of something else"
        return UserError(f"checkpoint {self.folder}, {name}", found=found, expected=expected, change=change)


class Checkpoints:
    """Those of one stage, in `folder`; `run` says which stage, and what another one has saved is not looked at.

    The last `keep` stay, and all whose number `keep_every` divides. A context manager: at its end what is being written
    gets whole.
    """

    def __init__(self, folder: Path, *, run: str, ranks: Ranks, keep: int = 2, keep_every: int = 0):
        self.folder, self.run, self.ranks = folder, run, ranks
        # What ranks agree on while one is written: a group of its own, as training uses the other meanwhile.
        self._saving = Ranks(ranks.rank, ranks.count, ranks.saving)
        self.keep, self.keep_every = keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shearling-save")
        self._written: Future[None] | None = None
        self.notes: list[str] = []  # what was found that can't be used

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
            log.exception("and the last checkpoint could not be written")  # what came first is what is raised
        finally:
            self._pool.shutdown()

    def save(self, number: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Copies what this rank has to save, and has it written while the caller goes on.

        Raises what went wrong with the one before. UserError, with the bytes of all ranks, where there is no room.
        """
        self.wait()
        rows = {name: Rows.of(tensor, self.ranks) for name, tensor in tensors.items()}
        copies = {
            name: (part.start, part.local.detach().to("cpu", copy=True)) for name, part in rows.items() if part.mine
        }
        text = json.dumps(plain, allow_nan=False)
        own = sum(copy.nbytes for _, copy in copies.values()) + (len(text) if self.ranks.first else 0)
        needed = self.ranks.sum(own)
        full = partial(self._full, f"checkpoint {self._at(number)}", f"room for {needed} bytes")
        self._check_room(needed, full)
        self._written = self._pool.submit(self._write, number, copies, text, full)

    def wait(self) -> None:
        """Until what is being written is whole. Raises what went wrong, on every rank."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def check_room(self, nbytes: int, *, to_come: Sequence[int], by_clock: bool = False) -> None:
        """Raises UserError where the disk has no room for all that will be there at once: of each of them this rank has
        so many bytes, and those of the steps `to_come` will be written, or `by_clock` some of them.
        """
        count = min(len(to_come), self.keep + 1 - min(self.keep, len(self._numbers())))
        if self.keep_every and not by_clock:
            count += sum(number % self.keep_every == 0 for number in to_come[: -self.keep])
        needed = self.ranks.sum(count * nbytes)  # they share one disk
        self._check_room(
            needed, partial(self._full, f"disk of {self.folder}", f"room for {needed} bytes of checkpoints")
        )

    def newest(self) -> Saved | None:
        """The newest that is whole and this run's, or None where there is none at all.

        What is newer and damaged is said, and put aside. Raises UserError where none of them can be used, or one can't
        be read for another reason than that a file is missing; nothing is touched then. Every rank comes here, and
        reads its share of the files.
        """
        if self.ranks.first:
            for left in (*self.folder.glob("*.new"), *self.folder.glob("*.old")):
                shutil.rmtree(left)
        self.ranks.meet()
        damaged: list[Path] = []
        for number in sorted(self._numbers(), reverse=True):
            folder = self._at(number)
            wrong = self.ranks.together(lambda folder=folder: self._wrong(folder))
            if not any(self.ranks.any(wrong is not None)):
                self.ranks.by_the_first(lambda: self._put_aside(damaged))
                return self._open(folder, number)
            self.notes.append(f"checkpoint {folder} isn't used: {wrong or 'another rank found it damaged'}")
            log.warning(self.notes[-1])
            damaged.append(folder)
        if damaged:
            raise UserError(
                f"checkpoints in {self.folder}",
                found=f"none of {len(damaged)} that can be used, as said above",
                expected="one that is as it was written",
                change="bring one back; or, to begin from nothing, remove that folder",
            )
        return None

    def _put_aside(self, damaged: Sequence[Path]) -> None:
        for folder in damaged:
            aside = folder.with_name(folder.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)

    @property
    def last(self) -> str:
        """Where the newest one is, for messages: one that is being written counts if it gets whole."""
        if self._written is not None:
            self._written.exception()  # waits for it, and leaves it to `wait` to raise
        numbers = self._numbers()
        return str(self._at(max(numbers))) if numbers else "none yet"

    def _numbers(self) -> list[int]:
        return numbers(self.folder)

    def _at(self, number: int) -> Path:
        return self.folder / f"step-{number}"

    def _write(
        self, number: int, copies: Mapping[str, tuple[int, Tensor]], text: str, full: Callable[[str], UserError]
    ) -> None:
        """Everything that takes time, in a thread. A rank that can't has all of them fail."""
        new, first = self.folder / f"step-{number}.new", self.ranks.first
        try:
            self._together(lambda: self._start(new) if first else None, full)
            self._together(lambda: self._write_rank(new, copies), full)
            self._together(lambda: self._finish(new, number, text) if first else None, full)
        except BaseException:
            if first:
                shutil.rmtree(new, ignore_errors=True)  # what of it is on a full disk is of no use
            raise

    def _together(self, work: Callable[[], None], full: Callable[[str], UserError]) -> None:
        self._saving.together(lambda: _told(work, full))

    def _start(self, new: Path) -> None:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)

    def _write_rank(self, new: Path, copies: Mapping[str, tuple[int, Tensor]]) -> None:
        entries = [Entry(name, CODES[copy.dtype], tuple(copy.shape)) for name, (_, copy) in copies.items()]
        starts = json.dumps({name: start for name, (start, _) in copies.items() if start})
        folder = new / f"rank-{self.ranks.rank}"
        write(folder, entries, lambda name: copies[name][1], metadata={"format": "pt"})
        _write_synced(folder / "starts.json", starts)
        sums = {f"{folder.name}/{path.name}": file_sum(path) for path in sorted(folder.iterdir())}
        _write_synced(new / f"{folder.name}.json", json.dumps(sums))

    def _finish(self, new: Path, number: int, text: str) -> None:
        sums: dict[str, str] = {}
        for path in [new / f"rank-{rank}.json" for rank in range(self.ranks.count)]:
            sums |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        _write_synced(new / STATE, text)
        sums[STATE] = file_sum(new / STATE)
        manifest = {**FORMAT, "run": self.run, "number": number, "ranks": self.ranks.count, "sha256": sums}
        _write_synced(new / MANIFEST, json.dumps({**manifest, "own": _own_sum(manifest)}, indent=1))
        for folder in (*new.glob("rank-*"), new):
            sync(folder)
        os.rename(new, self._at(number))
        sync(self.folder)
        sync(self.folder.parent)  # where its name is, and the record's
        kept = sorted(self._numbers())[-self.keep :]
        for old in self._numbers():
            if old not in kept and not (self.keep_every and old % self.keep_every == 0):
                self._remove(self._at(old))

    def _remove(self, folder: Path) -> None:
        # Under another name first: half removed, it would look damaged.
        gone = folder.with_name(f"{folder.name}.old")
        os.rename(folder, gone)
        shutil.rmtree(gone)

    def _wrong(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, as far as this rank's share of its files tells.

        Raises UserError where one can't be read though it is there: a disk that is out of reach damages nothing.
        """
        try:
            sums = sums_of(folder, self.run)
            for name in sorted(sums)[self.ranks.rank :: self.ranks.count]:
                if file_sum(folder / name) != sums[name]:
                    return f"{name} isn't what was written (its sha256 is another)"
        except Damaged as damaged:
            return str(damaged)
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except OSError as error:
            raise UserError(
                f"checkpoint {folder}",
                found=f"{error.filename} can't be read ({error.strerror})",
                expected="files that can be read",
                change="look at the disk, then give the same command again; nothing was changed",
            ) from error
        return None

    def _open(self, folder: Path, number: int) -> Saved:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        pieces: dict[str, list[tuple[int, TensorInfo]]] = {}
        for rank in range(manifest["ranks"]):
            starts = json.loads((folder / f"rank-{rank}" / "starts.json").read_bytes())
            for shard in sorted((folder / f"rank-{rank}").glob("*.safetensors")):
                for name, info in read_header(shard).items():
                    pieces.setdefault(name, []).append((starts.get(name, 0), info))
        return Saved(folder, number, json.loads((folder / STATE).read_bytes()), pieces)

    def _check_room(self, needed: int, full: Callable[[str], UserError]) -> None:
        def check() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise full(f"{free} bytes free")

        self.ranks.together(lambda: _told(check, full))

    def _full(self, what: str, expected: str, found: str) -> UserError:
        whole = self._numbers()
        last = f"the last checkpoint, {self._at(max(whole))}, is as it was" if whole else "there is no checkpoint yet"
        change = f"free space, choose an --out on another disk, or keep fewer; {last}"
        return UserError(what, found=found, expected=expected, change=change)


class Damaged(ValueError):
    """What a checkpoint's manifest is, other than what was written."""


def sums_of(folder: Path, run: str) -> dict[str, str]:
    """By name the sha256 of each file of a checkpoint that `run` has saved. Raises Damaged, or OSError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if {key: manifest[key] for key in FORMAT} != FORMAT:
            raise Damaged(f"{MANIFEST} is of another format")
        if manifest.pop("own") != _own_sum(manifest):
            raise Damaged(f"{MANIFEST} isn't what was written")
        if manifest["run"] != run:
            raise Damaged("another run saved it")
        return manifest["sha256"]
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is damaged") from error


def state_of(folder: Path, run: str) -> dict[str, Any]:
    """The plain values of a checkpoint that `run` has saved; nothing else is looked at. Raises Damaged, or OSError."""
    expected, found = sums_of(folder, run).get(STATE), (folder / STATE).read_bytes()
    if hashlib.sha256(found).hexdigest() != expected:
        raise Damaged(f"{STATE} isn't what was written")
    return json.loads(found)


def numbers(folder: Path) -> list[int]:
    """Of the checkpoints in a folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [int(match[1]) for match in map(NAME.fullmatch, names) if match]


def _told(work: Callable[[], None], full: Callable[[str], UserError]) -> None:
    """Does some work; of a full disk, wherever it shows, what `full` says of it."""
    try:
        work()
    except DiskFull as error:
        raise full(str(error.found)) from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise full(str(error.strerror)) from error


def _copy_rows(rows: Rows, first: int, info: TensorInfo) -> None:
    """Of a piece that begins at row `first`, what lies among `rows`."""
    if not rows.shape:
        rows.local.copy_(_read(info, 0, 1).reshape(()))
        return
    low = max(first, rows.start)
    high = min(first + info.shape[0], rows.start + len(rows.local))
    if low < high:
        rows.local[low - rows.start : high - rows.start].copy_(_read(info, low - first, high - first))


def _read(info: TensorInfo, low: int, high: int) -> Tensor:
    """Rows low to high of what a file holds."""
    width = DTYPES[info.dtype][0] * math.prod(info.shape[1:])
    raw = torch.empty((high - low) * width, dtype=torch.uint8)
    if len(raw):
        with open(info.shard, "rb") as file:
            file.seek(info.start + low * width)
            count = file.readinto(raw.numpy().data)
        assert count == len(raw), f"{info.shard} has become shorter"
    return raw.view(getattr(torch, DTYPES[info.dtype][1])).reshape(high - low, *info.shape[1:])


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _own_sum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_sum(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
