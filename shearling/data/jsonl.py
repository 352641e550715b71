"""JSON lines: a record a line, plain files in ranges of bytes.

Memory is bounded by some six times the longest line (its chunks, the line, its text, the record, the encoding).
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from shearling.data.document import Document, Reading, fault, of_fields
from shearling.data.files import chunks, compression, is_remote, shown, size_bytes
from shearling.data.plain import decode
from shearling.errors import UserError

SUFFIXES = (".jsonl", ".ndjson")
PART_BYTES = 1 << 25


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """Ranges of PART_BYTES bytes; a compressed file is one, as nothing tells where in it a line starts."""
    if compression(path):
        return [(0, None)]
    size = size_bytes(path)
    starts = range(0, max(size, 1), PART_BYTES)
    return [(start, min(start + PART_BYTES, size) if size else None) for start in starts]


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The documents of the lines that start at bytes `start` to `end`; UserErrors for broken lines.

    A range that starts inside the file names lines by their byte, and in an error by number too where counting them
    costs no download.
    """
    unit = "decompressed byte" if compression(path) else "byte"
    for number, (offset, line) in enumerate(_lines_of(path, start=start, end=end), start=1):
        where = f"{shown(path)}, byte {offset}" if start else f"{shown(path)}, line {number} ({unit} {offset})"
        try:
            text = decode(line, where=where, offset=offset)
            if text.strip():
                yield of_fields(_record(text, where=where), where=where, reading=reading)
        except UserError as error:
            counts = start and not reading.skip_broken and not is_remote(path)
            yield _with_line(error, path=path, offset=offset) if counts else error


def _lines_of(path: str, *, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """The lines that start within a range, each with the byte it starts at."""
    # From the byte before, whose line end tells whether a line starts at `start`.
    offset = max(start - 1, 0)
    found = lines(chunks(path, start=offset))
    if start:
        offset += len(next(found)) + 1
    for line in found:
        if end is not None and offset >= end:
            return
        yield offset, line
        offset += len(line) + 1


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that chunks come to, without their ends."""
    parts: list[bytes] = []
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join((*parts, end))
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def _record(line: str, *, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        # json's own words count lines within this one.
        why = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise fault(where, found=f"broken JSON ({why})", expected='{"text": ...}') from error
    if not isinstance(fields, dict):
        raise fault(where, found=f"a JSON {type(fields).__name__}", expected='an object, {"text": ...}')
    return fields


def _with_line(error: UserError, *, path: str, offset: int) -> UserError:
    before = 0
    position = 0
    for chunk in chunks(path):
        before += chunk[: offset - position].count(b"\n")
        position += len(chunk)
        if position >= offset:
            break
    where = f"{path}, line {before + 1} (byte {offset})"
    return UserError(where, found=error.found, expected=error.expected, change=error.change)
