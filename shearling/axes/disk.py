"""How a row of the table lies in files: under one name, or in pieces.

`disk=A+B` concatenates along the first dim that is a sum or starts with a number: a piece for each product of the sum,
or equal ones. `#` in a name stands for the expert's number: the files hold a stack's matrices apart.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shearling.axes.axis import Dim
from shearling.axes.table import Tensor


@dataclass(frozen=True)
class Piece:
    """One tensor of the files: its name, its shape, and where it lies in the row's tensor (an index of it)."""

    name: str
    shape: tuple[int, ...]
    where: tuple[int | slice, ...]


def placed(
    rows: Iterable[tuple[Tensor, int | None]], sizes: Mapping[str, int]
) -> dict[str, tuple[Piece, Tensor, int | None]]:
    """The tensors of the files by name, each with the row and layer that it is of, in the rows' order."""
    return {piece.name: (piece, row, layer) for row, layer in rows for piece in pieces(row, layer, sizes)}


def pieces(row: Tensor, layer: int | None, sizes: Mapping[str, int]) -> Iterator[Piece]:
    """The pieces of a row of one layer, in the order of its entries. Raises ValueError if names and dims disagree."""
    names, shape = row.at_disk(layer).split("+"), list(row.shape(sizes))
    whole: tuple[slice, ...] = tuple(slice(0, size) for size in shape)
    parts: list[tuple[str, tuple[slice, ...]]] = [(names[0], whole)]
    if len(names) > 1:
        dim, lengths = _split(row, len(names), sizes)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        bounds = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        parts = [(name, (*whole[:dim], part, *whole[dim + 1 :])) for name, part in zip(names, bounds, strict=True)]
    for name, where in parts:
        extents = tuple(part.stop - part.start for part in where)
        if "#" not in name:
            yield Piece(name, extents, where)
            continue
        for expert in range(shape[0]):
            yield Piece(name.replace("#", str(expert)), extents[1:], (expert, *where[1:]))


def _split(row: Tensor, parts: int, sizes: Mapping[str, int]) -> tuple[int, list[int]]:
    """Along which dim, and how many entries each part takes of it."""
    for i, dim in enumerate(row.dims):
        if len(dim.products) == parts:
            return i, [Dim((product,)).size(sizes) for product in dim.products]
        if len(dim.products) == 1 and dim.products[0][0] == parts:
            return i, [dim.size(sizes) // parts] * parts
    raise ValueError(f"{row.name}: {parts} names in files, but no dim of so many parts among {row.dims}")
