"""Parquet, a row a document, in ranges of row groups.

Memory is bounded by one row group's column as stored, and one batch of its rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shearling.data.document import Document, Reading, check_column, fault, of_fields
from shearling.data.files import opened, shown, without_secrets
from shearling.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PART_BYTES = 1 << 25
BATCH_ROWS = 256


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """Ranges of row groups, each of PART_BYTES bytes or more when decompressed, and of one group at least."""
    with _table(path, reading=reading) as table:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    found: list[tuple[int, int | None]] = []
    start = size = 0
    for group, group_bytes in enumerate(sizes, start=1):
        size += group_bytes
        if size >= PART_BYTES or group == len(sizes):
            found.append((start, group))
            start, size = group, 0
    return found


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The documents of the row groups `start` to `end`; UserErrors for rows that hold none.

    Raises UserError for what is no whole Parquet file, and for a table without the column, naming those there are.
    """
    with _table(path, reading=reading) as table:
        row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        groups = range(start, table.num_row_groups if end is None else end)
        for batch in table.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=[reading.column]):
            for value in batch.column(0):
                row += 1
                yield _document(value, where=f"{shown(path)}, row {row}", reading=reading)


def _document(value: Any, *, where: str, reading: Reading) -> Document | UserError:
    try:
        return of_fields({reading.column: value.as_py()}, where=where, reading=reading)
    except UnicodeDecodeError as error:  # Parquet's strings aren't checked when they are written
        bad = f"byte 0x{error.object[error.start]:02x} at byte {error.start} of the text, which is not UTF-8"
        return fault(where, found=f"{bad} ({error.reason})", expected="UTF-8")
    except UserError as error:
        return error


@contextmanager
def _table(path: str, *, reading: Reading) -> Iterator["ParquetFile"]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            shown(path),
            found="no pyarrow to read Parquet with",
            expected="the extra 'parquet'",
            change="pip install 'shearling[parquet]'",
        ) from error
    with opened(path) as file:
        try:
            # Without pre_buffer a group is read a column at a time.
            table = ParquetFile(file, pre_buffer=False)
            check_column(table.schema_arrow.names, where=shown(path), reading=reading)
            yield table
        except (pyarrow.ArrowException, OSError) as error:
            found = f"{type(error).__name__}: {without_secrets(str(error)).partition(chr(10))[0]}"
            change = "fetch or write it again"
            raise UserError(shown(path), found=found, expected="a whole Parquet file", change=change) from error
