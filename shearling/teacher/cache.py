"""What a teacher said of a store's train windows, on disk: written once, by whoever comes to a window first.

manifest.json          what it is of: see Manifest
DOMAIN/records         for each window seq_len records, one a next token; room for all, taken up as they come
DOMAIN/sums            little-endian uint32 [windows]: crc32 of a window's records, 0 where they aren't there

A window is named by its domain and number, so any run over the same store and seq_len reads what another wrote, in any
order and on any number of ranks. A sum is written after its records; where a crash left other bytes than it says, or
two ranks wrote at once, the window counts as not there and is asked for again.
"""

import json
import os
import socket
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from shearling.errors import UserError, raise_all
from shearling.stage import check_place
from shearling.teacher.options import KindName
from shearling.teacher.sparse import KINDS, Kind

MANIFEST = "manifest.json"
SUMS = np.dtype("<u4")
ELSEWHERE = "name another folder, or mend what is in the way"


class Manifest(BaseModel):
    """What manifest.json holds: all that records depend on. `windows` by domain, in one reading of it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    format: Literal["shearling-teacher"] = "shearling-teacher"
    version: Literal[1] = 1
    kind: KindName
    k: PositiveInt
    seed: int
    seq_len: PositiveInt
    separate: bool  # documents kept apart in attention
    vocab_size: PositiveInt
    store: str  # digest
    teacher: str  # fingerprint
    weights: str  # dtype and form that the teacher was run in
    windows: dict[str, PositiveInt]

    @property
    def records_of(self) -> Kind:
        return KINDS[self.kind](self.k)


class Cache:
    """The records of one teacher over one store."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.kind = manifest.records_of
        self.record = self.kind.record(manifest.vocab_size)
        self._maps: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> "Cache":
        """The cache in `folder`, made where there is none.

        Raises UserError for one of something else or broken, and for a folder that can't be written.
        """
        path, cache = folder / MANIFEST, cls(folder, manifest)
        try:
            if not path.is_file():
                _start(folder, manifest)
            _check(path, manifest)
            cache._make_room()
        except OSError as error:
            found, expected = f"it can't be written ({error.strerror})", "a folder that you may write to"
            raise UserError(f"teacher's cache {folder}", found=found, expected=expected, change=ELSEWHERE) from error
        return cache

    @staticmethod
    def check(folder: Path, manifest: Manifest) -> None:
        """Raises UserError for what `open` would refuse by a manifest or by the place; makes nothing."""
        check_place(folder / MANIFEST, what=f"teacher's cache {folder}", change=ELSEWHERE)
        if (folder / MANIFEST).is_file():
            _check(folder / MANIFEST, manifest)

    def read(self, domain: str, window: int) -> np.ndarray | None:
        """A window's records [seq_len], None where they aren't there whole."""
        records, sums = self._map(domain)
        found = np.array(records[window])
        return found if sums[window] != 0 and sums[window] == _sum(found) else None

    def write(self, domain: str, window: int, records: np.ndarray) -> None:
        """Writes a window's records [seq_len]."""
        assert records.shape == (self.manifest.seq_len,)
        assert records.dtype == self.record
        # pwrite and not the maps: two nodes that share a page of a network file would undo each other's.
        _write_at(self._path(domain, "records"), records.tobytes(), at=window * records.nbytes)
        _write_at(self._path(domain, "sums"), SUMS.type(_sum(records)).tobytes(), at=window * SUMS.itemsize)

    def written(self) -> dict[str, int]:
        """Windows that are there, by domain, by their sums."""
        return {domain: int((self._map(domain)[1] != 0).sum()) for domain in self.manifest.windows}

    def nbytes(self) -> int:
        """What all windows together take."""
        per_window = self.manifest.seq_len * self.record.itemsize + SUMS.itemsize
        return per_window * sum(self.manifest.windows.values())

    def _path(self, domain: str, name: str) -> Path:
        return self.folder / domain / name

    def _sizes(self, windows: int) -> dict[str, int]:
        return {"records": windows * self.manifest.seq_len * self.record.itemsize, "sums": windows * SUMS.itemsize}

    def _make_room(self) -> None:
        errors = []
        for domain, windows in self.manifest.windows.items():
            (self.folder / domain).mkdir(exist_ok=True)
            for name, size in self._sizes(windows).items():
                path = self._path(domain, name)
                with open(path, "ab") as file:
                    if file.tell() == 0:
                        file.truncate(size)
                if (found := path.stat().st_size) != size:
                    change = "delete the folder, it will be written again"
                    errors.append(UserError(str(path), found=f"{found} bytes", expected=f"{size} bytes", change=change))
        raise_all(errors)

    def _map(self, domain: str) -> tuple[np.ndarray, np.ndarray]:
        if domain not in self._maps:
            windows = self.manifest.windows[domain]
            shape = (windows, self.manifest.seq_len)
            records = np.memmap(self._path(domain, "records"), dtype=self.record, mode="r", shape=shape)
            sums = np.memmap(self._path(domain, "sums"), dtype=SUMS, mode="r", shape=(windows,))
            self._maps[domain] = records, sums
        return self._maps[domain]


def _start(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a new cache. Ranks may do so at once: each renames a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(MANIFEST))
    if others and not (folder / MANIFEST).is_file():  # else they are of a rank that was sooner, since `open` looked
        raise UserError(str(folder), found=others[0], expected="a teacher's cache", change="name a new folder")
    own = folder / f"{MANIFEST}.{socket.gethostname()}.{os.getpid()}"
    own.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    own.replace(folder / MANIFEST)


def _check(path: Path, expected: Manifest) -> None:
    change = "name another folder, or delete this one: it will be written again"
    try:
        found = Manifest.model_validate(json.loads(path.read_bytes())).model_dump()
    except (OSError, ValueError) as error:
        found = f"a broken manifest ({error})"
        raise UserError(str(path), found=found, expected="a teacher's", change=change) from error
    raise_all(
        [
            UserError(f"{path}, {name}", found=found[name], expected=value, change=change)
            for name, value in expected.model_dump().items()
            if found[name] != value
        ]
    )


def _sum(records: np.ndarray) -> int:
    return zlib.crc32(records.tobytes()) or 1  # 0 says that there are none


def _write_at(path: Path, raw: bytes, *, at: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        written = os.pwrite(descriptor, raw, at)
        assert written == len(raw)
    finally:
        os.close(descriptor)
