"""A family as data: a table of tensors on named axes, and the few facts that the tensors don't tell.

The table is text, a line a tensor, in the order of computation:

    role  name on the module  dim  dim  [options]

Roles: `embed` fills the residual stream; `norm` normalises along its dim; `read` belongs to what reads the residual
stream (through the norm above it); `write` is the last operation before the residual add; `head` gives the logits.
`*` in a name stands for the layer's number. A line with one word heads a group for counting.
Options: `bias=FLAG` adds a bias on the first dim where the config's FLAG is true (`bias=always`: everywhere);
`tied=NAME` says which tensor it shares storage with where the config ties them; `disk=NAME` is its name in files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from shearling.axes.axis import Dim

ROLES = ("embed", "norm", "read", "write", "head")


@dataclass(frozen=True)
class Tensor:
    """One row: a parameter, or one per layer where the name has a `*`."""

    name: str
    role: str
    dims: tuple[Dim, ...]
    group: str
    norm: str = ""  # the norm through which a reader reads the residual stream
    when: str = ""  # the config flag under which the parameter exists; empty: always
    tied: str = ""  # the tensor that it shares storage with where the config ties embeddings
    disk: str = ""

    @property
    def per_layer(self) -> bool:
        return "*" in self.name

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its size along each dim, where `sizes` has each axis's."""
        return tuple(dim.size(sizes) for dim in self.dims)

    def at(self, layer: int | None) -> str:
        """The name on the module, for one layer."""
        return self.name.replace("*", str(layer))

    def at_disk(self, layer: int | None) -> str:
        """The name in files, for one layer."""
        return (self.disk or self.name).replace("*", str(layer))


@dataclass(frozen=True)
class Normalisation:
    """How a family's norms work: the module's attribute and the config's key that hold their epsilon.

    `offset` is what the stored weight lacks of the effective one (Gemma: 1), `centred` is LayerNorm's mean.
    """

    eps_attribute: str
    eps_key: str
    offset: float = 0.0
    centred: bool = False


@dataclass(frozen=True)
class LayerRule:
    """How a per-layer list of the config is made when the config doesn't spell it out.

    Entry i is `above` where `flag` is true and i >= config[start], else `below`; all are `below` if `window` is null.
    """

    key: str
    flag: str
    start: str
    window: str
    below: str
    above: str


@dataclass(frozen=True)
class Family:
    """Everything Shearling knows of a family. See the module's docstring for `table`."""

    name: str
    model_types: tuple[str, ...]
    table: str
    norms: Normalisation
    cache: str  # a dim: what one token adds to one layer's KV-cache
    scores: str  # a dim: multiply-adds per token, layer and position attended to
    defaults: Mapping[str, Any] = field(default_factory=dict)  # a number, a flag, another key, or "key / key"
    nulls: Mapping[str, Any] = field(default_factory=dict)  # what a null means, where that isn't the default
    divides: tuple[str, ...] = ()  # "a % b": what transformers' config class insists on
    layer_rules: tuple[LayerRule, ...] = ()  # lists of the config that follow the kept layers
    tensors: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", tuple(_rows(self.table)))

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """The config's value of `key`, or the family's default for it. Raises KeyError where there is neither."""
        value = config.get(key)
        if value is not None:
            return value
        spelled_null = key in config and key in self.nulls
        default = self.nulls[key] if spelled_null else self.defaults[key]
        if not isinstance(default, str):
            return default
        above, _, below = (word.strip() for word in default.partition("/"))
        if not below:
            return self.setting(config, above)
        ratio = Fraction(self.setting(config, above), self.setting(config, below))
        return ratio.numerator if ratio.denominator == 1 else int(ratio)

    def present(self, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The parameters that a model with this config has: no absent biases, no head that is a tied embedding."""
        tied = self.setting(config, "tie_word_embeddings")
        return tuple(t for t in self.tensors if self._exists(t, config) and not (t.tied and tied))

    def _exists(self, tensor: Tensor, config: Mapping[str, Any]) -> bool:
        return tensor.when in ("", "always") or bool(self.setting(config, tensor.when))

    def readers(self, norm: str) -> tuple[Tensor, ...]:
        """The weights that read the residual stream through `norm`."""
        return tuple(t for t in self.tensors if t.norm == norm and len(t.dims) == 2)

    def block(self, layer: int) -> str:
        """The path of one layer's module."""
        row = next(t for t in self.tensors if t.per_layer)
        return row.name.partition("*")[0] + str(layer)

    def role(self, role: str) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role == role)


def named(tensors: tuple[Tensor, ...], layers: int) -> Iterator[tuple[Tensor, int | None]]:
    """Each parameter with its layer: (tensor, None) or (tensor, layer), layer by layer in the table's order."""
    first = next((i for i, t in enumerate(tensors) if t.per_layer), len(tensors))
    block = tuple(t for t in tensors if t.per_layer)
    yield from ((t, None) for t in tensors[:first])
    yield from ((t, layer) for layer in range(layers) for t in block)
    yield from ((t, None) for t in tensors[first:] if not t.per_layer)


def _rows(table: str) -> Iterator[Tensor]:
    group, norm = "", ""
    for line in filter(None, map(str.strip, table.splitlines())):
        words = line.split()
        if len(words) == 1:
            group = words[0]
            continue
        role, name, *rest = words
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        dims = tuple(Dim.parse(word) for word in rest if "=" not in word)
        if role not in ROLES or not dims or set(options) - {"bias", "tied", "disk"}:
            raise ValueError(f"a table's line is: role name dim [dim] [options], role one of {ROLES}; found {line!r}")
        if role == "norm" and dims[0].axes() == ("hidden",):
            norm = name
        reads = norm if role in ("read", "head") and "hidden" in dims[-1].axes() else ""
        tied, disk = options.get("tied", ""), options.get("disk", "")
        yield Tensor(name, role, dims, group, norm=reads, tied=tied, disk=disk)
        if "bias" in options:
            bias = name.removesuffix("weight") + "bias"
            yield Tensor(bias, role, dims[:1], group, when=options["bias"])
