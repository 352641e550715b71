"""One shard of a split, written: ids, offsets and where needed the loss mask, under their names once they are whole."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from shearling.data.manifest import Dtype, ShardEntry, dtype_of
from shearling.errors import UserError

UNFINISHED = ".part"
ONES_TOKENS = 1 << 20


class ShardWriter:
    """Writes one shard's files into a domain's existing folder, hashing as it goes; a context manager.

    Until `finish` they have names of this process alone. Whoever leaves before that leaves none of them.
    """

    def __init__(self, folder: Path, name: str, *, dtype: Dtype):
        self.documents = self.tokens = self.text_bytes = 0
        self._folder, self._name = folder, name
        self._dtype: Dtype = dtype
        self._files: dict[str, _Hashed] = {}
        self._write("tokens", np.empty(0))
        self._write("offsets", np.zeros(1))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.drop()

    def add(self, ids: np.ndarray, *, text_bytes: int, loss: np.ndarray | None = None) -> None:
        """Appends one document: ids [tokens], its text's UTF-8 bytes, and which tokens' loss counts, uint8 [tokens]."""
        if loss is not None or "loss" in self._files:
            self._add_loss(np.ones(len(ids), "u1") if loss is None else loss)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._write("tokens", ids)
        self._write("offsets", np.array([self.tokens]))

    def finish(self) -> ShardEntry | None:
        """The shard's part of the manifest, its files whole on the disk under their names; None without documents."""
        if self.documents == 0:
            return None
        sums = {kind: file.keep(self._folder / f"{self._name}.{kind}") for kind, file in self._files.items()}
        counts = {name: getattr(self, name) for name in ("documents", "tokens", "text_bytes")}
        return ShardEntry(name=self._name, sums=sums, **counts)

    def _add_loss(self, loss: np.ndarray) -> None:
        if "loss" not in self._files:  # of all documents before the first that has a mask, every token counts
            for start in range(0, self.tokens, ONES_TOKENS):
                self._write("loss", np.ones(min(ONES_TOKENS, self.tokens - start)))
        self._write("loss", loss)

    def _write(self, kind: str, values: np.ndarray) -> None:
        if kind not in self._files:
            self._files[kind] = _Hashed(self._folder / f"{self._name}.{kind}.{os.getpid()}{UNFINISHED}")
        self._files[kind].write(values.astype(dtype_of(kind, self._dtype)).tobytes())


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._path, self._hash = path, hashlib.sha256()
        self._file: IO[bytes] | None = open(path, "wb")  # noqa: SIM115 (keep and drop close)

    def write(self, raw: bytes) -> None:
        assert self._file
        with _room(self._path):
            self._file.write(raw)
        self._hash.update(raw)

    def keep(self, path: Path) -> str:
        assert self._file
        with _room(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._path, path)
        return self._hash.hexdigest()

    def drop(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # what is still to be written doesn't matter any more
                self._file.close()
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            str(path.parent),
            found=f"it can't be written to ({error.strerror})",
            expected="room for the store, 2 or 4 bytes a token",
            change="make room and run the same command again, it goes on where it was",
        ) from error
