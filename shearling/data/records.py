"""Files by whose names nobody knows whether they are a document, as in code, or full of them: .json, .csv, .tsv."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from shearling.data.document import Reading
from shearling.data.files import chunks, shown, suffix
from shearling.data.jsonl import lines
from shearling.data.plain import BOM
from shearling.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", *SEPARATORS)


def are_lines(path: str, *, reading: Reading) -> bool:
    """Whether a .json file has an object in each line: one with the column that `reading` asks for, or at least two.

    Raises UserError for what has that column in another form, a list of objects or a spreadsheet.
    """
    head = next(chunks(path), b"").removeprefix(BOM).lstrip().decode(errors="replace")
    if suffix(path) in SEPARATORS:
        names = head.partition("\n")[0].split(SEPARATORS[suffix(path)])
        if reading.column in [name.strip().strip('"') for name in names]:
            change = "convert it (pandas.read_csv, then to_parquet), or name it .txt if it is a document as it is"
            raise _another_form(path, reading, "a spreadsheet", change)
        return False
    if re.match(r"\[\s*\{", head) and json.dumps(reading.column) in head:
        raise _another_form(path, reading, "a list", "write it so (`jq -c '.[]'`), or name it .txt if it is a document")
    found = list(_objects(path)) if head.startswith("{") else []
    return len(found) == 2 or any(reading.column in record for record in found)


def _objects(path: str) -> Iterator[dict[str, Any]]:
    """Of its first two lines that aren't blank those that are objects, up to one that isn't."""
    written = (line.removeprefix(BOM).strip() for line in lines(chunks(path)))
    for line in islice(filter(None, written), 2):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(found, dict):
            return
        yield found


def _another_form(path: str, reading: Reading, form: str, change: str) -> UserError:
    expected = "JSON lines, an object in each line, or Parquet"
    return UserError(shown(path), found=f"{form} with {reading.column!r} in it", expected=expected, change=change)
