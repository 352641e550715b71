"""Which terms of the algebra a family's table uses: what docs/families.md lists, and what makes blocks of one kind."""

from collections.abc import Callable

from shearling.axes.axis import AXES
from shearling.axes.spec import Family, Normalisation
from shearling.axes.table import Tensor


def terms(family: Family) -> tuple[str, ...]:
    """Their names, in the order of TERMS."""
    return tuple(name for name, used in TERMS.items() if used(family))


def _some(of: Callable[[Tensor], object]) -> Callable[[Family], bool]:
    return lambda family: any(of(row) for row in family.tensors)


def _norms(of: Callable[[Normalisation], object]) -> Callable[[Family], bool]:
    return lambda family: any(
        of(family.normalisation(row)) for row in family.tensors if row.role in ("norm", "post") and not row.is_bias
    )


def _over_heads(row: Tensor, *, all_of_them: bool) -> bool:
    axes = row.dims[0].axes()
    return row.role == "norm" and axes != ("hidden",) and ("kv_head" in axes) is all_of_them


def _is_transposed(row: Tensor) -> bool:
    return row.input is not None and row.input < len(row.dims) - 1


def _has_constant(row: Tensor) -> bool:
    products = (product for dim in row.dims for product in dim.products if len(product) > 1)
    return any(isinstance(factor, int) for product in products for factor in product)


def _is_opaque(row: Tensor) -> bool:
    """Whether it is part of a mixer whose inner sizes belong to no axis."""
    words = {word for dim in row.dims for product in dim.products for word in product if isinstance(word, str)}
    return row.role in ("read", "write") and bool(words - AXES.keys()) and words <= {*(words - AXES.keys()), "hidden"}


TERMS: dict[str, Callable[[Family], bool]] = {
    "RMSNorm": _norms(lambda norm: not norm.centred),
    "LayerNorm": _norms(lambda norm: norm.centred),
    "norms that store w - 1": _norms(lambda norm: norm.offset),
    "norms before the residual add": _some(lambda row: row.role == "post"),
    "norms on each head's q and k": _some(lambda row: _over_heads(row, all_of_them=False)),
    "norms over all heads' q and k": _some(lambda row: _over_heads(row, all_of_them=True)),
    "grouped-query attention": lambda family: "group" in family.axes,
    "biases": _some(lambda row: row.is_bias and row.role not in ("norm", "post")),
    "learned positions": lambda family: len(family.role("embed")) > 1,
    "scaled embeddings": _some(lambda row: row.scaled),
    "logits scaled or capped": lambda family: bool(family.logits),
    "several projections in one tensor": _some(lambda row: any(len(dim.products) > 1 for dim in row.dims)),
    "constants in a dim": _some(_has_constant),
    "transposed storage": _some(_is_transposed),
    "other names on disk": _some(lambda row: row.disk),
    "hidden tied to heads": lambda family: bool(family.coupled),
    "layers of several kinds": lambda family: bool(family.layer_rules),
    "experts": lambda family: "expert" in family.axes,
    "shared experts": lambda family: "shared_intermediate" in family.axes,
    "opaque mixers": _some(_is_opaque),
    "attention sinks": _some(lambda row: row.role == "inner" and row.dims[0].axes() == ("kv_head", "group")),
}
