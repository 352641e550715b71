"""Mosaic data shards (MDS), as mosaicml-streaming writes them: index.json, and shards of records.

A shard, little-endian: uint32 records N, uint32 [N + 1] the byte each record starts at, and the end; the shard's
settings as JSON; the records. A record: uint32 sizes of the columns that have no fixed one, then the columns. A shard
may be stored compressed as a whole. Written anew from that description; columns of pickles are refused. Memory is
bounded by one shard's offsets and its longest record.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from shearling.data.document import Document, Reading, of_ids, of_text, refuse_messages
from shearling.data.files import chunks, join, look, name, parent, shown
from shearling.errors import UserError

INDEX = "index.json"
TOKENS = "tokens"
NEEDED = ("column_names", "column_encodings", "column_sizes", "samples", "raw_data")
ARRAY_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
MAX_ID = 1 << 31


def is_mds(path: str) -> bool:
    """Whether a place is the index.json of shards."""
    return name(path) == INDEX and look(path) == "file" and _index(path) is not None


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """Each shard, some 64 MB as they are written by default; UserError for columns that can't be read."""
    shards = _shards(path)
    for shard in shards:
        _column(shard, where=shown(path), reading=reading)
    return [(number, number + 1) for number in range(len(shards))]


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The documents of shards `start` to `end`: the ids of a column `tokens`, else the text that `reading` asks for.

    Raises UserError for a column that is pickled, isn't there or holds neither, and for a shard that isn't whole.
    """
    for shard in _shards(path)[start:end]:
        column = _column(shard, where=shown(path), reading=reading)
        file = _file(shard, folder=parent(path))
        for number, values in enumerate(_records(shard, file=file), start=1):
            where = f"{shown(file)}, record {number}"
            try:
                yield _document(values[column], shard, column, where=where, reading=reading)
            except UserError as error:
                yield error


def _index(path: str) -> dict[str, Any] | None:
    return _parse(b"".join(chunks(path)))


# Every part asks for it, and thousands of shards make it large.
@lru_cache(maxsize=4)
def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw)
        formats = {shard["format"] for shard in found["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # some other index.json, a document like any
    return found if formats == {"mds"} else None


def _shards(path: str) -> list[dict[str, Any]]:
    found = _index(path) or {}
    shards = found.get("shards", [])
    versions = {found.get("version"), *(shard.get("version") for shard in shards)}
    if versions != {2}:
        raise UserError(shown(path), found=f"versions {versions}", expected="version 2", change="write it again")
    for shard in shards:
        if missing := [key for key in NEEDED if key not in shard]:
            raise UserError(
                shown(path),
                found=f"a shard without {', '.join(missing)}",
                expected=f"{', '.join(NEEDED)} for each",
                change="write the index again",
            )
        for encoding, column in zip(shard["column_encodings"], shard["column_names"], strict=True):
            if encoding.partition(":")[0] == "pkl":
                raise UserError(
                    shown(path),
                    found=f"the column {column!r} pickled (encoding {encoding!r})",
                    expected="columns that can be read without running code",
                    change="write the shards again without it",
                )
    return shards


def _column(shard: dict[str, Any], *, where: str, reading: Reading) -> int:
    """The number of the column that holds documents."""
    names = shard["column_names"]
    refuse_messages(where, found="MDS", reading=reading)
    wanted = TOKENS if TOKENS in names and reading.text_column == Reading.text_column else reading.text_column
    if wanted not in names:
        raise UserError(
            where,
            found=f"no column {wanted!r} among {', '.join(names)}",
            expected=f"a column {TOKENS!r} of ids, or one of text",
            change=f"name the column with {reading.option}",
        )
    encoding = shard["column_encodings"][names.index(wanted)]
    if encoding not in ("str", "bytes") and encoding.partition(":")[0] != "ndarray":
        raise UserError(
            where,
            found=f"the column {wanted!r} encoded as {encoding!r}",
            expected="str, bytes or ndarray",
            change=f"name a column of documents with {reading.option}",
        )
    return names.index(wanted)


def _document(raw: bytes, shard: dict[str, Any], column: int, *, where: str, reading: Reading) -> Document:
    named, encoding = shard["column_names"][column], shard["column_encodings"][column]
    if encoding == "str":
        return of_text(_text(raw, where=where), where=where, column=named)
    try:
        ids = np.frombuffer(raw, reading.tokens_dtype) if encoding == "bytes" else _array(raw, encoding)
    except (ValueError, KeyError, IndexError) as error:
        found = f"{len(raw)} bytes in {named!r} that are no ids ({error})"
        expected = f"{reading.tokens_dtype if encoding == 'bytes' else encoding}"
        raise UserError(where, found=found, expected=expected, change="check --tokens-dtype") from error
    if encoding == "bytes" and len(ids) and (ids.max() >= MAX_ID or ids.min() < 0):
        raise UserError(
            where,
            found=f"ids from {ids.min()} to {ids.max()} when read as {reading.tokens_dtype}",
            expected="token ids",
            change="name the type they were written as with --tokens-dtype",
        )
    return of_ids(ids, where=where)


def _text(raw: bytes, *, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at byte {error.start} of the text, which is not UTF-8"
        raise UserError(where, found=found, expected="UTF-8", change="mend the record or remove it") from error


def _array(raw: bytes, encoding: str) -> np.ndarray:
    """The values, flattened, of an array `ndarray[:dtype[:shape]]`: what isn't in its encoding comes before them."""
    _, *settings = encoding.split(":")
    at = 0
    if settings:
        dtype = np.dtype(settings[0]).newbyteorder("<")
    else:
        dtype, at = np.dtype(ARRAY_TYPES[raw[0]]), 1
    if dtype.kind not in "iu":
        raise ValueError(f"{dtype.name} holds no ids")
    if len(settings) < 2:
        axes, width = raw[at] >> 2, 1 << (raw[at] & 3)
        shape = np.frombuffer(raw[at + 1 : at + 1 + axes * width], f"<u{width}")
        at += 1 + axes * width
    else:
        shape = np.array(settings[1].split(","), dtype=np.int64)
    values = np.frombuffer(raw[at:], dtype)
    if len(values) != shape.prod():
        raise ValueError(f"{len(values)} values for the shape {shape.tolist()}")
    return values


def _file(shard: dict[str, Any], *, folder: str) -> str:
    """The shard's file, as it is or compressed."""
    raw = join(folder, shard["raw_data"]["basename"])
    if look(raw):
        return raw
    zipped = shard.get("zip_data")
    if not zipped:
        raise UserError(shown(raw), found="no such file", expected="a shard that index.json names", change="fetch it")
    kind = (shard.get("compression") or "").partition(":")[0]
    if kind not in ("zstd", "gz"):
        found = f"compression {kind!r}"
        raise UserError(shown(folder), found=found, expected="zstd or gz", change="write it again, or decompress it")
    return join(folder, zipped["basename"])


@dataclass
class _Stream:
    """Exact numbers of bytes out of a file's chunks."""

    file: str
    rest: Iterator[bytes]
    kept: bytes = b""
    position: int = 0

    def take(self, count: int) -> bytes:
        parts, missing = [], count
        while missing:
            self.kept = self.kept or next(self.rest, b"")
            if not self.kept:
                raise _cut_short(self.file, found=f"the end at byte {self.position}, where {missing} more belong")
            parts.append(self.kept[:missing])
            self.kept = self.kept[missing:]
            missing -= len(parts[-1])
            self.position += len(parts[-1])
        return b"".join(parts)


def _records(shard: dict[str, Any], *, file: str) -> Iterator[list[bytes]]:
    """The columns of each record, as stored."""
    stream = _Stream(file, chunks(file))
    count = int.from_bytes(stream.take(4), "little")
    if count != shard["samples"]:
        raise _cut_short(file, found=f"{count} records, where index.json names {shard['samples']}")
    offsets = np.frombuffer(stream.take(4 * (count + 1)), "<u4").astype(np.int64)
    if offsets[0] < stream.position or (np.diff(offsets) < 0).any():
        raise _cut_short(file, found="records that start before one another")
    stream.take(int(offsets[0]) - stream.position)
    for size in np.diff(offsets):
        yield _split(stream.take(int(size)), shard["column_sizes"], file=file)
    if stream.kept or next(stream.rest, b""):
        raise _cut_short(file, found=f"more bytes after the last record's end at {stream.position}")


def _split(raw: bytes, fixed: list[int | None], *, file: str) -> list[bytes]:
    unknown = sum(not size for size in fixed)
    given = iter(np.frombuffer(raw[: 4 * unknown], "<u4").tolist())
    sizes = [size or next(given, 0) for size in fixed]
    if 4 * unknown + sum(sizes) != len(raw):
        raise _cut_short(file, found=f"a record of {len(raw)} bytes, where its columns take {4 * unknown + sum(sizes)}")
    ends = np.cumsum([4 * unknown, *sizes]).tolist()
    return [raw[start:end] for start, end in pairwise(ends)]


def _cut_short(file: str, *, found: str) -> UserError:
    return UserError(shown(file), found=found, expected="a whole MDS shard", change="fetch or write it again")
