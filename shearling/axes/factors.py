"""What multiplies what: one description, applied to the model while masks are learned and to its weights at the cut.

The rules, and what was measured of them, are in docs/architecture.md. A mask's soft value lies once on each path:
`hidden` and `layer` on the last operation before the residual add, inner axes on the columns of the weight that reads
them there. The norms see the smaller model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shearling.axes.axis import MASKABLE
from shearling.axes.spec import Family
from shearling.axes.table import Tensor

Part = Literal["soft", "support", "count", "centre"]
When = Literal["always", "masked", "cut"]


@dataclass(frozen=True)
class Factor:
    """A mask along `axis`, to a power, multiplies a tensor along its dimension `dim` (None: all of it).

    `part` is what of the mask. `soft`: its value. `support`: 1 where it isn't 0. `count`: sqrt(m / D), m of the axis's
    D entries being in the support; on a norm's weight, its epsilon then takes m / D. `centre`: no factor but the
    matrix I - k 1^T / m, k the support, which takes the kept entries' mean off what the soft mask left.
    `when`: while `masked`, at the `cut`, or `always`. `output` moves the factor, while masked, from the tensor to what
    its module gives: an embedding's rows are far fewer when looked up.
    """

    axis: str
    dim: int | None
    part: Part = "soft"
    power: float = 1
    when: When = "always"
    output: bool = False


def factors(family: Family, *, tied: bool) -> dict[Tensor, tuple[Factor, ...]]:
    """The factors of each row of the family's table, those without any left out."""
    below = dict(normalised(family))
    rows = (*family.tensors, *family.connectors)
    found = {row: tuple(_factors(row, family, tied, below.get(row))) for row in rows}
    return {row: some for row, some in found.items() if some}


def normalised(family: Family) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows whose product goes straight into a norm, biases with their weights, each with that norm."""
    above: list[Tensor] = []
    for row in family.tensors:
        if row.role == "post" or (row.role == "norm" and row.stream is None and not row.is_bias):
            yield from ((before, row) for before in above)
        above = [*above, row] if row.is_bias else [row]


def _factors(row: Tensor, family: Family, tied: bool, below: Tensor | None) -> Iterator[Factor]:
    if row.role == "embed":
        yield Factor("hidden", dim=row.stream, output=True)
        yield from _centre(row, family)
        if row.scaled:  # by a constant that the cut's smaller size makes smaller
            yield Factor(row.scaled, dim=None, part="count", power=-1, when="cut")
    elif row.role == "join":  # no constant: what a tower gives is scaled by nothing
        yield Factor("hidden", dim=row.stream)
        yield from _centre(row, family)
    elif row.role == "write":
        yield from _written(row, family) if below is None else [Factor("hidden", row.stream, "support", when="masked")]
        if row.input is not None:
            yield from (Factor(axis, dim=row.input) for axis in _maskable(row, row.input))
        if row.stacked:  # the same as on the routing weight, which is what it multiplies while masked
            yield Factor("expert", dim=0)
    elif row.role == "route" and not row.is_bias:
        yield Factor("expert", dim=row.output, part="support", when="masked")
    elif row.role == "post":
        yield from (Factor("hidden", dim=0), Factor("layer", dim=None))
        if not row.is_bias:
            yield Factor("hidden", dim=0, part="count", when="masked")
    elif row.role == "read":
        counted = _maskable(row, _output(row)) if below is None else _maskable(below, 0)
        axes = (axis for axis in counted if below is not None or axis == "rotary")
        yield from (Factor(axis, _output(row), "support", when="masked") for axis in axes)
        if below is None:
            yield from _turned(row, _output(row), family)
    elif row.role == "norm":
        yield from _norm(row, family, tied)
        yield from _turned(row, 0, family)


def _written(row: Tensor, family: Family) -> Iterator[Factor]:
    yield Factor("hidden", dim=row.stream)
    yield Factor("layer", dim=None)
    yield from _centre(row, family)


def _centre(row: Tensor, family: Family) -> Iterator[Factor]:
    """Where norms take the mean off, it must be the mean of what stays; the cut's own norms see to that."""
    if any(family.normalisation(norm).centred for norm in family.role("norm") if norm.stream is not None):
        yield Factor("hidden", row.stream, "centre", when="masked", output=row.role == "embed")


def _turned(row: Tensor, dim: int, family: Family) -> Iterator[Factor]:
    """Scores are divided by the root of head_dim: q and k make good a root each of what that loses at the cut."""
    if "rotary" in row.dims[dim].axes() and not family.attention_scale:
        yield Factor("rotary", dim, "count", power=0.5, when="cut")


def _norm(row: Tensor, family: Family, tied: bool) -> Iterator[Factor]:
    axes = ("hidden",) if row.stream is not None else _maskable(row, 0)
    # A bias would put something into entries that are gone; it is no average, so no count makes it right.
    part = "support" if row.is_bias else "count"
    yield from (Factor(axis, dim=0, part=part, when="masked") for axis in axes)
    # A tied table takes the mask for the embedding's sake; before the head the norm takes it back.
    weight = row.name.removesuffix("bias") + "weight" if row.is_bias else row.name
    shared = [reader.tied for reader in family.readers(weight) if reader.tied]
    if tied and shared:
        yield Factor("hidden", dim=0, power=-1, when="cut")
        table = next(embed for embed in family.role("embed") if embed.name == shared[0])
        if table.scaled:
            yield Factor(table.scaled, dim=None, part="count", when="cut")


def _output(row: Tensor) -> int:
    return 0 if row.output is None else row.output


def _maskable(row: Tensor, dim: int) -> tuple[str, ...]:
    return tuple(axis for axis in row.dims[dim].axes() if axis in MASKABLE)
