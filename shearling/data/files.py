"""Files and folders here and in object stores (anything fsspec opens): what is there, and bytes, decompressed.

A place is a string: a path, or a URL (s3://, gs://, hf://, memory:// ...). Local files never go through fsspec.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import fsspec
import fsspec.config
import zstandard

from shearling.errors import UserError

COMPRESSED = (".gz", ".zst", ".zstd")
READ_BYTES = 1 << 16
BLOCK_BYTES = 1 << 22  # what a store is asked for at once; s3fs's own 50 MB is more than a part
# What `zstd --long=31` writes; the library's own limit refuses windows over 128 MB.
ZSTD_WINDOW_BYTES = 1 << 31
URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
# TOKENIZER_PATH and MAX_TOKENS hold no secret; what they hold is written to recipes as it is.
SECRET_NAMES = re.compile(r"secret|token(?!s|i[sz])|password|passwd|access_?key|credential|^key$|sas", re.IGNORECASE)
MIN_SECRET = 6  # shorter values are words that occur anywhere

Kind = Literal["file", "folder", "neither"]


def place(given: str | Path) -> str:
    """A path or URL as this module takes it: `file://` is a local path, `~` is the home folder."""
    path = str(given)
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if is_remote(path) else os.path.expanduser(path)


def is_remote(path: str) -> bool:
    """Whether fsspec opens it."""
    return URL.match(path) is not None


def name(path: str) -> str:
    """The last component; a local path's as the user named it, links not resolved."""
    return PurePosixPath(_bare_url(path)).name if is_remote(path) else os.path.basename(os.path.abspath(path))


def suffix(path: str) -> str:
    """The extension, lower case, without one of compression."""
    return PurePosixPath(_uncompressed(path)).suffix.lower()


def stem(path: str) -> str:
    """The name without extension and compression."""
    return PurePosixPath(_uncompressed(name(path))).stem


def compression(path: str) -> str:
    """ ".gz", ".zst", ".zstd" or ""."""
    found = PurePosixPath(path).suffix.lower()
    return found if found in COMPRESSED else ""


def join(folder: str, child: str) -> str:
    """The place of `child` inside a folder."""
    return f"{folder.rstrip('/')}/{child}" if is_remote(folder) else os.path.join(folder, child)


def parent(path: str) -> str:
    """The folder that a place is in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def look(path: str) -> Kind | None:
    """What stands at a place, None for nothing. Raises UserError for a store that doesn't answer."""
    with storage(path):
        if not is_remote(path):
            found = Path(path)
            if not found.exists() and not found.is_symlink():
                return None
            return "folder" if found.is_dir() else "file" if found.is_file() else "neither"
        filesystem, inside = open_filesystem(path)
        try:
            return _kind(filesystem.info(inside))
        except FileNotFoundError:
            return None


def children(folder: str) -> dict[str, Kind]:
    """What a folder holds, by place, in alphabetical order; hidden names are left out."""
    with storage(folder):
        if not is_remote(folder):
            found: dict[str, Kind] = {str(child): look(str(child)) or "neither" for child in Path(folder).iterdir()}
        else:
            filesystem, inside = open_filesystem(folder)
            listed = filesystem.ls(inside, detail=True)
            # Some stores list a marker object of the folder's own name.
            found = {
                join(folder, PurePosixPath(entry["name"]).name): _kind(entry)
                for entry in listed
                if entry["name"].strip("/") != inside.strip("/")
            }
    return {path: found[path] for path in sorted(found) if not name(path).startswith(".")}


def size_bytes(path: str) -> int:
    """The size of a file as stored."""
    with storage(path):
        if not is_remote(path):
            return os.stat(path).st_size
        filesystem, inside = open_filesystem(path)
        return int(filesystem.size(inside) or 0)


def version(path: str) -> str:
    """What tells one state of a file from another: its size, and its time of change or the store's tag for it."""
    with storage(path):
        if not is_remote(path):
            status = os.stat(path)
            return f"{status.st_size} {status.st_mtime_ns}"
        filesystem, inside = open_filesystem(path)
        info = filesystem.info(inside)
        tags = [info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if key in info]
        return f"{info['size']} {tags[:1]}"


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file to read and seek in, as stored. Raises UserError when it can't be opened or read inside the block."""
    with storage(path):
        filesystem, inside = open_filesystem(path) if is_remote(path) else (None, path)
        with filesystem.open(inside, "rb", block_size=BLOCK_BYTES) if filesystem else open(path, "rb") as file:
            yield cast(BinaryIO, file)


def chunks(path: str, *, start: int = 0) -> Iterator[bytes]:
    """A file's bytes, decompressed, from byte `start` of an uncompressed one. Raises UserError for a broken file."""
    kind = compression(path)
    with opened(path) as file:
        if not kind:
            file.seek(start)
            while chunk := file.read(READ_BYTES):
                yield chunk
            return
        if not file.read(1):
            raise EOFError("0 bytes")  # both libraries take an empty file for an empty text
        file.seek(0)
        yield from _gzip_chunks(file) if kind == ".gz" else _zstd_chunks(file)


@contextmanager
def storage(path: str) -> Iterator[None]:
    """Turns what storage and decompression raise about `path` into a UserError that gives no secret away."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = isinstance(error, OSError | EOFError | zlib.error | zstandard.ZstdError)
        # Stores raise classes of their own that share no base, and ValueError for an address that they can't take;
        # any other class of Python's is a fault of ours.
        foreign = type(error).__module__ != "builtins" or type(error) is ValueError
        if not known and not (is_remote(path) and foreign):
            raise
        kind = compression(path)
        found = f"{type(error).__name__}: {without_secrets(str(error))}"
        whole = f"a whole {kind} file" if kind else "a readable file"
        change = "fetch or compress it again" if kind else "check the file and its permissions"
        if is_remote(path):
            change = f"check the address, your credentials and the network, or {change}"
        raise UserError(shown(path), found=found, expected=whole, change=change) from error


def shown(path: str) -> str:
    """A place for messages: a URL without password and query."""
    return without_secrets(path) if "://" in path else path


def without_secrets(text: str) -> str:
    """A text without passwords and queries of URLs, and the secrets of the environment and of fsspec's settings."""
    text = re.sub(r"(://)[^/\s@]+@", r"\1***@", text)
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\")]*", r"\1?***", text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def masked(value: Any) -> Any:
    """Plain values, as JSON has them, with all texts as `without_secrets` leaves them."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {masked(key): masked(inner) for key, inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list | tuple) else value


def _secrets() -> set[str]:
    found = {value for key, value in os.environ.items() if SECRET_NAMES.search(key)}
    for settings in fsspec.config.conf.values():
        if isinstance(settings, dict):
            found |= {value for key, value in settings.items() if isinstance(value, str) and SECRET_NAMES.search(key)}
    return {value for value in found if len(value) >= MIN_SECRET}


def open_filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and what the URL is inside it. Raises UserError for one that isn't installed."""
    protocol = path.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ImportError)
        raise UserError(
            shown(path),
            found=f"nothing installed that reads {protocol}:// ({error})" if missing else without_secrets(str(error)),
            expected="a store that fsspec opens",
            change=_install(protocol) if missing else "check the address",
        ) from error


def _install(protocol: str) -> str:
    return "pip install 'shearling[remote]'" if protocol in ("s3", "s3a") else "install the package that it names"


def _kind(info: dict[str, Any]) -> Kind:
    return "folder" if info["type"] == "directory" else "file"


def _bare_url(path: str) -> str:
    return path.partition("://")[2].partition("?")[0].rstrip("/")


def _uncompressed(path: str) -> str:
    return path[: -len(kind)] if (kind := compression(path)) else path


def _gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as text:
        while chunk := text.read(READ_BYTES):
            yield chunk


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    # Frame by frame, because zstandard's stream_reader ends a truncated file without a word.
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    while chunk := file.read(READ_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a frame")
