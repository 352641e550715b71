"""The record of a run: one JSON object a line, appended as things happen."""

import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from shearling import __version__
from shearling.errors import FULL_DISK, UserError

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy")


class Record:
    """An append-only file of JSON lines, ordered by line: a clock may be set back, so times only inform."""

    def __init__(self, path: Path):
        """Opens or starts the record at `path`; its folder has to exist. Raises UserError where it can't be written."""
        self.path = Path(path)
        try:
            with open(self.path, "ab+") as file:
                _drop_torn_line(file)
        except OSError as error:
            raise UserError(
                f"record {self.path}",
                found=error.strerror,
                expected="a file that can be written, in a folder that exists",
                change="choose another place or mend its permissions",
            ) from error

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return os.stat(self.path).st_size

    def cut(self, nbytes: int) -> None:
        """Forgets what was written after it was so long. Where it is shorter it stays as it is, and says so itself."""
        found = self.nbytes
        if found >= nbytes:
            os.truncate(self.path, nbytes)
            return
        log.warning("record %s has lost lines: %d bytes of %d are there", self.path, found, nbytes)
        self.write("record_cut_short", found_bytes=found, expected_bytes=nbytes)

    def sync(self) -> None:
        """Has what was written so far on the disk. Raises UserError where that is full."""
        with self._room_for_lines(), open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def write(self, event: str, /, **fields: object) -> None:
        """Appends one event, with its time (UTC, ISO 8601), and hands it to the operating system before returning.

        NaN and infinities become the strings "nan", "inf", "-inf", which JSON has no numbers for. Raises UserError
        where the disk is full.
        """
        assert not {"event", "time"} & fields.keys(), "the record sets `event` and `time` itself"
        entry = {"event": event, "time": datetime.now(UTC).isoformat(), **fields}
        line = json.dumps(_plain(entry), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        # Opened anew for each line: nothing to close, and a line is whole or, after a full disk, absent.
        with self._room_for_lines(), open(self.path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    @contextmanager
    def _room_for_lines(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise UserError(
                f"record {self.path}",
                found=error.strerror,
                expected="room for its lines",
                change="free space on this disk: the same command goes on from the last checkpoint",
            ) from error


class Unwritten(Record):
    """The record of a rank whose story another one tells."""

    def __init__(self) -> None:
        """Of no file."""

    @property
    def nbytes(self) -> int:
        return 0

    def cut(self, nbytes: int) -> None:
        """Nothing is there."""

    def sync(self) -> None:
        """Nothing is to be there."""

    def write(self, event: str, /, **fields: object) -> None:
        """Nothing is kept."""


def read(path: Path) -> list[dict]:
    """The events of a record, in order. A last line without its line feed was cut off by a kill and isn't an event.

    Raises UserError for a missing file or a broken line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(
            f"record {path}",
            found=error.strerror,
            expected="a record.jsonl that a run wrote",
            change="give the folder of a run",
        ) from error
    return [_event(path, number, line) for number, line in enumerate(lines, start=1)]


def versions() -> dict[str, str]:
    """What results may depend on: Python, platform, Shearling and its packages; an absent package is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "shearling": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _event(path: Path, number: int, line: bytes) -> dict:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise UserError(
            f"record {path}, line {number}",
            found=repr(line[:60].decode(errors="replace")),
            expected="a JSON object",
            change="remove the line if it was edited by hand; otherwise the file is damaged",
        )
    return entry


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in value]
    return value


def _drop_torn_line(file) -> None:
    # A process killed while it wrote leaves half a line, and the next event would be glued to it.
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 4096)
        file.seek(start)
        feed = file.read(position - start).rfind(b"\n")
        if feed >= 0:
            position = start + feed + 1
            break
        position = start
    if position < end:
        file.truncate(position)
