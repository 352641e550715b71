"""What multiplies what: one description, applied to the model while masks are learned and to its weights at the cut.

The rules, and what was measured of them, are in docs/architecture.md. A mask's soft value lies once on each path:
`hidden` and `layer` on the last operation before the residual add, inner axes on the columns of the weight that reads
them there. The norms see the smaller model.
"""

from dataclasses import dataclass
from typing import Literal

from shearling.axes.axis import MASKABLE
from shearling.axes.spec import Family
from shearling.axes.table import Tensor

When = Literal["always", "masked", "cut"]


@dataclass(frozen=True)
class Factor:
    """A mask along `axis`, to a power, multiplies a tensor along its dimension `dim` (None: all of it).

    `part` is what of the mask: its `soft` value, or the `count` m of its support, as sqrt(m / D), on a norm's weight
    (whose epsilon then takes m / D). `when`: while `masked`, at the `cut`, or `always`. `output` moves the factor,
    while masked, from the tensor to what its module gives: an embedding's rows are far fewer when looked up.
    """

    axis: str
    dim: int | None
    part: Literal["soft", "count"] = "soft"
    power: int = 1
    when: When = "always"
    output: bool = False


def factors(family: Family, *, tied: bool) -> dict[Tensor, tuple[Factor, ...]]:
    """The factors of each row of the family's table, those without any left out."""
    found = {tensor: _factors(tensor, family, tied) for tensor in family.tensors}
    return {tensor: some for tensor, some in found.items() if some}


def _factors(tensor: Tensor, family: Family, tied: bool) -> tuple[Factor, ...]:
    if tensor.role == "embed":
        return (Factor("hidden", dim=1, output=True),)
    if tensor.role == "write":
        rows = (Factor("hidden", dim=0), Factor("layer", dim=None))
        inner = tensor.dims[1].axes() if len(tensor.dims) == 2 else ()
        return rows + tuple(Factor(axis, dim=1) for axis in inner if axis in MASKABLE)
    if tensor.role == "norm" and tensor.dims[0].axes() == ("hidden",):
        count = (Factor("hidden", dim=0, part="count", when="masked"),)
        # A tied table takes the mask for the embedding's sake; before the head the norm takes it back.
        feeds_tied = tied and any(reader.tied for reader in family.readers(tensor.name))
        return count + ((Factor("hidden", dim=0, power=-1, when="cut"),) if feeds_tied else ())
    return ()
