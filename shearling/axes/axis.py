"""Named axes, and dims built from them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Axis:
    """A named axis. `within` are the axes for each of whose entries there is a choice of its own along this one.

    A mask along the axis has the shape [*within, size], so `group` is masked per layer and kv head.
    """

    name: str
    within: tuple[str, ...] = ()


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("vocab"),
        Axis("hidden"),
        Axis("layer"),
        Axis("kv_head", within=("layer",)),
        Axis("group", within=("layer", "kv_head")),
        Axis("head_dim", within=("layer", "kv_head")),
        Axis("rotary"),
        Axis("intermediate", within=("layer",)),
        Axis("expert", within=("layer",)),
        Axis("moe_intermediate", within=("layer", "expert")),
        Axis("shared_intermediate", within=("layer",)),
    )
}

# The axes a mask can lie on: all but vocab.
MASKABLE = (
    "hidden",
    "layer",
    "kv_head",
    "group",
    "head_dim",
    "rotary",
    "intermediate",
    "expert",
    "moe_intermediate",
    "shared_intermediate",
)
# Axes that are as long as another, of which the config has one size for both: the entries of q and k, and those of v.
FOLLOWS = {"rotary": "head_dim"}


@dataclass(frozen=True)
class Dim:
    """A tensor's dimension: a sum of products of axes and constants; row-major, one product after another.

    A word that is no axis is a size of one family's that is never cut (Family.fixed).
    """

    products: tuple[tuple[str | int, ...], ...]

    @classmethod
    def parse(cls, text: str, fixed: Collection[str] = ()) -> "Dim":
        """`kv_head*group*head_dim + 2*kv_head*head_dim`. Raises ValueError for a word neither an axis nor `fixed`."""
        products = tuple(
            tuple(int(word) if word.isdigit() else _known(word, fixed) for word in term.strip().split("*"))
            for term in text.split("+")
        )
        return cls(products)

    def size(self, sizes: Mapping[str, int]) -> int:
        """Entries along the dim, where `sizes` has each axis's size."""
        return sum(prod(_extent(factor, sizes) for factor in product) for product in self.products)

    def axes(self) -> tuple[str, ...]:
        """The axes it is built from, each once, in order of appearance."""
        return tuple(dict.fromkeys(f for product in self.products for f in product if f in AXES))

    def __str__(self) -> str:
        return " + ".join("*".join(map(str, product)) for product in self.products)


def _known(word: str, fixed: Collection[str]) -> str:
    if word not in AXES and word not in fixed:
        raise ValueError(f"{word!r} is not an axis; axes: {', '.join([*AXES, *fixed])}")
    return word


def _extent(factor: str | int, sizes: Mapping[str, int]) -> int:
    return factor if isinstance(factor, int) else sizes[factor]


def is_per_layer(axis: str) -> bool:
    """Whether a layer's tensors see one layer's part of the axis's mask: entry `layer` of its first dimension."""
    return axis == "layer" or "layer" in AXES[axis].within


def mask_shape(axis: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a mask along `axis`: [*within, size]."""
    return (*(sizes[outer] for outer in AXES[axis].within), sizes[axis])
