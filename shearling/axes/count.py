"""Counting: parameters, bytes, cache and FLOPs, of a shape or in expectation, all from one polynomial.

B sequences, T tokens; sizes are entries per axis (Shape.axes).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from shearling.axes.axis import AXES, Dim
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family
from shearling.axes.table import Tensor

# Keep probabilities along an axis: nested as its mask is, [*within, size].
Probabilities = Mapping[str, Sequence[Any]]


def parameters(family: Family, config: Mapping[str, Any], shape: Shape | None = None) -> int:
    """Parameters of a model with this config; of the same config at another shape, if one is given."""
    return sum(parameters_by_group(family, config, shape).values())


def parameters_by_group(family: Family, config: Mapping[str, Any], shape: Shape | None = None) -> dict[str, int]:
    """Parameters per heading of the family's table, in its order."""
    sizes = (shape or shape_of(family, config)).axes
    groups = dict.fromkeys((tensor.group for tensor in family.tensors), 0)
    for tensor in family.present(config):
        groups[tensor.group] += prod(tensor.shape(sizes)) * copies(tensor, family, config, sizes["layer"])
    return groups


def active_parameters(family: Family, config: Mapping[str, Any], shape: Shape | None = None) -> int:
    """Parameters that one token's pass takes part of: of each stack of experts only those that a token goes to."""
    sizes = (shape or shape_of(family, config)).axes
    rows = family.present(config)
    return sum(_active(t, sizes) * copies(t, family, config, sizes["layer"]) for t in rows)


def _active(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """Entries of a row that one token meets."""
    entries = prod(tensor.shape(sizes))
    return entries // sizes["expert"] * min(sizes["top_k"], sizes["expert"]) if tensor.stacked else entries


def copies(tensor: Tensor, family: Family, config: Mapping[str, Any], layers: int) -> int:
    """How many of `layers` layers have a row; 1 for what belongs to no layer."""
    return _layers_of(tensor.on, family, config, layers) if tensor.per_layer else 1


def _layers_of(on: tuple[str, ...], family: Family, config: Mapping[str, Any], layers: int) -> int:
    """Layers of some kinds among `layers`; where these are fewer than the config's, evenly spread over them."""
    if not on:
        return layers
    kinds = family.kinds(config)
    return sum(not kinds[i * len(kinds) // layers].isdisjoint(on) for i in range(layers))


def cache_bytes_per_token(
    family: Family, config: Mapping[str, Any], shape: Shape | None = None, *, bytes_per_entry: int = 2
) -> int:
    """Bytes that one token adds to the KV-cache of one sequence, over all layers."""
    sizes = (shape or shape_of(family, config)).axes
    return _over_attention(family.cache, family, config, sizes) * bytes_per_entry


def flops_per_token(family: Family, config: Mapping[str, Any], shape: Shape | None = None, *, context: int) -> int:
    """FLOPs of one token's forward pass, attending to `context` positions. A multiply-add is two.

    Matrices and attention scores; norms, activations and the softmax are left out, as is usual (Kaplan et al. 2020,
    arXiv 2001.08361, table 1). Training costs three times as much.
    """
    sizes = (shape or shape_of(family, config)).axes
    heads = {t for t in family.role("head") if t.tied}  # a tied table is multiplied by all the same
    matrices = (t for t in {*family.present(config), *heads} if t.input is not None)
    products = sum(_active(t, sizes) * copies(t, family, config, sizes["layer"]) for t in matrices)
    return 2 * (products + _over_attention(family.scores, family, config, sizes) * context)


def _over_attention(dim: str, family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    on = (family.attends,) if family.attends else ()
    return Dim.parse(dim, family.fixed).size(sizes) * _layers_of(on, family, config, sizes["layer"])


def expected_parameters(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, int], keep: Probabilities
) -> float:
    """Expected parameters when each entry of an axis stays with its keep probability, independently of others.

    An axis that `keep` leaves out stays whole. At probabilities of 0 and 1 this is the count of the cut.
    """
    total = 0.0
    for tensor, layer in family.named(config, range(sizes["layer"])):
        stays = keep["layer"][layer] if layer is not None and "layer" in keep else 1.0
        total += stays * prod(expected_size(dim, sizes, keep, layer) for dim in _independent(tensor))
    return total


def _independent(tensor: Tensor) -> tuple[Dim, ...]:
    """A tensor's dims, those that are nested in its stack as one with it."""
    nested = [tensor.nested(dim) for dim in range(len(tensor.dims))]
    joint = tuple(dim for dim in nested if dim is not None)
    return joint + tuple(dim for i, dim in enumerate(tensor.dims) if nested[i] is None and not (joint and i == 0))


def expected_size(dim: Dim, sizes: Mapping[str, int], keep: Probabilities, layer: int | None) -> float:
    """Expected entries along one dim of one layer's tensor."""
    return sum(_expect(product, sizes, keep, {} if layer is None else {"layer": layer}) for product in dim.products)


def _expect(
    product: tuple[str | int, ...], sizes: Mapping[str, int], keep: Probabilities, chosen: dict[str, int]
) -> float:
    """Sum over a product's entries, from its first factor inwards; `chosen` holds the entries already fixed."""
    if not product:
        return 1.0
    axis, rest = product[0], product[1:]
    if isinstance(axis, int):
        return axis * _expect(rest, sizes, keep, chosen)
    if axis not in keep:
        inner = any(axis in AXES[other].within for other in rest if isinstance(other, str) and other in keep)
        if not inner:
            return sizes[axis] * _expect(rest, sizes, keep, chosen)
        return sum(_expect(rest, sizes, keep, {**chosen, axis: i}) for i in range(sizes[axis]))
    along = keep[axis]
    for outer in AXES[axis].within:
        along = along[chosen[outer]]
    return sum(float(p) * _expect(rest, sizes, keep, {**chosen, axis: i}) for i, p in enumerate(along))
