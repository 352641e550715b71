"""Documents from files: JSON lines and plain text, compressed or not, gathered into domains.

Everything streams: memory is bounded by the longest line of a JSON-lines file and by the longest file of plain text.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from shearling.data.store import name_error
from shearling.errors import UserError, raise_all

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
# Only data files name splits: `train.py` in a folder of code is a document like any other.
SPLIT_SUFFIXES = (*JSON_LINES, ".txt")
SPLIT_NAME = re.compile(r"(train|eval)([-_.0-9].*)?")
BOM = b"\xef\xbb\xbf"
READ_BYTES = 1 << 16
# What `zstd --long=31` writes; the library's own limit refuses windows over 128 MB.
ZSTD_WINDOW_BYTES = 1 << 31


@dataclass(frozen=True)
class Document:
    """One text, its length in UTF-8 bytes, and where it is from (file, line), for messages."""

    text: str
    num_bytes: int
    where: str


@dataclass(frozen=True)
class Part:
    """A piece of a domain's files that is read on its own: a file, or the bytes `start` to `end` of one."""

    path: Path
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Domain:
    """A domain's files by split; an empty `eval` means that documents of `train` are to be held out."""

    name: str
    path: Path
    train: tuple[Path, ...]
    eval: tuple[Path, ...] = ()


def find_domains(inputs: Sequence[Path]) -> tuple[Domain, ...]:
    """The domains of files and folders, in the order given, a folder's in alphabetical order.

    A file is a domain named after its stem. A folder is one domain, or one for each of its folders when it has some.
    Inside a domain, data files named train*/eval* or folders train/ and eval/ are its splits. Hidden files are skipped.
    Raises UserError for a path that isn't there, an empty domain, loose files beside domains or splits, a domain name
    that can't name a folder, and a name that two inputs share.
    """
    if not inputs:
        raise UserError("inputs", found="none", expected="files or folders of documents", change="name at least one")
    found, errors = [], []
    for path in inputs:
        try:
            found += _domains_of(Path(path))
        except UserError as error:
            errors.append(error)
    seen: dict[str, Path] = {}
    for domain in found:
        if error := name_error(domain.name, where=str(domain.path)):
            errors.append(error)
        if domain.name in seen:
            errors.append(
                UserError(
                    f"domain {domain.name!r}",
                    found=f"two inputs of that name, {seen[domain.name]} and {domain.path}",
                    expected="one input for each domain",
                    change="rename one, or put both into one folder",
                )
            )
        seen.setdefault(domain.name, domain.path)
    raise_all(errors)
    return tuple(found)


def parts(path: Path) -> list[Part]:
    """The pieces of one file that can be read by processes of their own, in order."""
    return [Part(path)]


def read(part: Part) -> Iterator[Document]:
    """The documents of one part in order, empty ones included; a UTF-8 BOM at the start is dropped.

    JSON lines hold one document a line under "text" (blank lines are passed over); any other file is one document.
    Raises UserError for what can't be read, naming the file, the line and its first byte's offset (decompressed).
    """
    if _suffix(part.path) in JSON_LINES:
        yield from _json_lines(part.path)
    else:
        yield _plain(part.path)


def _domains_of(path: Path) -> list[Domain]:
    if not path.exists():
        raise UserError(str(path), found="no such file or folder", expected="documents", change="check the path")
    name = Path(os.path.abspath(path)).name  # not resolve(): a link is named as the user named it
    if not path.is_dir():
        return [Domain(_stem(Path(name)), path, (path,))]
    children = _children(path)
    folders = [child for child in children if child.is_dir()]
    if all(_split_of(folder) for folder in folders):
        return [_domain(path, name=name)]
    if loose := [child.name for child in children if child not in folders]:
        raise UserError(
            str(path),
            found=f"files ({_some(loose)}) beside folders ({_some([folder.name for folder in folders])})",
            expected="folders only, one for each domain, or files only",
            change="move the files into a folder of their own, or out of the way",
        )
    return [_domain(folder, name=folder.name) for folder in folders]


def _domain(folder: Path, *, name: str) -> Domain:
    children = _children(folder)
    splits = {child: _split_of(child) for child in children}
    named = [child.name for child in children if splits[child]]
    others = [child.name for child in children if not splits[child]]
    if named and others:  # a guess here would train on what was held out, or on a README
        raise UserError(
            str(folder),
            found=f"{_some(others)} beside the splits {_some(named)}",
            expected="nothing but train*/eval* where one of them is named so",
            change="move the others out of the way, or rename the splits if they are none",
        )
    files = {child: tuple(_files(child)) for child in children}
    empty = [child.name for child in children if splits[child] and not files[child]]
    train = tuple(file for child in children if splits[child] != "eval" for file in files[child])
    held_out = tuple(file for child in children if splits[child] == "eval" for file in files[child])
    if empty or not train:
        raise UserError(
            f"domain {name!r} ({folder})",
            found=f"no file in {_some(empty)}" if empty else "no file to train on",
            expected="at least one file of documents",
            change="add documents or leave the folder out",
        )
    return Domain(name, folder, train, held_out)


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    real = path.resolve()
    if real in above or not path.is_dir():
        what = "a link that leads back to a folder it is in" if path.is_dir() else "neither a file nor a folder"
        raise UserError(str(path), found=what, expected="files and folders", change="remove it")
    for child in _children(path):
        yield from _files(child, (*above, real))


def _split_of(path: Path) -> str | None:
    if path.is_dir():
        return path.name if path.name in ("train", "eval") else None
    match = SPLIT_NAME.fullmatch(_stem(path))
    return match[1] if match and _suffix(path) in SPLIT_SUFFIXES else None


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _suffix(path: Path) -> str:
    return _bare(path).suffix.lower()


def _stem(path: Path) -> str:
    return _bare(path).stem


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed."""
    kind = path.suffix.lower()
    try:
        if kind in COMPRESSED and path.stat().st_size == 0:
            raise EOFError("0 bytes")  # both libraries take an empty file for an empty text
        if kind == ".zst":
            yield from _zstd_chunks(path)
            return
        with gzip.open(path) if kind == ".gz" else open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        whole = f"a whole {kind} file" if kind in COMPRESSED else "a readable file"
        change = "fetch or compress it again" if kind in COMPRESSED else "check the file and its permissions"
        raise UserError(str(path), found=f"{type(error).__name__}: {error}", expected=whole, change=change) from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # Frame by frame, because zstandard's stream_reader ends a truncated file without a word.
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join((*parts, end))
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def _json_lines(path: Path) -> Iterator[Document]:
    offset = 0
    unit = "decompressed byte" if path.suffix.lower() in COMPRESSED else "byte"
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        where = f"{path}, line {number} ({unit} {offset})"
        text = _decode(line, where=where, offset=offset)
        offset += len(line) + 1
        if text.strip():
            yield _document(text, where=where)


def _document(line: str, *, where: str) -> Document:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        # json's own words count lines within this one.
        why = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise _fault(where, found=f"broken JSON ({why})", expected='{"text": ...}') from error
    if not isinstance(fields, dict):
        raise _fault(where, found=f"a JSON {type(fields).__name__}", expected='an object, {"text": ...}')
    if "text" not in fields:
        raise _fault(where, found=f"no 'text' among the keys ({_some(list(fields)) or 'none'})", expected="a 'text'")
    text = fields["text"]
    if not isinstance(text, str):
        raise _fault(where, found=f"a 'text' of type {type(text).__name__}", expected="a 'text' that is a string")
    try:
        return Document(text, len(text.encode()), where)
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(text[error.start]):04x} at character {error.start} of 'text'"
        raise _fault(where, found=f"a lone surrogate, {lone}", expected="text that UTF-8 can hold") from error


def _fault(where: str, *, found: str, expected: str) -> UserError:
    return UserError(where, found=found, expected=expected, change="mend the line or remove it")


def _plain(path: Path) -> Document:
    parts, size = [], 0
    for chunk in _chunks(path):
        if (at := chunk.find(b"\0")) >= 0:
            raise UserError(
                str(path),
                found=f"a NUL at byte {size + at}, so a binary file",
                expected="plain text or .jsonl, either may be compressed as .gz or .zst",
                change="remove it or convert it to text",
            )
        parts.append(chunk)
        size += len(chunk)
    text = _decode(b"".join(parts), where=str(path), offset=0)
    return Document(text, len(text.encode()), str(path))


def _decode(raw: bytes, *, where: str, offset: int) -> str:
    # Only the bytes at the very start of a file are a BOM; later the same bytes are a character.
    body = raw.removeprefix(BOM) if offset == 0 else raw
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        at = offset + len(raw) - len(body) + error.start
        found = f"byte 0x{body[error.start]:02x} at byte {at}, which is not UTF-8 ({error.reason})"
        raise UserError(where, found=found, expected="UTF-8", change="convert the file to UTF-8") from error
