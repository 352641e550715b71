"""Documents from wherever they are: found as domains, cut into parts that processes read on their own, read.

Everything streams; each reader says what its memory is bounded by.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shearling.data import hub, jsonl, mds, megatron, parquet, plain, records
from shearling.data.document import Document, Reading
from shearling.data.domains import Domain, Input, find_domains
from shearling.data.files import place, suffix
from shearling.errors import UserError

__all__ = ["Document", "Domain", "Input", "Part", "Reading", "find_domains", "parts", "read"]

Broken = Callable[[UserError], None]


@dataclass(frozen=True)
class Part:
    """A piece of a domain's source that is read on its own: all of it, or a range, `end` left out.

    A range counts bytes of JSON lines, row groups of Parquet, documents of Megatron, shards of MDS and of streamed
    datasets, rows of saved ones.
    """

    path: str | Path
    start: int = 0
    end: int | None = None


class _Reader(Protocol):
    def ranges(self, path: str, *, reading: Reading) -> list[tuple[int, int | None]]: ...

    def documents(
        self, path: str, *, start: int, end: int | None, reading: Reading
    ) -> Iterator[Document | UserError]: ...


DEFAULT = Reading()


def parts(path: str | Path, *, reading: Reading = DEFAULT) -> list[Part]:
    """The pieces of one source that can be read by processes of their own, in order.

    Pieces are of some 32 MB where the format allows it. Raises UserError for what can't be opened, for a table without
    the column that `reading` asks for, and for lists and spreadsheets that have it.
    """
    source = place(path)
    return [Part(source, start, end) for start, end in _reader(source, reading).ranges(source, reading=reading)]


def read(part: Part, *, reading: Reading = DEFAULT, broken: Broken | None = None) -> Iterator[Document]:
    """The documents of one part in order, empty ones included.

    JSON lines hold one document a line (blank lines are passed over), tables one a row; a file of any other kind is
    one document. A UTF-8 BOM at the start of a text file is dropped.
    Raises UserError for what can't be read, naming the file and the line, byte, row or document. With
    `reading.skip_broken` a broken record goes to `broken` instead, to be counted, and reading goes on.
    """
    source = place(part.path)
    for found in _reader(source, reading).documents(source, start=part.start, end=part.end, reading=reading):
        if isinstance(found, Document):
            yield found
        elif not reading.skip_broken:
            raise found
        elif broken:
            broken(found)


def _reader(path: str, reading: Reading) -> _Reader:
    if hub.is_dataset(path):
        return hub
    if mds.is_mds(path):  # an index.json
        return mds
    if suffix(path) in jsonl.SUFFIXES:
        return jsonl
    if suffix(path) in records.SUFFIXES:
        return jsonl if records.are_lines(path, reading=reading) else plain
    if path.lower().endswith(".parquet"):
        return parquet
    if megatron.is_megatron(path):
        return megatron
    return plain
