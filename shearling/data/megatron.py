"""Megatron's indexed datasets: ids in a .bin, sequences and documents in the .idx beside it.

.idx, little-endian: "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' type, uint64 sequences S, uint64
boundaries D; int32 [S] tokens of each sequence, int64 [S] the byte each starts at in the .bin, int64 [D] the sequence
each document starts with, and S at the end. Written anew from that description. Memory is bounded by one part's
documents' entries and the longest document.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from shearling.data.document import Document, Reading, of_ids, refuse_messages
from shearling.data.files import look, opened, shown, size_bytes
from shearling.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = {6: "float64", 7: "float32"}  # in the oldest writers the other way round; neither holds ids
PART_BYTES = 1 << 25


def is_megatron(path: str) -> bool:
    """Whether it is a .bin with an .idx beside it."""
    return path.endswith(".bin") and look(index_path(path)) == "file"


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """Ranges of documents, of some PART_BYTES bytes each."""
    index, _ = _index(path)
    count = max(1, index.documents * PART_BYTES // max(size_bytes(path), 1))
    return [(start, min(start + count, index.documents)) for start in range(0, index.documents, count)]


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The ids of documents `start` to `end`, the sequences of each after one another.

    Raises UserError for an index of another format or version, for ids that are no integers, and for files that don't
    fit each other or were cut short.
    """
    refuse_messages(shown(path), found="token ids", reading=reading)
    index, size = _index(path)
    last = index.documents if end is None else end
    if last <= start:
        return
    with opened(index_path(path)) as file:
        firsts = index.read(file, "documents", start, last + 1)
        if (np.diff(firsts) < 0).any() or firsts[0] < 0 or firsts[-1] > index.sequences:
            raise _broken(index_path(path), found="documents that end before they start or after the last sequence")
        first = int(firsts[0])
        lengths = index.read(file, "lengths", first, int(firsts[-1]))
        pointers = index.read(file, "pointers", first, int(firsts[-1]))
    ends = pointers + lengths.astype(np.int64) * index.dtype.itemsize
    if len(ends) and (lengths.min() < 0 or pointers.min() < 0):
        raise _broken(index_path(path), found="a sequence of negative length or place")
    if len(ends) and ends.max() > size:
        raise _broken(path, found=f"{size} bytes, where {shown(index_path(path))} names {ends.max()}")
    with opened(path) as file:
        for number in range(start, last):
            sequences = range(int(firsts[number - start]) - first, int(firsts[number - start + 1]) - first)
            ids = [_ids(file, int(pointers[at]), int(lengths[at]), index.dtype, path=path) for at in sequences]
            whole = np.concatenate(ids) if ids else np.empty(0, index.dtype)
            yield of_ids(whole, where=f"{shown(path)}, document {number + 1}")


@dataclass(frozen=True)
class _Index:
    path: str
    dtype: np.dtype
    sequences: int
    boundaries: int

    @property
    def documents(self) -> int:
        return max(self.boundaries - 1, 0)

    @property
    def size_bytes(self) -> int:
        return HEADER.size + 12 * self.sequences + 8 * self.boundaries

    def read(self, file: BinaryIO, what: str, start: int, end: int) -> np.ndarray:
        """Entries `start` to `end` of one of the three tables."""
        pointers = HEADER.size + 4 * self.sequences
        at, kind = {
            "lengths": (HEADER.size, "<i4"),
            "pointers": (pointers, "<i8"),
            "documents": (pointers + 8 * self.sequences, "<i8"),
        }[what]
        size = np.dtype(kind).itemsize
        file.seek(at + start * size)
        raw = file.read((end - start) * size)
        if len(raw) != (end - start) * size:
            raise _broken(self.path, found="fewer bytes than a moment ago")
        return np.frombuffer(raw, kind)


def _index(path: str) -> tuple[_Index, int]:
    """The index of a .bin, checked as a whole, and the size of the .bin."""
    place = index_path(path)
    with opened(place) as file:
        raw = file.read(HEADER.size)
    if not raw.startswith(MAGIC[: len(raw)]):
        raise UserError(
            shown(place),
            found=f"a file that starts with {raw[:9]!r}",
            expected=f"an index that starts with {MAGIC!r}",
            change="write the dataset with Megatron's mmap format, or rename the .bin if it is none",
        )
    if len(raw) < HEADER.size:
        raise _broken(place, found=f"{len(raw)} bytes")
    _, version, code, sequences, boundaries = HEADER.unpack(raw)
    if version != 1:
        raise UserError(shown(place), found=f"version {version}", expected="version 1", change="convert the dataset")
    if code not in TYPES:
        kind = f"ids of type {FLOATS[code]}" if code in FLOATS else f"a type of ids with the code {code}"
        raise UserError(
            shown(place), found=kind, expected=f"integers, one of the codes {list(TYPES)}", change="write it again"
        )
    index = _Index(place, np.dtype(TYPES[code]), sequences, boundaries)
    if (there := size_bytes(place)) < index.size_bytes:  # modes of sequences may follow
        found = f"{there} bytes, where {sequences} sequences and {boundaries} boundaries take {index.size_bytes}"
        raise _broken(place, found=found)
    return index, size_bytes(path)


def _ids(file: BinaryIO, at: int, length: int, dtype: np.dtype, *, path: str) -> np.ndarray:
    file.seek(at)
    raw = file.read(length * dtype.itemsize)
    if len(raw) < length * dtype.itemsize:
        raise _broken(path, found=f"no {length} ids at byte {at}")
    return np.frombuffer(raw, dtype)


def index_path(path: str) -> str:
    """The .idx that belongs to a .bin."""
    return f"{path.removesuffix('.bin')}.idx"


def _broken(path: str, *, found: str) -> UserError:
    expected = "the whole .bin and .idx of a Megatron dataset"
    return UserError(shown(path), found=found, expected=expected, change="fetch or write both again")
