"""What documents are read from: parts of sources, whether these stay as they are, whether they were here before."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shearling.data import hub, megatron
from shearling.data.document import Reading
from shearling.data.documents import Part, parts
from shearling.data.files import children, is_remote, look, opened, place, shown, size_bytes, version
from shearling.errors import UserError

SAMPLES, SAMPLE_BYTES = 4, 1 << 16  # from afar each sample is a block of some megabytes
STREAMED_BYTES = 1 << 25  # what a shard of a streamed dataset is taken for, as its size isn't known


@dataclass(frozen=True)
class Source:
    """A part of a source, its share of the source's bytes, and the version that the source had when it was listed."""

    part: Part
    num_bytes: int
    version: str


def sources_of(paths: Iterable[str], reading: Reading) -> Iterator[Source]:
    """The parts of sources in order. Raises UserError for one that can't be looked at."""
    for path in paths:
        found, before = parts(path, reading=reading), _version(path)
        total = sum(size_bytes(file) for file in _files(path))
        size = total // max(len(found), 1) or STREAMED_BYTES * hub.is_dataset(path)
        yield from (Source(part, size, before) for part in found)


def check_unchanged(sources: Iterable[Source]) -> None:
    """Raises UserError for a source that is no longer as it was when it was listed."""
    for path, before in {str(source.part.path): source.version for source in sources}.items():
        if _version(path) != before:
            raise UserError(
                shown(path),
                found="another size or time of change than when the preparation started",
                expected="files that stay as they are while they are read",
                change="run the same command again; what is finished of other files is kept",
            )


def fingerprint(path: str) -> str:
    """16 hex digits of a source: of each file's size and SAMPLES blocks spread evenly over it, first and last included.

    The same for a copy under another name, and for files alike in all of that though different in between. Datasets by
    name are their names. Raises UserError for what can't be read.
    """
    hashed = hashlib.blake2b(path.encode() if hub.is_dataset(path) else b"", digest_size=8)
    for file_path in _files(path):
        size = size_bytes(file_path)
        last = max(0, size - SAMPLE_BYTES)
        hashed.update(str(size).encode())
        with opened(file_path) as file:
            for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                file.seek(start)
                hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()


def is_local(path: str) -> bool:
    """Whether it lies on this machine, whatever it is."""
    return not is_remote(place(path)) and not (hub.is_dataset(path) and hub.folder_of(path) is None)


def holds_bytes(path: str) -> bool:
    """Whether any of its files does; an empty one is no source of anything."""
    return any(size_bytes(file) for file in _files(path))


def _version(path: str) -> str:
    versions = "\n".join(version(file) for file in _files(path))
    return hashlib.blake2b(versions.encode(), digest_size=16).hexdigest()


def _files(path: str) -> Iterator[str]:
    """Every file of a source; none of a dataset by name."""
    path = place(path)
    if hub.is_dataset(path):
        folder = hub.folder_of(path)
        yield from _files(folder) if folder else ()
        return
    if look(path) == "folder":
        for child in children(path):
            yield from _files(child)
        return
    yield path
    if megatron.is_megatron(path):
        yield megatron.index_path(path)
