"""A store's files: in a local folder, memory-mapped, or at an address of fsspec's, read by ranges, kept in blocks."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from shearling.errors import UserError

# A window of 2,048 ids is 4 or 8 KiB: what comes along in a block costs less than a second request.
BLOCK_BYTES = 1 << 18
CACHE_BYTES = 1 << 28  # of blocks from afar, in memory, for each store that is open
OPEN_MAPS = 4096  # Linux gives a process 65,530 in all
DIGEST_BYTES = 1 << 24

Kept = TypeVar("Kept")


class Files(Protocol):
    """The files of one store, by names relative to it. All of it may be called from any number of threads."""

    def address(self, name: str) -> str:
        """The whole name of a file, for messages."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError, and UserError for what can't be read otherwise."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """The files of a folder and their bytes; none of a folder that isn't there."""
        ...

    def array(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """The values `start` to `stop` of a file, read-only."""
        ...

    def digest(self, name: str) -> str:
        """The sha256 of a whole file."""
        ...


def files_at(folder: Path | str) -> Files:
    """The files of a local folder or of an address, s3://bucket/store. Raises UserError for what fsspec can't read."""
    if "://" not in str(folder):
        return LocalFiles(Path(folder).expanduser())
    return RemoteFiles(str(folder))


class Recent:
    """The values used last, at most `limit` of their cost in all; asked by many threads."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._values: OrderedDict[object, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], Kept], *, cost: int = 1) -> Kept:
        """The value of `key`, made if it isn't held. Two threads may make it at once: neither waits for the other."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value, cost
                self.held += cost
            while self.held > self.limit:
                self.held -= self._values.popitem(last=False)[1][1]
        return value


class LocalFiles:
    """A folder of this machine; values are views of memory maps."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._maps = Recent(OPEN_MAPS)

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(str(error)) from error
        except OSError as error:
            raise _unreadable(self.address(name), error) from error

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self._folder / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise _unreadable(self.address(folder), error) from error

    def array(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        try:
            whole = self._maps.get(name, lambda: np.memmap(self._folder / name, dtype=dtype, mode="r"))
        except (OSError, ValueError) as error:
            raise _unreadable(self.address(name), error) from error
        if len(whole) < stop:
            raise _too_short(self.address(name), len(whole) * dtype.itemsize, stop * dtype.itemsize)
        return whole[start:stop]

    def digest(self, name: str) -> str:
        try:
            with open(self._folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(self.address(name), error) from error


class RemoteFiles:
    """An address of fsspec's. Ranges come in blocks, of which the last CACHE_BYTES are kept in memory."""

    def __init__(self, address: str):
        self._root = address.rstrip("/")
        self._blocks = Recent(CACHE_BYTES)
        self._sizes: dict[str, int] = {}
        from shearling.data.files import open_filesystem, shown  # fsspec only for who needs it

        self._system, self._path = open_filesystem(self._root)
        self._shown = shown(self._root)

    def address(self, name: str) -> str:
        return f"{self._shown}/{name}"

    def read(self, name: str) -> bytes:
        return self._ask(name, lambda path: self._system.cat_file(path))

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            listed = self._ask(folder, lambda path: self._system.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed if entry["type"] == "file"}
        self._sizes |= {f"{folder}/{name}": size for name, size in found.items()}
        return found

    def array(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        first, last = start * dtype.itemsize, stop * dtype.itemsize
        size = self._sizes[name]
        if size < last:
            raise _too_short(self.address(name), size, last)
        blocks = range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
        raw = b"".join(self._block(name, number, size) for number in blocks)
        skipped = first - blocks.start * BLOCK_BYTES
        return np.frombuffer(raw, dtype, count=stop - start, offset=skipped)

    def digest(self, name: str) -> str:
        hashed = hashlib.sha256()
        for raw in self._chunks(name, self._sizes[name]):
            hashed.update(raw)
        return hashed.hexdigest()

    def _block(self, name: str, number: int, size: int) -> bytes:
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, size)
        return self._blocks.get((name, number), lambda: self._range(name, start, end), cost=end - start)

    def _chunks(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, DIGEST_BYTES):
            yield self._range(name, start, min(start + DIGEST_BYTES, size))

    def _range(self, name: str, start: int, end: int) -> bytes:
        try:
            raw = self._ask(name, lambda path: self._system.cat_file(path, start=start, end=end))
        except FileNotFoundError as error:
            raise _unreadable(self.address(name), error) from error
        if len(raw) != end - start:
            raise _too_short(self.address(name), start + len(raw), end)
        return raw

    def _ask(self, name: str, what: Callable[[str], Any]) -> Any:
        from shearling.data.files import storage

        with storage(self.address(name)):
            try:
                return what(f"{self._path}/{name}")
            except FileNotFoundError as error:
                missing = error
        raise missing


def _unreadable(address: str, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    found, change = (
        f"it can't be read ({type(error).__name__}: {why})",
        "check the address, the rights to it and the way there",
    )
    return UserError(address, found=found, expected="a file of a token store", change=change)


def _too_short(address: str, found: int, expected: int) -> UserError:
    change = "copy the store again, or prepare the data again"
    return UserError(address, found=f"{found} bytes", expected=f"at least {expected} bytes", change=change)
