"""Plain text: a file is a document. Memory is bounded by some three times the longest file."""

from collections.abc import Iterator

from shearling.data.document import Document, Reading, of_text, refuse_messages
from shearling.data.files import chunks, shown
from shearling.errors import UserError

BOM = b"\xef\xbb\xbf"


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """The whole of it."""
    return [(0, None)]


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The file's one document. Raises UserError, naming the byte, for a binary file and for what isn't UTF-8."""
    refuse_messages(shown(path), found="plain text", reading=reading)
    parts, size = [], 0
    for chunk in chunks(path):
        if (at := chunk.find(b"\0")) >= 0:
            raise UserError(
                shown(path),
                found=f"a NUL at byte {size + at}, so a binary file",
                expected="plain text or .jsonl, either may be compressed as .gz or .zst",
                change="remove it or convert it to text",
            )
        parts.append(chunk)
        size += len(chunk)
    yield of_text(decode(b"".join(parts), where=shown(path), offset=0), where=shown(path))


def decode(raw: bytes, *, where: str, offset: int) -> str:
    """UTF-8 bytes that stand at `offset` of a file, its BOM dropped; UserError names the first byte that is none."""
    # Only the bytes at the very start of a file are a BOM; later the same bytes are a character.
    body = raw.removeprefix(BOM) if offset == 0 else raw
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        at = offset + len(raw) - len(body) + error.start
        found = f"byte 0x{body[error.start]:02x} at byte {at}, which is not UTF-8 ({error.reason})"
        raise UserError(where, found=found, expected="UTF-8", change="convert the file to UTF-8") from error
