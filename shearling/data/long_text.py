"""Texts of any length through a tokenizer in bounded memory: piece by piece, joined where two readings agree."""

from collections.abc import Callable
from typing import Any

import numpy as np

PIECE_CHARS = 1 << 20
OVERLAP_TOKENS = 1024
RUN_TOKENS = 32  # so many tokens alike, with their places, end what a piece's start has changed

Rows = np.ndarray  # int64 [tokens, 3]: id, first character, the character after the last


def encode_long(encode: Callable[[str], Any], text: str) -> Rows:
    """Ids and places of a text's tokens, [tokens, 3], as `encode` (a text to a tokenizers.Encoding) would give them.

    Each piece starts where a token of the piece before starts, OVERLAP_TOKENS before its end, and they are joined in
    the middle of RUN_TOKENS alike. Where there are no such, the later piece is taken from its start on: what comes out
    are still the text's tokens, though maybe not those of one reading. A token as long as a piece makes for a longer
    piece.
    """
    done: list[Rows] = []
    tail = np.empty((0, 3), np.int64)  # of the piece before, from where this one starts
    start, size = 0, PIECE_CHARS
    while True:
        end = _end(text, start, start + size)
        rows = _rows(encode(text[start:end]), start)
        before, after = _seam(tail, rows)
        if end == len(text):
            return np.concatenate((*done, tail[:before], rows[after:]))
        cut = _restart(rows, after)
        if cut is None:
            size *= 2
            continue
        done += [tail[:before], rows[after:cut]]
        tail, start, size = rows[cut:], int(rows[cut, 1]), PIECE_CHARS


def _rows(encoding: Any, start: int) -> Rows:
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
    return np.column_stack((np.array(encoding.ids, np.int64), places))


def _end(text: str, start: int, end: int) -> int:
    """Where a piece ends: at white space of its second half if there is any, as a word cut in two may be unknown."""
    if end >= len(text):
        return len(text)
    found = max(text.rfind(space, start + (end - start) // 2, end) for space in " \n")
    return found if found > start else end


def _restart(rows: Rows, after: int) -> int | None:
    """The last token past `after`, OVERLAP_TOKENS or more before the end, that starts where the one before it ended."""
    clean = np.flatnonzero(rows[1:, 1] >= rows[:-1, 2]) + 1
    clean = clean[(clean <= len(rows) - OVERLAP_TOKENS) & (clean > after)]
    clean = clean[rows[clean, 1] > rows[0, 1]]
    return int(clean[-1]) if len(clean) else None


def _seam(tail: Rows, rows: Rows) -> tuple[int, int]:
    """How many tokens of `tail` to take, and from which of `rows` to go on."""
    places = {tuple(row): number for number, row in enumerate(rows[: 2 * len(tail)].tolist())}
    for before in range(len(tail) - RUN_TOKENS):
        after = places.get(tuple(tail[before].tolist()))
        if after is not None and np.array_equal(tail[before : before + RUN_TOKENS], rows[after : after + RUN_TOKENS]):
            return before + RUN_TOKENS // 2, after + RUN_TOKENS // 2
    return 0, 0
