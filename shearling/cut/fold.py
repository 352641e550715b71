"""One tensor of the cut: its kept entries, with everything folded in that axes/factors.py says."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shearling.axes.axis import is_per_layer, mask_shape
from shearling.axes.factors import Factor
from shearling.axes.index import Kept, positions
from shearling.axes.table import Tensor as Row


def slice_kept(weight: Tensor, row: Row, kept: Kept, layer: int | None) -> Tensor:
    """The kept entries of a source tensor of one row, along all of its dims, in its own dtype."""
    for dim, spec in reversed(list(enumerate(row.dims))):
        nested = row.nested(dim)
        if nested is not None and any(axis in kept.choices for axis in spec.axes()):
            weight = _slice_nested(weight, dim, kept.rows(nested, layer), kept, layer)
            continue
        index = kept.rows(spec, layer)
        if index is not None and weight.shape[dim] != len(index):
            weight = weight.index_select(dim, torch.tensor(index))
    return weight


def _slice_nested(weight: Tensor, dim: int, index: list[int] | None, kept: Kept, layer: int | None) -> Tensor:
    """A stack's kept matrices, and of each the entries along `dim` that are kept in it."""
    assert index is not None
    assert layer is not None
    flat = weight.movedim(dim, 1)
    matrices = len(kept.along("expert", (layer,)))
    flat = flat.flatten(0, 1).index_select(0, torch.tensor(index)).unflatten(0, (matrices, -1))
    return flat.movedim(1, dim)


def fold_factors(
    weight: Tensor,
    row: Row,
    found: tuple[Factor, ...],
    *,
    kept: Kept,
    masks: Mapping[str, Tensor],
    layer: int | None,
    offset: float = 0.0,
) -> Tensor:
    """A sliced tensor times what belongs on it, in fp32 at least; as it is where nothing does.

    `masks` are the source's, by axis, [*within, size]; axes without one take no factor. `offset` is what the tensor
    lacks of the one that counts.
    """
    mine = [f for f in found if f.when != "masked" and (f.axis in (kept.choices if f.part == "count" else masks))]
    if not mine:
        return weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    for factor in mine:
        if factor.part == "count":
            share = (kept.counts()[factor.axis] / kept.source[factor.axis]) ** (0.5 * factor.power)
            even = torch.full(mask_shape(factor.axis, kept.source), share)
            vector = torch.tensor(share) if factor.dim is None else _along(row, factor, kept, even, layer)
        else:
            vector = _along(row, factor, kept, masks[factor.axis], layer).to(weight.dtype) ** factor.power
        if factor.dim is not None:
            along = (factor.dim,) if row.nested(factor.dim) is None else (0, factor.dim)
            vector = vector.reshape([weight.shape[dim] if dim in along else 1 for dim in range(weight.dim())])
        weight = weight * vector
    return weight - offset


def spread_over(mask: Tensor, where: Sequence[int] | Tensor) -> Tensor:
    """A mask's values, flattened, at `positions` of a dim: 1 where these are -1, entries that it says nothing of."""
    return functional.pad(mask.reshape(-1), (0, 1), value=1.0)[torch.as_tensor(where)]


def _along(row: Row, factor: Factor, kept: Kept, mask: Tensor, layer: int | None) -> Tensor:
    """A mask's kept values along one dim of the cut: [entries], or [] for a factor on all of the tensor."""
    mask = mask.cpu()
    if is_per_layer(factor.axis):
        assert layer is not None
        mask = mask[layer]
    if factor.dim is None:
        return mask
    dim = row.nested(factor.dim) or row.dims[factor.dim]
    spread = spread_over(mask, positions(dim, factor.axis, kept.source))
    index = kept.rows(dim, layer)
    return spread if index is None else spread[torch.tensor(index)]
