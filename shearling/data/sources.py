"""What documents are read from: parts of files, whether these stay as they were, and whether they were here before."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shearling.data.documents import Part, parts
from shearling.errors import UserError

SAMPLES, SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Source:
    """A part of a file, and the file's size in bytes and time of change in nanoseconds when the job was planned."""

    part: Part
    file_bytes: int
    changed_ns: int

    @property
    def num_bytes(self) -> int:
        """Of the part alone."""
        end = self.file_bytes if self.part.end is None else self.part.end
        return end - self.part.start


def sources_of(files: Iterable[Path]) -> Iterator[Source]:
    """The parts of files in order. Raises UserError for a file that can't be looked at."""
    for path in files:
        file_bytes, changed_ns = _state(path)
        yield from (Source(part, file_bytes, changed_ns) for part in parts(path))


def check_unchanged(sources: Iterable[Source]) -> None:
    """Raises UserError for a file that is no longer as it was when the sources were listed."""
    for path, state in {source.part.path: (source.file_bytes, source.changed_ns) for source in sources}.items():
        if _state(path) != state:
            raise UserError(
                str(path),
                found="another size or time of change than when the preparation started",
                expected="files that stay as they are while they are read",
                change="run the same command again; what is finished of other files is kept",
            )


def fingerprint(path: Path) -> str:
    """16 hex digits of a file's size and of SAMPLES blocks spread evenly over it, the first and the last among them.

    The same for a copy under another name. Files alike in all of that, and different in between, it takes for one.
    """
    hashed = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            hashed.update(str(size).encode())
            last = max(0, size - SAMPLE_BYTES)
            for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                file.seek(start)
                hashed.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    return hashed.hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> UserError:
    found = f"it can't be read ({error.strerror or error})"
    return UserError(str(path), found=found, expected="a readable file", change="check the file and its permissions")
